"""llm-compressor beside the notebook: the scoring half on a small case, both halves where llm-compressor is."""

import numpy as np
import pytest
import torch

from qtutor import course_model, ptq, results
from tools import record_llmcompressor as recorder

here = pytest.mark.skipif(not recorder.available(), reason="llm-compressor is not here: make llmc-env")


@pytest.fixture(scope="module")
def small():
    """(model of two layers, the lesson's functions for it, inputs of its layers, the windows that gave them)."""
    model = course_model.new_model(num_hidden_layers=2).eval()
    windows = np.arange(4 * 64).reshape(4, 64)
    use = recorder.lesson(model)
    return model, use, use["watch"](model, windows), windows


@pytest.mark.parametrize("case", recorder.CASES, ids=str)
def test_our_side_of_each_case_rounds_every_layer_to_its_grid(small, case):
    model, use, inputs, windows = small
    quantized = recorder.ours(case, model, use, inputs, windows)
    kind, group, method = case
    ids = torch.from_numpy(windows[:1])
    with torch.no_grad():
        moved = (quantized(ids).logits - model(ids).logits).abs().max()
    assert 0 < moved < 1
    for name, layer in ptq.linears(quantized).items():
        before = model.get_submodule(name).weight
        if kind != "W4A16":
            assert layer.weight_fake_quant is not None and layer.activation_fake_quant is not None
            folded = recorder.SMOOTH in method and not name.endswith(("o_proj", "down_proj"))
            assert torch.equal(layer.weight, before) != folded
        elif "order" not in method:
            assert max(len(block.unique()) for block in layer.weight.view(-1, group)) <= 16
    assert use["scale_of"].__name__ == "scale_of"  # as it was


def test_alone_differs_from_the_lesson_by_its_scales_only(small):
    model, use, inputs, windows = small
    layers = [ptq.linears(recorder.ours(("W4A16", 128, m), model, use, inputs, windows))
              for m in ("GPTQ", recorder.ALONE)]  # fmt: skip
    usual, alone = (found["model.layers.0.mlp.up_proj"].weight for found in layers)
    assert torch.equal(usual[:, :128], alone[:, :128])  # nothing has changed the first group's weights yet
    assert not torch.equal(usual[:, 128:], alone[:, 128:])


def test_without_the_environment_it_says_so(monkeypatch):
    monkeypatch.setenv("QTUTOR_LLMC_PYTHON", "/nowhere/python")
    assert not recorder.available()


@here
@pytest.mark.slow
def test_both_halves_agree(tmp_path, monkeypatch):
    """On the scales of the float weights, with each block calibrated alone, both give nearly the same model."""
    alone = [("W4A16", 128, recorder.ALONE), ("W4A16", 128, "GPTQ")]
    monkeypatch.setattr(recorder, "CASES", alone)
    monkeypatch.setattr(recorder, "GROUPS", (128,))
    rows = results.Results.model_validate_json(recorder.record(False, directory=tmp_path).read_text()).rows
    theirs = {row["method"]: row for row in rows if row.get("rival") == "ours"}
    assert abs(theirs[recorder.ALONE]["kld_less_rival"]) < 0.05 * theirs[recorder.ALONE]["kld_mean"]
    assert theirs["GPTQ"]["bits_per_weight"] == pytest.approx(4.126, abs=0.001)


def test_what_the_recording_says():
    """The conclusions of the notebook."""
    rows = results.load("ptq_official", "cpu").rows
    alone = [row for row in rows if row["method"] == recorder.ALONE and row.get("rival") == "ours"]
    assert len(alone) == 2 and all(abs(row["kld_less_rival"]) < 0.02 * row["kld_mean"] for row in alone)
    exact = [row for row in rows if row["method"] == recorder.PLAIN + recorder.EXACT and row.get("rival") == "ours"]
    assert len(exact) == 3 and all(abs(row["kld_less_rival"]) < 0.01 * row["kld_mean"] for row in exact)
