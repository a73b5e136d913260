"""Sizes against published files, to the byte; caches and buffers against what llama.cpp allocates."""

import os
import re

import families
import pytest

from qtutor import QtutorError, course_model, files, gguf_export, llamacpp
from qtutor.decide import capacity
from qtutor.decide.capacity import GIB
from tools.train_course_model import train_tokenizer

MODEL_DIR = files.DATA / "model"
pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])

# Bytes of files of Llama-3-8B-Instruct as somebody's `ls -l` lists them:
# https://huggingface.co/ddh0/UnquantizedEmbeddingTesting/raw/main/sizes.txt
LLAMA3_BYTES = {"BF16": 16068890912, "Q2_K": 3179131168, "Q3_K_L": 4321956128, "Q3_K_M": 4018917664,
                "Q3_K_S": 3664498976, "Q4_K_M": 4920733984, "Q4_K_S": 4692668704}  # fmt: skip

# Bits per weight of Llama-3.1-8B, to four digits: llama.cpp's tools/quantize/README.md
LLAMA31_BITS = {
    "IQ1_S": 2.0042, "IQ1_M": 2.1460, "IQ2_XXS": 2.3824, "IQ2_XS": 2.5882, "IQ2_S": 2.7403, "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548, "IQ3_XS": 3.4977, "IQ3_S": 3.6606, "IQ3_M": 3.7628, "IQ4_XS": 4.4597, "IQ4_NL": 4.6818,
    "Q2_K_S": 2.9697, "Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_M": 3.9960, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944, "Q5_K_S": 5.5704, "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005,
}  # fmt: skip

# GB (10^9 bytes) in the hub's file lists, rounded there to three digits, by repository:
# https://huggingface.co/tensorblock/Llama-2-7b-hf-GGUF, https://huggingface.co/TheBloke/Llama-2-13B-GGUF and
# https://huggingface.co/TheBloke/Llama-2-70B-Chat-GGUF (there, Q6_K and Q8_0 in two parts: sums from its model card)
PUBLISHED_GB = {
    "Llama-2-7B": {"Q2_K": 2.53, "Q3_K_S": 2.95, "Q3_K_M": 3.30, "Q3_K_L": 3.60, "Q4_0": 3.83, "Q4_K_S": 3.86,
                   "Q4_K_M": 4.08, "Q5_0": 4.65, "Q5_K_S": 4.65, "Q5_K_M": 4.78, "Q6_K": 5.53, "Q8_0": 7.16},
    "Llama-2-13B": {"Q3_K_S": 5.66, "Q3_K_M": 6.34, "Q3_K_L": 6.93, "Q4_0": 7.37, "Q4_K_M": 7.87, "Q5_0": 8.97,
                    "Q5_K_M": 9.23, "Q6_K": 10.68, "Q8_0": 13.83},
    "Llama-2-70B": {"Q3_K_S": 29.9, "Q3_K_L": 36.1, "Q4_0": 38.9, "Q4_K_M": 41.42, "Q5_K_M": 48.75, "Q6_K": 56.59,
                    "Q8_0": 73.29},
}  # fmt: skip

# Files of 2023 whose recipe llama.cpp has tuned since (tools/quantize/README.md links the pull requests: "k-quants
# tuning", "quantization tuning"): Q2_K has become much smaller, a few tensors of the others went up a type.
CHANGED_GB = {("Llama-2-13B", "Q2_K"): 5.43, ("Llama-2-13B", "Q4_K_S"): 7.41, ("Llama-2-70B", "Q2_K"): 29.28,
              ("Llama-2-70B", "Q3_K_M"): 33.2, ("Llama-2-70B", "Q4_K_S"): 39.1}  # fmt: skip

# GiB of Llama-2-70B in llama.cpp's tools/perplexity/README.md ("Llama 2 70B Scoreboard"), types unchanged since
LLAMA2_GIB = {"Q4_0": 36.20, "Q4_1": 40.20, "Q5_0": 44.20, "Q3_K_S": 27.86, "Q3_K_L": 33.67, "Q5_K_S": 44.20,
              "Q5_K_M": 45.41, "Q6_K": 52.70, "F16": 128.5}  # fmt: skip


@pytest.mark.slow
def test_llama_3_8b_to_the_byte():
    # the header (tokenizer and metadata) is the same in each file: what is left of the published size must be, too
    headers = {size - capacity.size("Llama-3-8B", name).tensor_bytes for name, size in LLAMA3_BYTES.items()}
    assert len(headers) == 1
    assert 7e6 < headers.pop() < 9e6  # 128,256 tokens and 280,147 merges as text


@pytest.mark.slow
@pytest.mark.parametrize("name", LLAMA31_BITS)
def test_llama_31_8b_bits_per_weight(name):
    assert round(capacity.size("Llama-3.1-8B", name).bits_per_weight, 4) == LLAMA31_BITS[name]


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED_GB)
def test_llama_2_files(model):
    for name, published in PUBLISHED_GB[model].items():
        digits = len(str(published).split(".")[1]) if model == "Llama-2-70B" else 2
        assert abs(capacity.size(model, name).gb - published) < 0.6 * 10**-digits, name


@pytest.mark.parametrize("model, name", CHANGED_GB)
def test_recipes_that_changed_are_near(model, name):
    """Within what the change explains; equal would mean that this llama.cpp is older than the change."""
    published = CHANGED_GB[model, name]
    assert 0.85 * published < capacity.size(model, name).gb < 1.02 * published


def test_llama_2_70b_scoreboard():
    for name, published in LLAMA2_GIB.items():
        assert abs(capacity.size("Llama-2-70B", name).gib - published) < (0.06 if name == "F16" else 0.006), name


def test_seed_case():
    size = capacity.size("Llama-2-70B", "Q6_K")
    assert round(size.tensor_bytes / 2**20, 2) == 53965.19  # what llama-quantize --dry-run prints
    assert set(size.types) == {"F32", "Q6_K"}
    assert size.read_bytes == size.tensor_bytes - 32000 * 8192 // 256 * 210
    assert capacity.parameters("Llama-2-70B") == 68_976_648_192


@pytest.mark.slow
@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS", "TQ2_0"])
def test_equals_the_file_that_is_made(name, tmp_path):
    """Header, tokenizer and all: the course model's file, exported and quantized for real."""
    source = gguf_export.export(MODEL_DIR, tmp_path / "f16.gguf", dtype="f16")
    made = source if name == "F16" else llamacpp.quantize(source, tmp_path / "q.gguf", name)
    assert capacity.size(MODEL_DIR, name).file_bytes == made.stat().st_size
    planned = {t.name: (t.type, t.nbytes) for t in capacity.plan(MODEL_DIR, name)}
    assert planned == {t.name: (t.type, t.nbytes) for t in llamacpp.check_gguf(made).tensors}


@pytest.mark.slow
def test_a_plan_takes_no_disk_and_leaves_nothing(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stub = capacity.write_stub(tmp_path / "stub.gguf", "Llama-2-70B")
    stat = stub.path.stat()
    assert stat.st_size > 130e9
    assert stat.st_blocks * 512 < 8e6
    stub.path.unlink()
    capacity._plan.cache_clear(), capacity._header.cache_clear(), capacity._buffer.cache_clear()
    capacity.fits("Llama-2-7B", "Q4_0", 512)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ cache and buffers


def _allocated(path, ctx, kv_type, users):
    """MiB of KV cache and compute buffer that llama.cpp logs for a real context."""
    lib = llamacpp.native()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_seq_max, options.n_batch, options.n_ubatch = ctx * users, users, 2048, 512
    options.flash_attn_type, options.op_offload = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, False
    options.type_k = options.type_v = llamacpp.GGML[kv_type].number
    llamacpp.log.clear()
    context = lib.llama_init_from_model(model, options)
    log = "".join(llamacpp.log)
    lib.llama_free(context), lib.llama_model_free(model)

    def find(kind):
        return sum(map(float, re.findall(rf"{kind} buffer size *= *([\d.]+) MiB", log)))

    return find("KV"), find("compute")


@pytest.mark.parametrize("kv_type, users, ctx", [("F16", 1, 512), ("F16", 4, 1024), ("Q8_0", 2, 512), ("Q4_0", 1, 768),
                                                 ("F32", 1, 256)])  # fmt: skip
def test_cache_and_buffers_equal_llamacpp(kv_type, users, ctx, tmp_path):
    from qtutor.rigs import random_gguf

    path = random_gguf.write(tmp_path / "m.gguf", random_gguf.TINY, "Q6_K")
    kv, compute = _allocated(path, ctx, kv_type, users)
    assert abs(capacity.kv_bytes(random_gguf.TINY, ctx, kv_type, users) / 2**20 - kv) < 0.006
    planned = capacity.buffer_bytes(random_gguf.TINY, "Q6_K", ctx, kv_type, users)
    assert abs(planned / 2**20 - compute) < 0.02 + 0.02 * compute


def _no_alloc(config, ctx, kv_type, users):
    """Bytes of KV cache of a context that llama.cpp plans without allocating: cells and layers as it logs them."""
    lib = llamacpp.native()
    with capacity._stub(config) as stub:
        params = lib.llama_model_default_params()
        params.no_alloc, params.load_mode, params.n_gpu_layers = True, lib.LLAMA_LOAD_MODE_NONE, 0
        model = lib.llama_model_load_from_file(os.fsencode(stub.path), params)
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_seq_max, options.swa_full = ctx * users, users, False
    options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    options.type_k = options.type_v = llamacpp.GGML[kv_type].number
    llamacpp.log.clear()
    context = lib.llama_init_from_model(model, options)
    log = "".join(llamacpp.log)
    lib.llama_free(context), lib.llama_model_free(model)
    found = re.findall(r"size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers, +\d+/(\d+) seqs", log)
    assert found, log
    return [(float(mib), int(cells) * int(layers) * int(streams)) for mib, cells, layers, streams in found]


@pytest.mark.parametrize("name", families.CONFIGS)
def test_cache_of_each_family_equals_llamacpp(name):
    config = families.CONFIGS[name]
    for kv_type, users, ctx in (("F16", 1, 256), ("F16", 3, 1500), ("Q8_0", 2, 4096)):
        planned, logged = capacity.kv_bytes(config, ctx, kv_type, users), _no_alloc(config, ctx, kv_type, users)
        layer = capacity.kv_bytes_per_token(config, kv_type) / config["num_hidden_layers"]
        assert planned == layer * sum(cells for _, cells in logged), name  # to the byte
        assert abs(planned / 2**20 - sum(mib for mib, _ in logged)) < 0.011
        assert capacity.fits(config, "Q4_K_M", ctx, "H100 SXM", kv_type, users).kv_gib == planned / GIB


def test_windows_keep_less():
    gemma = families.CONFIGS["Gemma 2"]  # 3 layers of 5 see 300 tokens
    every = capacity.kv_bytes_per_token(gemma)
    assert capacity.kv_bytes_per_token(gemma, cached=300) == every
    assert capacity.kv_bytes_per_token(gemma, cached=3000) == pytest.approx(every * (2 + 3 / 10) / 5)
    assert capacity.kv_bytes(gemma, 4096) == every / 5 * (2 * 4096 + 3 * 1024)
    read = capacity.size(gemma, "Q8_0").read_bytes
    assert capacity.step_bytes(gemma, "Q8_0", 3000) == pytest.approx(read + every / 5 * (2 * 3000 + 3 * 300))
    for other in ("Mistral", "Qwen2", "Phi-3"):  # llama.cpp ignores their windows
        assert capacity.kv_bytes(families.CONFIGS[other], 4096) == 4096 * capacity.kv_bytes_per_token(
            families.CONFIGS[other]
        )


def test_kv_cache_of_llama_2_70b():
    # 2 x 80 layers x 8 heads x 128 values x 2 bytes = 320 KiB a token, and an eighth of what 64 heads would take
    assert capacity.kv_bytes("Llama-2-70B", 4096) == 4096 * 320 * 1024
    without = dict(capacity.MODELS["Llama-2-70B"], num_key_value_heads=64)
    assert capacity.kv_bytes(without, 4096) == 8 * capacity.kv_bytes("Llama-2-70B", 4096)
    assert capacity.kv_bytes("Llama-2-70B", 4096, users=3) == 3 * capacity.kv_bytes("Llama-2-70B", 4096)
    assert capacity.kv_bytes("Llama-2-70B", 1) == capacity.kv_bytes("Llama-2-70B", 256)


# ------------------------------------------------------------------------------------------------------- decisions


def test_fits():
    case = capacity.fits("Llama-2-70B", "Q6_K", 4096, "H100 SXM")
    assert case.fits and abs(case.total_gib * GIB / 1e9 - 59.09) < 0.5  # the model card's "Max RAM required"
    assert case.total_gib == pytest.approx(case.weights_gib + case.kv_gib + case.buffers_gib + case.overhead_gib)
    assert capacity.fits("Llama-2-70B", "Q8_0", 4096, "H100 SXM").fits
    assert not capacity.fits("Llama-2-70B", "F16", 4096, "H100 SXM").fits
    assert not capacity.fits("Llama-2-70B", "Q6_K", 4096, "L40S").fits
    assert capacity.fits("Llama-2-70B", "Q6_K", device="H200").context == 4096


def test_ceiling_is_bandwidth_over_bytes():
    size = capacity.size("Llama-2-7B", "Q4_0")
    assert capacity.ceiling("Llama-2-7B", "Q4_0", 0, 1000) == pytest.approx(1e12 / size.read_bytes)
    one, many = (capacity.ceiling("Llama-2-7B", "Q4_0", 1000, 1000, users=n) for n in (1, 8))
    assert one < many < 8 * one  # weights are shared, caches are not
    case = capacity.fits("Llama-2-7B", "Q4_0", 1024, "L4")
    assert case.ceiling_tokens_per_s == pytest.approx(capacity.ceiling("Llama-2-7B", "Q4_0", 1024, 300))


@pytest.mark.slow
def test_largest_context():
    longest = capacity.largest_context("Llama-3.1-70B", "Q6_K", "H100 SXM")
    assert capacity.fits("Llama-3.1-70B", "Q6_K", longest, "H100 SXM").fits
    assert not capacity.fits("Llama-3.1-70B", "Q6_K", longest + 256, "H100 SXM").fits
    assert capacity.largest_context("Llama-3.1-70B", "F16", "H100 SXM") == 0


def test_a_folder_whose_tokenizer_cannot_be_exported_is_planned_all_the_same(tmp_path):
    """SentencePiece (Llama-2, TinyLlama): the plan needs the numbers of config.json only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    course_model.new_model(num_hidden_layers=1, vocab_size=300).save_pretrained(tmp_path)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    size = capacity.size(tmp_path, "Q4_K_M")
    assert size.tensor_bytes == capacity.size(capacity.config_of(tmp_path), "Q4_K_M").tensor_bytes
    assert capacity.fits(tmp_path, "Q4_K_M", 256).fits


def test_biases_are_counted(tmp_path):
    biased = course_model.new_model(num_hidden_layers=1, vocab_size=300, attention_bias=True, mlp_bias=True)
    biased.save_pretrained(tmp_path)
    train_tokenizer(["some words to train on"] * 9, tmp_path, vocab_size=300)
    made = llamacpp.check_gguf(gguf_export.export(tmp_path, tmp_path / "b.gguf", "f16"))
    planned = {t.name: t.nbytes for t in capacity.plan(tmp_path, "F16")}
    assert planned == {t.name: t.nbytes for t in made.tensors} and any("bias" in name for name in planned)


# Parameters of the model cards at https://huggingface.co/<name>: what config.json there says must give them.
CARDS = {
    "Qwen/Qwen2.5-0.5B": (494_032_768, dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True,
        rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=32768, use_sliding_window=False)),
    "Qwen/Qwen3-0.6B": (596_049_920, dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, rope_scaling=None,
        tie_word_embeddings=True, sliding_window=None)),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=32768, sliding_window=4096)),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, dict(
        model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096, sliding_window=2047,
        auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})),
    "google/gemma-2b": (2_506_172_416, dict(
        model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, vocab_size=256000, max_position_embeddings=8192)),
    "google/gemma-2-2b": (2_614_341_888, dict(
        model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, vocab_size=256000, max_position_embeddings=8192, sliding_window=4096)),
    "google/gemma-3-1b-it": (999_885_952, dict(
        model_type="gemma3_text", hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=262144, sliding_window=512)),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_parameters_are_those_of_the_model_card(name):
    published, config = CARDS[name]
    assert capacity.parameters(config) == published
    fit = capacity.fits(config, "Q4_K_M", 4096, "H100 SXM")
    bits = 8 * sum(t.nbytes for t in capacity.plan(config, "Q4_K_M")) / published
    assert fit.fits and fit.buffers_gib > 0 and 4 < bits < 7


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    top = tmp_path_factory.mktemp("families")
    folders = [families.save(config, top / name) for name, config in families.CONFIGS.items()]
    return dict(zip(families.CONFIGS, zip(folders, families.convert(folders), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", families.CONFIGS)
def test_each_family_equals_the_file_that_is_made(name, converted, tmp_path):
    """llama.cpp's converter and quantizer on random weights: the same tensors, types and bytes as planned."""
    folder, source = converted[name]
    for kind in ("F16", "Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K", "TQ2_0"):
        made = source if kind == "F16" else llamacpp.quantize(source, tmp_path / f"{kind}.gguf", kind)
        planned = {t.name: (t.type, t.shape, t.nbytes) for t in capacity.plan(folder, kind)}
        assert planned == {t.name: (t.type, t.shape, t.nbytes) for t in llamacpp.check_gguf(made).tensors}, kind


SEVEN = capacity.MODELS["Llama-2-7B"]


def test_configurations_as_people_have_them(tmp_path):
    """null where a default is meant, a quantized checkpoint's, a multimodal one's, one that leaves most to defaults."""
    nulls = SEVEN | {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None, "attention_bias": None}
    quantized = SEVEN | {"quantization_config": {"quant_method": "gptq", "bits": 4}, "torch_dtype": "float16"}
    for config in (nulls, quantized):
        assert capacity.size(config, "Q6_K").tensor_bytes == capacity.size("Llama-2-7B", "Q6_K").tensor_bytes
    mistral = CARDS["mistralai/Mistral-7B-v0.1"][1]
    odd = mistral | {"head_dim": None, "sliding_window": None, "rope_scaling": None, "quantization_config": {"a": 1}}
    assert capacity.parameters(odd) == capacity.parameters(mistral)
    # google/gemma-3-4b-it names five numbers of its language model; the rest are Gemma3TextConfig's defaults
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    gemma = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    assert capacity.parameters(gemma) == 3_880_263_168 - 160 * 0
    assert capacity.fits(gemma, "Q4_K_M", 131072, "H100 SXM").fits
    assert capacity.fits(gemma, "Q4_K_M", device="H100 SXM").context == 131072


def _without(key, config=SEVEN):
    return {k: v for k, v in config.items() if k != key}


@pytest.mark.parametrize("call, words", [
    (lambda: capacity.size("Llama-9", "Q4_0"), "no model 'Llama-9'"),
    (lambda: capacity.size("Llama-2-7B", "Q9"), "no quantization type"),
    (lambda: capacity.size({"model_type": "mamba"}, "Q4_0"), "this config.json has model_type 'mamba'"),
    (lambda: capacity.size({}, "Q4_0"), "this config.json has model_type None"),
    (lambda: capacity.size({"model_type": "qwen3_moe"}, "Q4_0"), "mixtures of experts"),
    (lambda: capacity.size({"model_type": "llava", "text_config": {}}, "Q4_0"), "model_type 'llava'"),
    (lambda: capacity.size(_without("vocab_size"), "Q4_0"), "lacks a usable 'vocab_size'"),
    (lambda: capacity.size(SEVEN | {"vocab_size": None}, "Q4_0"), "lacks a usable"),
    (lambda: capacity.size(families.CONFIGS["Qwen2"] | {"hidden_size": "wide"}, "Q4_0"), "a usable qwen2 model"),
    (lambda: capacity.size(families.CONFIGS["Qwen2"] | {"hidden_size": 0}, "Q4_0"), "a usable qwen2 model"),
    (lambda: capacity.fits(families.CONFIGS["Qwen3"] | {"attention_bias": True}, "Q4_0"), "llama.cpp cannot plan this"),
    (lambda: capacity.size(families.CONFIGS["Qwen3"] | {"num_key_value_heads": 3}, "Q4_0"), "not a usable"),
    (lambda: capacity.size({**capacity.MODELS["Llama-2-7B"], "num_key_value_heads": 5}, "Q4_0"), "not a usable"),
    (lambda: capacity.kv_bytes("Llama-2-7B", 0), "context=0"),
    (lambda: capacity.kv_bytes("Llama-2-7B", 10, "Q6_K"), "no cache type"),
    (lambda: capacity.kv_bytes("Llama-2-7B", 10, users=1.5), "users=1.5"),
    (lambda: capacity.fits("Llama-2-7B", "Q4_0", 512, "H900"), "no device 'H900'"),
    (lambda: capacity.write_stub("/nowhere/at/all.gguf", "Llama-2-7B"), "cannot be written"),
])  # fmt: skip
def test_one_sentence(call, words):
    with pytest.raises(QtutorError, match=re.escape(words)) as error:
        call()
    assert "\n" not in str(error.value)
