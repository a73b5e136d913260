"""fp8_on_several_gpus: every picture draws what was recorded or computed, with units; the widget follows."""

from __future__ import annotations

import math

import ipywidgets
import matplotlib
import pytest

matplotlib.use("agg")

from qtutor import QtutorError, results  # noqa: E402
from qtutor.decide import sharding  # noqa: E402
from qtutor.figures import fp8_on_several_gpus as figures  # noqa: E402
from tests.figures.test_fp8 import PNG, close_figures, find, picture  # noqa: E402, F401


@pytest.fixture(scope="module")
def frame():
    return results.load("fp8_scaling", "h200x4").frame()


def title(ax) -> str:
    return ax.get_title(loc="left") or ax.get_title()  # the theme moves titles to the left


@pytest.mark.parametrize("reshard, gathers", [(True, 6), (False, 3)])
def test_the_timeline_has_each_collective_and_no_overlap(reshard, gathers):
    (ax,) = figures.timeline(reshard).axes
    labels = [text.get_text() for text in ax.texts]
    assert sum("gather" in label for label in labels) == gathers
    assert sorted(label[-3:] for label in labels if "scatter" in label) == ["dW1", "dW2", "dW3"]
    for row in (0, 1):
        bars = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches
                      if bar.get_height() < 0.8 and round(bar.get_y() + bar.get_height() / 2) == row)  # fmt: skip
        assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(bars, bars[1:], strict=False))
    assert "time" in ax.get_xlabel() and ("twice" if reshard else "once") in title(ax)


def test_scaling_draws_the_recorded_rows(frame):
    axes = figures.scaling_picture(frame).axes
    assert [title(ax) for ax in axes] == ["Llama-2-7B, 8 layers", "Llama-2-70B, 4 layers"]
    for ax in axes:
        assert len(ax.lines) == len(ax.texts) == 5 and ax.get_ylim()[0] == 0
        assert all(list(line.get_xdata()) == [1, 2, 4] for line in ax.lines)
        assert "tokens/s" in ax.get_ylabel() and "GPUs" in ax.get_xlabel()
    bf16 = frame[(frame["rung"] == "BF16") & (frame["layers"] == 8)].sort_values("ranks")["train_tokens_per_s"] / 1000
    assert any(list(line.get_ydata()) == list(bf16) for line in axes[0].lines)


def test_the_plan_draws_the_model(frame):
    left, right = figures.plan_picture(frame, "Llama-2-7B", 16384, 25, 128).axes
    one = frame[(frame["rung"] == "BF16") & (frame["ranks"] == 1) & (frame["layers"] == 8)].iloc[0]
    update, weights = sharding.adam_ms(one["trained_weights"]), 4 * one["trained_weights"]
    step = sharding.step(128, 8 * (one["ms_per_step"] - update), 4 * update, layers=32, weights=weights,
                         between_hosts_gb_per_s=25)  # fmt: skip
    bf16 = left.lines[0]
    assert list(bf16.get_xdata()) == list(figures.RANKS) and bf16.get_ydata()[0] == 1
    assert bf16.get_ydata()[7] == pytest.approx(step.efficiency)
    assert [bar.get_width() for bar in right.patches[:3]] == pytest.approx(
        [step.compute_ms, step.optimizer_ms, step.exposed_ms])  # fmt: skip
    assert "efficiency" in left.get_ylabel() and "GPUs" in left.get_xlabel() and "ms" in right.get_xlabel()


def test_a_shape_that_was_not_recorded_is_one_sentence(frame):
    with pytest.raises(QtutorError, match=r"^'GPT-2' was not recorded on one GPU: choose one of Llama-2-7B"):
        figures.plan_picture(frame, "GPT-2")


def test_the_widget_follows_its_controls(frame):
    box = figures.plan(frame)
    before = picture(box)
    assert before.startswith(PNG)
    find(box, ipywidgets.Dropdown, "GPUs").value = 512
    assert picture(box).startswith(PNG) and picture(box) != before


def test_published_parallelism_multiplies_to_its_gpus():
    assert all(math.prod(degrees) == gpus for gpus, _, degrees in figures.PUBLISHED)
    (ax,) = figures.parallelism_picture().axes
    assert sorted(int(text.get_text()) for text in ax.texts) == sorted(
        degree for *_, degrees in figures.PUBLISHED for degree in degrees if degree > 1)  # fmt: skip
    assert "GPUs" in ax.get_xlabel()
