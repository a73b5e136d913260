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
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from .. import QtutorError
from .cost import co2e_grams_per_million_tokens, cost_per_million_tokens
from .techniques import FLOAT


@dataclass(frozen=True)
class Axis:
    """A column of the rows as an axis: ``better`` is "lower" or "higher"; ``error`` says where its interval is."""

    column: str
    label: str
    better: str
    error: str = "range"  # from column_low to column_high, where there are any; "se": two of column_se either way
    log: bool = True

    def values(self, rows) -> np.ndarray:
        """(value, low, high) of each row, float64 (3, n); NaN where a row has no such value."""
        names = [self.column, f"{self.column}_se", f"{self.column}_low", f"{self.column}_high"]
        value, se, low, high = np.array([[row.get(name) for row in rows] for name in names], dtype=float)  # None: NaN
        if self.error == "se":
            low, high = value - 2 * se, value + 2 * se
        return np.array([value, *(np.where(np.isnan(end), value, end) for end in (low, high))])


AXES = {
    "size": Axis("weights_mb", "stored weights (MB)", "lower"),
    "bits": Axis("bits_per_weight", "bits per weight", "lower", log=False),
    "memory": Axis("peak_gib", "peak memory (GiB)", "lower"),
    "kld": Axis("kld_mean", "mean KL divergence (nats per token)", "lower", "se"),
    "perplexity": Axis("perplexity", "perplexity", "lower", "se", log=False),
    "same top": Axis("same_top", "share of tokens with the same top candidate", "higher", "se", log=False),
    "accuracy": Axis("accuracy", "multiple-choice accuracy", "higher", "se", log=False),
    "prefill speed": Axis("prefill_tokens_per_s", "prefill (tokens per second, whole batch)", "higher"),
    "decode speed": Axis("decode_tokens_per_s", "decoding (tokens per second, whole batch)", "higher"),
    "prefill energy": Axis("joules_per_prefill_token", "prefill (joules per token)", "lower"),
    "decode energy": Axis("joules_per_decode_token", "decoding (joules per token)", "lower"),
    "prefill cost": Axis("usd_per_million_prefill_tokens", "US dollars per million prompt tokens", "lower"),
    "decode cost": Axis("usd_per_million_decode_tokens", "US dollars per million generated tokens", "lower"),
    "decode CO2e": Axis("co2e_grams_per_million_decode_tokens", "g CO2e per million new tokens", "lower"),
}  # fmt: skip


def verdicts(best, worst) -> np.ndarray:
    """ "front", "dominated" or "open" for points whose intervals end at ``best`` and ``worst`` (n, axes), as costs."""
    others = ~np.eye(len(best), dtype=bool)
    surely = (worst[:, None] <= best[None]).all(-1) & (worst[:, None] < best[None]).any(-1) & others
    perhaps = (best[:, None] <= worst[None]).all(-1) & (best[:, None] < worst[None]).any(-1) & others
    return np.where(surely.any(0), "dominated", np.where(perhaps.any(0), "open", "front"))


def judge(rows, *names: str) -> list[dict]:
    """Rows that have all AXES of ``names``, with ``on_front`` (by values alone) and ``verdict`` (with intervals)."""
    axes = [AXES[name] for name in names]
    columns = np.array([a.values(rows) * (1 if a.better == "lower" else -1) for a in axes])  # (axes, 3, n), as costs
    there = ~np.isnan(columns[:, 0]).any(0)
    kept = [row for row, use in zip(rows, there, strict=True) if use]
    if not kept:
        raise QtutorError(f"No row has {' and '.join(names)}: choose other axes, or measure them.")
    if len({(row.get("shape"), row.get("batch")) for row in kept}) > 1:
        raise QtutorError("These rows mix several values of shape or batch: compare one at a time.")
    value, low, high = columns[:, :, there].transpose(1, 2, 0)
    on_front, verdict = verdicts(value, value) == "front", verdicts(np.minimum(low, high), np.maximum(low, high))
    return [row | {"on_front": bool(on_front[i]), "verdict": str(verdict[i])} for i, row in enumerate(kept)]


def measured(rows) -> list[dict]:
    """The rows with numbers (``not_run`` is None), as dicts; ``rows``: dicts, or a results file with ``.rows``."""
    return [row for row in getattr(rows, "rows", rows) if row.get("not_run") is None]


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

    Rows get ``ratio``, its outermost ends ``ratio_low`` and ``ratio_high``, and ``against``, the technique compared
    with.  Across runtimes a ratio would mix what the format does with what the program does.
    """
    base = {(row["technique"], row["shape"], row["batch"]): row for row in rows if row.get(column)}
    found = []
    for row in filter(lambda row: row.get(column), rows):
        if other := base.get((FLOAT[row["runtime"]], row["shape"], row["batch"])):
            (value, low, high), (value16, low16, high16) = (
                [one.get(f"{column}{end}") or one[column] for end in ("", "_low", "_high")] for one in (row, other))
            found.append(row | {"ratio": value / value16, "ratio_low": low / high16, "ratio_high": high / low16,
                                "against": other["technique"]})  # fmt: skip
    return found


def table(rows):
    """Size, quality, speed, energy and (after :func:`with_cost`) money of each row, readable, as a DataFrame."""
    import pandas

    def cell(row, column, digits=None, times=1):
        value, error = row.get(column), row.get(f"{column}_se")
        if value is None:
            return "-"
        if digits is None:
            return f"{times * value:,.3g}" if abs(times * value) < 1000 else f"{times * value:,.0f}"
        return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")

    frame = pandas.DataFrame([{
        "technique": row["technique"], "batch": row["batch"],
        "bits/weight": cell(row, "bits_per_weight"), "MB": cell(row, "weights_mb"),
        "KLD (nats)": cell(row, "kld_mean", 5 if (row.get("kld_mean") or 0) < 0.01 else 4),
        "perplexity": cell(row, "perplexity", 2), "accuracy": cell(row, "accuracy", 3),
        "prefill (tok/s)": cell(row, "prefill_tokens_per_s"), "decode (tok/s)": cell(row, "decode_tokens_per_s"),
        "decode (mJ/tok)": cell(row, "joules_per_decode_token", times=1000),
        "$ per M": cell(row, "usd_per_million_decode_tokens"),
        "g CO2e per M": cell(row, "co2e_grams_per_million_decode_tokens"),
    } for row in rows]).set_index("technique")  # fmt: skip
    return frame.loc[:, (frame != "-").any()]
