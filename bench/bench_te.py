"""What the FP8 emulation costs: one training step of the course model, against FP32 and against torchao.

    python bench/bench_te.py [--steps 12] [--batch 4] [--context 256]

Four copies of the course model take turns, one step each, so that a noisy machine disturbs all alike: FP32; the
emulated te.Linear under delayed and under current scaling; torchao's Float8 training with its emulation switched on
(``Float8LinearConfig(emulate=True)``, scales from each tensor, as in current scaling).  A step is forward, backward
and nothing else.  Printed are medians of the ratios of one round, which is what a noisy machine leaves meaningful.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from qtutor import course_model, lesson, te_switch


def candidates():
    """name -> (model, context of the forward pass)."""
    import contextlib

    lesson.quiet()
    te_switch.activate()
    import transformer_engine.pytorch as te
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    def model():
        return course_model.new_model(0).train()

    def swapped():
        m = model()
        te_switch.swap_linears(m)
        return m

    # Float8Linear replaces what the filter lets through: all but the head, as swap_linears does
    ao = convert_to_float8_training(model(), config=Float8LinearConfig(emulate=True),
                                    module_filter_fn=lambda m, name: "lm_head" not in name)  # fmt: skip
    return {
        "FP32": (model(), contextlib.nullcontext),
        "emulated FP8, delayed": (swapped(), lambda: te.autocast(recipe=DelayedScaling(amax_history_len=16))),
        "emulated FP8, current": (swapped(), lambda: te.autocast(recipe=Float8CurrentScaling())),
        "torchao Float8, emulated": (ao, contextlib.nullcontext),
    }


def step(model, context, ids) -> float:
    began = time.perf_counter()
    with context():
        logits = model(input_ids=ids[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    spent = time.perf_counter() - began
    model.zero_grad()
    return spent


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    options = parser.parse_args(argv)
    runs = candidates()
    ids = torch.randint(0, 4096, (options.batch, options.context + 1), generator=torch.Generator().manual_seed(0))
    spent = {name: [] for name in runs}
    for round_number in range(options.steps + 2):
        for name, (model, context) in runs.items():
            seconds = step(model, context, ids)
            if round_number >= 2:  # the first rounds allocate and warm up
                spent[name].append(seconds)
    print(f"one training step of the course model, {options.batch} x {options.context} tokens, "
          f"{torch.get_num_threads()} threads, median of {options.steps}")  # fmt: skip
    ratios = {}
    for name, seconds in spent.items():
        ratios[name] = {other: statistics.median(a / b for a, b in zip(seconds, spent[other], strict=True))
                        for other in ("FP32", "torchao Float8, emulated")}  # fmt: skip
        to_fp32, to_torchao = ratios[name].values()
        print(f"{name:26s} {statistics.median(seconds) * 1000:8.0f} ms   {to_fp32:5.2f} x FP32   "
              f"{to_torchao:5.2f} x torchao")  # fmt: skip
    return ratios


if __name__ == "__main__":
    main()
