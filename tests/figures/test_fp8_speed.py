"""fp8_speed: the tables against pandas by hand, the map between its points, every picture and control."""

from __future__ import annotations

import itertools

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")

from qtutor import results  # noqa: E402
from qtutor.figures import fp8_speed  # noqa: E402
from qtutor.rigs import fp8_layers  # noqa: E402
from tests.figures.test_fp8 import PNG, close_figures, find, picture  # noqa: E402, F401


def rows(name: str) -> pd.DataFrame:
    return results.load(name, "h100").frame()


def test_the_ladder_compares_with_the_rung_before_and_with_bf16():
    layers = rows("fp8_layers")
    table = fp8_speed.ladder_table(layers[layers["rung"].isin(fp8_layers.RUNGS)])
    for shape in ("Llama-2-7B", "Llama-2-70B"):
        ms = table.loc[shape]["ms"]
        assert list(ms.index) == list(fp8_layers.RUNGS)
        for before, now in itertools.pairwise(ms.index):
            assert table.loc[(shape, now), "over the rung before"] == pytest.approx(ms[before] / ms[now])
        assert table.loc[(shape, "TE FP8 delayed"), "over TE BF16"] == pytest.approx(
            ms["TE BF16"] / ms["TE FP8 delayed"])  # fmt: skip
        assert (0 < table.loc[shape]["ms, ±"]).all() and (table.loc[shape]["ms, ±"] < 0.02 * ms).all()
        assert (table.loc[shape]["J, ±"] <= 0.0101 * table.loc[shape]["J"]).all()  # windows of ten seconds


def test_a_variant_within_the_drift_is_undecided():
    made = pd.DataFrame([{"shape": "s", "rung": rung, "ms_per_step": ms, "ms_p10": ms - spread, "ms_p90": ms + spread,
                          "repeats": 25, "peak_gib": 1.0}
                         for rung, ms, spread in (("a", 100.0, 1), ("b", 100.5, 1), ("c", 110.0, 1), ("d", 90.0, 1),
                                                  ("e", 103.0, 20))])  # fmt: skip
    table = fp8_speed.branch_table(made, {name: ("a", {}) for name in "bcde"}, drift=0.01)
    assert dict(table["verdict"]) == {"b": "undecided", "c": "slower", "d": "faster", "e": "undecided"}
    assert table.loc["c", "change of time"] == pytest.approx(0.1)


def test_an_arm_that_did_not_run_is_said_so_in_table_and_picture():
    made = pd.DataFrame([{"shape": "s", "rung": rung, "tokens": 10, "trained_weights": 5e6, "ms_per_step": ms,
                          "train_tokens_per_s": rate, "joules_per_step": 1.0, "peak_gib": 2.0}
                         for rung, ms, rate in (("TE BF16", 10.0, 1e3), ("TE FP8 delayed", None, None))])  # fmt: skip
    table = fp8_speed.model_table(made)
    assert table.loc[("s", "TE BF16"), "J a 1,000 tokens"] == 100
    assert "not run" in fp8_speed.styled(table).to_html()
    labels = [text.get_text() for axis in fp8_speed.step_times(made, "two arms").axes for text in axis.texts]
    assert labels == ["1.00x", "not run"]


def test_tables_show_units():
    shown = fp8_speed.styled(pd.DataFrame({"share of it": [0.25], "over TE BF16": [1.5], "x, ms": [2.0],
                                           "change of time": [-0.5], "W": [700.4]}), ms=3).to_html()  # fmt: skip
    for text in ("25%", "1.50x", "2.000", "-50.0%", "700<"):
        assert text in shown


def test_every_picture_draws_the_recorded_rows():
    models, profile = rows("fp8_model"), rows("fp8_profile")
    spent = profile.pivot_table(index=["shape", "rung"], columns="kind", values="ms").reindex(
        columns=list(fp8_speed.KINDS)).fillna(0.0)  # fmt: skip
    assert set(profile["kind"]) <= set(fp8_speed.KINDS)
    for figure in (fp8_speed.time_by_kind(spent), fp8_speed.memory_by_layers(models),
                   fp8_speed.breakeven_maps(rows("fp8_breakeven"))):  # fmt: skip
        assert all(axis.get_xlabel() for axis in figure.axes if axis.get_title(loc="left"))


def test_the_map_is_read_between_its_points_and_ends_at_its_edge():
    made = pd.DataFrame([
        {"hidden": h, "tokens": t, "graph": g, "speedup": (h * t) ** 0.5 / 1000 * (2 if g else 1)}
        for h, t, g in itertools.product((512, 2048), (256, 1024, 4096), (False, True))])  # fmt: skip
    for h, t in ((512, 256), (2048, 1024), (1024, 512), (700, 3000)):
        assert fp8_speed.breakeven_speedup(made, h, t, False) == pytest.approx((h * t) ** 0.5 / 1000)
        assert fp8_speed.breakeven_speedup(made, h, t, True) == pytest.approx((h * t) ** 0.5 / 500)
    assert fp8_speed.breakeven_speedup(made, 100_000, 4096, False) == pytest.approx((2048 * 4096) ** 0.5 / 1000)


@pytest.mark.slow
def test_the_breakeven_explorer_redraws():
    import ipywidgets

    box = fp8_speed.breakeven_explorer(results.load("fp8_breakeven", "h100"))
    for kind, description, value in ((ipywidgets.SelectionSlider, "tokens", 16384),
                                     (ipywidgets.SelectionSlider, "hidden size", 1024),
                                     (ipywidgets.Checkbox, "CUDA graph", True)):  # fmt: skip
        before = picture(box)
        find(box, kind, description).value = value
        assert picture(box).startswith(PNG) and picture(box) != before, description
