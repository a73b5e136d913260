"""Pictures that are drawn anew when a control moves: what all widgets share."""

from __future__ import annotations

import ipywidgets

from .. import plots


def image_widget() -> ipywidgets.Image:
    """Return an empty picture that is shown in its own size: stretched to the page's width it would blur."""
    image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))
    image.add_class("qtutor-explorer-picture")
    return image


def redraw_on_change(controls, redraw) -> None:
    """Call ``redraw()`` now, and again whenever one of the controls changes."""
    for control in controls:
        control.observe(lambda _: redraw(), names="value")
    redraw()


def live_picture(draw, **controls) -> ipywidgets.VBox:
    """Put the controls above a picture of their values; ``draw(name=value, ...)`` returns a matplotlib figure."""
    image = image_widget()

    def redraw():
        image.value = plots.png(draw(**{name: control.value for name, control in controls.items()}))

    redraw_on_change(controls.values(), redraw)
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), image])
