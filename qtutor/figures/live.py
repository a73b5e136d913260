"""Pictures that are drawn anew when a control moves: what all widgets share."""

from __future__ import annotations

import html

import ipywidgets

from .. import QtutorError, plots


def image_widget() -> ipywidgets.Image:
    """Return an empty picture that is shown in its own size: stretched to the page's width it would blur."""
    image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))
    return image.add_class("qtutor-explorer-picture")


def redraw_on_change(controls, redraw) -> None:
    """Call ``redraw()`` now, and again whenever one of the controls changes."""
    for control in controls:
        control.observe(lambda _: redraw(), names="value")
    redraw()


def dropdown(label: str, options, value, width: int = 280, label_width: int = 105) -> ipywidgets.Dropdown:
    """A dropdown of plain values or (name, value) pairs; widths in pixels."""
    return ipywidgets.Dropdown(options=options, value=value, description=label, layout={"width": f"{width}px"},
                               style={"description_width": f"{label_width}px"})  # fmt: skip


def live_picture(draw, arranged=None, **controls) -> ipywidgets.VBox:
    """Put controls above what ``draw(name=value, ...)`` returns: a figure, or a pair of HTML and a figure.

    None for the figure leaves the picture as it is; a QtutorError is shown as its sentence.  ``arranged`` is a box with
    the controls in it, by default a row of them.
    """
    words, image, box = ipywidgets.HTML(), image_widget(), ipywidgets.VBox()
    arranged = arranged or ipywidgets.HBox(list(controls.values()))

    def redraw():
        try:
            drawn = draw(**{name: control.value for name, control in controls.items()})
            text, figure = drawn if isinstance(drawn, tuple) else ("", drawn)
        except QtutorError as error:
            text, figure = f"<p>{html.escape(str(error))}</p>", None
        words.value = text
        if figure is not None:
            image.value = plots.png(figure)
        box.children = [arranged, *(part for part in (words, image) if part.value)]

    redraw_on_change(controls.values(), redraw)
    return box
