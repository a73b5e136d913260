"""A live picture shows what its controls say, from the beginning and after each change."""

import ipywidgets
import matplotlib.pyplot as plt

from qtutor import QtutorError, plots
from qtutor.figures import live


def test_a_control_that_moves_redraws_the_picture_and_leaves_no_figure_open():
    drawn = []

    def draw(height, color):
        drawn.append((height, color))
        fig, ax = plots.figure(2, 1)
        ax.bar([0], [height], color=color)
        ax.set_ylim(0, 5)
        return fig

    before = plt.get_fignums()
    height, color = ipywidgets.IntSlider(1, 0, 5), ipywidgets.Dropdown(options=["red", "blue"])
    box = live.live_picture(draw, height=height, color=color)
    row, image = box.children
    assert row.children == (height, color) and drawn == [(1, "red")]
    shown = {bytes(image.value)}
    height.value = 4
    shown.add(bytes(image.value))
    color.value = "blue"
    shown.add(bytes(image.value))
    assert drawn == [(1, "red"), (4, "red"), (4, "blue")] and len(shown) == 3
    assert all(png.startswith(b"\x89PNG") for png in shown) and plt.get_fignums() == before


def test_words_stand_above_the_picture_and_an_error_leaves_the_picture():
    def draw(height):
        if height > 3:
            raise QtutorError("Too <high>.")
        return f"<b>{height}</b>", plots.figure(1 + height, 1)[0] if height < 3 else None

    height = ipywidgets.IntSlider(1, 0, 5)
    arranged = ipywidgets.VBox([height])
    box = live.live_picture(draw, arranged, height=height)
    _, words, image = box.children
    assert box.children[0] is arranged and words.value == "<b>1</b>"
    before = bytes(image.value)
    height.value = 2
    assert words.value == "<b>2</b>" and bytes(image.value) != before
    before = bytes(image.value)
    height.value = 3
    assert words.value == "<b>3</b>" and bytes(image.value) == before
    height.value = 4
    assert words.value == "<p>Too &lt;high&gt;.</p>" and bytes(image.value) == before
