"""Rounding with a gradient: grids to quantize to, and the straight-through estimator.

Rounding has a derivative of zero almost everywhere, so a network cannot be trained through it.
The *straight-through estimator* (STE, Bengio et al. 2013, https://arxiv.org/abs/1308.3432) goes around that: in
the forward pass a value is quantized and dequantized at once ("fake" quantized: a float that lies on the
low-bit grid); in the backward pass the gradient goes through as if nothing had happened, except where
the value was clipped, where it is zero (a weight beyond the end of the grid has no influence on the output).

        forward     q = clamp(round(x / scale) + zero_point, quant_min, quant_max)
                    y = (q - zero_point) * scale
        backward    dL/dx = dL/dy  where quant_min <= round(x / scale) + zero_point <= quant_max,  else 0

    fake_quantize, fake_quantize_float    the STE as a torch.autograd.Function, on integer and on float grids
    fake_quantize_learned                 the same with a gradient for the scale (LSQ)
    Target                                what we quantize to, by name: "int4", "E4M3", "MXFP4", "Q4_0" ...
    find_grid                             from a block of values to its scale and zero point

Every granularity is one case: a tensor is cut into blocks (all of it, one row, one group of a row,
one token), shape ``(n_blocks, values_per_block)``, and every block has its own scale.

The numerics are those of the reference, bit for bit (tests/test_fake_quant.py): torchao's ``IntxFakeQuantizer``
and ``torch.fake_quantize_per_channel_affine`` for integers, torchao's ``MXTensor`` and ``NVFP4Tensor`` for
microscaling, ``gguf.quants`` for the blocks of llama.cpp.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from . import QtutorError

# ------------------------------------------------------------------ the straight-through estimator


def _nearest(y: torch.Tensor, rounding: str, quant_min: int) -> torch.Tensor:
    """Round in place.  ``rounding`` says what happens to halves, and with which float32 operations."""
    if rounding == "even":  # as torch.round
        return y.round_()
    if rounding == "up":  # floor(y + 0.5), counted from the lowest code as ggml-quants.c does: (y + 8.5) - 8
        return y.add_(0.5 - quant_min).floor_().add_(quant_min)
    whole = y.abs().floor()  # "away" from zero, as C's roundf
    return (whole + (2 * (y.abs() - whole)).floor_()).mul_(y.sign())


def _in_one_kernel(x, scale, zero_point, quant_min: int, quant_max: int):
    """(y, mask of the values inside) by PyTorch's own operator, bit for bit what _FakeQuantize computes in five.

    On a GPU each elementwise operation is a trip through memory; on a CPU the five are faster than the one.
    """
    rows = x.reshape(-1, x.shape[-1])
    zeros = torch.zeros(len(rows), dtype=torch.int32, device=x.device) if zero_point is None else zero_point.int()
    y, inside = torch.ops.aten.fake_quantize_per_channel_affine_cachemask(
        rows, scale.flatten(), zeros.flatten(), 0, quant_min, quant_max)  # fmt: skip
    return y.view(x.shape), inside.view(x.shape)


class _FakeQuantize(torch.autograd.Function):
    """Integer fake quantization; ``zero_point`` may be None (symmetric)."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, inverse=None, rounding="even", straight=False):
        plain = inverse is None and rounding == "even" and not straight and x.dtype != torch.float64
        if x.is_cuda and plain and scale.shape == (*x.shape[:-1], 1) and not torch.compiler.is_compiling():
            ctx.straight = False
            y, inside = _in_one_kernel(x, scale, zero_point, quant_min, quant_max)
            ctx.save_for_backward(inside)
            return y
        # Multiply by the reciprocal, as torch and torchao do: x / scale differs in the last bit.
        q = _nearest(x * (1.0 / scale if inverse is None else inverse), rounding, quant_min)
        if zero_point is not None:
            q.add_(zero_point)
        ctx.straight = straight
        if ctx.needs_input_grad[0] and not straight:
            clipped = q.clamp(quant_min, quant_max)
            ctx.save_for_backward(clipped == q)  # one byte per value; two compares and an "and" would be three passes
            q = clipped
        else:
            q.clamp_(quant_min, quant_max)
        if zero_point is not None:
            q.sub_(zero_point)
        return q.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.straight:
            (inside,) = ctx.saved_tensors
            grad = torch.where(inside, grad, 0.0)
        return grad, *[None] * 7


class _FakeQuantizeFloat(torch.autograd.Function):
    """Float fake quantization: the grid is that of ``fmt``, scaled.  With ``inverse``: x * inverse, not x / scale."""

    @staticmethod
    def forward(ctx, x, scale, fmt, inverse=None):
        y = x.float() / scale if inverse is None else x.float() * inverse
        if ctx.needs_input_grad[0]:
            # Inside as for integers: what rounds to a number of the format, i.e. up to half a step beyond the largest.
            # (amax / (amax / max) can come out a hair above max, and the largest value must not lose its gradient.)
            half_step = 2.0 ** (fmt.max_exponent - fmt.mantissa_bits - 1)
            ctx.save_for_backward(y.abs() <= fmt.max + half_step)
        return (_round_float(y, fmt) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None, None


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


_TORCH_FLOAT8 = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


def _round_float(y: torch.Tensor, fmt) -> torch.Tensor:
    """Nearest value of ``fmt``, saturating; the two FP8 types through torch's own (much faster) casts."""
    dtype = _TORCH_FLOAT8.get(fmt.name)
    if dtype is not None:
        return y.clamp(-fmt.max, fmt.max).to(dtype).float()  # clamp: the cast to E5M2 overflows to inf
    return fmt.round(y)


def fake_quantize(x, scale, zero_point=None, quant_min: int = -128, quant_max: int = 127) -> torch.Tensor:
    """Quantize and dequantize ``x`` on an integer grid, with the straight-through gradient.

    Args:
        x: float32 or bfloat16 tensor of any shape.
        scale: number or tensor, float; the step of the grid, in units of ``x``.  Broadcast against
            ``x``; a last dimension of ``n`` against ``n * group_size`` columns means one scale per group.
        zero_point: None (symmetric) or integers of the same shape as ``scale``: the code that stands for 0.0.
        quant_min, quant_max: first and last code, e.g. -8 and 7 for signed 4 bits.

    Returns:
        Tensor of the shape and dtype of ``x``.  The arithmetic is float32 (codes up to 8 bits are exact).

    Raises:
        QtutorError: scale does not fit x, or the range of codes is empty.
    """
    if quant_min >= quant_max:
        raise QtutorError(f"quant_min ({quant_min}) must be smaller than quant_max ({quant_max}).")
    shape = x.shape
    scale = _like(scale, x)
    zero_point = None if zero_point is None else _like(zero_point, x)
    n_groups = scale.shape[-1] if scale.ndim else 1
    if scale.ndim == x.ndim and n_groups not in (1, shape[-1]):
        if shape[-1] % n_groups:
            raise QtutorError(f"{n_groups} scales per row cannot share {shape[-1]} columns evenly.")
        x, scale = x.unflatten(-1, (n_groups, -1)), scale.unsqueeze(-1)
        zero_point = zero_point if zero_point is None else zero_point.unsqueeze(-1)
    try:
        fits = torch.broadcast_shapes(x.shape, scale.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise QtutorError(f"A scale of shape {tuple(scale.shape)} does not broadcast to x of shape {tuple(shape)}.")
    return _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max).view(shape)


def fake_quantize_float(x, scale, fmt) -> torch.Tensor:
    """The same on the grid of a float format (``"E4M3"``, ``"E2M1"``, ... or a ``formats.FloatFormat``)."""
    return _FakeQuantizeFloat.apply(x, _like(scale, x), Target.of(fmt).fmt)


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

    Returns:
        Tensor of the shape and dtype of ``x``.

    Source: Esser et al. 2020, https://arxiv.org/abs/1902.08153; torch._fake_quantize_learnable_per_channel_affine.
    """
    return _FakeQuantizeLearned.apply(x, scale, quant_min, quant_max, factor)


def _like(value, x: torch.Tensor) -> torch.Tensor:
    """A float32 (float64 for float64 x) tensor on the device of x, with at least one dimension per dimension of x.

    (A tensor without dimensions would not promote bfloat16 to float32.)
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    value = torch.as_tensor(value, dtype=dtype, device=x.device)
    return value.reshape((1,) * x.ndim) if value.ndim == 0 else value


# ----------------------------------------------------------------------------------------- targets

_ALIASES = {"FP8": "E4M3", "FP6": "E3M2", "FP4": "E2M1"}
_MICROSCALED = {"MXFP8": "E4M3", "MXFP6": "E3M2", "MXFP4": "E2M1"}  # blocks of 32, power-of-two scales
_GGUF = {  # blocks of llama.cpp: block size, bits, first and last code, rounding, amax = code * scale
    "Q8_0": (32, 8, -127, 127, "away"),
    "Q5_0": (32, 5, -16, 15, "up"),
    "Q4_0": (32, 4, -8, 7, "up"),
    "TQ2_0": (256, 2, -1, 1, "away"),
}


class Target:
    """What we quantize to.

    Attributes: ``name``, ``bits`` (of a code), ``quant_min`` and ``quant_max`` (integers) or ``fmt`` (floats);
    ``rule``, how a scale is found ("amax", "absmean", "mx", "nvfp4", "gguf"); ``block``, the number of values that
    share a scale where the format fixes it; ``rounding`` of halves; ``straight``: no gradient is cut where it clips.
    """

    def __init__(self, name: str, bits: int, quant_min=None, quant_max=None, fmt=None, rule="amax", block=None,
                 rounding="even"):  # fmt: skip
        self.name, self.bits, self.quant_min, self.quant_max, self.fmt = name, bits, quant_min, quant_max, fmt
        self.rule, self.block, self.rounding = rule, block, rounding
        self.straight = rule == "absmean"  # two thirds of a layer can lie outside -1.5..1.5: BitNet lets all through

    def __repr__(self):
        return self.name

    @property
    def is_float(self) -> bool:
        return self.fmt is not None

    @classmethod
    def of(cls, target) -> Target:
        """From ``"int4"``, ``"E4M3"`` or ``"FP8"``, ``"MXFP4"``, ``"NVFP4"``, ``"ternary"``, ``"Q4_0"``, a format of
        qtutor.formats, or a Target.  Raises QtutorError for anything else, with the list."""
        if isinstance(target, cls):
            return target
        name = target if isinstance(target, str) else getattr(target, "name", str(target))
        integer = re.fullmatch(r"int([2-8])", name.lower())
        if integer:
            bits = int(integer[1])
            return cls(name.lower(), bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        upper = _ALIASES.get(name.upper(), name.upper())
        if upper == "TERNARY":
            return cls("ternary", 2, -1, 1, rule="absmean")
        if upper in _GGUF:
            block, bits, quant_min, quant_max, rounding = _GGUF[upper]
            return cls(upper, bits, quant_min, quant_max, rule="gguf", block=block, rounding=rounding)
        from .formats import E2M1, FORMATS

        if upper in _MICROSCALED:
            fmt = FORMATS[_MICROSCALED[upper]]
            return cls(upper, fmt.bits, fmt=fmt, rule="mx", block=32)
        if upper == "NVFP4":
            return cls(upper, 4, fmt=E2M1, rule="nvfp4", block=16)
        fmt = FORMATS.get(upper)
        if fmt is None or not hasattr(fmt, "exponent_bits") or upper == "E8M0":
            floats = [n for n, f in FORMATS.items() if hasattr(f, "exponent_bits") and n != "E8M0"]
            others = ["ternary", *_ALIASES, *_MICROSCALED, "NVFP4", *_GGUF]
            raise QtutorError(
                f"Cannot quantize to {name!r}: choose int2 to int8 or one of {', '.join([*floats, *others])}."
            )
        return cls(fmt.name, fmt.bits, fmt=fmt)


# ------------------------------------------------------------------------------------------- grids


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
        amax      see :func:`choose_qparams`.
        absmean   scale = mean of |x| (BitNet b1.58, https://arxiv.org/abs/2402.17764).
        mx        scale = 2 ** (floor(log2(amax)) - emax), as in the OCP MX specification v1.0, section 6.3; with
                  ``no_clipping`` the exponent is rounded up, so that amax / scale fits (torchao's RCEIL).
        nvfp4     an FP32 scale for the tensor, an E4M3 scale for each block: see formats.nvfp4.
        gguf      a 16-bit float, the value of the largest magnitude over the code at the end of the grid
                  (ggml-quants.c, quantize_row_*_ref).
    """
    target = Target.of(target)
    if target.rule == "amax":
        return Grid(*choose_qparams(*block_range(blocks), target, symmetric, no_clipping))
    if target.rule == "absmean":
        scale = blocks.abs().mean(dim=1, keepdim=True)
        return Grid(scale.clamp(min=torch.finfo(scale.dtype).smallest_normal))
    blocks = blocks.float()
    if target.rule == "gguf" and target.quant_min != -target.quant_max:  # Q5_0, Q4_0
        # The value of largest magnitude (the first of equals) takes the end that has one code more: its sign goes
        # into the scale.
        extreme = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
        return _gguf_grid(extreme / target.quant_min)
    lo, hi = block_range(blocks)
    amax = torch.maximum(-lo, hi)
    if target.rule == "gguf":  # Q8_0, TQ2_0
        return _gguf_grid(amax / target.quant_max)
    from .formats import E4M3, _power_of_two

    if target.rule == "mx":
        if no_clipping:
            mantissa, exponent = torch.frexp(amax / target.fmt.max)  # = mantissa * 2**exponent, mantissa in [0.5, 1)
            exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        else:
            exponent = torch.frexp(amax).exponent - 1 - target.fmt.max_exponent
        scale = _power_of_two(torch.where(amax > 0, exponent, -127).clamp(-127, 127))  # what E8M0 can hold
        return Grid(scale, parts=(scale.to(torch.float8_e8m0fnu),))
    whole = amax.max() / (E4M3.max * target.fmt.max)
    whole = torch.where(whole > 0, whole, 1.0).clamp(min=2.0**-120)  # as in formats.nvfp4
    stored = _round_float((amax / target.fmt.max / whole).clamp(min=E4M3.min_normal), E4M3)
    parts = (stored.to(torch.float8_e4m3fn), whole.reshape(1, 1))
    return Grid(stored * whole, inverse=(1.0 / whole) / stored, parts=parts)


def _gguf_grid(exact: torch.Tensor) -> Grid:
    """Codes are found with the exact scale and mean the stored one, which has 16 bits."""
    stored = exact.to(torch.float16)
    return Grid(stored.float(), inverse=torch.where(exact == 0, 0.0, 1.0 / exact), parts=(stored,))


@torch.no_grad()
def choose_qparams(lo, hi, target, symmetric: bool = True, no_clipping: bool = False):
    """Scale and zero_point for values between ``lo`` and ``hi`` (tensors of one value per block).

    symmetric
        ``scale = amax / ((quant_max - quant_min) / 2)``, zero_point None.  For int4 that is amax / 7.5: the grid
        is -8..7, so the largest positive value loses half a step to clipping (torchao's SYMMETRIC).
        With ``no_clipping`` the scale grows just enough for both ends (torchao's SYMMETRIC_NO_CLIPPING_ERR).
    affine (``symmetric=False``)
        the whole of [min(lo, 0), max(hi, 0)] on all codes; 0.0 stays exactly representable.
    float targets
        ``scale = amax / fmt.max``; always symmetric.

    Computed in the dtype of ``lo`` (so a bfloat16 model gets bfloat16 scales, as in torchao).
    """
    target = Target.of(target)
    zero = torch.zeros_like(lo)
    lo, hi = torch.minimum(lo, zero), torch.maximum(hi, zero)
    eps = torch.finfo(lo.dtype).smallest_normal  # an all-zero block must not divide by zero
    if target.is_float:
        return (torch.maximum(-lo, hi) / target.fmt.max).clamp(min=eps), None
    quant_min, quant_max = target.quant_min, target.quant_max
    if not symmetric:
        scale = ((hi - lo) / float(quant_max - quant_min)).clamp(min=eps)
        return scale, (quant_min - (lo / scale).round()).clamp(quant_min, quant_max)
    if no_clipping:
        scale = torch.maximum(lo / float(quant_min), hi / float(quant_max))
    else:
        scale = torch.maximum(-lo, hi) / (float(quant_max - quant_min) / 2)
    return scale.clamp(min=eps), None


def to_blocks(x: torch.Tensor, granularity: str, group_size: int | None = None) -> torch.Tensor:
    """View ``x`` as ``(n_blocks, values_per_block)``: the values in one row share one scale.

    granularity: ``"tensor"`` | ``"channel"`` (dimension 0, the output features of a weight) |
    ``"token"`` (all dimensions but the last) | ``"group"`` (``group_size`` neighbours along the last dimension).
    """
    if granularity == "tensor":
        return x.reshape(1, -1)
    if granularity == "channel":
        return x.reshape(x.shape[0], -1)
    if granularity == "token":
        return x.reshape(-1, x.shape[-1])
    if granularity != "group":
        raise QtutorError(f"Unknown granularity {granularity!r}: use 'tensor', 'channel', 'group' or 'token'.")
    if not group_size or x.shape[-1] % group_size:
        raise QtutorError(
            f"group_size {group_size} does not divide the last dimension ({x.shape[-1]}): choose one that does."
        )
    return x.reshape(-1, group_size)


def block_range(blocks: torch.Tensor):
    """Smallest and largest value of each row, each (n_blocks, 1).  (torch.aminmax is the slower way on a CPU.)"""
    return blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)


def on_grid(blocks: torch.Tensor, grid: Grid, target: Target) -> torch.Tensor:
    """Fake-quantize ``blocks`` (n_blocks, values per block) to ``grid``, with the straight-through gradient."""
    if target.is_float:
        return _FakeQuantizeFloat.apply(blocks, _like(grid.scale, blocks), target.fmt, grid.inverse)
    zero_point = None if grid.zero_point is None else _like(grid.zero_point, blocks)
    return _FakeQuantize.apply(blocks, _like(grid.scale, blocks), zero_point, target.quant_min, target.quant_max,
                               grid.inverse, target.rounding, target.straight)  # fmt: skip
