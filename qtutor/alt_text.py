"""What a figure shows, in words and numbers: the text for readers who do not see the picture.

:func:`describe` reads a finished figure: titles, axes, and of each series its first and last value and its range.  All
numbers are the figure's own data.  :func:`attach` adds the text to every figure that a notebook shows, where HTML and
slides made from the notebook find it: ``metadata["image/png"]["alt"]`` of the output.
"""

from __future__ import annotations

import numpy as np
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

MOST = 6  # series of one diagram, and bars of one series, that are named


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _span(values) -> str:
    values = np.ma.compressed(np.ma.masked_invalid(np.ma.asarray(values, float)))
    if not len(values):
        return "no values"
    low, high = _number(values.min()), _number(values.max())
    return low if low == high else f"{low} to {high}"


def _series(ax):
    """(label, words) for each series of a diagram: lines, points, bars, maps."""
    inside = {id(part) for c in ax.containers if isinstance(c, ErrorbarContainer) for part in (c[0], *c[1])}
    for box in ax.containers:
        if isinstance(box, BarContainer) and len(box.patches):
            upright = box.orientation != "horizontal"
            sizes = [bar.get_height() if upright else bar.get_width() for bar in box.patches]
            ticks = [text.get_text() for text in (ax.get_xticklabels() if upright else ax.get_yticklabels())]
            named = len(sizes) <= MOST and len(ticks) == len(sizes)
            said = ", ".join(f"{t} {_number(s)}" for t, s in zip(ticks, sizes, strict=True)) if named else _span(sizes)
            yield box.get_label(), f"{len(sizes)} bars, {said}"
        elif isinstance(box, ErrorbarContainer) and box[0] is not None:
            yield box.get_label(), f"{len(box[0].get_ydata())} points with error bars, {_span(box[0].get_ydata())}"
    for line in ax.lines:
        x, y = (np.atleast_1d(np.ma.asarray(v, float)) for v in (line.get_xdata(), line.get_ydata()))
        if id(line) in inside or not len(y):
            continue
        if line.get_transform() != ax.transData:  # axvline, axhline
            upright = len(set(x.tolist())) == 1
            yield line.get_label(), f"a line at {_number(float((x if upright else y)[0]))}"
        else:
            yield line.get_label(), f"from {_number(float(y[0]))} to {_number(float(y[-1]))}, within {_span(y)}"
    for part in [*ax.collections, *ax.images]:
        if isinstance(part, PathCollection) and len(part.get_offsets()):
            yield part.get_label(), f"{len(part.get_offsets())} points, {_span(part.get_offsets()[:, 1])}"
        elif isinstance(part, QuadMesh) or part in ax.images:
            shape = " x ".join(map(str, np.shape(part.get_array())[:2]))
            yield part.get_label(), f"a map of {shape} values, {_span(part.get_array())}"


def _diagram(ax) -> str:
    """One diagram of a figure, as a sentence or two; "" where it has neither words nor data."""
    axes = [f"{name}: {axis.get_label_text()}{' (logarithmic)' if axis.get_scale() == 'log' else ''}"
            for name, axis in (("across", ax.xaxis), ("up", ax.yaxis)) if axis.get_label_text()]  # fmt: skip
    said = [f"{'' if str(label).startswith('_') else f'{label}: '}{words}" for label, words in _series(ax)]
    more = [f"and {len(said) - MOST} more"] if len(said) > MOST else []
    title = " ".join((ax.get_title("left") or ax.get_title()).split())
    parts = [title, "; ".join(axes), "; ".join([*said[:MOST], *more])]
    return ". ".join(part.rstrip(".") for part in parts if part)


def describe(figure: Figure) -> str:
    """Return what a figure shows: its titles, axes and data, in one paragraph of plain text."""
    figure.canvas.draw()  # tick labels are known only afterwards
    above = " ".join(figure.get_suptitle().split())
    found = [_diagram(ax) for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    return ". ".join(dict.fromkeys(part for part in [above, *found] if part)).replace("$", "") + "."


def attach(shell) -> None:
    """Let an IPython shell show every figure with its description; without a shell, or without inline figures, nothing."""
    if shell is None or "image/png" not in shell.display_formatter.formatters:
        return
    try:
        from matplotlib_inline import backend_inline  # noqa: F401  (its first import sets the formatter that we wrap)
    except ImportError:
        return
    formatter = shell.display_formatter.formatters["image/png"]
    shown = formatter.type_printers.get(Figure)
    if shown is None or getattr(shown, "describes", False):
        return

    def with_words(figure):
        drawn = shown(figure)
        data, metadata = drawn if isinstance(drawn, tuple) else (drawn, {})
        return data, {**(metadata or {}), "alt": describe(figure)}

    with_words.describes = True
    formatter.for_type(Figure, with_words)
