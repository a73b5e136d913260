"""The pictures draw what capacity computes, and the widget follows its controls."""

import matplotlib.pyplot as plt
import pytest

from qtutor import QtutorError, llamacpp
from qtutor.decide import capacity, hardware
from qtutor.figures import planner

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def bars(ax):
    """Row -> total length of the stacked horizontal bars."""
    total = {}
    for patch in ax.patches:
        row = round(patch.get_y() + patch.get_height() / 2)
        total[row] = total.get(row, 0) + patch.get_width()
    return total


def test_memory_picture_adds_up():
    types = ("Q8_0", "Q6_K", "Q4_K_M")
    fig = planner.memory_picture("Llama-2-70B", types, 4096, ["H100 SXM", "RTX 4090"])
    (ax,) = fig.axes
    for row, name in enumerate(types):
        fit = capacity.fits("Llama-2-70B", name, 4096, "H100 SXM")
        assert bars(ax)[row] == pytest.approx(fit.total_gib)
    assert sorted(line.get_xdata()[0] for line in ax.lines) == pytest.approx(
        sorted(hardware.DEVICES[name].memory_gib for name in ("H100 SXM", "RTX 4090")))  # fmt: skip
    assert ax.get_title(loc="left") or ax.get_title()


@pytest.mark.slow
@pytest.mark.parametrize("choice", [("Llama-2-70B", "Q6_K", 4096, "F16", 1, "H100 SXM"),
                                    ("Llama-3-8B", "IQ4_XS", 8192, "Q8_0", 16, "RTX 4090"),
                                    ("Llama-2-70B", "F16", 131072, "F16", 64, "L4")])  # fmt: skip
def test_plan_picture_shows_the_choice(choice):
    model, name, context, kv, users, gpu = choice
    fig = planner.plan_picture(*choice)
    left, right = fig.axes
    labels = [tick.get_text() for tick in left.get_yticklabels()]
    fit = capacity.fits(model, name, context, gpu, kv, users)
    assert bars(left)[labels.index(name)] == pytest.approx(fit.total_gib)
    shown = {(x, y) for line in right.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert any(x == users and y == pytest.approx(fit.ceiling_tokens_per_s) for x, y in shown)


def test_summary():
    yes = planner.summary(capacity.fits("Llama-2-70B", "Q6_K", 4096), 3.0)
    assert "it fits, with" in yes and "3.00 USD" in yes and "55.0 of 79.6 GiB" in yes
    no = planner.summary(capacity.fits("Llama-2-70B", "Q6_K", 4096, "L4"), 3.0)
    assert "does not fit" in no and "USD" not in no


def _controls(box):
    found = {}
    for child in getattr(box, "children", ()):
        found |= _controls(child)
    if getattr(box, "description", ""):
        found[box.description] = box
    return found


def _leaves(box):
    return [leaf for child in getattr(box, "children", ()) for leaf in _leaves(child)] or [box]


@pytest.mark.slow
def test_widget_follows_its_controls():
    import ipywidgets

    box = planner.planner()
    controls = _controls(box)
    assert set(controls) == {"model", "type", "context", "cache", "users", "device"}
    image, text = (next(w for w in _leaves(box) if type(w) is kind) for kind in (ipywidgets.Image, ipywidgets.HTML))
    assert bytes(image.value[:4]) == b"\x89PNG" and "it fits" in text.value
    before = bytes(image.value)
    controls["type"].value = "F16"
    assert bytes(image.value) != before and "does not fit" in text.value
    controls["type"].value, controls["device"].value = "Q6_K", "H200"
    assert f"{hardware.DEVICES['H200'].usd_per_hour:.2f} USD an hour" in text.value and "H200" in text.value
    controls["context"].value = 8192
    assert "trained for 4,096 tokens only" in text.value
    controls["device"].value = "A10"  # nobody's price is known
    assert "USD" not in text.value


ROWS = [
    {"kind": "bandwidth", "copy_gb_per_s": 1.0},
    {"kind": "model", "type": "Q8_0", "fits": True, "weights_gib": 7.0, "decode_tokens_per_s": 30.0,
     "decode_tokens_per_s_se": 0.1, "ceiling_tokens_per_s": 40.0, "prefill_tokens_per_s": 900.0,
     "prefill_tokens_per_s_se": None, "prefill_tokens": 512, "joules_per_decode_token": 12.0},
    {"kind": "model", "type": "Q4_0", "fits": True, "weights_gib": 4.0, "decode_tokens_per_s": 45.0,
     "decode_tokens_per_s_se": 0.1, "ceiling_tokens_per_s": 70.0, "prefill_tokens_per_s": 800.0,
     "prefill_tokens_per_s_se": 2.0, "prefill_tokens": 512, "joules_per_decode_token": 8.0},
    {"kind": "model", "type": "F16", "fits": False, "note": "too large"},
    {"kind": "batch", "type": "Q4_0", "batch": 1, "decode_tokens_per_s": 45.0, "joules_per_decode_token": 8.0},
    {"kind": "batch", "type": "Q4_0", "batch": 8, "decode_tokens_per_s": 200.0, "joules_per_decode_token": 2.0},
    {"kind": "batch", "type": "Q4_0", "batch": 32, "fits": False},
]  # fmt: skip


def test_result_pictures():
    axes = planner.speed_picture(ROWS, "a GPU").axes
    assert [patch.get_height() for patch in axes[0].patches] == [30.0, 45.0]
    assert [patch.get_height() for patch in axes[2].patches] == [12.0, 8.0]
    speed, energy = planner.batch_picture(ROWS, "a GPU").axes
    assert list(speed.lines[0].get_ydata()) == [45.0, 200.0] and list(energy.lines[0].get_ydata()) == [8.0, 2.0]
    bare = [{k: v for k, v in row.items() if "joules" not in k} for row in ROWS]
    assert len(planner.speed_picture(bare, "").axes) == 2 and len(planner.batch_picture(bare, "").axes) == 1


def test_unknown_gpu_is_one_sentence():
    with pytest.raises(QtutorError, match="There is no device 'H900'"):
        planner.memory_picture(devices=["H900"])
