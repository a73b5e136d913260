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

MOST = 6  # series of one diagram, bars of one series, diagrams of one figure that are described one by one


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value or 0:.3g}"  # -0.0 is 0


def _span(values) -> str:
    values = np.ma.compressed(np.ma.masked_invalid(np.ma.asarray(values, float)))
    if not len(values):
        return "no values"
    low, high = _number(values.min()), _number(values.max())
    return low if low == high else f"{low} to {high}"


def _course(values) -> str:
    """A line's way: its first and last finite value, and its range where that says more."""
    values = np.ma.compressed(np.ma.masked_invalid(np.ma.asarray(values, float)))
    if not len(values) or values.min() == values.max():
        return _span(values)
    first, last = _number(values[0]), _number(values[-1])
    said = f"from {first} to {last}"
    return said if _span(values) in (f"{first} to {last}", f"{last} to {first}") else f"{said}, within {_span(values)}"


def _names(axis) -> list[str]:
    """The words at an axis's ticks; an empty list where they are numbers."""
    found = [label.get_text() for label in axis.get_ticklabels()]
    return found if any(name and name[0].isalpha() for name in found) else []


def _sizes(box) -> list[float]:
    return [float(bar.get_width() if box.orientation == "horizontal" else bar.get_height()) for bar in box.patches]


def _bars(box, ax) -> str:
    sizes, names = _sizes(box), _names(ax.yaxis if box.orientation == "horizontal" else ax.xaxis)
    if len(names) != len(sizes):
        return f"{len(sizes)} bars, {_span(sizes)}"
    named = [f"{name} {_number(size)}" for name, size in zip(names, sizes, strict=True) if np.isfinite(size)]
    if len(named) <= MOST:
        return ", ".join(named)
    low, high = int(np.nanargmin(sizes)), int(np.nanargmax(sizes))
    return f"{len(sizes)} bars, from {names[low]} {_number(sizes[low])} to {names[high]} {_number(sizes[high])}"


def _series(ax):
    """(label, words, values) for each series of a diagram: bars, points with errors, lines, points, maps.

    Where words stand at the y axis and none at the x axis, a series runs along x.
    """
    sideways = bool(_names(ax.yaxis)) and not _names(ax.xaxis)
    inside = {id(part) for c in ax.containers if isinstance(c, ErrorbarContainer) for part in (c[0], *c[1])}
    for box in ax.containers:
        if isinstance(box, BarContainer) and len(box.patches):
            yield box.get_label(), _bars(box, ax), _sizes(box)
        elif isinstance(box, ErrorbarContainer) and box[0] is not None:
            values = box[0].get_xdata() if sideways else box[0].get_ydata()
            yield box.get_label(), f"with error bars, {_course(values)}", values
    for line in ax.lines:
        x, y = (np.atleast_1d(np.ma.asarray(v, float)) for v in (line.get_xdata(), line.get_ydata()))
        if id(line) in inside or not len(y):
            continue
        if line.get_transform() == ax.transData:
            yield line.get_label(), _course(x if sideways else y), x if sideways else y
        else:  # axvline, axhline
            yield line.get_label(), f"a line at {_number(float((x if len(set(x.tolist())) == 1 else y)[0]))}", ()
    for part in [*ax.collections, *ax.images]:
        if isinstance(part, PathCollection) and len(part.get_offsets()):
            values = part.get_offsets()[:, 0 if sideways else 1]
            yield part.get_label(), f"{len(values)} points, {_span(values)}", values
        elif isinstance(part, QuadMesh) or part in ax.images:
            shape = " by ".join(map(str, np.shape(part.get_array())[:2]))
            yield part.get_label(), f"a map of {shape} values, {_span(part.get_array())}", ()


def _diagram(ax) -> str:
    """One diagram of a figure, in a sentence or two; "" where it has neither words nor data."""
    axes = [f"{name} axis: {axis.get_label_text()}{', logarithmic' if axis.get_scale() == 'log' else ''}"
            for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)) if axis.get_label_text()]  # fmt: skip
    said, unnamed, alone = [], [], []
    for label, words, values in _series(ax):
        if not str(label).startswith("_"):
            said.append(f"{label}: {words}")
        elif len(values):
            unnamed.append(values)
            alone.append(words)
        else:
            said.append(words)
    if unnamed:
        many = f"{len(unnamed)} series" if len(unnamed) > 1 else "one series"
        said.append(alone[0] if not said and len(unnamed) == 1 else
                    f"{many} without a name, {_span(np.ma.concatenate(unnamed))}")  # fmt: skip
    if not said:  # a picture made of words
        said = [", ".join(text.get_text() for text in ax.texts if text.get_text())[:300]]
    more = [f"{len(said) - MOST} more"] if len(said) > MOST else []
    return ". ".join(part for part in (ax.get_title("left") or ax.get_title(), "; ".join(axes),
                                       "; ".join([*said[:MOST], *more])) if part)  # fmt: skip


def describe(figure: Figure) -> str:
    """Return what a figure shows: its titles, axes and data, in one paragraph of plain text."""
    figure.canvas.draw()  # tick labels are known only afterwards
    diagrams = [_diagram(ax) for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    diagrams = [part for part in diagrams if part]
    more = [f"{len(diagrams) - MOST} more diagrams"] if len(diagrams) > MOST else []
    parts = [figure.get_suptitle(), *diagrams[:MOST], *more]
    return " ".join(". ".join(part for part in parts if part).replace("$", "").split()).rstrip(".") + "."


def attach(shell) -> None:
    """Let an IPython shell show every figure with its description; without a shell there is nothing to do."""
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
