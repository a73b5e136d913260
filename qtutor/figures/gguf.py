"""Pictures of GGUF: one block, bits and mixtures of the formats, quality by type."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pandas as pd
from matplotlib.patches import Patch, Rectangle

from .. import gguf_blocks, plots

_COLORS = {"codes": 0, "high": 4, "signs": 3, "scales": 1, "d": 2}  # places in plots.PALETTE


def byte_map(kind: str, block):
    """Figure: every byte of one block in its place, coloured by what it is for, with its value in hex."""
    block, columns = np.asarray(block, np.uint8).ravel(), 16
    gguf_blocks.fields(kind, block)  # one sentence where the block is no such block
    roles = [role for _, nbytes, role, _ in gguf_blocks.LAYOUT[kind] for _ in range(nbytes)]
    rows = -(-len(block) // columns)
    fig, ax = plots.figure(8.5, 0.34 * rows + 1.1)
    for i, (value, role) in enumerate(zip(block, roles, strict=True)):
        y, x = divmod(i, columns)
        ax.add_patch(Rectangle((x, y), 1, 1, facecolor=plots.PALETTE[_COLORS[role]], alpha=0.35, edgecolor="white"))
        ax.text(x + 0.5, y + 0.5, f"{value:02x}", ha="center", va="center", family="monospace", fontsize=9)
    ax.set(xlim=(0, columns), ylim=(rows, 0), xlabel="byte within the row", ylabel="first byte of the row",
           title=f"One {kind} block: {len(block)} bytes for {gguf_blocks.GGML[kind].weights} weights")  # fmt: skip
    ax.set_xticks(np.arange(columns) + 0.5, np.arange(columns))
    ax.set_yticks(np.arange(rows) + 0.5, np.arange(rows) * columns)
    ax.grid(False)
    used = [role for role in gguf_blocks.ROLES if role in roles]
    fig.legend(handles=[Patch(color=plots.PALETTE[_COLORS[r]], alpha=0.35, label=gguf_blocks.ROLES[r]) for r in used],
               loc="outside lower center", ncols=len(used), frameon=False)  # fmt: skip
    return fig


def bits_picture():
    """Figure: where the bits of each format go, codes and scales stacked."""
    found = gguf_blocks.bits()
    (fig, ax), left = plots.figure(8.5, 5.6), np.zeros(len(found))
    for role, text in gguf_blocks.ROLES.items():
        values = np.array([row[role] for row in found.values()])
        bars = ax.barh(list(found), values, left=left, color=plots.PALETTE[_COLORS[role]], label=text, height=0.75)
        left += values
    ax.bar_label(bars, [f"{total:.4g}" for total in left], padding=3.5, fontsize=8)
    ax.invert_yaxis()
    ax.set(title="Where the bits of a format go", xlabel="bits per weight", xlim=(0, 9.2))
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(False, axis="y")
    fig.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return fig


def mixture_picture(mixtures: dict):
    """Figure: a map of layer and tensor for each type (-> its gguf_blocks.mixture), coloured by bits per weight."""
    rows, kinds = -(-len(mixtures) // 2), gguf_blocks.KINDS
    fig, axes = plots.figure(8.5, 2.5 * rows + 0.3, ncols=2, nrows=rows, sharex=True, sharey=True)
    axes = axes.ravel()
    for ax, (name, (layers, others)) in zip(axes, mixtures.items(), strict=False):
        grid = np.array([[gguf_blocks.bits_of(f) for f in layers[kind]] for kind in kinds])
        image = ax.imshow(grid, cmap="cividis", vmin=1.5, vmax=8.5, aspect="auto")
        for y, kind in enumerate(kinds):
            for f, run in ((f, list(run)) for f, run in groupby(range(grid.shape[1]), layers[kind].__getitem__)):
                if 8 * len(run) >= len(f) * grid.shape[1] / 4:  # it has room
                    ax.text(np.mean(run), y, f, ha="center", va="center", fontsize=7.5,
                            color="white" if grid[y, run[0]] < 5 else "black")  # fmt: skip
        ax.set_title(f"{name} (embedding: {others['token_embd']})", fontsize=10)
        ax.set(xlabel="layer", yticks=range(len(kinds)), yticklabels=kinds)
        ax.tick_params(labelsize=8)
        ax.grid(False)
        ax.label_outer()
    for ax in axes[len(mixtures) :]:
        ax.set_visible(False)
    fig.colorbar(image, ax=list(axes), label="bits per weight of the format", shrink=0.8)
    return fig


FAMILIES = ("legacy (_0, _1)", "K (super-blocks)", "IQ (codebook)", "ternary, 1 bit", "block float", "float16")


def family(name: str) -> str:
    """The family that a type is drawn with."""
    if name in ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0"):  # made for models that were trained in one bit or three values
        return FAMILIES[3]
    if name in ("F16", "BF16", "MXFP4", "NVFP4"):
        return FAMILIES[5 if "F16" in name else 4]
    return FAMILIES[2 if name.startswith("IQ") else 1 if "_K" in name else 0]


def with_errors(values, errors, digits: int = 4, scale: float = 1) -> list[str]:
    """``["0.0501 ± 0.0004", ...]``; the value alone without an error, an empty string where there is no value."""
    return [" ± ".join(f"{scale * x:.{digits}f}" for x in p if pd.notna(x)) for p in zip(values, errors, strict=True)]


def quality_table(rows):
    """Rows of ``gguf_quality`` as a table to be read, largest first; ± standard errors over windows, where known."""
    q = pd.DataFrame(rows).sort_values(["bits_per_weight", "kld_mean"], ascending=[False, True])
    columns = {
        "bits per weight": ("bits_per_weight", 2), "file (MB)": ("file_bytes", 2, 1e-6), "KLD mean": ("kld_mean", 4),
        "KLD 99.9 %": ("kld_p999", 3), "perplexity": ("perplexity", 2), "ratio to original's": ("perplexity_ratio", 4),
        "RMS Δp (%)": ("delta_p_rms", 2, 100), "same top (%)": ("same_top", 1, 100)}  # fmt: skip
    table = {title: with_errors(q[key], q.get(f"{key}_se_windows", [None] * len(q)), *how)
             for title, (key, *how) in columns.items()}  # fmt: skip
    return pd.DataFrame(table, index=list(q["type"] + np.where(q["imatrix"], " + imatrix", "")))


def quality_picture(data, title: str):
    """Figure of ``gguf_quality``: KLD by bits per weight, a crowded part enlarged; colour: family, filled: imatrix."""
    data = data[data["bits_per_weight"] < 9].sort_values("imatrix")  # 16-bit types would push the others together
    (fig, axes), (left, right, low, high) = plots.figure(10.5, 5.8, ncols=2), (3.55, 6.4, 0.009, 0.42)
    for ax in axes:
        for (kind, flag), d in data.groupby([data["type"].map(family), "imatrix"]):
            color, marker = plots.PALETTE[FAMILIES.index(kind)], plots.MARKERS[FAMILIES.index(kind)]
            ax.errorbar(d["bits_per_weight"], d["kld_mean"], 2 * d["kld_mean_se_windows"], color=color, fmt=marker,
                        mfc=color if flag else "white", capsize=2, ms=6, label=kind + " + imatrix" * flag)  # fmt: skip
        ax.set(xlabel="bits per weight of the file", ylabel="mean KL divergence (nats per token)", yscale="log")
    axes[0].set(title=title, xlim=(1.1, 9.4), ylim=(6e-4, 25))
    axes[1].set(title="The grey box, enlarged", xlim=(left, right), ylim=(low, high), ylabel="")
    axes[0].add_patch(Rectangle((left, low), right - left, high - low, facecolor="0.92", edgecolor="0.6", zorder=0))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    for name, d in data.groupby("type"):  # one label a type, as high as its last (filled) mark
        y, color = d["kld_mean"].iloc[-1], plots.PALETTE[FAMILIES.index(family(name))]
        ax = axes[int(left < d["bits_per_weight"].iloc[-1] < right and low < y < high)]
        before = name in ("Q4_K_S", "Q5_K_S", "Q5_K_M", "Q1_0", "TQ1_0") or (name[:2] == "IQ" and name != "IQ4_NL")
        ax.annotate(name, (getattr(d["bits_per_weight"], "min" if before else "max")(), y), fontsize=8, color=color,
                    xytext=(-6 if before else 6, {"TQ1_0": 12, "TQ2_0": 12, "IQ1_S": 5, "Q5_K_M": -10}.get(name, 0)),
                    textcoords="offset points", ha="right" if before else "left", va="center")  # fmt: skip
    return fig
