"""Checks of the exercises: FP8 on several GPUs."""

from ..lesson import exercise, expect
from .answers import number, several

_RECEIVED = 4 * 13 * 7 / 8


@exercise("fp8_on_several_gpus.received", solution=_RECEIVED, wrong=[
    4 * 13, 3 * 13 * 7 / 8, 6 * 13 * 7 / 8, 2 * 13 * 7 / 8, 3 * 13, 13, "45.5 GB"])  # fmt: skip
def _received(answer):
    number(answer, _RECEIVED, "13 bytes (in 10⁹) for each all-gather, 26 for the reduce-scatter, times 7/8.", {
        4 * 13: "A GPU has its own shard already: it receives 7/8 of the whole.",
        3 * 13: "The weights are gathered twice, and a GPU receives 7/8 of the whole.",
        3 * 13 * 7 / 8: "After the forward pass the weights are dropped: the backward pass gathers them again.",
        6 * 13 * 7 / 8: "That is BF16: FP8 weights travel as one byte, gradients as two.",
        2 * 13 * 7 / 8: "Gradients travel, too: two bytes each, in BF16."}, within=1e-3)  # fmt: skip
    return "45.5 GB, of which gradients are 22.8: FP8 weights save a third of BF16's 68.3 GB."


@exercise("fp8_on_several_gpus.faults", solution="bca", wrong=["dca", "bac", "cba", "abc", "b", 3, "bcd"])
def _faults(answer):
    letters = str(answer).strip().lower()
    expect(len(letters) == 3 and set(letters) <= set("abcd"), 'Answer with three letters of a, b, c, d, such as "abc".')
    expect(letters[0] == "b", "Run 1: no process ended, so none ran out of memory; one of them does not arrive.")
    expect(letters[1] == "c", "Run 2: 4 bytes are two gathers of BF16. The loss cannot show that; the count does.")
    expect(letters[2] == "a", "Run 3: saved codes are decoded with a scale of 1, as in a new model, until the "
                              "optimizer writes new codes from the FP32 weights.")  # fmt: skip
    return "A name, a count, a first loss: three symptoms that cost nothing to print."


def _tokens(b: float, rate: float, backward: bool = True) -> float:
    return ((b + 2) / 4 if backward else b / 2) * rate / 50e9


_NEEDED = [_tokens(2, 600e12), _tokens(1, 950e12)]


@exercise("fp8_on_several_gpus.tokens_needed", solution=_NEEDED, wrong=[
    [_tokens(2, 600e12, False), _tokens(1, 950e12, False)], [_tokens(2, 600e12), _tokens(2, 950e12)],
    [_NEEDED[0] / 2, _NEEDED[1] / 2], _NEEDED[::-1], [_NEEDED[0], _NEEDED[0] / 2], _NEEDED[0]])  # fmt: skip
def _needed(answer):
    found = several(answer, 2, "two numbers of tokens,")
    for name, given, right, b, rate in zip(("BF16", "FP8"), found, _NEEDED, (2, 1), (600e12, 950e12), strict=True):
        hints = {
            _tokens(b, rate, False): f"{name}: that is the forward pass; the backward pass also sends 2 bytes a weight "
                                     "of gradients, and computes twice as much.",
            right * 2: f"{name}: the backward pass computes 4 operations a weight and token, not 2.",
            _tokens(2, 950e12): f"{name}: its gather carries 1 byte a weight."}  # fmt: skip
        hints.pop(right, None)  # in BF16 both passes need as many tokens
        number(given, right, f"{name}: 4·W·T operations at its rate must take as long as (b + 2)·W bytes at 50 GB/s.",
               hints, within=1)  # fmt: skip
    return "FP8 needs more tokens than BF16 to hide its backward pass: it computes faster, and gradients stay BF16."
