"""Pareto fronts against their definition, and what is computed from the rows of the trade-off."""

from __future__ import annotations

import numpy as np
import pytest
from tradeoff_rows import row, some_rows

from qtutor import QtutorError, results
from qtutor.decide import pareto
from qtutor.decide.techniques import FAMILIES, FLOAT, TECHNIQUES


def axes_of(better, tolerance=0.0):
    return [pareto.Axis("", "", how, tolerance=tolerance) for how in better]


def front(points, better):
    values = np.asarray(points, dtype=float).T[:, None].repeat(3, 1)
    return pareto.verdicts(values, axes_of(better)) == "front"


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
        assert np.array_equal(front(points, better), by_definition(points, better))


@pytest.mark.parametrize(("a", "b", "expected"), [
    ((120, 118, 122), (100, 99, 101), 1), ((100, 99, 101), (120, 118, 122), -1),
    ((104, 104, 104), (100, 100, 100), 0),  # apart, but within the tolerance
    ((100, 99, 101), (101, 100, 102), 0), ((120, 100, 140), (100, 90, 110), None),  # intervals overlap
    ((106, 103, 109), (100, 98, 102), 1), ((104, 103, 112), (100, 98, 102), None),  # perhaps 4 %, perhaps more
    ((120, np.nan, np.nan), (100, 99, 101), None), ((0, 0, 0), (0, 0, 0), 0), ((0, 0, 0), (1, 0.9, 1.1), -1)])
def test_a_difference_is_beyond_interval_and_tolerance(a, b, expected):
    found, turned = pareto.difference(a, b, 0.05), pareto.difference(b, a, 0.05)
    assert np.isnan(found) and np.isnan(turned) if expected is None else found == -turned == expected


def test_differences_of_arrays_are_those_of_their_elements():
    rng = np.random.default_rng(1)
    values = np.sort(rng.random((3, 6)), 0)[[1, 0, 2]]
    whole = pareto.difference(values[:, :, None], values[:, None, :], 0.1)
    for i, j in np.ndindex(6, 6):
        assert np.array_equal(whole[i, j], pareto.difference(values[:, i], values[:, j], 0.1), equal_nan=True)


def test_verdicts_hold_for_every_place_within_the_intervals():
    """Without a tolerance: what is said of intervals is true of the values, wherever they lie."""
    rng = np.random.default_rng(0)
    seen, better = set(), ["lower", "higher"]
    for _ in range(30):
        middle, half = 1 + rng.random((8, 2)), rng.random((8, 2)) * 0.15 * rng.integers(0, 2, (8, 2))
        verdicts = pareto.verdicts(np.array([middle, middle - half, middle + half]).transpose(2, 0, 1), axes_of(better))
        on_front = np.array([front(middle + half * rng.uniform(-1, 1, half.shape), better) for _ in range(200)])
        assert on_front[:, verdicts == "front"].all()
        assert not on_front[:, verdicts == "dominated"].any()
        seen |= set(verdicts)
    assert seen == {"front", "dominated", "open"}


def test_what_is_smaller_by_less_than_the_tolerance_is_not_on_the_front_for_it():
    """BF16 was on the front by 9 kB of 14.7 MB."""
    sizes, losses = [14.6888, 14.6975, 8.0], [3e-5, 1e-6, 1e-3]
    values = np.array([[sizes] * 3, [losses] * 3])
    assert list(pareto.verdicts(values, axes_of(["lower", "lower"]))) == ["front"] * 3
    assert list(pareto.verdicts(values, axes_of(["lower", "lower"], 0.01))) == ["dominated", "front", "front"]


def test_judge():
    rows = some_rows()
    found = {r["technique"]: (r["on_front"], r["verdict"]) for r in pareto.judge(rows, "size", "kld")}
    assert found == {"FP32": (True, "front"), "BF16": (True, "front"), "GGUF Q8_0": (True, "front"),
                     "GGUF Q4_K_M": (True, "open"), "GGUF Q4_0": (True, "front"),
                     "slow and worse": (False, "dominated")}  # fmt: skip
    with pytest.raises(QtutorError, match="batch"):
        pareto.judge([*rows, row("x", "gguf", 3, 1, 1, batch=8)], "size", "kld")
    with pytest.raises(QtutorError, match="decode_context"):
        pareto.judge([row("x", "gguf", 3, 1, 1, decode_context=n) for n in (512, 1024)], "decode speed")
    with pytest.raises(QtutorError, match="accuracy"):
        pareto.judge(rows, "size", "accuracy")


def test_leaders_are_those_that_the_measurement_does_not_tell_apart():
    rows = some_rows()
    assert pareto.leaders(rows, "decode speed") == ["GGUF Q4_0", "GGUF Q4_K_M"]  # 600 and 500, 10 % each
    assert pareto.leaders([rows[2], rows[4]], "decode speed") == ["GGUF Q4_0"]  # 400
    assert len(pareto.leaders(rows, "decode energy")) == len(rows)  # all the same


def test_time_to_first_token_is_that_of_a_prompt_alone():
    one, many = pareto.measured([row("BF16", "float", 14, 0, 9, batch) | {
        "prefill_tokens": 256, "prefill_tokens_per_s": 1000.0, "prefill_tokens_per_s_low": 800.0} for batch in (1, 8)])
    assert one["time_to_first_token_ms"] == 256 and one["time_to_first_token_ms_high"] == 320
    assert "time_to_first_token_ms" not in many


def test_with_cost():
    rows = some_rows()
    (made,) = pareto.with_cost([rows[2]], usd_per_hour=3.6, grams_per_kwh=500, pue=1.2)
    assert made["usd_per_million_decode_tokens"] == pytest.approx(1e6 / 400 * 3.6 / 3600)
    assert made["usd_per_million_decode_tokens_low"] == pytest.approx(1e6 / 440 * 3.6 / 3600)  # faster is cheaper
    assert made["usd_per_million_prefill_tokens"] is None
    assert made["co2e_grams_per_million_decode_tokens"] == pytest.approx(1e6 / 3.6e6 * 1.2 * 500)
    assert made["co2e_grams_per_million_decode_tokens_high"] > made["co2e_grams_per_million_decode_tokens_low"]


def test_relative_divides_by_the_16_bits_of_the_same_runtime():
    rows = [row("BF16", "float", 14, 0.0, 100), row("torchao FP8 dynamic", "torchao", 8, 0.1, 150),
            row("GGUF F16", "gguf", 14, 0.0, 400), row("GGUF Q4_0", "gguf", 5, 0.1, 800),
            row("GGUF Q2_K", "gguf", 4, 0.5, None), row("GGUF Q8_0", "gguf", 8, 0.1, 700, batch=8)]  # fmt: skip
    found = {r["technique"]: r for r in pareto.relative(rows, "decode_tokens_per_s")}
    assert set(found) == {"BF16", "torchao FP8 dynamic", "GGUF F16", "GGUF Q4_0"}
    assert found["torchao FP8 dynamic"]["ratio"] == 1.5 and found["torchao FP8 dynamic"]["against"] == "BF16"
    assert found["GGUF Q4_0"]["ratio"] == 2 and found["GGUF Q4_0"]["against"] == "GGUF F16"
    assert found["GGUF Q4_0"]["ratio_low"] == pytest.approx(2 * 0.9 / 1.1)
    assert found["GGUF Q4_0"]["ratio_high"] == pytest.approx(2 * 1.1 / 0.9)
    assert found["GGUF Q4_0"]["differs"] == 1 and found["BF16"]["differs"] != 1
    compiled = pareto.relative([*rows, row("BF16, compiled", "float", 14, 0, 120)], "decode_tokens_per_s")
    assert compiled[-1]["against"] == "BF16, compiled" and compiled[-1]["ratio"] == 1


def test_table_shows_what_there_is():
    table = pareto.table([*some_rows(), row("BF16", "float", 14, 1e-5, 1500, 8)])
    assert list(table.index)[:2] == ["FP32", "BF16"] and "KLD (nats)" in table and "accuracy" not in table
    assert table.loc["GGUF Q4_K_M", "KLD (nats)"] == "0.0500 (0.0450 to 0.0550)"
    assert table.loc["no speed", "MB"] == "-" and table.loc["BF16", "MB"] == "14.0"
    assert table.loc["BF16", "decode (tok/s), batch 8"] == "1,500 (1,350 to 1,650)"
    assert "USD per M, batch 1" in pareto.table(pareto.with_cost(some_rows(), 1, 400))


def test_techniques_have_one_table():
    assert set(FLOAT.values()) <= set(TECHNIQUES) and {t.runtime for t in TECHNIQUES.values()} == set(FLOAT)
    assert {t.family for t in TECHNIQUES.values()} == set(FAMILIES)
    for name, technique in TECHNIQUES.items():
        assert technique.name == name and bool(technique.gguf) == (technique.runtime == "llama.cpp")


def test_recorded_rows_are_of_known_techniques():
    for machine in results.MACHINES:
        if results.exists("tradeoff", machine):
            recorded = results.load("tradeoff", machine)
            assert {row["technique"] for row in recorded.rows} <= set(TECHNIQUES)
            assert {*pareto.left_out(recorded)}.isdisjoint(row["technique"] for row in pareto.measured(recorded))
