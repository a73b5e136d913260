"""The pictures of the trade-off: two axes with intervals and the Pareto front, ratios to 16 bits, and an explorer."""

from __future__ import annotations

import ipywidgets
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from .. import QtutorError, plots
from ..decide.pareto import AXES, judge
from ..decide.techniques import FAMILIES
from .live import dropdown, live_picture

LOOKS = {"float": (7, "s"), "fp8": (1, "D"), "torchao": (2, "^"), "qat": (3, "*"), "gguf": (0, "o")}  # colour, marker
FILLINGS = {"front": {}, "open": {"fillstyle": "bottom", "mfcalt": "white"}, "dominated": {"mfc": "white"}}
LIMITS = (("weights_mb", "size", "MB", False), ("kld_mean", "KLD", "nats", False),
          ("decode_tokens_per_s", "decode", "tok/s", True))  # fmt: skip


def _short(technique: str) -> str:
    """A technique's name as a label: the family is told by the marker."""
    return (technique.removeprefix("GGUF ").removeprefix("torchao ").replace("weight-only", "weights")
            .replace("FP8 (Transformer Engine)", "FP8 TE"))  # fmt: skip


def draw(ax, rows, x: str, y: str) -> list[dict]:
    """Draw rows on two axes with their intervals and the front; returns what :func:`qtutor.decide.pareto.judge` said.
    Filled: on the front for sure.  Half filled: open.  Hollow: dominated for sure."""
    found = judge(rows, x, y)
    across, up = AXES[x], AXES[y]
    (xs, x_low, x_high), (ys, y_low, y_high) = across.values(found), up.values(found)
    for scale, ticks, a, values in ((ax.set_xscale, ax.xaxis, across, xs), (ax.set_yscale, ax.yaxis, up, ys)):
        if a.log and (values > 0).all():
            scale("log")
            plots.plain_ticks(ticks, values.max() / values.min())
        elif a.log:  # the reference itself: a divergence of exactly zero
            scale("symlog", linthresh=max(1e-6, values[values > 0].min() / 2) if (values > 0).any() else 1)
    x_bars = np.maximum([xs - x_low, x_high - xs], 0)
    y_bars = np.maximum([ys - y_low, y_high - ys], 0)
    for i, row in enumerate(found):
        index, marker = LOOKS[row["family"]]
        color = plots.PALETTE[index]
        ax.errorbar(xs[i], ys[i], xerr=x_bars[:, [i]], yerr=y_bars[:, [i]], fmt=marker, color=color, mec=color,
                    mew=1.1, lw=1.1, capsize=2, ms=10 if marker == "*" else 7, **FILLINGS[row["verdict"]])  # fmt: skip
    order = sorted((xs[i], ys[i]) for i, row in enumerate(found) if row["on_front"])
    if len(order) > 1:
        ax.plot(*zip(*order, strict=True), color="0.35", lw=1.2, ls="--", zorder=1)
    arrows = {across: "←→", up: "↓↑"}
    labels_of = [f"{a.label}  {arrows[a][a.better == 'higher']} better" for a in (across, up)]
    ax.set(xlabel=labels_of[0], ylabel=labels_of[1])
    ax.margins(0.12)
    bars = [np.linspace(ends[0], ends[1], 20) for ends in ((x_low, x_high), (y_low, y_high))]  # no label across one
    keep_free = [np.r_[xs, bars[0].ravel(), np.tile(xs, 20)], np.r_[ys, np.tile(ys, 20), bars[1].ravel()]]
    for note in plots.annotate(ax, *keep_free, [_short(row["technique"]) for row in found]):
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable across an error bar
    return found


def legend(fig, rows) -> None:
    """One legend below the figure: families by marker and colour, verdicts by filling."""

    def entry(label, marker="o", color="0.2", **look):
        return Line2D([], [], label=label, **{"ls": "", "marker": marker, "color": color, "ms": 6} | look)

    entries = []
    for family in dict.fromkeys(row["family"] for row in rows):
        index, marker = LOOKS[family]
        entries.append(entry(FAMILIES[family], marker, plots.PALETTE[index], ms=8 if marker == "*" else 6))
    entries += [entry(name.replace("front", "on the front"), **look) for name, look in FILLINGS.items()]
    entries.append(entry("front by the values alone", "", "0.35", lw=1.2, ls="--"))
    fig.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)


def picture(rows, x: str = "size", y: str = "kld", title: str = "", width: float = 8.5, height: float = 4.8):
    """Figure of one pair of axes, with names, intervals, front and legend."""
    fig, ax = plots.figure(width, height)
    ax.set_title(title)
    legend(fig, draw(ax, rows, x, y))
    return fig


def relative_picture(series: dict[str, list[dict]], label: str, title: str = "", width: float = 8.5):
    """Figure: a line for each technique, a marker for each of ``series`` (name -> rows of ``pareto.relative``).  Right
    of 1 is more than the 16-bit model of the same runtime, left of it less; bars are the intervals."""
    names = list(dict.fromkeys(row["technique"] for part in series.values() for row in part
                               if row["technique"] != row["against"]))[::-1]  # fmt: skip
    fig, ax = plots.figure(width, 1.6 + 0.3 * len(names))
    offsets = np.linspace(0.22, -0.22, len(series)) if len(series) > 1 else [0.0]
    for number, (offset, (name, part)) in enumerate(zip(offsets, series.items(), strict=True)):
        part = [row for row in part if row["technique"] in names]
        at = [names.index(row["technique"]) + offset for row in part]
        ratio, low, high = (np.array([row[key] for row in part]) for key in ("ratio", "ratio_low", "ratio_high"))
        ax.errorbar(ratio, at, xerr=np.maximum([ratio - low, high - ratio], 0), fmt=plots.MARKERS[number % 5],
                    color=plots.PALETTE[number], ms=5, lw=1.1, capsize=2, label=name)  # fmt: skip
    ax.axvline(1, color="0.3", lw=1)
    ax.set(xscale="log", xlabel=label, ylim=(-0.6, len(names) - 0.4), title=title)
    plots.plain_ticks(ax.xaxis)
    ax.set_yticks(range(len(names)), names)
    fig.legend(loc="outside lower center", ncols=len(series), frameon=False)
    return fig


def losses_picture(losses: list[tuple], title: str, width: float = 9):
    """Figure: what each type costs each model.  ``losses``: (model, weights, type, quality.Known, measured here),
    models by size from left to right; hollow: measured here on other text than the published.  The line joins models
    of one family, whose names agree up to the last hyphen."""
    models = sorted({(weights, model) for model, weights, *_ in losses})
    place, types = {model: i for i, (_, model) in enumerate(models)}, list(dict.fromkeys(one[2] for one in losses))
    fig, ax = plots.figure(width, 4.6)
    for number, kind in enumerate(types):
        look, families = {"color": plots.PALETTE[number], "marker": plots.MARKERS[number % 5]}, {}
        for model, _, _, known, here in sorted((one for one in losses if one[2] == kind), key=lambda one: one[1]):
            x, y = place[model] + 0.06 * (number - (len(types) - 1) / 2), 100 * known.mid
            ends = [[y - max(100 * known.low, y / 10)], [100 * known.high - y]]
            ax.errorbar(x, y, yerr=ends, mfc="white" if here else None, ms=6, capsize=2, **look)
            families.setdefault(model.rsplit("-", 1)[0], []).append((x, y))
        for line in families.values():
            ax.plot(*zip(*line, strict=True), lw=1.2, color=look["color"])
        ax.plot([], [], ls="", label=kind, **look)
    sizes = [f"{weights / 1e9:.3g} B" if weights >= 1e9 else f"{weights / 1e6:.3g} M" for weights, _ in models]
    ax.set_xticks(range(len(models)), [f"{model}\n{size}" for (_, model), size in zip(models, sizes, strict=True)])
    ax.set(yscale="log", ylabel="perplexity lost (%)", title=title)
    plots.plain_ticks(ax.yaxis, 100)
    fig.legend(loc="outside right center", frameon=False)
    return fig


def explorer(rows, device: str):
    """Widget: choose axes, batch and limits, and see what is left of the Pareto front.  ``rows``: of one machine and
    one shape, those of :func:`qtutor.decide.pareto.measured`, after ``with_cost`` if cost is to be among the axes."""
    usable = [name for name in AXES if not np.isnan(AXES[name].values(rows)[0]).all()]
    batches = sorted({row["batch"] for row in rows})
    chosen = {"x": dropdown("across", usable, usable[0]),
              "y": dropdown("up", usable, "kld" if "kld" in usable else usable[1]),
              "batch": dropdown("batch", batches, batches[0])}  # fmt: skip
    limits = {column: dropdown(f"{label} {'at least' if least else 'at most'}", _steps(rows, column, unit), 0)
              for column, label, unit, least in LIMITS}  # fmt: skip

    def show(x, y, batch, **limits):
        kept = [row for row in rows if row["batch"] == batch]
        for column, _, _, least in LIMITS:
            if limit := limits[column]:
                kept = [row for row in kept if row.get(column) is not None
                        and (row[column] >= limit if least else row[column] <= limit)]  # fmt: skip
        if x == y:
            return "Choose two different axes.", None
        try:
            found = judge(kept, x, y)
        except QtutorError:
            return "<b>Nothing meets these limits.</b> Loosen one of them.", None
        names = [row["technique"] + " (open)" * (row["verdict"] == "open") for row in found if row["on_front"]]
        return (f"<b>{len(found)}</b> techniques meet the limits; on the front: {', '.join(names)}.",
                picture(kept, x, y, f"{device}, batch {batch}", height=4.4))  # fmt: skip

    arranged = ipywidgets.VBox([ipywidgets.HBox(list(part.values())) for part in (chosen, limits)])
    return live_picture(show, arranged, **chosen, **limits)


def _steps(rows, column: str, unit: str, count: int = 6) -> list[tuple]:
    """Options of a limit: none (0), and a few values between the smallest and the largest of the rows."""
    values = [row[column] for row in rows if row.get(column)] or [1.0]
    rounded = dict.fromkeys(float(f"{step:.2g}") for step in np.geomspace(min(values), max(values), count)[1:-1])
    return [("no limit", 0), *((f"{value:g} {unit}", value) for value in rounded)]
