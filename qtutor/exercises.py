"""The checks behind the exercises of the notebooks.

Each check looks at the reader's answer and returns None when it is right, or one sentence that helps on.
The solution and a list of typical wrong answers are registered with it: the tests try them all.
"""

from __future__ import annotations

from .lesson import exercise

# ------------------------------------------------------------- notebook 05: fake quantization


@exercise("05.ste_gradient", wrong=[[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1], 3],
          solution=[0, 1, 1, 1, 0])  # fmt: skip
def _ste_gradient(answer):
    if not isinstance(answer, (list, tuple)) or len(answer) != 5:
        return "Give a list of five numbers, one for each input."
    codes, right = [-3, -1, 1, 1, 2], [0, 1, 1, 1, 0]
    for i, (given, expected) in enumerate(zip(answer, right, strict=True)):
        if given != expected:
            return (f"Look at input {i} again: divided by the scale and rounded it is {codes[i]}; "
                    "is there such a code among -2, -1, 0, 1?")  # fmt: skip
    return None


@exercise("05.bits_per_weight", wrong=[3, 3.25, 3 + 16 / 64, 22, 3 + 19 / 32, "3"], solution=3 + (16 + 3) / 64)
def _bits_per_weight(answer):
    if not isinstance(answer, (int, float)):
        return "Give a number of bits."
    if abs(answer - (3 + 19 / 64)) > 1e-3:
        return "Each weight has its own 3 bits, and 64 weights share 16 bits of scale and 3 bits of zero point."
    return None


def _smallest_scale_solution(x, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return max(x.max().item() / high, x.min().item() / low)


@exercise("05.smallest_scale", solution=_smallest_scale_solution, wrong=[
    lambda x, bits: x.abs().max().item() / (2 ** (bits - 1) - 1),      # ignores the extra negative code
    lambda x, bits: x.abs().max().item() / (2 ** (bits - 1) - 0.5),    # clips the largest positive value
    lambda x, bits: x.abs().max().item() / 2 ** (bits - 1),
    lambda x, bits: None,
])  # fmt: skip
def _smallest_scale(answer):
    import torch

    if not callable(answer):
        return "Give the function itself: smallest_scale, without brackets."
    for bits in (2, 4, 8):
        for x in (torch.tensor([-1.0, 0.2, 0.9]), torch.tensor([-0.3, 0.1, 2.0]), torch.tensor([-5.0, 0.0, 0.1])):
            expected, given = _smallest_scale_solution(x, bits), answer(x.clone(), bits)
            if given is None or given is ...:
                return None if given is ... else "The function returned nothing."
            if float(given) < expected * (1 - 1e-5):
                return f"With scale {float(given):.4f} a value of {x.tolist()} lies beyond the int{bits} grid."
            if float(given) > expected * (1 + 1e-5):
                return (f"For {x.tolist()} at int{bits} a smaller scale than {float(given):.4f} still fits: "
                        "the negative end has one more code than the positive end.")  # fmt: skip
    return None


def _ternary_solution(w):
    scale = w.abs().mean()
    y = (w / scale).round().clamp(-1, 1) * scale
    return w + (y - w).detach()


def _ternary_without_ste(w):
    scale = w.abs().mean()
    return (w / scale).round().clamp(-1, 1) * scale


@exercise("05.ternary", solution=_ternary_solution, wrong=[
    _ternary_without_ste, lambda w: w, lambda w: w.sign(),
    lambda w: w + (w.sign() * w.abs().max() - w).detach(),             # the scale of the largest weight
])  # fmt: skip
def _ternary(answer):
    import torch

    if not callable(answer):
        return "Give the function itself: ternary, without brackets."
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = answer(w)
    if not isinstance(y, torch.Tensor) or y.shape != w.shape:
        return "The function must return a tensor of the shape of w."
    expected = _ternary_solution(w.detach())
    if not torch.allclose(y, expected, atol=1e-6):
        return (f"The values differ: yours has {len(y.detach().unique())} different ones, "
                "it should have -1, 0 and +1 times the mean of |w|.")  # fmt: skip
    if not y.requires_grad:
        return "No gradient can flow back: let w itself take part in what you return."
    y.sum().backward()
    if not torch.equal(w.grad, torch.ones_like(w)):
        return "The values are right, but the gradient must be 1 for each weight: detach everything but w."
    return None
