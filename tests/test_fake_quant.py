"""qtutor.fake_quant against torchao, torch's own fake_quantize operators, and finite differences."""

import copy
import logging

import pytest
import torch
from torch import nn

for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

from torchao.quantization import quantize_  # noqa: E402
from torchao.quantization.granularity import PerRow  # noqa: E402
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig  # noqa: E402
from torchao.quantization.qat.fake_quantize_config import Float8FakeQuantizeConfig  # noqa: E402
from torchao.quantization.qat.fake_quantizer import Float8FakeQuantizer, IntxFakeQuantizer  # noqa: E402
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine  # noqa: E402

import qtutor  # noqa: E402
from qtutor import fake_quant as fq  # noqa: E402
from qtutor import ste  # noqa: E402


def randn(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::97] *= 8  # outliers
    x.view(-1)[5:9] = 0.0
    return x.to(dtype)


def with_grad(function, x, seed=9):
    """Output and gradient of `function` at x for a random upstream gradient."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(randn(*y.shape, seed=seed).to(y.dtype))
    return y.detach(), x.grad


def assert_same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b), f"max difference {(a.float() - b.float()).abs().max()}"


def assert_same_as_torchao(mine, theirs):
    """Output bit for bit; gradient the same zeros and the same values up to rounding.

    (torchao's gradient goes through x * (1 / scale) and back through * scale: (g * s) * (1 / s) is g give or take a
    rounding.  Ours is exactly g, as in torch.fake_quantize_*.)
    """
    assert_same(mine[0], theirs[0])
    tolerance = 1e-5 if mine[1].dtype == torch.float32 else 2**-6
    torch.testing.assert_close(mine[1], theirs[1], rtol=tolerance, atol=0)
    assert_same(mine[1] == 0, theirs[1] == 0)


# ------------------------------------------------------------------- bit for bit against torch, torchao


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


@pytest.mark.parametrize("mapping, options", [
    (MappingType.SYMMETRIC, dict()),
    (MappingType.SYMMETRIC_NO_CLIPPING_ERR, dict(no_clipping=True)),
    (MappingType.ASYMMETRIC, dict(symmetric=False)),
])  # fmt: skip
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_choose_qparams_equals_torchao(bits, mapping, options):
    x = torch.cat([randn(20, 64), randn(5, 64).abs(), -randn(5, 64).abs()])
    quantizer = fq.FakeQuantizer(f"int{bits}", "channel", **options)
    low, high = quantizer.target.quant_min, quantizer.target.quant_max
    scale, zero_point = choose_qparams_affine(x, mapping, (1, 64), torch.int8, low, high)
    mine, my_zero = quantizer.qparams(x)
    assert_same(mine.flatten(), scale)
    assert_same((torch.zeros_like(mine) if my_zero is None else my_zero).flatten().int(), zero_point)


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

    mine = with_grad(lambda x: fq.fake_quantize(x, scale, zero_point, low, high), x)
    for a, b in zip(mine, with_grad(reference, x), strict=True):
        assert_same(a, b)
    assert 0 < (mine[1] == 0).float().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_one_kernel_of_a_gpu_computes_the_same(bits, symmetric, dtype):
    x = (torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    x[3] = 0
    scale, zero_point = fq.FakeQuantizer(f"int{bits}", symmetric=symmetric).qparams(x)
    scale = 0.7 * scale.float()  # so that values are clipped at both ends
    scale[0] = x[0].abs().max().float() / 2.5  # and one row has ties
    lo, hi = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    leaf = x.clone().requires_grad_()
    y = fq.fake_quantize(leaf, scale, zero_point, lo, hi)
    y.backward(torch.ones_like(y))
    one, inside = ste._in_one_kernel(x, scale, None if zero_point is None else zero_point.float(), lo, hi)
    assert one.dtype == y.dtype and torch.equal(one, y) and torch.equal(inside, leaf.grad != 0)
    assert not inside.all()


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


def test_equals_torch_per_tensor_at_ties_and_ends():
    x = torch.arange(-400, 401) / 4.0  # every quarter step: all ties, both ends
    for zero_point in (0, 3, -5):
        mine = with_grad(lambda x, z=zero_point: fq.fake_quantize(x, 0.5, z, -8, 7), x)
        reference = with_grad(lambda x, z=zero_point: torch.fake_quantize_per_tensor_affine(x, 0.5, z, -8, 7), x)
        for a, b in zip(mine, reference, strict=True):
            assert_same(a, b)


def test_gradient_is_that_of_the_piecewise_linear_surrogate():
    """Finite differences of clamp(x, lowest, highest) (what the STE pretends the quantizer is)."""
    scale, low, high = 0.25, -4, 3
    x = randn(1000).double() * 0.7
    edges = torch.tensor([(low - 0.5) * scale, (high + 0.5) * scale], dtype=torch.float64)
    x = x[((x[:, None] - edges).abs() > 1e-3).all(1)]
    _, gradient = with_grad(lambda x: fq.fake_quantize(x, scale, None, low, high), x, seed=3)
    upstream = randn(*x.shape, seed=3).double()

    def surrogate(x):
        return (x.clamp(*edges) * upstream).sum()

    h = 1e-6
    numerical = torch.stack(
        [(surrogate(x + h * e) - surrogate(x - h * e)) / (2 * h) for e in torch.eye(len(x), dtype=torch.float64)]
    )
    torch.testing.assert_close(gradient, numerical, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E2M3", "E3M2", "E2M1"])
def test_float_targets_land_on_the_grid(name):
    from qtutor.formats import FORMATS

    x = randn(16, 64)
    quantizer = fq.FakeQuantizer(name, "group", 16)
    scale, zero_point = quantizer.qparams(x)
    assert zero_point is None
    y, gradient = with_grad(quantizer, x)
    on_grid = fq.to_blocks(y, "group", 16) / scale
    grid = FORMATS[name].grid()
    assert (on_grid.reshape(-1, 1) - grid).abs().min(dim=1).values.max() <= 1e-5 * FORMATS[name].max
    assert_same(gradient, randn(*x.shape, seed=9))  # nothing clips at scale = amax / max
    x = torch.tensor([0.9, 1.0, 1.001, 3.0, -3.0]) * FORMATS[name].max  # the end, just beyond, far beyond
    _, gradient = with_grad(lambda x: fq.fake_quantize_float(x, 1.0, name), x)
    assert (gradient != 0).tolist() == [True, True, True, False, False]


# ---------------------------------------------------------------------------------------- observers


def test_minmax_and_moving_average_equal_torch():
    from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

    batches = [randn(64, 8, seed=s) * (s + 1) for s in range(6)]
    for mine, theirs in [
        (fq.MinMaxObserver(), MinMaxObserver()),
        (fq.MovingAverageObserver(), MovingAverageMinMaxObserver(averaging_constant=0.01)),
    ]:
        for batch in batches:
            mine.observe(fq.to_blocks(batch, "tensor"))
            theirs(batch)
        assert mine.lo.item() == theirs.min_val.item() and mine.hi.item() == theirs.max_val.item()


def test_percentile_and_mse_ignore_an_outlier():
    x = randn(1, 20001, seed=4).clamp(-3, 3)
    x[0, 0] = 60.0  # mean squared error if clipped to 3: 57**2 / 20001 = 0.16
    errors = {}
    for observer in (fq.MinMaxObserver(), fq.PercentileObserver(99.9), fq.MSEObserver(smallest=0.02, steps=100)):
        observer.observe(x)
        scale, zero_point = observer.qparams("int4")
        error = (fq.fake_quantize(x, scale, zero_point, -8, 7) - x)[:, 1:].square().mean().item()
        errors[type(observer).__name__] = error
    assert errors["PercentileObserver"] < errors["MinMaxObserver"] / 10
    assert errors["MSEObserver"] < errors["MinMaxObserver"] / 5


def test_percentile_is_the_order_statistic():
    observer = fq.PercentileObserver(90)
    observer.observe(torch.arange(101.0).flip(0).reshape(1, -1))
    lo, hi = observer.range("int8", True, False)
    assert (lo.item(), hi.item()) == (10.0, 90.0)


def test_mse_is_the_best_of_its_candidates():
    x = randn(6, 256)
    observer = fq.MSEObserver()
    observer.observe(x)
    scale, _ = observer.qparams("int3")
    best = (fq.fake_quantize(x, scale, None, -4, 3) - x).square().mean(1)
    full = fq.FakeQuantizer("int3").qparams(x)[0]
    for factor in torch.linspace(0.2, 1, 80).tolist():
        assert (best <= (fq.fake_quantize(x, full * factor, None, -4, 3) - x).square().mean(1) * (1 + 1e-5)).all()


def test_static_quantizer_needs_data_then_freezes():
    quantizer = fq.FakeQuantizer("int8", "tensor", symmetric=False, observer=fq.MinMaxObserver())
    with pytest.raises(qtutor.QtutorError, match="calibrate"):
        quantizer(randn(4, 4))
    model = nn.Sequential(nn.Linear(16, 16))
    fq.prepare(model, weight="int8", activation=quantizer)
    with pytest.raises(qtutor.QtutorError, match="calibrate"):
        model(randn(3, 16))
    with pytest.raises(qtutor.QtutorError, match="calibrate"), fq.calibrate(model):
        pass
    with fq.calibrate(model), torch.no_grad():
        seen = model(randn(8, 16))
        assert_same(seen, torch.nn.functional.linear(randn(8, 16), model[0].weight, model[0].bias))
    static = model[0].activation_fake_quant
    frozen = static.scale.clone()
    model(100 * randn(8, 16))
    assert_same(static.scale, frozen)
    fresh = fq.prepare(nn.Sequential(nn.Linear(16, 16)), weight="int8", activation=quantizer)
    fresh.load_state_dict(model.state_dict())
    assert_same(fresh(randn(5, 16)), model(randn(5, 16)))


def test_calibrating_with_nan_or_without_observers_is_refused():
    quantizer = fq.FakeQuantizer("int8", "tensor", observer=fq.MinMaxObserver())
    model = fq.prepare(nn.Sequential(nn.Linear(4, 4)), activation=quantizer)
    with pytest.raises(qtutor.QtutorError, match="NaN"), fq.calibrate(model):
        model(torch.full((2, 4), float("nan")))
    with pytest.raises(qtutor.QtutorError, match="observer"), fq.calibrate(fq.prepare(nn.Sequential(nn.Linear(4, 4)))):
        pass


# ------------------------------------------------------------------------------- prepare and convert


class Tiny(nn.Module):
    def __init__(self, width=64, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(width, 96, bias=bias), nn.GELU(), nn.Linear(96, width))
        self.lm_head = nn.Linear(width, 10)

    def forward(self, x):
        return self.lm_head(self.body(x))


def test_prepare_keeps_parameters_and_skips():
    model = Tiny()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert fq.prepare(model, "int4", "int8", group_size=32) is model
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.body[0], fq.FakeQuantLinear)
    assert list(model.state_dict()) == keys  # a float checkpoint still loads
    for name, parameter in model.named_parameters():
        assert parameter is before[name]


def test_whole_model_equals_torchao_qat():
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    theirs, mine = Tiny().body, Tiny().body
    quantize_(theirs, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    fq.prepare(mine, "int4", "int8", group_size=32)
    x = randn(5, 7, 64)
    a, b = with_grad(mine, x), with_grad(theirs, x)
    assert_same(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("weight, activation, group_size", [
    ("int2", None, 32), ("int3", None, None), ("int4", "int8", 32), ("int5", "int8", 16), ("int6", None, None),
    ("int7", None, 32), ("int8", None, None), ("int8", "int8", None), ("E4M3", "E4M3", None), ("E2M1", None, 16),
    ("E3M2", None, None), (fq.FakeQuantizer("int4", "group", 32, symmetric=False), None, None),
    (fq.FakeQuantizer("int8", "tensor"), None, None), (fq.FakeQuantizer("int2", no_clipping=True), None, None),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_keeps_the_trained_numbers(weight, activation, group_size, dtype):
    if isinstance(weight, str) and weight.startswith("E") or activation == "E4M3":
        pytest.importorskip("qtutor.formats")
    model = fq.prepare(Tiny().to(dtype), weight, activation, group_size)
    x = randn(6, 64).to(dtype)
    with torch.no_grad():
        before = model(x)
        packed = fq.convert(copy.deepcopy(model), backend="packed")
        auto = fq.convert(copy.deepcopy(model))
        assert_same(packed(x), before)
        if dtype == torch.float32:
            assert_same(auto(x), before)
    assert not any(isinstance(m, fq.FakeQuantLinear) for m in [*packed.modules(), *auto.modules()])
    bits = fq.Target.of(weight).bits if isinstance(weight, str) else weight.target.bits
    rows = {row["layer"]: row for row in fq.weight_bytes(packed)}
    layer = packed.body[0]
    assert layer.codes.numel() == 96 * 64 * bits // 8
    assert rows["body.0"]["bytes"] == layer.nbytes < 96 * 64 * (bits + 4) / 8
    assert rows["lm_head"]["kind"] == str(dtype).removeprefix("torch.")
    fresh = fq.convert(fq.prepare(Tiny().to(dtype), weight, activation, group_size), backend="packed")
    fresh.load_state_dict(packed.state_dict())


def test_convert_through_torchao_stores_a_torchao_tensor():
    model = fq.prepare(Tiny(), "int8", "int8")
    with torch.no_grad():
        before = model(randn(6, 64))
        fq.convert(model)
        assert type(model.body[0].weight).__name__ == "IntxUnpackedToInt8Tensor"
        assert_same(model(randn(6, 64)), before)
    model = fq.convert(fq.prepare(Tiny(), "int4", group_size=32), backend="torchao")
    assert {"float32"} < {row["kind"] for row in fq.weight_bytes(model)}
    with pytest.raises(qtutor.QtutorError, match="packed"):
        fq.convert(fq.prepare(Tiny(), fq.FakeQuantizer("int4", "tensor")), backend="torchao")


def test_convert_never_silently_does_nothing():
    for backend in ("auto", "packed", "torchao"):
        with pytest.raises(qtutor.QtutorError, match="nothing was converted"):
            fq.convert(Tiny(), backend=backend)
    with pytest.raises(qtutor.QtutorError, match="nothing was converted"):
        fq.convert(fq.convert(fq.prepare(Tiny(), "int4"), backend="packed"))
    with pytest.raises(qtutor.QtutorError, match="backend"):
        fq.convert(fq.prepare(Tiny()), backend="tensorrt")


def test_bad_input_is_one_sentence_and_changes_nothing():
    model = Tiny(width=60)
    for bad in (dict(group_size=32), dict(weight="int9"), dict(weight="banana"), dict(skip=("body", "lm_head"))):
        with pytest.raises(qtutor.QtutorError):
            fq.prepare(model, **bad)
        assert not any(isinstance(m, fq.FakeQuantLinear) for m in model.modules())
    model.body[2].weight.data[0, 0] = float("nan")
    with pytest.raises(qtutor.QtutorError, match="body.2"):
        fq.prepare(model)
    for bad in (lambda: fq.fake_quantize(randn(4, 6), torch.ones(4, 4), None, -8, 7),
                lambda: fq.fake_quantize(randn(4, 6), torch.ones(3, 1), None, -8, 7),
                lambda: fq.fake_quantize(randn(4, 6), torch.ones(5, 4, 6), None, -8, 7),
                lambda: fq.fake_quantize(randn(4, 6), 1.0, None, 7, 7),
                lambda: fq.FakeQuantizer("int4", "group"),
                lambda: fq.FakeQuantizer("int4", "token", observer=fq.MinMaxObserver()),
                lambda: fq.FakeQuantizer("int4", "row")(randn(4, 4)),
                lambda: fq.FakeQuantizer("E8M0"),
                lambda: fq.PercentileObserver(0)):  # fmt: skip
        with pytest.raises(qtutor.QtutorError):
            bad()
    assert fq.FakeQuantizer("int4", "token")(torch.empty(0, 8)).shape == (0, 8)


def test_group_scales_broadcast_over_columns():
    x = randn(4, 64)
    quantizer = fq.FakeQuantizer("int4", "group", 16)
    scale, _ = quantizer.qparams(x)
    assert_same(fq.fake_quantize(x, scale.view(4, 4), None, -8, 7), quantizer(x))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 8, 61])
def test_packing_round_trip(bits, n):
    codes = torch.randint(0, 2**bits, (5, n), dtype=torch.uint8)
    packed = fq.pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-n // 8) * bits)
    assert_same(fq.unpack_codes(packed, bits, n), codes)


def test_training_through_the_quantizer_reduces_the_loss_and_float_can_not_see_it():
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    target = Tiny()(x).detach() + 0.5
    model = fq.prepare(Tiny(), "int2", skip=())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_convert_of_a_single_linear_returns_the_new_module():
    linear = fq.prepare(nn.Linear(32, 8), "int4")
    assert isinstance(linear, fq.FakeQuantLinear)
    assert isinstance(fq.convert(linear), fq.QuantizedLinear)
