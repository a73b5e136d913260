"""Fake quantization in one GPU kernel: scale, round, clip and rescale while a block of values is in registers.

Fake quantization is a handful of operations for each value, and a GPU does them for nothing: what takes time is moving
the values.  Written with PyTorch's operators each step (amax, divide, round, clamp, compare, multiply) reads and writes
the whole tensor.  Here a program of the GPU loads a few blocks, finds their scales, and writes the result: one read and
one write forward (2N bytes for N bytes of values), and two reads and one write backward (3N): which values were clipped
is found again from the values, so that no mask is kept.

:mod:`qtutor.ste` says what is computed, in PyTorch; this module computes the same, bit for bit, for CUDA tensors of
float32 and bfloat16 (tests/test_fused.py, on a GPU).  Under torch.compile ste's own operators are used, which the
compiler fuses.  Source of the language: Triton, https://triton-lang.org.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

LONGEST = 65_536  # values of a block: what the registers of one program hold
GIVEN, SYMMETRIC, NO_CLIPPING, AFFINE, AMAX, MX = range(6)  # how the scale is found


@triton.jit
def _power_of_two(exponent):
    """2.0**exponent for int32 exponents from -127 to 127, float32 (2**-127 is subnormal)."""
    bits = tl.where(exponent < -126, 1 << 22, (exponent + 127) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _clamp(x, low, high):
    """NaN stays NaN, as in torch.clamp."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_float_grid(y, MAX: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """Nearest number of a float format, ties to even, saturating; its smallest normal number is 2**LEAST."""
    a = _clamp(tl.abs(y), 0.0, MAX)
    exponent = tl.maximum((a.to(tl.int32, bitcast=True) >> 23) - 127, LEAST) - MANTISSA
    a = _clamp(libdevice.rint(a * _power_of_two(-exponent)) * _power_of_two(exponent), 0.0, MAX)
    return libdevice.copysign(a, y)


@triton.jit
def _by(x, divisor):
    """``x / divisor`` for a constant, as PyTorch has it on a GPU: times the reciprocal."""
    return x * tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.full(x.shape, divisor, tl.float32))


@triton.jit
def _find(x, inside, dtype: tl.constexpr, RULE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
          MAX: tl.constexpr, TOP: tl.constexpr):  # fmt: skip
    """Scale and zero point of each row of ``x``, rounded to ``dtype`` wherever ste.choose_qparams does."""
    tiny: tl.constexpr = 1.1754943508222875e-38  # smallest normal number of float32 and of bfloat16
    x = tl.where(inside, x, 0.0)
    broken = tl.max((x != x).to(tl.int32), 1, keep_dims=True) > 0
    low = tl.where(broken, float("nan"), tl.min(x, 1, keep_dims=True))
    high = tl.where(broken, float("nan"), tl.max(x, 1, keep_dims=True))
    amax = tl.maximum(-low, high, propagate_nan=tl.PropagateNan.ALL)
    zero = tl.zeros_like(low)
    if RULE == 5:
        exponent = (amax.to(tl.int32, bitcast=True) >> 23) - 127 - TOP
        scale = _power_of_two(tl.where(amax > 0, tl.minimum(tl.maximum(exponent, -127), 127), -127))
        return tl.where(broken | (amax == float("inf")), float("nan"), scale), zero
    if RULE == 1:
        scale = _by(amax, (QMAX - QMIN) / 2.0)
    elif RULE == 2:
        scale = tl.maximum(_by(low, 1.0 * QMIN), _by(high, 1.0 * QMAX), propagate_nan=tl.PropagateNan.ALL)
    elif RULE == 3:
        spread = (high - low).to(dtype).to(tl.float32)
        apart = _by(high, 1.0 * (QMAX - QMIN)).to(dtype).to(tl.float32) - _by(low, 1.0 * (QMAX - QMIN)).to(dtype)
        scale = tl.where(tl.abs(spread) == float("inf"), apart, _by(spread, 1.0 * (QMAX - QMIN)))
    else:
        scale = _by(amax, MAX)
    scale = tl.maximum(scale.to(dtype).to(tl.float32), tiny, propagate_nan=tl.PropagateNan.ALL)
    if RULE == 3:
        steps = libdevice.rint(tl.div_rn(low, scale).to(dtype).to(tl.float32))
        zero = _clamp((QMIN - steps).to(dtype).to(tl.float32), QMIN, QMAX)
    return scale, zero


@triton.jit
def _forward(x_ptr, y_ptr, scale_ptr, zero_ptr, rows, columns, RULE: tl.constexpr, FLOAT: tl.constexpr,
             QMIN: tl.constexpr, QMAX: tl.constexpr, MAX: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr,
             LEAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = tl.arange(0, C)[None, :]
    inside = (row < rows) & (column < columns)
    at = row * columns + column
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if RULE == 0:
        scale = tl.load(scale_ptr + row, row < rows, 1.0)
        zero = tl.load(zero_ptr + row, row < rows, 0.0)
    else:
        scale, zero = _find(x, inside, x_ptr.dtype.element_ty, RULE, QMIN, QMAX, MAX, TOP)
        tl.store(scale_ptr + row, scale, row < rows)
        tl.store(zero_ptr + row, zero, row < rows)
    if FLOAT:
        y = _to_float_grid(tl.div_rn(x, scale + tl.zeros_like(x)), MAX, MANTISSA, LEAST)
    else:  # times the reciprocal, as torch and torchao do
        q = libdevice.rint(x * tl.div_rn(tl.full((R, 1), 1.0, tl.float32), scale)) + zero
        y = _clamp(q, QMIN, QMAX) - zero
    tl.store(y_ptr + at, (y * scale).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(x_ptr, grad_ptr, out_ptr, scale_ptr, zero_ptr, rows, columns, FLOAT: tl.constexpr, QMIN: tl.constexpr,
              QMAX: tl.constexpr, EDGE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = tl.arange(0, C)[None, :]
    inside = (row < rows) & (column < columns)
    at = row * columns + column
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, inside, 0.0)
    scale = tl.load(scale_ptr + row, row < rows, 1.0)
    if FLOAT:
        kept = tl.abs(tl.div_rn(x, scale + tl.zeros_like(x))) <= EDGE
    else:
        zero = tl.load(zero_ptr + row, row < rows, 0.0)
        q = libdevice.rint(x * tl.div_rn(tl.full((R, 1), 1.0, tl.float32), scale)) + zero
        kept = (q >= QMIN) & (q <= QMAX)
    tl.store(out_ptr + at, tl.where(kept, grad, 0.0), inside)


def _launch(rows: int, columns: int) -> dict:
    """A program takes about 4,096 values: some whole blocks, or one long one with more warps."""
    width = triton.next_power_of_2(columns)
    height = max(1, 4096 // width)
    warps = min(32, max(4, width * height // 1024))
    return {"R": height, "C": width, "num_warps": warps}


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, rule, grid):
        rows, columns = x.shape
        y = torch.empty_like(x)
        if scale is None:
            scale, zero_point = torch.empty(2, rows, 1, dtype=torch.float32, device=x.device)
        zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
        how = _launch(rows, columns)
        with torch.cuda.device(x.device):
            _forward[(triton.cdiv(rows, how["R"]),)](x, y, scale, zero_point, rows, columns, RULE=rule, **grid, **how)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid, ctx.how = grid, how
        return y

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        rows, columns = x.shape
        grad, out, grid = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format), ctx.grid
        edge = grid["MAX"] + 2.0 ** (grid["TOP"] - grid["MANTISSA"] - 1)  # half a step beyond the largest number
        with torch.cuda.device(x.device):
            _backward[(triton.cdiv(rows, ctx.how["R"]),)](
                x, grad, out, scale, zero_point, rows, columns, FLOAT=grid["FLOAT"], QMIN=grid["QMIN"],
                QMAX=grid["QMAX"], EDGE=edge, **ctx.how)  # fmt: skip
        return out, None, None, None, None


def fits(blocks: torch.Tensor) -> bool:
    """Whether :func:`fake_quantize` takes ``blocks``: contiguous float32 or bfloat16 on a GPU, blocks not too long."""
    kinds = (torch.float32, torch.bfloat16)
    return blocks.is_cuda and blocks.dtype in kinds and blocks.is_contiguous() and 0 < blocks.shape[1] <= LONGEST


def rule_of(target, symmetric: bool, no_clipping: bool) -> int | None:
    """How the scale of a ste.Target is found, as a rule of this module; None where it does not have it."""
    if target.rule == "mx":
        return None if no_clipping else MX
    if target.rule != "amax":
        return None
    if target.is_float:
        return AMAX
    return AFFINE if not symmetric else NO_CLIPPING if no_clipping else SYMMETRIC


def fake_quantize(blocks: torch.Tensor, target, rule: int, scale=None, zero_point=None) -> torch.Tensor:
    """Fake-quantize each row of ``blocks`` with a scale of its own, with the straight-through gradient.

    Args:
        blocks: (n_blocks, values per block) for which :func:`fits` is true.
        target: a ste.Target: integers by quant_min and quant_max, floats by fmt.
        rule: SYMMETRIC, NO_CLIPPING, AFFINE (integers), AMAX or MX (floats) find the scale; GIVEN takes it.
        scale, zero_point: float32 (n_blocks, 1), for GIVEN.

    Returns:
        Tensor of the shape and dtype of ``blocks``.
    """
    fmt, grid = target.fmt, dict(FLOAT=target.is_float, QMIN=0, QMAX=0, MAX=0.0, TOP=0, MANTISSA=0, LEAST=0)
    if target.is_float:
        grid |= dict(MAX=fmt.max, TOP=fmt.max_exponent, MANTISSA=fmt.mantissa_bits, LEAST=1 - fmt.bias)
    else:
        grid |= dict(QMIN=int(target.quant_min), QMAX=int(target.quant_max))
    return _Fused.apply(blocks, scale, zero_point, rule, grid)
