"""MXFP8 and NVFP4 as Transformer Engine trains with them: many small scales inside one tensor.

A scale for 32 or 16 neighbouring values adapts where one for a whole tensor cannot: a large value spoils its own
block and no other.  What it asks of the hardware is a matrix unit that reads the scales along with the data, which
Hopper has not and Blackwell has; here everyone can look at the numbers.

Blocks lie along the dimension that a product sums over.  ``y = x w^T`` sums over the features and the weight's
gradient ``dy^T x`` over the tokens, so an operand of both is quantized twice, from high precision: by *rows* and by
*columns* (the rows of its transpose).  With one scale a tensor, the second is just the first one's transpose.

- **MXFP8**: E4M3 values, one power of two (E8M0) for 32.  The exponent is rounded up, so that no value overflows:
  ``2**ceil(log2(amax / 448))``.  (The OCP specification rounds down and lets the largest saturate.)
- **NVFP4**: E2M1 values, one E4M3 scale for 16, one FP32 scale for the tensor.  Four bits are few, and NVIDIA's
  training recipe adds three remedies: weights share a scale in squares of 16 x 16, so that rows and columns agree;
  gradients are rounded *stochastically*, up or down with probabilities that make the mean right; and operands of the
  weight's gradient pass through a *random Hadamard transform*, which spreads an outlier over 16 values (both operands
  of the product, so that it cancels).

Sources: OCP Microscaling Formats (MX) v1.0; "Pretraining Large Language Models with NVFP4", arXiv:2509.25149;
Transformer Engine 2.20, common/recipe and pytorch/custom_recipes/reference_nvfp4.py.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .quantizers import _decode, _fp8_dtype

_FP32_MAX = torch.finfo(torch.float32).max
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
# Signs drawn once, the same in every run: the transform must be the same for both operands.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def _check(x: torch.Tensor, block: int, name: str) -> None:
    rows = x.numel() // x.shape[-1] if x.ndim and x.shape[-1] else 0
    if not rows or rows % block or x.shape[-1] % block:
        raise ValueError(f"{name} requires the product of all dimensions but the last, and the last one, to be "
                         f"divisible by {block}, but got tensor with dims={list(x.shape)}")  # fmt: skip


class BlockTensor:
    """A block-scaled tensor by rows and by columns.

    Attributes:
        _rowwise_data: uint8 codes (rows, columns), or (rows, columns / 2) where two share a byte, low half first.
        _rowwise_scale_inv: uint8 scales (rows, columns / block): E8M0 or E4M3 bytes.
        _columnwise_data, _columnwise_scale_inv: the same of the transpose.
        shape, dtype: of the original.
    """

    def __init__(self, quantizer, x: torch.Tensor):
        flat = x.detach().reshape(-1, x.shape[-1])
        self.quantizer, self.shape, self.dtype = quantizer, x.shape, x.dtype
        self._rowwise_data, self._rowwise_scale_inv, self._amax_rowwise = quantizer._rows(flat)
        self._columnwise_data, self._columnwise_scale_inv, self._amax_columnwise = quantizer._columns(flat)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values that the rows stand for, in the original shape, as ``dtype`` (the original one by default)."""
        parts = self._rowwise_data, self._rowwise_scale_inv, self._amax_rowwise
        return self.quantizer._dequantize(*parts).view(self.shape).to(dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows: data and scales (the columns take as many again)."""
        return self._rowwise_data.numel() + self._rowwise_scale_inv.numel() + 4 * (self._amax_rowwise is not None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.quantizer).__name__}, shape={tuple(self.shape)})"


class _BlockQuantizer:
    """``quantizer(x)`` -> :class:`BlockTensor`; ``_rows`` and ``_columns`` are what a matrix product uses."""

    name: str
    block: int

    def _rows(self, x: torch.Tensor):
        """Quantize (rows, columns) in blocks along the columns: (codes, scales, amax of the tensor or None)."""
        raise NotImplementedError

    def _columns(self, x: torch.Tensor):
        """The same of the transpose: blocks along the rows of ``x``; codes (columns, rows)."""
        _check(x, self.block, self.name)  # before it is transposed, so that the error shows the reader's own sizes
        return self._rows(x.t())

    def _dequantize(self, codes, scales, amax) -> torch.Tensor:
        """FP32 values of what :meth:`_rows` returned."""
        raise NotImplementedError

    def __call__(self, x: torch.Tensor) -> BlockTensor:
        return BlockTensor(self, x)

    quantize = __call__


# ---------------------------------------------------------------------------------------------------------- MXFP8
def _e8m0_round_up(x: torch.Tensor) -> torch.Tensor:
    """Biased exponent (uint8) of the least power of two that is >= x; x >= 0, float32.  inf gives 254, NaN 255."""
    bits = x.float().contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = exponent + up
    exponent = torch.where(torch.isinf(x), 0xFE, torch.where(torch.isnan(x), 0xFF, exponent))
    return exponent.to(torch.uint8)


class MXFP8Quantizer(_BlockQuantizer):
    """MXFP8: each 32 values share a power of two.

    Args:
        fp8_dtype: a DType, E4M3 or E5M2.
        rowwise, columnwise: accepted; both are made when needed.

    Raises (on call):
        ValueError: rows or columns that 32 does not divide.
    """

    name, block = "MXFP8", 32

    def __init__(self, fp8_dtype, *, rowwise: bool = True, columnwise: bool = True):
        self.dtype = fp8_dtype

    def _rows(self, x):
        _check(x, self.block, self.name)
        codes, scales = self._cast(x.float().reshape(x.shape[0], -1, self.block), 2)
        return codes.view(x.shape), scales.squeeze(2), None

    def _columns(self, x):
        _check(x, self.block, self.name)
        codes, scales = self._cast(x.float().reshape(-1, self.block, x.shape[1]), 1)  # no copy of the transpose
        return codes.view(x.shape).t(), scales.squeeze(1).t(), None

    def _cast(self, blocks, dim: int):
        """Codes and exponents of three-dimensional ``blocks``, each of which lies along ``dim``."""
        amax = blocks.abs().amax(dim, keepdim=True)
        # Multiplied by the reciprocal, as the kernel does: near a power of two a division can give another exponent.
        scales = _e8m0_round_up(amax * (1 / torch.tensor(self.dtype.max, dtype=torch.float32)).item())
        scaled = blocks * torch.exp2(127.0 - scales.float())
        if not amax.isfinite().all():  # rounded up, the scale lets nothing else overflow
            scaled.clamp_(-self.dtype.max, self.dtype.max)
        return scaled.to(self.dtype.torch).view(torch.uint8), scales

    def _dequantize(self, codes, scales, amax=None):
        values = _decode(codes.view(self.dtype.torch)).view(codes.shape[0], -1, self.block)
        return (values * torch.exp2(scales.float() - 127.0).unsqueeze(-1)).reshape(codes.shape)


# ---------------------------------------------------------------------------------------------------------- NVFP4
def hadamard(device=None) -> torch.Tensor:
    """The random Hadamard transform of 16 values, float32 (16, 16): orthogonal, entries +-1/4, fixed random signs."""
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (torch.tensor(_SIGNS, dtype=torch.float32)[:, None] * h / 4).to(device)


def _round_e2m1(x: torch.Tensor, stochastic: bool) -> torch.Tensor:
    """Round to E2M1's grid (0, 0.5, 1, 1.5, 2, 3, 4, 6), saturating: to nearest even, or at random by distance."""
    size = x.abs().clamp_(max=_E2M1_MAX)
    # The grid's step is half the power of two at or below the value, and half of 1 below 1.
    power = (size.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1)
    if stochastic:
        size = (size * 2).div_(power).add_(torch.rand_like(size)).floor_().mul_(power).mul_(0.5)
    else:  # beside a number this large FP32's own step is the grid's
        power *= 1.5 * 2**22
        size.add_(power).sub_(power)
    return torch.copysign(size, x)


def _pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Numbers of E2M1's grid (rows, columns) to bytes (rows, columns / 2): two codes each, low half first."""
    # Scaled by 2**-14 they are FP16 numbers whose last exponent bits and first mantissa bit are those of E2M1.
    bits = (values * 2.0**-14).half().contiguous().view(torch.int16)
    codes = (bits >> 9 & 7) | (bits >> 12 & 8)
    pairs = codes.view(torch.int32)
    return (pairs | pairs >> 12).to(torch.uint8)


def _unpack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The numbers, float32 (rows, columns), of what :func:`_pack_e2m1` returned."""
    pairs = codes.to(torch.int32)
    codes = (pairs & 15 | (pairs & 240) << 12).view(torch.int16)
    return ((codes & 7) << 9 | (codes & 8) << 12).view(torch.float16).float().mul_(2.0**14)


class NVFP4Quantizer(_BlockQuantizer):
    """NVFP4: each 16 values share an E4M3 scale, the tensor an FP32 scale.

    Args:
        with_rht: transform 16 values at a time before quantizing by columns (operands of the weight's gradient).
        with_2d_quantization: one scale for each 16 x 16 square (weights).
        stochastic_rounding: round at random (gradients), from torch's generator.
        fp4_dtype, rowwise, columnwise, with_post_rht_amax: accepted; the amax is always taken after the transform.

    Raises (on call):
        ValueError: rows or columns that 16 does not divide.
    """

    name, block = "NVFP4", 16

    def __init__(self, fp4_dtype=None, rowwise: bool = True, columnwise: bool = True, *, with_rht: bool = False,
                 with_post_rht_amax: bool = False, with_2d_quantization: bool = False,
                 stochastic_rounding: bool = False):  # fmt: skip
        self.with_rht, self.with_2d_quantization = with_rht, with_2d_quantization
        self.stochastic_rounding = stochastic_rounding

    def _rows(self, x):
        _check(x, self.block, self.name)
        x = x.float().contiguous()
        blocks = x.view(x.shape[0], -1, self.block)
        amax = F.max_pool1d(x.abs().view(1, -1), self.block).view(blocks.shape[:2])  # amax(-1), but 4 times as fast
        if self.with_2d_quantization:
            amax = amax.view(-1, self.block, amax.shape[1]).amax(1).repeat_interleave(self.block, 0)
        whole = amax.max()
        encode, decode = self._global_scales(whole)
        scales = (amax * (encode * (1 / torch.tensor(_E2M1_MAX)))).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
        factor = (1 / (scales.float() * decode)).clamp(max=_FP32_MAX).unsqueeze(-1)
        values = _round_e2m1((blocks * factor).view(x.shape), self.stochastic_rounding)
        return _pack_e2m1(values), scales.view(torch.uint8), whole

    def _columns(self, x):
        _check(x, self.block, self.name)
        x = x.t()
        if self.with_rht:
            # The kernel multiplies BF16 by BF16 and keeps BF16; FP32 inputs are rounded to it first.
            x = (x.reshape(-1, 16).bfloat16().float() @ hadamard(x.device)).bfloat16().float().view(x.shape)
        return self._rows(x)

    @staticmethod
    def _global_scales(amax):
        # A number divided by a tensor is a reciprocal and a product in torch: off by a bit now and then.
        encode = torch.div(torch.full_like(amax, _E4M3_MAX * _E2M1_MAX), amax).clamp(max=_FP32_MAX)
        encode = torch.where((encode == 0) | (amax == 0), torch.ones_like(encode), encode)
        return encode, 1 / encode

    def _dequantize(self, codes, scales, amax):
        values = _unpack_e2m1(codes)
        _, decode = self._global_scales(amax)
        factor = scales.view(torch.float8_e4m3fn).float() * decode
        return (values.view(values.shape[0], -1, self.block) * factor.unsqueeze(-1)).view(values.shape)


# -------------------------------------------------------------------------------------------------------- recipes
def _quantizers(recipe, forward: bool, gemms: int = 1) -> list[_BlockQuantizer]:
    """Quantizers of a module with ``gemms`` products: input, weight, output of each; backward, the two gradients."""
    if recipe.mxfp8():
        make = dict.fromkeys(("input", "weight", "gradient"),
                             lambda: MXFP8Quantizer(_fp8_dtype(recipe, forward)))  # fmt: skip
    else:
        rht, stochastic = not recipe.disable_rht, not recipe.disable_stochastic_rounding
        square = not recipe.disable_2d_quantization
        make = {"input": lambda: NVFP4Quantizer(with_rht=rht),
                "weight": lambda: NVFP4Quantizer(with_2d_quantization=square),
                "gradient": lambda: NVFP4Quantizer(with_rht=rht, stochastic_rounding=stochastic)}  # fmt: skip
    slots = ("input", "weight", "input") if forward else ("gradient", "gradient")
    return [make[slot]() for slot in slots * gemms]
