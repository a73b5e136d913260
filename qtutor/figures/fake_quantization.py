"""Pictures of the fake-quantization notebook: rounding and its gradient, granularity, ranges, QAT, an integer layer."""

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


def granularity_picture(bits: int = 4, granularity: str = "channel", outlier: float = 8.0, beside: tuple = ()):
    """Figure: maps of the error for ``granularity`` and those ``beside`` it, then all choices against stored size."""
    from .. import plots
    from ..fake_quant import FakeQuantizer

    weight = granularity_weight(outlier)

    def quantized(bits, name):
        quantizer = FakeQuantizer(f"int{bits}", *GRANULARITIES[name])
        found = quantizer(weight)
        error = 100 * (found - weight).norm() / weight.norm()
        return found, bits + 16 * len(quantizer.blocks(weight)) / weight.numel(), error.item()

    names = [granularity, *beside]
    fig, (*maps, right) = plots.figure(8.5, 3.3, ncols=len(names) + 1, width_ratios=[1] * len(names) + [1.4])
    for marker, name in zip("osD^v", GRANULARITIES, strict=True):
        _, sizes, errors = zip(*(quantized(b, name) for b in range(2, 9)), strict=True)
        right.plot(sizes, errors, marker=marker, ms=4, lw=1, label=f"per {name}")
    for axis, name in zip(maps, names, strict=True):
        found, stored, error = quantized(bits, name)
        relative = 100 * (found - weight).abs() / weight.square().mean(1, keepdim=True).sqrt()
        image = axis.imshow(relative[:, :128].numpy(), vmin=0, vmax=100, cmap="magma", aspect="auto",
                            interpolation="nearest")  # fmt: skip
        axis.set_title(f"int{bits} per {name}:\n{error:.1f} % at {stored:.2f} bits", fontsize=10)
        axis.set(xlabel="input (first 128)", ylabel="output channel" if axis is maps[0] else "")
        axis.grid(False)
        right.plot(stored, error, "o", ms=12, mfc="none", mec="black", mew=1.3)
    fig.colorbar(image, ax=maps, label="|error|, % of the row's RMS", shrink=0.9)
    right.set_title("All choices, 2 to 8 bits;\ncircles: the maps", fontsize=10)
    right.set(yscale="log", ylim=(0.3, 150), xlabel="bits per weight, with scales", ylabel="RMS error, % of RMS weight")
    plots.plain_ticks(right.yaxis, 500)
    right.legend(fontsize=7.5, loc="lower left")
    return fig


def heavy_tailed(seed: int):
    """4096 values of Student's t with 4 degrees of freedom: synthetic activations with a few large ones."""
    import torch

    g = torch.Generator().manual_seed(seed)
    normal, others = torch.randn(4096, generator=g), torch.randn(4, 4096, generator=g)
    return normal / others.square().mean(0).sqrt()


def ranges_picture(values, ranges: dict):
    """Figure: the distribution of ``values`` and, as lines, the ranges ``{observer: half of its width}``."""
    from .. import plots

    fig, axis = plots.figure(8.5, 3)
    axis.hist(values.clamp(-40, 40), bins=240, color="0.75", edgecolor="none")
    for i, ((name, end), style) in enumerate(zip(ranges.items(), ("-", "--", "-.", ":"), strict=True)):
        axis.axvline(-end, color=f"C{i}", ls=style, lw=2)
        axis.axvline(end, color=f"C{i}", ls=style, lw=2, label=f"{name}: ±{end:.1f}")
    axis.set(yscale="log", title="int4: the ranges of four observers", xlabel="activation", ylabel="values (log scale)")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def spiral_picture(models: dict, points, labels):
    """Figure: for each ``{title: model}`` the probability of label 1 in the plane, with some of the points."""
    import torch

    from .. import plots

    line = torch.linspace(-1.15, 1.15, 160)
    fig, axes = plots.figure(8.5, 2.8, ncols=len(models))
    for axis, (title, model) in zip(axes, models.items(), strict=True):
        axis.set_title(title, fontsize=10)
        surface = model(torch.cartesian_prod(line, line)).softmax(1)[:, 1].view(160, 160).T.detach()
        axis.imshow(surface, origin="lower", extent=(-1.15, 1.15) * 2, cmap="RdBu_r", vmin=0, vmax=1, alpha=0.7)
        for label, color in ((0, "#08306b"), (1, "#67000d")):
            axis.plot(*points[:600][labels[:600] == label].T, ".", ms=2.5, color=color)
        axis.set(xticks=[], yticks=[], xlabel="$x_1$", ylabel="$x_2$")
    fig.suptitle("Decision surface and held-out accuracy, 2-bit weights (float: 32 bits)", fontsize=11)
    return fig


def latent_picture(latent, quantized):
    """Figure: weights during training, (steps, weights) in units of the scale: latent (thin) and quantized (thick)."""
    from .. import plots

    fig, axis = plots.figure(8.5, 3)
    for i in range(latent.shape[1]):
        axis.plot(quantized[:, i] + 0.03 * (i - 2), color=f"C{i}", lw=2.4, alpha=0.35)
        axis.plot(latent[:, i], color=f"C{i}", lw=1.2)
    axis.hlines([-1.5, -0.5, 0.5, 1.5], 0, len(latent), color="black", lw=0.7, ls=":")
    axis.set(title="Five weights during QAT: latent (thin), quantized (thick)", xlabel="optimizer step",
             ylabel="weight / scale", yticks=[-2, -1, 0, 1, 2])  # fmt: skip
    return fig


def integer_layer_picture():
    """Figure: what flows through a layer that computes with integers only, left to right, with its data types."""
    from .. import plots

    fig, axis = plots.figure(8.5, 2.6)
    axis.set(xlim=(0, 10.2), ylim=(0.2, 2.8), title="One layer in integers: codes in, codes out")
    axis.axis("off")
    boxes = [(0.8, 2.2, "$q_x$ of the input", "C0"), (0.8, 0.8, "$q_w$ of the weights", "C0"),
             (3.1, 1.5, "GEMM\n$\\sum q_x q_w$", "C1"), (5.0, 1.5, "+ bias and\nzero-point\nterms", "C1"),
             (7.0, 1.5, "$\\times M_0$,\nshift by $n$,\nround", "C2"), (9.0, 1.5, "$+ z_y$,\nclamp\n(ReLU)", "C2")]
    for x, y, text, color in boxes:
        box = {"boxstyle": "round,pad=0.5", "fc": color, "alpha": 0.3, "ec": color}
        axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box)
    arrows = [(2.5, 1.7, 1.7, 2.1), (2.5, 1.3, 1.7, 0.9), (4.35, 1.5, 3.65, 1.5), (6.35, 1.5, 5.65, 1.5),
              (8.5, 1.5, 7.65, 1.5), (10.1, 1.5, 9.5, 1.5)]
    for (*end, x, y), kind in zip(arrows, ["int8", "int8", "int32", "int32", "int32", "int8"], strict=True):
        axis.annotate("", end, (x, y), arrowprops={"arrowstyle": "-|>", "color": "0.3"})
        axis.text((x + end[0]) / 2, max(y, end[1]) + 0.1, kind, ha="center", fontsize=9, color="0.3")
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
