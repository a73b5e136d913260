"""Low-precision number formats: which numbers exist, how one is rounded to them, and what a scale is for.

A format of b bits has at most 2**b numbers; the sorted list of them is its *grid*.  Quantizing means moving
each value to the nearest grid point.  Grids are tiny and centred on zero, tensors are not, so every tensor
(or row, or group) is first divided by a *scale* that makes it fit:

    scale = amax / format.max          codes = round(x / scale)          x_hat = codes * scale

Floating-point formats ("ExMy": x exponent bits, y mantissa bits) have a grid that is fine near zero and
coarse far away, so their relative error is about constant.  Integers are evenly spaced, so their absolute
error is.  The more values share one scale, the cheaper it is and the more an outlier costs.

Sources: FP8 Formats for Deep Learning, arXiv 2209.05433 (E4M3, E5M2); OCP Microscaling Formats (MX)
specification v1.0 (E2M3, E3M2, E2M1, E8M0, MXFP8, MXFP4); NVIDIA, "Introducing NVFP4" and the Transformer
Engine documentation (NVFP4); ONNX, "Float stored in 8 bits".  Tested bit for bit against ml_dtypes and torchao.

Saturation.  Rounding sends values beyond the grid, infinities included, to the largest grid value: that is what
FP8 training and quantization want, and the ONNX Cast operator's default.  (Other casts differ: ml_dtypes gives
NaN for E4M3 and infinity for E5M2, and so does torch for E5M2.)  NaN has no place on most grids and is refused;
where a scale is computed from the data, infinity is refused too, because no scale makes it fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from . import QtutorError

GRANULARITIES = ("tensor", "channel", "group")


@dataclass(frozen=True)
class FloatFormat:
    """A sign bit, exponent bits and mantissa bits; the grid is symmetric about zero.

    Args:
        name: as in the specifications, e.g. "E4M3".
        exponent_bits, mantissa_bits: field widths in bits.
        bias: exponent bias; value = 1.mantissa * 2**(exponent - bias), or 0.mantissa * 2**(1 - bias).
        specials: "none" (every code is a number), "nan" (E4M3: only all ones is NaN),
            or "ieee" (E5M2: the top exponent means infinity and NaN).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "none"

    @property
    def bits(self) -> int:
        """Bits per value, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

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

    @property
    def min_normal(self) -> float:
        """Smallest positive number with all its mantissa bits."""
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @cached_property
    def _table(self) -> torch.Tensor:
        """The value of each code, float32, shape (2**bits,); NaN and infinity where the format has them."""
        values = []
        for code in range(2 ** (self.bits - 1)):
            exponent, mantissa = divmod(code, 2**self.mantissa_bits)
            if exponent == 0:
                value = mantissa * self.min_subnormal
            else:
                value = (1 + mantissa / 2**self.mantissa_bits) * 2.0 ** (exponent - self.bias)
            if self.specials == "ieee" and exponent == 2**self.exponent_bits - 1:
                value = math.inf if mantissa == 0 else math.nan
            if self.specials == "nan" and code == 2 ** (self.bits - 1) - 1:
                value = math.nan
            values.append(value)
        positive = torch.tensor(values, dtype=torch.float32)
        return torch.cat([positive, -positive])

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
        a = q.abs()
        exponent = (torch.frexp(a).exponent - 1).clamp(min=1 - self.bias)
        exponent = torch.where(a > 0, exponent, 1 - self.bias)  # frexp calls the exponent of 0.0 zero
        mantissa = (a / _power_of_two(exponent - self.mantissa_bits)).to(torch.int32)
        # A normal number has mantissa >= 2**mantissa_bits: the leading 1 carries into the exponent field.
        code = ((exponent + self.bias - 1) << self.mantissa_bits) + mantissa
        return (code + (torch.signbit(q).to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of uint8 codes, float32; NaN and infinity for the codes that mean them."""
        return self._table.to(codes.device)[_checked_codes(codes, self.bits).long()]


@dataclass(frozen=True)
class ScaleFormat:
    """E8M0: eight exponent bits and nothing else, the powers of two from 2**-127 to 2**127; code 255 is NaN."""

    name: str = "E8M0"
    exponent_bits: int = 8
    mantissa_bits: int = 0
    bias: int = 127
    bits: int = 8
    max: float = 2.0**127
    min_normal: float = 2.0**-127
    min_subnormal: float = 2.0**-127

    def grid(self) -> torch.Tensor:
        """Return the 255 powers of two, sorted, float32."""
        return torch.tensor([2.0**e for e in range(-127, 128)], dtype=torch.float64).float()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of the nearest powers of two (ties to the even code), uint8; zero becomes 2**-127.

        Raises:
            QtutorError: a value is negative, which no scale is.
        """
        x = _checked(x).double().clamp(max=self.max)
        if (x < 0).any():
            raise QtutorError("E8M0 has no sign: give it scales that are not negative.")
        mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1), so 0.75 is the middle
        code = exponent - 1 + self.bias
        code = code + ((mantissa > 0.75) | ((mantissa == 0.75) & (code % 2 == 1))).int()
        return torch.where(x > 0, code, 0).clamp(0, 254).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of uint8 codes, float32."""
        return torch.where(codes == 255, torch.nan, _power_of_two(codes.to(torch.int32) - self.bias))

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest powers of two, float32."""
        return self.decode(self.encode(x))


@dataclass(frozen=True)
class IntFormat:
    """A two's complement integer of ``bits`` bits: codes from -2**(bits-1) to 2**(bits-1) - 1."""

    name: str
    bits: int

    @property
    def min(self) -> int:
        """First code."""
        return -(2 ** (self.bits - 1))

    @property
    def max(self) -> int:
        """Last code."""
        return 2 ** (self.bits - 1) - 1

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
        codes = _checked_codes(codes, self.bits).to(torch.int32)
        return torch.where(codes > self.max, codes - 2**self.bits, codes).float()


E4M3 = FloatFormat("E4M3", 4, 3, bias=7, specials="nan")
E5M2 = FloatFormat("E5M2", 5, 2, bias=15, specials="ieee")
E2M3 = FloatFormat("E2M3", 2, 3, bias=1)
E3M2 = FloatFormat("E3M2", 3, 2, bias=3)
E2M1 = FloatFormat("E2M1", 2, 1, bias=1)
E8M0 = ScaleFormat()
INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (IntFormat(f"INT{b}", b) for b in range(2, 9))
FORMATS = {f.name: f for f in (E4M3, E5M2, E2M3, E3M2, E2M1, E8M0, INT2, INT3, INT4, INT5, INT6, INT7, INT8)}


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2.0**exponent for integers from -149 to 127, float32, exact on every device (through float64)."""
    return torch.exp2(exponent.double()).float()


def _checked(x: torch.Tensor, to_scale: bool = False) -> torch.Tensor:
    """Return ``x`` without its graph (rounding has no useful gradient: see fake_quant) where it can be quantized."""
    x = torch.as_tensor(x).detach()
    if torch.isnan(x).any():
        raise QtutorError("The tensor contains NaN, which cannot be quantized: find out where it comes from first.")
    if to_scale and torch.isinf(x).any():
        raise QtutorError("The tensor contains infinity, and no scale makes that fit: clamp the tensor first.")
    if to_scale and x.numel() == 0:
        raise QtutorError(f"A tensor of shape {tuple(x.shape)} has no values to choose a scale for: give it some.")
    return x


def _checked_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < 2**bits):
        raise QtutorError(f"A code of {bits} bits lies between 0 and {2**bits - 1}: these codes are of another format.")
    return codes


def get(fmt):
    """Return a format from itself or its name ("E4M3", "int4", ...).

    Raises:
        QtutorError: no format has this name.
    """
    if not isinstance(fmt, str):
        return fmt
    if fmt.upper() not in FORMATS:
        raise QtutorError(f"There is no format {fmt!r}: choose one of {', '.join(FORMATS)}.")
    return FORMATS[fmt.upper()]


def round_to(x: torch.Tensor, fmt) -> torch.Tensor:
    """Return the grid points of ``fmt`` nearest to ``x``: ties to even, saturating, no scale.

    Args:
        x: tensor of any shape and floating dtype.  fmt: a format or its name.

    Returns:
        float32 tensor of the same shape.

    Raises:
        QtutorError: ``x`` contains NaN.
    """
    return get(fmt).round(_checked(x))


# --- scaling ------------------------------------------------------------------------------------------


def _blocks(x: torch.Tensor, granularity: str, group_size: int | None) -> torch.Tensor:
    """View ``x`` with the values that share a scale along the last dimension: (..., values per scale)."""
    if granularity == "tensor":
        return x.reshape(1, -1)
    if granularity == "channel":
        return x.reshape(-1, x.shape[-1] if x.ndim else 1)
    if granularity != "group":
        raise QtutorError(f"There is no granularity {granularity!r}: choose one of {', '.join(GRANULARITIES)}.")
    if not group_size or group_size < 1:
        raise QtutorError(f"A group size of {group_size} makes no groups: give group_size=32, for example.")
    columns = x.shape[-1] if x.ndim else 1
    if columns % group_size:
        raise QtutorError(
            f"A last dimension of {columns} cannot be cut into groups of {group_size}: "
            "choose a group size that divides it, or pad the tensor."
        )
    return x.reshape(*x.shape[:-1], columns // group_size, group_size)


def scale_for(x: torch.Tensor, fmt, granularity: str = "tensor", group_size: int | None = None, symmetric: bool = True):
    """Return the scale (and zero point) that make each tensor, channel or group fit the format.

    Args:
        x: weights or activations, shape (..., columns); a channel is a row, a group ``group_size`` neighbours in it.
        fmt: a format or its name.
        granularity: "tensor", "channel" or "group".
        symmetric: ``scale = amax / fmt.max`` and no zero point; otherwise (integers only) the range from the
            smallest to the largest value, widened to hold zero, is spread over all codes and
            ``x_hat = (code - zero_point) * scale``.

    Returns:
        ``scale`` if symmetric, else ``(scale, zero_point)``: float32, shape (1, 1), (rows, 1) or (..., groups, 1).
        Where all values are zero the scale is 1.

    Raises:
        QtutorError: NaN or infinity in ``x``, no values in it, a group size that does not divide the last
            dimension, or an affine float format.
    """
    fmt = get(fmt)
    blocks = _blocks(_checked(x, to_scale=True).float(), granularity, group_size)
    if symmetric:
        scale = blocks.abs().amax(-1, keepdim=True) / fmt.max
        return torch.where(scale > 0, scale, 1.0)
    if not isinstance(fmt, IntFormat):
        raise QtutorError(f"{fmt.name} is symmetric about zero: affine quantization (symmetric=False) is for integers.")
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = high / (fmt.max - fmt.min) - low / (fmt.max - fmt.min)  # high - low could overflow
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (fmt.min - torch.round(low / scale)).clamp(fmt.min, fmt.max)


@dataclass
class Quantized:
    """A quantized tensor: codes, the scales they go with, and what they cost.

    Attributes:
        codes: uint8, the shape of the blocks (..., values per scale).
        scale: float32, shape (..., 1); zero_point: the same shape, or None.
        fmt: the format of the codes.  shape: of the original tensor.
        scale_bits: bits in which each scale is stored (16 unless the scheme says otherwise).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    fmt: object
    shape: torch.Size
    group_size: int | None = None
    scale_bits: int = 16
    global_scale: torch.Tensor | None = field(default=None)

    @property
    def values(self) -> torch.Tensor:
        """Grid points before scaling, float32, the shape of ``codes``."""
        return self.fmt.decode(self.codes)

    def dequantize(self) -> torch.Tensor:
        """Return ``(values - zero_point) * scale``, float32, in the original shape."""
        values = self.values if self.zero_point is None else self.values - self.zero_point
        scale = self.scale if self.global_scale is None else self.scale * self.global_scale
        return (values * scale).reshape(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits per value with the scales (and zero points) counted."""
        per_block = self.scale_bits + (self.fmt.bits if self.zero_point is not None else 0)
        extra = 32 if self.global_scale is not None else 0
        return self.fmt.bits + (per_block * self.scale.numel() + extra) / self.codes.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, scales and zero points."""
        return math.ceil(self.bits_per_weight * self.codes.numel() / 8)


def quantize(x: torch.Tensor, fmt, granularity: str = "tensor", group_size: int | None = None, symmetric: bool = True,
             scale: torch.Tensor | None = None) -> Quantized:  # fmt: skip
    """Quantize a tensor.

    Args:
        x, fmt, granularity, group_size, symmetric: see :func:`scale_for`.
        scale: your own scale instead of amax's (to clip outliers, say); broadcast against the blocks.

    Returns:
        :class:`Quantized`; ``.dequantize()`` has the shape of ``x``, float32.

    Raises:
        QtutorError: as :func:`scale_for`, or a scale that is not positive or does not broadcast.
    """
    fmt, x = get(fmt), _checked(x)
    zero_point = None
    if scale is None:
        scale = scale_for(x, fmt, granularity, group_size, symmetric)
        if not symmetric:
            scale, zero_point = scale
    else:
        scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
        scale = scale.reshape(1, 1) if scale.ndim == 0 else scale
        if not (scale > 0).all():
            raise QtutorError("A scale must be positive: look for zeros, negative numbers and NaN in yours.")
    blocks = _blocks(x.float(), granularity, group_size)
    try:
        scale.broadcast_to((*blocks.shape[:-1], 1))
    except RuntimeError:
        raise QtutorError(
            f"A scale of shape {tuple(scale.shape)} does not fit blocks of shape {tuple(blocks.shape)}: "
            f"give one number, or shape {(*blocks.shape[:-1], 1)}."
        ) from None
    # For an integer grid the zero point shifts after rounding, so that 0.0 stays exactly representable.
    scaled = blocks / scale if zero_point is None else torch.round(blocks / scale) + zero_point
    return Quantized(fmt.encode(scaled), scale, zero_point, fmt, x.shape, group_size)


def quantize_dequantize(x: torch.Tensor, fmt, granularity: str = "tensor", group_size: int | None = None,
                        symmetric: bool = True, scale: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Return what is left of ``x`` after quantization: ``quantize(...).dequantize()``, float32."""
    return quantize(x, fmt, granularity, group_size, symmetric, scale).dequantize()


def _microscaled(x: torch.Tensor, fmt: FloatFormat, block: int) -> Quantized:
    x = _checked(x, to_scale=True)
    blocks = _blocks(x.float(), "group", block)
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(amax).exponent - 1 - fmt.max_exponent  # floor(log2(amax)) - emax
    scale = _power_of_two(torch.where(amax > 0, exponent, -127).clamp(-127, 127))  # what E8M0 can hold
    return Quantized(fmt.encode(blocks / scale), scale, None, fmt, x.shape, block, scale_bits=8)


def mxfp8(x: torch.Tensor, fmt=E4M3) -> Quantized:
    """Quantize to MXFP8: blocks of 32 FP8 values share a power of two, 8.25 bits per value (OCP MX v1.0).

    The shared scale is ``2**(floor(log2(amax)) - emax)`` (section 6.3 of the specification; emax: the exponent of
    the format's largest number).  It is rounded down, so the largest values of a block can exceed the format and
    saturate.

    Args:
        x: tensor (..., columns), columns a multiple of 32.  fmt: E4M3 or E5M2; E2M3 and E3M2 give MXFP6.

    Returns:
        :class:`Quantized` with float32 scales of shape (..., columns / 32, 1).

    Raises:
        QtutorError: NaN or infinity in ``x``, or a last dimension that is no multiple of 32.
    """
    return _microscaled(x, get(fmt), 32)


def mxfp4(x: torch.Tensor) -> Quantized:
    """Quantize to MXFP4: blocks of 32 E2M1 values share a power of two, 4.25 bits per value (OCP MX v1.0).

    Shapes, rule for the scale and errors: as :func:`mxfp8`.
    """
    return _microscaled(x, E2M1, 32)


def nvfp4(x: torch.Tensor) -> Quantized:
    """Quantize to NVFP4: blocks of 16 E2M1 values share an E4M3 scale, all blocks one FP32 scale.

    The FP32 scale is ``amax / (448 * 6)``, so that the block scales fill E4M3's range.  A finer, non-power-of-two
    scale for half as many values is what it has over MXFP4, for 4.5 bits instead of 4.25.

    Args:
        x: tensor (..., columns), columns a multiple of 16.

    Returns:
        :class:`Quantized` with float32 ``scale`` (E4M3 numbers) of shape (..., columns / 16, 1) and ``global_scale``.

    Raises:
        QtutorError: NaN or infinity in ``x``, or a last dimension that is no multiple of 16.

    Sources: NVIDIA, "Introducing NVFP4"; torchao.prototype.mx_formats.nvfp4_tensor.
    """
    x = _checked(x, to_scale=True)
    blocks = _blocks(x.float(), "group", 16)
    amax = blocks.abs().amax(-1, keepdim=True)
    whole = amax.max() / (E4M3.max * E2M1.max)
    whole = torch.where(whole > 0, whole, 1.0).clamp(min=2.0**-120)  # smaller, and its reciprocal overflows below
    # Tiny blocks take E4M3's smallest normal number: a scale that is zero would make them NaN.
    scale = E4M3.round((amax / E2M1.max / whole).clamp(min=E4M3.min_normal))
    codes = E2M1.encode(blocks * ((1.0 / whole) / scale))  # reciprocal first, as the GPU kernels do
    return Quantized(codes, scale, None, E2M1, x.shape, 16, scale_bits=8, global_scale=whole)


def sqnr_db(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in decibels: ``10 log10(sum x**2 / sum (x - x_hat)**2)``."""
    noise = (x.double() - x_hat.double()).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(x.double().square().sum() / noise))
