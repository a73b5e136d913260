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
    error: str = "none"  # "se": two of column_se either way; "range": column_low to column_high
    log: bool = True

    def values(self, rows) -> np.ndarray:
        """(value, low, high) of each row, float64 (3, n); NaN where a row has no such value."""

        def column(name, missing):
            return np.where([row.get(name) is None for row in rows], missing, [row.get(name) or 0.0 for row in rows])

        value = column(self.column, np.nan)
        if self.error == "se":
            se = column(f"{self.column}_se", 0.0)
            return np.array([value, value - 2 * se, value + 2 * se])
        return np.array([value, column(f"{self.column}_low", value), column(f"{self.column}_high", value)])


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


def verdicts(best, worst) -> np.ndarray:
    """ "front", "dominated" or "open" for each point (n,): see the module.

    ``best`` and ``worst`` (n, axes) are the ends of each point's intervals, as costs: lower is better.
    """
    others = ~np.eye(len(best), dtype=bool)
    surely = (worst[:, None] <= best[None]).all(-1) & (worst[:, None] < best[None]).any(-1) & others
    perhaps = (best[:, None] <= worst[None]).all(-1) & (best[:, None] < worst[None]).any(-1) & others
    return np.where(surely.any(0), "dominated", np.where(perhaps.any(0), "open", "front"))


def judge(rows, *names: str) -> list[dict]:
    """Rows that have all these axes, with ``on_front`` (bool, by the values alone) and ``verdict`` (with intervals).

    ``names`` are those of :data:`AXES`.  One batch and one shape at a time: raises QtutorError for mixed ones, and
    where no row has all the axes.
    """
    axes = [AXES[name] for name in names]
    columns = np.array([a.values(rows) * (1 if a.better == "lower" else -1) for a in axes])  # (axes, 3, n), as costs
    there = ~np.isnan(columns[:, 0]).any(0)
    kept = [row for row, use in zip(rows, there, strict=True) if use]
    if not kept:
        raise QtutorError(f"No row has {' and '.join(names)}: choose other axes, or measure them.")
    for key in ("shape", "batch"):
        if len({row.get(key) for row in kept}) > 1:
            raise QtutorError(f"These rows mix several values of {key!r}: compare one at a time.")
    value, low, high = columns[:, :, there].transpose(1, 2, 0)
    by_value, verdict = verdicts(value, value), verdicts(np.minimum(low, high), np.maximum(low, high))
    return [row | {"on_front": bool(v == "front"), "verdict": str(w)}
            for row, v, w in zip(kept, by_value, verdict, strict=True)]  # fmt: skip


def measured(rows) -> list[dict]:
    """The rows with numbers (``not_run`` is None), as dicts; ``rows``: dicts, or a results file with ``.rows``."""
    return [row for row in getattr(rows, "rows", rows) if row.get("not_run") is None]


def left_out(rows) -> dict[str, str]:
    """What did not run, and why: {"technique (shape)": sentence}."""
    return {f"{row['technique']} ({row['shape']})": row["not_run"] for row in getattr(rows, "rows", rows)
            if row.get("not_run") is not None}  # fmt: skip


def with_cost(rows, usd_per_hour: float, grams_per_kwh: float, pue: float = 1.0) -> list[dict]:
    """Rows with money and CO2e added, for a million tokens, from a price and a grid intensity.

    New columns: ``usd_per_million_{prefill,decode}_tokens`` and ``co2e_grams_per_million_{prefill,decode}_tokens``,
    with ``_low`` and ``_high`` from those of speed and energy.  The machine is paid for by the hour, so money follows
    time; CO2e follows the joules in the row, those of the device alone, times ``pue`` (power usage effectiveness).
    """
    found = []
    for row in rows:
        new = dict(row)
        for phase in ("prefill", "decode"):
            for end, opposite in (("", ""), ("_low", "_high"), ("_high", "_low")):
                speed = row.get(f"{phase}_tokens_per_s{opposite}")
                joules = row.get(f"joules_per_{phase}_token{end}")
                new[f"usd_per_million_{phase}_tokens{end}"] = speed and cost_per_million_tokens(speed, usd_per_hour)
                new[f"co2e_grams_per_million_{phase}_tokens{end}"] = joules and co2e_grams_per_million_tokens(
                    joules, grams_per_kwh, pue)  # fmt: skip
        found.append(new)
    return found


def relative(rows, column: str) -> list[dict]:
    """Each row's ``column`` over that of the 16-bit model in the same runtime, shape and batch.

    Rows get ``ratio`` with ``ratio_low`` and ``ratio_high``, the outermost that both intervals allow, and ``against``,
    the technique compared with.  Across runtimes a ratio would mix what the format does with what the program does;
    rows without the column or without their 16-bit model are left out.
    """

    def ends(row):
        return [row.get(f"{column}{end}") or row[column] for end in ("", "_low", "_high")]

    base = {(row["technique"], row["shape"], row["batch"]): row for row in rows if row.get(column)}
    found = []
    for row in rows:
        floating = base.get((FLOAT[row["runtime"]], row["shape"], row["batch"]))
        if row.get(column) and floating is not None:
            (value, low, high), (other, other_low, other_high) = ends(row), ends(floating)
            found.append(row | {"ratio": value / other, "ratio_low": low / other_high, "ratio_high": high / other_low,
                                "against": floating["technique"]})  # fmt: skip
    return found


def table(rows):
    """Size, quality, speed, energy and (after :func:`with_cost`) money of each row, readable, as a DataFrame."""
    import pandas

    def number(value):
        return "-" if value is None else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    def with_error(row, column, digits):
        value, error = row.get(column), row.get(f"{column}_se")
        return "-" if value is None else f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")

    made = []
    for row in rows:
        digits = 5 if (row.get("kld_mean") or 0) < 0.01 else 4
        joules = row.get("joules_per_decode_token")
        made.append({"technique": row["technique"], "batch": row["batch"],
                     "bits/weight": number(row.get("bits_per_weight")), "MB": number(row.get("weights_mb")),
                     "KLD (nats)": with_error(row, "kld_mean", digits),
                     "perplexity": with_error(row, "perplexity", 2), "accuracy": with_error(row, "accuracy", 3),
                     "prefill (tok/s)": number(row.get("prefill_tokens_per_s")),
                     "decode (tok/s)": number(row.get("decode_tokens_per_s")),
                     "decode (mJ/tok)": number(joules and 1000 * joules),
                     "$ per M": number(row.get("usd_per_million_decode_tokens")),
                     "g CO2e per M": number(row.get("co2e_grams_per_million_decode_tokens"))})  # fmt: skip
    frame = pandas.DataFrame(made).set_index("technique")
    return frame.drop(columns=[name for name in frame if (frame[name] == "-").all()])
