"""Checks of the exercises: FP8 speed and memory."""

from ..lesson import exercise, expect
from .answers import number, several


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


_SPENT = {"a": 6, "b": 34 - 34 / 1.2, "c": 20 - 20 / 1.5, "d": 2.5}  # ms saved by each purchase
_BOUGHT = {letter: 100 / (80 - saved) for letter, saved in _SPENT.items()}


@exercise("fp8_speed_and_memory.where_to_spend", solution=[1.25, _BOUGHT["c"], "c"], wrong=[
    [100 / 74, 100 / (74 - _SPENT["c"]), "c"], [1.25, _BOUGHT["a"], "a"], [1.25, _BOUGHT["b"], "b"],
    [1.25, _BOUGHT["d"], "d"], [1.25, 1.25 * 1.5, "c"], [60 / 34, _BOUGHT["c"], "c"], [1.25, _BOUGHT["c"], "a"],
    "c"])  # fmt: skip
def _where(answer):
    before, after, letter = several(answer, 3, "two speedups and a letter")
    number(before, 1.25, "The FP8 step takes 34 + 6 + 20 + 15 + 5 ms.", {
        100 / 74: "Quantization is part of the FP8 step: add its 6 ms.",
        60 / 34: "That is the speedup of the products alone; the other parts do not change."}, within=0.005)
    letter = str(letter).strip().lower()
    expect(letter in _SPENT, 'The last answer is "a", "b", "c" or "d".')
    expect(letter == "c", f"{letter} saves {_SPENT[letter]:.1f} ms of the FP8 step, and another purchase saves more: "
                          "compare the milliseconds that each one saves, not its factor.")  # fmt: skip
    number(after, _BOUGHT["c"], "Subtract what faster attention saves, 20 - 20 / 1.5 ms, from the FP8 step of 80 ms.", {
        1.25 * 1.5: "Only attention becomes 1.5 times as fast, not the step."}, within=0.005)
    return "FP8 moved the bottleneck: in the BF16 step, faster products would have saved most, 10 ms."


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
