"""Pictures of FP8's range and of delayed scaling at work."""

from __future__ import annotations

import math

import ipywidgets
import numpy as np
import torch

from .. import formats, plots
from .live import dropdown, live_picture

STEPS, AT = 28, 6  # of a run; and the step at which something happens
SCENARIOS = {  # which power of two, of those chosen, the tensor has grown by at a step
    "one spike": lambda step: step == AT,
    "a jump that stays": lambda step: step >= AT,
    "growth without end": lambda step: max(0, step - AT) / 16,
}


def delayed_scaling(history_len: int = 8, margin: int = 0, algorithm: str = "max", scenario: str = "one spike",
                    octaves: float = 10) -> list[dict]:  # fmt: skip
    """Run delayed scaling in E4M3 on a tensor that something happens to; return one dict for each step.

    ``history``: amaxes that the scale in use came from, oldest first; ``chosen``: the one taken; ``top``, ``bottom``:
    largest and smallest normal number that the scale can hold; ``amax``, ``low``: largest magnitude of this step's
    tensor, and their first percentile; ``saturated``, ``lost``: shares beyond the top, and rounded to zero; ``error``,
    ``error_current``: relative RMS error with this scale, and with the one that current scaling takes.
    """

    def error(got, x):
        return ((got - x).norm() / x.norm()).item()

    def rounded(x, scale):
        return (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale

    g = torch.Generator().manual_seed(3)  # many powers of two, as in a transformer's activations; the largest is 4
    base = torch.randn(4096, generator=g) * torch.exp2(2.5 * torch.randn(4096, generator=g))
    base = base / base.abs().max() * 4
    spot = torch.arange(len(base)) == base.abs().argmax()
    history, scale, chosen, run = [], 1.0, None, []
    for step in range(STEPS):
        wobble = 0.3 * ((step * 7) % 5 - 2) / 2  # as every training has
        size = 2.0 ** (wobble + octaves * SCENARIOS[scenario](step))
        x = torch.where(spot, base * size, base) if scenario == "one spike" else base * size  # one value, or all
        amax, got = x.abs().max().item(), rounded(x, scale)
        run.append(dict(
            history=history[-history_len:], chosen=chosen, scale=scale, top=448 / scale, bottom=2.0**-6 / scale,
            amax=amax, low=x.abs().quantile(0.01).item(), saturated=(x.abs() * scale > 448).float().mean().item(),
            lost=((got == 0) & (x != 0)).float().mean().item(), error=error(got, x),
            error_current=error(rounded(x, 448 / amax), x)))  # fmt: skip
        history.append(amax)
        chosen = max(history[-history_len:]) if algorithm == "max" else amax
        scale = 448 / chosen / 2**margin
    return run


def scaling_picture(step: int = 9, history_len: int = 8, **settings):
    """Figure: what the scale in use can hold against what comes, with the history before ``step``; the error."""
    run = delayed_scaling(history_len, **settings)
    now, steps, edge = run[step], np.arange(STEPS), np.arange(STEPS + 1) - 0.5
    blue, orange, red, grey = (plots.PALETTE[i] for i in (0, 1, 3, 7))
    amax, low, bottom, top = (np.array([row[key] for row in run]) for key in ("amax", "low", "bottom", "top"))
    over, known = amax > top * 1.0001, slice(max(0, step - history_len), step)
    chosen = [past for past in range(step) if amax[past] == now["chosen"]][-1:]
    fig, (reach, error) = plots.figure(8.5, 4.6, nrows=2, sharex=True, height_ratios=(1.7, 1))
    reach.fill_between(edge, np.append(bottom, bottom[-1]), np.append(top, top[-1]), step="post", color=blue,
                       alpha=0.2, lw=0, label="normal numbers\nat the scale in use")  # fmt: skip
    reach.vlines(steps, low, amax, color=grey, lw=1.2, label="the tensor (99 % of it)")
    reach.plot(steps[~over], amax[~over], "o", ms=5, color=blue, label="amax")
    reach.plot(steps[over], amax[over], "X", ms=8, color=red, label="amax, saturates")
    reach.plot(steps[known], amax[known], "o", ms=10, mfc="none", mec=orange, label="in the history")
    reach.plot(chosen, amax[chosen], "o", ms=14, mfc="none", mec=orange, mew=3, label="sets the scale in use")
    reach.set(title=f"What the scale can hold, and what comes; step {step}", ylabel="magnitude",
              ylim=(max(min(low.min(), bottom.min()) / 2, 2.0**-18), max(amax.max(), top.max()) * 3))  # fmt: skip
    reach.set_yscale("log", base=2)
    error.semilogy(steps, [100 * row["error"] for row in run], "-", color=blue, label="delayed scaling")
    error.semilogy(steps, [100 * row["error_current"] for row in run], "--", color=orange, label="current scaling")
    error.set(title="Error of the tensor", xlabel="step", ylabel="relative error (%)", xlim=(-0.7, STEPS - 0.3),
              ylim=(1, 150))  # fmt: skip
    plots.plain_ticks(error.yaxis, 150)
    for axis in (reach, error):
        axis.axvline(step, color="black", lw=1, ls=":")
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return fig


def scaling_sentence(step: int, margin: int, **settings) -> str:
    """HTML: what happens at ``step`` of such a run, in numbers."""
    now = delayed_scaling(margin=margin, **settings)[step]
    source = "no amax yet: 1" if now["chosen"] is None else f"448 / {now['chosen']:.4g} / 2<sup>{margin}</sup>"
    room = math.log2(now["top"] / now["amax"])
    where = (f"{room:.1f} powers of two of headroom" if room >= -1e-4 else
             f"<b>{-room:.1f} powers of two too large: {now['saturated']:.2%} of the values saturate</b>")  # fmt: skip
    return (f"<div style='line-height: 1.4'><b>Step {step}</b>: scale in use {now['scale']:.4g} ({source}), so the top "
            f"is {now['top']:.4g}. This tensor's amax is {now['amax']:.4g}: {where}; {now['lost']:.2%} round to zero. "
            f"Relative error {now['error']:.3g}; current scaling {now['error_current']:.3g}.</div>")  # fmt: skip


def scaling_explorer():
    """Step through delayed scaling: history length, margin, algorithm, and what happens to the tensor."""

    def slider(label, *value_and_ends):
        return ipywidgets.IntSlider(*value_and_ends, description=label, style={"description_width": "70px"})

    controls = {
        "scenario": dropdown("event", list(SCENARIOS), "one spike", 300, 70),
        "octaves": slider("size (2^n)", 10, 0, 14), "history_len": slider("history", 8, 1, 24),
        "margin": slider("margin", 0, 0, 8),
        "algorithm": dropdown("algorithm", ["max", "most_recent"], "max", 300, 70),
        "step": slider("step", 5, 0, STEPS - 1),
    }  # fmt: skip
    six = list(controls.values())
    return live_picture(lambda **chosen: (scaling_sentence(**chosen), scaling_picture(**chosen)),
                        ipywidgets.HBox([ipywidgets.VBox(six[i : i + 2]) for i in (0, 2, 4)]), **controls)  # fmt: skip


def magnitudes(tensors: dict):
    """Figure: histograms of log2 of the magnitudes, at scale 1 and at the best scale, above the formats' ranges."""
    fig, axes = plots.figure(8.5, 5.6, nrows=3, sharex=True)
    for axis, (name, tensor) in zip(axes, tensors.items(), strict=True):
        size, best = tensor[tensor != 0].abs().float(), formats.E5M2 if name == "gradient" else formats.E4M3
        for scale, label, color in ((1, "scale 1", 7), (best.max / size.max(), "scaled", 0)):
            plots.histogram(axis, (size * scale).log2().clip(-31.9), range(-32, 19), label, plots.PALETTE[color])
        for i, f in enumerate((formats.E4M3, formats.E5M2)):
            ends, y = np.log2([f.min_subnormal, f.min_normal, f.max]), [axis.get_ylim()[1] * 1.1] * 2
            axis.plot(ends[1:], y, lw=6, color=plots.PALETTE[i + 1], solid_capstyle="butt", label=f"{f.name}, normal")
            axis.plot(ends[:2], y, lw=6, color=plots.PALETTE[i + 1], solid_capstyle="butt", alpha=0.35)
        axis.set(title=f"{name}; blue: scaled for {best.name}", ylabel="density", xlim=(-32, 18))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    axes[-1].set_xlabel("log2 of the magnitude (pale end of a bar: subnormal numbers)")


def amax_and_fits(axis, steps, amax, fits, free: float = 464 / 448):
    """Draw amax and the largest value that fits, by step (arrays); a cross where amax is above ``free`` times that."""
    over = amax > fits * free
    axis.step(steps, fits, where="mid", color=plots.PALETTE[1], label="largest value that fits")
    axis.plot(steps, amax, ".-", ms=4, color=plots.PALETTE[0], label="amax")
    axis.plot(steps[over], amax[over], "x", color=plots.PALETTE[3], mew=2, label="saturates at a cost")
    axis.set_yscale("log", base=2)
    if np.ptp(np.log2(amax)) < 1:  # hardly moves: show one power of two, not its noise
        axis.set_ylim(amax.mean() / 1.5, amax.mean() * 1.5)
