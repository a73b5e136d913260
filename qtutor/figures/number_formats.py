"""The grid of a number format, drawn: which numbers there are, and which of them a value is rounded to."""

from __future__ import annotations

import ipywidgets
import pandas as pd
import torch

from .. import formats, plots
from .live import image_widget, redraw_on_change

SHOWN = ("E4M3", "E5M2", "E2M1", "INT4")


def nearest(name: str, value: float) -> float:
    """Return the number of format ``name`` that ``value`` is rounded to."""
    return formats.round_to(torch.tensor([value]), name).item()


def format_picture(names=SHOWN, value: float = 2.7, log: bool = False):
    """Figure: one row of ticks per format (its grid), the value as a line, the nearest grid points as dots."""
    fig, axis = plots.figure(8.5, 1.3 + 0.5 * max(1, len(names)))
    for row, name in enumerate(names):
        grid = formats.FORMATS[name].grid()
        grid = grid[grid > 0] if log else grid[grid.abs() <= 8.5]
        color = plots.PALETTE[row % 8]
        axis.vlines(grid.tolist(), row - 0.32, row + 0.32, color=color, lw=1.3)
        axis.plot([nearest(name, value)], [row], "o", ms=9, color="black", mfc=color, zorder=3, clip_on=True)
    if not log or value > 0:
        axis.axvline(value, color="black", ls="--", lw=1.3)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set(title=f"Grids; dashed: {value:.3g}, dots: its nearest point in each format",
             xlabel="value (log axis, positive half)" if log else "value (the part from -8.5 to 8.5)")  # fmt: skip
    if log:
        axis.set_xscale("log", base=2)
        axis.set_xlim(2.0**-17, 2.0**16.5)
    else:
        axis.set_xlim(-8.5, 8.5)
    axis.grid(False, axis="y")
    return fig


def error_table(names, value: float) -> pd.DataFrame:
    """What ``value`` becomes in each format, and how far that is from it."""
    points = {name: nearest(name, value) for name in names}
    return pd.DataFrame([{"format": name, "nearest": f"{point:.5g}", "error": f"{point - value:+.3g}",
                          "relative error": f"{abs(point - value) / abs(value):.2%}" if value else "-"}
                         for name, point in points.items()])  # fmt: skip


def format_explorer() -> ipywidgets.VBox:
    """Widget: choose formats and axis, drag a value; below the grids stands the rounding error in each format."""
    names = list(formats.FORMATS)
    chosen = ipywidgets.SelectMultiple(options=names, value=SHOWN, rows=len(names), description="formats")
    scale = ipywidgets.ToggleButtons(options=["linear", "log"], description="axis")
    value = ipywidgets.FloatSlider(value=2.7, min=-8, max=8, step=0.01, description="value")
    image, table = image_widget(), ipywidgets.HTML()

    def redraw():
        image.value = plots.png(format_picture(chosen.value, value.value, scale.value == "log"))
        table.value = error_table(chosen.value, value.value).to_html(index=False, border=0)

    redraw_on_change((chosen, scale, value), redraw)
    box = ipywidgets.VBox([ipywidgets.HBox([chosen, ipywidgets.VBox([scale, value])]), image, table])
    box.add_class("qtutor-format-explorer")
    return box
