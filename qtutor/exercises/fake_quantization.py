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


def _ternary_solution(w):
    scale = w.abs().mean()
    y = (w / scale).round().clamp(-1, 1) * scale
    return w + (y - w).detach()


@exercise("fake_quantization.ternary", solution=_ternary_solution, wrong=[
    lambda w: (w / w.abs().mean()).round().clamp(-1, 1) * w.abs().mean(),      # no straight-through estimator
    lambda w: w, lambda w: w.sign(), lambda w: w + (w.sign() * w.abs().mean() - w).detach(),
    lambda w: w + (w.sign() * w.abs().max() - w).detach()])  # fmt: skip - the scale of the largest weight
def _ternary(answer):
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = tensor(function(answer, "ternary")(w), w.shape)
    codes, right = (v.detach() / w.detach().abs().mean() for v in (y, _ternary_solution(w)))
    expect(torch.allclose(codes, right, atol=1e-4), f"Divided by the mean of |w| you have {codes.min():.2f} to "
           f"{codes.max():.2f}, {(codes == 0).sum()} zeros: it should be -1, 0 and 1, {(right == 0).sum()} zeros.")
    expect(y.requires_grad, "No gradient can flow back: let w itself take part in what you return.")
    y.sum().backward()
    expect(torch.equal(w.grad, torch.ones_like(w)), "The values are right. The gradient must be 1 for each weight, "
           f"yours is {w.grad.min():.2f} to {w.grad.max():.2f}: detach everything but w.")  # fmt: skip
    return "Values from the grid, gradient straight through."


def _learned_scale_solution(w, scale, low, high):
    q = (w / scale).clamp(low, high)
    q = q + (q.round() - q).detach()
    return q * scale


@exercise("fake_quantization.learned_scale", solution=_learned_scale_solution, wrong=[
    lambda w, scale, low, high: (w / scale + ((w / scale).round() - w / scale).detach()) * scale,      # no clamp
    lambda w, scale, low, high: (w / scale + ((w / scale).round().clamp(low, high) - w / scale).detach()) * scale,
    lambda w, scale, low, high: w + ((w / scale).round().clamp(low, high) * scale - w).detach(),  # around everything
    lambda w, scale, low, high: (w / scale).round().clamp(low, high).detach() * scale,
    lambda w, scale, low, high: (w / scale).round().clamp(low, high) * scale])  # fmt: skip - no gradient for w
def _learned_scale(answer):
    w = torch.tensor([-1.9, -0.66, -0.2, 0.1, 0.38, 0.9, 1.7]).requires_grad_()  # none just beyond an end
    scale = torch.tensor(0.5, requires_grad=True)
    y = tensor(function(answer, "lsq_quantize")(w, scale, -2, 1), w.shape)
    q = (w.detach() / 0.5).round().clamp(-2, 1)
    expect(torch.allclose(y.detach(), 0.5 * q, atol=1e-6), f"The codes should be {q.int().tolist()}, yours are "
           f"{[round(code, 1) for code in (y / 0.5).tolist()]}: round, clamp, times scale.")  # fmt: skip
    expect(y.requires_grad, "No gradient can flow back: detach the rounding error, and nothing else.")
    inside = torch.tensor([0.0, 1, 1, 1, 1, 0, 0])
    for_w, for_scale = torch.autograd.grad(y.sum(), (w, scale), allow_unused=True)
    expect(for_scale is not None, "The scale gets no gradient: only the rounding goes into detach(), not the scale.")
    expect(for_w is not None and for_w.any(), "The weights get no gradient: go around the rounding with detach().")
    expect(torch.allclose(for_w, inside), f"round(w / scale) is {(w / 0.5).round().int().tolist()}, your gradients of "
           f"w are {for_w.int().tolist()}: beyond the codes -2 and 1 they must be 0.")  # fmt: skip
    expected = torch.where(inside > 0, q - w.detach() / 0.5, q).sum()
    expect(torch.allclose(for_scale, expected, atol=1e-5),
           f"The gradient of the scale is {for_scale.item():.2f}, it should be {expected.item():.2f}: "
           "round(w / scale) - w / scale inside, the last code where clipped.")  # fmt: skip
    return "One detach, around the rounding alone, and autograd derives LSQ."


def _integer_sums_solution(codes_x, zero_x, codes_w):
    return torch._int_mm(codes_x, codes_w.T) - zero_x * codes_w.sum(dim=1, dtype=torch.int32)


@exercise("fake_quantization.integer_sums", solution=_integer_sums_solution, wrong=[
    lambda x, zero, w: torch._int_mm(x, w.T),
    lambda x, zero, w: torch._int_mm((x - zero).to(torch.int8), w.T),                        # wraps around
    lambda x, zero, w: torch._int_mm(x, w.T) + zero * w.sum(dim=1, dtype=torch.int32),       # the wrong sign
    lambda x, zero, w: torch._int_mm(x, w.T) - zero * x.sum(dim=1, keepdim=True, dtype=torch.int32),
    lambda x, zero, w: torch._int_mm(x, w.T) - zero * w.sum(dim=1, dtype=torch.int8),        # the sum overflows
    lambda x, zero, w: (torch._int_mm(x, w.T) - zero * w.sum(dim=1)).float()])  # fmt: skip
def _integer_sums(answer):
    g = torch.Generator().manual_seed(0)
    codes_x, codes_w = (torch.randint(-128, 128, (n, 40), dtype=torch.int8, generator=g) for n in (6, 4))
    zero_x = torch.tensor([[-128], [-100], [-1], [0], [5], [127]], dtype=torch.int32)
    found = tensor(function(answer, "integer_sums")(codes_x.clone(), zero_x.clone(), codes_w.clone()), (6, 4))
    right, product = _integer_sums_solution(codes_x, zero_x, codes_w), torch._int_mm(codes_x, codes_w.T)
    wrapped = torch._int_mm((codes_x - zero_x).to(torch.int8), codes_w.T)
    expect(not torch.equal(found, wrapped), "q_x - z_x wraps around in int8: multiply first, correct afterwards.")
    for t, n in (found != right).nonzero().tolist():
        expect(False, f"At token {t}, channel {n} you added {found[t, n] - product[t, n]} to the product. There z_x is "
               f"{zero_x[t].item()} and the sum of q_w {codes_w[n].long().sum()}: expand (q_x - z_x) q_w.")  # fmt: skip
    expect(not found.is_floating_point(), "The sums are right, but they are floats: stay with integers.")
    return "One GEMM of codes, and a number for each token times a number for each channel."
