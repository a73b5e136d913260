"""The explorers: what they compute is what the library computes, and every control redraws the picture."""

from __future__ import annotations

import matplotlib
import pytest
import torch

matplotlib.use("agg")

from qtutor import emulation  # noqa: E402
from qtutor.figures import fp8 as widgets  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.mark.parametrize("scenario", widgets.SCENARIOS)
@pytest.mark.parametrize("history_len, margin, algorithm", [(8, 0, "max"), (4, 2, "max"), (4, 1, "most_recent")])
def test_the_explorer_scales_as_the_library_does(history_len, margin, algorithm, scenario):
    run = widgets.delayed_scaling(history_len, margin, algorithm, scenario)
    recipe = emulation.DelayedScaling(amax_history_len=history_len, margin=margin, amax_compute_algo=algorithm)
    layer = emulation.Linear(16, 16, bias=False)
    for now, after in zip(run, run[1:], strict=False):
        with emulation.autocast(enabled=True, recipe=recipe):
            layer(torch.full((16, 16), now["amax"]))
        assert after["scale"] == pytest.approx(layer.fp8_meta["scaling_fwd"].scale[0].item(), rel=1e-6)


def test_the_first_step_has_no_history():
    first = widgets.delayed_scaling()[0]
    assert first["history"] == [] and first["chosen"] is None and first["scale"] == 1


@pytest.mark.parametrize("history_len", [1, 4, 8, 16])
def test_the_shadow_of_a_spike_is_as_long_as_the_history(history_len):
    run = widgets.delayed_scaling(history_len, scenario="one spike", octaves=10)
    assert [step for step, row in enumerate(run) if row["top"] > 1000] == [0, *range(7, 7 + history_len)][1:]
    assert run[6]["saturated"] > 0 and run[6]["error"] > 0.9
    assert run[6]["error_current"] < 0.05
    in_shadow, later = run[7], run[7 + history_len]
    assert in_shadow["lost"] > 0.3 > 0.05 > later["lost"]


def test_margin_ends_the_saturation_of_a_growing_tensor():
    late = [sum(row["saturated"] > 0 for row in widgets.delayed_scaling(margin=m, scenario="growth without end"))
            for m in (0, 2)]  # fmt: skip
    assert late[0] > 5 and late[1] == 0


def test_a_small_spike_casts_a_shadow_that_costs_nothing():
    run = widgets.delayed_scaling(scenario="one spike", octaves=4)
    assert run[7]["scale"] < run[20]["scale"] / 4
    assert run[7]["error"] < 1.2 * run[20]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", widgets.SCENARIOS)
@pytest.mark.parametrize("step", [0, 6, 27])
def test_every_state_can_be_drawn(step, scenario):
    for history_len, margin, algorithm, octaves in ((1, 8, "most_recent", 14), (24, 0, "max", 0)):
        chosen = dict(history_len=history_len, margin=margin, algorithm=algorithm, scenario=scenario, octaves=octaves)
        widgets.scaling_picture(step, **chosen).canvas.draw()
        assert "<b>Step" in widgets.scaling_sentence(step, **chosen)


def find(box, kind, description):
    """The control with this description, anywhere in a box."""
    for child in getattr(box, "children", ()):
        if isinstance(child, kind) and child.description == description:
            return child
        if found := find(child, kind, description):
            return found
    return None


def picture(box):
    import ipywidgets

    return bytes(next(child for child in box.children if isinstance(child, ipywidgets.Image)).value)


@pytest.mark.slow
def test_every_control_of_the_scaling_explorer_redraws_the_picture():
    import ipywidgets

    box = widgets.scaling_explorer()
    assert picture(box).startswith(PNG)
    step = find(box, ipywidgets.IntSlider, "step")
    step.value = 9
    changes = [(ipywidgets.IntSlider, "step", 10), (ipywidgets.IntSlider, "history", 4),
               (ipywidgets.IntSlider, "margin", 2), (ipywidgets.IntSlider, "size (2^n)", 8),
               (ipywidgets.Dropdown, "algorithm", "most_recent"),
               (ipywidgets.Dropdown, "event", "growth without end")]  # fmt: skip
    for kind, description, value in changes:
        before = picture(box)
        find(box, kind, description).value = value
        assert picture(box).startswith(PNG) and picture(box) != before, description
