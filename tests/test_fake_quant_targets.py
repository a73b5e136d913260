"""The formats with blocks of their own, ternary and learned scales, against gguf, torchao, ml_dtypes and torch."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

import gguf  # noqa: E402
import ml_dtypes  # noqa: E402
from torchao.prototype.mx_formats.config import ScaleCalculationMode  # noqa: E402
from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: E402
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale  # noqa: E402

import qtutor  # noqa: E402
from qtutor import fake_quant as fq  # noqa: E402

GGUF = ["Q8_0", "Q5_0", "Q4_0", "TQ2_0"]
MX = [("MXFP8", torch.float8_e4m3fn), ("MXFP4", torch.float4_e2m1fn_x2)]


def hard_values(rows=64, columns=512, seed=0):
    """Weights at scales from subnormal to large, rows of zeros, ties, and blocks with +amax and -amax."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-6, 4, rows)[:, None]
    x[3] = 0.0
    x[4, :256] = 0.0
    x[5, 7], x[5, 9] = -9.0, 9.0  # equal magnitudes: the first counts
    x[6, 9], x[6, 7] = -9.0, 9.0
    x[7] = torch.arange(columns) / 4 - 64  # ties of every grid
    x[8] = torch.arange(columns) % 33 - 16.0
    return x


def with_grad(function, x):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    y.backward(upstream)
    return y.detach(), x.grad, upstream


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


@pytest.mark.parametrize("name", GGUF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_blocks_are_stored_in_llama_cpps_bytes(name, dtype):
    layer = nn.Linear(512, 32, dtype=dtype)
    model = fq.prepare(nn.Sequential(layer), name)
    seen = model[0].weight_fake_quant(model[0].weight).detach()
    stored = fq.convert(copy.deepcopy(model))[0]
    assert torch.equal(stored.dequantize(), seen)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert stored.nbytes == 512 * 32 // block * size
    baked = fq.bake(model)
    assert type(baked[0]) is nn.Linear and torch.equal(baked[0].weight, seen)


@pytest.mark.parametrize("name, dtype", MX)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded_up", [False, True])
def test_mx_equals_torchao(name, dtype, x_dtype, rounded_up):
    x = hard_values().to(x_dtype)
    mode = ScaleCalculationMode.RCEIL if rounded_up else ScaleCalculationMode.FLOOR
    expected = MXTensor.to_mx(x, dtype, 32, scaling_mode=mode).dequantize(x_dtype)
    assert torch.equal(fq.FakeQuantizer(name, no_clipping=rounded_up)(x), expected)


@pytest.mark.parametrize("name", ["MXFP8", "MXFP6", "MXFP4", "NVFP4"])
def test_microscaling_equals_the_formats_of_notebook_01(name):
    from qtutor import formats

    x = hard_values()
    function = {"MXFP8": formats.mxfp8, "MXFP6": lambda x: formats.mxfp8(x, "E3M2"), "MXFP4": formats.mxfp4,
                "NVFP4": formats.nvfp4}[name]  # fmt: skip
    quantizer = fq.FakeQuantizer(name)
    assert torch.equal(quantizer(x), function(x).dequantize())
    linear = nn.Linear(512, 64, bias=False)
    linear.weight.data.copy_(x)
    stored = fq.convert(fq.prepare(linear, name))
    assert torch.equal(stored.dequantize(), quantizer(x))
    # the FP32 scale of a whole NVFP4 tensor is 4 bytes, and not part of the format's bits
    assert 8 * (stored.nbytes - 4 * (name == "NVFP4")) / x.numel() == {
        "MXFP8": 8.25, "MXFP6": 6.25, "MXFP4": 4.25, "NVFP4": 4.5}[name]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_equals_torchao(dtype):
    x = hard_values(seed=3).to(dtype)
    expected = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max()))
    assert torch.equal(fq.FakeQuantizer("NVFP4")(x), expected.dequantize(dtype))


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


@pytest.mark.parametrize("name", ["Q5_0", "Q4_0", "MXFP4", "NVFP4"])
def test_gradient_is_straight_inside_and_zero_outside(name):
    """Against finite differences of the line that the quantizer follows: clamp(x, ends of its grid), scale held."""
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)).double()
    quantizer = fq.FakeQuantizer(name)
    grid, target = quantizer.grid(x.float()), quantizer.target
    _, gradient, upstream = with_grad(quantizer, x.float())
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
    y, gradient, upstream = with_grad(fq.FakeQuantizer("ternary", "tensor"), w)
    scale = w.abs().mean()
    expected = (w * (1 / scale)).round().clamp(-1, 1) * scale
    assert torch.equal(y, expected) and torch.equal(gradient, upstream)
    assert len(y.unique()) == 3
    stored = fq.convert(fq.prepare(nn.Linear(96, 48), fq.FakeQuantizer("ternary", "tensor")))
    assert stored.codes.numel() == 96 * 48 // 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_learned_scale_equals_torchs_operator(bits, group_size):
    x = torch.randn(24, 96, generator=torch.Generator().manual_seed(4))
    quantizer = fq.FakeQuantizer(f"int{bits}", group_size=group_size, learned=True)
    quantizer.freeze(x)
    blocks, low, high = quantizer.blocks(x), quantizer.target.quant_min, quantizer.target.quant_max
    y, gradient, upstream = with_grad(quantizer, x)
    theirs, scale = blocks.clone().requires_grad_(), quantizer.scale.detach().flatten().requires_grad_()
    factor = (blocks.shape[1] * high) ** -0.5
    operator, zero = torch._fake_quantize_learnable_per_channel_affine, torch.zeros(len(scale))
    out = operator(theirs, scale, zero, 0, low, high, factor)
    out.backward(upstream.view_as(out))
    assert torch.equal(y.view_as(out), out) and torch.equal(gradient.view_as(theirs.grad), theirs.grad)
    torch.testing.assert_close(quantizer.scale.grad.flatten(), scale.grad, rtol=1e-4, atol=1e-5)
    assert 0.2 < quantizer.scale.grad.abs().max() / factor  # a check that can fail


def test_learned_scales_train_save_and_convert():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(256, 32)
    y = model(x).detach()
    fq.prepare(model, "int2", group_size=16, learned=True)
    began = model[0].weight_fake_quant.scale.detach().clone()
    assert sum(p.numel() for p in model.parameters() if p.shape[-1] == 1) == (32 * 64 + 64 * 32) // 16
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and not torch.equal(began, model[0].weight_fake_quant.scale)
    model[0].weight_fake_quant.scale.data[0] = -0.1  # an optimizer can push one below zero
    fresh = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    fq.prepare(fresh, "int2", group_size=16, learned=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    expected = model(x)
    assert expected.isfinite().all() and torch.equal(fq.convert(model)(x), expected)


def test_learned_activation_scale_begins_at_the_observer():
    activation = fq.FakeQuantizer("int4", "tensor", observer=fq.MSEObserver(), learned=True)
    model = fq.prepare(nn.Sequential(nn.Linear(16, 8)), "int4", activation)
    x = torch.randn(64, 16)
    with pytest.raises(qtutor.QtutorError, match="calibrate"):
        model(x)
    with fq.calibrate(model), torch.no_grad():
        model(x)
    model(x).square().sum().backward()
    assert model[0].activation_fake_quant.scale.grad.abs() > 0


# --------------------------------------------------------------------- embeddings, heads, norms, torchao


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.body, self.norm = nn.Embedding(40, 64), nn.Linear(64, 64), nn.RMSNorm(64)
        self.lm_head = nn.Linear(64, 40, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        return self.lm_head(self.norm(self.body(self.embed_tokens(ids))))


def test_overrides_reach_embeddings_head_and_norms():
    ids = torch.arange(40)[None]
    overrides = {"embed_tokens": "Q8_0", "lm_head": "Q8_0", "norm": "int8"}
    model = fq.prepare(Tied(), "int4", group_size=32, overrides=overrides)
    assert isinstance(model.embed_tokens, fq.FakeQuantEmbedding) and model.lm_head.weight is model.embed_tokens.weight
    expected = model(ids)
    expected.sum().backward()
    assert model.embed_tokens.weight.grad.abs().sum() > 0 and model.norm.weight.grad.abs().sum() > 0
    baked = fq.bake(copy.deepcopy(model))
    assert baked.lm_head.weight is baked.embed_tokens.weight and type(baked.embed_tokens) is nn.Embedding
    assert torch.equal(baked(ids), expected)
    stored = fq.convert(model)
    assert torch.equal(stored(ids), expected)
    assert stored.embed_tokens.stored is stored.lm_head.stored
    rows = {row["layer"]: row for row in fq.weight_bytes(stored)}
    assert set(rows) == {"embed_tokens", "body", "norm"}  # the tied table counts once
    assert rows["embed_tokens"]["bits_per_weight"] == 8.5
    assert not any(p.numel() > 64 for p in stored.parameters())


def test_overrides_that_cannot_be_are_refused():
    for bad, match in (
        (dict(overrides={"embed_tokens": "Q8_0"}), "share one weight"),
        (dict(overrides={"embed_tokens": "Q8_0", "lm_head": "int8"}), "share one weight"),
        (dict(overrides={"head": "int8"}), "No layer is called head"),
        (dict(overrides={"body": "int9"}), "int9"),
        (dict(weight="Q4_0", overrides={"body": None}), "nothing|no nn.Linear"),
        (dict(weight="TQ2_0"), "256"),
    ):
        model = Tied()
        with pytest.raises(qtutor.QtutorError, match=match):
            fq.prepare(model, **bad)
        assert not any(isinstance(m, fq.FakeQuantLinear) for m in model.modules())
    for bad in (lambda: fq.FakeQuantizer("Q4_0", group_size=64), lambda: fq.FakeQuantizer("NVFP4", "channel"),
                lambda: fq.FakeQuantizer("MXFP4", observer=fq.MinMaxObserver()),
                lambda: fq.FakeQuantizer("ternary", observer=fq.MinMaxObserver()),
                lambda: fq.FakeQuantizer("E4M3", learned=True),
                lambda: fq.FakeQuantizer("int4", symmetric=False, learned=True)):  # fmt: skip
        with pytest.raises(qtutor.QtutorError):
            bad()
    with pytest.raises(qtutor.QtutorError, match="prepare"):
        fq.bake(Tied())


@pytest.mark.parametrize("weight, activation", [("MXFP8", "MXFP8"), ("MXFP4", "MXFP4"), ("NVFP4", None)])
def test_torchao_stores_microscaled_layers(weight, activation):
    model = fq.prepare(nn.Sequential(nn.Linear(128, 64, dtype=torch.bfloat16)), weight, activation)
    x = torch.randn(8, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        stored = fq.convert(model, backend="torchao")
        torch.testing.assert_close(stored(x), expected, rtol=2**-7, atol=2**-8)
    row = fq.weight_bytes(stored)[0]
    assert "torchao" in row["kind"] and row["bits_per_weight"] < 8.6


def test_static_activation_that_saw_no_data_is_not_converted():
    activation = fq.FakeQuantizer("int8", "tensor", observer=fq.MinMaxObserver())
    model = fq.prepare(nn.Sequential(nn.Linear(16, 8)), "int8", activation)
    with pytest.raises(qtutor.QtutorError, match="calibrate"):
        fq.convert(model)
