"""Recipes of the emulation: fields, refusals, and what reaches the quantizers."""

import inspect

import pytest
import torch

from qtutor import emulation as te
from qtutor.emulation import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    QParams,
)

ALL = [DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling]
name_of = "{0.__name__}".format

pytestmark = pytest.mark.filterwarnings("ignore:Recipe type changed")


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
