"""Interactive explorers for the notebooks: each function returns a widget that redraws its picture.

The pictures are PNG bytes in an ``ipywidgets.Image``: nothing flickers, and a saved notebook still
shows them.  Each explorer has a plain function beside it that draws one state for readers without widgets.
"""

from __future__ import annotations

# ------------------------------------------------------------- notebook 05: fake quantization


def ste_picture(bits: int = 3, clip: float = 1.0):
    """Figure: the quantizer's forward staircase, and the gradient it really has beside the straight-through one.

    The grid is symmetric and ends at about ``clip`` (scale = clip / ((quant_max - quant_min) / 2)).
    """
    import matplotlib.pyplot as plt
    import torch

    from .fake_quant import Target, choose_qparams, fake_quantize

    target, edge = Target.of(f"int{bits}"), torch.tensor([[clip]])
    scale, _ = choose_qparams(-edge, edge, target)
    x = torch.linspace(-2, 2, 2001, requires_grad=True)
    y = fake_quantize(x, scale.item(), None, target.quant_min, target.quant_max)
    y.sum().backward()
    low, high = (target.quant_min - 0.5) * scale.item(), (target.quant_max + 0.5) * scale.item()

    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    left.plot([-2, 2], [-2, 2], color="0.6", ls="--", lw=1, label="x (no quantization)")
    left.plot(x.detach(), y.detach(), color="C0", label=f"fake-quantized, {2**bits} values")
    left.set(title=f"Forward: int{bits}, scale = {scale.item():.3f}", xlabel="x (input)", ylabel="y (output)",
             ylim=(-2.1, 2.1))  # fmt: skip
    right.plot(x.detach(), torch.zeros_like(x).detach(), color="0.6", ls="--", label="true derivative (0 or none)")
    right.plot(x.detach(), x.grad, color="C1", label="straight-through estimate")
    right.set(title="Backward: dy/dx", xlabel="x (input)", ylabel="gradient", ylim=(-0.1, 1.45))
    for axis in (left, right):
        axis.axvspan(-2, low, color="0.5", alpha=0.12)
        axis.axvspan(high, 2, color="0.5", alpha=0.12, label="clipped")
        axis.set_xlim(-2, 2)
        axis.legend(loc="upper left" if axis is left else "upper center", fontsize=8, ncols=1 if axis is left else 2)
    return fig


def granularity_weight(outlier: float = 8.0):
    """A (64, 256) weight whose rows grow 10x from first to last, with a few input columns ``outlier`` times larger."""
    import torch

    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=g) * torch.logspace(-1, 0, 64)[:, None]
    weight[:, [37, 101, 230]] *= outlier
    return weight


GRANULARITIES = {"tensor": ("tensor", None), "channel": ("channel", None), "group of 128": ("group", 128),
                 "group of 32": ("group", 32), "group of 16": ("group", 16)}  # fmt: skip


def granularity_error(weight, bits: int, name: str):
    """(relative RMS error, stored bits per weight with 16-bit scales, fake-quantized weight) of one choice."""
    from .fake_quant import FakeQuantizer

    granularity, group_size = GRANULARITIES[name]
    quantizer = FakeQuantizer(f"int{bits}", granularity, group_size)
    quantized = quantizer(weight)
    error = (quantized - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    return error.item(), bits + 16 * quantizer.qparams(weight)[0].numel() / weight.numel(), quantized


def granularity_picture(bits: int = 4, granularity: str = "channel", outlier: float = 8.0):
    """Figure: where the error of one choice sits, and all choices of granularity and bits against stored size."""
    import matplotlib.pyplot as plt

    weight = granularity_weight(outlier)
    error, stored, quantized = granularity_error(weight, bits, granularity)
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained", width_ratios=(1, 1.25))
    row_size = weight.square().mean(1, keepdim=True).sqrt()
    image = left.imshow(((quantized - weight).abs() / row_size)[:, :128], vmin=0, vmax=1, cmap="magma", aspect="auto",
                        interpolation="nearest")  # fmt: skip
    left.grid(False)
    left.set_title(f"int{bits} per {granularity}: |error| / RMS of the row", fontsize=10)
    left.set(xlabel="input feature (first 128)",
             ylabel="output channel")  # fmt: skip
    fig.colorbar(image, ax=left, label="relative error")
    for marker, name in zip("osD^v", GRANULARITIES, strict=True):
        points = [granularity_error(weight, b, name)[:2] for b in range(2, 9)]
        right.plot([p[1] for p in points], [p[0] for p in points], marker=marker, ms=4, lw=1, label=f"per {name}")
    right.plot(stored, error, "o", ms=13, mfc="none", mec="black", mew=1.5, label="your choice")
    right.set_title(f"All choices; yours: error {error:.3f} at {stored:.2f} bits", fontsize=10)
    right.set(yscale="log", ylim=(0.003, 1.5),
              xlabel="stored bits per weight (codes + 16-bit scales)", ylabel="RMS error / RMS weight")  # fmt: skip
    right.legend(fontsize=7.5, loc="lower left")
    return fig


def _live_picture(draw, **controls):
    """Controls above a picture that is drawn anew when one moves; ``draw(**values)`` returns a figure."""
    import ipywidgets
    import matplotlib.pyplot as plt

    from . import plots

    def render():
        fig = draw(**{name: control.value for name, control in controls.items()})
        try:
            return plots.png(fig)
        finally:
            plt.close(fig)

    image = ipywidgets.Image(value=render(), format="png")

    def redraw(_):
        image.value = render()

    for control in controls.values():
        control.observe(redraw, names="value")
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), image])


def ste_explorer():
    """Bits and clip range against the quantizer's forward and backward (notebook 05)."""
    import ipywidgets

    return _live_picture(
        ste_picture,
        bits=ipywidgets.IntSlider(3, 2, 8, description="bits"),
        clip=ipywidgets.FloatSlider(value=1.0, min=0.2, max=2.0, step=0.1, description="clip range"),
    )


def granularity_explorer():
    """Bits, granularity and outliers against the quantization error of a weight (notebook 05)."""
    import ipywidgets

    return _live_picture(
        granularity_picture,
        bits=ipywidgets.IntSlider(4, 2, 8, description="bits"),
        granularity=ipywidgets.Dropdown(options=list(GRANULARITIES), value="channel", description="scale per"),
        outlier=ipywidgets.FloatSlider(value=8.0, min=1.0, max=32.0, step=1.0, description="outliers x"),
    )


# ------------------------------------------------------------- notebook 01: number formats


def format_picture(names=("E4M3", "E5M2", "E2M1", "INT4"), value: float = 2.7, log: bool = False):
    """Figure: one row of ticks per format (its grid), the value as a line, the nearest grid points as dots."""
    import torch

    from . import formats, plots

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

    from . import formats

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

    from . import formats, plots

    names = [name for name in formats.FORMATS if name != "E8M0"]
    chosen = ipywidgets.SelectMultiple(options=names, value=("E4M3", "E5M2", "E2M1", "INT4"), rows=6,
                                       description="formats")  # fmt: skip
    scale = ipywidgets.ToggleButtons(options=["linear", "log"], description="axis")
    value = ipywidgets.FloatSlider(value=2.7, min=-8, max=8, step=0.01, description="value")
    image, table = ipywidgets.Image(format="png"), ipywidgets.HTML()
    image.add_class("qtutor-explorer-picture")

    def redraw(_=None):
        image.value = plots.png(format_picture(chosen.value, value.value, scale.value == "log"))
        table.value = _nearest_table(chosen.value, value.value)

    for control in (chosen, scale, value):
        control.observe(redraw, names="value")
    redraw()
    box = ipywidgets.VBox([ipywidgets.HBox([chosen, ipywidgets.VBox([scale, value])]), image, table])
    box.add_class("qtutor-format-explorer")
    return box
