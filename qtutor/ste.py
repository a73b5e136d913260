"""Rounding with a gradient: grids to quantize to, and the straight-through estimator.

Rounding has a derivative of zero almost everywhere, so a network cannot be trained through it.  The *straight-through
estimator* (STE, Bengio et al. 2013, https://arxiv.org/abs/1308.3432) goes around that: in the forward pass a value is
quantized and dequantized at once ("fake" quantized: a float that lies on the low-bit grid); in the backward pass the
gradient goes through as if nothing had happened, except where the value was clipped, where it is zero (a weight beyond
the end of the grid has no influence on the output).

        forward     q = clamp(round(x / scale) + zero_point, quant_min, quant_max)
                    y = (q - zero_point) * scale
        backward    dL/dx = dL/dy  where quant_min <= round(x / scale) + zero_point <= quant_max,  else 0

    Target                  what we quantize to, by name: "int4", "E4M3", "MXFP4", "Q4_0" ...
    find_grid               from a block of values to its scale and zero point
    on_grid, on_own_grid    the STE: blocks on a grid that is given, or on the one that find_grid finds
    fake_quantize           the same for a tensor of any shape and integers
    fake_quantize_learned   with a gradient for the scale, too (LSQ)

Every granularity is one case: a tensor is cut into blocks (all of it, one row, one group of a row, one token; see
formats.to_blocks), shape (n_blocks, values per block), and every block has its own scale.

The numerics are those of the reference, bit for bit (tests/test_ste.py): torchao's ``IntxFakeQuantizer`` and
``torch.fake_quantize_per_channel_affine`` for integers, torchao's ``MXTensor`` and ``NVFP4Tensor`` for microscaling,
``gguf.quants`` for the blocks of llama.cpp.  NaN and infinity never become a number.  Finite values become infinite or
NaN only as there, where a scale is beyond its format (llama.cpp's 16 bits: packed.bake refuses such weights); what is
too small for a scale becomes small or zero, also where torchao halves, saturates or divides by zero (below 1e-36).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import QtutorError, formats
from .formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT2, INT4, INT5, INT8, FloatFormat


@dataclass(frozen=True)
class Target:
    """What we quantize to.

    ``quant_min``, ``quant_max``: the ends of the grid, which an integer target may draw closer than its format's.
    ``rule``: how a scale is found, see :func:`find_grid`.  ``block``: values that share a scale, where the format fixes
    it.  ``rounding``: what happens to halves, and with which float32 operations.
    """

    name: str
    fmt: FloatFormat | formats.IntFormat
    quant_min: float
    quant_max: float
    rule: str = "amax"
    block: int | None = None
    rounding: str = "even"

    def __str__(self):
        return self.name

    bits = property(lambda self: self.fmt.bits)  # of a code
    is_float = property(lambda self: isinstance(self.fmt, FloatFormat))

    @property
    def straight(self) -> bool:
        """No gradient is cut: two thirds of a layer can lie outside -1.5..1.5, and BitNet lets all of it through."""
        return self.rule == "absmean"

    @classmethod
    def of(cls, target) -> Target:
        """From a name ("int4", "FP8" = "E4M3", "MXFP4", "ternary", "Q4_0" ...), a format of :mod:`qtutor.formats`, or
        a Target.  Raises QtutorError for anything else, with the list."""
        if isinstance(target, cls):
            return target
        name = str(getattr(target, "name", target)).upper()
        if ALIASES.get(name, name) not in TARGETS:
            raise QtutorError(f"Cannot quantize to {target!r}: choose from {', '.join([*ALIASES, *TARGETS])}.")
        return TARGETS[ALIASES.get(name, name)]


def _whole(name: str, fmt, **how) -> Target:
    return Target(name, fmt, fmt.min, fmt.max, **how)


ALIASES = {"FP8": "E4M3", "FP6": "E3M2", "FP4": "E2M1"}
TARGETS = {target.name.upper(): target for target in (
    *(_whole(f"int{bits}", formats.get(f"INT{bits}")) for bits in range(2, 9)),
    *(_whole(fmt.name, fmt) for fmt in (E4M3, E5M2, E2M3, E3M2, E2M1)),
    Target("ternary", INT2, -1, 1, "absmean"),
    # microscaling: blocks with a power of two, or with an E4M3 number, for a scale
    _whole("MXFP8", E4M3, rule="mx", block=32),
    _whole("MXFP6", E3M2, rule="mx", block=32),
    _whole("MXFP4", E2M1, rule="mx", block=32),
    _whole("NVFP4", E2M1, rule="nvfp4", block=16),
    # llama.cpp's blocks
    Target("Q8_0", INT8, -127, 127, "gguf", 32, "away"),
    Target("Q5_0", INT5, -16, 15, "gguf", 32, "up"),
    Target("Q4_0", INT4, -8, 7, "gguf", 32, "up"),
    Target("TQ2_0", INT2, -1, 1, "gguf", 256, "away"),
)}  # fmt: skip


class Grid(NamedTuple):
    """Where the points of each block lie: ``value = (code - zero_point) * scale``; all of shape (n_blocks, 1).

    ``inverse``: what to multiply with before rounding where that is not exactly ``1 / scale`` (llama.cpp divides by
    the scale before it is rounded to 16 bits).  ``parts``: what is stored for ``scale``, in its own dtype.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    parts: tuple = ()


@torch.no_grad()
def find_grid(blocks: torch.Tensor, target, symmetric: bool = True, no_clipping: bool = False) -> Grid:
    """The grid of each row of ``blocks`` (n_blocks, values per block), from the values themselves.

    By ``target.rule``:
        amax      see formats.choose_qparams.
        absmean   scale = mean of |x| (BitNet b1.58, https://arxiv.org/abs/2402.17764).
        mx        a power of two: see formats.mx_scale.
        nvfp4     an FP32 scale for the tensor, an E4M3 scale for each block: see formats.nvfp4_scales.
        gguf      a 16-bit float, the value of the largest magnitude over the code at the end of the grid
                  (ggml-quants.c, quantize_row_*_ref).
    """
    target = Target.of(target)
    if target.rule == "amax":
        return Grid(*formats.choose_qparams(*formats.block_range(blocks), target.fmt, symmetric, no_clipping))
    if target.rule == "absmean":
        scale = blocks.abs().mean(dim=1, keepdim=True)
        return Grid(scale.clamp(min=torch.finfo(scale.dtype).smallest_normal))
    blocks = blocks.float()
    if target.rule == "gguf" and target.quant_min != -target.quant_max:  # Q5_0, Q4_0
        # The value of largest magnitude (the first of equals) takes the end that has one code more: its sign goes
        # into the scale.
        return _gguf_grid(blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) / target.quant_min)
    low, high = formats.block_range(blocks)
    amax = torch.maximum(-low, high)
    if target.rule == "gguf":  # Q8_0, TQ2_0
        return _gguf_grid(amax / target.quant_max)
    if target.rule == "mx":
        scale = formats.mx_scale(amax, target.fmt, no_clipping)
        return Grid(scale, parts=(scale.to(torch.float8_e8m0fnu),))
    stored, whole = formats.nvfp4_scales(amax)
    parts = (stored.to(torch.float8_e4m3fn), whole.reshape(1, 1))
    return Grid(stored * whole, inverse=(1.0 / whole) / stored, parts=parts)


def _gguf_grid(exact: torch.Tensor) -> Grid:
    """Codes are found with the exact scale and mean the stored one, which has 16 bits and is 0 where 1 / exact is not
    finite: such a block is all zeros."""
    stored, inverse = exact.to(torch.float16), 1.0 / exact
    return Grid(stored.float(), inverse=inverse.masked_fill_(inverse.isinf(), 0.0), parts=(stored,))


def on_grid(blocks: torch.Tensor, grid: Grid, target: Target) -> torch.Tensor:
    """Fake-quantize ``blocks`` (n_blocks, values per block) to ``grid``, with the straight-through gradient."""
    scale, zero_point = (None if t is None else _like(t, blocks) for t in grid[:2])
    whole = grid.inverse is None and scale.shape == (len(blocks), 1) and target.rule in ("amax", "mx")
    if whole and (fused := _fused(blocks)):
        return fused.fake_quantize(blocks, target, fused.GIVEN, scale, zero_point)
    return by_operators(blocks, Grid(scale, zero_point, grid.inverse), target)


def on_own_grid(blocks: torch.Tensor, target: Target, symmetric: bool = True, no_clipping: bool = False):
    """Fake-quantize ``blocks`` to the grid that :func:`find_grid` finds; the scale is a constant to autograd."""
    if (fused := _fused(blocks)) and (rule := fused.rule_of(target, symmetric, no_clipping)) is not None:
        return fused.fake_quantize(blocks, target, rule)
    return on_grid(blocks, find_grid(blocks.detach(), target, symmetric, no_clipping), target)


def by_operators(blocks: torch.Tensor, grid: Grid, target: Target) -> torch.Tensor:
    """What :func:`on_grid` computes, in PyTorch's operators: on every device, and under torch.compile."""
    if torch.compiler.is_compiling():  # torch 2.11 compiles a custom autograd.Function to a gradient of zero
        y, inside = _rounded(blocks.detach(), *grid[:3], target, masked=not target.straight)
        through = blocks if target.straight else torch.where(inside, blocks, 0.0)
        return y + (through - through.detach())  # y + 0, with the gradient of through
    return _FakeQuantize.apply(blocks, *grid[:3], target)


def _fused(blocks: torch.Tensor):
    """:mod:`qtutor.kernels.fused`, where it takes ``blocks``; None elsewhere."""
    if not blocks.is_cuda or torch.compiler.is_compiling():
        return None
    from .kernels import fused

    return fused if fused.fits(blocks) else None


def _rounded(x, scale, zero_point, inverse, target: Target, masked: bool):
    """(values on the grid, mask of those that lay inside it, or None where it is not ``masked``)."""
    if target.is_float:
        y = x.float() / scale if inverse is None else x.float() * inverse
        # Inside as for integers: what rounds to a number of the format, i.e. up to half a step beyond the largest.
        # (amax / (amax / max) can come out a hair above max, and the largest value must not lose its gradient.)
        half_step = 2.0 ** (target.fmt.max_exponent - target.fmt.mantissa_bits - 1)
        inside = y.abs() <= target.fmt.max + half_step if masked else None
        q = _round_float(y, target.fmt)
    else:
        # Multiply by the reciprocal, as torch and torchao do: x / scale differs in the last bit.
        y = _nearest(x * (1.0 / scale if inverse is None else inverse), target.rounding, target.quant_min)
        y = y if zero_point is None else y.add_(zero_point)
        q = y.clamp(target.quant_min, target.quant_max)
        inside = q == y if masked else None  # one byte per value; two compares and an "and" would be three passes
        q = q if zero_point is None else q.sub_(zero_point)
    return q.mul_(scale).to(x.dtype), inside


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, inverse, target):
        ctx.straight = target.straight
        masked = ctx.needs_input_grad[0] and not ctx.straight
        y, inside = _rounded(x, scale, zero_point, inverse, target, masked)
        if masked:
            ctx.save_for_backward(inside)
        return y

    @staticmethod
    def backward(ctx, grad):
        if not ctx.straight:
            (inside,) = ctx.saved_tensors
            grad = torch.where(inside, grad, 0.0)
        return grad, None, None, None, None


def _nearest(y: torch.Tensor, rounding: str, quant_min: int) -> torch.Tensor:
    """Round in place."""
    if rounding == "even":  # as torch.round
        return y.round_()
    if rounding == "up":  # floor(y + 0.5), counted from the lowest code as ggml-quants.c does: (y + 8.5) - 8
        return y.add_(0.5 - quant_min).floor_().add_(quant_min)
    whole = y.abs().floor()  # "away" from zero, as C's roundf
    return (whole + (2 * (y.abs() - whole)).floor_()).mul_(y.sign())


_TORCH_FLOAT8 = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


def _round_float(y: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    """Nearest value of ``fmt``, saturating; the two FP8 types through torch's own (much faster) casts."""
    dtype = _TORCH_FLOAT8.get(fmt.name)
    if dtype is not None:
        return y.clamp(-fmt.max, fmt.max).to(dtype).float()  # clamp: the cast to E5M2 overflows to inf
    return fmt.round(y)


def _like(value, x: torch.Tensor) -> torch.Tensor:
    """``value`` as a float32 (float64 for float64 x) tensor on the device of x, with at least one dimension.  (A tensor
    without dimensions would not promote bfloat16 to float32.)"""
    value = torch.as_tensor(value, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return value if value.ndim else value[None]


def fake_quantize(x, scale, zero_point=None, quant_min: int = -128, quant_max: int = 127) -> torch.Tensor:
    """Quantize and dequantize ``x`` on an integer grid, with the straight-through gradient; shape and dtype stay.

    Args:
        x: float32 or bfloat16 tensor of any shape.
        scale: number or tensor, float; the step of the grid, in units of ``x``.  Broadcast against ``x``; a last
            dimension of ``n`` against ``n * group_size`` columns means one scale per group.
        zero_point: None (symmetric) or integers, one or as many as ``scale``: the code that stands for 0.0.
        quant_min, quant_max: first and last code, e.g. -8 and 7 for signed 4 bits.

    The arithmetic is float32 (codes up to 8 bits are exact).
    """
    if quant_min >= quant_max:
        raise QtutorError(f"quant_min ({quant_min}) must be smaller than quant_max ({quant_max}).")
    scale = _like(scale, x)
    rows, columns, per_row = x.shape[:-1], x.shape[-1] if x.ndim else 1, scale.shape[-1]
    try:
        if columns % per_row:
            raise RuntimeError
        scale = scale.expand(*rows, per_row)
    except RuntimeError:
        raise QtutorError(f"A scale of shape {tuple(scale.shape)} does not fit x of shape {tuple(x.shape)}.") from None
    if zero_point is not None:
        zero_point = _like(zero_point, x).expand(scale.shape).reshape(-1, 1)
    target = Target("integers", INT8, quant_min, quant_max)
    return on_grid(x.reshape(scale.numel(), -1), Grid(scale.reshape(-1, 1), zero_point), target).view(x.shape)


class _FakeQuantizeLearned(torch.autograd.Function):
    """Symmetric integers, and what a change of the scale would do to the output (LSQ, equation 3)."""

    @staticmethod
    def forward(ctx, x, scale, quant_min, quant_max, factor):
        y = x * (1.0 / scale)
        q = y.round()
        clipped = q.clamp(quant_min, quant_max)
        inside = clipped == q
        ctx.factor = factor
        # d(q * scale) / d scale = q + scale * dq/dscale, and dq/dscale = -x / scale**2 by the straight-through rule
        ctx.save_for_backward(inside, torch.where(inside, q - y, clipped).to(x.dtype), scale)
        return (clipped * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        inside, by_scale, scale = ctx.saved_tensors
        for_scale = (grad * by_scale).float().sum_to_size(scale.shape) * ctx.factor
        return torch.where(inside, grad, 0.0), for_scale.to(scale.dtype), None, None, None


def fake_quantize_learned(x, scale, quant_min: int, quant_max: int, factor: float = 1.0) -> torch.Tensor:
    """Fake-quantize on symmetric integers with a gradient for ``scale``, too: learned step size quantization (LSQ).

    The gradient of the scale, summed over the values that share it, is ``q - x / scale`` where a value is inside the
    grid and the code at the end of the grid where it is clipped: rounding errors pull the scale to and fro, clipped
    values pull it up.

    Args:
        x: float tensor of any shape.  scale: broadcasts against ``x``; usually an nn.Parameter.
        quant_min, quant_max: first and last code.
        factor: multiplies the gradient of the scale; the paper's is 1 / sqrt(values per scale * quant_max), which
            brings the scale's steps to the size of the weights' steps.

    Source: Esser et al. 2020, https://arxiv.org/abs/1902.08153; torch._fake_quantize_learnable_per_channel_affine.
    """
    return _FakeQuantizeLearned.apply(x, scale, quant_min, quant_max, factor)
