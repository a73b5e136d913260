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
        fig = figures.granularity_picture(bits=3, granularity=name)
        fig.canvas.draw()
        curves = fig.axes[1].lines[: len(figures.GRANULARITIES)]
        assert all(list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True) for line in curves)  # bits help
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
