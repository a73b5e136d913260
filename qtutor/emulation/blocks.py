"""Block scaling: a scale for each few values instead of one for the whole tensor.

One scale a tensor serves its largest value.  A tensor with an outlier loses all that is small; with a scale for each
block only the outlier's block does.  There is a price: the blocks lie along the dimension that a product sums over, and
the backward pass sums over the other one, so that each tensor is quantized twice, by rows and by columns:

    y  = X W^T      sums over features:  X by rows     W by rows
    dx = dY W       sums over outputs:   dY by rows    W by columns
    dw = dY^T X     sums over tokens:    dY by columns X by columns

``Float8BlockScaling`` takes 1 x 128 values of inputs and gradients and 128 x 128 of weights, whose two versions are
therefore the same numbers.  Its scales are FP32 numbers that are powers of two by default, so that multiplying by
them loses nothing.  Source: DeepSeek-V3 Technical Report, arXiv:2412.19437; Transformer Engine 2.20,
common/recipe/recipe_common.cuh.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .quantizers import DType, _decode

__all__ = ["Float8BlockQuantizer", "Float8BlockwiseQTensor"]

_BLOCK = 128


class Float8BlockwiseQTensor:
    """A block-scaled FP8 tensor, by rows and by columns, laid out as Transformer Engine's products read it.

    Attributes:
        _rowwise_data: uint8 codes, the shape of the tensor.
        _rowwise_scale_inv: float32; of 1 x 128 blocks (blocks along the last size, rows), of 128 x 128 blocks (blocks
            along rows, blocks along the last size), the last size rounded up to a multiple of 4.
        _columnwise_data: uint8 codes of the transpose; _columnwise_scale_inv: its scales, laid out in the same way.
        _fp8_dtype: :class:`DType`; _is_2D_scaled: whether blocks are 128 x 128.
        dtype: what it was, and what :meth:`dequantize` returns.
    """

    def __init__(self, rows, columns, quantizer, shape, dtype):
        self._quantizer, self._rows, self.shape, self.dtype = quantizer, rows, torch.Size(shape), dtype
        self._fp8_dtype, self._is_2D_scaled = quantizer.dtype, quantizer.block_scaling_dim == 2
        self._rowwise_data, self._rowwise_scale_inv = rows[0].view(torch.uint8).view(shape), self._layout(rows[1])
        self._columnwise_data = columns[0].view(torch.uint8).view(shape[-1], *shape[:-1])
        self._columnwise_scale_inv = self._layout(columns[1])

    def _layout(self, scale_inv: torch.Tensor) -> torch.Tensor:
        scale_inv = scale_inv if self._is_2D_scaled else scale_inv.t()
        return F.pad(scale_inv, (0, -scale_inv.shape[1] % 4)).contiguous()

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return codes * scale_inv (of the rows) as ``dtype``, the original one by default."""
        return self._quantizer._dequantize(*self._rows).reshape(self.shape).to(dtype or self.dtype)

    def __repr__(self) -> str:
        return (f"Float8BlockwiseQTensor(fp8_dtype={self._fp8_dtype.name}, is_2D_scaled={self._is_2D_scaled}, "
                f"data={self.dequantize()})")  # fmt: skip


class Float8BlockQuantizer:
    """One scale for each 1 x 128 (``block_scaling_dim`` 1) or 128 x 128 values (2).

    Args:
        fp8_dtype: :class:`DType`.
        rowwise, columnwise: accepted; both versions are made.
        amax_epsilon: smaller amaxes count as this.
        force_pow_2_scales: round scales down to powers of two.
        block_scaling_dim: 1 or 2.
    """

    def __init__(self, fp8_dtype: DType, *, rowwise: bool = True, columnwise: bool = True, amax_epsilon: float = 0.0,
                 force_pow_2_scales: bool = True, block_scaling_dim: int = 2):  # fmt: skip
        if block_scaling_dim not in (1, 2):
            raise RuntimeError(f"Only 1D or 2D blocks are supported, but got block_scaling_dim={block_scaling_dim}")
        self.dtype, self.block_len, self.block_scaling_dim = DType(fp8_dtype), _BLOCK, block_scaling_dim
        self.amax_epsilon, self.force_pow_2_scales = amax_epsilon, force_pow_2_scales

    def _scale(self, amax: torch.Tensor, largest: float) -> torch.Tensor:
        """Scales of float32 ``amax``; ``largest`` replaces infinity: the maximum of the tensor's own dtype."""
        amax = amax.clamp(min=self.amax_epsilon)
        scale = torch.div(torch.full_like(amax, self.dtype.max), amax)
        scale = scale.masked_fill_(scale.isinf(), largest)
        if self.force_pow_2_scales:  # clear the mantissa
            scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)
        return scale.masked_fill_((amax == 0) | ~amax.isfinite(), 1.0)

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """View (or pad and view) ``x`` (M, K) as (M, 1, K/128, 128), or with 2-D blocks (M/128, 128, K/128, 128)."""
        rows, columns = x.shape
        height = _BLOCK if self.block_scaling_dim == 2 else 1
        x = F.pad(x, (0, -columns % _BLOCK, 0, -rows % height)) if columns % _BLOCK or rows % height else x
        return x.reshape(-1, height, x.shape[1] // _BLOCK, _BLOCK)

    def _rows(self, x: torch.Tensor):
        """Quantize ``x`` (M, K) with blocks along K: codes (M, K), scale_inv (M or M/128, K/128), None."""
        blocks = self._blocks(x.float())
        dims = (1, 3)
        amax = blocks.abs().amax(dims, keepdim=True)
        if amax.isnan().any():  # NaN does not count
            amax = blocks.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax(dims, keepdim=True)
        scale = self._scale(amax, torch.finfo(x.dtype).max)
        codes = (blocks * scale).clamp_(-self.dtype.max, self.dtype.max).to(self.dtype.torch)
        codes = codes.reshape(-1, codes.shape[2] * _BLOCK)[: x.shape[0], : x.shape[1]].contiguous()
        return codes.view(torch.uint8), (1 / scale)[:, 0, :, 0], None

    def _columns(self, x: torch.Tensor):
        """The same of the transpose: blocks along M."""
        return self._rows(x.t().contiguous())

    def _dequantize(self, codes, scale_inv, _=None) -> torch.Tensor:
        """FP32 values of what :meth:`_rows` or :meth:`_columns` returned."""
        blocks = self._blocks(_decode(codes.view(self.dtype.torch))) * scale_inv[:, None, :, None]
        return blocks.reshape(-1, blocks.shape[2] * _BLOCK)[: codes.shape[0], : codes.shape[1]]

    def quantize(self, tensor: torch.Tensor) -> Float8BlockwiseQTensor:
        """Quantize ``tensor`` (..., K), by rows and by columns."""
        x = tensor.detach().reshape(-1, tensor.shape[-1])
        return Float8BlockwiseQTensor(self._rows(x), self._columns(x), self, tensor.shape, tensor.dtype)

    __call__ = quantize
