"""Which techniques are worth a look: what counts as a difference, and the Pareto fronts that follow from it.

:func:`difference` is the one rule, for fronts, README and the guide.  A value is larger than another when its interval
lies above the other's *and* it is larger by more than a tolerance, below which nobody would choose by it.  Two values
are the same when no two numbers of their intervals are further apart than that.  The rest is undecided, as is whatever
was recorded without an interval.

One technique *dominates* another when it is worse on no axis and better on one.  What nobody dominates is the *Pareto
front*: the only candidates, whatever one's taste.  With three answers to each difference there are three verdicts:

    front       no other point could dominate it, whatever the undecided differences are
    dominated   another point does
    open        another point does if an undecided difference falls that way: measure again

Intervals are two standard errors for quality, the 10th to the 90th percentile for speeds, and nothing for sizes, which
are counted.  Taking them as independent is cautious for quality: all techniques read the same text, so that their
differences are known better than their values (a paired test can close an open case).

    difference((266, 263, 268), (237, 233, 238), 0.05)       # 1.0: larger
    judge(rows, "size", "kld")                               # a front
    judge(rows, "decode speed")                              # one axis: what is not dominated may be the fastest
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from .. import QtutorError
from .cost import co2e_grams_per_million_tokens, cost_per_million_tokens
from .techniques import FLOAT


@dataclass(frozen=True)
class Axis:
    """A column of the rows as an axis: ``better`` is "lower" or "higher", ``error`` says where its interval is, and
    ``tolerance`` is the relative difference that does not matter."""

    column: str
    label: str
    better: str
    error: str = "range"  # from column_low to column_high; "se": two of column_se either way; "none": counted
    log: bool = True
    tolerance: float = 0.05

    def values(self, rows) -> np.ndarray:
        """(value, low, high) of each row, float64 (3, n); NaN where a row has no such value, or no interval."""
        names = [self.column, f"{self.column}_se", f"{self.column}_low", f"{self.column}_high"]
        value, se, low, high = np.array([[row.get(name) for row in rows] for name in names], dtype=float)  # None: NaN
        if self.error == "se":
            low, high = value - 2 * se, value + 2 * se
        return np.array([value, value, value] if self.error == "none" else [value, low, high])


AXES = {
    "size": Axis("weights_mb", "stored weights (MB)", "lower", "none", tolerance=0.01),
    "bits": Axis("bits_per_weight", "bits per weight", "lower", "none", False, 0.01),
    "memory": Axis("peak_gib", "peak memory (GiB)", "lower", "none"),
    "kld": Axis("kld_mean", "mean KL divergence (nats per token)", "lower", "se"),
    "perplexity": Axis("perplexity", "perplexity", "lower", "se", False, 0.005),
    "same top": Axis("same_top", "share of tokens with the same top candidate", "higher", "se", False, 0.005),
    "accuracy": Axis("accuracy", "multiple-choice accuracy", "higher", "se", False, 0.02),
    "prefill speed": Axis("prefill_tokens_per_s", "prefill (tokens per second, whole batch)", "higher"),
    "first token": Axis("time_to_first_token_ms", "time to first token (ms)", "lower"),
    "decode speed": Axis("decode_tokens_per_s", "decoding (tokens per second, whole batch)", "higher"),
    "prefill energy": Axis("joules_per_prefill_token", "prefill (joules per token)", "lower"),
    "decode energy": Axis("joules_per_decode_token", "decoding (joules per token)", "lower"),
    "prefill cost": Axis("usd_per_million_prefill_tokens", "US dollars per million prompt tokens", "lower"),
    "decode cost": Axis("usd_per_million_decode_tokens", "US dollars per million generated tokens", "lower"),
    "decode CO2e": Axis("co2e_grams_per_million_decode_tokens", "g CO2e per million new tokens", "lower"),
}  # fmt: skip
#: the same in all rows that are compared -> on axes whose column has this word in it
CONDITIONS = {"shape": "", "batch": "", "prefill_tokens": "prefill|first", "decode_context": "decode"}


def difference(a, b, tolerance: float = 0.05) -> np.ndarray:
    """Is ``a`` larger than ``b``?  1: yes; -1: it is smaller; 0: they are the same; NaN: not decided.

    ``a`` and ``b`` are (value, low, high), numbers or arrays that broadcast; ``tolerance`` is a share of the smaller
    value.  NaN for low and high: no interval is known, and nothing is decided.
    """
    (a, a_low, a_high), (b, b_low, b_high) = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    larger = (a_low > b_high) & (a > (1 + tolerance) * b)
    smaller = (a_high < b_low) & (b > (1 + tolerance) * a)
    most, least = np.maximum(a_high, b_high), np.minimum(a_low, b_low)
    same = (most <= (1 + tolerance) * least) | (most == least)
    return np.select([larger, smaller, same], [1.0, -1.0, 0.0], np.nan)


def verdicts(values, axes) -> np.ndarray:
    """ "front", "dominated" or "open" for n points: ``values`` (axes, 3, n) of value, low, high on ``axes``."""
    signs = [1 if axis.better == "higher" else -1 for axis in axes]
    gains = np.array([sign * difference(one[:, :, None], one[:, None, :], axis.tolerance)
                      for sign, one, axis in zip(signs, values, axes, strict=True)])  # fmt: skip
    others = ~np.eye(gains.shape[-1], dtype=bool)  # [axis, a, b]: 1 where a is better than b, NaN: perhaps
    surely = (gains >= 0).all(0) & (gains > 0).any(0) & others
    perhaps = ~(gains < 0).any(0) & ((gains > 0) | np.isnan(gains)).any(0) & others
    return np.where(surely.any(0), "dominated", np.where(perhaps.any(0), "open", "front"))


def judge(rows, *names: str) -> list[dict]:
    """Rows that have all AXES of ``names``, with ``on_front`` (by values alone) and ``verdict`` (by differences).
    Raises QtutorError where no row has them, or where the rows differ in CONDITIONS."""
    axes = [AXES[name] for name in names]
    values = np.array([axis.values(rows) for axis in axes])
    there = ~np.isnan(values[:, 0]).any(0)
    kept = [row for row, use in zip(rows, there, strict=True) if use]
    if not kept:
        raise QtutorError(f"No row has {' and '.join(names)}: choose other axes, or measure them.")
    for key, word in CONDITIONS.items():
        compared = any(re.search(word, axis.column) for axis in axes)
        if compared and len({row.get(key) for row in kept} - {None}) > 1:
            raise QtutorError(f"These rows mix several values of {key}: compare one at a time.")
    values = values[:, :, there]
    alone = verdicts(values[:, [0, 0, 0]], [replace(axis, tolerance=0.0) for axis in axes])
    return [row | {"on_front": bool(plain == "front"), "verdict": str(verdict)}
            for row, plain, verdict in zip(kept, alone, verdicts(values, axes), strict=True)]  # fmt: skip


def leaders(rows, name: str) -> list[str]:
    """Techniques that no other one beats on the axis ``name``, the best value first: several where the measurement
    does not tell them apart.  ``rows``: of one shape, batch and length; those without the value are left out."""
    found = [row for row in judge(rows, name) if row["verdict"] != "dominated"]
    sign = 1 if AXES[name].better == "lower" else -1
    return [row["technique"] for row in sorted(found, key=lambda row: sign * row[AXES[name].column])]


def measured(rows) -> list[dict]:
    """The rows with numbers (``not_run`` is None), as dicts; ``rows``: dicts, or a results file with ``.rows``.

    At batch 1 they get ``time_to_first_token_ms``, of a prompt of ``prefill_tokens`` that waits for nobody.
    """
    found = [dict(row) for row in getattr(rows, "rows", rows) if row.get("not_run") is None]
    for row, (end, opposite) in product(found, (("", ""), ("_low", "_high"), ("_high", "_low"))):
        speed = row.get(f"prefill_tokens_per_s{opposite}")
        if row["batch"] == 1 and speed and row.get("prefill_tokens"):
            row.setdefault(f"time_to_first_token_ms{end}", 1000 * row["prefill_tokens"] / speed)
    return found


def left_out(rows) -> dict[str, str]:
    """What did not run, and why: {"technique (shape)": sentence}."""
    missing = [row for row in getattr(rows, "rows", rows) if row.get("not_run") is not None]
    return {f"{row['technique']} ({row['shape']})": row["not_run"] for row in missing}


def with_cost(rows, usd_per_hour: float, grams_per_kwh: float, pue: float = 1.0) -> list[dict]:
    """Rows with money and CO2e added, for a million tokens, from a price and a grid intensity.

    ``usd_per_million_{prefill,decode}_tokens`` and ``co2e_grams_per_million_{prefill,decode}_tokens``, with ``_low``
    and ``_high`` from those of speed and energy.  The machine is paid for by the hour, so money follows time; CO2e
    follows the joules in the row, those of the device alone, times ``pue`` (power usage effectiveness).
    """
    found = [dict(row) for row in rows]
    for row, phase in product(found, ("prefill", "decode")):
        for end, opposite in (("", ""), ("_low", "_high"), ("_high", "_low")):  # faster is cheaper
            speed, joules = row.get(f"{phase}_tokens_per_s{opposite}"), row.get(f"joules_per_{phase}_token{end}")
            usd = speed and cost_per_million_tokens(speed, usd_per_hour)
            grams = joules and co2e_grams_per_million_tokens(joules, grams_per_kwh, pue)
            row |= {f"usd_per_million_{phase}_tokens{end}": usd, f"co2e_grams_per_million_{phase}_tokens{end}": grams}
    return found


def relative(rows, column: str) -> list[dict]:
    """Each row's ``column`` over that of the 16-bit model in the same runtime, shape and batch.

    Rows get ``ratio``, its outermost ends ``ratio_low`` and ``ratio_high``, ``differs`` (:func:`difference` of the two)
    and ``against``, the technique compared with, unless they name one.  Across runtimes a ratio would mix what the
    format does with what the program does.
    """
    (axis,) = [axis for axis in AXES.values() if axis.column == column]
    base = {(row["technique"], row["shape"], row["batch"]): row for row in rows if row.get(column)}
    found = []
    for row in filter(lambda row: row.get(column), rows):
        name = row.get("against") or FLOAT[row["runtime"]] + ", compiled" * row["technique"].endswith(", compiled")
        if other := base.get((name, row["shape"], row["batch"])):
            mine, theirs = axis.values([row, other]).T
            ratio, low, high = mine / theirs[[0, 2, 1]]
            found.append(row | {"ratio": ratio, "ratio_low": low, "ratio_high": high, "against": other["technique"],
                                "differs": float(difference(mine, theirs, axis.tolerance))})  # fmt: skip
    return found


#: what :func:`table` shows: an axis, its heading, and whether the number depends on the batch
TABLE = (("size", "MB", False), ("bits", "bits/weight", False), ("kld", "KLD (nats)", False),
         ("accuracy", "accuracy", False), ("first token", "first token (ms)", False),
         ("prefill speed", "prefill (tok/s)", False), ("decode speed", "decode (tok/s)", True),
         ("decode energy", "J/token", True), ("decode cost", "USD per M", True),
         ("decode CO2e", "g CO2e per M", True))  # fmt: skip


def table(rows):
    """One line a technique, as a DataFrame: size, quality, the prompt at batch 1, and decoding, energy and (after
    :func:`with_cost`) money by batch.  Each cell has its interval, "266 (263 to 268)"; where it has none, none was
    recorded, or it was counted."""
    import pandas

    def shown(x):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:#.3g}".rstrip(".")

    def cell(row, axis):
        value, low, high = axis.values([row])[:, 0]
        if np.isnan(value):
            return "-"
        return shown(value) + (f" ({shown(low)} to {shown(high)})" if low < high else "")

    lines, batches = {}, sorted({row["batch"] for row in rows})
    for row in rows:
        line = lines.setdefault(row["technique"], {})
        if lengths := [str(row[key]) for key in list(CONDITIONS)[2:] if row.get(key)]:
            line.setdefault("prompt / cache", " / ".join(lengths))
        for name, heading, by_batch in TABLE:
            if by_batch or row["batch"] == batches[0]:
                line[heading + (f", batch {row['batch']}" if by_batch else "")] = cell(row, AXES[name])
    order = ["prompt / cache"] + [heading + (f", batch {batch}" if by_batch else "") for _, heading, by_batch in TABLE
                                  for batch in (batches if by_batch else [0])]  # fmt: skip
    frame = pandas.DataFrame.from_dict(lines, orient="index").reindex(columns=order).astype(object).fillna("-")
    return frame.loc[:, (frame != "-").any()].rename_axis("technique")
