"""Checks of the exercises: quantization after training, llama.cpp."""

import gguf
import numpy as np

from ..lesson import exercise, expect
from .answers import function, number, several


@exercise("ptq_llamacpp.step_ratio", solution=(0.10 / 8) / (0.12 / 15),
          wrong=[1 / 1.5625, 0.10 / 7 / 0.008, 0.0125, 0.10 / 15 / 0.008, 0.12 / 8 / 0.008, "1.5625"])  # fmt: skip
def _step_ratio(answer):
    number(answer, 1.5625, "Q4_0: the largest magnitude over 8. Q4_1: the distance of the ends over 15.", {
        0.64: "Upside down: the step of Q4_0 over that of Q4_1.", 0.0125: "This is the step of Q4_0."}, within=1e-3)
    return "The same codes, spread over 0.12 instead of 0.19: Q4_1 pays 16 bits a block for its minimum."


def _dequantize_q8_0_solution(blocks, codes="int8"):
    d = blocks[:, :2].copy().view("float16").astype("float32")
    return d * blocks[:, 2:].view(codes).astype("float32")


@exercise("ptq_llamacpp.dequantize_q8_0", solution=_dequantize_q8_0_solution, wrong=[
    lambda blocks: _dequantize_q8_0_solution(blocks, "uint8"),
    lambda blocks: blocks[:, 2:].view("int8").astype("float32"),                           # no scale
    lambda blocks: blocks, lambda blocks: _dequantize_q8_0_solution(blocks).ravel(),       # no blocks
    lambda blocks: blocks[:, 32:].copy().view("float16").astype("float32") * blocks[:, :32].view("int8")])  # fmt: skip
def _dequantize_q8_0(answer):
    answer = function(answer, "dequantize_q8_0")
    weights = np.random.default_rng(8).standard_normal((6, 32), dtype=np.float32)
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    given = answer(blocks.copy())
    expect(isinstance(given, np.ndarray) and given.shape == (6, 32), "Return an array of shape (blocks, 32).")
    unsigned = np.allclose(given, _dequantize_q8_0_solution(blocks, "uint8"))
    expect(not unsigned, "The codes are signed: bytes above 127 are negative.")
    share = np.isclose(given, gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0), rtol=1e-3, atol=1e-6).mean()
    expect(share == 1, f"{share:.0%} of the weights are right: which bytes are the scale, and is it multiplied in?")
    return "The same as gguf's own dequantizer."


def _paired_ratio_solution(nll, base_nll):
    difference = (nll - base_nll).mean(axis=1)  # one value a window
    ratio = np.exp(difference.mean())
    return ratio, ratio * difference.std(ddof=1) / np.sqrt(len(difference))


def _unpaired_ratio(nll, base_nll):
    ratio, (ours, theirs) = np.exp(nll.mean() - base_nll.mean()), (x.mean(axis=1) for x in (nll, base_nll))
    return ratio, ratio * np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / len(ours))


@exercise("ptq_llamacpp.paired_ratio", solution=_paired_ratio_solution, wrong=[
    _unpaired_ratio,
    lambda nll, base_nll: _paired_ratio_solution(nll.reshape(-1, 1), base_nll.reshape(-1, 1)),    # over tokens
    lambda nll, base_nll: (nll.mean() / base_nll.mean(), 0.01),                                   # not perplexities
    lambda nll, base_nll: (_paired_ratio_solution(nll, base_nll)[0], (nll - base_nll).std()),     # no sqrt(n)
    lambda nll, base_nll: _paired_ratio_solution(base_nll, nll),                                  # upside down
    lambda nll, base_nll: _paired_ratio_solution(nll, base_nll)[0]])  # fmt: skip
def _paired_ratio(answer):
    rng = np.random.default_rng(8)
    base_nll = rng.gamma(1.0, 2.0, (20, 50)) + rng.standard_normal((20, 1))  # some windows are harder than others
    nll = base_nll + 0.1 + 0.5 * rng.standard_normal((20, 50)) + 0.2 * rng.standard_normal((20, 1))
    given = function(answer, "ratio_with_error")(nll.copy(), base_nll.copy())
    mine = several(given, 2, "two numbers, the ratio and its standard error,")
    (ratio, error), (_, unpaired) = _paired_ratio_solution(nll, base_nll), _unpaired_ratio(nll, base_nll)
    tokens = _paired_ratio_solution(nll.reshape(-1, 1), base_nll.reshape(-1, 1))[1]
    number(mine[0], ratio, "The ratio of the perplexities exp(mean nll) is exp of the mean difference.")
    number(mine[1], error, "se of the mean difference is std of the windows' means / sqrt(windows), times the ratio.", {
        unpaired: "That is unpaired: subtract first.", tokens: "Tokens are not independent: average windows first."},
        within=0.01 * error)
    return f"Paired, over windows: ± {error:.3f}. Unpaired: ± {unpaired:.3f}; over tokens, too small: ± {tokens:.3f}."
