"""Checks of the exercises: FP8 speed and memory."""

from __future__ import annotations

from ..lesson import exercise


def _share(sequence: int, hidden: int = 4096, intermediate: int = 14336, kv: int = 1024) -> float:
    weights = hidden * (2 * hidden + 2 * kv + 3 * intermediate)
    return sequence * hidden / (sequence * hidden + weights)


@exercise("fp8_speed_and_memory.attention_share", solution=_share(8192),
          wrong=[_share(16384), _share(8192, kv=4096), _share(8192) / (1 - _share(8192)), "13 %", 13.3])  # fmt: skip
def _attention_share(answer):
    assert isinstance(answer, (int, float)), "Give a number between 0 and 1."
    assert 0 < answer < 1, "A share lies between 0 and 1."
    right = _share(8192)
    assert abs(answer - _share(16384)) > 1e-3, (
        "Without the mask, or with both sequences as one: causal attention computes half of the scores of 8192 tokens.")
    assert abs(answer - _share(8192, kv=4096)) > 1e-3, "Keys and values have 8 heads of 128, not 32: 1024 outputs each."
    assert abs(answer - right / (1 - right)) > 1e-3, "That is attention over the matrices; the layer is both together."
    assert abs(answer - right) < 1e-3, "6 * tokens * sequence * hidden, over that plus 6 * tokens * weights."
    return f"{right:.1%}: long sequences move work to where FP8 does not help."


def _amdahl_solution(share, faster, overhead):
    return 1 / (1 - share + share / faster + overhead)


@exercise("fp8_speed_and_memory.amdahl", solution=_amdahl_solution, wrong=[
    lambda share, faster, overhead: 1 / (1 - share + share / faster),                  # no overhead
    lambda share, faster, overhead: 1 - share + share / faster + overhead,             # the time, not the speedup
    lambda share, faster, overhead: 1 / (1 - share + share / faster - overhead),       # overhead as a gain
    lambda share, faster, overhead: 1 / (share + (1 - share) / faster + overhead),     # the shares exchanged
    lambda share, faster, overhead: share * faster + (1 - share) - overhead,           # averages the rates
    lambda share, faster, overhead: 1 / (1 - share + (share + overhead) / faster),     # overhead made faster, too
])  # fmt: skip
def _amdahl(answer):
    assert callable(answer), "Give the function itself: fp8_speedup, without brackets."
    assert answer(0.8, 2, 0.1) is not None, "The function returns nothing: is there a return?"
    assert abs(answer(0.0, 2, 0.0) - 1) < 1e-9, "Without matrix products and without overhead nothing changes: 1."
    assert abs(answer(1.0, 2, 0.0) - 2) < 1e-9, "If all is matrix products, twice as fast, the step is twice as fast."
    assert abs(answer(0.8, 2, 0.0) - 1 / 0.6) < 1e-9, "Add up times, not rates: 0.2 stays, 0.8 becomes 0.4."
    assert answer(0.8, 2, 0.1) < answer(0.8, 2, 0.0), "Overhead makes the step longer."
    assert abs(answer(0.8, 2, 0.1) - 1 / 0.7) < 1e-9, "0.2 stays, 0.8 becomes 0.4, and 0.1 comes on top: 0.7."
    assert answer(0.1, 2, 0.1) < 1, "With a tenth in products and a tenth of overhead FP8 must come out slower."
    return "The same three numbers, read off a profile, tell you beforehand what FP8 can give."


def _training_gib(*bytes_per_parameter):
    return [8e9 * b / 2**30 for b in bytes_per_parameter]


@exercise("fp8_speed_and_memory.training_gib", solution=_training_gib(16, 18, 16), wrong=[
    _training_gib(16, 8, 8), _training_gib(16, 17, 15), _training_gib(16, 18, 14), [128, 144, 128],
    _training_gib(4, 6, 4), _training_gib(2, 4, 2), 119.2, _training_gib(16, 18)])  # fmt: skip
def _training(answer):
    assert isinstance(answer, (list, tuple)) and len(answer) == 3, "Give a list of three numbers, in GiB."
    bf16, both, fp8 = answer
    assert abs(bf16 - 128) > 0.5, "That is in GB, of 10^9 bytes: a GiB has 2^30."
    assert abs(bf16 - _training_gib(16)[0]) < 0.5, (
        "(a) Weight 2, gradient 2, FP32 master weight 4, two moments of 4: 16 bytes for each of 8e9 parameters.")
    assert abs(both - _training_gib(17)[0]) > 0.5, "(b) There are two FP8 copies: by rows, and transposed."
    assert abs(both - _training_gib(18)[0]) < 0.5, "(b) Everything of (a) stays; two copies of one byte come on top."
    assert abs(fp8 - _training_gib(16)[0]) < 0.5, (
        "(c) The BF16 weight goes; two FP8 copies of one byte, gradient, master weight and moments stay.")
    return "FP8 weights are no larger than BF16 ones, and no smaller: they are stored twice, a byte each."


@exercise("fp8_speed_and_memory.slower", solution="c", wrong=["a", "b", "d", 1, "larger batches"])
def _slower(answer):
    answer = str(answer).strip().lower()
    assert answer in ("a", "b", "c", "d"), 'Answer "a", "b", "c" or "d".'
    assert answer != "a", "Block scaling adds passes: it is the dearest recipe, and this layer waits for launches."
    assert answer != "b", "Memory is half empty; and the time goes into launches, not into quantizing weights."
    assert answer != "d", "INT4 weights are unpacked to BF16 for the product: they train and compute nothing faster."
    return "The same tokens in fewer launches. Where memory is full, a CUDA graph is the next choice."
