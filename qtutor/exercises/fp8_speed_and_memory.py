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


_SPENT = {"a": 6, "b": 34 - 34 / 1.2, "c": 20 - 20 / 1.5, "d": 2.5}  # units of time saved by each purchase
_BOUGHT = {letter: 100 / (80 - saved) for letter, saved in _SPENT.items()}


@exercise("fp8_speed_and_memory.where_to_spend", solution=[1.25, _BOUGHT["c"], "c"], wrong=[
    [100 / 74, 100 / (74 - _SPENT["c"]), "c"], [1.25, _BOUGHT["a"], "a"], [1.25, _BOUGHT["b"], "b"],
    [1.25, _BOUGHT["d"], "d"], [1.25, 1.25 * 1.5, "c"], [60 / 34, _BOUGHT["c"], "c"], [1.25, _BOUGHT["c"], "a"],
    "c"])  # fmt: skip
def _where(answer):
    before, after, letter = several(answer, 3, "two speedups and a letter")
    number(before, 1.25, "The FP8 step takes 34 + 6 + 20 + 15 + 5 units.", {
        100 / 74: "Quantization is part of the FP8 step: add its 6 units.",
        60 / 34: "That is the speedup of the products alone; the other parts do not change."}, within=0.005)
    letter = str(letter).strip().lower()
    expect(letter in _SPENT, 'The last answer is "a", "b", "c" or "d".')
    expect(letter == "c", f"{letter} saves {_SPENT[letter]:.1f} units of the FP8 step; another purchase saves more: "
                          "compare the time that each one saves, not its factor.")  # fmt: skip
    number(after, _BOUGHT["c"], "Subtract what faster attention saves, 20 - 20 / 1.5 units, from the FP8 step of 80.", {
        1.25 * 1.5: "Only attention becomes 1.5 times as fast, not the step."}, within=0.005)
    return "FP8 moved the bottleneck: in the BF16 step, faster products would have saved most, 10 units."


_PEAKS = {"TE BF16": (13.2, 38.8), "TE FP8": (14.3, 43.5), "FP8 weights": (20.8, 63.5)}  # GiB at 4 and 16 layers
_CARD = 79.2


def _layers(card: float = _CARD, intercept: bool = True) -> list[int]:
    found = []
    for few, many in _PEAKS.values():
        slope = (many - few) / 12
        found.append(int((card - (few - 4 * slope) * intercept) / slope))
    return found


@exercise("fp8_speed_and_memory.layers_that_fit", solution=_layers(), wrong=[
    _layers(intercept=False), [n + 1 for n in _layers()], _layers(85.9), [32, 32, 32], _layers()[:2],
    [*_layers()[:2], _layers()[2] + 4], 34])  # fmt: skip
def _fit(answer):
    found = several(answer, 3, "three numbers of layers,")
    for name, given, right, proportional, larger in zip(
            _PEAKS, found, _layers(), _layers(intercept=False), _layers(85.9), strict=True):  # fmt: skip
        number(given, right, f"{name}: the slope is the difference of the two peaks over 12 layers; what is left at no "
               "layers is head, embedding and logits. Whole layers only, rounded down.", {
            proportional: f"{name}: that divides the card by the slope. Subtract first what the model takes without "
                          "any layer.",
            larger: f"{name}: that is for 85.9 GiB; the card has {_CARD} GiB, which is 85 GB."})  # fmt: skip
    return "FP8 by Transformer Engine costs layers at this number of tokens, and FP32 optimizer state costs more."


@exercise("fp8_speed_and_memory.slower", solution="c", wrong=["a", "b", "d", 1, "larger batches"])
def _slower(answer):
    hints = {
        "a": "Block scaling adds kernels: it is the slowest recipe, and this layer waits for launches.",
        "b": "Memory is half empty; and the time goes into launches.",
        "c": "",
        "d": "A good second step: it saves the casts of the weights in 15 of 16 micro-batches. All other launches of "
             "the 16 small batches stay."}  # fmt: skip
    answer = str(answer).strip().lower()
    expect(answer in hints, 'Answer "a", "b", "c" or "d".')
    expect(answer == "c", hints[answer])
    return "The same tokens in fewer launches. Where memory is full, is_first_microbatch and a CUDA graph come next."
