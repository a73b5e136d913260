"""Grids and the straight-through estimator against torch, torchao, gguf, ml_dtypes and finite differences."""

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from probes import ODD, assert_same, hard_values, odd_values, randn, with_grad
from torch import nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization.granularity import PerRow
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantize_config import Float8FakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import Float8FakeQuantizer, IntxFakeQuantizer

from qtutor import fake_quant as fq
from qtutor import formats, packed, ste

GGUF = ["Q8_0", "Q5_0", "Q4_0", "TQ2_0"]
MX = [("MXFP8", torch.float8_e4m3fn), ("MXFP4", torch.float4_e2m1fn_x2)]


def with_upstream(function, x):
    """Output, gradient, and the random upstream gradient."""
    return *with_grad(function, x), randn(*x.shape, seed=9).to(x.dtype)


def assert_same_as_torchao(mine, theirs):
    """Output bit for bit; gradient the same zeros and the same values up to rounding.

    (torchao's gradient goes through x * (1 / scale) and back through * scale: (g * s) * (1 / s) is g give or take a
    rounding.  Ours is exactly g, as in torch.fake_quantize_*.)
    """
    assert_same(mine[0], theirs[0])
    tolerance = 1e-5 if mine[1].dtype == torch.float32 else 2**-6
    torch.testing.assert_close(mine[1], theirs[1], rtol=tolerance, atol=0)
    assert_same(mine[1] == 0, theirs[1] == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_weight_quantizer_equals_torchao(bits, group_size, dtype):
    granularity = dict(group_size=group_size) if group_size else dict(granularity="per_channel")
    theirs = IntxFakeQuantizer(
        IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), is_symmetric=True, **granularity)
    )
    ours = fq.FakeQuantizer(f"int{bits}", "group" if group_size else "channel", group_size)
    x = randn(48, 128, dtype=dtype)
    assert_same_as_torchao(with_grad(ours, x), with_grad(theirs, x))
    assert_same(ours(torch.zeros_like(x)), theirs(torch.zeros_like(x)))  # no division by zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_token_quantizer_equals_torchao(bits, dtype):
    theirs = IntxFakeQuantizer(
        IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), "per_token", is_symmetric=False)
    )
    ours = fq.FakeQuantizer(f"int{bits}", "token", symmetric=False)
    for x in (randn(2, 7, 64, dtype=dtype), randn(2, 7, 64, dtype=dtype).abs() + 3):
        assert_same_as_torchao(with_grad(ours, x), with_grad(theirs, x))


@pytest.mark.parametrize("name, dtype", [("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_float8_equals_torchao(name, dtype, x_dtype):
    theirs = Float8FakeQuantizer(Float8FakeQuantizeConfig(dtype, PerRow()))
    x = randn(32, 64, dtype=x_dtype)
    y, gradient = with_grad(fq.FakeQuantizer(name, "token"), x)
    assert_same(y, theirs(x))
    # torchao also differentiates the scale (a max); here it is a constant, as for its integers: straight through.
    assert_same(gradient, randn(*x.shape, seed=9).to(x_dtype))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_torch_per_channel_forward_and_backward(bits, symmetric):
    x = randn(40, 96) * torch.logspace(-3, 3, 40)[:, None]
    scale, zero_point = fq.FakeQuantizer(f"int{bits}", symmetric=symmetric).qparams(x)
    scale = scale * 0.6  # smaller than the range asks for: many values clip
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def reference(x):
        return torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero_point.flatten().int(), 0, low, high)

    mine = with_grad(lambda x: ste.fake_quantize(x, scale, zero_point, low, high), x)
    for a, b in zip(mine, with_grad(reference, x), strict=True):
        assert_same(a, b)
    assert 0 < (mine[1] == 0).float().mean() < 0.6


def test_equals_torch_per_tensor_at_ties_and_ends():
    x = torch.arange(-400, 401) / 4.0  # every quarter step: all ties, both ends
    for zero_point in (0, 3, -5):
        mine = with_grad(lambda x, z=zero_point: ste.fake_quantize(x, 0.5, z, -8, 7), x)
        reference = with_grad(lambda x, z=zero_point: torch.fake_quantize_per_tensor_affine(x, 0.5, z, -8, 7), x)
        for a, b in zip(mine, reference, strict=True):
            assert_same(a, b)


def test_gradient_is_that_of_the_piecewise_linear_surrogate():
    """Finite differences of clamp(x, lowest, highest) (what the STE pretends the quantizer is)."""
    scale, low, high = 0.25, -4, 3
    x = randn(1000).double() * 0.7
    edges = torch.tensor([(low - 0.5) * scale, (high + 0.5) * scale], dtype=torch.float64)
    x = x[((x[:, None] - edges).abs() > 1e-3).all(1)]
    _, gradient = with_grad(lambda x: ste.fake_quantize(x, scale, None, low, high), x, seed=3)
    upstream = randn(*x.shape, seed=3).double()

    def surrogate(x):
        return (x.clamp(*edges) * upstream).sum()

    h = 1e-6
    numerical = torch.stack(
        [(surrogate(x + h * e) - surrogate(x - h * e)) / (2 * h) for e in torch.eye(len(x), dtype=torch.float64)]
    )
    torch.testing.assert_close(gradient, numerical, rtol=1e-6, atol=1e-6)


def test_group_scales_broadcast_over_columns():
    x = randn(4, 64)
    quantizer = fq.FakeQuantizer("int4", "group", 16)
    scale, _ = quantizer.qparams(x)
    assert_same(ste.fake_quantize(x, scale.view(4, 4), None, -8, 7), quantizer(x))


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E2M3", "E3M2", "E2M1"])
def test_float_targets_land_on_the_grid(name):
    x = randn(16, 64)
    quantizer = fq.FakeQuantizer(name, "group", 16)
    scale, zero_point = quantizer.qparams(x)
    assert zero_point is None
    y, gradient = with_grad(quantizer, x)
    on_grid = formats.to_blocks(y, "group", 16) / scale
    grid = formats.FORMATS[name].grid()
    assert (on_grid.reshape(-1, 1) - grid).abs().min(dim=1).values.max() <= 1e-5 * formats.FORMATS[name].max
    assert_same(gradient, randn(*x.shape, seed=9))  # nothing clips at scale = amax / max
    x = torch.tensor([0.9, 1.0, 1.001, 3.0, -3.0]) * formats.FORMATS[name].max  # the end, just beyond, far beyond
    _, gradient = with_grad(lambda x: ste.on_grid(x[None], ste.Grid(torch.ones(1, 1)), quantizer.target)[0], x)
    assert (gradient != 0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("name, ml", [
    ("FP8", ml_dtypes.float8_e4m3fn), ("E5M2", ml_dtypes.float8_e5m2), ("FP6", ml_dtypes.float6_e3m2fn),
    ("E2M3", ml_dtypes.float6_e2m3fn), ("FP4", ml_dtypes.float4_e2m1fn),
])  # fmt: skip
def test_float_grids_equal_ml_dtypes(name, ml):
    x = hard_values()
    quantizer = fq.FakeQuantizer(name, "channel")
    scale, _ = quantizer.qparams(x)
    scaled = (x / scale).numpy()
    limit = float(ml_dtypes.finfo(ml).max)
    expected = scaled.clip(-limit, limit).astype(ml).astype(np.float32)
    assert torch.equal(quantizer(x), torch.from_numpy(expected) * scale)


@pytest.mark.parametrize("name", GGUF)
def test_gguf_blocks_equal_the_gguf_package(name):
    x = hard_values()
    kind = gguf.GGMLQuantizationType[name]
    expected = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    quantizer = fq.FakeQuantizer(name)
    assert torch.equal(quantizer(x), torch.from_numpy(expected))
    again = quantizer(quantizer(x))
    normal = x.abs().amax(1) > 1e-3  # smaller scales are subnormal in 16 bits
    assert torch.equal(again[normal], quantizer(x)[normal])  # what lies on the grid stays where it is


@pytest.mark.parametrize("name, dtype", MX)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded_up", [False, True])
def test_mx_equals_torchao(name, dtype, x_dtype, rounded_up):
    x = hard_values().to(x_dtype)
    mode = ScaleCalculationMode.RCEIL if rounded_up else ScaleCalculationMode.FLOOR
    expected = MXTensor.to_mx(x, dtype, 32, scaling_mode=mode).dequantize(x_dtype)
    assert torch.equal(fq.FakeQuantizer(name, no_clipping=rounded_up)(x), expected)


@pytest.mark.parametrize("name", ["MXFP8", "MXFP6", "MXFP4", "NVFP4"])
def test_microscaling_equals_the_taught_formats(name):
    x = hard_values()
    function = {"MXFP8": formats.mxfp8, "MXFP6": lambda x: formats.mxfp8(x, "E3M2"), "MXFP4": formats.mxfp4,
                "NVFP4": formats.nvfp4}[name]  # fmt: skip
    quantizer = fq.FakeQuantizer(name)
    assert torch.equal(quantizer(x), function(x).dequantize())
    linear = nn.Linear(512, 64, bias=False)
    linear.weight.data.copy_(x)
    stored = packed.convert(fq.prepare(linear, name))
    assert torch.equal(stored.dequantize(), quantizer(x))
    # the FP32 scale of a whole NVFP4 tensor is 4 bytes, and not part of the format's bits
    assert 8 * (stored.nbytes - 4 * (name == "NVFP4")) / x.numel() == {
        "MXFP8": 8.25, "MXFP6": 6.25, "MXFP4": 4.25, "NVFP4": 4.5}[name]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_equals_torchao(dtype):
    x = hard_values(seed=3).to(dtype)
    expected = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max()))
    assert torch.equal(fq.FakeQuantizer("NVFP4")(x), expected.dequantize(dtype))


@pytest.mark.parametrize("name", ["Q5_0", "Q4_0", "MXFP4", "NVFP4"])
def test_gradient_is_straight_inside_and_zero_outside(name):
    """Against finite differences of the line that the quantizer follows: clamp(x, ends of its grid), scale held."""
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)).double()
    quantizer = fq.FakeQuantizer(name)
    grid, target = quantizer.grid(x.float()), quantizer.target
    _, gradient, upstream = with_upstream(quantizer, x.float())
    units = quantizer.blocks(x) * (1 / grid.scale.double() if grid.inverse is None else grid.inverse.double())
    if target.is_float:
        end = target.fmt.max + 2.0 ** (target.fmt.max_exponent - target.fmt.mantissa_bits - 1)
        low, high = -end, end
    else:
        low, high = target.quant_min - 0.5, target.quant_max + 0.5
    safe = ((units - low).abs() > 1e-4) & ((units - high).abs() > 1e-4)
    h = 1e-7
    slope = ((units + h).clamp(low, high) - (units - h).clamp(low, high)) / (2 * h)
    expected = (slope.view(x.shape) * upstream.double())[safe.view(x.shape)]
    torch.testing.assert_close(gradient.double()[safe.view(x.shape)], expected, rtol=1e-6, atol=1e-6)
    if name != "NVFP4":  # its scales are rounded to nearest, the others leave something outside
        assert (gradient == 0).any()


def test_ternary_is_bitnets():
    """https://arxiv.org/abs/2402.17764, equations 1 to 3, and its gradient: straight through everywhere."""
    w = torch.randn(48, 96, generator=torch.Generator().manual_seed(2))
    y, gradient, upstream = with_upstream(fq.FakeQuantizer("ternary", "tensor"), w)
    scale = w.abs().mean()
    expected = (w * (1 / scale)).round().clamp(-1, 1) * scale
    assert torch.equal(y, expected) and torch.equal(gradient, upstream)
    assert len(y.unique()) == 3
    stored = packed.convert(fq.prepare(nn.Linear(96, 48), fq.FakeQuantizer("ternary", "tensor")))
    assert stored.codes.numel() == 96 * 48 // 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_learned_scale_equals_torchs_operator(bits, group_size):
    x = torch.randn(24, 96, generator=torch.Generator().manual_seed(4))
    quantizer = fq.FakeQuantizer(f"int{bits}", group_size=group_size, learned=True)
    quantizer.freeze(x)
    blocks, low, high = quantizer.blocks(x), quantizer.target.quant_min, quantizer.target.quant_max
    y, gradient, upstream = with_upstream(quantizer, x)
    theirs, scale = blocks.clone().requires_grad_(), quantizer.scale.detach().flatten().requires_grad_()
    factor = (blocks.shape[1] * high) ** -0.5
    operator, zero = torch._fake_quantize_learnable_per_channel_affine, torch.zeros(len(scale))
    out = operator(theirs, scale, zero, 0, low, high, factor)
    out.backward(upstream.view_as(out))
    assert torch.equal(y.view_as(out), out) and torch.equal(gradient.view_as(theirs.grad), theirs.grad)
    torch.testing.assert_close(quantizer.scale.grad.flatten(), scale.grad, rtol=1e-4, atol=1e-5)
    assert 0.2 < quantizer.scale.grad.abs().max() / factor  # a check that can fail


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["int4", "int8", "E4M3", "E2M1", "MXFP4", "NVFP4", "ternary", "Q4_0", "Q8_0"])
def test_gpu_equals_cpu(target, dtype):
    quantizer, x = fq.FakeQuantizer(target), torch.randn(128, 512).to(dtype)
    here, there = x.clone().requires_grad_(), x.cuda().requires_grad_()
    y, z = quantizer(here), quantizer(there)
    assert torch.allclose(y, z.cpu(), rtol=2**-7, atol=0)  # a mean or a quotient may differ in the last bit
    assert (y == z.cpu()).float().mean() > 0.999
    for a in (y, z):
        a.backward(torch.ones_like(a))
    assert (here.grad == there.grad.cpu()).float().mean() > 0.999


# ------------------------------------------------------------------------------------- values that no model should hold


def quantized_by_gguf(x, target):
    kind = gguf.GGMLQuantizationType[target.name]
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.float().numpy(), kind), kind)).to(x.dtype)


ML = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2, "E2M3": ml_dtypes.float6_e2m3fn,
      "E3M2": ml_dtypes.float6_e3m2fn, "E2M1": ml_dtypes.float4_e2m1fn}  # fmt: skip


def rounded_by_ml_dtypes(x, scale, fmt):
    """x / scale, saturated and rounded by ml_dtypes, times scale: numpy's float32; NaN stays NaN."""
    with np.errstate(all="ignore"):
        scaled = x.float().numpy() / scale
        grid = scaled.clip(-fmt.max, fmt.max).astype(ML[fmt.name]).astype(np.float32)
        return torch.from_numpy(np.where(np.isnan(scaled), np.nan, grid) * scale).to(x.dtype)


def quantized_by_the_specification(x, target):
    """OCP MX: a block shares 2**(floor(log2 amax) - emax), between 2**-127 and 2**127; NaN where amax is not finite."""
    blocks = x.float().reshape(-1, 32)
    amax = blocks.abs().amax(1, keepdim=True).double()
    with np.errstate(all="ignore"):
        exponent = np.floor(np.log2(amax.numpy())) - target.fmt.max_exponent
        scale = np.exp2(np.clip(exponent, -127, 127)).astype(np.float32)
    scale[~np.isfinite(amax.numpy())] = np.nan
    return rounded_by_ml_dtypes(blocks, scale, target.fmt).reshape(x.shape).to(x.dtype)


def quantized_by_torchao(x, target, symmetric=True):
    how = dict(granularity="per_channel", is_symmetric=True) if symmetric else dict(
        granularity="per_token", is_symmetric=False)  # fmt: skip
    return IntxFakeQuantizer(IntxFakeQuantizeConfig(getattr(torch, target.name), **how))(x)


def same(a, b):
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ste.TARGETS)
def test_odd_values_give_what_the_reference_gives(name, kind, dtype):
    target, x = ste.TARGETS[name], odd_values(kind, dtype)
    y, gradient = with_grad(fq.FakeQuantizer(target.name), x)
    assert torch.isfinite(gradient).all(), "a gradient is cut or passed, never damaged"
    if x.isfinite().all() and target.rule != "gguf" and kind != "float32's end":
        assert torch.isfinite(y).all()
    if target.rule == "gguf" and not x.isfinite().all():
        theirs = quantized_by_gguf(x, target)  # in the block: NaN, or (Q4_0, Q5_0) infinity where the infinity was
        same(y.nan_to_num(7.0, 7.0, 7.0), theirs.nan_to_num(7.0, 7.0, 7.0))
    elif target.rule == "gguf":
        same(y, quantized_by_gguf(x, target))
    elif target.rule == "mx":
        same(y, quantized_by_the_specification(x, target))
    elif target.rule == "nvfp4":
        if kind in ("one huge", "float16's end", "float32's end"):
            theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max()))
            same(y, theirs.dequantize(dtype))
        elif x.isfinite().all():  # torchao: NaN for zeros, and +-amax for all that is tiny; here small errors
            assert ((y - x).abs() <= x.abs()).all() and (y * x >= 0).all()
        else:
            assert y.isnan().all()
    elif target.rule == "absmean":
        scale = x.abs().mean().clamp(min=torch.finfo(dtype).smallest_normal).float()
        same(y, ((x * (1 / scale)).round().clamp(-1, 1) * scale).to(dtype))
    elif target.is_float:
        scale = (x.abs().max() / target.fmt.max).clamp(min=torch.finfo(dtype).smallest_normal).float().numpy()
        same(y, rounded_by_ml_dtypes(x, scale, target.fmt))
    else:
        same(y, quantized_by_torchao(x, target))
        y, theirs = fq.FakeQuantizer(target.name, "token", symmetric=False)(x), quantized_by_torchao(x, target, False)
        if kind == "float32's end":  # high - low overflows: NaN in torchao
            assert not y.isnan().any()
        elif x.isfinite().all():
            same(y, theirs)
        else:  # NaN here, infinities there: no number in either
            assert not y.isfinite().any() and not theirs.isfinite().any()


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group", "token"])
@pytest.mark.parametrize("name", ["int2", "int8", "E4M3", "E2M1"])
def test_an_odd_block_leaves_the_others_alone(name, granularity):
    x = torch.cat([randn(1, 256), odd_values("NaN"), odd_values("one huge"), odd_values("subnormal")])
    quantizer = fq.FakeQuantizer(name, granularity, 32 if granularity == "group" else None)
    y = quantizer(x)
    if granularity == "tensor":
        assert y.isnan().all()
    else:
        same(y, torch.cat([quantizer(row) for row in x.split(1)]))
        assert y[0].isfinite().all() and y[2].isfinite().all() and (y[3].abs() < 1e-37).all()
        assert y[1].isnan().sum() == (32 if granularity == "group" else 256)
