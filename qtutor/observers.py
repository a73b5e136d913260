"""Observers: how the *static* range of a quantizer is found from calibration data.

Weights are known in advance.  Activations differ from batch to batch; a static quantizer fixes their range once, from
some batches that stand for all.  An observer is fed blocks (n_blocks, values per block) and gives ``scale`` and
``zero_point`` of each.  What to do with outliers has several answers: here are four.
"""

from __future__ import annotations

import torch

from . import QtutorError
from .formats import block_range, choose_qparams
from .ste import Grid, Target, on_grid


class MinMaxObserver:
    """Static range: the smallest and the largest value ever seen.  One outlier sets the scale for good."""

    def __init__(self):
        self.lo = self.hi = None

    def observe(self, blocks: torch.Tensor) -> None:
        lo, hi = block_range(blocks.detach())
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def qparams(self, target, symmetric: bool = True, no_clipping: bool = False):
        """(scale, zero_point), each (n_blocks, 1).  Raises QtutorError before any observation, or for NaN."""
        if self.lo is None:
            raise QtutorError("This static quantizer has seen no data: run batches inside `with calibrate(model):`.")
        lo, hi = self.range(target, symmetric, no_clipping)
        if not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):
            raise QtutorError("The calibration data held NaN or infinite values: find where they come from first.")
        return choose_qparams(lo, hi, Target.of(target).fmt, symmetric, no_clipping)

    def range(self, target, symmetric, no_clipping):
        """(smallest, largest) value that the grid is to cover, each of shape (n_blocks, 1)."""
        return self.lo, self.hi


class MovingAverageObserver(MinMaxObserver):
    """Static range: exponential moving average of each batch's min and max (torch's MovingAverageMinMaxObserver)."""

    def __init__(self, averaging_constant: float = 0.01):
        super().__init__()
        self.averaging_constant = averaging_constant

    def observe(self, blocks):
        lo, hi = block_range(blocks.detach())
        if self.lo is not None:
            lo = self.lo + self.averaging_constant * (lo - self.lo)
            hi = self.hi + self.averaging_constant * (hi - self.hi)
        self.lo, self.hi = lo, hi


class _SampleObserver(MinMaxObserver):
    """Keeps values: every k-th, at most ``max_samples`` per batch, plus the exact extremes."""

    def __init__(self, max_samples: int = 1 << 16):
        super().__init__()
        self.max_samples, self.samples = max_samples, []

    def observe(self, blocks):
        super().observe(blocks)
        step = -(-blocks.shape[1] // self.max_samples)
        self.samples.append(blocks.detach()[:, ::step].float().clone())


class PercentileObserver(_SampleObserver):
    """Static range that cuts the tails: [100 - p, p] percentiles of the values seen (NVIDIA, arXiv:2004.09602)."""

    def __init__(self, percentile: float = 99.9, max_samples: int = 1 << 16):
        super().__init__(max_samples)
        if not 50 < percentile <= 100:
            raise QtutorError(f"percentile is {percentile}: give a number above 50 and up to 100, such as 99.9.")
        self.percentile = percentile

    def range(self, target, symmetric, no_clipping):
        values = torch.cat(self.samples, dim=1).sort(dim=1).values
        last = values.shape[1] - 1
        cut = round((1 - self.percentile / 100) * last)
        return tuple(values[:, i : i + 1].to(self.lo.dtype) for i in (cut, last - cut))


class MSEObserver(_SampleObserver):
    """Static range with the least mean squared quantization error, of ``steps`` shrunken copies of [min, max].
    Clipping a few large values makes the grid finer for all the others: at few bits that pays."""

    def __init__(self, steps: int = 80, smallest: float = 0.2, max_samples: int = 1 << 14):
        super().__init__(max_samples)
        self.steps, self.smallest = steps, smallest

    @torch.no_grad()
    def range(self, target, symmetric, no_clipping):
        values, target = torch.cat(self.samples, dim=1), Target.of(target)
        best, shrink = (torch.full_like(self.lo, start, dtype=torch.float32) for start in (torch.inf, 1.0))
        for factor in torch.linspace(1.0, self.smallest, self.steps).tolist():
            grid = Grid(*choose_qparams(self.lo * factor, self.hi * factor, target.fmt, symmetric, no_clipping))
            error = (on_grid(values, grid, target) - values).square().mean(dim=1, keepdim=True)
            better = error < best
            best, shrink = torch.where(better, error, best), shrink.masked_fill(better, factor)
        return self.lo * shrink.to(self.lo.dtype), self.hi * shrink.to(self.hi.dtype)
