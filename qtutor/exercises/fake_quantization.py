"""Checks of the exercises: fake quantization."""

import torch

from ..lesson import exercise, expect
from .answers import function, number, tensor


def _smallest_scale_solution(x, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return max(x.max().item() / high, x.min().item() / low)


@exercise("fake_quantization.smallest_scale", solution=_smallest_scale_solution, wrong=[
    lambda x, bits: x.abs().max().item() / (2 ** (bits - 1) - 1),      # ignores the extra negative code
    lambda x, bits: x.abs().max().item() / (2 ** (bits - 1) - 0.5),    # clips the largest positive value
    lambda x, bits: x.abs().max().item() / 2 ** (bits - 1),
    lambda x, bits: {}.get(bits)])  # fmt: skip - forgets to return
def _smallest_scale(answer):
    answer = function(answer, "smallest_scale")
    for bits in (2, 4, 8):
        for x in (torch.tensor([-1.0, 0.2, 0.9]), torch.tensor([-0.3, 0.1, 2.0]), torch.tensor([-5.0, 0.0, 0.1])):
            given, right = float(answer(x.clone(), bits)), _smallest_scale_solution(x, bits)
            places = ", ".join(f"{value / (given or 1):.2f}" for value in x.tolist())
            drawn = f"int{bits} ends at {-(2 ** (bits - 1))} and {2 ** (bits - 1) - 1}; your scale puts x at {places}"
            expect(given > right * (1 - 1e-5), f"{drawn}: a value lies beyond an end.")
            number(given, right, f"{drawn}: neither end is reached, a smaller scale still fits.", within=right * 1e-5)
    return "Each end asks for its own scale, and the larger one serves both."


def _learned_scale_solution(w, scale, low, high):
    q = w / scale
    q = q + (q.round() - q).detach()
    return q.clamp(low, high) * scale


@exercise("fake_quantization.learned_scale", solution=_learned_scale_solution, wrong=[
    lambda w, s, low, high: ((q := (w / s).clamp(low, high)) + (q.round() - q).detach()) * s,      # as in the paper
    lambda w, scale, low, high: (w / scale + ((w / scale).round() - w / scale).detach()) * scale,      # no clamp
    lambda w, scale, low, high: (w / scale + ((w / scale).round().clamp(low, high) - w / scale).detach()) * scale,
    lambda w, scale, low, high: w + ((w / scale).round().clamp(low, high) * scale - w).detach(),  # around everything
    lambda w, scale, low, high: (w / scale).round().clamp(low, high).detach() * scale,
    lambda w, scale, low, high: (w / scale).round().clamp(low, high) * scale])  # fmt: skip - no gradient for w
def _learned_scale(answer):
    w = torch.tensor([-1.9, -1.1, -0.66, -0.2, 0.1, 0.38, 0.9, 1.7]).requires_grad_()
    scale = torch.tensor(0.5, requires_grad=True)
    y = tensor(function(answer, "lsq_quantize")(w, scale, -2, 1), w.shape)
    q = (w.detach() / 0.5).round().clamp(-2, 1)
    expect(torch.allclose(y.detach(), 0.5 * q, atol=1e-6), f"The codes should be {q.int().tolist()}, yours are "
           f"{[round(code, 1) for code in (y / 0.5).tolist()]}: round, clamp, times scale.")  # fmt: skip
    expect(y.requires_grad, "No gradient can flow back: detach the rounding error, and nothing else.")
    inside = torch.tensor([0.0, 1, 1, 1, 1, 1, 0, 0])
    for_w, for_scale = torch.autograd.grad(y.sum(), (w, scale), allow_unused=True)
    expect(for_scale is not None, "The scale gets no gradient: only the rounding goes into detach(), not the scale.")
    expect(for_w is not None and for_w.any(), "The weights get no gradient: go around the rounding with detach().")
    expect(for_w[1] != 0, "w = -1.1 rounds to the code -2, which is on the grid, so its gradient "
           "should be 1. Yours is 0, as in the LSQ paper: you clamp before you round.")  # fmt: skip
    expect(torch.allclose(for_w, inside), f"round(w / scale) is {(w / 0.5).round().int().tolist()}, your gradients of "
           f"w are {for_w.int().tolist()}: beyond the codes -2 and 1 they must be 0.")  # fmt: skip
    expected = torch.where(inside > 0, q - w.detach() / 0.5, q).sum()
    expect(torch.allclose(for_scale, expected, atol=1e-5),
           f"The gradient of the scale is {for_scale.item():.2f}, it should be {expected.item():.2f}: "
           "round(w / scale) - w / scale inside, the last code where clipped.")  # fmt: skip
    return "One detach, around the rounding alone, and autograd derives LSQ."


def _moved(codes):
    return (codes.int() - 128).to(torch.int8)


def _integer_sums_solution(codes_x, zero_x, codes_w):
    return torch._int_mm(_moved(codes_x), codes_w.T) - (zero_x - 128) * codes_w.sum(dim=1, dtype=torch.int32)


@exercise("fake_quantization.integer_sums", solution=_integer_sums_solution, wrong=[
    lambda x, zero, w: torch._int_mm(x.to(torch.int8), w.T) - zero * w.sum(dim=1, dtype=torch.int32),  # wraps around
    lambda x, zero, w: torch._int_mm(_moved(x), w.T) - zero * w.sum(dim=1, dtype=torch.int32),  # zero point not moved
    lambda x, zero, w: torch._int_mm(_moved(x), w.T),
    lambda x, zero, w: torch._int_mm(_moved(x), w.T) - (zero - 128) * w.sum(dim=1, dtype=torch.int8),  # overflows
    lambda x, zero, w: (torch._int_mm(_moved(x), w.T) - (zero - 128) * w.sum(dim=1)).float()])  # fmt: skip
def _integer_sums(answer):
    g = torch.Generator().manual_seed(0)
    codes_x = torch.randint(0, 256, (6, 40), dtype=torch.uint8, generator=g)
    codes_w = torch.randint(-128, 128, (4, 40), dtype=torch.int8, generator=g)
    zero_x = torch.tensor([[0], [28], [127], [128], [133], [255]], dtype=torch.int32)
    found = tensor(function(answer, "integer_sums")(codes_x.clone(), zero_x.clone(), codes_w.clone()), (6, 4))
    right, sum_w = _integer_sums_solution(codes_x, zero_x, codes_w), codes_w.sum(dim=1, dtype=torch.int32)
    wrapped = torch._int_mm(codes_x.to(torch.int8), codes_w.T) - zero_x * sum_w
    expect(not torch.equal(found, wrapped), "The code 200 becomes -56 in int8: move the codes before you cast them.")
    for t, n in (found != right).nonzero().tolist():
        expect(False, f"At token {t}, channel {n} your sum is off by {found[t, n] - right[t, n]}. There z_x is "
               f"{zero_x[t].item()} and the sum of q_w {sum_w[n]}: what does moving q_x do to z_x?")  # fmt: skip
    expect(not found.is_floating_point(), "The sums are right, but they are floats: stay with integers.")
    return "Codes and zero point moved by the same number: one int8 GEMM, and one correction."
