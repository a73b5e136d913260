"""Which techniques are worth a look: Pareto fronts, and what error bars do to them.

One technique *dominates* another when it is at least as good on every axis and better on one.  What nobody dominates
is the *Pareto front*: the only candidates, whatever one's taste.  Measured values have errors, so a point can be on the
front by luck, and one beside it by bad luck.  With an interval for each value three answers are possible:

    front       no other point could dominate it, wherever the values lie within their intervals
    dominated   another point does, wherever they lie
    open        the measurement does not say

Intervals are two standard errors for quality, the 10th to the 90th percentile for speeds, and nothing for sizes, which
are counted.  Taking them as independent is cautious for quality: all techniques read the same text, so that their
differences are known better than their values (a paired test can close an open case).

    found = pareto.judge(rows, "size", "kld")
    fig = pareto.picture(rows, "size", "kld")
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import QtutorError

FAMILIES = {  # family -> (name, index in the palette, marker)
    "float": ("float", 7, "s"), "fp8": ("FP8", 1, "D"), "torchao": ("torchao", 2, "^"), "qat": ("QAT", 3, "*"),
    "gguf": ("GGUF (llama.cpp)", 0, "o"),
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """A column of the rows as an axis: ``better`` is "lower" or "higher"; ``error`` says where its interval is."""

    column: str
    label: str
    better: str
    error: str = "none"  # "se": column_se; "range": column_low and column_high
    log: bool = True

    def values(self, rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(value, low, high) of each row, float64 (n,); NaN where a row has no such value."""

        def column(name):
            return np.array([np.nan if row.get(name) is None else float(row[name]) for row in rows])

        value = column(self.column)
        if self.error == "se":
            se = np.nan_to_num(column(self._se))
            return value, value - 2 * se, value + 2 * se
        if self.error == "range":
            low, high = column(f"{self.column}_low"), column(f"{self.column}_high")
            return value, np.where(np.isnan(low), value, low), np.where(np.isnan(high), value, high)
        return value, value, value

    @property
    def _se(self) -> str:
        return self.column.replace("_mean", "") + "_se"


AXES = {
    "size": Axis("weights_mb", "stored weights (MB)", "lower"),
    "bits": Axis("bits_per_weight", "bits per weight", "lower", log=False),
    "memory": Axis("peak_gib", "peak memory (GiB)", "lower"),
    "kld": Axis("kld_mean", "mean KL divergence (nats per token)", "lower", "se"),
    "perplexity": Axis("perplexity", "perplexity", "lower", "se", log=False),
    "same top": Axis("same_top", "share of tokens with the same top candidate", "higher", "se", log=False),
    "accuracy": Axis("accuracy", "multiple-choice accuracy", "higher", "se", log=False),
    "prefill speed": Axis("prefill_tokens_per_s", "prefill (tokens per second, whole batch)", "higher", "range"),
    "decode speed": Axis("decode_tokens_per_s", "decoding (tokens per second, whole batch)", "higher", "range"),
    "prefill energy": Axis("joules_per_prefill_token", "prefill (joules per token)", "lower", "range"),
    "decode energy": Axis("joules_per_decode_token", "decoding (joules per token)", "lower", "range"),
    "prefill cost": Axis("usd_per_million_prefill_tokens", "US dollars per million prompt tokens", "lower", "range"),
    "decode cost": Axis("usd_per_million_decode_tokens", "US dollars per million generated tokens", "lower", "range"),
    "decode CO2e": Axis("co2e_grams_per_million_decode_tokens", "g CO2e per million generated tokens", "lower",
                        "range"),
}  # fmt: skip


def axis(name: str) -> Axis:
    """The axis of that name; raises QtutorError with the list of names."""
    if name not in AXES:
        raise QtutorError(f"There is no axis {name!r}: choose from {', '.join(AXES)}.")
    return AXES[name]


def _as_costs(values, better) -> np.ndarray:
    """(n, k) values with the sign turned where higher is better, so that lower is better everywhere."""
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if values.shape[1] != len(better) or set(better) - {"lower", "higher"}:
        raise QtutorError(f"There are {values.shape[1]} axes and better is {list(better)}: give 'lower' or 'higher' "
                          "for each.")  # fmt: skip
    if np.isnan(values).any():
        raise QtutorError("A point without a value cannot be compared: leave it out first.")
    return values * np.where(np.array(better) == "higher", -1.0, 1.0)


def front(points, better) -> np.ndarray:
    """Which points are on the Pareto front: bool (n,).

    Args:
        points: (n, k), one row a point, one column an axis; finite.
        better: "lower" or "higher" for each axis.

    Equal points do not dominate each other.  Raises QtutorError for axes that do not fit and for NaN.
    """
    costs = _as_costs(points, better)
    no_worse = (costs[:, None] <= costs[None]).all(-1)  # [a, b]: a is at least as good as b everywhere
    ahead = (costs[:, None] < costs[None]).any(-1)
    return ~(no_worse & ahead).any(0)


def verdicts(low, high, better) -> np.ndarray:
    """"front", "dominated" or "open" for each point with intervals ``low`` to ``high``, both (n, k): see the module."""
    first, second = _as_costs(low, better), _as_costs(high, better)
    best, worst = np.minimum(first, second), np.maximum(first, second)
    others = ~np.eye(len(best), dtype=bool)
    surely = (worst[:, None] <= best[None]).all(-1) & (worst[:, None] < best[None]).any(-1) & others
    perhaps = (best[:, None] <= worst[None]).all(-1) & (best[:, None] < worst[None]).any(-1) & others
    return np.where(surely.any(0), "dominated", np.where(perhaps.any(0), "open", "front"))


def judge(rows, *names: str) -> list[dict]:
    """Rows that have all these axes, with ``on_front`` (bool, by the values alone) and ``verdict`` (with intervals).

    One batch and one shape at a time: raises QtutorError for mixed ones, and where no row has all the axes.
    """
    axes = [axis(name) for name in names]
    columns = [a.values(rows) for a in axes]
    there = ~np.isnan(np.array([value for value, _, _ in columns])).any(0)
    kept = [row for row, use in zip(rows, there, strict=True) if use]
    if not kept:
        raise QtutorError(f"No row has {' and '.join(names)}: choose other axes, or measure them.")
    for key in ("shape", "batch"):
        if len({row.get(key) for row in kept}) > 1:
            raise QtutorError(f"These rows mix several values of {key!r}: compare one at a time.")
    better = [a.better for a in axes]
    value, low, high = (np.array([column[i][there] for column in columns]).T for i in range(3))
    on_front, verdict = front(value, better), verdicts(low, high, better)
    return [row | {"on_front": bool(f), "verdict": str(v)} for row, f, v in zip(kept, on_front, verdict, strict=True)]


def with_cost(rows, usd_per_hour: float, grams_per_kwh: float, pue: float = 1.0) -> list[dict]:
    """Rows with money and CO2e added, for a million tokens, from a price and a grid intensity.

    New columns: ``usd_per_million_{prefill,decode}_tokens`` and ``co2e_grams_per_million_{prefill,decode}_tokens``,
    with ``_low`` and ``_high`` from those of speed and energy.  The machine is paid for by the hour, so money follows
    time; CO2e follows the joules in the row, those of the device alone, times ``pue`` (power usage effectiveness).
    """
    from .. import energy

    def ratio(function, value, *how):
        return None if value is None else function(value, *how)

    found = []
    for row in rows:
        new = dict(row)
        for phase in ("prefill", "decode"):
            for end, opposite in (("", ""), ("_low", "_high"), ("_high", "_low")):
                speed = row.get(f"{phase}_tokens_per_s{opposite}")
                joules = row.get(f"joules_per_{phase}_token{end}")
                new[f"usd_per_million_{phase}_tokens{end}"] = ratio(energy.cost_per_million_tokens, speed, usd_per_hour)
                new[f"co2e_grams_per_million_{phase}_tokens{end}"] = ratio(
                    energy.co2e_grams_per_million_tokens, joules, grams_per_kwh, pue)  # fmt: skip
        found.append(new)
    return found


def meeting(rows, **limits) -> list[dict]:
    """The rows within all limits: ``max_size_mb=5``, ``min_decode_tokens_per_s=100``; None is no limit.

    A row without the value of a limit is left out.
    """
    for name, limit in limits.items():
        kind, _, column = name.partition("_")
        if kind not in ("min", "max") or not column:
            raise QtutorError(f"{name!r} is no limit: write max_ or min_ and a column, such as max_size_mb.")
        if limit is not None:
            rows = [row for row in rows if row.get(column) is not None
                    and (row[column] <= limit if kind == "max" else row[column] >= limit)]  # fmt: skip
    return list(rows)


FLOAT = {"pytorch": "BF16", "te": "BF16", "llama.cpp": "GGUF F16"}  # what each runtime runs without quantization


def relative(rows, column: str) -> list[dict]:
    """Each row's ``column`` over that of the 16-bit model in the same runtime, shape and batch.

    Rows get ``ratio`` with ``ratio_low`` and ``ratio_high``, the outermost that both intervals allow, and ``against``,
    the technique compared with.  Across runtimes a ratio would mix what the format does with what the program does;
    rows without the column or without their 16-bit model are left out.
    """
    def ends(row):
        value = row.get(column)
        low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
        return value, value if low is None else low, value if high is None else high

    base = {(row["runtime"], row["shape"], row["batch"]): row for row in rows
            if row["technique"] in FLOAT.values() and row.get(column)}  # fmt: skip
    found = []
    for row in rows:
        runtime = "pytorch" if row["runtime"] == "te" else row["runtime"]
        floating = base.get((runtime, row["shape"], row["batch"]))
        if row.get(column) and floating is not None:
            (value, low, high), (other, other_low, other_high) = ends(row), ends(floating)
            found.append(row | {"ratio": value / other, "ratio_low": low / other_high, "ratio_high": high / other_low,
                                "against": floating["technique"], "column": column})  # fmt: skip
    return found


def table(rows):
    """Size, quality, speed, energy and (after :func:`with_cost`) money of each row, readable, as a DataFrame."""
    import pandas

    def number(value, digits=3):
        return "-" if value is None else f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"

    def with_error(value, error, digits):
        return "-" if value is None else f"{value:.{digits}f}" + ("" if not error else f" ± {error:.{digits}f}")

    made = []
    for row in rows:
        kld = row.get("kld_mean")
        digits = 3 if kld is None or kld > 0.1 else 5 if kld < 0.01 else 4
        shown = {"technique": row["technique"], "batch": row["batch"], "bits/weight": number(row["bits_per_weight"]),
                 "MB": number(row["weights_mb"]),
                 "KLD (nats)": with_error(kld, row.get("kld_mean_se"), digits),
                 "perplexity": with_error(row.get("perplexity"), row.get("perplexity_se"), 2),
                 "accuracy": with_error(row.get("accuracy"), row.get("accuracy_se"), 3),
                 "prefill (tok/s)": number(row["prefill_tokens_per_s"]),
                 "decode (tok/s)": number(row["decode_tokens_per_s"]),
                 "decode (mJ/tok)": number(_thousand(row["joules_per_decode_token"]))}  # fmt: skip
        if "usd_per_million_decode_tokens" in row:
            shown |= {"$ per M": number(row["usd_per_million_decode_tokens"]),
                      "g CO2e per M": number(row["co2e_grams_per_million_decode_tokens"])}  # fmt: skip
        made.append(shown)
    frame = pandas.DataFrame(made).set_index("technique")
    return frame.drop(columns=[name for name in frame if (frame[name] == "-").all()])


def _thousand(value):
    return None if value is None else 1000 * value


# --------------------------------------------------------------------------------------------------------- pictures


def short(technique: str) -> str:
    """A technique's name as a label: the family is told by the marker."""
    return (technique.removeprefix("GGUF ").removeprefix("torchao ").replace("weight-only", "weights")
            .replace("FP8 (Transformer Engine)", "FP8 TE"))  # fmt: skip


def draw(ax, rows, x: str, y: str, labels: bool = True) -> list[dict]:
    """Draw rows on two axes with their intervals and the front; returns what :func:`judge` said.

    Filled: on the front for sure.  Half-tone: open.  Hollow: dominated for sure.
    """
    from matplotlib.patheffects import withStroke

    from .. import plots

    found = judge(rows, x, y)
    across, up = axis(x), axis(y)
    (xs, x_low, x_high), (ys, y_low, y_high) = across.values(found), up.values(found)
    for scale, ticks, a, values in ((ax.set_xscale, ax.xaxis, across, xs), (ax.set_yscale, ax.yaxis, up, ys)):
        if a.log and (values > 0).all():
            scale("log")
            plain_ticks(ticks, values.max() / values.min())
        elif a.log:  # the reference itself: a divergence of exactly zero
            scale("symlog", linthresh=max(1e-6, values[values > 0].min() / 2) if (values > 0).any() else 1)
    for row, *place in zip(found, xs, x_low, x_high, ys, y_low, y_high, strict=True):
        _point(ax, row, *place)
    order = sorted((xs[i], ys[i]) for i, row in enumerate(found) if row["on_front"])
    if len(order) > 1:
        ax.plot(*zip(*order, strict=True), color="0.35", lw=1.2, ls="--", zorder=1)
    ax.set(xlabel=f"{across.label}{_arrow(across, '←', '→')}", ylabel=f"{up.label}{_arrow(up, '↓', '↑')}")
    ax.margins(0.12)
    if labels:
        for note in plots.annotate(ax, xs, ys, [short(row["technique"]) for row in found]):
            note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable across an error bar
    return found


def plain_ticks(ticks, span: float) -> None:
    """Ticks of a logarithmic axis as people write numbers, at 1, 2 and 5 where it spans less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if span < 1000:
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1, 3)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ticks.set_minor_formatter(NullFormatter())


def _arrow(a: Axis, lower: str, higher: str) -> str:
    return f"  {lower if a.better == 'lower' else higher} better"


def _point(ax, row, x, x_low, x_high, y, y_low, y_high) -> None:
    from .. import plots

    _, index, marker = FAMILIES.get(row.get("family"), ("other", 5, "P"))
    color = plots.PALETTE[index]
    face = {"front": color, "open": "0.85", "dominated": "white"}[row["verdict"]]
    errors = {"xerr": [[max(0, x - x_low)], [max(0, x_high - x)]], "yerr": [[max(0, y - y_low)], [max(0, y_high - y)]]}
    ax.errorbar(x, y, **errors, fmt=marker, color=color, mfc=face, mec=color, mew=1.4, lw=1.1, capsize=2,
                ms=11 if marker == "*" else 7)  # fmt: skip


def legend(fig, rows) -> None:
    """One legend below the figure: families by marker and colour, verdicts by filling."""
    from matplotlib.lines import Line2D

    from .. import plots

    families = [f for f in FAMILIES if any(row.get("family") == f for row in rows)]
    entries = []
    for family in families:
        name, index, marker = FAMILIES[family]
        color = plots.PALETTE[index]
        entries.append(Line2D([], [], marker=marker, ls="", color=color, ms=8 if marker == "*" else 6, label=name))
    for face, name in (("0.2", "on the front"), ("0.85", "open"), ("white", "dominated")):
        entries.append(Line2D([], [], marker="o", ls="", mfc=face, mec="0.2", ms=6, label=name))
    entries.append(Line2D([], [], color="0.35", lw=1.2, ls="--", label="front by the values alone"))
    fig.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)


def picture(rows, x: str = "size", y: str = "kld", title: str | None = None, width: float = 8.5, height: float = 4.8):
    """Figure of one pair of axes, with names, intervals, front and legend."""
    from .. import plots

    fig, ax = plots.figure(width, height)
    if title:
        ax.set_title(title)
    legend(fig, draw(ax, rows, x, y))
    return fig


def relative_picture(series: dict[str, list[dict]], label: str, title: str | None = None, width: float = 8.5):
    """Figure: a line for each technique, a marker for each of ``series`` (name -> rows of :func:`relative`).

    Right of 1 is more than the 16-bit model of the same runtime, left of it less; bars are the intervals.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from .. import plots

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
    ax.set(xlabel=label, ylim=(-0.6, len(names) - 0.4))
    if title:
        ax.set_title(title)
    fig.legend(loc="outside lower center", ncols=len(series), frameon=False)
    return fig


def explorer(rows, device: str = ""):
    """Widget: choose axes, batch and limits, and see what is left of the Pareto front.

    ``rows``: of one machine and one shape, those of :func:`tradeoff.measured`, with :func:`with_cost` if cost is to be
    among the axes.
    """
    import ipywidgets

    from .. import plots
    from ..figures import live

    usable = [name for name in AXES if not np.isnan(AXES[name].values(rows)[0]).all()]
    if len(usable) < 2:
        raise QtutorError("These rows have no two columns to set against each other: measure them first.")
    style = {"description_width": "110px"}

    def dropdown(label, options, value):
        return ipywidgets.Dropdown(options=options, value=value, description=label, style=style,
                                   layout=ipywidgets.Layout(width="280px"))  # fmt: skip

    batches = sorted({row["batch"] for row in rows})
    x = dropdown("across", usable, usable[0])
    y = dropdown("up", usable, "kld" if "kld" in usable else usable[1])
    batch = dropdown("batch", batches, batches[0])
    limits = {
        "max_size_mb": dropdown("size at most", _steps(rows, "weights_mb", "MB"), 0),
        "max_kld_mean": dropdown("KLD at most", _steps(rows, "kld_mean", "nats"), 0),
        "min_decode_tokens_per_s": dropdown("decode at least", _steps(rows, "decode_tokens_per_s", "tok/s"), 0),
    }
    image, words = live.image_widget(), ipywidgets.HTML()

    def show(_=None):
        chosen = [row for row in rows if row["batch"] == batch.value]
        chosen = meeting(chosen, **{name: control.value or None for name, control in limits.items()})
        if x.value == y.value:
            words.value = "Choose two different axes."
            return
        try:
            fig, ax = plots.figure(8.5, 4.4)
            ax.set_title(f"{device + ', ' if device else ''}batch {batch.value}")
            found = draw(ax, chosen, x.value, y.value)
            legend(fig, found)
        except QtutorError:
            plots.png(fig)  # closes it
            words.value = "<b>Nothing meets these limits.</b> Loosen one of them."
            return
        image.value = plots.png(fig)
        names = [row["technique"] + (" (open)" if row["verdict"] == "open" else "") for row in found if row["on_front"]]
        words.value = f"<b>{len(found)}</b> techniques meet the limits; on the front: " + ", ".join(names) + "."

    for control in (x, y, batch, *limits.values()):
        control.observe(show, names="value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox([x, y, batch]), ipywidgets.HBox(list(limits.values())), words, image])


def _steps(rows, column: str, unit: str, count: int = 6) -> list[tuple]:
    """Options of a limit: none (0), and a few values between the smallest and the largest of the rows."""
    values = [row[column] for row in rows if row.get(column)]
    if not values:
        return [("no limit", 0)]
    steps = np.geomspace(min(values), max(values), count)[1:-1]
    rounded = dict.fromkeys(float(f"{step:.2g}") for step in steps)
    return [("no limit", 0), *((f"{value:g} {unit}", value) for value in rounded)]
