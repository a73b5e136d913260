"""Pictures of FSDP2 on several GPUs: one step in time, measured scaling, planned scaling, kinds of parallelism."""

from __future__ import annotations

import ipywidgets
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from .. import QtutorError, plots
from ..decide import capacity, hardware, sharding
from .live import dropdown, live_picture

LINES = {"BF16": (0, "o"), "FP8 delayed": (1, "s"), "FP8 delayed + FP8 weights": (2, "D")}  # place in PALETTE, marker
PLANNED = {"BF16": 2, "FP8 delayed + FP8 weights": 1}  # bytes a weight of the all-gather
RANKS = tuple(2**i for i in range(10))
KINDS = {"FSDP\nsplits batch, weights, optimizer": 0, "tensor parallel\nsplits each matrix, inside a host": 1,
         "context parallel\nsplits the sequence": 2, "pipeline parallel\nsplits layers, between hosts": 4}  # fmt: skip
# GPUs, what was trained, (FSDP, TP, CP, PP).  8 to 512: pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md
# (tables 1, 3, 4, 5); the rest: "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783 (table 4).
PUBLISHED = [(8, "8B", (8, 1, 1, 1)), (128, "8B", (128, 1, 1, 1)), (256, "70B", (32, 8, 1, 1)),
             (512, "405B", (8, 8, 1, 8)), (8192, "405B\nMFU 43 %", (64, 8, 1, 16)), (16384, "405B\nMFU 41 %",
             (128, 8, 1, 16)), (16384, "405B, 128k\nMFU 38 %", (8, 8, 16, 16))]  # fmt: skip


def timeline(reshard: bool = True):
    """Figure: a step of FSDP2 with three layers on one rank, its lengths schematic.  ``reshard``: FSDP2 frees gathered
    weights after the forward pass, its default, and gathers them again for the backward pass."""
    link, after = 1.4, 7.6 if reshard else 7.1  # lengths of a collective, of all before the backward pass
    blocks = [(1, 0.0, link, "gather\nW1", 0), (0, 6.2, 0.9, "loss", 7)]  # row, start, length, label, colour
    blocks += [(0, link + 1.6 * i, 1.6, f"forward\n{i + 1}", 7) for i in range(3)]
    blocks += [(1, link + 1.6 * i, link, f"gather\nW{i + 2}", 0) for i in range(2)]
    blocks += [(0, after + 3.2 * i, 3.2, f"backward {3 - i}", 1) for i in range(3)]
    if reshard:
        blocks += [(1, start, link, f"gather\nW{3 - i}", 0) for i, start in enumerate((6.2, after, after + 3.2))]
    starts = after + 3.2 + link * reshard, after + 6.4, after + 9.6
    blocks += [(1, start, link, f"scatter\ndW{3 - i}", 2) for i, start in enumerate(starts)]
    blocks += [(0, after + 9.6 + link, 1.5, "Adam\n1/N", 5)]
    fig, ax = plots.figure(11, 2.9)
    for row, left, length, label, color in blocks:
        ax.barh(row, length, left=left, height=0.78, color=plots.PALETTE[color], alpha=0.45, edgecolor="white", lw=2,
                hatch={0: "//", 2: ".."}.get(color))  # fmt: skip
        ax.text(left + length / 2, row, label, ha="center", va="center", fontsize=10,
                bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1} if row else None)  # fmt: skip
    for left, right in ((0, link), (7.1, after), (after + 9.6, after + 9.6 + link)):
        ax.axvspan(left, right, color=plots.PALETTE[3], alpha=0.16, lw=0, zorder=0)
    ax.set_yticks([0, 1], ["compute", "communication"], fontsize=11)
    ax.set(title=f"One step of FSDP2 on one rank: weights are gathered {'twice' if reshard else 'once'}", xticks=[],
           xlabel="time (schematic); shaded: the GPU only communicates", ylim=(1.5, -0.5), xlim=(0, 20.2))  # fmt: skip
    ax.grid(False)
    return fig


def scaling_picture(frame):
    """Figure: measured tokens/s of one GPU against the GPUs that train together, a panel a shape.  ``frame``: rows of
    ``fp8_scaling``; those measured on one number of GPUs only are left out."""
    frame = frame[frame["ms_per_step"].notna()]
    frame = frame[frame.groupby(["shape", "rung", "layers"])["ranks"].transform("nunique") > 1]
    fig, axes = plots.figure(10.5, 4, ncols=frame["shape"].nunique(), squeeze=False)
    for ax, (shape, part) in zip(axes[0], frame.groupby("shape", sort=False), strict=True):
        ends, most, top = [], part["ranks"].max(), 1.15 * part["train_tokens_per_s"].max() / 1000
        for name, line in part.sort_values("ranks").groupby("rung"):
            rung, rate = name.removesuffix(", gathered once"), line["train_tokens_per_s"] / 1000
            if rung in LINES:
                color, marker = LINES[rung]
                ax.plot(line["ranks"], rate, "-" if name == rung else "--", marker=marker, color=plots.PALETTE[color])
                ends.append((rate.iloc[-1], name.replace("FP8 delayed +", "+"), color))
        height = -np.inf
        for end, label, color in sorted(ends):
            height = max(end, height + 0.06 * top)
            ax.annotate(label, (most, end), (1.1 * most, height), fontsize=9, va="center", color=plots.PALETTE[color])
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(part["ranks"].unique()), sorted(part["ranks"].unique()))
        ax.set(title=f"{shape}, {part['layers'].iloc[0]} layers", xlabel="GPUs that train together",
               ylabel="thousand tokens/s of one GPU", ylim=(0, top), xlim=(0.93, 4 * most))  # fmt: skip
        ax.grid(False, axis="x")
    ax.legend(handles=[Line2D([], [], ls="--", color="0.4", label="dashed: weights gathered once")], loc="lower left")
    return fig


def plan_picture(frame, shape: str = "Llama-2-7B", tokens: int = 8192, gb_per_s: float = 50, ranks: int = 64):
    """Figure: left, planned efficiency of BF16 and of FP8 weights on 1 to 512 GPUs; right, a step's time on ``ranks``.

    ``frame``: rows of ``fp8_scaling``: those on one GPU give a layer's time, which grows with ``tokens`` (a GPU) and
    with the layers of the whole model of this ``shape``.  ``gb_per_s``: between hosts, one way, of one GPU.  Hollow:
    weights, gradients and optimizer, 16 bytes a weight, do not fit 1/N into an H200.
    """
    alone = frame[(frame["ranks"] == 1) & (frame["shape"] == shape)].set_index("rung")
    if not set(PLANNED) <= set(alone.index):
        raise QtutorError(f"{shape!r} was not recorded on one GPU: choose one of {', '.join(frame['shape'].unique())}.")
    fig, (left, right) = plots.figure(10, 3.6, ncols=2, width_ratios=(1.2, 1))
    layers = capacity.config_of(shape)["num_hidden_layers"]
    for row, (rung, nbytes) in enumerate(PLANNED.items()):
        one, (color, marker) = alone.loc[rung], LINES[rung]
        update, whole = sharding.adam_ms(one["trained_weights"]), layers / one["layers"]
        times = (one["ms_per_step"] - update) * whole * tokens / one["tokens"], update * whole
        plan = {"layers": layers, "weights": one["trained_weights"] * whole, "gather_bytes": nbytes,
                "between_hosts_gb_per_s": gb_per_s}  # fmt: skip
        steps = {n: sharding.step(n, *times, **plan) for n in {*RANKS, ranks}}
        label = f"{rung}:\n90 % up to {sharding.hidden_until(*times, ranks=RANKS, **plan)} GPUs"
        left.plot(RANKS, [steps[n].efficiency for n in RANKS], marker=marker, color=plots.PALETTE[color], label=label)
        large = [n for n in RANKS if 16 * plan["weights"] / n > hardware.device("H200").memory_gib * 2**30]
        left.plot(large, [steps[n].efficiency for n in large], marker, mfc="white", color=plots.PALETTE[color])
        start, step = 0.0, steps[ranks]
        for name, ms, part, hatch in (("compute", step.compute_ms, 7, ""), ("optimizer", step.optimizer_ms, 5, ".."),
                                      ("exposed communication", step.exposed_ms, 3, "//")):  # fmt: skip
            right.barh(row, ms, left=start, color=plots.PALETTE[part], hatch=hatch, edgecolor="white", height=0.6,
                       label=None if row else name)  # fmt: skip
            start += ms
        right.annotate(f" {1000 * tokens / start:,.0f} tokens/s of each GPU", (0, row - 0.38), fontsize=9)
    left.axvline(ranks, color="0.3", ls="--", lw=1)
    left.axhline(0.9, color="0.6", ls=":", lw=1.2)
    left.set_xscale("log", base=2)
    left.set_xticks(RANKS, RANKS)
    left.yaxis.set_major_formatter(PercentFormatter(1, 0))
    left.set(title=f"{shape}, all {layers} layers, {tokens:,} tokens a GPU", ylim=(0, 1.15),
             xlabel="GPUs, 8 a host" + "; hollow: not enough memory" * bool(large),
             ylabel="efficiency: time on 1 GPU / on N")  # fmt: skip
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, fontsize=8.5)
    right.set_yticks(range(len(PLANNED)), [rung.replace(" + ", "\n+ ") for rung in PLANNED])
    right.set(title=f"A step on {ranks} GPUs", xlabel="ms (modelled)", ylim=(1.5, -0.6))
    right.xaxis.set_major_formatter("{x:,.0f}")
    right.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=3, frameon=False, fontsize=8.5)
    right.grid(False, axis="y")
    return fig


def plan(frame):
    """Widget: shape, tokens a GPU, interconnect and number of GPUs against :func:`plan_picture`."""
    links = [(f"{n} GB/s ({8 * n:.0f} Gb/s)", n) for n in (12.5, 25, 50, 100)]
    controls = {"shape": dropdown("shape", list(dict.fromkeys(frame["shape"])), "Llama-2-7B"),
                "tokens": dropdown("tokens a GPU", [(f"{n:,}", n) for n in (4096, 8192, 16384, 32768)], 8192),
                "gb_per_s": dropdown("between hosts", links, 50), "ranks": dropdown("GPUs", RANKS, 64)}  # fmt: skip
    boxes = list(controls.values())
    arranged = ipywidgets.HBox([ipywidgets.VBox(boxes[:2]), ipywidgets.VBox(boxes[2:])])
    return live_picture(lambda **chosen: plan_picture(frame, **chosen), arranged, **controls)


def parallelism_picture():
    """Figure: which kinds of parallelism published trainings of Llama 3 use, by number of GPUs; a number in a circle is
    how many parts are split, and the numbers of a column multiply to its GPUs."""
    fig, ax = plots.figure(10.5, 4.2)
    for i, (*_, degrees) in enumerate(PUBLISHED):
        for row, (degree, color) in enumerate(zip(degrees, KINDS.values(), strict=True)):
            if degree > 1:
                ax.scatter(i, row, s=1100, color=plots.PALETTE[color], alpha=0.35)
                ax.text(i, row, degree, ha="center", va="center", fontsize=14)
    ax.set_xticks(range(len(PUBLISHED)), [f"{gpus:,}\n{what}" for gpus, what, _ in PUBLISHED], fontsize=10.5)
    ax.set_yticks(range(len(KINDS)), KINDS, fontsize=10.5)
    ax.set(title="More GPUs, more kinds of parallelism: Llama 3 as published", xlim=(-0.5, len(PUBLISHED) - 0.5),
           xlabel="GPUs (H100), and the model that they train", ylim=(3.5, -0.5))  # fmt: skip
    return fig
