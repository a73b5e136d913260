"""measure: what the functions promise, never how fast this machine is."""

from __future__ import annotations

import json
import platform
import time

import numpy as np
import pytest

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


def test_memory_sees_an_allocation():
    with measure.track_memory(device="cpu") as memory:
        block = np.ones(64 * 2**20, np.uint8)
        time.sleep(0.05)
    assert block.nbytes / measure.GIB * 0.9 < memory.added < 1
    assert measure.peak_memory_gib(device="cpu") >= 0.9 * memory.peak > 0


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
