"""Number formats against ml_dtypes and torchao, bit for bit, and the arithmetic of scales."""

import logging
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from probes import randn
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

from qtutor import QtutorError, formats

ORACLES = {
    "E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2, "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn, "E2M1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip
INTS = [f"INT{b}" for b in range(2, 9)]


def probes(name):
    """Grid points, midpoints, their float32 neighbours, and random values over all magnitudes; within the range."""
    fmt = formats.FORMATS[name]
    grid = fmt.grid().double().numpy()
    edges = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    rng = np.random.default_rng(0)
    low, high = math.log2(fmt.min_subnormal) - 3, math.log2(fmt.max)
    random = np.exp2(rng.uniform(low, high, 1_000_000)) * rng.choice([-1, 1], 1_000_000)
    below, above = (np.nextafter(edges, np.float32(end)) for end in (-np.inf, np.inf))
    x = np.concatenate([edges, below, above, random])
    return x.astype(np.float32).clip(-fmt.max, fmt.max)


@pytest.mark.parametrize("name", ORACLES)
def test_float_formats_are_those_of_ml_dtypes(name):
    fmt, x = formats.FORMATS[name], probes(name)
    expected = x.astype(ORACLES[name])
    got = formats.round_to(torch.from_numpy(x), fmt)
    np.testing.assert_array_equal(got.numpy().view(np.uint32), expected.astype(np.float32).view(np.uint32))
    codes = fmt.encode(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(codes, expected.view(np.uint8))


@pytest.mark.parametrize("name", ORACLES)
def test_every_code_decodes_as_ml_dtypes_says(name):
    fmt = formats.FORMATS[name]
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    expected = codes.view(ORACLES[name]).astype(np.float32)
    got = fmt.decode(torch.from_numpy(codes)).numpy()
    np.testing.assert_array_equal(got, expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(fmt.encode(torch.from_numpy(got[finite])).numpy(), codes[finite])
    np.testing.assert_array_equal(fmt.grid().numpy(), np.unique(expected[finite]))
    info = ml_dtypes.finfo(ORACLES[name])
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == (
        float(info.max), float(info.smallest_normal), float(info.smallest_subnormal))  # fmt: skip


@pytest.mark.parametrize("name, dtype", [("BF16", torch.bfloat16), ("FP16", torch.float16), ("FP32", torch.float32)])
def test_wide_formats_are_those_of_torch(name, dtype):
    fmt, info = formats.WIDE[name], torch.finfo(dtype)
    assert (fmt.bits, fmt.max, fmt.min_normal) == (info.bits, info.max, info.smallest_normal)
    magnitudes = 2.0 ** torch.linspace(math.log2(fmt.min_subnormal) - 2, math.log2(fmt.max), 100_001).double()
    x = torch.cat([magnitudes.clamp(max=fmt.max), torch.tensor([0.0, fmt.max, fmt.min_subnormal, fmt.min_normal])])
    x = x if name != "BF16" else x.float().double()  # ml_dtypes rounds float64 to float32 first
    expected = torch.from_numpy(x.numpy().astype(ml_dtypes.bfloat16 if name == "BF16" else f"f{info.bits // 8}")
                                .astype(np.float64))  # fmt: skip
    for sign in (1, -1):
        assert torch.equal(formats.round_to(sign * x, fmt).double(), sign * expected)


@pytest.mark.parametrize("name", ORACLES)
def test_beyond_the_range_is_the_largest_value(name):
    top = formats.FORMATS[name].max
    x = torch.tensor([top * 1.01, top * 100, math.inf, -top * 1.01, -math.inf, 3e38])
    assert formats.round_to(x, name).tolist() == [top, top, top, -top, -top, top]


@pytest.mark.parametrize("name", INTS)
def test_integers_round_to_even_and_saturate(name):
    fmt = formats.FORMATS[name]
    x = torch.linspace(-2.0**fmt.bits, 2.0**fmt.bits, 4 * 2**fmt.bits * 2 + 1)
    expected = np.clip(np.rint(x.numpy()), -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)
    np.testing.assert_array_equal(formats.round_to(x, fmt).numpy(), expected)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x)).numpy(), expected)
    assert fmt.grid().tolist() == list(range(fmt.min, fmt.max + 1))


def heavy_tailed(rows=32, columns=256):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=g) * torch.exp2(8 * torch.randn(rows, columns // 16, generator=g)
                                                                ).repeat_interleave(16, 1)  # fmt: skip


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_mx_is_torchaos(name):
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    dtype = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}[name]
    x = heavy_tailed()
    expected = MXTensor.to_mx(x, dtype, 32).dequantize(torch.float32)
    assert torch.equal(getattr(formats, name)(x).dequantize(), expected)


@pytest.mark.parametrize("spread", [0.02, 1.0, 50.0])
def test_nvfp4_is_torchaos(spread):
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)) * spread
    expected = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max()))
    assert torch.equal(formats.nvfp4(x).dequantize(), expected.dequantize(torch.float32))


@pytest.mark.parametrize("mapping, options", [
    (MappingType.SYMMETRIC, dict()),
    (MappingType.SYMMETRIC_NO_CLIPPING_ERR, dict(no_clipping=True)),
    (MappingType.ASYMMETRIC, dict(symmetric=False)),
])  # fmt: skip
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_choose_qparams_equals_torchao(bits, mapping, options):
    x = torch.cat([randn(20, 64), randn(5, 64).abs(), -randn(5, 64).abs(), torch.zeros(2, 64)])
    fmt = formats.get(f"int{bits}")
    scale, zero_point = choose_qparams_affine(x, mapping, (1, 64), torch.int8, fmt.min, fmt.max)
    mine, my_zero = formats.choose_qparams(*formats.block_range(x), fmt, **options)
    assert torch.equal(mine.flatten(), scale)
    assert torch.equal((torch.zeros_like(mine) if my_zero is None else my_zero).flatten().int(), zero_point)
    quantized = formats.quantize(x, fmt, "channel", symmetric=options.get("symmetric", True))
    if "no_clipping" not in options:
        assert torch.equal(quantized.scale.flatten(), scale)


def test_a_range_wider_than_float32_has_a_finite_scale():
    x = torch.tensor([[-3e38, 0.0, 3e38]])
    q = formats.quantize(x, "INT8", symmetric=False)
    assert torch.isfinite(q.scale).all() and torch.allclose(q.dequantize(), x, rtol=0.01)


def test_granularities_are_rows_of_a_view():
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    shapes = {("tensor", None): (1, 48), ("channel", None): (2, 24), ("token", None): (6, 8), ("group", 4): (12, 4)}
    for (granularity, size), shape in shapes.items():
        blocks = formats.to_blocks(x, granularity, size)
        assert blocks.shape == shape and torch.equal(blocks.flatten(), x.flatten())
    assert formats.to_blocks(x[0, 0], "channel").shape == formats.to_blocks(x[0, 0], "token").shape == (1, 8)


@pytest.mark.parametrize("granularity, group_size", [("tensor", None), ("channel", None), ("group", 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_error_is_at_most_half_a_step(granularity, group_size, symmetric):
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) + 0.5
    q = formats.quantize(x, "INT4", granularity=granularity, group_size=group_size, symmetric=symmetric)
    error = (q.dequantize() - x).abs().reshape(q.codes.shape)
    # a rounded zero point may cost the far end of an affine range another half step
    assert (error <= q.scale * (0.5 if symmetric else 1.0) * 1.0001).all()
    assert q.dequantize().shape == x.shape
    assert q.scale.numel() == {"tensor": 1, "channel": 16, "group": 64}[granularity]


def test_finer_granularity_has_less_error():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 64)[:, None]
    choices = [("tensor", None), ("channel", None), ("group", 32)]
    relative = [((formats.quantize_dequantize(x, "INT4", granularity=g, group_size=s) - x) / x.std(1, keepdim=True))
                .square().mean().item() for g, s in choices]  # fmt: skip
    assert relative[0] > relative[1] > relative[2]


@pytest.mark.parametrize("function", [formats.mxfp8, formats.mxfp4, formats.nvfp4])
def test_zeros_stay_zeros(function):
    assert torch.equal(function(torch.zeros(4, 64)).dequantize(), torch.zeros(4, 64))


@pytest.mark.parametrize("call", [
    lambda: formats.round_to(torch.tensor([1.0, math.nan]), "E4M3"),
    lambda: formats.quantize(torch.tensor([[math.nan]]), "INT4"),
    lambda: formats.quantize(torch.ones(2, 30), "INT4", granularity="group", group_size=32),
    lambda: formats.mxfp8(torch.ones(2, 30)),
    lambda: formats.mxfp4(torch.ones(2, 30)),
    lambda: formats.nvfp4(torch.ones(2, 30)),
    lambda: formats.round_to(torch.ones(2), "E9M9"),
    lambda: formats.quantize(torch.ones(2, 2), "E4M3", symmetric=False),
])  # fmt: skip
def test_mistakes_get_one_sentence(call):
    with pytest.raises(QtutorError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
