"""Tensors to quantize, and how two quantizers are compared: what the tests of quantizers share."""

import logging

import torch
from torch import nn

for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


def randn(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::97] *= 8  # outliers
    x.view(-1)[5:9] = 0.0
    return x.to(dtype)


def hard_values(rows=64, columns=512, seed=0):
    """Weights at scales from subnormal to large, rows of zeros, ties, and blocks with +amax and -amax."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-6, 4, rows)[:, None]
    x[3] = 0.0
    x[4, :256] = 0.0
    x[5, 7], x[5, 9] = -9.0, 9.0  # equal magnitudes: the first counts
    x[6, 9], x[6, 7] = -9.0, 9.0
    x[7] = torch.arange(columns) / 4 - 64  # ties of every grid
    x[8] = torch.arange(columns) % 33 - 16.0
    return x


ODD = ("zeros", "minus zeros", "NaN", "infinity", "minus infinity", "least", "subnormal", "tiny", "one huge",
       "float16's end", "float32's end")  # fmt: skip


def odd_values(kind: str, dtype=torch.float32, columns=256):
    """One row (1, columns) of values that no model should hold and some do; ``kind`` is one of ODD."""
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(6))
    least = 2.0**-149 if dtype == torch.float32 else 2.0**-133
    factors = {"zeros": 0.0, "minus zeros": -0.0, "subnormal": 1e-39, "tiny": 1e-37, "float16's end": 65504.0,
               "float32's end": 3.3e38}  # fmt: skip
    single = {"NaN": torch.nan, "infinity": torch.inf, "minus infinity": -torch.inf, "one huge": 1e30}
    if kind in single:
        x[0, 3] = single[kind]
    else:
        x = x.sign() * least if kind == "least" else x.clamp(-1, 1) * factors[kind]
    return x.to(dtype)


def with_grad(function, x, seed=9):
    """Output and gradient of `function` at x for a random upstream gradient."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(randn(*y.shape, seed=seed).to(y.dtype))
    return y.detach(), x.grad


def assert_same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b), f"max difference {(a.float() - b.float()).abs().max()}"


class Tiny(nn.Module):
    def __init__(self, width=64, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(width, 96, bias=bias), nn.GELU(), nn.Linear(96, width))
        self.lm_head = nn.Linear(width, 10)

    def forward(self, x):
        return self.lm_head(self.body(x))
