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

from qtutor import measure


def test_time_ms_counts_calls_and_orders_percentiles():
    calls = []
    timing = measure.time_ms(lambda: calls.append(1), warmup=2, repeats=7)
    assert len(calls) == 9 and timing.n == 7
    assert 0 <= timing.p10 <= timing.median_ms <= timing.p90


def test_figures_by_hand():
    timing = measure.Timing((10.0, 20.0, 40.0))
    assert timing.median_ms == 20
    mean, error = timing.mean_per_second(4)  # 400, 200 and 100 a second
    assert mean == pytest.approx(700 / 3) and error == pytest.approx(np.std([400, 200, 100], ddof=1) / 3**0.5)
    assert measure.Timing((10.0,)).mean_per_second(1) == (100.0, None)


def test_a_least_duration():
    began = time.perf_counter()
    timing = measure.time_ms(lambda: time.sleep(0.005), warmup=0, repeats=2, seconds=0.1, device="cpu")
    assert timing.n > 2 and time.perf_counter() - began >= 0.1


def test_before_comes_ahead_of_each_call_and_is_not_timed():
    calls = []
    timing = measure.time_ms(lambda: calls.append("fn"), 1, 3, "cpu",
                             before=lambda: (calls.append("before"), time.sleep(0.05)))  # fmt: skip
    assert calls == ["before", "fn"] * 4 and timing.n == 3 and timing.p10 < 40


def test_alternatives_take_turns():
    calls = []
    found = measure.compare_ms({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1, 2, "cpu")
    assert calls == ["a", "b"] * 3 and list(found) == ["a", "b"] and found["b"].n == 2


def test_torchs_own_instrument_measures_the_same():
    from torch.utils import benchmark

    def work():
        time.sleep(0.01)

    theirs = benchmark.Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=0.1).median
    assert measure.time_ms(work, repeats=5, device="cpu").median_ms == pytest.approx(1000 * theirs, rel=0.2)


def test_bandwidth():
    found = measure.bandwidth("cpu", gib=0.02)
    assert found["bandwidth_gb_per_s"] == max(found["copy_gb_per_s"], found["read_gb_per_s"]) > 0


def test_time_ms_is_in_milliseconds():
    timing = measure.time_ms(lambda: time.sleep(0.02), warmup=0, repeats=3, device="cpu")
    assert timing.p10 >= 19  # sleep never returns early; how late it returns is the machine's business
    assert "ms" in str(timing)


ALLOCATION = """
import time, numpy as np
from qtutor import measure
with measure.track_memory(device="cpu") as memory:
    block = np.ones(64 * 2**20, np.uint8)
    time.sleep(0.05)
print(block.nbytes / measure.GIB, memory.added, memory.peak)
"""


@pytest.mark.slow
def test_memory_sees_an_allocation():
    """In a process of its own: one that ran other tests may give memory back, or reuse what it has, meanwhile."""
    child = [sys.executable, "-W", "ignore", "-c", ALLOCATION]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    size, added, peak = map(float, done.stdout.split())
    assert size * 0.9 < added < 1
    assert peak > added


def test_track_memory_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), measure.track_memory(device="cpu"):
        1 / 0  # noqa: B018


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
    assert measure.device_memory_gib() > memory.peak
    pair = measure.compare_ms({"small": lambda: x @ x, "copy": lambda: y.clone()}, seconds=0.05, repeats=2)
    assert pair["small"].n == pair["copy"].n > 2 and pair["small"].p10 > 0
    a = torch.ones(1, device="cuda")
    replay, b = measure.captured(lambda: a * 2)
    a.fill_(5)
    replay()
    assert b.item() == 10


# ------------------------------------------------------------------------------------------- what is really stored


def test_stored_bytes_of_a_plain_model():
    llama = tiny_llama.model()
    count = llama.num_parameters()
    assert measure.stored_bytes(llama) == (4 * count, count)  # the tied matrix once
    assert measure.stored_bytes(llama.bfloat16()) == (2 * count, count)
    weight = llama.lm_head.weight
    assert measure.stored_bytes(weight) == (2 * weight.numel(), weight.numel())


def test_stored_bytes_looks_inside_torchao():
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    llama = tiny_llama.model().bfloat16()
    count = llama.num_parameters()
    linears = [m for m in llama.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    quantize_(llama.model.layers, Int8WeightOnlyConfig())
    linear, rows = sum(m.weight.numel() for m in linears), sum(m.out_features for m in linears)
    size, weights = measure.stored_bytes(llama)
    # in the layers one byte a weight, and for each output row a scale (and a zero point in some versions)
    scales = size - linear - 2 * (count - linear)
    assert weights == count and 2 * rows <= scales <= 8 * rows


def test_stored_bytes_of_packed_codes():
    import torch

    from qtutor import fake_quant, packed

    layers = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 16))
    stored = packed.convert(fake_quant.prepare(layers, "int4", group_size=32))
    size, weights = measure.stored_bytes(stored)
    assert size == sum(layer.nbytes for layer in stored) + 4 * 16  # and a bias in float32
    assert weights == 64 * 32 + 32 * 16


def test_stored_bytes_of_a_transformer_engine_tensor():
    import torch

    class Quantized(torch.nn.Parameter):
        def get_data_tensors(self):
            return torch.zeros(4, 8, dtype=torch.uint8), None

    weight = Quantized(torch.zeros(4, 8, dtype=torch.bfloat16), requires_grad=False)
    weight._scale_inv = torch.ones(1)
    layer = torch.nn.Module()
    layer.weight = weight
    assert measure.stored_bytes(layer) == (4 * 8 + 4, 32)


def test_stored_bytes_of_bitsandbytes():
    import torch

    nn = pytest.importorskip("bitsandbytes").nn
    layer, weight = nn.Linear4bit(256, 128, bias=False, quant_type="nf4"), torch.randn(128, 256, dtype=torch.bfloat16)
    layer.weight = nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    size, weights = measure.stored_bytes(layer.to("cpu"))
    assert weights == 256 * 128 and 4 + 32 / 64 <= 8 * size / weights < 4.6  # a scale for 64 weights, and a small table


def test_stored_bytes_of_quanto():
    import torch

    quanto = pytest.importorskip("optimum.quanto")
    model = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16))
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    size, weights = measure.stored_bytes(model)
    assert weights == 256 * 128 and 8 < 8 * size / weights < 8.2
