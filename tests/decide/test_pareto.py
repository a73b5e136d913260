"""Pareto fronts against their definition, and what is computed from the rows of the trade-off."""

from __future__ import annotations

import numpy as np
import pytest
from tradeoff_rows import row, some_rows

from qtutor import QtutorError, results
from qtutor.decide import pareto
from qtutor.decide.techniques import FAMILIES, FLOAT, TECHNIQUES


def costs(points, better):
    return np.asarray(points) * np.where(np.array(better) == "higher", -1.0, 1.0)


def front(points, better):
    return pareto.verdicts(costs(points, better), costs(points, better)) == "front"


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


def test_verdicts_hold_for_every_place_within_the_intervals():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(30):
        middle, half = rng.random((8, 2)), rng.random((8, 2)) * 0.15 * rng.integers(0, 2, (8, 2))
        better = ["lower", "higher"]
        ends = costs(middle - half, better), costs(middle + half, better)
        verdicts = pareto.verdicts(np.minimum(*ends), np.maximum(*ends))
        on_front = np.array([front(middle + half * rng.uniform(-1, 1, half.shape), better) for _ in range(200)])
        assert on_front[:, verdicts == "front"].all()
        assert not on_front[:, verdicts == "dominated"].any()
        seen |= set(verdicts)
        assert "open" not in pareto.verdicts(middle, middle)
    assert seen == {"front", "dominated", "open"}


def test_judge():
    rows = some_rows()
    found = {r["technique"]: (r["on_front"], r["verdict"]) for r in pareto.judge(rows, "size", "kld")}
    assert found == {"FP32": (True, "front"), "BF16": (True, "front"), "GGUF Q8_0": (True, "front"),
                     "GGUF Q4_K_M": (True, "open"), "GGUF Q4_0": (True, "front"),
                     "slow and worse": (False, "dominated")}  # fmt: skip
    with pytest.raises(QtutorError, match="batch"):
        pareto.judge([*rows, row("x", "gguf", 3, 1, 1, batch=8)], "size", "kld")
    with pytest.raises(QtutorError, match="accuracy"):
        pareto.judge(rows, "size", "accuracy")


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


def test_table_shows_what_there_is():
    table = pareto.table(some_rows())
    assert list(table.index)[:2] == ["FP32", "BF16"] and "KLD (nats)" in table and "accuracy" not in table
    assert table.loc["GGUF Q4_K_M", "KLD (nats)"] == "0.0500 ± 0.0025" and table.loc["no speed", "MB"] == "-"
    assert "$ per M" in pareto.table(pareto.with_cost(some_rows(), 1, 400))


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
