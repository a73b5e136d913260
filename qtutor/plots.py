"""Pictures: one theme, colours that everybody can tell apart, and the shapes that many notebooks draw.

A figure of this course has a title, units on its axes and a modest size.  The palette is seaborn's "colorblind"
(Wong, *Points of view: Color blindness*, Nature Methods 8, 2011, https://doi.org/10.1038/nmeth.1618); where it
matters, shape or line style repeats what the colour says.

    fig, ax = plots.figure(8, 4)
    plots.quality_vs_bits(ax, bits, kld, errors=se, labels=names)
    ax.set(title="Quality by type", ylabel="mean KL divergence (nats)")
"""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.text import Text
from matplotlib.ticker import LogLocator

PALETTE = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133",
           "#56b4e9"]  # fmt: skip
MARKERS = "osD^vP"
DPI = 90


def theme() -> None:
    """Make every figure from here on look the same: white grid, colour-blind palette, fonts readable at 90 dpi."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE, font_scale=0.9)
    plt.rcParams.update({
        "figure.dpi": DPI, "savefig.dpi": DPI, "figure.figsize": (8, 4), "lines.linewidth": 1.6, "grid.linewidth": 0.6,
        "axes.titlesize": 12, "axes.labelsize": 10.5, "axes.titlelocation": "left",
        "legend.fontsize": 9, "legend.frameon": True, "legend.framealpha": 0.9,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # ships inside matplotlib: the same picture on every machine
        "svg.hashsalt": "qtutor",
    })  # fmt: skip


def figure(width: float = 8, height: float = 4, ncols: int = 1, nrows: int = 1, **kw):
    """Return ``(fig, axes)`` as ``plt.subplots`` does, which gets ``kw``: sizes in inches, without overlaps."""
    return plt.subplots(nrows, ncols, figsize=(width, height), **{"layout": "constrained"} | kw)


def png(fig) -> bytes:
    """Return the figure as PNG bytes and close it: what ``ipywidgets.Image(value=...)`` wants."""
    buffer = io.BytesIO()  # no bbox_inches="tight" below: a widget's pictures keep their size, the page does not jump
    fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(fig)
    return buffer.getvalue()


def annotate(ax, xs, ys, labels, fontsize: float = 8.5, color="0.25") -> list:
    """Name the first points of a plot without one label covering another, or a point.  Returns the annotations.

    Each label takes the first place around its point (beside it, then further out with a thin line back) that is free
    of labels, points (the last may be unnamed, such as an error bar's) and the border.  Call it when limits are set.
    """
    figure = ax.figure
    figure.canvas.draw()  # constrained layout moves the axes when it draws: places are known only afterwards
    renderer, frame = figure.canvas.get_renderer(), ax.get_window_extent()
    points = ax.transData.transform(np.column_stack([np.asarray(xs, float), np.asarray(ys, float)]))
    taken, placed = [], []
    near = [(6, 0, "left", "center"), (-6, 0, "right", "center"), (0, 6, "center", "bottom"), (0, -6, "center", "top")]
    far = [(dx * reach, dy * reach, h, v) for reach in (12, 20, 30, 42, 56)
           for dx, dy, h, v in [(1, 1, "left", "bottom"), (1, -1, "left", "top"), (-1, 1, "right", "bottom"),
                                (-1, -1, "right", "top")]]  # fmt: skip
    for number, (x, y, label) in enumerate(zip(xs, ys, labels, strict=False)):
        best, least = None, np.inf
        for dx, dy, horizontal, vertical in near + far:
            line = {"arrowstyle": "-", "color": "0.6", "lw": 0.6} if abs(dx) + abs(dy) > 10 else None
            note = ax.annotate(label, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=fontsize,
                               color=color, ha=horizontal, va=vertical, arrowprops=line)  # fmt: skip
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(1)  # the text alone, without the line to the point
            hits = sum(box.overlaps(other) for other in taken)
            hits += sum(box.contains(*p) for i, p in enumerate(points) if i != number)
            hits += 3 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if hits < least:
                if best is not None:
                    best.remove()
                best, least, where = note, hits, box
            else:
                note.remove()
            if least == 0:
                break
        taken.append(where)
        placed.append(best)
    return placed


def quality_vs_bits(ax, bits, values, errors=None, labels=None, color=None, marker: str = "o", label=None):
    """Draw quality (lower is better) against bits per weight: one point with its error bar for each format.  ``labels``
    name the points, placed so that they do not cover each other; ``label`` names the series in the legend."""
    ax.errorbar(bits, values, yerr=errors, fmt=marker, color=color or PALETTE[0], ms=5, capsize=2.5, lw=1.2,
                label=label)  # fmt: skip
    ax.set_xlabel("bits per weight")
    ax.margins(x=0.1, y=0.08)
    if labels is not None:
        annotate(ax, bits, values, labels)
    return ax


def plain_ticks(axis, span: float = 10) -> None:
    """Ticks of a logarithmic axis (``ax.xaxis``) as people write numbers; ``span``: its largest value by its least.
    They stand at 1, 2 and 5 below two decades, at 1 and 3 below three, and at the powers of ten beyond."""
    if span < 1000:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1, 3)))
        axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_formatter("")


def histogram(ax, values, bins=100, label=None, color=None, log: bool = False, density: bool = True, **kw):
    """Draw the distribution of a tensor or array (any shape, finite values) as a filled histogram."""
    values = np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values).ravel()
    ax.hist(values, bins=bins, density=density, label=label, color=color, log=log, alpha=kw.pop("alpha", 0.65),
            histtype="stepfilled", **kw)  # fmt: skip
    ax.set_ylabel("density" if density else "count")
    return ax
