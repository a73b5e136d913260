"""Pictures of post-training quantization: clipping, outliers, SmoothQuant, rotation, the methods compared."""

from __future__ import annotations

import ipywidgets
import numpy as np

from .. import plots, ptq
from .live import live_picture

BLUE, ORANGE, _, RED = plots.PALETTE[:4]


def clip_curve(weight, bits: int, group: int | None, ratios) -> np.ndarray:
    """What clipping costs and saves: relative squared errors (2, ratios), of rounding and of clipping.

    ``weight`` (rows, columns) is rounded to signed integers with one scale for ``group`` neighbours (None: a row);
    ``2 ** (bits - 1) - 1/2`` steps are a ratio times their amax.  Clipping: the error of weights beyond the last code.
    """
    blocks, parts = weight.detach().float().reshape(-1, group or weight.shape[1]), []
    for ratio in ratios:
        scale = ptq.clip_scale(blocks, 1, bits, [float(ratio)])
        error = (ptq.nearest(blocks, scale, bits) - blocks).square() / blocks.square().sum()
        clips = (blocks / scale).round() != ptq.nearest(blocks / scale, 1, bits)
        parts.append([error[~clips].sum().item(), error[clips].sum().item()])
    return np.array(parts).T


def clip_picture(weight, bits: int = 3, group: int | None = None, ratio: float = 0.8):
    """Figure: one row of the weight with its grid, and the error against the clip ratio, in its two parts."""
    ratios = np.linspace(0.3, 1.1, 41)
    rounding, clipping = clip_curve(weight, bits, group, ratios)
    both = rounding + clipping
    fig, (left, right) = plots.figure(8.5, 3.5, ncols=2)
    row = weight.detach().float().cpu()[0][: group or weight.shape[1]]
    amax, grid = row.abs().max().item(), np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    scale, end = ratio * amax / (grid[-1] + 0.5), 1.05 * amax
    plots.histogram(left, row, bins=40 if len(row) > 100 else 16, density=False, color=BLUE)
    left.vlines(scale * grid, 0, 1, color=ORANGE, lw=1, transform=left.get_xaxis_transform())
    for clipped in ((-end, (grid[0] - 0.5) * scale), ((grid[-1] + 0.5) * scale, end)):
        left.axvspan(*clipped, color="0.5", alpha=0.2)
    left.set(title=f"{len(row)} weights and their int{bits} grid", xlabel="weight (grey: clipped)", xlim=(-end, end))
    right.plot(ratios, both, color="black", label="both")
    right.plot(ratios, rounding, color=BLUE, ls="--", label="rounding")
    right.plot(ratios, clipping, color=RED, ls=":", lw=2, label="clipping")
    right.axvline(best := ratios[both.argmin()], color="0.6", lw=1)
    here = clip_curve(weight, bits, group, [ratio]).sum()
    right.plot([ratio], [here], "o", ms=9, mfc="none", mec="black", mew=1.5)
    right.set(title=f"Whole matrix: least error at {best:.2f}", xlabel="clip ratio (share of the amax that is kept)",
              ylabel="squared error / squared weights", ylim=(0, 1.15 * max(both)))  # fmt: skip
    right.legend()
    return fig


def clip_explorer(weight):
    """Widget: bits, group and clip ratio against the error of a weight (rows, columns)."""
    groups = [("row", None), *((f"group of {g}", g) for g in (128, 32) if weight.shape[1] % g == 0)]
    return live_picture(
        lambda **chosen: clip_picture(weight, **chosen),
        bits=ipywidgets.IntSlider(3, 2, 8, description="bits"),
        group=ipywidgets.Dropdown(options=groups, description="scale per"),
        ratio=ipywidgets.FloatSlider(0.8, min=0.3, max=1.1, step=0.02, description="clip ratio"))  # fmt: skip


def outlier_picture(amax: dict, name: str, other: str):
    """Figure: ``amax[layer]`` (channels,) of the inputs of two layers, and how far the largest stands out in each."""
    fig, (left, right) = plots.figure(8.5, 3.5, ncols=2, width_ratios=(1.25, 1))
    for key, color in ((name, RED), (other, BLUE)):
        left.plot(amax[key].cpu() / amax[key].cpu().median(), color=color, lw=0.9, label=".".join(key.split(".")[-4:]))
    left.set(title="Inputs: the largest value of each channel", xlabel="channel", ylabel="amax (median channel = 1)")
    left.legend(loc="upper left")
    labels = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}
    for (kind, label), marker, color in zip(labels.items(), plots.MARKERS, plots.PALETTE, strict=False):
        ratios = [(values.max() / values.median()).item() for key, values in amax.items() if key.endswith(kind)]
        right.plot(range(len(ratios)), ratios, marker=marker, ms=5, lw=1.2, color=color, label=label)
    right.axhline(1, color="0.6", lw=1, ls=":")
    right.set(title="How far the largest stands out", xlabel="block of the model", ylabel="largest / median amax")
    for ax in (left, right):
        ax.set_ylim(0, None)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(title="input of", loc="upper right", fontsize=8.5)
    return fig


def smooth_picture(alphas, errors: dict, plain: dict, before, after):
    """Figure: SmoothQuant's output error against alpha, and the channels' amax before and after the chosen alpha.
    ``errors``, ``plain``: label -> with each alpha, without; ``before``, ``after``: amax of activations, weights."""
    fig, (left, right) = plots.figure(9.5, 4, ncols=2)
    for (label, values), color, marker in zip(errors.items(), plots.PALETTE, "os^", strict=False):
        left.semilogy(alphas, values, marker=marker, ms=5, color=color, label=label)
        left.axhline(plain[label], color=color, ls="--", lw=1.2, label="  the same, before")
    every = np.array([*np.ravel(list(errors.values())), *plain.values()])
    left.set(title="Output error, W8A8, calibration text", xlabel="alpha (1: all difficulty in the weights)",
             ylabel="relative error of the output", ylim=(0.7 * every.min(), 4 * every.max()))  # fmt: skip
    left.set_yticks(ticks := [0.01, 0.02, 0.05, 0.1, 0.2, 0.5], [f"{tick:.0%}" for tick in ticks])
    left.minorticks_off()
    left.legend(ncols=2, loc="upper center", fontsize=8.5)
    order = before[0].cpu().argsort(descending=True)
    for (x, w), style, when in ((before, ":", "before"), (after, "-", "after")):
        for values, color, what in ((x.cpu(), RED, "activations"), (w.cpu(), BLUE, "weights")):
            right.semilogy(values[order] / values.max(), color=color, ls=style, lw=1.1, label=f"{what}, {when}")
    right.set(title="How even the channels are", xlabel="channel, largest activations first",
              ylabel="amax (largest channel = 1)", ylim=(right.get_ylim()[0] / 4, 1.5))  # fmt: skip
    right.legend(fontsize=8, ncols=2, loc="lower center")
    return fig


def rotation_picture(before: dict, after: dict, down: str):
    """Figure: sorted amax of the channels of two inputs (what layers saw), of q, k, v and of ``down``, in one block."""
    fig, axes = plots.figure(9.5, 3.7, ncols=2)
    for ax, name in zip(axes, (down.replace("mlp.down_proj", "self_attn.q_proj"), down), strict=True):
        for seen, color, label in ((before, RED, "before"), (after, BLUE, "rotated")):
            values = seen[name].amax.cpu() / seen[name].H.diag().mean().div(seen[name].n).sqrt().cpu()
            ax.plot(values.sort(descending=True).values, color=color, lw=2, label=label)
        ax.set(title="Input of " + ".".join(name.split(".")[-4:]), ylabel="amax / root mean square", ylim=(0, None),
               xlabel="channel, largest first")  # fmt: skip
        ax.legend()
    return fig


def methods_picture(table):
    """Figure: KLD by method, a panel for each number of bits; columns bits, method, kld_mean, kld_mean_se."""
    bits = sorted(table["bits"].unique(), reverse=True)
    fig, axes = plots.figure(8.5, 3.3, ncols=len(bits), squeeze=False)
    for ax, b in zip(axes[0], bits, strict=True):
        rows = table[table["bits"] == b].iloc[::-1]
        ax.errorbar(rows["kld_mean"], range(len(rows)), xerr=2 * rows["kld_mean_se"], fmt="o", capsize=3, color=BLUE)
        ax.set_yticks(range(len(rows)), rows["method"])
        ax.set(title=f"{b} bits", xlim=(0, 1.15 * (rows["kld_mean"] + 2 * rows["kld_mean_se"]).max()))
        ax.set_xlabel("mean KL divergence (nats; bars: two std. errors)", size=8.5)
        ax.locator_params(axis="x", nbins=4)
        ax.grid(False, axis="y")
    return fig
