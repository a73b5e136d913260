"""llama_speed: the rows, their arithmetic, and what happens where the child process dies, at a tiny size."""

import types

import numpy as np
import pytest

from qtutor import QtutorError, energy, llamacpp, results
from qtutor.decide import capacity
from qtutor.rigs import llama_speed, random_gguf

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return random_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_gguf.TINY, "Q4_K_M")


@pytest.mark.slow
def test_measure(tiny):
    rows = llama_speed.measure(tiny, "Q4_K_M", device_bandwidth={"bandwidth_gb_per_s": 50.0},
                               **llama_speed.QUICK | {"depth": 128, "depth_generate": 4})  # fmt: skip
    assert [row["kind"] for row in rows] == ["model", "depth", "batch", "batch"]
    assert all(set(results.vocabulary_of(row)) == set(row) for row in rows)
    model, size = rows[0], capacity.size(random_gguf.TINY, "Q4_K_M")
    assert model["fits"] and model["file_bytes"] == tiny.stat().st_size
    assert model["read_bytes_per_token"] == size.read_bytes
    assert model["host_model_mib"] + model["device_model_mib"] > 0.9 * size.tensor_bytes / 2**20
    ctx = capacity.kv_bytes(random_gguf.TINY, model["ctx"]) / 2**20
    assert abs(model["host_kv_mib"] + model["device_kv_mib"] - ctx) < 0.006
    for row in rows:
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0
        assert row["ceiling_share"] == pytest.approx(row["decode_tokens_per_s"] / row["ceiling_tokens_per_s"])
    halfway = 24 / 2  # the mean length of the cache while 24 tokens are written into an empty one
    wanted = capacity.ceiling(random_gguf.TINY, "Q4_K_M", halfway, 50.0)
    assert model["ceiling_tokens_per_s"] == pytest.approx(wanted)
    assert rows[3]["ceiling_tokens_per_s"] == pytest.approx(
        capacity.ceiling(random_gguf.TINY, "Q4_K_M", 8 + 4 / 2, 50.0, users=4))  # fmt: skip


def test_what_is_timed_is_the_model(tiny):
    """Several sequences at once: the second gives the logits that it gives alone, prompt and single steps alike."""
    with llamacpp.Model(tiny, 64, 1, exact=False, sequences=2) as model:
        run = llama_speed.Run(model)
        run.prefill(10)
        prompt, ids = run.logits[1].copy(), run.ids[1]
        run.decode(3, past=10)
        last = run.logits[1].copy()
    with llamacpp.Model(tiny, ctx=64, exact=False, threads=1) as reference:
        for found, n in ((prompt, 10), (last, 13)):
            wanted = reference.logits(ids[:n])[-1]
            assert np.allclose(found, wanted, atol=0.02 * np.abs(wanted).max())


def test_resize_keeps_the_weights(tiny):
    with llamacpp.Model(tiny, 64, 1, exact=False) as model:
        before, model_mib = model.step([[1, 2, 3]], 0).copy(), model.memory()["host_model_mib"]
        model.resize(256, 3)
        assert np.allclose(model.step([[1, 2, 3]] * 3, 0)[2], before, atol=0.02 * np.abs(before).max())
        assert model.memory()["host_model_mib"] == model_mib
        assert model.memory()["host_kv_mib"] == pytest.approx(capacity.kv_bytes(random_gguf.TINY, 256, users=3) / 2**20,
                                                              abs=0.006)  # fmt: skip


@pytest.mark.parametrize("settings, words", [
    ({"promt": 3}, "no setting 'promt'"),
    (llama_speed.QUICK | {"ctx": 64}, "more than ctx=64"),
])  # fmt: skip
def test_settings_are_checked(tiny, settings, words):
    with pytest.raises(QtutorError, match=words):
        llama_speed.measure(tiny, "Q4_K_M", **settings)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(QtutorError, match="no file"):
        llama_speed.measure(tmp_path / "none.gguf", "Q4_K_M")


def test_a_child_that_dies_is_a_row(tiny, monkeypatch):
    """A native abort (here: a process that kills itself) ends in fits=False and a sentence, not in our own end."""
    monkeypatch.setattr(llama_speed.sys, "executable", "/bin/false")
    rows = llama_speed.measure(tiny, "Q4_K_M")
    assert len(rows) == 1 and rows[0]["fits"] is False
    assert "ended with code 1" in rows[0]["not_run"] and "\n" not in rows[0]["not_run"]


def test_time_is_limited(tiny):
    rows = llama_speed.measure(tiny, "Q4_K_M", limit_s=0.01)
    assert rows[0]["fits"] is False and "longer than 0.01 s" in rows[0]["not_run"]


def test_joules_of_a_phase(monkeypatch):
    """A counter of 300 W: joules a token are watts over speed; where the counter's steps weigh too much, None."""
    monkeypatch.setattr(energy.measure, "synchronize", lambda device=None: None)
    clock = energy.time.perf_counter
    monkeypatch.setattr(energy, "source_of", lambda device: energy._Source("played", 0.01, lambda: 300 * clock()))
    found = llama_speed._phase("decode", lambda: energy.time.sleep(0.06), 6, True, repeats=3)
    assert found["decode_watts"] == pytest.approx(300, rel=0.1)
    assert found["joules_per_decode_token"] == pytest.approx(300 / found["decode_tokens_per_s"], rel=0.1)
    assert llama_speed._phase("decode", lambda: None, 1, True, repeats=2)["joules_per_decode_token"] is None


def test_weights_larger_than_the_gpu(tiny):
    gpu = types.SimpleNamespace(memory=lambda: (2**19, 2**20))
    with pytest.raises(QtutorError, match="larger than the free GPU memory"):
        llama_speed._loaded(tiny, 64, gpu)


def test_70b_is_not_started_on_a_cpu(monkeypatch):
    file = types.SimpleNamespace(tensors=[types.SimpleNamespace(nbytes=50 * 2**30)])
    monkeypatch.setattr(llamacpp, "check_gguf", lambda path: file)
    with pytest.raises(QtutorError, match="computes on the CPU only"):
        llama_speed._loaded("70b.gguf", 64, None)
