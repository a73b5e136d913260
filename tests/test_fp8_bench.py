"""fp8_bench and fp8_models, as far as no GPU is needed: arithmetic, the Llama in a graph, kernels, the refusal."""

import itertools

import pytest
import torch

from qtutor import QtutorError, course_model, results
from qtutor.rigs import fp8_bench, fp8_models

REAL = torch.cuda.is_available()


def test_shapes_are_those_of_the_published_models():
    """Whole models, from the layer's weights, embedding, head and norms: the published parameter counts."""
    published = {"Llama-2-7B": (32, 32000, 6_738_415_616), "Llama-3-8B": (32, 128256, 8_030_261_248),
                 "Llama-2-70B": (80, 32000, 68_976_648_192)}  # fmt: skip
    for name, (layers, vocabulary, count) in published.items():
        shape = fp8_bench.SHAPES[name]
        norms = (2 * layers + 1) * shape.hidden
        assert layers * shape.weights + 2 * vocabulary * shape.hidden + norms == count


def test_flop_count_agrees_with_pytorchs_counter():
    """PyTorch counts the products of a forward and backward pass; its attention counts the whole square, ours half."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    shape = fp8_bench.Shape("tiny", 64, 176, 4, 2, 2, 48)
    config = LlamaConfig(hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2,
                         attn_implementation="eager")  # fmt: skip
    layer = LlamaDecoderLayer(config, 0)
    x = torch.randn(2, 48, 64, requires_grad=True)
    cos_sin = LlamaRotaryEmbedding(config)(x, torch.arange(48)[None])
    with FlopCounterMode(display=False) as counter:
        out = layer(x, position_embeddings=cos_sin, attention_mask=None)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    attention = 6 * shape.tokens * shape.sequence * shape.hidden
    rotary = counter.get_total_flops() - (shape.flop(1) + attention)
    assert rotary == 0


def test_the_llama_without_its_wrapping_is_the_same_llama():
    model = course_model.load()
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(fp8_models.llama_logits(model, ids), expected)
        assert torch.allclose(fp8_models.llama_logits(model, ids, last_only=True)[:, 0], expected[:, -1], atol=1e-5)
        cache = fp8_models.FixedCache(model.config, 2, 40, "cpu", torch.float32)
        past = model(input_ids=ids[:, :39], use_cache=True).past_key_values
        for i, layer in enumerate(past.layers):
            cache.keys[i][:, :, :39], cache.values[i][:, :, :39] = layer.keys, layer.values
        step = fp8_models.llama_logits(model, ids[:, 39:], cache)
    assert torch.allclose(step[:, 0], expected[:, -1], atol=1e-4)


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
    assert fp8_bench._kind(kernel) == kind


def test_rungs_change_one_thing_at_a_time():
    """Each FP8 rung differs in one field from an earlier rung (the block rung: in its recipe from BF16)."""
    rungs = list(fp8_bench.RUNGS.values())
    for i, rung in enumerate(rungs[1:], start=1):
        assert any(sum(a != b for a, b in zip(vars(rung).values(), vars(earlier).values(), strict=True)) == 1
                   for earlier in rungs[:i]), rung  # fmt: skip


@pytest.mark.skipif(REAL, reason="there is a GPU here")
@pytest.mark.parametrize("call", [fp8_bench.gemm, fp8_bench.ladder, fp8_bench.breakeven, fp8_models.inference,
                                  fp8_bench.record])  # fmt: skip
def test_without_a_gpu_the_measurements_refuse_in_one_sentence(call):
    with pytest.raises(QtutorError, match="need a GPU with FP8 units") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fp8_gemm", "fp8_layers", "fp8_profile", "fp8_breakeven", "fp8_inference"])
def test_recorded_results_are_complete_and_consistent(name):
    if not results.exists(name, "h200"):
        pytest.skip("not recorded yet")
    recorded = results.load(name, "h200")
    frame = recorded.frame()
    assert recorded.device.startswith("NVIDIA H200") and recorded.versions["transformer_engine"]
    if name == "fp8_layers":
        assert set(frame["shape"]) == set(fp8_bench.SHAPES) and set(frame["rung"]) <= set(fp8_bench.RUNGS)
        for row in recorded.rows:
            shape = fp8_bench.SHAPES[row["shape"]]
            assert (row["tokens"], row["hidden"]) == (shape.tokens, shape.hidden)
            assert row["tflop_per_s"] == pytest.approx(shape.flop() / row["ms_per_step"] / 1e9, rel=1e-3)
            assert row["ms_p10"] <= row["ms_per_step"] <= row["ms_p90"] and 0 < row["share_of_peak"] < 1
    if name == "fp8_breakeven":
        assert len(frame) == 2 * len(set(frame["hidden"])) * len(set(frame["tokens"]))
        assert frame["speedup"].to_numpy() == pytest.approx((frame["ms_bf16"] / frame["ms_fp8"]).to_numpy(), rel=1e-3)
    if name == "fp8_gemm":
        products = frame[frame["what"].str.contains("product")]
        flop = 2.0 * products["m"] * products["n"] * products["k"]
        assert products["tflop_per_s"].to_numpy() == pytest.approx((flop / products["ms"] / 1e9).to_numpy(), rel=2e-3)
    if name == "fp8_inference":
        assert {"BF16", "FP8 Transformer Engine"} <= set(frame["format"])


def test_recorded_losses_have_every_recipe_and_seed():
    if not results.exists("fp8_loss", "h200"):
        pytest.skip("not recorded yet")
    frame = results.load("fp8_loss", "h200").frame()
    runs = set(zip(frame["recipe"], frame["seed"], strict=True))
    assert runs == set(itertools.product(fp8_models.LOSS_RECIPES, sorted(set(frame["seed"]))))
    assert len(set(frame["seed"])) >= 3
    ends = frame[frame["step"] == frame["steps"]]
    assert len(ends) == len(runs) and ends["held_out_nats"].between(1, 5).all()


def test_int8_products_of_few_rows_are_exact():
    a = torch.randint(-128, 128, (3, 64), dtype=torch.int8)
    b = torch.randint(-128, 128, (48, 64), dtype=torch.int8).t()
    assert torch.equal(fp8_models._int_mm(a, b), a.int() @ b.int())
