"""Recipes and regions of the emulation: fields, refusals, calibration, regions left open, and each quantizer held
against an independent implementation: the course's own formats, ml_dtypes, torchao."""

import inspect

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from qtutor import emulation as te
from qtutor import formats
from qtutor.emulation import (
    DelayedScaling,
    DType,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    QParams,
    quantizers,
    regions,
)

ALL = [DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling]
name_of = "{0.__name__}".format

pytestmark = pytest.mark.filterwarnings("ignore:Recipe type changed")


@pytest.fixture(autouse=True)
def fresh_region(monkeypatch):
    for name, value in dict(members={}, enabled=False, calibrating=False, recipe=None, depth=0, first=False).items():
        monkeypatch.setattr(regions.Region, name, value)
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("recipe", ALL, ids=name_of)
def test_exactly_one_kind_is_true_and_the_repr_names_it(recipe):
    kinds = dict(DelayedScaling="delayed", Float8CurrentScaling="float8_current_scaling", MXFP8BlockScaling="mxfp8",
                 Float8BlockScaling="float8_block_scaling", NVFP4BlockScaling="nvfp4")  # fmt: skip
    assert [name for name, method in kinds.items() if getattr(recipe(), method)()] == [recipe.__name__]
    assert recipe().float8_per_tensor_scaling() is (recipe in ALL[:2])
    assert repr(recipe()).startswith(f"{recipe.__name__}(")
    assert recipe() == recipe() and repr(recipe()) == repr(recipe())


# Names and order of the constructors' arguments in Transformer Engine 2.20.
FIELDS = {
    DelayedScaling: "margin fp8_format amax_history_len amax_compute_algo scaling_factor_compute_algo reduce_amax "
                    "fp8_dpa fp8_mha backward_override",
    Float8CurrentScaling: "use_power_2_scales fp8_format fp8_gemm_fprop fp8_gemm_dgrad fp8_gemm_wgrad fp8_dpa fp8_mha "
                          "backward_override",
    Float8BlockScaling: "use_f32_scales fp8_format x_block_scaling_dim w_block_scaling_dim grad_block_scaling_dim "
                        "fp8_gemm_fprop fp8_gemm_dgrad fp8_gemm_wgrad fp8_dpa fp8_mha backward_override",
    MXFP8BlockScaling: "margin fp8_format fp8_dpa fp8_mha backward_override enable_2d_quantization",
    NVFP4BlockScaling: "disable_rht disable_stochastic_rounding disable_2d_quantization row_scaled_activation "
                       "nvfp4_4over6 nvfp4_4over6_e4m3_use_256 nvfp4_4over6_err_mode fp4_format fp8_format fp8_dpa "
                       "fp8_mha backward_override",
}  # fmt: skip


@pytest.mark.parametrize("recipe", ALL, ids=name_of)
def test_arguments_are_some_of_the_library_s_in_its_order(recipe):
    mine = list(inspect.signature(recipe).parameters)
    assert mine == [name for name in FIELDS[recipe].split() if name in mine]


@pytest.mark.parametrize("recipe, options, kind, says", [
    (DelayedScaling, dict(fp8_dpa=True), NotImplementedError, "fp8_dpa=True"),
    (Float8CurrentScaling, dict(fp8_mha=True), NotImplementedError, "fp8_mha=True"),
    (Float8BlockScaling, dict(fp8_dpa=True), NotImplementedError, "fp8_dpa=True"),
    (MXFP8BlockScaling, dict(fp8_dpa=True), NotImplementedError, "fp8_dpa=True"),
    (NVFP4BlockScaling, dict(fp8_mha=True), NotImplementedError, "fp8_mha=True"),
    (NVFP4BlockScaling, dict(fp4_format=Format.E4M3), AssertionError, "Only E2M1"),
    (NVFP4BlockScaling, dict(fp8_format=Format.HYBRID), AssertionError, "Only E4M3"),
    *[(recipe, dict(fp8_format=Format.E5M2), AssertionError, "E5M2|E4M3") for recipe in ALL],
])  # fmt: skip
def test_what_no_recipe_can_do_is_refused_in_one_sentence(recipe, options, kind, says):
    with pytest.raises(kind, match=says) as error:
        recipe(**options)
    assert "\n" not in str(error.value) or kind is AssertionError


def test_parameters_set_on_a_recipe_reach_the_quantizers():
    recipe = Float8CurrentScaling()
    recipe.fp8_quant_fwd_inp = QParams(power_2_scale=True, amax_epsilon=3.0)
    layer = te.Linear(32, 32)
    with te.autocast(recipe=recipe):
        layer(torch.ones(16, 32))
    x, w, _ = layer.quantizers["scaling_fwd"]
    assert x(torch.ones(16, 32))._scale_inv.item() == 2.0**-7  # 448 / 3 rounded down: 128
    assert not w.force_pow_2_scales and w.amax_epsilon == 0
    assert Float8CurrentScaling().fp8_quant_fwd_inp == QParams()  # the class is not changed


def test_nvfp4_switches_reach_the_quantizers():
    for off in (False, True):
        layer = te.Linear(64, 64)
        with te.autocast(recipe=NVFP4BlockScaling(off, off, off)):
            layer(torch.ones(16, 64))
        x, w, _ = layer.quantizers["scaling_fwd"]
        dy, _ = layer.quantizers["scaling_bwd"]
        assert [x.with_rht, w.with_2d_quantization, dy.with_rht, dy.stochastic_rounding] == [not off] * 4
        assert not (x.stochastic_rounding or x.with_2d_quantization or w.with_rht or w.stochastic_rounding
                    or dy.with_2d_quantization)  # fmt: skip


# -------------------------------------------------------------------------------------------- numbers, by oracles
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


# ------------------------------------------------------------------------------------------------- calibration
def state_of(layer, direction="fwd"):
    return layer.fp8_meta[f"scaling_{direction}"]


def test_calibration_notes_amax_in_high_precision_and_the_next_region_uses_it():
    recipe, layer = DelayedScaling(amax_history_len=4), te.Linear(32, 48)
    x = torch.randn(16, 32)
    with torch.no_grad():
        plain = layer(x)
        with te.autocast(enabled=False, calibrating=True, recipe=recipe):
            assert torch.equal(layer(x), plain)
            layer(x / 2)  # sets, as the real one does, and does not keep the larger
    state = state_of(layer)
    assert state.amax_history[0].tolist() == [x.abs().max() / 2, layer.weight.abs().max(), 0]
    assert state.scale.tolist() == [1, 1, 1] and not state_of(layer, "bwd").amax_history.any()
    with torch.no_grad(), te.autocast(recipe=recipe):
        layer(x)
    assert state.scale.tolist() == [1, 1, 1]  # evaluation moves no scale, not even calibrated ones
    with te.autocast(recipe=recipe):
        layer(x / 4)
    assert state.scale[0] == np.float32(448) / np.float32(x.abs().max().item())


def test_calibration_takes_any_size_and_its_state_reaches_a_checkpoint():
    layer = te.Linear(20, 12)
    with te.autocast(enabled=False, calibrating=True, recipe=DelayedScaling(amax_history_len=2)):
        layer(torch.ones(7, 20))
    assert layer.state_dict()["_extra_state"].numel() > 0
    assert state_of(layer).amax_history[0, 0] == 1


@pytest.mark.parametrize("recipe", ALL[1:], ids=name_of)
def test_calibration_of_the_other_recipes_notes_nothing(recipe):
    layer, x = te.Linear(32, 32), torch.randn(32, 32)
    with te.autocast(enabled=False, calibrating=True, recipe=recipe()):
        y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.state_dict()["_extra_state"].numel() == 0


# ---------------------------------------------------------------------------------------------------- regions
def test_regions_nest_and_restore_what_was_outside():
    layer, x = te.Linear(32, 32), torch.randn(32, 32)
    high = layer(x)
    with te.autocast(recipe=Float8CurrentScaling()):
        low = layer(x)
        with te.autocast(enabled=False):
            assert torch.equal(layer(x), high)
        assert torch.equal(layer(x), low) and not torch.equal(low, high)
        with te.autocast(recipe=MXFP8BlockScaling()):
            assert not torch.equal(layer(x), low)
        assert isinstance(regions.Region.recipe, Float8CurrentScaling) and regions.Region.depth == 1
    assert torch.equal(layer(x), high) and not regions.Region.enabled and regions.Region.depth == 0


def test_an_exception_closes_every_region_and_still_updates():
    layer, recipe = te.Linear(32, 32), DelayedScaling(amax_history_len=4)
    with pytest.raises(KeyError), te.autocast(recipe=recipe), te.autocast(recipe=recipe):
        layer(torch.full((16, 32), 2.0))
        raise KeyError
    assert not regions.Region.enabled and regions.Region.depth == 0
    assert state_of(layer).scale[0] == 224


def test_a_region_may_be_used_again_but_not_twice_at_once():
    region = te.autocast(recipe=Float8CurrentScaling())
    for _ in range(2):
        with region:
            assert regions.Region.enabled
    with region, pytest.raises(RuntimeError, match="more than once concurrently"):
        region.__enter__()
    assert regions.Region.depth == 0  # the refused one did not count
    with pytest.raises(TypeError):
        region.__exit__(None, None, None)
    assert regions.Region.depth == 0


def test_a_region_left_open_keeps_fp8_on_and_stops_the_scales():
    layer, recipe, x = te.Linear(32, 32), DelayedScaling(amax_history_len=4), torch.full((16, 32), 2.0)
    forgotten = te.autocast(recipe=recipe)
    forgotten.__enter__()
    assert not torch.equal(layer(x / 3), nn.functional.linear(x / 3, layer.weight, layer.bias))
    for _ in range(3):
        with te.autocast(recipe=recipe):
            layer(x)
    assert regions.Region.enabled and state_of(layer).scale[0] == 1 and state_of(layer).amax_history[0, 0] == 2
    forgotten.__exit__(None, None, None)
    assert not regions.Region.enabled and state_of(layer).scale[0] == 224


@pytest.mark.parametrize("recipe", ["delayed", "DelayedScaling()", 3, {"margin": 0}])
def test_something_that_is_no_recipe_is_refused_and_opens_nothing(recipe):
    with pytest.raises(AttributeError, match="pass a recipe, for example DelayedScaling"), te.autocast(recipe=recipe):
        pass
    assert regions.Region.depth == 0 and not regions.Region.enabled


def test_everything_is_available_in_the_emulation():
    for name in dir(te):
        if name.startswith("is_") and name.endswith("_available"):
            check = getattr(te, name)
            assert check() is True and check(return_reason=True) == (True, "") and "capability" in check.__doc__, name


@pytest.mark.parametrize("recipe, rows, sizes", [
    (DelayedScaling, 24, (24, 64)), (Float8CurrentScaling, 7, (64, 64)), (Float8BlockScaling, 12, (128, 128)),
    (MXFP8BlockScaling, 32, (48, 64)), (MXFP8BlockScaling, 48, (64, 64)), (NVFP4BlockScaling, 32, (24, 64)),
])  # fmt: skip
def test_sizes_that_a_recipe_cannot_multiply_are_refused_in_one_sentence(recipe, rows, sizes):
    layer, x = te.Linear(*sizes), torch.ones(rows, sizes[0])
    layer(x)  # high precision takes any size
    with pytest.raises(ValueError, match="divisible by") as error, te.autocast(recipe=recipe()):
        layer(x)
    message = str(error.value)
    assert any(f"dims={list(t.shape)}" in message for t in (x, layer.weight)) and len(message.splitlines()) == 1
    assert regions.Region.depth == 0
