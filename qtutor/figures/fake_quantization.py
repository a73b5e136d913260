"""Pictures of the fake-quantization notebook: the straight-through estimator, granularity."""

from __future__ import annotations

from .live import live_picture


def ste_picture(bits: int = 3, clip: float = 1.0):
    """Figure: the quantizer's staircase for amax = ``clip``, and its true gradient beside the straight-through one."""
    import torch

    from .. import formats, plots
    from ..ste import fake_quantize

    fmt, edge = formats.get(f"int{bits}"), torch.tensor([[clip]])
    scale = formats.choose_qparams(-edge, edge, fmt)[0].item()
    x = torch.linspace(-2, 2, 2001, requires_grad=True)
    y = fake_quantize(x, scale, None, fmt.min, fmt.max)
    y.sum().backward()

    fig, (left, right) = plots.figure(8.5, 3.2, ncols=2)
    left.plot([-2, 2], [-2, 2], color="0.6", ls="--", lw=1, label="x (no quantization)")
    left.plot(x.detach(), y.detach(), color="C0", label=f"fake-quantized, {2**bits} values")
    left.set(title=f"Forward: int{bits}, scale = {scale:.3f}", xlabel="x (input)", ylabel="y (output)", ylim=(-2, 2))
    right.axhline(0, color="0.6", ls="--", label="true derivative (0 or none)")
    right.plot(x.detach(), x.grad, color="C1", label="straight-through estimate")
    right.set(title="Backward: dy/dx", xlabel="x (input)", ylabel="gradient", ylim=(-0.1, 1.45))
    for axis, place in ((left, "upper left"), (right, "upper center")):
        axis.axvspan(-2, (fmt.min - 0.5) * scale, color="0.5", alpha=0.12)
        axis.axvspan((fmt.max + 0.5) * scale, 2, color="0.5", alpha=0.12, label="clipped")
        axis.set_xlim(-2, 2)
        axis.legend(loc=place, fontsize=8, ncols=1 if axis is left else 2)
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


def granularity_picture(bits: int = 4, granularity: str = "channel", outlier: float = 8.0):
    """Figure: where the error of one choice sits, and all choices of granularity and bits against stored size."""
    from .. import plots
    from ..fake_quant import FakeQuantizer

    weight = granularity_weight(outlier)

    def quantized(bits, name):
        quantizer = FakeQuantizer(f"int{bits}", *GRANULARITIES[name])
        found = quantizer(weight)
        error = (found - weight).square().mean().sqrt() / weight.square().mean().sqrt()
        return found, bits + 16 * len(quantizer.blocks(weight)) / weight.numel(), error.item()

    fig, (left, right) = plots.figure(8.5, 3.4, ncols=2, width_ratios=(1, 1.25))
    chosen, stored, error = quantized(bits, granularity)
    relative = (chosen - weight).abs() / weight.square().mean(1, keepdim=True).sqrt()
    image = left.imshow(relative[:, :128].numpy(), vmin=0, vmax=1, cmap="magma", aspect="auto",
                        interpolation="nearest")  # fmt: skip
    left.set_title(f"int{bits} per {granularity}: |error| / RMS of the row", fontsize=10)
    left.set(xlabel="input feature (first 128)", ylabel="output channel")
    left.grid(False)
    fig.colorbar(image, ax=left, label="relative error")
    for marker, name in zip("osD^v", GRANULARITIES, strict=True):
        _, sizes, errors = zip(*(quantized(b, name) for b in range(2, 9)), strict=True)
        right.plot(sizes, errors, marker=marker, ms=4, lw=1, label=f"per {name}")
    right.plot(stored, error, "o", ms=13, mfc="none", mec="black", mew=1.5, label="your choice")
    right.set_title(f"All choices; yours: error {error:.3f} at {stored:.2f} bits", fontsize=10)
    right.set(yscale="log", ylim=(0.003, 1.5), xlabel="stored bits per weight (codes + 16-bit scales)",
              ylabel="RMS error / RMS weight")  # fmt: skip
    right.legend(fontsize=7.5, loc="lower left")
    return fig


def ste_explorer():
    """Bits and clip range against the quantizer's forward and backward."""
    from ipywidgets import FloatSlider, IntSlider

    return live_picture(ste_picture, bits=IntSlider(3, 2, 8, description="bits"),
                        clip=FloatSlider(value=1.0, min=0.2, max=2.0, step=0.1, description="clip range"))  # fmt: skip


def granularity_explorer():
    """Bits, granularity and outliers against the quantization error of a weight."""
    from ipywidgets import Dropdown, FloatSlider, IntSlider

    granularity = Dropdown(options=list(GRANULARITIES), value="channel", description="scale per")
    outlier = FloatSlider(value=8.0, min=1.0, max=32.0, step=1.0, description="outliers x")
    bits = IntSlider(4, 2, 8, description="bits")
    return live_picture(granularity_picture, bits=bits, granularity=granularity, outlier=outlier)
