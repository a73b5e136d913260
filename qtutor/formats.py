"""Low-precision number formats: which numbers exist, how one is rounded to them, and what a scale is for.

A format of b bits has at most 2**b numbers; the sorted list of them is its *grid*.  Quantizing means moving each value
to the nearest grid point.  Grids are tiny and centred on zero, tensors are not, so every tensor (or row, or group) is
first divided by a *scale* that makes it fit:

    codes = round(x / scale)          x_hat = codes * scale

Floating-point formats ("ExMy": x exponent bits, y mantissa bits) have a grid that is fine near zero and coarse far
away, so their relative error is about constant.  Integers are evenly spaced, so their absolute error is.  The more
values share one scale, the cheaper it is and the more an outlier costs.

Which scale.  The course has one rule, torchao's SYMMETRIC: half the length of the grid covers the largest magnitude,

    scale = amax / ((max - min) / 2)

For a float format that is ``amax / max``.  An integer grid has one code more below zero than above: INT4 reaches from
-8 to 7, half its length is 7.5, and a largest value that is positive is clipped from 7.5 to 7, by half a step, so that
all others get the finer grid.  The option ``no_clipping`` takes the smallest scale at which both ends fit (torchao's
SYMMETRIC_NO_CLIPPING_ERR).  Other texts take ``amax / max``, here ``amax / 7``, and never use the lowest code.

Which way round.  In this package ``scale`` multiplies a code, as in torchao and llama.cpp.  Transformer Engine's
``scale`` multiplies the value before the cast, and its ``scale_inv`` is what we call scale.

Saturation.  Rounding sends values beyond the grid, infinities included, to the largest grid value; casts of libraries
differ.  NaN has no place on most grids and is refused; so is infinity where a scale is computed from the data.

Sources: FP8 Formats for Deep Learning, arXiv 2209.05433 (E4M3, E5M2); OCP Microscaling Formats (MX) v1.0 (E2M3, E3M2,
E2M1); NVIDIA, "Introducing NVFP4".  Tested bit for bit against ml_dtypes and torchao.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from . import QtutorError

GRANULARITIES = ("tensor", "channel", "token", "group")


@dataclass(frozen=True)
class FloatFormat:
    """A sign bit, exponent bits and mantissa bits; the grid is symmetric about zero.

    ``bias``: value = 1.mantissa * 2**(exponent - bias), or 0.mantissa * 2**(1 - bias).  ``specials``: "none" (every
    code is a number), "nan" (E4M3: only all ones is NaN) or "ieee" (E5M2: the top exponent means infinity and NaN).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "none"

    bits = property(lambda self: 1 + self.exponent_bits + self.mantissa_bits)  # of a value, sign included

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number (the MX specification's emax)."""
        return 2**self.exponent_bits - 1 - self.bias - (self.specials == "ieee")

    @property
    def max(self) -> float:
        """Largest finite number: 448 for E4M3, 57344 for E5M2, 6 for E2M1."""
        ones = 2 - 2.0**-self.mantissa_bits
        if self.specials == "nan":  # the all-ones code is taken
            ones -= 2.0**-self.mantissa_bits
        return ones * 2.0**self.max_exponent

    min = property(lambda self: -self.max)
    min_normal = property(lambda self: 2.0 ** (1 - self.bias))  # the smallest positive one with all its mantissa bits
    min_subnormal = property(lambda self: 2.0 ** (1 - self.bias - self.mantissa_bits))  # the smallest positive one

    @cached_property
    def _table(self) -> torch.Tensor:
        """The value of each code, float32, shape (2**bits,); NaN and infinity where the format has them."""
        codes = torch.arange(2 ** (self.bits - 1))
        exponent, mantissa = codes >> self.mantissa_bits, codes & (2**self.mantissa_bits - 1)
        normal = (1 + mantissa / 2**self.mantissa_bits) * torch.exp2((exponent - self.bias).double())
        values = torch.where(exponent == 0, mantissa * self.min_subnormal, normal).float()
        if self.specials == "nan":
            values[-1] = math.nan
        if self.specials == "ieee":
            values[exponent == 2**self.exponent_bits - 1] = math.nan
            values[(2**self.exponent_bits - 1) << self.mantissa_bits] = math.inf
        return torch.cat([values, -values])

    def grid(self) -> torch.Tensor:
        """Return every finite number once (0.0 for both zeros), sorted, float32."""
        return torch.unique(self._table[self._table.isfinite()] + 0.0)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest numbers of the format, ties to even, saturating; float32, the shape of ``x``."""
        x = x if x.dtype == torch.float64 else x.float()  # rounding float64 to float32 first would round twice
        a = x.abs().clamp(max=self.max)
        # Between two powers of two the grid is even, with this step; below min_normal the step stays.
        exponent = torch.frexp(a).exponent - 1
        step = _power_of_two(exponent.clamp(min=1 - self.bias) - self.mantissa_bits)
        # torch.round rounds halves to even, and an even multiple of step is an even mantissa.
        return torch.copysign((torch.round(a / step) * step).clamp(max=self.max), x).float()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of the rounded values, uint8: sign, exponent and mantissa from the high bits down."""
        q = self.round(_checked(x))
        code = torch.searchsorted(self._table[: 2 ** (self.bits - 1)].to(q.device), q.abs())
        return (code + (torch.signbit(q).long() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of uint8 codes, float32; NaN and infinity for the codes that mean them."""
        return self._table.to(codes.device)[codes.long()]


@dataclass(frozen=True)
class IntFormat:
    """A two's complement integer of ``bits`` bits: from ``min``, -2**(bits-1), to ``max``, 2**(bits-1) - 1."""

    name: str
    bits: int
    min = property(lambda self: -(2 ** (self.bits - 1)))
    max = property(lambda self: 2 ** (self.bits - 1) - 1)

    def grid(self) -> torch.Tensor:
        """Return all the integers, sorted, float32."""
        return torch.arange(self.min, self.max + 1, dtype=torch.float32)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest integers, ties to even, saturating; float32."""
        return x.float().round().clamp(self.min, self.max)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the two's complement codes in the low ``bits`` bits, uint8."""
        return (self.round(_checked(x)).to(torch.int32) & (2**self.bits - 1)).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of uint8 codes, float32."""
        codes = codes.to(torch.int32)
        return torch.where(codes > self.max, codes - 2**self.bits, codes).float()


E4M3 = FloatFormat("E4M3", 4, 3, bias=7, specials="nan")
E5M2 = FloatFormat("E5M2", 5, 2, bias=15, specials="ieee")
E2M3 = FloatFormat("E2M3", 2, 3, bias=1)
E3M2 = FloatFormat("E3M2", 3, 2, bias=3)
E2M1 = FloatFormat("E2M1", 2, 1, bias=1)
INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (IntFormat(f"INT{b}", b) for b in range(2, 9))
FORMATS = {f.name: f for f in (E4M3, E5M2, E2M3, E3M2, E2M1, INT2, INT3, INT4, INT5, INT6, INT7, INT8)}
# Wider floats, to compare with: values are rounded to them, but their codes are too many for a table.
WIDE = {name: FloatFormat(name, bits, mantissa_bits, 2 ** (bits - 1) - 1, "ieee") for name, bits, mantissa_bits in
        (("FP32", 8, 23), ("TF32", 8, 10), ("BF16", 8, 7), ("FP16", 5, 10))}  # fmt: skip


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2.0**exponent for integers from -149 to 127, float32, exact on every device (through float64)."""
    return torch.exp2(exponent.double()).float()


def _checked(x: torch.Tensor, to_scale: bool = False) -> torch.Tensor:
    """Return ``x`` without its graph (rounding has no useful gradient: see ste) where it can be quantized."""
    x = torch.as_tensor(x).detach()
    if torch.isnan(x).any():
        raise QtutorError("The tensor contains NaN, which cannot be quantized: find out where it comes from first.")
    if to_scale and (x.numel() == 0 or torch.isinf(x).any()):
        raise QtutorError("The tensor is empty or contains infinity, and no scale makes that fit: look at it first.")
    return x


def get(fmt):
    """Return a format from itself or its name ("E4M3", "int4", ...); raises QtutorError where there is none."""
    if not isinstance(fmt, str):
        return fmt
    if fmt.upper() not in FORMATS:
        raise QtutorError(f"There is no format {fmt!r}: choose one of {', '.join(FORMATS)}.")
    return FORMATS[fmt.upper()]


def round_to(x: torch.Tensor, fmt) -> torch.Tensor:
    """Return the grid points of ``fmt`` (or its name) nearest to ``x``, float32: ties to even, saturating, no scale."""
    return get(fmt).round(_checked(x))


def to_blocks(x: torch.Tensor, granularity: str, group_size: int | None = None) -> torch.Tensor:
    """View ``x`` as (n_blocks, values per block): the values in one row share one scale.

    ``granularity``: "tensor"; "channel": one output feature, a row of a weight of shape (out, in); "token": a position
    of an activation, all dimensions but the last; "group": ``group_size`` neighbours along the last dimension.
    """
    if granularity not in GRANULARITIES:
        raise QtutorError(f"There is no granularity {granularity!r}: choose one of {', '.join(GRANULARITIES)}.")
    x = x if x.ndim > 1 else x.reshape(1, -1)
    columns = x.shape[-1]
    if granularity == "group":
        if not group_size or group_size < 1 or columns % group_size:
            raise QtutorError(f"A last dimension of {columns} cannot be cut into groups of {group_size}: choose a "
                              "group_size that divides it, or pad the tensor.")  # fmt: skip
        return x.reshape(-1, group_size)
    return x.reshape(-1, {"tensor": x.numel(), "channel": x[0].numel(), "token": columns}[granularity])


def block_range(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each row, each (n_blocks, 1).  (torch.aminmax is the slower way on a CPU.)"""
    return blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)


@torch.no_grad()
def choose_qparams(low, high, fmt, symmetric: bool = True, no_clipping: bool = False):
    """Return (scale, zero point or None) for values between ``low`` and ``high`` (tensors, a value for each block).

    Args:
        symmetric: ``scale = amax / ((max - min) / 2)``, and 0.0 is code 0.  Otherwise (integers only) the range,
            widened to hold zero, is spread over all codes: ``x_hat = (code - zero_point) * scale``; 0.0 stays
            exactly representable.
        no_clipping: the smallest symmetric scale at which ``low`` and ``high`` both fit.

    Computed in the dtype of ``low``, as torchao does: a bfloat16 model gets bfloat16 scales.  A block of zeros has the
    smallest normal number for a scale.
    """
    fmt = get(fmt)
    low, high = low.clamp(max=0), high.clamp(min=0)
    tiny, length = torch.finfo(low.dtype).smallest_normal, float(fmt.max - fmt.min)
    if not symmetric:
        if not isinstance(fmt, IntFormat):
            raise QtutorError(f"{fmt.name} is symmetric about zero: symmetric=False is for integers.")
        spread = high - low
        scale = torch.where(spread.isinf(), high / length - low / length, spread / length).clamp(min=tiny)
        return scale, (fmt.min - (low / scale).round()).clamp(fmt.min, fmt.max)
    if no_clipping:
        scale = torch.maximum(low / float(fmt.min), high / float(fmt.max))
    else:
        scale = torch.maximum(-low, high) / (length / 2)
    return scale.clamp(min=tiny), None


def mx_scale(amax: torch.Tensor, fmt: FloatFormat, no_clipping: bool = False) -> torch.Tensor:
    """Return the power of two that the values of an MX block share, float32: ``2**(floor(log2(amax)) - emax)``.

    That is the rule of the OCP MX specification v1.0, section 6.3 (emax: the exponent of the format's largest number).
    It rounds down, so the largest values of a block can exceed the format and saturate; with ``no_clipping`` the
    exponent of ``amax / max`` is rounded up instead (torchao's RCEIL).
    """
    if no_clipping:
        mantissa, exponent = torch.frexp(amax / fmt.max)  # = mantissa * 2**exponent, mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    else:
        exponent = torch.frexp(amax).exponent - 1 - fmt.max_exponent
    scale = _power_of_two(torch.where(amax > 0, exponent, -127).clamp(-127, 127))  # what 8 bits of exponent, E8M0, hold
    return torch.where(amax.isfinite(), scale, torch.nan)  # the exponent of infinity would be some small number


def nvfp4_scales(amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return NVFP4's scales: of each block (E4M3 numbers) and of the tensor (FP32), float32; the product counts.  The
    tensor's is ``amax / (448 * 6)``, so that the block scales fill E4M3's range."""
    whole = amax.max() / (E4M3.max * E2M1.max)
    whole = torch.where(whole == 0, 1.0, whole).clamp(min=2.0**-120)  # smaller, and its reciprocal overflows
    # Tiny blocks take E4M3's smallest normal number: a scale that is zero would make them NaN.
    return E4M3.round((amax / E2M1.max / whole).clamp(min=E4M3.min_normal)), whole


@dataclass
class Quantized:
    """A quantized tensor: codes, the scales they go with, and what they cost.

    ``codes``: uint8, (n_blocks, values per block); ``scale`` and ``zero_point``: (n_blocks, 1) or one number;
    ``shape``: of the tensor; ``scale_bits``: in which each scale is stored; ``global_scale``: NVFP4's one for all.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    fmt: FloatFormat | IntFormat
    shape: torch.Size
    scale_bits: int = 16
    global_scale: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """Return ``(value of the code - zero_point) * scale``, float32, in the original shape."""
        values = self.fmt.decode(self.codes)
        values = values if self.zero_point is None else values - self.zero_point
        scale = self.scale if self.global_scale is None else self.scale * self.global_scale
        return (values * scale).reshape(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits per value with the scales (and zero points) counted."""
        per_block = self.scale_bits + (self.fmt.bits if self.zero_point is not None else 0)
        extra = 32 if self.global_scale is not None else 0
        return self.fmt.bits + (per_block * self.scale.numel() + extra) / self.codes.numel()


def quantize(x: torch.Tensor, fmt, granularity: str = "tensor", group_size: int | None = None, symmetric: bool = True,
             scale: torch.Tensor | None = None) -> Quantized:  # fmt: skip
    """Quantize a tensor; ``.dequantize()`` of what is returned has the shape of ``x``, float32.

    Args:
        fmt: a format or its name.  granularity, group_size: see :func:`to_blocks`.  symmetric: :func:`choose_qparams`.
        scale: your own scale (to clip outliers, say): one number, or one for each block.
    """
    fmt, x = get(fmt), _checked(x, to_scale=scale is None)
    blocks, zero_point = to_blocks(x.float(), granularity, group_size), None
    if scale is None:
        scale, zero_point = choose_qparams(*block_range(blocks), fmt, symmetric)
    else:
        scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device).reshape(-1, 1)
        if len(scale) not in (1, len(blocks)):
            raise QtutorError(f"{len(scale)} scales do not fit {len(blocks)} blocks: give one number, or one a block.")
        if not (scale > 0).all():
            raise QtutorError("A scale must be positive: look for zeros, negative numbers and NaN in yours.")
    # For an integer grid the zero point shifts after rounding, so that 0.0 stays exactly representable.
    scaled = blocks / scale if zero_point is None else torch.round(blocks / scale) + zero_point
    return Quantized(fmt.encode(scaled), scale, zero_point, fmt, x.shape)


def quantize_dequantize(x: torch.Tensor, fmt, granularity: str = "tensor", group_size: int | None = None,
                        symmetric: bool = True, scale: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Return what is left of ``x`` after quantization, float32."""
    return quantize(x, fmt, granularity, group_size, symmetric, scale).dequantize()


def mxfp8(x: torch.Tensor, fmt=E4M3) -> Quantized:
    """Quantize to MXFP8: blocks of 32 FP8 values share a power of two (:func:`mx_scale`), 8.25 bits per value.  ``x``:
    tensor (..., columns), columns a multiple of 32.  ``fmt``: E4M3 or E5M2; E2M3 and E3M2 give MXFP6."""
    x, fmt = _checked(x, to_scale=True), get(fmt)
    blocks = to_blocks(x.float(), "group", 32)
    scale = mx_scale(blocks.abs().amax(1, keepdim=True), fmt)
    return Quantized(fmt.encode(blocks / scale), scale, None, fmt, x.shape, scale_bits=8)


def mxfp4(x: torch.Tensor) -> Quantized:
    """Quantize to MXFP4: as :func:`mxfp8` with E2M1 values, 4.25 bits per value."""
    return mxfp8(x, E2M1)


def nvfp4(x: torch.Tensor) -> Quantized:
    """Quantize to NVFP4: blocks of 16 E2M1 values share an E4M3 scale, all blocks one FP32 scale.

    A finer, non-power-of-two scale for half as many values is what it has over MXFP4, for 4.5 bits instead of 4.25.
    ``x``: tensor (..., columns), columns a multiple of 16.
    """
    x = _checked(x, to_scale=True)
    blocks = to_blocks(x.float(), "group", 16)
    scale, whole = nvfp4_scales(blocks.abs().amax(1, keepdim=True))
    codes = E2M1.encode(blocks * ((1.0 / whole) / scale))  # reciprocal first, as the GPU kernels do
    return Quantized(codes, scale, None, E2M1, x.shape, scale_bits=8, global_scale=whole)


def sqnr_db(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in decibels: ``10 log10(sum x**2 / sum (x - x_hat)**2)``."""
    noise = (x.double() - x_hat.double()).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(x.double().square().sum() / noise))
