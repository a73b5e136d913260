"""Each quantizer against an independent implementation: ml_dtypes, torchao, the formats of the course."""

import ml_dtypes
import numpy as np
import pytest
import torch
from probes import ODD, odd_values, randn

from qtutor import emulation as te
from qtutor import formats
from qtutor.emulation import (
    DType,
    Float8BlockScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    quantizers,
)

name_of = "{0.__name__}".format

pytestmark = pytest.mark.filterwarnings("ignore:Recipe type changed")
NUMPY = {DType.kFloat8E4M3: ml_dtypes.float8_e4m3fn, DType.kFloat8E5M2: ml_dtypes.float8_e5m2}
ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)


def spec_codes(x: torch.Tensor, scale: float, dtype: DType) -> np.ndarray:
    """Scale in FP32, saturate, round to nearest even: with numpy and ml_dtypes only."""
    scaled = x.float().numpy() * np.float32(scale)
    return np.clip(scaled, -dtype.max, dtype.max).astype(NUMPY[dtype]).view(np.uint8)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("scale", [1.0, 0.3, 448.0, 2.0**-20, 3.1e38])
def test_every_bf16_number_is_cast_like_ml_dtypes(dtype, scale):
    finite = torch.where(torch.isfinite(ALL_BF16), ALL_BF16, torch.zeros((), dtype=torch.bfloat16))
    quantizer = te.Float8Quantizer(torch.tensor([scale]), torch.zeros(1), dtype)
    result = quantizer(finite)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(result._data.numpy(), spec_codes(finite, quantizer.scale.item(), dtype))
    assert quantizer.amax.item() == finite.float().abs().max().item()


@pytest.mark.parametrize("dtype", list(DType))
def test_infinity_saturates_and_nan_stays(dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    amax = torch.zeros(1)
    back = te.Float8Quantizer(torch.ones(1), amax, dtype)(x).dequantize()
    assert back[0] == dtype.max and back[1] == -dtype.max and back[2].isnan() and back[3] == 1
    assert amax.item() == float("inf")
    te.Float8Quantizer(torch.ones(1), amax.zero_(), dtype)(x[2:])
    assert amax.item() == 1  # NaN does not count


@pytest.mark.parametrize("dtype", list(DType))
def test_current_scaling_is_amax_over_the_format(dtype):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    result = te.Float8CurrentScalingQuantizer(dtype)(x)
    scale = np.float32(dtype.max) / np.float32(x.abs().max().item())
    np.testing.assert_array_equal(result._data.numpy(), spec_codes(x, scale, dtype))
    assert result._scale_inv.item() == np.float32(1 / scale)
    assert result.dequantize().dtype == x.dtype


def test_current_scaling_of_special_tensors():
    quantizer = te.Float8CurrentScalingQuantizer(DType.kFloat8E4M3)
    assert quantizer(torch.zeros(4, 4))._scale_inv.item() == 1
    assert quantizer(torch.full((4, 4), float("inf")))._scale_inv.item() == 1
    assert quantizer(torch.full((4, 4), 1e-40))._data.float().isfinite().all()
    powers = te.Float8CurrentScalingQuantizer(DType.kFloat8E4M3, force_pow_2_scales=True, amax_epsilon=1.0)
    assert powers(torch.full((4, 4), 0.5))._scale_inv.item() == 2.0**-8  # 448 / max(0.5, 1) rounded down: 256


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("power", [-150, -20, -4, -1, 2, 20])
def test_scales_of_powers_of_two_are_fp32_quotients_without_their_mantissa(dtype, power):
    """Just above a power of two, and where format / amax overflows: log2 in FP32 would give twice the scale, or inf."""
    amax = np.nextafter(np.float32(dtype.max * 2.0**power), np.float32(np.inf))
    with np.errstate(over="ignore"):
        quotient = np.minimum(np.float32(dtype.max) / amax, np.finfo(np.float32).max)
    want = (np.array([quotient]).view(np.int32) & -(1 << 23)).view(np.float32)[0]
    result = te.Float8CurrentScalingQuantizer(dtype, force_pow_2_scales=True)(torch.tensor([[0.0, amax]]))
    assert result._scale_inv.item() == 1 / want and result._data[0, 0] == 0 and result.dequantize().isfinite().all()


def spread(rows, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp2(torch.randint(-12, 12, (rows, 1), generator=g).float())
    x[1], x[2, 3], x[5, ::2] = 0, 1e4, 0
    return x


@pytest.mark.parametrize("dtype", list(DType))
def test_decoding_is_exact_for_every_code_whatever_the_strides(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    numpy = {DType.kFloat8E4M3: ml_dtypes.float8_e4m3fn, DType.kFloat8E5M2: ml_dtypes.float8_e5m2}[dtype]
    want = codes.numpy().view(numpy).astype(np.float32)
    for change in (
        lambda c: c,
        lambda c: c.t(),
        lambda c: c[1::3, 2:9],
        lambda c: c[:0],
        lambda c: c.unsqueeze(1),
        lambda c: c[7:8, 15:],
    ):  # the last one holds NaN and nothing else
        got = quantizers.decode(change(codes).view(dtype.torch)).numpy()
        np.testing.assert_array_equal(got, change(torch.from_numpy(want)).numpy())
        finite = ~np.isnan(got)
        np.testing.assert_array_equal(
            np.signbit(got)[finite], np.signbit(change(torch.from_numpy(want)).numpy())[finite]
        )


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("shape", [(128, 256), (40, 144), (256, 128)])
def test_blocks_of_128_by_numpy_and_ml_dtypes(dtype, pow2, shape):
    x = spread(*shape)
    quantizer = te.Float8BlockQuantizer(dtype, block_scaling_dim=1, force_pow_2_scales=pow2)
    for source, (codes, scale_inv, _) in ((x.numpy(), quantizer.rows(x)), (x.t().numpy(), quantizer.columns(x))):
        numpy = {DType.kFloat8E4M3: ml_dtypes.float8_e4m3fn, DType.kFloat8E5M2: ml_dtypes.float8_e5m2}[dtype]
        for j in range(-(-source.shape[1] // 128)):
            block = source[:, 128 * j : 128 * j + 128]
            amax = np.abs(block).max(1, keepdims=True)
            with np.errstate(divide="ignore"):
                scale = np.where(amax == 0, np.float32(1), np.float32(dtype.max) / amax)
            if pow2:
                scale = np.exp2(np.floor(np.log2(scale.astype(np.float64)))).astype(np.float32)
            scaled = np.clip(block * scale, -dtype.max, dtype.max)
            np.testing.assert_array_equal(codes[:, 128 * j : 128 * j + 128].numpy(),
                                          scaled.astype(numpy).view(np.uint8))  # fmt: skip
            np.testing.assert_array_equal(scale_inv[:, j].numpy(), (1 / scale)[:, 0])


def test_mxfp8_differs_from_the_specification_only_where_it_would_saturate():
    """The course's ``formats.mxfp8`` follows the OCP text, which rounds the shared exponent down."""
    x = spread(64, 256)
    down, up = formats.mxfp8(x).dequantize(), te.MXFP8Quantizer(DType.kFloat8E4M3)(x).dequantize()
    blocks = x.view(64, -1, 32)
    amax = blocks.abs().amax(-1)
    fits = (amax == 0) | (amax / torch.exp2(torch.floor(torch.log2(amax)) - 8) <= 448)
    fits = fits.repeat_interleave(32, 1)
    assert torch.equal(down[fits], up[fits]) and 0 < (~fits).float().mean() < 0.5
    largest = (x.abs() == amax.repeat_interleave(32, 1)) & ~fits
    assert ((up - x).abs() <= x.abs() / 16)[largest].all() and (down.abs() < x.abs())[largest].all()


def test_nvfp4_is_that_of_the_formats_module():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    ours, theirs = te.NVFP4Quantizer()(x).dequantize(), formats.nvfp4(x).dequantize()
    assert ((ours - theirs).abs() <= 1e-5 * theirs.abs()).float().mean() > 0.999  # another order of the two scales


def test_nvfp4_scales_divide_truly():
    """2688 / amax must be FP32's quotient: reciprocal times 2688 is off by a bit for about one amax in six."""
    amax = torch.rand(4096, generator=torch.Generator().manual_seed(2)) * 100
    encode, decode = te.NVFP4Quantizer.global_scales(amax)
    want = np.float32(2688) / amax.numpy()
    np.testing.assert_array_equal(encode.numpy(), want)
    np.testing.assert_array_equal(decode.numpy(), np.float32(1) / want)


@pytest.mark.parametrize("recipe", [Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling], ids=name_of)
def test_gradients_stay_close_to_high_precision(recipe):
    """What FP8 or FP4 costs in one product: an error of a few percent, and no bias of the direction."""
    bound = {Float8BlockScaling: 0.06, MXFP8BlockScaling: 0.06, NVFP4BlockScaling: 0.3}[recipe]
    layer, x, dy = te.Linear(256, 128, bias=False), torch.randn(128, 256, requires_grad=True), torch.randn(128, 128)
    results = []
    for enabled in (False, True):
        with te.autocast(enabled=enabled, recipe=recipe()):
            y = layer(x)
        results.append((y.detach(), *torch.autograd.grad(y, (x, layer.weight), dy)))
    for want, got in zip(*results, strict=True):
        assert 0 < (got - want).norm() / want.norm() < bound
        assert 1 - bound / 4 < (got * want).sum() / want.square().sum() < 1 + bound / 4


# ------------------------------------------------------------------------------------ values that no tensor should hold


def quotient(top, amax, largest, power_of_two=False):
    """Transformer Engine's compute_scale_from_amax in numpy's float32."""
    amax = np.asarray(amax, np.float32)
    with np.errstate(all="ignore"):
        scale = np.float32(top) / amax
    scale = np.where(np.isinf(scale), np.float32(largest), scale)
    if power_of_two:
        scale = (scale.view(np.int32) & -(1 << 23)).view(np.float32)
    return np.where((amax == 0) | ~np.isfinite(amax), np.float32(1), scale)


def cast(x, scale, dtype):
    """Saturating cast by ml_dtypes, back to numbers; NaN stays NaN."""
    with np.errstate(all="ignore"):
        return np.clip(x * scale, -dtype.max, dtype.max).astype(NUMPY[dtype]).astype(np.float32)


def magnitude(x, **axis):
    return np.nan_to_num(np.abs(x), nan=0.0, posinf=np.inf).max(**axis)  # as fmaxf: NaN does not count


def by_tensor(x, dtype, power_of_two, largest):
    scale = quotient(dtype.max, magnitude(x), np.finfo(np.float32).max, power_of_two)
    return cast(x, scale, dtype) * (np.float32(1) / scale)


def by_block(x, dtype, power_of_two, largest):
    blocks = x.reshape(len(x), -1, 128)
    scale = quotient(dtype.max, magnitude(blocks, axis=2, keepdims=True), largest, power_of_two)
    return (cast(blocks, scale, dtype) * (np.float32(1) / scale)).reshape(x.shape)


def by_32(x, dtype, power_of_two, largest):
    blocks = x.reshape(len(x), -1, 32)
    amax = magnitude(blocks, axis=2, keepdims=True) * np.float32(1 / np.float32(dtype.max))
    with np.errstate(all="ignore"):
        exponent = np.clip(np.ceil(np.log2(amax.astype(np.float64))), -127, 127)
    factor = np.where(exponent == -127, 1.0, np.exp2(-exponent)).astype(np.float32)  # the kernel's exp2f_rcp
    return (cast(blocks, factor, dtype) * np.exp2(exponent).astype(np.float32)).reshape(x.shape)


def by_16(x, dtype, power_of_two, largest):
    """Transformer Engine's NVFP4 reference; NaN is not dropped there."""
    blocks, one = x.reshape(len(x), -1, 16), np.float32(1)
    amax = np.abs(blocks).max(2, keepdims=True)
    with np.errstate(all="ignore"):
        encode = np.minimum(np.float32(2688) / amax.max(), np.finfo(np.float32).max)
        encode = one if encode == 0 else np.float32(encode)
        scale = np.clip(amax * (encode * (one / np.float32(6))), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        factor = np.minimum(one / (scale.astype(np.float32) * (one / encode)), np.finfo(np.float32).max)
        codes = np.clip(blocks * factor, -6, 6)
        codes = np.where(np.isnan(codes), 0, codes).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        return (codes * (scale.astype(np.float32) * (one / encode))).reshape(x.shape)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("way, dtype, power_of_two", [
    *[(by_tensor, dtype, power) for dtype in DType for power in (False, True)],
    *[(by_block, dtype, power) for dtype in DType for power in (False, True)],
    (by_32, DType.kFloat8E4M3, True), (by_32, DType.kFloat8E5M2, True), (by_16, None, False),
], ids=lambda value: getattr(value, "__name__", str(value)))  # fmt: skip
def test_odd_values_by_numpy_and_ml_dtypes(way, dtype, power_of_two, kind, x_dtype):
    make = {by_tensor: lambda: te.Float8CurrentScalingQuantizer(dtype, force_pow_2_scales=power_of_two),
            by_block: lambda: te.Float8BlockQuantizer(dtype, block_scaling_dim=1, force_pow_2_scales=power_of_two),
            by_32: lambda: te.MXFP8Quantizer(dtype), by_16: te.NVFP4Quantizer}  # fmt: skip
    # alone, and beside ordinary values, of which a scale for the tensor takes account
    for x in (odd_values(kind, x_dtype).repeat(16, 1) if way is by_16 else odd_values(kind, x_dtype).repeat(32, 1),
              torch.cat([odd_values(kind, x_dtype), randn(31, 256, dtype=x_dtype)])):  # fmt: skip
        got = make[way]()(x).dequantize(dtype=torch.float32)
        with np.errstate(all="ignore"):
            want = way(x.float().numpy(), dtype, power_of_two, torch.finfo(x_dtype).max)
        if way is by_16:
            assert np.array_equal(np.isnan(got.numpy()), np.isnan(want)), "NaN in a tensor is seen everywhere"
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)
        else:
            np.testing.assert_array_equal(got.numpy(), want)


RECIPES = [te.DelayedScaling(amax_history_len=2), te.Float8CurrentScaling(), Float8BlockScaling(), MXFP8BlockScaling(),
           NVFP4BlockScaling(disable_stochastic_rounding=True)]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: type(r).__name__)
def test_odd_values_in_a_layer_are_seen_or_harmless(recipe):
    """Finite numbers in, finite numbers out, in both directions; NaN stays NaN; infinity saturates."""
    torch.manual_seed(0)
    layer = te.Linear(256, 64)
    for kind in ODD:
        x = torch.cat([odd_values(kind), randn(31, 256)]).requires_grad_()
        for _ in range(2):  # under delayed scaling the second step has the scales of the first
            with te.autocast(recipe=recipe):
                y = layer(x)
            layer.zero_grad()
            (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
            y.backward(torch.ones_like(y))
        if kind == "NaN":
            assert y[0].isnan().all() and layer.weight.grad.isnan().any()
            assert y[1:].isfinite().all() != recipe.nvfp4()
        elif "infinity" in kind and recipe.mxfp8():  # 448 times the largest power of two is infinite again
            assert not y[0].isfinite().any() and y[1:].isfinite().all()
        elif kind != "float32's end":  # a sum of such numbers is infinite without any quantization
            assert y.isfinite().all() and layer.weight.grad.isfinite().all() and gradient.isfinite().all(), kind
        for state in layer.fp8_meta.values():
            if hasattr(state, "scale"):
                assert (state.scale.isfinite() & (state.scale > 0)).all()
