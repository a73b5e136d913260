"""Sizes against published files, to the byte; caches and buffers against what llama.cpp allocates."""

import os
import re

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


@pytest.mark.parametrize("call, words", [
    (lambda: capacity.size("Llama-9", "Q4_0"), "no model 'Llama-9'"),
    (lambda: capacity.size("Llama-2-7B", "Q9"), "no quantization type"),
    (lambda: capacity.size({"model_type": "mamba"}, "Q4_0"), "Only the Llama architecture"),
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
