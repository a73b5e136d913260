"""measure: what the functions promise, never how fast this machine is."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_llama

from qtutor import QtutorError, measure


def test_time_ms_counts_calls_and_orders_percentiles():
    calls = []
    timing = measure.time_ms(lambda: calls.append(1), warmup=2, repeats=7)
    assert len(calls) == 9 and timing.n == 7
    assert 0 <= timing.p10 <= timing.median_ms <= timing.p90


def test_time_ms_is_in_milliseconds():
    timing = measure.time_ms(lambda: time.sleep(0.02), warmup=0, repeats=3, device="cpu")
    assert timing.p10 >= 19  # sleep never returns early; how late it returns is the machine's business
    assert timing.per_second(40) == pytest.approx(40_000 / timing.median_ms)
    assert "ms" in str(timing)


@pytest.mark.parametrize("bad", [dict(repeats=0), dict(warmup=-1)])
def test_time_ms_bad_input(bad):
    with pytest.raises(QtutorError):
        measure.time_ms(lambda: None, **bad)


ALLOCATION = """
import time, numpy as np
from qtutor import measure
with measure.track_memory(device="cpu") as memory:
    block = np.ones(64 * 2**20, np.uint8)
    time.sleep(0.05)
print(block.nbytes / measure.GIB, memory.added, memory.peak, measure.peak_memory_gib(device="cpu"))
"""


def test_memory_sees_an_allocation():
    """In a process of its own: one that ran other tests may give memory back, or reuse what it has, meanwhile."""
    child = [sys.executable, "-W", "ignore", "-c", ALLOCATION]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    size, added, peak, most = map(float, done.stdout.split())
    assert size * 0.9 < added < 1
    assert most >= 0.9 * peak > 0


def test_track_memory_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), measure.track_memory(device="cpu"):
        1 / 0  # noqa: B018


def test_file_size(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "folder" / "b").write_bytes(b"x" * 5)
    assert measure.file_size(tmp_path / "a") == 10 and measure.file_size(tmp_path) == 15
    with pytest.raises(QtutorError):
        measure.file_size(tmp_path / "missing")


def test_machine_is_flat_and_anonymous():
    about = measure.machine()
    assert about["device"] and about["cpu"] and about["memory_gib"] > 0 and about["cores"] >= 1
    assert all(isinstance(v, (str, int, float, type(None))) for v in about.values())
    assert platform.node() not in json.dumps(about)


def test_gpu_events():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(512, 512, device="cuda")
    assert measure.time_ms(lambda: x @ x, device="cuda").median_ms > 0
    with measure.track_memory(device="cuda") as memory:
        y = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    assert memory.added == pytest.approx(y.nbytes / measure.GIB, rel=0.1)


# ------------------------------------------------------------------------------------------------- torch's instrument


def test_torch_timer_measures_the_same_thing():
    def work():
        time.sleep(0.01)

    ours, theirs = measure.time_ms(work, warmup=1, repeats=5, device="cpu"), measure.torch_timer(work, seconds=0.1)
    assert ours.median_ms >= 10 and theirs.median_ms >= 10  # both milliseconds a call: sleep never returns early
    assert theirs.p10 <= theirs.median_ms <= theirs.p90 and theirs.n >= 1


def test_torch_timer_uses_as_many_threads_as_pytorch():
    import torch

    seen, before = set(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        measure.torch_timer(lambda: seen.add(torch.get_num_threads()), seconds=0.01)
        assert seen == {2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- memory of a GPU


def test_whole_device_needs_a_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (measure.device_memory_gib, lambda: measure.device_memory_gib("cpu")):
        with pytest.raises(QtutorError):
            call()
    with pytest.raises(QtutorError), measure.track_memory(whole_device=True):
        pass


def test_whole_device_samples_the_peak(monkeypatch):
    import torch

    use = {"free": 6}
    monkeypatch.setattr(measure, "_on_gpu", lambda device: True)
    monkeypatch.setattr(measure, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (use["free"] * measure.GIB, 10 * measure.GIB))
    with measure.track_memory(whole_device=True, interval_s=0.001) as memory:
        use["free"] = 1
        time.sleep(0.1)
        use["free"] = 5
    assert memory.before == 4 and memory.peak == 9 and memory.added == 5


# --------------------------------------------------------------------------------------------------- prefill, decode


@pytest.fixture(scope="module")
def llama():
    return tiny_llama.model()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, llama):
    from qtutor import gguf_export

    folder = tmp_path_factory.mktemp("measure")
    return gguf_export.export(tiny_llama.save(folder / "hf", llama), folder / "model.gguf")


def _written(runs):
    """What prefill and the steps after it write: (batch, 1 + new_tokens)."""
    runs.prefill()
    tokens = [np.asarray(runs._runs.token)]
    for _ in range(runs.new_tokens):
        runs.step()
        tokens.append(np.asarray(runs._runs.token))
    return np.concatenate(tokens, 1)


def test_what_is_timed_is_generation(llama):
    """The same tokens as transformers' generate(), for every sequence of a batch, again after a rewind."""
    import torch

    with measure.Generation(llama, prompt_tokens=12, new_tokens=6, batch=3) as runs:
        written, ids = _written(runs), runs._runs.ids
        runs.decode()
        assert np.array_equal(np.asarray(runs._runs.token), written[:, -1:])
    expected = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert np.array_equal(written, expected[:, 12:].numpy())


@pytest.mark.parametrize("batch", [1, 3])
def test_llama_cpp_writes_what_it_should(gguf, batch):
    """Several sequences in one call: each gets the tokens that it would get alone."""
    from qtutor import llamacpp

    with llamacpp.Model(gguf, ctx=32) as model, measure.Generation(model, 12, 4, batch) as runs:
        written, ids = _written(runs), runs._runs.ids
        runs.decode()
        assert np.array_equal(runs._runs.token, written[:, -1:])
        for row, prompt in zip(written, ids, strict=True):
            context = list(prompt)
            for token in row:
                logits = model.logits(np.array(context))[-1]
                # F16 cache and the fused attention round differently: the likeliest, or all but
                assert logits[token] > logits.max() - 0.05
                context.append(token)


@pytest.mark.parametrize("kind", ["transformers", "path"])
def test_generation_speed(kind, llama, gguf):
    model = llama if kind == "transformers" else gguf
    speed = measure.generation_speed(model, prompt_tokens=8, new_tokens=5, batch=2, repeats=3)
    assert speed.prefill.n == 3 and speed.decode.n == 15
    for t in (speed.prefill, speed.decode):
        assert 0 < t.p10 <= t.median_ms <= t.p90
    row = speed.row()
    assert row["prefill_ms"] == speed.ttft_ms and all(isinstance(v, (int, float)) for v in row.values())


def test_rates_by_hand():
    prefill, decode = measure.Timing(5, 4, 6, 3), measure.Timing(2, 1, 3, 30)
    speed = measure.Speed(batch=4, prompt_tokens=100, new_tokens=10, prefill=prefill, decode=decode)
    assert speed.prefill_tokens_per_s == pytest.approx(4 * 100 / 0.005)
    assert speed.decode_tokens_per_s == pytest.approx(4 / 0.002)
    assert "80,000 tokens/s" in str(speed) and speed.row()["decode_tokens_per_s"] == pytest.approx(2000)


def test_generation_leaves_the_model_as_it_was(llama):
    llama.train()
    try:
        with measure.Generation(llama, 4, 1) as runs:
            assert not llama.training
            runs.prefill()
        assert llama.training
    finally:
        llama.eval()


@pytest.mark.parametrize("bad", [
    dict(prompt_tokens=0), dict(new_tokens=0), dict(batch=0), dict(batch=1.5), dict(repeats=0), dict(warmup=-1),
    dict(prompt_tokens=1020, new_tokens=10), dict(graph=True),
])  # fmt: skip
def test_generation_speed_bad_input(bad, llama):
    with pytest.raises(QtutorError):
        measure.generation_speed(llama, **{**dict(prompt_tokens=4, new_tokens=2), **bad})


@pytest.mark.parametrize("what", [7, "missing.gguf"])
def test_generation_speed_of_something_else(what, tmp_path):
    with pytest.raises(QtutorError):
        measure.generation_speed(tmp_path / what if isinstance(what, str) else what, 4, 2)


def test_gpu_generation(llama):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = tiny_llama.model().to("cuda", torch.bfloat16)
    for graph in (False, True):
        speed = measure.generation_speed(model, 16, 4, batch=2, repeats=2, graph=graph)
        assert speed.decode.n == 8 and speed.decode.median_ms > 0
