"""The pictures of the fake-quantization notebook: the scale they show is formats', and every control redraws."""

import matplotlib.pyplot as plt
import pytest

from qtutor.figures import fake_quantization as figures


@pytest.mark.parametrize("bits, clip", [(2, 0.2), (3, 1.0), (8, 2.0)])
def test_ste_picture(bits, clip):
    fig = figures.ste_picture(bits, clip)
    left, right = fig.axes
    assert f"{clip / ((2**bits - 1) / 2):.3f}" in left.get_title(loc="left") + left.get_title()
    gradient = right.lines[1].get_ydata()
    assert set(gradient.tolist()) == {0.0, 1.0} or clip == 2.0
    plt.close(fig)


@pytest.mark.slow
def test_granularity_picture():
    for name in figures.GRANULARITIES:
        fig = figures.granularity_picture(bits=3, granularity=name, beside=("group of 32",))
        fig.canvas.draw()
        first, second, choices, _ = fig.axes  # and the colour bar
        assert f"per {name}:" in first.get_title() and "per group of 32:" in second.get_title()
        curves = choices.lines[: len(figures.GRANULARITIES)]
        assert all(list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True) for line in curves)  # bits help
        for circle, axis in zip(choices.lines[len(curves) :], (first, second), strict=True):
            assert f"{circle.get_ydata()[0]:.1f} %" in axis.get_title()
        plt.close(fig)


def test_integer_layer_picture():
    """Nothing but the GEMM's operands and the output is int8, and no text lies on another."""
    fig = figures.integer_layer_picture()
    fig.canvas.draw()
    texts = [text for text in fig.axes[0].texts if text.get_text()]
    assert [text.get_text() for text in texts if text.get_text().startswith("int")] == [
        "int8", "int8", "int32", "int32", "int32", "int8"]  # fmt: skip
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close(fig)


@pytest.mark.slow
@pytest.mark.parametrize("explorer", [figures.ste_explorer, figures.granularity_explorer])
def test_every_control_redraws(explorer):
    box = explorer()
    controls, image = box.children
    for control in controls.children:
        before = bytes(image.value)
        control.value = control.options[-1] if hasattr(control, "options") else control.max
        assert bytes(image.value) != before, control.description
