"""Checks of the exercises: FP8 speed and memory."""

from ..lesson import exercise, expect
from .answers import function, number, several


def _share(sequence: int, hidden: int = 4096, intermediate: int = 14336, kv: int = 1024) -> float:
    weights = hidden * (2 * hidden + 2 * kv + 3 * intermediate)
    return sequence * hidden / (sequence * hidden + weights)


@exercise("fp8_speed_and_memory.attention_share", solution=_share(8192),
          wrong=[_share(16384), _share(8192, kv=4096), _share(8192) / (1 - _share(8192)), "13 %", 13.3])  # fmt: skip
def _attention_share(answer):
    right = _share(8192)
    number(answer, right, "6 * tokens * sequence * hidden, over that plus 6 * tokens * weights; between 0 and 1.", {
        _share(16384): "Without the mask, or with both sequences as one: causal attention computes half of the scores "
                       "of 8192 tokens.",
        _share(8192, kv=4096): "Keys and values have 8 heads of 128, not 32: 1024 outputs each.",
        right / (1 - right): "That is attention over the matrices; the layer is both together."}, within=1e-3)
    return f"{right:.1%}: long sequences move work to where FP8 does not help."


@exercise("fp8_speed_and_memory.amdahl", solution=lambda share, faster, overhead: (
    1 / (1 - share + share / faster + overhead)), wrong=[
    lambda share, faster, overhead: 1 / (1 - share + share / faster),                  # no overhead
    lambda share, faster, overhead: 1 - share + share / faster + overhead,             # the time, not the speedup
    lambda share, faster, overhead: 1 / (1 - share + share / faster - overhead),       # overhead as a gain
    lambda share, faster, overhead: 1 / (share + (1 - share) / faster + overhead),     # the shares exchanged
    lambda share, faster, overhead: share * faster + (1 - share) - overhead,           # averages the rates
    lambda share, faster, overhead: 1 / (1 - share + (share + overhead) / faster),     # overhead made faster, too
])  # fmt: skip
def _amdahl(answer):
    answer = function(answer, "fp8_speedup")
    number(answer(0.0, 2, 0.0), 1, "Without matrix products and without overhead nothing changes: 1.")
    number(answer(1.0, 2, 0.0), 2, "If all is matrix products, twice as fast, the step is twice as fast.")
    number(answer(0.8, 2, 0.0), 1 / 0.6, "Add up times, not rates: 0.2 stays, 0.8 becomes 0.4.")
    expect(answer(0.8, 2, 0.1) < answer(0.8, 2, 0.0), "Overhead makes the step longer.")
    number(answer(0.8, 2, 0.1), 1 / 0.7, "0.2 stays, 0.8 becomes 0.4, and 0.1 comes on top: 0.7.")
    return "The same three numbers, read off a profile, tell you beforehand what FP8 can give."


def _training_gib(*bytes_per_parameter):
    return [8e9 * b / 2**30 for b in bytes_per_parameter]


@exercise("fp8_speed_and_memory.training_gib", solution=_training_gib(16, 18, 16), wrong=[
    _training_gib(16, 8, 8), _training_gib(16, 17, 15), _training_gib(16, 18, 14), [128, 144, 128],
    _training_gib(4, 6, 4), _training_gib(2, 4, 2), 119.2, _training_gib(16, 18)])  # fmt: skip
def _training(answer):
    bf16, both, fp8 = several(answer, 3, "three numbers, in GiB,")
    (a,), (one_copy,), (b,) = map(_training_gib, (16, 17, 18))
    number(bf16, a, "(a) Weight 2, gradient 2, FP32 master weight 4, two moments of 4: 16 bytes for each of 8e9 "
           "parameters.", {128: "That is in GB, of 10^9 bytes: a GiB has 2^30."}, within=0.5)
    number(both, b, "(b) Everything of (a) stays; two copies of one byte come on top.", {
        one_copy: "(b) There are two FP8 copies: by rows, and transposed."}, within=0.5)
    number(fp8, a, "(c) The BF16 weight goes; two FP8 copies of one byte, gradient, master weight and moments stay.",
           within=0.5)  # fmt: skip
    return "FP8 weights are no larger than BF16 ones, and no smaller: they are stored twice, a byte each."


@exercise("fp8_speed_and_memory.slower", solution="c", wrong=["a", "b", "d", 1, "larger batches"])
def _slower(answer):
    hints = {
        "a": "Block scaling adds passes: it is the slowest recipe, and this layer waits for launches.",
        "b": "Memory is half empty; and the time goes into launches, not into quantizing weights.",
        "c": "", "d": "INT4 weights are unpacked to BF16 for the product: they train and compute nothing faster."}
    answer = str(answer).strip().lower()
    expect(answer in hints, 'Answer "a", "b", "c" or "d".')
    expect(answer == "c", hints[answer])
    return "The same tokens in fewer launches. Where memory is full, a CUDA graph is the next choice."
