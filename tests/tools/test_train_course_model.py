"""Training the course model: a run that was interrupted goes on where it stopped; the card tells what the log holds."""

import json

import numpy as np
import pytest
import torch

from qtutor import QtutorError, corpus, course_model
from tools import train_course_model


@pytest.mark.slow
def test_training_goes_on_where_it_was_interrupted(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4096, 20_000).astype(np.uint16)
    kwargs = dict(precision="bf16", batch_size=2, seq_len=32, log_every=2, progress=False, num_hidden_layers=1)
    whole, log, _ = train_course_model.train(tmp_path / "a", ids, steps=6, **kwargs)

    class Stop(Exception):
        pass

    real, count = corpus.batches, 0

    def interrupted(*args, **kw):
        nonlocal count
        for batch in real(*args, **kw):
            count += 1
            if count == 6:
                raise Stop
            yield batch

    corpus.batches = interrupted
    try:
        with pytest.raises(Stop):
            train_course_model.train(tmp_path / "b", ids, steps=6, save_every=4, **kwargs)
    finally:
        corpus.batches = real
    assert (tmp_path / "b" / "checkpoint.safetensors").exists()
    resumed, log_b, _ = train_course_model.train(tmp_path / "b", ids, steps=6, save_every=4, **kwargs)
    assert [r["step"] for r in log_b] == [r["step"] for r in log] == [2, 4, 6]
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    with pytest.raises(QtutorError, match="other settings"):
        train_course_model.train(tmp_path / "b", ids, steps=8, **kwargs)


def test_fp8_trains_and_comes_back_as_a_plain_llama(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4096, 5_000).astype(np.uint16)
    model, log, _ = train_course_model.train(tmp_path, ids, ids[:200], "fp8", steps=2, batch_size=2, seq_len=32,
                                             progress=False, num_hidden_layers=1)  # fmt: skip
    assert {type(m) for m in model.modules() if hasattr(m, "weight") and m.weight.ndim == 2} == {
        torch.nn.Linear, torch.nn.Embedding}  # fmt: skip
    assert 8 < log[-1]["loss"] < 9 and 8 < log[-1]["valid"] < 9  # log(4096) = 8.3: it knows nothing yet


def test_the_shipped_card_is_made_from_the_training_log():
    info = json.loads((course_model.MODEL_DIR / "training.json").read_text())
    assert train_course_model.card(info) == (course_model.MODEL_DIR / "README.md").read_text()
