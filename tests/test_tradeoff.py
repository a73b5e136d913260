"""The rows of the trade-off: what each number means, that failures stay where they happen, and Pareto fronts."""

from __future__ import annotations

import math
import time

import gguf
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from qtutor import QtutorError, course_model, energy, llamacpp, results
from qtutor.decide import pareto
from qtutor.rigs import tradeoff
from qtutor.rigs.tradeoff import Sizes

TINY = Sizes(tokens=16, seconds=0.02, windows=0, questions=0)
llama_cpp = pytest.mark.skipif(not llamacpp.available()[0], reason="llama-cpp-python does not load")


@pytest.fixture(scope="module")
def files():
    made = tradeoff.Files()
    yield made
    made.close()


# ------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", ["BF16", pytest.param("GGUF Q4_0", marks=llama_cpp)])
def test_rows_have_the_schema(name, files):
    rows = tradeoff.measure_one(name, batches=(1, 3), sizes=TINY, files=files)
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert tuple(row) == tradeoff.COLUMNS
        assert row["technique"] == name and row["shape"] == "course" and row["not_run"] is None
        for column in ("prefill_tokens_per_s", "decode_tokens_per_s", "joules_per_decode_token"):
            if "joules" in column and not row[column]:  # too short for a GPU's counter or a process's clock
                continue
            assert 0 < row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]
        assert row["prefill_tokens"] == row["decode_context"] == 16
        assert row["perplexity"] is None and row["accuracy"] is None  # nothing to compare with was given
    results.validate({"name": "tradeoff", "created": "2026-01-01T00:00:00+00:00", "commit": "", "profile": "quick",
                      "machine": {"device": "CPU"}, "versions": {"torch": "2"}, "rows": rows})  # fmt: skip


def test_stored_size_looks_inside():
    plain = course_model.load()
    count = plain.num_parameters()
    assert tradeoff.stored_size(plain) == (4 * count, count)  # the tied matrix once
    size, weights = tradeoff.stored_size(tradeoff.build(tradeoff.TECHNIQUES["torchao INT8 weight-only"], device="cpu"))
    linear = sum(m.weight.numel() for m in plain.model.layers.modules() if isinstance(m, torch.nn.Linear))
    rows = sum(m.out_features for m in plain.model.layers.modules() if isinstance(m, torch.nn.Linear))
    # in the layers one byte a weight, and for each output row a float32 scale and a zero point; else two bytes
    assert weights == count and size == linear + 5 * rows + 2 * (count - linear)


def test_stored_size_of_a_transformer_engine_tensor():
    class Quantized(torch.nn.Parameter):
        def get_data_tensors(self):
            return torch.zeros(4, 8, dtype=torch.uint8), None

    weight = Quantized(torch.zeros(4, 8, dtype=torch.bfloat16), requires_grad=False)
    weight._scale_inv = torch.ones(1)
    layer = torch.nn.Module()
    layer.weight = weight
    assert tradeoff.stored_size(layer) == (4 * 8 + 4, 32)


@llama_cpp
def test_size_of_a_gguf_is_its_tensors(files):
    path = files.path(tradeoff.TECHNIQUES["GGUF Q4_K_M"], "course")
    (row,) = tradeoff.measure_one("GGUF Q4_K_M", batches=(1,), sizes=TINY, files=files)
    tensors = gguf.GGUFReader(path).tensors
    size, weights = sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
    assert row["weights_mb"] == pytest.approx(size / 1e6)
    assert row["bits_per_weight"] == pytest.approx(8 * size / weights)


def test_pytorch_step_alone():
    model = tradeoff.build(tradeoff.TECHNIQUES["FP32"], device="cpu")
    row = tradeoff.pytorch_speed(model, 2, TINY, phases=("decode",))
    assert row["decode_context"] == 16 and "prefill_tokens_per_s" not in row


def test_slow_calls_are_not_repeated_for_long(monkeypatch):
    monkeypatch.setattr(tradeoff, "SLOW_S", 0.005)
    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.01)

    row = tradeoff._phase("decode", slow, 5, seconds=10, device="cpu")
    assert len(calls) <= 6 and 0 < row["decode_tokens_per_s"] < 500


def test_energy_follows_the_counter(monkeypatch):
    """Joules from a counter that moves in steps of 0.1 s come with that much doubt."""

    class Meter:
        source = "NVML energy counter"

        def start(self):
            pass

        def stop(self):
            return 30.0

    monkeypatch.setattr(energy, "_meter", lambda device: Meter())
    row = tradeoff._phase("decode", lambda: time.sleep(0.02), 2, seconds=0.7, device="cpu")
    assert row["energy_source"] == Meter.source
    assert row["joules_per_decode_token_low"] < row["joules_per_decode_token"] < row["joules_per_decode_token_high"]
    middle = (row["joules_per_decode_token_low"] + row["joules_per_decode_token_high"]) / 2
    assert middle == pytest.approx(row["joules_per_decode_token"])
    short = tradeoff._phase("decode", lambda: time.sleep(0.005), 2, seconds=0.1, device="cpu")
    assert "joules_per_decode_token" not in short  # a window of one step says nothing


def test_compiled_products_compute_the_same(monkeypatch):
    """Without the compiler: what is compiled are the seven products of each layer, one by one."""
    compiled = []
    monkeypatch.setattr(torch.nn.Linear, "compile", lambda self, **how: compiled.append(how))
    model = tradeoff.build(tradeoff.TECHNIQUES["BF16"], device="cpu")
    tradeoff._compile_products(model)
    assert len(compiled) == 7 * len(model.model.layers) and compiled[0] == {"dynamic": False}


def test_a_failure_is_a_row_and_the_rest_goes_on(monkeypatch):
    def broken(model):
        raise ValueError("no kernel\nand a long story")

    bad = tradeoff.Technique("broken", "float", "pytorch", broken)
    good = tradeoff.TECHNIQUES["BF16"]
    monkeypatch.setattr(tradeoff, "TECHNIQUES", {"broken": bad, "BF16": good})
    rows = tradeoff.rows(batches=(1,), sizes=TINY, quality=False, progress=False)
    assert tradeoff.left_out(rows) == {"broken (course)": "ValueError: no kernel."}
    assert [row["technique"] for row in tradeoff.measured(rows)] == ["BF16"]
    assert tuple(rows[0]) == tradeoff.COLUMNS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so():
    rows = tradeoff.rows(["FP8 (Transformer Engine)"], batches=(1,), sizes=TINY, quality=False, progress=False)
    assert tradeoff.left_out(rows) == {"FP8 (Transformer Engine) (course)": "It needs a GPU."}


def test_time_budget():
    rows = tradeoff.rows(["FP32", "BF16"], batches=(1,), sizes=TINY, quality=False, progress=False, budget_s=-1)
    assert len(tradeoff.left_out(rows)) == 2


@pytest.mark.parametrize("call", [
    lambda: tradeoff.rows(["FP3"]), lambda: tradeoff.measure_one("FP3"), lambda: tradeoff.record(shapes=("8B",)),
    lambda: tradeoff.measure_one("BF16", shape="8B"),
])  # fmt: skip
def test_unknown_names(call):
    with pytest.raises(QtutorError, match="choose from"):
        call()


def test_record_saves_each_technique_and_resumes(tmp_path, monkeypatch):
    calls = []

    def fake(technique, shape, batches, *_):
        calls.append(technique)
        if technique == "BF16" and len(calls) < 3:
            raise KeyboardInterrupt
        return [tradeoff._head(tradeoff.TECHNIQUES[technique], shape, b) | {"weights_mb": 1.0} for b in batches]

    monkeypatch.setattr(tradeoff, "measure_one", fake)
    monkeypatch.setattr(tradeoff, "TECHNIQUES", {n: tradeoff.TECHNIQUES[n] for n in ("FP32", "BF16", "GGUF F16")})
    how = dict(shapes=("course",), batches=(1, 2), sizes=TINY, directory=tmp_path, progress=False, full=False)
    with pytest.raises(KeyboardInterrupt):
        tradeoff.record(**how)
    folder = results.machine_folder()
    assert len(results.load("tradeoff", folder, tmp_path).rows) == 2  # FP32 is safe
    path = tradeoff.record(**how)
    assert calls == ["FP32", "BF16", "BF16", "GGUF F16"]
    assert len(results.load("tradeoff", folder, tmp_path).rows) == 6
    assert tradeoff.record(**how) == path and len(calls) == 4  # nothing left to do
    tradeoff.record(techniques=["FP32"], **how)
    assert len(calls) == 5 and len(results.load("tradeoff", folder, tmp_path).rows) == 6
    tradeoff.record(resume=False, **how)
    assert len(calls) == 8
    tradeoff.record(**how | {"budget_s": -1, "techniques": ["BF16"]})  # what did not run is said, and tried again
    saved = results.load("tradeoff", folder, tmp_path).rows
    assert list(tradeoff.left_out(saved)) == ["BF16 (course)"] and len(tradeoff.measured(saved)) == 4
    tradeoff.record(**how)
    assert calls[8:] == ["BF16"] and len(results.load("tradeoff", folder, tmp_path).rows) == 6
    tradeoff.record(**how | {"full": True})  # quick rows are not part of a full recording
    assert len(calls) == 12 and results.load("tradeoff", folder, tmp_path).profile == "full"


# ----------------------------------------------------------------------------------------------------------- Pareto


def by_definition(points, better):
    """Two loops: is there another point that is no worse anywhere and better somewhere?"""
    found = []
    for b in points:
        beaten = False
        for a in points:
            signs = [1 if how == "lower" else -1 for how in better]
            gains = [s * (y - x) for s, x, y in zip(signs, a, b, strict=True)]
            beaten |= all(g >= 0 for g in gains) and any(g > 0 for g in gains)
        found.append(not beaten)
    return np.array(found)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_front_is_the_definition(axes):
    rng = np.random.default_rng(axes)
    for _ in range(50):
        points = rng.integers(0, 6, (rng.integers(1, 15), axes)).astype(float)  # integers: ties and equal points
        better = list(rng.choice(["lower", "higher"], axes))
        assert np.array_equal(pareto.front(points, better), by_definition(points, better))


def test_verdicts_hold_for_every_place_within_the_intervals():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(30):
        middle, half = rng.random((8, 2)), rng.random((8, 2)) * 0.15 * rng.integers(0, 2, (8, 2))
        better = ["lower", "higher"]
        verdicts = pareto.verdicts(middle - half, middle + half, better)
        on_front = np.array([pareto.front(middle + half * rng.uniform(-1, 1, half.shape), better) for _ in range(200)])
        assert on_front[:, verdicts == "front"].all()
        assert not on_front[:, verdicts == "dominated"].any()
        seen |= set(verdicts)
        exact = pareto.verdicts(middle, middle, better)
        assert np.array_equal(exact == "front", pareto.front(middle, better)) and "open" not in exact
    assert seen == {"front", "dominated", "open"}


@pytest.mark.parametrize("points, better", [([[1, 2]], ["lower"]), ([[1, math.nan]], ["lower"] * 2), ([[1]], ["up"])])
def test_front_refuses(points, better):
    with pytest.raises(QtutorError):
        pareto.front(points, better)


def row(technique, family, size, kld, speed, batch=1, **more):
    return dict.fromkeys(tradeoff.COLUMNS) | dict(
        technique=technique, family=family, weights_mb=size, kld_mean=kld, kld_mean_se=kld / 20, decode_tokens_per_s=speed,
        decode_tokens_per_s_low=0.9 * speed, decode_tokens_per_s_high=1.1 * speed, joules_per_decode_token=1.0,
        joules_per_decode_token_low=0.9, joules_per_decode_token_high=1.1, shape="course", batch=batch) | more


@pytest.fixture
def rows():
    return [row("FP32", "float", 28, 0.0, 100), row("BF16", "float", 14, 1e-5, 200),
            row("GGUF Q8_0", "gguf", 8, 1e-3, 400), row("GGUF Q4_K_M", "gguf", 5, 0.05, 500),
            row("GGUF Q4_0", "gguf", 4.9, 0.0502, 600),
            row("slow and worse", "torchao", 9, 0.2, 50), row("no speed", "fp8", None, 0.02, 1)]  # fmt: skip


def test_judge(rows):
    found = {r["technique"]: (r["on_front"], r["verdict"]) for r in pareto.judge(rows, "size", "kld")}
    assert found == {"FP32": (True, "front"), "BF16": (True, "front"), "GGUF Q8_0": (True, "front"),
                     "GGUF Q4_K_M": (True, "open"), "GGUF Q4_0": (True, "front"),
                     "slow and worse": (False, "dominated")}  # fmt: skip
    with pytest.raises(QtutorError, match="batch"):
        pareto.judge([*rows, row("x", "gguf", 3, 1, 1, batch=8)], "size", "kld")
    with pytest.raises(QtutorError, match="accuracy"):
        pareto.judge(rows, "size", "accuracy")
    with pytest.raises(QtutorError, match="no axis"):
        pareto.judge(rows, "weight", "kld")


def test_with_cost_and_limits(rows):
    (made,) = pareto.with_cost([rows[2]], usd_per_hour=3.6, grams_per_kwh=500, pue=1.2)
    assert made["usd_per_million_decode_tokens"] == pytest.approx(1e6 / 400 * 3.6 / 3600)
    assert made["usd_per_million_decode_tokens_low"] == pytest.approx(1e6 / 440 * 3.6 / 3600)  # faster is cheaper
    assert made["usd_per_million_prefill_tokens"] is None
    assert made["co2e_grams_per_million_decode_tokens"] == pytest.approx(1e6 / 3.6e6 * 1.2 * 500)
    assert made["co2e_grams_per_million_decode_tokens_high"] > made["co2e_grams_per_million_decode_tokens_low"]
    kept = pareto.meeting(rows, max_size_mb=10, min_decode_tokens_per_s=300, max_kld_mean=None)
    names = [r["technique"] for r in kept]
    assert names == ["GGUF Q8_0", "GGUF Q4_K_M", "GGUF Q4_0"]
    with pytest.raises(QtutorError, match="no limit"):
        pareto.meeting(rows, size=3)


@pytest.mark.parametrize("x", pareto.AXES)
def test_pictures(rows, x):
    rows = pareto.with_cost([r | {"perplexity": 20.0, "perplexity_se": 0.1, "same_top": 0.9, "same_top_se": 0.01, "accuracy": 0.5,
                                  "accuracy_se": 0.02, "peak_gib": 1.0, "bits_per_weight": 4.0,
                                  "prefill_tokens_per_s": 9.0, "joules_per_prefill_token": 2.0} for r in rows], 1, 400)
    fig = pareto.picture(rows, x, "decode speed" if x != "decode speed" else "kld", "title")
    fig.canvas.draw()
    assert fig.axes[0].get_xlabel() and fig.axes[0].get_ylabel() and fig.axes[0].texts
    plt.close(fig)


def test_explorer(rows):
    box = pareto.explorer(rows + [row("BF16", "float", 14, 1e-5, 800, batch=8)], "a CPU")
    (x, y, batch), limits, words, image = *[b.children for b in box.children[:2]], *box.children[2:]
    first = bytes(image.value)
    assert first.startswith(b"\x89PNG") and "on the front" in words.value
    x.value = "decode speed"
    assert bytes(image.value) != first
    batch.value = 8
    assert "<b>1</b> techniques" in words.value
    batch.value, x.value, y.value = 1, "size", "size"
    assert "different" in words.value
    y.value = "kld"
    limits[0].value = limits[0].options[1][1]
    limits[1].value = limits[1].options[1][1]
    limits[2].value = limits[2].options[-1][1]
    assert "Nothing meets" in words.value
    with pytest.raises(QtutorError):
        pareto.explorer([{"batch": 1}])


def test_recorded_rows_follow_the_schema():
    for machine in results.MACHINES:
        if results.exists("tradeoff", machine):
            for recorded in results.load("tradeoff", machine).rows:
                assert set(recorded) == set(tradeoff.COLUMNS)
                assert recorded["shape"] in tradeoff.SHAPES
                if recorded["shape"] != "course":
                    assert all(recorded[column] is None for column in tradeoff.QUALITY)
