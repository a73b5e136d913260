"""The pictures of the trade-off: two axes with intervals and the Pareto front, ratios to 16 bits, and an explorer."""

from __future__ import annotations

import numpy as np

from .. import QtutorError, plots
from ..decide.pareto import AXES, judge
from ..decide.techniques import FAMILIES
from . import live

LOOKS = {"float": (7, "s"), "fp8": (1, "D"), "torchao": (2, "^"), "qat": (3, "*"), "gguf": (0, "o")}  # colour, marker
LIMITS = (("weights_mb", "size", "MB", False), ("kld_mean", "KLD", "nats", False),
          ("decode_tokens_per_s", "decode", "tok/s", True))  # fmt: skip


def _short(technique: str) -> str:
    """A technique's name as a label: the family is told by the marker."""
    return (technique.removeprefix("GGUF ").removeprefix("torchao ").replace("weight-only", "weights")
            .replace("FP8 (Transformer Engine)", "FP8 TE"))  # fmt: skip


def draw(ax, rows, x: str, y: str, labels: bool = True) -> list[dict]:
    """Draw rows on two axes with their intervals and the front; returns what :func:`qtutor.decide.pareto.judge` said.

    Filled: on the front for sure.  Half-tone: open.  Hollow: dominated for sure.
    """
    from matplotlib.patheffects import withStroke

    found = judge(rows, x, y)
    across, up = AXES[x], AXES[y]
    (xs, x_low, x_high), (ys, y_low, y_high) = across.values(found), up.values(found)
    for scale, ticks, a, values in ((ax.set_xscale, ax.xaxis, across, xs), (ax.set_yscale, ax.yaxis, up, ys)):
        if a.log and (values > 0).all():
            scale("log")
            plain_ticks(ticks, values.max() / values.min())
        elif a.log:  # the reference itself: a divergence of exactly zero
            scale("symlog", linthresh=max(1e-6, values[values > 0].min() / 2) if (values > 0).any() else 1)
    x_bars = np.maximum([xs - x_low, x_high - xs], 0)
    y_bars = np.maximum([ys - y_low, y_high - ys], 0)
    for i, row in enumerate(found):
        index, marker = LOOKS[row["family"]]
        color = plots.PALETTE[index]
        face = {"front": color, "open": "0.85", "dominated": "white"}[row["verdict"]]
        ax.errorbar(xs[i], ys[i], xerr=x_bars[:, [i]], yerr=y_bars[:, [i]], fmt=marker, color=color, mec=color,
                    mfc=face, mew=1.4, lw=1.1, capsize=2, ms=11 if marker == "*" else 7)  # fmt: skip
    order = sorted((xs[i], ys[i]) for i, row in enumerate(found) if row["on_front"])
    if len(order) > 1:
        ax.plot(*zip(*order, strict=True), color="0.35", lw=1.2, ls="--", zorder=1)
    arrows = {across: "←→", up: "↓↑"}
    labels_of = [f"{a.label}  {arrows[a][a.better == 'higher']} better" for a in (across, up)]
    ax.set(xlabel=labels_of[0], ylabel=labels_of[1])
    ax.margins(0.12)
    if labels:
        for note in plots.annotate(ax, xs, ys, [_short(row["technique"]) for row in found]):
            note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable across an error bar
    return found


def plain_ticks(ticks, span: float) -> None:
    """Ticks of a logarithmic axis as people write numbers, at 1, 2 and 5 where it spans less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if span < 1000:
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1, 3)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ticks.set_minor_formatter(NullFormatter())


def legend(fig, rows) -> None:
    """One legend below the figure: families by marker and colour, verdicts by filling."""
    from matplotlib.lines import Line2D

    def entry(label, **look):
        return Line2D([], [], label=label, **{"ls": "", "marker": "o", "ms": 6} | look)

    entries = []
    for family in dict.fromkeys(row["family"] for row in rows):
        index, marker = LOOKS[family]
        entries.append(entry(FAMILIES[family], marker=marker, color=plots.PALETTE[index], ms=8 if marker == "*" else 6))
    entries += [entry(name, mfc=face, mec="0.2") for face, name in (
        ("0.2", "on the front"), ("0.85", "open"), ("white", "dominated"))]  # fmt: skip
    entries.append(entry("front by the values alone", marker="", color="0.35", lw=1.2, ls="--"))
    fig.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)


def _judged_picture(rows, x, y, title, width, height):
    fig, ax = plots.figure(width, height)
    ax.set_title(title or "")
    found = draw(ax, rows, x, y)
    legend(fig, found)
    return fig, found


def picture(rows, x: str = "size", y: str = "kld", title: str | None = None, width: float = 8.5, height: float = 4.8):
    """Figure of one pair of axes, with names, intervals, front and legend."""
    return _judged_picture(rows, x, y, title, width, height)[0]


def relative_picture(series: dict[str, list[dict]], label: str, title: str | None = None, width: float = 8.5):
    """Figure: a line for each technique, a marker for each of ``series`` (name -> rows of ``pareto.relative``).

    Right of 1 is more than the 16-bit model of the same runtime, left of it less; bars are the intervals.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = list(dict.fromkeys(row["technique"] for part in series.values() for row in part
                               if row["technique"] != row["against"]))  # fmt: skip
    fig, ax = plots.figure(width, 1.6 + 0.3 * len(names))
    off = np.linspace(0.22, -0.22, len(series)) if len(series) > 1 else [0.0]
    for number, (name, part) in enumerate(series.items()):
        part = [row for row in part if row["technique"] in names]
        at = [len(names) - 1 - names.index(row["technique"]) + off[number] for row in part]
        ratio, low, high = (np.array([row[key] for row in part]) for key in ("ratio", "ratio_low", "ratio_high"))
        ax.errorbar(ratio, at, xerr=[np.maximum(ratio - low, 0), np.maximum(high - ratio, 0)], fmt="osD^v"[number % 5],
                    color=plots.PALETTE[number], ms=5, lw=1.1, capsize=2, label=name)  # fmt: skip
    ax.axvline(1, color="0.3", lw=1)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(names)), names[::-1])
    ax.set(xlabel=label, ylim=(-0.6, len(names) - 0.4), title=title or "")
    fig.legend(loc="outside lower center", ncols=len(series), frameon=False)
    return fig


def explorer(rows, device: str = ""):
    """Widget: choose axes, batch and limits, and see what is left of the Pareto front.

    ``rows``: of one machine and one shape, those of :func:`qtutor.decide.pareto.measured`, after ``with_cost`` if cost
    is to be among the axes.
    """
    import ipywidgets

    usable = [name for name in AXES if not np.isnan(AXES[name].values(rows)[0]).all()]

    def dropdown(label, options, value):
        return ipywidgets.Dropdown(options=options, value=value, description=label, layout={"width": "280px"},
                                   style={"description_width": "110px"})  # fmt: skip

    x, y = dropdown("across", usable, usable[0]), dropdown("up", usable, "kld" if "kld" in usable else usable[1])
    batches = sorted({row["batch"] for row in rows})
    batch = dropdown("batch", batches, batches[0])
    limits = {column: dropdown(f"{label} {'at least' if least else 'at most'}", _steps(rows, column, unit), 0)
              for column, label, unit, least in LIMITS}  # fmt: skip
    image, words = live.image_widget(), ipywidgets.HTML()

    def show(_=None):
        chosen = [row for row in rows if row["batch"] == batch.value]
        for column, _, _, least in LIMITS:
            if limit := limits[column].value:
                chosen = [row for row in chosen if row.get(column) is not None
                          and (row[column] >= limit if least else row[column] <= limit)]  # fmt: skip
        if x.value == y.value:
            words.value = "Choose two different axes."
            return
        try:
            judge(chosen, x.value, y.value)
        except QtutorError:
            words.value = "<b>Nothing meets these limits.</b> Loosen one of them."
            return
        title = f"{device + ', ' if device else ''}batch {batch.value}"
        fig, found = _judged_picture(chosen, x.value, y.value, title, 8.5, 4.4)
        image.value = plots.png(fig)
        names = [row["technique"] + (" (open)" if row["verdict"] == "open" else "") for row in found if row["on_front"]]
        words.value = f"<b>{len(found)}</b> techniques meet the limits; on the front: " + ", ".join(names) + "."

    for control in (x, y, batch, *limits.values()):
        control.observe(show, names="value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox([x, y, batch]), ipywidgets.HBox(list(limits.values())), words, image])


def _steps(rows, column: str, unit: str, count: int = 6) -> list[tuple]:
    """Options of a limit: none (0), and a few values between the smallest and the largest of the rows."""
    values = [row[column] for row in rows if row.get(column)] or [1.0]
    rounded = dict.fromkeys(float(f"{step:.2g}") for step in np.geomspace(min(values), max(values), count)[1:-1])
    return [("no limit", 0), *((f"{value:g} {unit}", value) for value in rounded)]
