"""Pictures of the fake-quantization notebook: the straight-through estimator, granularity."""


from __future__ import annotations

from .live import live_picture

# ------------------------------------------------------------- notebook 05: fake quantization


def ste_picture(bits: int = 3, clip: float = 1.0):
    """Figure: the quantizer's forward staircase, and the gradient it really has beside the straight-through one.

    The grid is symmetric and ends at about ``clip`` (scale = clip / ((quant_max - quant_min) / 2)).
    """
    import matplotlib.pyplot as plt
    import torch

    from ..fake_quant import Target, choose_qparams, fake_quantize

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
    from ..fake_quant import FakeQuantizer

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


def ste_explorer():
    """Bits and clip range against the quantizer's forward and backward (notebook 05)."""
    import ipywidgets

    return live_picture(
        ste_picture,
        bits=ipywidgets.IntSlider(3, 2, 8, description="bits"),
        clip=ipywidgets.FloatSlider(value=1.0, min=0.2, max=2.0, step=0.1, description="clip range"),
    )


def granularity_explorer():
    """Bits, granularity and outliers against the quantization error of a weight (notebook 05)."""
    import ipywidgets

    return live_picture(
        granularity_picture,
        bits=ipywidgets.IntSlider(4, 2, 8, description="bits"),
        granularity=ipywidgets.Dropdown(options=list(GRANULARITIES), value="channel", description="scale per"),
        outlier=ipywidgets.FloatSlider(value=8.0, min=1.0, max=32.0, step=1.0, description="outliers x"),
    )
