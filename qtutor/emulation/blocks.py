"""Block scaling: a scale for each few values instead of one for the whole tensor.

One scale a tensor serves its largest value: where there is an outlier, the tensor loses all that is small.  With a
scale for each block only the outlier's block does.  Blocks lie along the dimension that a product sums over, and the
backward pass sums over the other one, so each tensor is quantized twice, by rows and by columns:

    y  = X W^T      sums over features:  X by rows     W by rows
    dx = dY W       sums over outputs:   dY by rows    W by columns
    dw = dY^T X     sums over tokens:    dY by columns X by columns

- **Float8BlockScaling**: 1 x 128 values of inputs and gradients and 128 x 128 of weights, whose two versions are
  therefore the same numbers.  Scales are FP32 numbers, by default powers of two, so that they lose nothing.
- **MXFP8**: E4M3 values, one power of two (E8M0) for 32.  The exponent is rounded up, so that no value overflows:
  ``2**ceil(log2(amax / 448))``.  (The OCP specification rounds down and lets the largest saturate.)
- **NVFP4**: E2M1 values, one E4M3 scale for 16, one FP32 scale for the tensor.  NVIDIA's training recipe adds three
  remedies: weights share a scale in squares of 16 x 16, so that rows and columns agree; gradients are rounded
  *stochastically*, so that the mean is right; and operands of the weight's gradient pass through a *random Hadamard
  transform*, which spreads an outlier over 16 values (in both operands of the product, so that it cancels).

MXFP8 and NVFP4 need matrix units that read the scales along with the data: Blackwell's.

Sources: DeepSeek-V3 Technical Report, arXiv:2412.19437; OCP Microscaling Formats (MX) v1.0; "Pretraining Large
Language Models with NVFP4", arXiv:2509.25149; Transformer Engine 2.20, common/recipe and
pytorch/custom_recipes/reference_nvfp4.py.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch.nn import functional as F

from .quantizers import FP32_MAX, DType, Quantizer, decode, scale_of

_BLOCK = 128
_E4M3_MAX, _E2M1_MAX, _E2M1 = 448.0, 6.0, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Signs drawn once, the same in every run: the transform must be the same for both operands.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


class BlockTensor:
    """A block-scaled tensor, by rows and (of the transpose) by columns.

    ``_rowwise_data``: uint8 codes; NVFP4 has two a byte, low half first.  ``_rowwise_scale_inv``: one byte (E8M0 or
    E4M3) a block.  ``shape``, ``dtype``: of the original.
    """

    def __init__(self, quantizer: BlockQuantizer, x: torch.Tensor):
        self._quantizer, self.shape, self.dtype = quantizer, x.shape, x.dtype
        self.rows, self.columns = quantizer.both(x.detach().reshape(-1, x.shape[-1]))
        self._rowwise_data, self._rowwise_scale_inv, self._amax_rowwise = self.rows
        self._columnwise_data, self._columnwise_scale_inv, self._amax_columnwise = self.columns

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values that the rows stand for, in the original shape, as ``dtype`` (the original one by default)."""
        return self._quantizer.decode(*self.rows).reshape(self.shape).to(dtype or self.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._quantizer).__name__}, data={self.dequantize()})"


class BlockQuantizer(Quantizer):
    """``quantizer(x)`` returns a :class:`BlockTensor`; MXFP8 and NVFP4 refuse sizes that ``block`` does not divide."""

    block = 1
    tensor = BlockTensor

    def __call__(self, x: torch.Tensor) -> BlockTensor:
        return self.tensor(self, x)

    def columns(self, x):
        self.check(x)  # before it is transposed, so that the error shows the reader's own sizes
        return self.rows(x.t().contiguous())

    def check(self, x: torch.Tensor) -> None:
        if not x.numel() or x.shape[0] % self.block or x.shape[1] % self.block:
            name = type(self).__name__.removesuffix("Quantizer")
            raise ValueError(f"{name} requires the product of all dimensions but the last, and the last one, to be "
                             f"divisible by {self.block}, but got tensor with dims={list(x.shape)}")  # fmt: skip


class Float8BlockwiseQTensor(BlockTensor):
    """Blocks of 128, laid out as Transformer Engine's products read them.

    Scales are float32; of 1 x 128 blocks (blocks along the last size, rows), of 128 x 128 blocks (blocks along rows,
    blocks along the last size), the last size rounded up to a multiple of 4.
    """

    def __init__(self, quantizer, x):
        super().__init__(quantizer, x)
        self._fp8_dtype, self._is_2D_scaled = quantizer.dtype, quantizer.block_scaling_dim == 2
        self._rowwise_data = self._rowwise_data.view(x.shape)
        self._columnwise_data = self._columnwise_data.view(x.shape[-1], *x.shape[:-1])
        self._rowwise_scale_inv = self._layout(self._rowwise_scale_inv)
        self._columnwise_scale_inv = self._layout(self._columnwise_scale_inv)

    def _layout(self, scale_inv: torch.Tensor) -> torch.Tensor:
        scale_inv = scale_inv if self._is_2D_scaled else scale_inv.t()
        return F.pad(scale_inv, (0, -scale_inv.shape[1] % 4)).contiguous()


class Float8BlockQuantizer(BlockQuantizer):
    """One scale for each 1 x 128 (``block_scaling_dim`` 1) or 128 x 128 values (2).  ``force_pow_2_scales`` rounds
    scales down to powers of two; an amax counts as at least ``amax_epsilon``."""

    tensor = Float8BlockwiseQTensor

    def __init__(self, fp8_dtype: DType, *, rowwise: bool = True, columnwise: bool = True, amax_epsilon: float = 0.0,
                 force_pow_2_scales: bool = True, block_scaling_dim: int = 2):  # fmt: skip
        if block_scaling_dim not in (1, 2):
            raise RuntimeError(f"Only 1D or 2D blocks are supported, but got block_scaling_dim={block_scaling_dim}")
        self.dtype, self.block_scaling_dim = DType(fp8_dtype), block_scaling_dim
        self.amax_epsilon, self.force_pow_2_scales = amax_epsilon, force_pow_2_scales

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """View (or pad and view) ``x`` (M, K) as (M, 1, K/128, 128), or with 2-D blocks (M/128, 128, K/128, 128)."""
        rows, columns = x.shape
        height = _BLOCK if self.block_scaling_dim == 2 else 1
        x = F.pad(x, (0, -columns % _BLOCK, 0, -rows % height)) if columns % _BLOCK or rows % height else x
        return x.reshape(-1, height, x.shape[1] // _BLOCK, _BLOCK)

    def rows(self, x, amax=None):
        blocks = self._blocks(x.float())
        amax = blocks.abs().amax((1, 3), keepdim=True)
        if amax.isnan().any():  # NaN does not count
            amax = blocks.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax((1, 3), keepdim=True)
        # Where a scale overflows the kernel takes the maximum of the tensor's own dtype.
        scale = scale_of(amax.clamp(min=self.amax_epsilon), self.dtype.max, torch.finfo(x.dtype).max,
                         self.force_pow_2_scales)  # fmt: skip
        codes = (blocks * scale).clamp_(-self.dtype.max, self.dtype.max).to(self.dtype.torch)
        codes = codes.reshape(-1, codes.shape[2] * _BLOCK)[: x.shape[0], : x.shape[1]].contiguous()
        return codes.view(torch.uint8), (1 / scale)[:, 0, :, 0], None

    def both(self, x, amax=None):
        rows = self.rows(x)  # squares are the same numbers in both
        return rows, (rows[0].t().contiguous(), rows[1].t(), None) if self.block_scaling_dim == 2 else self.columns(x)

    def decode(self, codes, scale_inv, amax=None):
        blocks = self._blocks(decode(codes.view(self.dtype.torch))) * scale_inv[:, None, :, None]
        return blocks.reshape(-1, blocks.shape[2] * _BLOCK)[: codes.shape[0], : codes.shape[1]]


def e8m0_round_up(x: torch.Tensor) -> torch.Tensor:
    """Biased exponent (uint8) of the least power of two that is >= x; x >= 0, float32.  inf gives 254, NaN 255."""
    bits = x.float().contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(torch.isinf(x), 0xFE, torch.where(torch.isnan(x), 0xFF, exponent + up))
    return exponent.to(torch.uint8)


class MXFP8Quantizer(BlockQuantizer):
    """MXFP8: each 32 values share a power of two."""

    block = 32

    def __init__(self, fp8_dtype, *, rowwise: bool = True, columnwise: bool = True):
        self.dtype = fp8_dtype

    def rows(self, x, amax=None):
        self.check(x)
        blocks = x.float().reshape(x.shape[0], -1, self.block)
        amax = blocks.abs().amax(2)
        if amax.isnan().any():  # NaN does not count
            amax = blocks.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax(2)
        # Multiplied by the reciprocal, as the kernel does: near a power of two a division can give another exponent.
        scales = e8m0_round_up(amax * (1 / torch.tensor(self.dtype.max, dtype=torch.float32)).item())
        # An exponent of 0 means zeros to the kernel, which multiplies by 1: values below 448 * 2**-127 are lost.
        scaled = blocks * torch.exp2(127.0 - scales.float()).masked_fill_(scales == 0, 1.0).unsqueeze(2)
        if not amax.isfinite().all():  # rounded up, the scale lets nothing else overflow
            scaled.clamp_(-self.dtype.max, self.dtype.max)
        return scaled.to(self.dtype.torch).view(torch.uint8).view(x.shape), scales, None

    def decode(self, codes, scales, amax=None):
        values = decode(codes.view(self.dtype.torch)).view(codes.shape[0], -1, self.block)
        return (values * torch.exp2(scales.float() - 127.0).unsqueeze(-1)).reshape(codes.shape)


def hadamard(device=None) -> torch.Tensor:
    """The random Hadamard transform of 16 values, float32 (16, 16): orthogonal, entries +-1/4, fixed random signs."""
    h = torch.tensor(scipy.linalg.hadamard(16), dtype=torch.float32)
    return (torch.tensor(_SIGNS, dtype=torch.float32)[:, None] * h / 4).to(device)


def round_e2m1(x: torch.Tensor, stochastic: bool) -> torch.Tensor:
    """Round to E2M1's grid (0, 0.5, 1, 1.5, 2, 3, 4, 6), saturating: to nearest even, or at random by distance."""
    size = x.abs().clamp_(max=_E2M1_MAX)
    # The grid's step is half the power of two at or below the value, and half of 1 below 1.
    power = (size.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1)
    if stochastic:  # not floor(steps + rand): FP32 rounds that sum, and one whole number in 10**7 moves
        steps = (size * 2).div_(power)
        size = steps.floor().add_(torch.rand_like(size) < steps.frac()).mul_(power).mul_(0.5)
    else:  # beside a number this large FP32's own step is the grid's
        power *= 1.5 * 2**22
        size.add_(power).sub_(power)
    return torch.copysign(size, x)


def pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Numbers of E2M1's grid (rows, columns) to bytes (rows, columns / 2): two codes each, low half first."""
    codes = torch.searchsorted(_E2M1.to(values.device), values.abs()) + 8 * torch.signbit(values)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def unpack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The numbers, float32 (rows, columns), of what :func:`pack_e2m1` returned."""
    codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()
    return torch.cat((_E2M1, -_E2M1)).to(codes.device)[codes]


class NVFP4Quantizer(BlockQuantizer):
    """NVFP4: each 16 values share an E4M3 scale, the tensor an FP32 scale.

    ``with_rht``: transform 16 values at a time before quantizing by columns (operands of the weight's gradient);
    ``with_2d_quantization``: one scale for each 16 x 16 square (weights); ``stochastic_rounding``: round at random
    (gradients), from torch's generator.  One NaN makes the whole tensor NaN, as in Transformer Engine's reference.
    """

    block = 16

    def __init__(self, fp4_dtype=None, rowwise: bool = True, columnwise: bool = True, *, with_rht: bool = False,
                 with_2d_quantization: bool = False, stochastic_rounding: bool = False):  # fmt: skip
        self.with_rht, self.with_2d_quantization = with_rht, with_2d_quantization
        self.stochastic_rounding = stochastic_rounding

    def rows(self, x, amax=None):
        self.check(x)
        x = x.float().contiguous()
        blocks = x.view(x.shape[0], -1, self.block)
        amax = F.max_pool1d(x.abs().view(1, -1), self.block).view(blocks.shape[:2])  # amax(-1), but 4 times as fast
        if self.with_2d_quantization:
            amax = amax.view(-1, self.block, amax.shape[1]).amax(1).repeat_interleave(self.block, 0)
        whole = amax.max()
        encode, decode_by = self.global_scales(whole)
        scales = (amax * (encode * (1 / torch.tensor(_E2M1_MAX)))).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
        factor = (1 / (scales.float() * decode_by)).clamp(max=FP32_MAX).unsqueeze(-1)
        values = round_e2m1((blocks * factor).view(x.shape), self.stochastic_rounding)
        return pack_e2m1(values), scales.view(torch.uint8), whole

    def columns(self, x):
        self.check(x)
        x = x.t()
        if self.with_rht:
            # The kernel multiplies BF16 by BF16 and keeps BF16; FP32 inputs are rounded to it first.
            x = (x.reshape(-1, 16).bfloat16().float() @ hadamard(x.device)).bfloat16().float().view(x.shape)
        return self.rows(x)

    @staticmethod
    def global_scales(amax):
        """The tensor's FP32 scale and its reciprocal."""
        encode = torch.div(torch.full_like(amax, _E4M3_MAX * _E2M1_MAX), amax).clamp(max=FP32_MAX)  # a true quotient
        encode = torch.where((encode == 0) | (amax == 0), torch.ones_like(encode), encode)
        return encode, 1 / encode

    def decode(self, codes, scales, amax):
        values = unpack_e2m1(codes)
        factor = scales.view(torch.float8_e4m3fn).float() * self.global_scales(amax)[1]
        return (values.view(values.shape[0], -1, self.block) * factor.unsqueeze(-1)).view(values.shape)
