"""Checks of the exercises: fake quantization."""

import torch

from ..lesson import exercise, expect
from .answers import function, number, several, tensor


@exercise("fake_quantization.ste_gradient", solution=[0, 1, 1, 1, 0],
          wrong=[[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1], 3])  # fmt: skip
def _ste_gradient(answer):
    answer = several(answer, 5, "five numbers, one for each input,")
    for i, (code, right) in enumerate(zip([-3, -1, 1, 1, 2], [0, 1, 1, 1, 0], strict=True)):
        expect(answer[i] == right, f"Look at input {i} again: divided by the scale and rounded it is {code}; "
               "is there such a code among -2, -1, 0, 1?")  # fmt: skip
    return "The first and the last round to codes that do not exist: clipped, no gradient."


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
            given, right, shown = float(answer(x.clone(), bits)), _smallest_scale_solution(x, bits), x.tolist()
            expect(given > right * (1 - 1e-5), f"With scale {given:.4f} a value of x lies beyond the int{bits} grid; "
                   f"x has {shown[0]:.1f} to {shown[2]:.1f}.")  # fmt: skip
            number(given, right, f"At int{bits} a smaller scale than {given:.4f} still fits: the negative end has one "
                   "code more than the positive end.", within=right * 1e-5)  # fmt: skip
    return "Each end asks for its own scale, and the larger one serves both."


def _ternary_solution(w):
    scale = w.abs().mean()
    y = (w / scale).round().clamp(-1, 1) * scale
    return w + (y - w).detach()


@exercise("fake_quantization.ternary", solution=_ternary_solution, wrong=[
    lambda w: (w / w.abs().mean()).round().clamp(-1, 1) * w.abs().mean(),      # no straight-through estimator
    lambda w: w, lambda w: w.sign(),
    lambda w: w + (w.sign() * w.abs().max() - w).detach()])  # fmt: skip - the scale of the largest weight
def _ternary(answer):
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = tensor(function(answer, "ternary")(w), w.shape)
    expect(torch.allclose(y, _ternary_solution(w.detach()), atol=1e-6),
           f"The values differ: yours has {len(y.detach().unique())} different ones, "
           "it should have -1, 0 and +1 times the mean of |w|.")  # fmt: skip
    expect(y.requires_grad, "No gradient can flow back: let w itself take part in what you return.")
    y.sum().backward()
    expect(torch.equal(w.grad, torch.ones_like(w)),
           "The values are right, but the gradient must be 1 for each weight: detach everything but w.")  # fmt: skip
    return "Values from the grid, gradient straight through."


def _learned_scale_solution(w, scale, low, high):
    q = (w / scale).clamp(low, high)
    q = q + (q.round() - q).detach()
    return q * scale


def _rounding_unclipped(w, scale, low, high):
    q = w / scale
    return (q + (q.round() - q).detach()) * scale


def _straight_around_clamp(w, scale, low, high):
    q = w / scale
    return (q + (q.round().clamp(low, high) - q).detach()) * scale


@exercise("fake_quantization.learned_scale", solution=_learned_scale_solution, wrong=[
    _rounding_unclipped, _straight_around_clamp,
    lambda w, scale, low, high: w + ((w / scale).round().clamp(low, high) * scale - w).detach(),  # around everything
    lambda w, scale, low, high: (w / scale).round().clamp(low, high).detach() * scale,
    lambda w, scale, low, high: (w / scale).round().clamp(low, high) * scale,      # no gradient for w
    lambda w, scale, low, high: w * scale])  # fmt: skip
def _learned_scale(answer):
    w = torch.tensor([-1.9, -0.66, -0.2, 0.1, 0.38, 0.9, 1.7]).requires_grad_()  # none just beyond an end
    scale = torch.tensor(0.5, requires_grad=True)
    y = tensor(function(answer, "lsq_quantize")(w, scale, -2, 1), w.shape)
    q = (w.detach() / 0.5).round().clamp(-2, 1)
    expect(torch.allclose(y.detach(), 0.5 * q, atol=1e-6), "The values are not on the grid: round, clamp, times scale.")
    expect(y.requires_grad, "No gradient can flow back: detach the rounding error, and nothing else.")
    inside = torch.tensor([0.0, 1, 1, 1, 1, 0, 0])
    for_w, for_scale = torch.autograd.grad(y.sum(), (w, scale), allow_unused=True)
    expect(for_scale is not None, "The scale gets no gradient: only the rounding goes into detach(), not the scale.")
    expect(for_w is not None and for_w.any(), "The weights get no gradient: go around the rounding with detach().")
    expect(torch.allclose(for_w, inside),
           "The gradient of w must be 1 inside the grid and 0 where it clips: clamp before the rounding.")  # fmt: skip
    expected = torch.where(inside > 0, q - w.detach() / 0.5, q).sum()
    expect(torch.allclose(for_scale, expected, atol=1e-5),
           f"The gradient of the scale is {for_scale.item():.2f}, it should be {expected.item():.2f}: "
           "round(w / scale) - w / scale inside, the last code where clipped.")  # fmt: skip
    return "One detach, around the rounding alone, and autograd derives LSQ."
