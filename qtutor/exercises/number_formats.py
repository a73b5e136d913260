"""Checks of the exercises: number formats."""

import torch

from ..lesson import exercise, expect
from .answers import function, number, tensor


@exercise("number_formats.largest", solution=28.0, wrong=[16, 31, 32, 14, 24, "28"])
def _largest(answer):
    number(answer, 28, "Largest exponent: field 7 minus the bias 3. Largest mantissa: 1 + 1/2 + 1/4.", {
        14: "The top exponent field is an ordinary one here: nothing is kept for infinity."})
    return "1.75 * 2**4: that is the FP6 format E3M2."


@exercise("number_formats.group_cost", solution=4 + 16 / 64, wrong=[4, 20, 4.5, 64, 4 + 64 / 16, "4.25"])
def _group_cost(answer):
    number(answer, 4.25, "The 16 bits of a scale are shared by 64 weights; add their share to the 4 bits.")
    return "A quarter of a bit for the scale."


def _int_round_solution(x, bits):
    top = 2 ** (bits - 1) - 1
    scale = x.abs().max() / top
    return (x / scale).round().clamp(-top - 1, top) * scale


@exercise("number_formats.int_round", solution=_int_round_solution, wrong=[
    lambda x, bits: x, lambda x, bits: x.round(), lambda x, bits: (x / x.abs().max()).round() * x.abs().max(),
    lambda x, bits: (x / (x.abs().max() / (2 ** (bits - 1) - 1))).round()])  # fmt: skip
def _int_round(answer):
    answer = function(answer, "int_round")
    for bits in (3, 4, 8):
        x = torch.randn(200, generator=torch.Generator().manual_seed(bits))
        got = tensor(answer(x.clone(), bits), x.shape)
        expect(len(got.unique()) <= 2**bits, f"{bits} bits have {2**bits} codes; your result has more values.")
        expect(torch.allclose(got, _int_round_solution(x, bits), atol=1e-5),
               "Divide by scale = amax / (2**(bits-1) - 1), round, and multiply by the scale again.")  # fmt: skip
    return "Divide, round, multiply: that is symmetric quantization."
