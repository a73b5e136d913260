"""What a type costs in quality: published for the model in question, else a range over other models, else unknown.

    quality.loss("Q6_K", "Llama-2-70B")      # 0.157 %, published
    quality.loss("Q8_0", "Llama-2-70B")      # between what four other models lose: interpolated, and labelled so
    quality.loss("NF4", "Llama-2-70B")       # None: unknown

Published losses are in ``data/reference/published_losses.csv``, each with its source.  Small models do not always lose
more than large ones, so that no single model bounds another: what is not published for a model is a range.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from .. import files, results

EXACT = ("BF16", "F16", "FP16")  # of the model's own 16 bits: nothing is lost
COURSE = "course model"


@dataclass(frozen=True)
class Known:
    """A number between ``low`` and ``high``, and where it comes from.  Losses are shares of perplexity: 0.01 is 1 %."""

    low: float
    high: float
    source: str

    mid = property(lambda self: (self.low + self.high) / 2)


def recorded(name: str, directory=None) -> list[results.Results]:
    """``results.on_all``, read once as long as the files do not change.  The rows are not to be changed."""
    paths = sorted(Path(directory or results.RESULTS).glob(f"*/{name}.json"))
    return _recorded(name, directory, tuple((path, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=64)
def _recorded(name, directory, _state):
    return results.on_all(name, directory)


@cache
def published() -> dict[tuple[str, str], Known]:
    """(model, type) -> loss, of every row of ``published_losses.csv``."""
    lines = (files.DATA / "reference/published_losses.csv").read_text("utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    spread = ((row, float(row["loss"]), float(row["plus_minus"] or 0)) for row in rows)
    return {(row["model"], row["type"]): Known(loss - more, loss + more, f"published: {row['source']}")
            for row, loss, more in spread}  # fmt: skip


def measured(type: str, directory=None) -> list[Known]:
    """What the course model loses in a type, two paired standard errors either way; one for each recording."""
    names = {"FP8": "torchao FP8 dynamic", "INT8 weight-only": "torchao INT8 weight-only",
             "INT8 dynamic": "torchao INT8 dynamic"}  # fmt: skip
    found = []
    for name in ("gguf_quality", "tradeoff"):
        for run in recorded(name, directory):
            for row in run.rows:
                said = row.get("type") if name == "gguf_quality" else row.get("technique")
                here = not row.get("imatrix") and row.get("batch", 1) == 1 and row.get("shape", "course") == "course"
                if said in (type, names.get(type)) and here and row.get("perplexity_ratio") is not None:
                    loss, more = row["perplexity_ratio"] - 1, 2 * (row.get("perplexity_ratio_se") or 0)
                    found.append(Known(loss - more, loss + more, f"measured: {run.name}, {COURSE}"))
    return found


def loss(type: str, model: str, directory=None) -> Known | None:
    """What ``model`` loses in ``type`` (llama.cpp's, FP8, W4A16 ...); None where that is unknown.

    Published for this model: that.  Known for at least two others (the course model among them): from the smallest to
    the largest of those, with a source that says so.
    """
    if type in EXACT:
        return Known(0.0, 0.0, "the original's 16 bits")
    own = published().get((model, type))
    if own:
        return own
    others = {name: known for (name, kind), known in published().items() if kind == type}
    course = measured(type, directory)
    if model == COURSE and course:
        return course[0]
    known = [*others.values(), *course]
    names = [*others, *[COURSE] * bool(course)]
    if len(names) < 2:
        return None
    return Known(min(one.low for one in known), max(one.high for one in known),
                f"interpolated: what {', '.join(names)} lose")  # fmt: skip


def cache_loss(kv_type: str, directory=None) -> Known | None:
    """What rounding the KV cache costs: the KL divergence in nats, which is about the share of perplexity, between the
    smallest and largest of ``kv_cache_quality`` (small models, llama.cpp's rotation); None where it is unknown."""
    if kv_type in EXACT:
        return Known(0.0, 0.0, "16 bits")
    rows = [row for run in recorded("kv_cache_quality", directory) for row in run.rows
            if row["kv_type"] == kv_type and row["rotation"]]  # fmt: skip
    if not rows:
        return None
    models = ", ".join(sorted({row["model"] for row in rows}))
    return Known(min(row["kld_mean_low"] for row in rows), max(row["kld_mean_high"] for row in rows),
                f"interpolated: KL divergence of {models}, kv_cache_quality")  # fmt: skip
