"""The rows of the trade-off: what each number means, and that failures stay where they happen."""

from __future__ import annotations

import itertools
import time

import gguf
import pytest
import torch

from qtutor import QtutorError, corpus, energy, llamacpp, results
from qtutor.decide.pareto import left_out, measured
from qtutor.rigs import techniques, tradeoff
from qtutor.rigs.tradeoff import Sizes

TINY = Sizes(tokens=16, seconds=0.02, windows=0, questions=0)
llama_cpp = pytest.mark.skipif(not llamacpp.available()[0], reason="llama-cpp-python does not load")


def one(name, batches=(1,), files=None, **how):
    return tradeoff.rows([name], batches=batches, sizes=TINY, files=files, progress=False, **how)


@pytest.fixture(scope="module")
def files():
    made = tradeoff.Files()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BF16", pytest.param("GGUF Q4_0", marks=llama_cpp)])
def test_rows_have_the_schema(name, files):
    rows = one(name, (1, 3), files)
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert set(tradeoff.COLUMNS) <= set(row)
        assert row["technique"] == name and row["shape"] == "course" and row["not_run"] is None
        for column in ("prefill_tokens_per_s", "decode_tokens_per_s", "joules_per_decode_token"):
            if "joules" in column and not row[column]:  # too short for a GPU's counter or a process's clock
                continue
            assert 0 < row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]
        assert row["prefill_tokens"] == row["decode_context"] == 16
        assert row["perplexity"] is None and row["accuracy"] is None  # nothing to compare with was given
        assert results.vocabulary_of(row) == list(row)
    results.validate({"name": "tradeoff", "created": "2026-01-01T00:00:00+00:00", "commit": "", "profile": "quick",
                      "machine": {"device": "CPU"}, "versions": {"torch": "2"}, "rows": rows})  # fmt: skip


@pytest.mark.slow
@llama_cpp
def test_size_of_a_gguf_is_its_tensors(files):
    path = files.path("GGUF Q4_K_M")
    (row,) = one("GGUF Q4_K_M", files=files)
    tensors = gguf.GGUFReader(path).tensors
    size, weights = sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
    assert row["weights_mb"] == pytest.approx(size / 1e6)
    assert row["bits_per_weight"] == pytest.approx(8 * size / weights)


@pytest.mark.slow
def test_quality_is_compared_with_fp32_on_the_same_text():
    reference = tradeoff.Reference(Sizes(windows=2, questions=8), "cpu")
    row = reference.quality(techniques.build("BF16", where="cpu"))
    assert 0 < row["kld_mean"] < 0.01 and row["scored_tokens"] == 2 * 511 and row["accuracy_n"] == 8
    assert row["text"] == corpus.fingerprint(corpus.eval_text()) and abs(row["accuracy_diff"]) <= 1 / 8
    assert results.vocabulary_of(row) == list(row)


def test_pytorch_step_alone():
    model = techniques.build("FP32", where="cpu")
    row = tradeoff.pytorch_speed(model, 2, TINY, phases=("decode",))
    assert row["decode_context"] == 16 and "prefill_tokens_per_s" not in row


def test_energy_of_a_counter_comes_with_its_steps(monkeypatch):
    """Joules from a counter that moves in steps of 0.1 s come with that much doubt."""
    read = itertools.count(0.0, 30.0).__next__
    monkeypatch.setattr(energy, "source_of", lambda device: energy._Source("NVML energy counter", 0.1, read))
    row = tradeoff._phase("decode", lambda: time.sleep(0.02), 2, seconds=0.7, where="cpu")
    assert row["energy_source"] == "NVML energy counter"
    low, middle, high = (row[f"joules_per_decode_token{end}"] for end in ("_low", "", "_high"))
    assert 0.85 * middle < low < middle < high and (low + high) / 2 == pytest.approx(middle)
    short = tradeoff._phase("decode", lambda: time.sleep(0.005), 2, seconds=0.1, where="cpu")
    assert "joules_per_decode_token" not in short  # a window of one step says nothing


@pytest.mark.slow
def test_a_failure_is_a_row_and_the_rest_goes_on(monkeypatch):
    build = techniques.build

    def broken(technique, *where):
        if technique.name == "FP32":
            raise ValueError("no kernel\nand a long story")
        return build(technique, *where)

    monkeypatch.setattr(techniques, "build", broken)
    rows = tradeoff.rows(["FP32", "BF16"], batches=(1,), sizes=TINY, progress=False)
    assert left_out(rows) == {"FP32 (course)": "ValueError: no kernel."}
    assert [row["technique"] for row in measured(rows)] == ["BF16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so():
    assert left_out(one("FP8 (Transformer Engine)")) == {"FP8 (Transformer Engine) (course)": "It needs a GPU."}


def test_unknown_names():
    with pytest.raises(QtutorError, match="choose from"):
        tradeoff.rows(["FP3"])
