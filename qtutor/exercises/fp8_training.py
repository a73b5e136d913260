"""Checks of the exercises: FP8 training."""

import numpy as np
from scipy import stats

from ..lesson import exercise, expect
from .answers import function, number


@exercise("fp8_training.comes_back", solution=28.0, wrong=[40, 14, 56, 448, 7, 3584, 16, "28"])
def _comes_back(answer):
    number(answer, 28, "TE's scale is 448 / (largest amax) / 2**margin. Multiply by it, clamp to 448, divide.", {
        40: "40 x scale is above 448, the largest E4M3 number: the cast saturates.",
        14: "The history's largest amax lands at half of the range: margin=1 leaves room above it.",
        56: "The margin divides TE's scale by 2**1; you divided twice.",
        7: "The margin makes TE's scale smaller, not larger: it leaves room above the amax.",
        448: "448 is the code. Divide it by the scale: which value comes back?",
        3584: "HYBRID is E4M3 in the forward pass, where the input belongs: up to 448, not 57344."})  # fmt: skip
    return "40 comes back as 28. Delayed scaling clips the first large step; the next one has a scale that fits."


@exercise("fp8_training.break_even_tokens", solution=14336, wrong=[4096, 28672, 7168, 18432, 58720256, "14336"])
def _break_even_tokens(answer):
    number(answer, 14336, "Solve 2 T x inputs = T x inputs + outputs x inputs for T. The number of inputs cancels.", {
        4096: "The number of inputs cancels: it is in every term.",
        28672: "The codes of the weight take one byte each, not two.",
        7168: "FP8 keeps the codes of the input, too.",
        58720256: "That is the size of the weight's codes in bytes. How many tokens save as much?"})  # fmt: skip
    return "With fewer tokens than outputs FP8 keeps more than BF16. It saves where a step has many tokens."


def _decide(bf16, fp8, tolerance, pairs=True, factor=None, root=True, ddof=1):
    """The solution of fp8_training.decide; other arguments make the mistakes."""
    a, b = np.asarray(bf16), np.asarray(fp8)
    n, gaps = len(a), b - a
    sd = gaps.std(ddof=ddof) if pairs else (a.var(ddof=1) + b.var(ddof=1)) ** 0.5
    half = (factor or stats.t.ppf(0.975, n - 1)) * sd / (n**0.5 if root else 1)
    low, high = gaps.mean() - half, gaps.mean() + half
    return "yes" if high < tolerance else "no" if low > tolerance else "more seeds"


_BF16 = (3.412, 3.398, 3.441, 3.405)
_CASES = [  # (FP8 minus BF16 by seed, tolerance, what a wrong decision has overlooked)
    ((0.005, 0.003, 0.006, 0.004), 0.01, "pair by seed: unpaired, the spread between seeds hides everything"),
    ((0.025, 0.023, 0.026, 0.024), 0.01, "the whole interval is above the tolerance"),
    ((0.009, 0.003, 0.010, 0.004), 0.0118, "four seeds need Student's t with 3 degrees of freedom, and ddof=1"),
    ((-0.02, 0.03, 0.01, -0.01), 0.01, "an interval that contains 0 may still reach far above the tolerance"),
    ((0.012, 0.006, 0.015, 0.011), 0.018, "the interval of the mean has the standard error: sd / sqrt(n)")]  # fmt: skip


@exercise("fp8_training.decide", solution=_decide, wrong=[
    lambda *data: _decide(*data, pairs=False), lambda *data: _decide(*data, factor=1.96),
    lambda *data: _decide(*data, root=False), lambda *data: _decide(*data, ddof=0),
    lambda a, b, tolerance: "yes" if np.mean(b) - np.mean(a) < tolerance else "no"])  # fmt: skip
def _check_decide(answer):
    answer = function(answer, "decide")
    for gaps, tolerance, overlooked in _CASES:
        right = _decide(_BF16, np.add(_BF16, gaps), tolerance)
        got = answer(np.array(_BF16), np.add(_BF16, gaps), tolerance)
        expect(isinstance(got, str) and got == right, f"Differences {gaps}, tolerance {tolerance}: {right!r} is right, "
               f"not {str(got)[:20]!r}; {overlooked}.")  # fmt: skip
    return "Right. Choose the tolerance before you look at the losses."
