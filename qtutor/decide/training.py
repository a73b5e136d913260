"""Which precision to train in: fine-tuning from measured steps, pretraining on many GPUs from a model of a step.

    training.finetuning("H200")              # BF16, FP8, LoRA and QLoRA of an 8B model: rows of fp8_finetune
    training.pretraining(ranks=64)           # BF16 and FP8 on 64 GPUs: modelled throughout, by decide.sharding

Both return a pandas DataFrame, the cheapest recipe first, with money, energy and CO2e (no PUE) of a million tokens.
``will do``, by memory and :data:`MAX_LOSS_NATS`: yes; "speed only": the loss passes, on the course model; unknown; no.
"""

from __future__ import annotations

import math

from .. import QtutorError, paired, results
from . import capacity, cost, hardware, sharding
from .choosing import between
from .quality import Known

MAX_LOSS_NATS = 0.02  # held-out loss that a recipe may end above BF16's: 2 % of perplexity


def loss_gap(recipe: str, directory=None) -> Known | None:
    """Held-out loss less BF16's in nats a token, its 95 % interval over seeds (course model, ``fp8_loss``), or None."""
    run = results.on_gpu("fp8_loss", directory)
    gaps = paired.loss_gaps(run.rows, recipe) if run else []
    if len(gaps) < 2:
        return None
    gap = paired.paired_nll(gaps)
    return Known(gap.low, gap.high, f"measured: fp8_loss, {len(gaps)} pairs of seeds, course model")


def _row(recipe: str, tokens_per_s: Known, joules: Known, usd_per_hour: float, wrong: str, unknown: str, source: str,
         **more) -> dict:  # fmt: skip
    """One recipe: what a million tokens cost on cards that together write ``tokens_per_s`` for ``joules`` a token."""
    usd = [cost.cost_per_million_tokens(speed, usd_per_hour) for speed in (tokens_per_s.high, tokens_per_s.low)]
    kwh = [1e6 * j / cost.JOULES_PER_KWH for j in (joules.low, joules.high)]
    grams = [cost.grid().grams_per_kwh * x for x in kwh]
    passes = ("yes", "the reference") if "BF16" in recipe else ("speed only", "the course model's loss, with 16-bit "
              f"weights, is within {MAX_LOSS_NATS:g} nats of BF16's; not tested at this size")  # fmt: skip
    ends = {"USD / 1M": (usd, "{:.3f}"), "kWh / 1M": (kwh, "{:.4f}"), "g CO2e / 1M": (grams, "{:.2f}")}
    return {"recipe": recipe, "will do": "no" if wrong else "unknown" if unknown else passes[0],
            "tokens/s": between(tokens_per_s, "{:,.0f}".format), **more,
            **{name: between(Known(*pair, ""), form.format) for name, (pair, form) in ends.items()},
            "why": wrong or unknown or passes[1], "source": source, "usd": sum(usd) / 2}  # fmt: skip


def _judge(recipe: str, directory) -> tuple[str, str, str]:
    """(what is wrong, what is unknown, the gap in words) of a recipe's held-out loss."""
    if recipe == "BF16":
        return "", "", "0"
    gap = loss_gap(recipe, directory)
    if gap is None:
        return "", "what it loses has not been measured", "unknown"
    said = between(gap, "{:+.4f}".format)
    if gap.low > MAX_LOSS_NATS:
        return f"the course model's loss ends {said} nats above BF16's", "", said
    return "", "" if gap.high <= MAX_LOSS_NATS else f"the course model's loss may end {said} nats above BF16's", said


def _frame(rows: list[dict]):
    import pandas

    rows.sort(key=lambda row: ({"unknown": 1, "no": 2}.get(row["will do"], 0), row["usd"]))
    return pandas.DataFrame(rows).set_index("recipe").drop(columns="usd")


def finetuning(device="H200", free_gib: float | None = None, directory=None):
    """Recipes to fine-tune an 8B model on one ``device``; ``free_gib``: of its memory, all but the reserve."""
    run, device = results.on_gpu("fp8_finetune", directory), hardware.device(device)
    if run is None:
        raise QtutorError("Fine-tuning was not recorded: run 'python -m tools.record_training' on a GPU.")
    free = device.memory_gib - device.reserve_gib if free_gib is None else free_gib
    other = hardware.device(run.device)
    if device.chip != other.chip:
        raise QtutorError(f"Steps were measured on {run.device}, and {device.name} computes at another speed: record "
                          "them on it.")  # fmt: skip
    source = f"measured on {run.device}" + ("" if other == device else f", taken for {device.name}: the same processor")
    rows = []
    for row in run.rows:
        recipe = next((kind for kind in ("FP8 delayed", "FP8 current", "FP8 block") if kind in row["rung"]), "BF16")
        wrong, unknown, gap = _judge(recipe, directory)
        if "LoRA" in row["rung"]:
            unknown, gap = "adapters are another method: what they lose on your task has to be measured", "unknown"
        if row["peak_gib"] > free:
            wrong = f"it needs {row['peak_gib']:.0f} GiB and there are {free:.0f}"
        speeds = [1000 * row["tokens"] / row[end] for end in ("ms_p90", "ms_p10")]
        joules = [row[f"joules_per_step_{end}"] / row["tokens"] for end in ("low", "high")]
        rows.append(_row(row["rung"], Known(*speeds, ""), Known(*joules, ""), device.usd_per_hour, wrong, unknown,
                         source, **{"peak, GiB": f"{row['peak_gib']:.1f}", "loss, nats": gap}))  # fmt: skip
    return _frame(rows)


def pretraining(ranks: int = 64, model: str = "Llama-2-70B", tokens: int = 8192, directory=None, **network):
    """Recipes to train ``model`` on ``ranks`` GPUs with ``tokens`` a GPU: modelled, from steps on one GPU of
    ``fp8_scaling``; the interval is twice the model's RMS error on the GPUs where it was checked.  ``network``: as for
    sharding.step."""
    runs = [run for run in results.on_all("fp8_scaling", directory) if any(row["ranks"] == 1 for row in run.rows)]
    if not runs:
        raise QtutorError("Steps of one GPU were not recorded: run 'python -m tools.record_fsdp' on a GPU.")
    run, layers = runs[0], capacity.MODELS[model]["num_hidden_layers"]
    device = hardware.device(run.device)
    errors = [row["error"] for row in sharding.checked(run.rows, device.name)]
    spread = 2 * math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else 1.0
    rows = []
    for row in (row for row in run.rows if row["ranks"] == 1 and row["shape"] == model and not row.get("not_run")):
        if "gathered once" in row["rung"] or "fast accumulation" in row["rung"]:
            continue  # variants of one recipe
        more, weights = layers / row["layers"], row["trained_weights"]
        step = sharding.step(
            ranks, more * (row["ms_per_step"] - sharding.adam_ms(weights, device)) * tokens / row["tokens"],
            sharding.adam_ms(more * weights, device), layers=layers, weights=more * weights,
            gather_bytes=1 if "FP8 weights" in row["rung"] else 2, **network)  # fmt: skip
        speeds = [1000 * ranks * tokens / step.total_ms * (1 + sign * spread) for sign in (-1, 1)]
        joules = [row["watts"] * ranks / speed for speed in reversed(speeds)]
        recipe = row["rung"].removesuffix(" + FP8 weights")
        rows.append(_row(row["rung"], Known(*speeds, ""), Known(*joules, ""), ranks * device.usd_per_hour,
                         *_judge(recipe, directory)[:2], f"modelled: {ranks} GPUs from one {run.device}",
                         efficiency=f"{step.efficiency:.0%}", waits_for=step.bottleneck))  # fmt: skip
    if not rows:
        raise QtutorError(f"No step of {model}'s shape was recorded: choose one of "
                          f"{', '.join(sorted({row['shape'] for row in run.rows}))}.")  # fmt: skip
    return _frame(rows)
