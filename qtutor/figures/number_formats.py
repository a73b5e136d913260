"""The grid of a number format, drawn."""


from __future__ import annotations

from .live import image_widget

# ------------------------------------------------------------- notebook 01: number formats


def format_picture(names=("E4M3", "E5M2", "E2M1", "INT4"), value: float = 2.7, log: bool = False):
    """Figure: one row of ticks per format (its grid), the value as a line, the nearest grid points as dots."""
    import torch

    from .. import formats, plots

    fig, axis = plots.figure(8.5, 1.3 + 0.5 * max(1, len(names)))
    for row, name in enumerate(names):
        grid = formats.FORMATS[name].grid()
        grid = grid[grid > 0] if log else grid[grid.abs() <= 8.5]
        color = plots.PALETTE[row % 8]
        axis.vlines(grid.tolist(), row - 0.32, row + 0.32, color=color, lw=1.3)
        nearest = formats.round_to(torch.tensor([value]), name).item()
        axis.plot([nearest], [row], "o", ms=9, color="black", mfc=color, zorder=3, clip_on=True)
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


def _nearest_table(names, value: float) -> str:
    import torch

    from .. import formats

    rows = ""
    for name in names:
        nearest = formats.round_to(torch.tensor([value]), name).item()
        relative = f"{abs(nearest - value) / abs(value):.2%}" if value else "-"
        rows += f"<tr><td>{name}</td><td>{nearest:.5g}</td><td>{nearest - value:+.3g}</td><td>{relative}</td></tr>"
    head = "<tr><th>format</th><th>nearest</th><th>error</th><th>relative error</th></tr>"
    return f"<table style='border-spacing: 14px 2px; border-collapse: separate'>{head}{rows}</table>"


def format_explorer():
    """Formats, axis and a value to drag against the grids and the rounding error (notebook 01)."""
    import ipywidgets

    from .. import formats, plots

    names = list(formats.FORMATS)
    chosen = ipywidgets.SelectMultiple(options=names, value=("E4M3", "E5M2", "E2M1", "INT4"), rows=len(names),
                                       description="formats")  # fmt: skip
    scale = ipywidgets.ToggleButtons(options=["linear", "log"], description="axis")
    value = ipywidgets.FloatSlider(value=2.7, min=-8, max=8, step=0.01, description="value")
    image, table = image_widget(), ipywidgets.HTML()

    def redraw(_=None):
        image.value = plots.png(format_picture(chosen.value, value.value, scale.value == "log"))
        table.value = _nearest_table(chosen.value, value.value)

    for control in (chosen, scale, value):
        control.observe(redraw, names="value")
    redraw()
    box = ipywidgets.VBox([ipywidgets.HBox([chosen, ipywidgets.VBox([scale, value])]), image, table])
    box.add_class("qtutor-format-explorer")
    return box
