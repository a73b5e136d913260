"""Checks of the exercises: FP8 scaling."""

import math

import torch

from ..lesson import exercise, expect
from .answers import function, number, tensor


def _next_scale_solution(history, scale, margin=0):
    amax = max(history)
    if amax == 0 or not math.isfinite(amax):
        return scale
    return 448 / amax / 2**margin


@exercise("fp8_scaling.next_scale", solution=_next_scale_solution, wrong=[
    lambda history, scale, margin=0: 448 / max(history) / 2**margin,                        # divides by zero
    lambda history, scale, margin=0: 448 / history[-1] / 2**margin if history[-1] else scale,  # most_recent
    lambda history, scale, margin=0: _next_scale_solution(history, scale, 0),                # no margin
    lambda history, scale, margin=0: _next_scale_solution(history, scale, -margin),          # the wrong way round
    lambda history, scale, margin=0: max(history) / 448 * 2**margin if max(history) else scale,  # the reciprocal
    lambda history, scale, margin=0: 448 / max(max(history), 1e-12) / 2**margin])  # fmt: skip - a huge scale for zeros
def _next_scale(answer):
    answer = function(answer, "next_scale")
    number(answer([2.0, 8.0, 4.0], 7.0), 56, "For the history [2, 8, 4] the scale is 448 / 8 = 56.", {
        8 / 448: "That is the reciprocal: the scale takes amax up to 448.",
        112: '"max" takes the largest amax of the history, not the last.'})
    number(answer([2.0, 8.0, 4.0], 7.0, 1), 28, "margin=1 leaves room for a doubling: half the scale.")
    number(answer([0.0, 0.0], 7.0), 7, "A history of zeros says nothing about the tensor: keep the old scale.")
    number(answer([1.0, math.inf], 7.0), 7, "An infinite amax would give a scale of 0: keep the old one.")
    return "That is the library's rule, the two guards included."


@exercise("fp8_scaling.shadow", solution=117, wrong=[116, 101, 115, 118, 16, "117"])
def _shadow(answer):
    late = "Step 116's scale was made at the end of step 115, from steps 100 to 115."
    number(answer, 117, "The scale of step t + 1 comes from the amaxes of the 16 steps t - 15 to t.", {
        101: "Step 101 is the first one whose scale knows the outlier: that is where the shadow begins.",
        16: "That is how many steps the shadow lasts; the question is which step comes after it.",
        115: late, 116: late})  # fmt: skip
    return "Sixteen steps in the shadow, 101 to 116. With the default history it would have been 1024."


@exercise("fp8_scaling.mx_scale", solution=2.0**-5, wrong=[2.0**-6, 2.0**5, 7.5 / 448, 448 / 7.5, 2.0**-4, "2**-5"])
def _mx_scale(answer):
    number(answer, 2.0**-5, "The scale is the smallest power of two with which 7.5 / scale is still at most 448.", {
        7.5 / 448: "An E8M0 scale is a power of two.",
        448 / 7.5: "The scale multiplies the codes, which go up to 448, and the block only goes to 7.5: it is below 1.",
        2.0**5: "The scale multiplies the codes, which go up to 448, and the block only goes to 7.5: it is below 1.",
        2.0**-6: "7.5 / 2**-6 is 480, and E4M3 ends at 448.",
        2.0**-4: "With half that scale everything still fits, and more of the range is used."})
    return "7.5 becomes the code 240. Rounding the scale up costs up to half of the range and saturates nothing."


@exercise("fp8_scaling.stochastic_round", solution=lambda x: torch.floor(x + torch.rand_like(x)), wrong=[
    lambda x: x, lambda x: x.round(),
    lambda x: torch.floor(x) + (torch.rand_like(x) < 0.5),                   # a fair coin
    lambda x: torch.floor(x) + (torch.rand_like(x) > x - torch.floor(x)),    # up and down exchanged
    lambda x: torch.trunc(x + torch.rand_like(x)),                           # negative numbers towards zero
    lambda x: x + torch.rand_like(x) - 0.5])  # fmt: skip - not rounded
def _stochastic_round(answer):
    answer = function(answer, "stochastic_round")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for value in (2.3, -1.75, 0.1):
            got = tensor(answer(torch.full((20_000,), value)), (20_000,))
            expect(torch.equal(got, got.round()), "The results must be whole numbers.")
            low = math.floor(value)
            expect(set(got.unique().tolist()) <= {low, low + 1},
                   f"{value} lies between {low} and {low + 1}: only these two may come out.")  # fmt: skip
            expect(len(got.unique()) == 2, f"{value} always becomes {got[0].item():.0f}: sometimes it should go up.")
            mean = got.float().mean().item()
            expect(abs(mean - value) < 0.02, f"The mean of 20,000 roundings of {value} is {mean:.3f}.")
        whole = torch.tensor([-2.0, 0.0, 3.0])
        expect(torch.equal(answer(whole.clone()), whole), "A whole number must stay what it is.")
    return "Each rounding is wrong, and their mean is right: that is what gradients need."
