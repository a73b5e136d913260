"""record_fp8, as far as no GPU is needed: kernels, the refusal, and what has been recorded."""

import itertools

import pytest
import torch

from qtutor import QtutorError, results
from qtutor.rigs import fp8_layers
from tools import record_fp8, record_training

GPU = "h100"


@pytest.mark.parametrize("kernel, kind", [
    ("nvjet_sm90_qrtst_144x128_128x6_1x2_h_bz_coopA_algo2_TNN", "matrix products"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>", "attention"),
    ("cast_transpose_optimized_kernel(__nv_bfloat16 const*, float const*, __nv_fp8_e4m3*)", "quantization"),
    ("transformer_engine::delayed_scaling_recipe::amax_and_scale_update_impl::kernel_bulk", "quantization"),
    ("transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<__nv_fp8_e4m3>", "norms and activations"),
    ("void transformer_engine::gated_act_kernel<16, true, float, silu>", "norms and activations"),
    ("elementwise_kernel<128, 4, gpu_kernel_impl_nocast<CUDAFunctor_add<BFloat16>>>", "norms and activations"),
    ("elementwise_kernel<128, 4, gpu_kernel_impl_nocast<direct_copy_kernel_cuda>>", "other"),
    ("Memset (Device)", "other"),
])  # fmt: skip
def test_kernels_seen_on_an_h200_are_sorted(kernel, kind):
    assert record_fp8.kind_of(kernel) == kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("record", (record_fp8.RECORDS | record_training.RECORDS).values())
def test_without_a_gpu_the_records_refuse_in_one_sentence(record):
    with pytest.raises(QtutorError, match="need a GPU with FP8 units") as caught:
        record(False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fp8_gemm", "fp8_layers", "fp8_profile", "fp8_breakeven", "fp8_inference"])
def test_recorded_results_are_complete_and_consistent(name):
    recorded = results.load(name, GPU)
    frame = recorded.frame()
    assert recorded.device.startswith("NVIDIA H") and recorded.versions["transformer_engine"]
    if name == "fp8_layers":
        known = {*fp8_layers.RUNGS, *fp8_layers.BRANCHES, "TE BF16 (again)"}
        assert set(frame["shape"]) <= set(fp8_layers.SHAPES) and set(frame["rung"]) == known
        seconds = frame["ms_per_step"] * frame["repeats"] / 1000
        assert (seconds[~frame["rung"].isin(fp8_layers.BRANCHES)] > 9).all()  # energy windows of ten seconds
        for row in recorded.rows:
            shape = fp8_layers.SHAPES[row["shape"]]
            assert (row["tokens"], row["hidden"]) == (shape.tokens, shape.hidden)
            assert row["tflop_per_s"] == pytest.approx(shape.flop() / row["ms_per_step"] / 1e9, rel=1e-3)
            assert row["ms_p10"] <= row["ms_per_step"] <= row["ms_p90"] and 0 < row["share_of_peak"] < 1
    if name == "fp8_breakeven":
        assert len(frame) == 2 * len(set(frame["hidden"])) * len(set(frame["tokens"]))
        assert frame["speedup"].to_numpy() == pytest.approx((frame["ms_bf16"] / frame["ms_fp8"]).to_numpy(), rel=1e-3)
    if name == "fp8_gemm":
        products = frame[frame["what"].str.contains("product")]
        flop = 2.0 * products["m"] * products["n"] * products["k"]
        assert products["tflop_per_s"].to_numpy() == pytest.approx(
            (flop / products["ms_per_step"] / 1e9).to_numpy(), rel=2e-3
        )
    if name == "fp8_inference":
        shape = frame[frame["model"] == "Llama-2-7B shape"]
        rate = 1000 * shape["batch"] / shape["ms_per_step"]
        assert shape["decode_tokens_per_s"].to_numpy() == pytest.approx(rate.to_numpy(), rel=1e-3)
        assert shape["batch"].value_counts().nunique() == 1 and shape["time_to_first_token_ms"].notna().sum() > 3


def test_recorded_losses_have_every_recipe_and_seed():
    if not results.exists("fp8_loss", GPU):
        pytest.skip("not recorded yet")
    frame = results.load("fp8_loss", GPU).frame()
    runs = set(zip(frame["recipe"], frame["seed"], strict=True))
    assert {recipe for recipe, _ in runs} == set(record_fp8.LOSS_RECIPES)
    assert runs == set(itertools.product(record_fp8.LOSS_RECIPES, range(record_fp8.LOSS_SEEDS)))
    ends = frame[frame["step"] == frame["steps"]]
    assert len(ends) == len(runs) and ends["held_out_nats"].between(1, 5).all()
