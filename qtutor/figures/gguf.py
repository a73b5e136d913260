"""Pictures of GGUF: one block, bits and mixtures of the formats, quality by type, answers side by side."""

from __future__ import annotations

import html
import os
from itertools import groupby

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.patches import Patch, Rectangle

from .. import gguf_blocks, plots
from .live import live_picture

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
        ax.hlines(np.arange(len(kinds) - 1) + 0.5, -0.5, grid.shape[1] - 0.5, color="white", lw=0.8)
        for y, kind in enumerate(kinds):
            x = 0
            for f, run in ((f, len(list(same))) for f, same in groupby(layers[kind])):  # one label a run of layers
                ax.axvline(x - 0.5, 1 - y / len(kinds), 1 - (y + 1) / len(kinds), color="white", lw=0.8)
                if 8 * run >= len(f) * len(layers[kind]) / 4:  # it has room
                    ax.text(x + (run - 1) / 2, y, f, ha="center", va="center", fontsize=7.5,
                            color="white" if grid[y, x] < 5 else "black")  # fmt: skip
                x += run
        ax.set_title(f"{name} (embedding: {others['token_embd']})", fontsize=10)
        ax.set_yticks(range(len(kinds)), kinds)
        ax.tick_params(labelsize=8)
        ax.grid(False)
        ax.label_outer()
    for ax in axes[len(mixtures) :]:
        ax.set_visible(False)
    for ax in axes[-2:]:
        ax.set_xlabel("layer")
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
    """``["0.0501 ± 0.0004", ...]``; an empty string where there is no value."""
    return ["" if v is None or v != v else f"{scale * v:.{digits}f} ± {scale * e:.{digits}f}"
            for v, e in zip(values, errors, strict=True)]  # fmt: skip


def quality_table(rows):
    """Rows of ``gguf_quality`` as a DataFrame to be read, largest first: "value ± standard error over windows" where
    a row has that error (``..._se_windows``), and the value alone where it has not."""
    q = pd.DataFrame(rows).sort_values(["bits_per_weight", "kld_mean"], ascending=[False, True])
    q = q.assign(change=q["perplexity_ratio"] - 1, change_se_windows=q.get("perplexity_ratio_se_windows"))

    def shown(key, digits, scale=1):
        if q.get(f"{key}_se_windows") is not None and q[f"{key}_se_windows"].notna().all():
            return with_errors(q[key], q[f"{key}_se_windows"], digits, scale)
        return [f"{scale * value:.{digits}f}" for value in q[key]]

    columns = {"bits per weight": ("bits_per_weight", 2), "file (MB)": ("file_bytes", 2, 1e-6),
               "perplexity": ("perplexity", 2), "change (%)": ("change", 2, 100), "KLD mean": ("kld_mean", 4),
               "KLD 99.9 %": ("kld_p999", 3), "RMS Δp (%)": ("delta_p_rms", 2, 100),
               "same top (%)": ("same_top", 1, 100)}  # fmt: skip
    return pd.DataFrame({title: shown(*column) for title, column in columns.items()},
                        index=[name + " + imatrix" * flag for name, flag in zip(q["type"], q["imatrix"], strict=True)])  # fmt: skip


CLUSTER = (3.55, 6.4), (0.009, 0.42)  # bits per weight and KLD between which the types lie too close for one picture


def quality_picture(data, title: str):
    """Figure of ``gguf_quality``: mean KLD against bits per weight, and the crowded part once more, enlarged; colour:
    the family, filled: with imatrix.  Bars: two standard errors over windows."""
    data = data[data["bits_per_weight"] < 9]  # 16-bit types would push the others together
    fig, axes = plots.figure(10.5, 5.8, ncols=2, gridspec_kw={"width_ratios": (1.15, 1)})
    (left, right), (low, high) = CLUSTER
    for ax in axes:
        for (kind, flag), d in data.groupby([data["type"].map(family), "imatrix"]):
            color, marker = plots.PALETTE[FAMILIES.index(kind)], plots.MARKERS[FAMILIES.index(kind)]
            ax.errorbar(d["bits_per_weight"], d["kld_mean"], yerr=2 * d["kld_mean_se_windows"], fmt=marker, ms=6,
                        color=color, mfc=color if flag else "white", capsize=2, lw=1,
                        label=kind + " + imatrix" * flag)  # fmt: skip
        ax.set(xlabel="bits per weight of the file", yscale="log")
    axes[0].set(title=title, ylabel="mean KL divergence (nats per token)",
                xlim=(data["bits_per_weight"].min() - 0.8, 9.4), ylim=(6e-4, 25))  # fmt: skip
    axes[1].set(title="The grey box, enlarged", xlim=CLUSTER[0], ylim=CLUSTER[1])
    axes[0].add_patch(Rectangle((left, low), right - left, high - low, facecolor="0.92", edgecolor="0.6", zorder=0))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    for name, d in data.sort_values("imatrix").groupby("type"):  # one label a type, at its last (filled) mark's height
        y, color = d["kld_mean"].iloc[-1], plots.PALETTE[FAMILIES.index(family(name))]
        ax = axes[int(left < d["bits_per_weight"].iloc[-1] < right and low < y < high)]
        leftward = (family(name) == FAMILIES[2] and name != "IQ4_NL") or name in ("Q4_K_S", "Q5_K_S", "Q1_0", "TQ1_0")
        above = {"TQ1_0": 7, "TQ2_0": 7, "IQ1_S": 1, "Q5_K_M": -6}.get(name, 0)
        x = d["bits_per_weight"].min() if leftward else d["bits_per_weight"].max()
        ax.annotate(name, (x, y), xytext=(-6 if leftward else 6, above), textcoords="offset points", fontsize=8,
                    color=color, ha="right" if leftward else "left",
                    va="center" if not above else "top" if above < 0 else "bottom")  # fmt: skip
    return fig


def answers_table(said: dict[str, str]) -> str:
    """HTML of the answers (the original's first): what the original said too in grey, the rest in bold."""
    original, rows = next(iter(said.values())), []
    for number, text in enumerate(said.values()):
        at = len(os.path.commonprefix([text, original])) if number else len(text)
        same, own = (html.escape(part).replace("\n", "↵ ") for part in (text[:at], text[at:]))  # keeps to its row
        note = "the original" if not number else "word for word" if text == original else f"{at} characters"
        rows.append({"same for": note, "answer (bold: from where it differs from the original)":
                     f"<span style='color:#767676'>{same}</span><b>{own}</b>"})  # fmt: skip
    table = pd.DataFrame(rows, index=[html.escape(name) for name in said])
    return table.style.set_properties(**{"text-align": "left", "white-space": "pre-wrap"}).to_html()


def explorer(models: dict, prompts, max_tokens: int = 24):
    """A widget: choose or write a prompt, and every model answers it.  ``models``: name -> an open
    :class:`qtutor.llamacpp.Model`, the original first; ``prompts``: those to choose from."""
    when_let_go = {"continuous_update": False}
    prompt = ipywidgets.Combobox(value=prompts[0], options=prompts, description="prompt", ensure_option=False,
                                 layout={"width": "95%"}, **when_let_go)  # fmt: skip
    settings = {
        "max_tokens": ipywidgets.IntSlider(max_tokens, 4, 64, 4, description="tokens", **when_let_go),
        "temperature": ipywidgets.FloatSlider(0, min=0, max=1.5, step=0.1, description="temperature",
                                              style={"description_width": "initial"}, **when_let_go),
        "seed": ipywidgets.BoundedIntText(0, 0, 999, description="seed", layout={"width": "160px"}),
    }  # fmt: skip

    def answer(**how):
        return answers_table({name: model.generate(**how) for name, model in models.items()}), None

    arranged = ipywidgets.VBox([prompt, ipywidgets.HBox(list(settings.values()))])
    return live_picture(answer, arranged, prompt=prompt, **settings)
