"""MXFP8 and NVFP4 quantizers against torchao, ml_dtypes and what the formats' definitions fix."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qtutor.emulation import DType
from qtutor.emulation import blocks as mx
from qtutor.emulation.blocks import MXFP8Quantizer, NVFP4Quantizer


def sample(rows=64, columns=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp2(torch.randint(-20, 20, (rows, 1), generator=g).float())
    x[3], x[5, 7], x[6, ::3] = 0, 1e4, 0
    return x


# ---------------------------------------------------------------------------------------------------------- MXFP8
@pytest.mark.parametrize("name", ["kFloat8E4M3", "kFloat8E5M2"])
def test_mxfp8_equals_torchao_with_exponents_rounded_up(name):
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x = sample()
    scales, codes = to_mx(x, DType[name].torch, 32, ScaleCalculationMode.RCEIL)
    mine, my_scales, _ = MXFP8Quantizer(DType[name]).rows(x)
    assert torch.equal(my_scales, scales.view(torch.uint8).view(my_scales.shape))
    assert torch.equal(mine, codes.view(torch.uint8).view(mine.shape))


def test_exponents_are_the_least_that_hold():
    x = torch.rand(4096, generator=torch.Generator().manual_seed(1)) * torch.exp2(torch.arange(4096) / 20 - 100)
    exponent = mx.e8m0_round_up(x).double() - 127
    assert (torch.exp2(exponent) >= x.double()).all() and (torch.exp2(exponent - 1) < x.double()).all()
    special = torch.tensor([0.0, 1.0, 2.0**-127, 2.0**-149, float("inf"), float("nan")])
    assert mx.e8m0_round_up(special).tolist() == [0, 127, 0, 0, 254, 255]


def test_mxfp8_saturates_nothing():
    x = sample()
    error = (MXFP8Quantizer(DType.kFloat8E4M3)(x).dequantize() - x).abs()
    assert (error <= x.abs() * 2**-4 + x.view(64, -1, 32).abs().amax(-1).repeat_interleave(32, 1) * 2**-17).all()


# ---------------------------------------------------------------------------------------------------------- NVFP4
def test_rounding_to_nearest_equals_ml_dtypes():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 0.0])
    x = torch.cat([torch.linspace(-7, 7, 2801), ties])
    expected = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(mx.round_e2m1(x, False).numpy(), expected)


def test_codes_round_trip_and_equal_ml_dtypes():
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([half, -half]).repeat(2, 2)
    packed = mx.pack_e2m1(values)
    assert packed.shape == (2, 16) and torch.equal(mx.unpack_e2m1(packed), values)
    assert torch.equal(torch.signbit(mx.unpack_e2m1(packed)), torch.signbit(values))
    expected = values[0].numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(torch.stack([packed[0] & 15, packed[0] >> 4], -1).flatten().numpy(), expected)


def test_nvfp4_agrees_with_torchao():
    """The order of the scale's multiplications differs: in one scale or value of thousands it tips a rounding."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max())).dequantize(torch.float32)
    mine = NVFP4Quantizer()(x).dequantize()
    same = (mine - theirs).abs() <= 1e-5 * theirs.abs()
    assert same.float().mean() > 0.999


def test_nvfp4_scales_are_e4m3_bytes_and_the_largest_value_is_kept():
    x = sample(columns=64)
    tensor = NVFP4Quantizer()(x)
    scales = tensor._rowwise_scale_inv.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.isfinite(scales).all() and scales.max() == 448
    assert tensor._rowwise_data.shape == (64, 32) and tensor._rowwise_scale_inv.shape == (64, 4)
    peak = x.abs() == x.abs().max()
    assert torch.allclose(tensor.dequantize()[peak], x[peak], rtol=1e-6)
    assert (tensor.dequantize()[3] == 0).all()


def test_squares_make_rows_and_columns_agree():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    flat, square = NVFP4Quantizer(), NVFP4Quantizer(with_2d_quantization=True)
    for quantizer, agrees in ((square, True), (flat, False)):
        rows, columns = quantizer.decode(*quantizer.rows(x)), quantizer.decode(*quantizer.columns(x))
        assert torch.equal(rows, columns.t()) is agrees


def test_stochastic_rounding_is_right_on_average_and_stays_beside_the_value():
    x = torch.tensor([0.1, 0.6, 1.3, 2.2, 3.9, 5.0, -0.3, -4.4])
    torch.manual_seed(0)
    drawn = torch.stack([mx.round_e2m1(x, True) for _ in range(20_000)])
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    assert ((drawn - x).abs() < step + 1e-6).all()
    assert torch.allclose(drawn.mean(0), x, atol=0.04)
    assert (mx.round_e2m1(x, False) - x).abs().max() > 0.2  # to nearest is not


def test_the_transform_is_orthogonal_and_cancels_in_a_product():
    h = mx.hadamard()
    assert torch.allclose(h @ h.t(), torch.eye(16), atol=1e-6) and set(h.abs().unique().tolist()) == {0.25}
    a, b = torch.randn(16, 8), torch.randn(16, 12)
    assert torch.allclose((h.t() @ a).t() @ (h.t() @ b), a.t() @ b, atol=1e-5)


def test_the_transform_spreads_outliers_and_with_them_the_scales():
    """Columns with one large value in sixteen: after the transform a block's largest value, and its scale, is smaller.

    The mean square error of the operand is not: it is spread over the block as well.
    """
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(4))
    x[::16] *= 12
    (plain, scales, amax), (spread, spread_scales, spread_amax) = (
        NVFP4Quantizer(with_rht=rht).columns(x) for rht in (False, True))  # fmt: skip
    assert spread_amax < 0.5 * amax
    decode = [s.view(torch.float8_e4m3fn).float() * a for s, a in ((scales, amax), (spread_scales, spread_amax))]
    assert decode[1].median() < 0.6 * decode[0].median()


@pytest.mark.parametrize("quantizer, shape", [(NVFP4Quantizer(), (32, 24)), (NVFP4Quantizer(), (24, 32)),
                                              (MXFP8Quantizer(DType.kFloat8E4M3), (32, 48)),
                                              (MXFP8Quantizer(DType.kFloat8E4M3), (0, 32))])  # fmt: skip
def test_sizes_that_blocks_do_not_divide_are_refused(quantizer, shape):
    with pytest.raises(ValueError, match="divisible by"):
        quantizer(torch.ones(shape))


def test_all_zero_and_all_tiny():
    for x in (torch.zeros(32, 32), torch.full((32, 32), 1e-38)):
        for quantizer in (NVFP4Quantizer(), MXFP8Quantizer(DType.kFloat8E4M3)):
            assert torch.isfinite(quantizer(x).dequantize()).all()
