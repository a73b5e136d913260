"""Checks of the exercises: number formats."""

import torch

from .. import formats
from ..lesson import exercise, expect
from .answers import function, number, several, tensor


@exercise("number_formats.decode", solution=[0.09375, -5.0, 15.5], wrong=[
    [0.171875, -5, 15.5], [0.046875, -5, 15.5], [0.09375, -1.25, 15.5], [0.09375, 5, 15.5], [0.09375, -40, 15.5],
    [0.09375, -5, 31], [0.09375, -5, 16], [0.09375, -5], ["0.09375", -5, 15.5]])  # fmt: skip
def _decode(answer):
    a, b, c = several(answer, 3, "three numbers")
    number(a, 0.09375, "A: the exponent field is 0, so the value is (0 + 6/16) * 2**(1 - bias).", {
        0.171875: "A: the exponent field is 0, so this is a subnormal: there is no implicit one.",
        0.046875: "A: a subnormal has the exponent of field 1, not of field 0: 2**(1 - 3)."})  # fmt: skip
    number(b, -5, "B: the exponent field is 5: -(1 + 4/16) * 2**(5 - 3).", {5: "B: the first bit is the sign."})
    number(c, 15.5, "C: the largest exponent field in use is 110, the largest mantissa is 15/16.", {
        31: "C: exponent field 111 holds infinity and NaN here, as in IEEE 754."})  # fmt: skip
    return "Subnormal, normal, largest: these three cases decode every float format."


def _quantizer(amax=lambda w: w.abs().amax(dim=1, keepdim=True).clamp(min=1e-12), power=1):
    """A quantizer with this rule for amax; ``power=-1`` returns the reciprocal of the scale."""
    return lambda w: ((w / amax(w) * 448).clamp(-448, 448).to(torch.float8_e4m3fn), (amax(w) / 448) ** power)


@exercise("number_formats.scale_rule", solution=_quantizer(), wrong=[
    _quantizer(power=-1), _quantizer(lambda w: w.abs().amax(1, keepdim=True)), _quantizer(lambda w: w.abs().max()),
    _quantizer(lambda w: w.amax(1, keepdim=True).clamp(min=1e-12)), lambda w: w, lambda w: (w, w[:, :1])])  # fmt: skip
def _scale_rule(answer):
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).abs()
    w[1], w[2], w[3] = -w[1] - 3, 0, w[3] / 10_000
    codes, scale = several(function(answer, "repaired")(w.clone()), 2, "codes and scale")
    expect(tensor(codes, w.shape).dtype == torch.float8_e4m3fn, "The codes are of dtype torch.float8_e4m3fn.")
    x_hat = codes.float() * scale
    for row, hint in enumerate(("does your scale multiply before the cast? Then return its reciprocal, scale_inv.",
                                "amax is of absolute values.", "amax is 0 here: give it a small lower bound.",
                                "each row has its own amax.")):  # fmt: skip
        near = torch.allclose(x_hat[row], w[row], rtol=0.1, atol=0.001 * float(w[row].abs().max()))
        expect(near, f"In row {row}, {w[row, 0]:.3g} comes back as {x_hat[row, 0]:.3g}: {hint}")
    return "Positive, negative, zero and tiny rows all come back."


@exercise("number_formats.design", solution=[3, 2, 5], wrong=[
    [3, 2, 3], [3, 2, 4], [3, 2, 6], [2, 3, 3], [4, 1, 11], [3, 3, 5], ["3", 2, 5], 5])  # fmt: skip
def _design(answer):
    fmt = formats.FloatFormat("yours", *several(answer, 3, "exponent bits, mantissa bits and bias"))
    expect(fmt.bits == 6, f"1 + exponent bits + mantissa bits is {fmt.bits}; 6 bits are wanted.")
    x = torch.logspace(-1.1549, 0.8129, 4001)  # from 0.07 to 6.5
    error, at = ((fmt.round(x) - x).abs() / x).max(0)
    limits = f"Your format reaches {fmt.max:g}; it has all its mantissa bits from {fmt.min_normal:g} on."
    expect(error <= 0.125, f"It rounds {x[at]:.3g} to {fmt.round(x[at]):.3g}, an error of {error:.0%}. {limits}")
    return f"The largest error is {error:.1%}. {limits}"


@exercise("number_formats.group_size", solution=[4, 64, False], wrong=[
    [4, 64, True], [4, 32, True], [4, 32, False], [3, 16, False], [4, 128, False], [5, 256, True], [4]])  # fmt: skip
def _group_size(answer):
    bits, size, symmetric = several(answer, 3, "bits, group size, and True or False")
    x = torch.nn.functional.silu(2 * torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)))
    yours = formats.quantize(x, f"INT{bits}", "group", size, symmetric)
    best = formats.quantize_dequantize(x, "INT4", "group", 64, symmetric=False)
    stored, quality = yours.bits_per_weight, formats.sqnr_db(x, yours.dequantize())
    expect(stored <= 4.4, f"It stores {stored:.2f} bits a value: over the budget of 4.4.")
    gap = formats.sqnr_db(x, best) - quality
    expect(gap < 0.05, f"{stored:.2f} bits give {quality:.1f} dB; another choice in the budget has {gap:.1f} dB more.")
    return f"{stored:.2f} bits a value, {quality:.1f} dB."
