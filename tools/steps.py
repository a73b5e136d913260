"""What a training step takes on a GPU: time, joules and memory of layers, for the records of FP8."""

from __future__ import annotations

from dataclasses import asdict

import torch
from tqdm.auto import tqdm

from qtutor import energy, measure
from qtutor.rigs import fp8_layers as rig

ORDER = (*rig.RUNGS, *rig.BRANCHES, "TE BF16")  # the last once more: how far does one recording drift?


def timed(step, seconds: float = 1.5, warmup: int = 3) -> dict:
    """Time ``step()`` for about ``seconds``: ms_per_step with percentiles, repeats, joules_per_step and the interval
    that the counter's resolution leaves, watts and clock.  The steps run back to back, so that the power limit acts as
    it does in training."""
    timing, used = energy.timed(step, warmup=warmup, repeats=5, seconds=seconds, device="cuda")
    board, n, joules = energy.board("cuda"), timing.n, used.per(timing.n)
    row = {"ms_per_step": timing.median_ms, "ms_p10": timing.p10, "ms_p90": timing.p90, "repeats": n,
           "mhz": board and board.mhz(), "joules_per_step": joules, "watts": used.per(used.seconds)}  # fmt: skip
    if joules is not None:
        row |= {f"joules_per_step_{end}": joules * (1 + sign * used.relative_error)
                for end, sign in (("low", -1), ("high", 1))}  # fmt: skip
    return {key: round(value, 4) for key, value in row.items() if value is not None}


def peaks(seconds: float = 1.0, size: int = 8192) -> dict:
    """Measured peak of the matrix units, in TFLOP/s, of one large product of random data: {"BF16": ..., "FP8": ...}."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    one, (a8, b8) = torch.ones((), device="cuda"), (t.to(torch.float8_e4m3fn) for t in (a, b))
    work = {"BF16": lambda: a @ b.t(), "FP8": lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16,
                                                                       use_fast_accum=True)}  # fmt: skip
    return {name: round(2 * size**3 / timed(product, seconds, 10)["ms_per_step"] / 1e9, 1)
            for name, product in work.items()}  # fmt: skip


def measure_rung(shape: rig.Shape, rung: str, seconds: float) -> dict:
    """Build a rung, time it, and return its row; ``peak_gib`` counts all that the rung allocates."""
    rig.require_fp8()
    rig.free()
    before = torch.cuda.memory_allocated() / measure.GIB
    with measure.track_memory("cuda") as memory:
        stack, step = rig.build(shape, rung)
        weights = torch.cuda.memory_allocated() / measure.GIB - before
        for _ in range(3):
            step()
    sizes = asdict(shape)
    row = {"shape": sizes.pop("name"), **sizes, "layers": rig.LAYERS, "tokens": shape.tokens, "rung": rung,
           **timed(step, seconds), "peak_gib": round(memory.peak - before, 3)}  # fmt: skip
    if "graph" not in rung:  # a graph's memory is taken when it is recorded, with the weights
        row["weights_gib"] = round(weights, 3)
    del stack, step
    rig.free()
    return row


def ladder(shapes=("Llama-2-7B", "Llama-2-70B"), rungs=ORDER, seconds: float = 10.0) -> list[dict]:
    """Rows of ``fp8_layers``: every rung for every shape (names), on a GPU that is warm from the first on.  A rung that
    comes twice, "TE BF16 (again)", shows how far the figures drift within one recording."""
    rig.require_fp8()
    peak, rows = peaks(seconds), []  # which also warms the GPU up: a cold one clocks higher
    for name, rung in tqdm([(name, rung) for name in shapes for rung in rungs], desc="ladder", leave=False):
        try:
            row = measure_rung(rig.SHAPES[name], rung, min(seconds, 3) if rung in rig.BRANCHES else seconds)
        except Exception as error:  # noqa: BLE001 - what one version of the library cannot run must not cost the rest
            print(f"{name}, {rung}: left out, {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        rate, most = rig.SHAPES[name].flop() / row["ms_per_step"] / 1e9, peak["FP8" if "FP8" in rung else "BF16"]
        if any((r["shape"], r["rung"]) == (name, rung) for r in rows):
            row["rung"] += " (again)"
        rows.append(row | {"tflop_per_s": round(rate, 1), "peak_tflop_per_s": most,
                           "share_of_peak": round(rate / most, 4)})  # fmt: skip
    return rows
