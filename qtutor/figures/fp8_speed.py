"""Pictures of what FP8 buys: products, layers, whole models, and where FP8 begins to pay.

Each takes recorded rows as a DataFrame (:meth:`qtutor.results.Results.frame`) and returns the figure.
"""

from __future__ import annotations

import itertools
import re

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm

from .. import plots
from .live import live_picture

_FORMATS = {"over ": "{:.2f}x", "more than|change of time|change, ±": "{:+.1%}", "share|^of peak": "{:.0%}",
            "tokens/s|million|W$|MHz": "{:,.0f}", "1,000 tokens": "{:.1f}"}  # fmt: skip
PRODUCTS = {"BF16 product": 0, "BF16 product of zeros": 9, "FP8 product, split accumulation": 3, "FP8 product": 1}
KINDS = {"matrix products": 0, "attention": 4, "norms and activations": 2, "quantization": 3, "optimizer": 5,
         "other": 7, "idle": 8}  # fmt: skip


def provenance(recorded):
    """A table of recordings (Results): what, where, when."""
    versions = ("torch", "transformer_engine")
    rows = [{"results": run.name, "rows": len(run.rows), "device": run.device, "recorded": run.created[:10]}
            | {name: run.versions.get(name) for name in versions} | {"note": run.migrated or ""}
            for run in recorded]  # fmt: skip
    return pd.DataFrame(rows).style.hide(axis="index")


def styled(table, **digits: int):
    """A table for display: ratios with an x, shares in per cent, the rest with 2 ``digits`` unless a unit says so."""
    formats = {}
    for name in table.select_dtypes("number"):
        unit = name.split(", ")[-1] if ", " in name else name
        known = (form for words, form in _FORMATS.items() if re.search(words, name))
        formats[name] = next(known, f"{{:,.{digits.get(name.split(',')[0], digits.get(unit, 2))}f}}")
    return table.style.format(formats, na_rep="not run")


def ladder_table(rows):
    """Each rung of ``fp8_layers`` against the rung before and against BF16; ± is a 95 % interval: of a median by its
    single steps, of joules by the counter's resolution."""
    t, before = rows.copy(), rows.groupby("shape")["ms_per_step"].shift()
    columns = {"ms": t["ms_per_step"], "ms, ±": _error(t) * t["ms_per_step"],
               "over the rung before": before.fillna(t["ms_per_step"]) / t["ms_per_step"]}  # fmt: skip
    for name in ("HF BF16", "TE BF16"):
        base = t[t["rung"] == name.replace("HF", "Hugging Face")].set_index("shape")["ms_per_step"]
        columns[f"over {name}"] = t["shape"].map(base) / t["ms_per_step"]
    columns |= {"of peak": t["share_of_peak"], "J": t["joules_per_step"],
                "J, ±": (t["joules_per_step_high"] - t["joules_per_step_low"]) / 2}  # fmt: skip
    return pd.DataFrame(columns).set_index(pd.MultiIndex.from_frame(t[["shape", "rung"]]))


def _error(rows):
    """Half of the 95 % interval of each median, as a share: of so many steps with so much spread."""
    return 1.96 * 1.25 * (rows["ms_p90"] - rows["ms_p10"]) / 2.56 / np.sqrt(rows["repeats"]) / rows["ms_per_step"]


def branch_table(rows, branches: dict, drift: float):
    """Rungs that change an earlier one in another direction: {name: (that rung, ...)}.  Undecided is what lies within
    the intervals of the two medians and ``drift`` (a share), by which one rung differed from itself."""
    found = []
    for (name, (base, *_)), (shape, part) in itertools.product(branches.items(), rows.groupby("shape", sort=False)):
        pair = part.set_index("rung").reindex([name, base])
        change = pair["ms_per_step"].iloc[0] / pair["ms_per_step"].iloc[1] - 1
        half = float(np.hypot(*_error(pair))) + drift
        found.append({"variant": name, "of": base, "shape": shape, "change of time": change, "change, ±": half,
                      "verdict": "undecided" if abs(change) <= half else "slower" if change > 0 else "faster",
                      "change of peak, GiB": pair["peak_gib"].iloc[0] - pair["peak_gib"].iloc[1]})  # fmt: skip
    return pd.DataFrame(found).set_index("variant")


def model_table(rows):
    """Whole training steps (``fp8_model``, ``fp8_finetune``): throughput, ratios, energy, memory."""
    t = rows.reindex(columns=[*rows, *{"not_run", "joules_per_step"} - set(rows)])
    columns = {"trained weights, million": t["trained_weights"] / 1e6, "ms": t["ms_per_step"],
               "tokens/s": t["train_tokens_per_s"]}  # fmt: skip
    for name, rung in (("HF BF16", "Hugging Face BF16"), ("TE BF16", "TE BF16")):
        if rung in set(t["rung"]):
            base = t[t["rung"] == rung].set_index("shape")["ms_per_step"]
            columns[f"over {name}"] = t["shape"].map(base) / t["ms_per_step"]
    columns |= {"J a 1,000 tokens": 1000 * t["joules_per_step"] / t["tokens"], "peak GiB": t["peak_gib"]}
    return pd.DataFrame(columns).set_index(pd.MultiIndex.from_frame(t[["shape", "rung"]]))


def product_rates(rates, data_sheet: dict[str, float]):
    """TFLOP/s of one product by size (rows) and operands (columns), beside the data sheet's peaks."""
    fig, axis = plots.figure(8.5, 3.6)
    for i, (kind, color) in enumerate(PRODUCTS.items()):
        bars = axis.bar(np.arange(len(rates)) + (i - 1.5) * 0.2, rates[kind], 0.19, label=kind, edgecolor="white",
                        hatch="//" if "zeros" in kind else None, color=plots.PALETTE[color])  # fmt: skip
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    for name, peak in data_sheet.items():
        axis.axhline(peak, color="0.4", ls="--", lw=1)
        axis.annotate(f"data sheet, {name}", (len(rates) - 0.5, peak), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8.5)  # fmt: skip
    axis.set_xticks(range(len(rates)), rates.index)
    axis.set(title="One product: what the tensor cores reach", xlabel="tokens x outputs x inputs", ylabel="TFLOP/s",
             ylim=(0, 1.08 * max(data_sheet.values())), xlim=(-0.5, len(rates) - 0.5))  # fmt: skip
    axis.legend(loc="upper left", bbox_to_anchor=(1, 0.88), fontsize=8)
    axis.grid(False, axis="x")
    return fig


def step_times(rows, title: str):
    """Milliseconds a step by rung, a panel a shape; the labels are speedups over the first rung of each shape."""
    shapes = list(dict.fromkeys(rows["shape"]))
    names = list(dict.fromkeys(rows["rung"]))
    fig, axes = plots.figure(8.5, 1.3 + 0.27 * len(names), ncols=len(shapes), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        part = rows[rows["shape"] == shape].set_index("rung")["ms_per_step"].reindex(names)
        colors = [plots.PALETTE[int("FP8" in name)] for name in names]
        bars = axis.barh(range(len(names)), part.fillna(0), color=colors)  # a bar of NaN would have no label
        axis.bar_label(bars, ["not run" if ms != ms else f"{part.iloc[0] / ms:.2f}x" for ms in part], padding=2,
                       fontsize=8.5)  # fmt: skip
        axis.set_yticks(range(len(names)), names, fontsize=8.5)
        axis.set(title=f"{shape} shape", xlabel="ms a step", xlim=(0, 1.2 * part.max()))
        axis.grid(False, axis="y")
    axes[0][0].invert_yaxis()
    fig.suptitle(f"{title}; labels: speedup over the first row", fontsize=10.5)
    return fig


def time_by_kind(spent):
    """Milliseconds of a step by kind of kernel (columns, as in KINDS); the index is (panel, row of the panel)."""
    panels = list(dict.fromkeys(spent.index.get_level_values(0)))
    fig, axes = plots.figure(8.5, 3.3, ncols=len(panels), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        part, left = spent.loc[panel], 0.0
        for kind, color in KINDS.items():
            axis.barh(range(len(part)), part[kind], left=left, color=plots.PALETTE[color], label=kind,
                      edgecolor="white", lw=0.5)  # fmt: skip
            left = left + part[kind]
        axis.set_yticks(range(len(part)), [name.replace(" + ", "\n+ ") for name in part.index], fontsize=8)
        axis.set(title=panel, xlabel="ms a step", ylim=(len(part) - 0.4, -0.6))
        axis.grid(False, axis="y")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), fontsize=8)
    return fig


def memory_by_layers(rows):
    """Peak memory of a training step over the number of layers, a line a rung."""
    fig, axis = plots.figure(7, 3.6)
    for (rung, part), marker in zip(rows.groupby("rung", sort=False), plots.MARKERS, strict=False):
        axis.plot(part["layers"], part["peak_gib"], marker=marker, ms=6, label=rung,
                  color=None if "FP8" in rung else "black")  # fmt: skip
    axis.set(title="Peak memory of a training step, by number of layers", xlabel="decoder layers", ylabel="peak (GiB)",
             xticks=sorted(set(rows["layers"])), ylim=(0, None), xlim=(0, None))  # fmt: skip
    axis.legend(fontsize=8)
    return fig


def breakeven_maps(rows):
    """The recorded speedups by hidden size and tokens, launched from Python and from a CUDA graph."""
    fig, axes = plots.figure(8.5, 3.6, ncols=2, sharey=True)
    for axis, graph in zip(axes, (False, True), strict=True):
        grid = rows[rows["graph"] == graph].pivot(index="hidden", columns="tokens", values="speedup").sort_index()
        image = axis.imshow(grid, origin="lower", aspect="auto", cmap="PuOr", norm=TwoSlopeNorm(1, 0.5, 2))
        for (i, j), value in np.ndenumerate(grid.to_numpy()):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5,
                      weight="bold" if value >= 1 else None,
                      color="white" if value > 1.5 or value < 0.62 else "black")  # fmt: skip
        axis.set_xticks(range(grid.shape[1]), [f"{t // 1024}k" if t >= 1024 else t for t in grid.columns])
        axis.set_yticks(range(grid.shape[0]), grid.index)
        axis.set(title="CUDA graph: the GPU's own time" if graph else "Eager: launched from Python",
                 xlabel="tokens in a batch")  # fmt: skip
        axis.grid(False)
    axes[0].set_ylabel("hidden size")
    fig.colorbar(image, ax=axes, label="BF16 time / FP8 time", ticks=[0.5, 0.75, 1, 1.5, 2])
    return fig


def breakeven_speedup(rows, hidden: float, tokens: float, graph: bool, column: str = "speedup") -> float:
    """Read the recorded map between its points: linear in the logarithms; beyond its edge, the value at the edge.

    ``rows``: DataFrame of ``fp8_breakeven`` on a full grid of hidden and tokens; ``graph``: replayed from a CUDA graph,
    or launched from Python; ``column``: which figure, all of them positive.
    """
    grid = np.log(rows[rows["graph"] == graph].pivot(index="hidden", columns="tokens", values=column))
    line = [np.interp(np.log2(tokens), np.log2(grid.columns), row) for row in grid.to_numpy()]
    return float(np.exp(np.interp(np.log2(hidden), np.log2(grid.index), line)))


def breakeven_picture(rows, hidden: int = 4096, tokens: int = 4096, graph: bool = False):
    """Figure: the recorded map with the reader's size marked, and the times of a layer over tokens at that size."""
    fig, (left, right) = plots.figure(8.5, 3.5, ncols=2, width_ratios=(1.25, 1))
    y, x = np.sort(rows["hidden"].unique()), np.sort(rows["tokens"].unique())
    fine_y, fine_x = np.geomspace(y[0], y[-1], 41), np.geomspace(x[0], x[-1], 49)
    surface = np.array([[breakeven_speedup(rows, h, t, graph) for t in fine_x] for h in fine_y])
    image = left.pcolormesh(fine_x, fine_y, surface, cmap="PuOr", norm=TwoSlopeNorm(1, 0.5, 2), shading="gouraud")
    left.contour(fine_x, fine_y, surface, levels=[1], colors="black", linewidths=1.6)
    left.plot([tokens], [hidden], "o", ms=11, mfc="none", mec="black", mew=2.5)
    left.set(title="CUDA graph" if graph else "Eager", xlabel="tokens in a batch", ylabel="hidden size")
    left.grid(False)
    fig.colorbar(image, ax=left, label="BF16 time / FP8 time", ticks=[0.5, 0.75, 1, 1.5, 2])
    for column, name, style in (("ms_bf16", "BF16", "-"), ("ms_fp8", "FP8", "--")):
        times = [breakeven_speedup(rows, hidden, t, graph, column) for t in fine_x]
        right.plot(fine_x, times, style, color=plots.PALETTE[0 if name == "BF16" else 1], label=name)
        right.plot([tokens], [breakeven_speedup(rows, hidden, tokens, graph, column)], "o", color="black", ms=5)
    right.set(title=f"One layer, hidden {hidden:,}", xlabel="tokens in a batch", ylabel="ms, forward + backward",
              yscale="log")  # fmt: skip
    right.legend()
    for axis, ticks in ((left, x), (right, x[::2])):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else f"{t}" for t in ticks])
    left.set_yscale("log", base=2)
    left.set_yticks(y, [f"{h}" for h in y])
    left.minorticks_off()
    plots.plain_ticks(right.yaxis)
    return fig


def breakeven_explorer(recorded):
    """Choose hidden size, tokens and CUDA graph; see where that lies on the map ``recorded`` (Results)."""
    rows = recorded.frame()

    def slider(label, sizes, value):
        return ipywidgets.SelectionSlider(options=sizes, value=value, description=label,
                                          style={"description_width": "90px"})  # fmt: skip

    def draw(**at):
        gain, bf16, fp8 = (breakeven_speedup(rows, **at, column=c) for c in ("speedup", "ms_bf16", "ms_fp8"))
        verdict = "FP8 pays" if gain >= 1.1 else "about even" if gain > 0.95 else "FP8 is slower"
        return (f"<b>{verdict}</b>: {gain:.2f}x; a layer takes about {bf16:.2f} ms in BF16 and {fp8:.2f} ms in FP8 "
                f"(delayed scaling). Recorded on an {recorded.device}, {recorded.created[:10]}; interpolated.",
                breakeven_picture(rows, **at))  # fmt: skip

    hidden = slider("hidden size", (512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192), 4096)
    tokens = slider("tokens", [2**i for i in range(8, 15)], 2048)
    graph = ipywidgets.Checkbox(description="CUDA graph", indent=False)
    return live_picture(draw, hidden=hidden, tokens=tokens, graph=graph)
