"""gguf_export against Hugging Face, the gguf package, transformers' GGUF reader and llama.cpp itself."""

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_llama
import torch

from qtutor import QtutorError, corpus, course_model, gguf_export, llamacpp

COURSE = Path(__file__).parent.parent / "data" / "model"
needs_llamacpp = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])
needs_course = pytest.mark.skipif(
    not (COURSE / "model.safetensors").exists() or not (COURSE / "tokenizer.json").exists(),
    reason="the course model is not in data/model",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def f32(folder, tmp_path_factory):
    return gguf_export.export(folder, tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf")


def hf(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_logits(model, ids):
    with torch.inference_mode():
        return model(torch.as_tensor(ids)[None]).logits[0].float().numpy()


def same_logits(model, path, limit):
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 300)
    with llamacpp.Model(path, ctx=512, exact=True) as llama:
        assert np.abs(llama.logits(ids) - hf_logits(model, ids)).max() < limit


def same_tokens(folder, path, texts):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    with llamacpp.Model(path, ctx=64) as llama:
        for text in texts:
            expected = reference(text)["input_ids"]
            assert llama.tokenize(text) == expected, text
            assert llama.detokenize(expected) == text


def random_texts(n=300, seed=0):
    """Strings drawn from all of Unicode but surrogates, with plenty of spaces, digits and newlines."""
    rng = np.random.default_rng(seed)
    common = list(" \n\r\t'09azAZ.,-_Ġéß\u00a0")
    for _ in range(n):
        points = rng.integers(1, 0x11000, 20)
        chars = [chr(p) for p in points if not 0xD800 <= p < 0xE000]
        yield "".join(rng.permutation(chars + list(rng.choice(common, 20))))


# ------------------------------------------------------------------------------------------ agreement


def angles_by_repeated_multiplication(rotary, hidden, position_ids):
    """cos and sin of the rotary angles as ggml_rope_cache_init computes them: each float32 angle from the last."""
    half = len(rotary.inv_freq)
    step = np.float32(10_000.0) ** np.float32(-1 / half)
    angle, angles = position_ids[0].numpy().astype(np.float32), []
    for _ in range(half):
        angles.append(angle)
        angle = angle * step
    both = torch.from_numpy(np.tile(np.stack(angles, -1), 2))[None]
    return both.cos(), both.sin()


@needs_course
@needs_llamacpp
def test_what_differs_on_real_text_is_the_rotary_angle(monkeypatch, tmp_path):
    """512 tokens of the course model: only rounding is left once PyTorch turns the angles as llama.cpp does."""
    model = hf(COURSE)
    path = gguf_export.export(model, tmp_path / "model.gguf", dtype="f32", tokenizer=course_model.load_tokenizer())
    ids = corpus.tokens("eval", course_model.load_tokenizer())[1536:2048]
    rotary = model.model.rotary_emb
    monkeypatch.setattr(rotary, "forward", partial(angles_by_repeated_multiplication, rotary))
    with llamacpp.Model(path, ctx=512, exact=True) as llama:
        assert np.abs(llama.logits(ids) - hf_logits(model, ids.astype(np.int64))).max() < 5e-5


@needs_llamacpp
def test_logits_and_tokens_of_a_random_llama(folder, f32):
    same_logits(hf(folder), f32, 1e-4)
    same_tokens(folder, f32, tiny_llama.TEXTS)


@needs_llamacpp
def test_tokens_on_random_unicode(folder, f32):
    same_tokens(folder, f32, random_texts())


@needs_llamacpp
@needs_course
def test_course_model(tmp_path):
    path = gguf_export.export(COURSE, tmp_path / "course.gguf")
    same_logits(hf(COURSE), path, 1e-4)
    import pydoc_data.topics

    topics = list(pydoc_data.topics.topics.values())
    same_tokens(COURSE, path, [*tiny_llama.TEXTS, *topics[:20], *random_texts(100)])


@needs_llamacpp
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
    ids=["untied", "biases", "mha-theta"],
)  # fmt: skip
def test_other_llamas(tmp_path, changes):
    model = tiny_llama.model(layers=1, **changes)
    path = gguf_export.export(model, tmp_path / "m.gguf", tokenizer=tiny_llama.tokenizer())
    same_logits(model, path, 1e-4)


@pytest.mark.parametrize("dtype", gguf_export.DTYPES)
def test_round_trip_through_transformers(folder, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    gguf_export.export(folder, tmp_path / "m.gguf", dtype)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    original = hf(folder).state_dict()
    assert back.keys() == original.keys()
    cast = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, tensor in original.items():
        expected = tensor if tensor.ndim == 1 else tensor.to(cast).float()
        assert torch.equal(back[name], expected), name


@pytest.mark.parametrize("dtype", gguf_export.DTYPES)
def test_the_gguf_package_reads_types_metadata_and_tensors(folder, tmp_path, dtype):
    reader = gguf.GGUFReader(
        gguf_export.export(folder, tmp_path / "m.gguf", dtype, name="A name")
    )
    get = {name: field.contents() for name, field in reader.fields.items()}
    assert get["general.architecture"] == "llama" and get["general.name"] == "A name"
    assert get["llama.attention.head_count_kv"] == 2 and get["llama.context_length"] == 1024
    assert get["llama.rope.freq_base"] == 10000.0 and get["llama.vocab_size"] == 512
    assert np.float32(get["llama.attention.layer_norm_rms_epsilon"]) == np.float32(1e-6)
    assert get["tokenizer.ggml.model"] == "gpt2" and get["tokenizer.ggml.pre"] == "gpt-2"
    assert get["tokenizer.ggml.tokens"][0] == "<|endoftext|>" and get["tokenizer.ggml.token_type"][0] == 3
    assert get["tokenizer.ggml.bos_token_id"] == get["tokenizer.ggml.eos_token_id"] == 0
    weights = hf(folder).state_dict()
    names = {t.name: t for t in reader.tensors}
    assert "output.weight" not in names  # tied
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("F32" if "norm" in tensor.name else dtype.upper())
    down = gguf.quants.dequantize(names["blk.1.ffn_down.weight"].data, names["blk.1.ffn_down.weight"].tensor_type)
    assert np.abs(down - weights["model.layers.1.mlp.down_proj.weight"].numpy()).max() < 2e-3


# ---------------------------------------------------------------------------------- llama.cpp's own converter

_spec = importlib.util.spec_from_file_location(
    "record_converter", Path(__file__).parent.parent / "data" / "reference" / "record_converter.py"
)
converter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(converter)


@pytest.mark.parametrize("name, dtype", converter.CASES)
def test_same_tensors_and_metadata_as_llama_cpps_converter(tmp_path, name, dtype):
    """Against the record of what convert_hf_to_gguf.py made of the same models: the bytes of every tensor."""
    folder = converter.model_folder(name, tmp_path)
    ours = converter.digest(gguf_export.export(folder, tmp_path / "m.gguf", dtype, name="a name"))
    theirs = json.loads(converter.RECORD.read_text(encoding="utf-8"))[f"{name}-{dtype}"]
    assert ours["tensors"] == theirs["tensors"], f"{converter.RECORD.name} may be of another model: record it anew"
    # it leaves out that no token is added, which is llama.cpp's default too; and it derives a name of its own
    quiet = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}
    assert ours["metadata"] == quiet | theirs["metadata"] | {"general.name": "a name"}


def test_the_record_of_the_converter_has_every_kind_of_model():
    record = json.loads(converter.RECORD.read_text(encoding="utf-8"))
    assert set(record) == {f"{name}-{dtype}" for name, dtype in converter.CASES}
    names = record["untied_bias_chat-bf16"]["tensors"]
    assert {"output.weight", "blk.1.attn_q.bias", "blk.0.ffn_down.bias"} <= set(names)
    assert names["output.weight"][0] == "BF16" and names["output_norm.weight"][0] == "F32"
    assert record["untied_bias_chat-f32"]["metadata"]["tokenizer.chat_template"] == converter.TEMPLATE


@pytest.mark.slow
def test_chat_template_from_an_object_a_folder_and_an_old_config(folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    meta = lambda source, **how: llamacpp.check_gguf(  # noqa: E731
        gguf_export.export(source, tmp_path / "m.gguf", **how)).metadata
    assert "tokenizer.chat_template" not in meta(folder)
    tokenizer.chat_template = template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert meta(hf(folder), tokenizer=tokenizer)["tokenizer.chat_template"] == template
    shutil.copytree(folder, tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    assert (tmp_path / "chat" / "chat_template.jinja").is_file()
    assert meta(tmp_path / "chat")["tokenizer.chat_template"] == template
    (tmp_path / "chat" / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert meta(tmp_path / "chat")["tokenizer.chat_template"] == template
    tokenizer.chat_template = {"default": template, "tool_use": "tools"}
    named = meta(hf(folder), tokenizer=tokenizer)
    assert named["tokenizer.chat_template"] == template and named["tokenizer.chat_template.tool_use"] == "tools"


def other_tokenizer(kind):
    """The same vocabulary behind another pre-tokenizer; ``bos`` also puts <|endoftext|> first."""
    from tokenizers import Regex, pre_tokenizers, processors

    tok, byte_level = tiny_llama.tokenizer(), pre_tokenizers.ByteLevel
    if kind == "bos":
        tok.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    elif kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
        tok.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        regex = next(r for r, name in gguf_export._SPLIT_REGEX.items() if name == kind)
        split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        plain = byte_level(add_prefix_space=False, use_regex=False)
        tok.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    return tok


@needs_llamacpp
@pytest.mark.parametrize("kind", ["bos", "smollm", "llama-bpe", "qwen2"])
def test_other_tokenizers(tmp_path, kind):
    tok = other_tokenizer(kind)
    path = gguf_export.export(tiny_llama.model(layers=1), tmp_path / "m.gguf", tokenizer=tok)
    with llamacpp.Model(path, ctx=16) as llama:
        for text in [*tiny_llama.TEXTS, *random_texts(100)]:
            assert llama.tokenize(text) == tok.encode(text).ids, text


def test_permute_turns_halves_into_pairs():
    rows = torch.arange(16.0)[:, None]  # two heads of 8 rows
    expected = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert gguf_export.permute(rows, 2)[:, 0].tolist() == expected


def test_model_object_and_folder_give_the_same_file(folder, f32, tmp_path):
    path = gguf_export.export(hf(folder), tmp_path / "m.gguf", tokenizer=folder, name=folder.name)
    assert path.read_bytes() == f32.read_bytes()


def test_sharded_checkpoint(folder, f32, tmp_path):
    shards = tmp_path / folder.name
    hf(folder).save_pretrained(shards, max_shard_size="2MB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    shutil.copy(folder / "tokenizer.json", shards)
    assert gguf_export.export(shards, tmp_path / "m.gguf").read_bytes() == f32.read_bytes()


def test_licence_comes_from_the_model_card(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Model\n")
    meta = llamacpp.check_gguf(gguf_export.export(tmp_path / "m", tmp_path / "m.gguf")).metadata
    assert meta["general.license"] == "apache-2.0" and meta["general.name"] == "m"


# -------------------------------------------------------------------------------------------- bad input


def one_sentence(info):
    text = str(info.value)
    assert "\n" not in text and text[0].isupper() | (text[0] in "'.") | text[0].isalnum() and text.endswith(".")
    return text


def refused(source, target, match, **options):
    with pytest.raises(QtutorError, match=match) as info:
        gguf_export.export(source, target, **options)
    one_sentence(info)
    assert not Path(target).is_file()
    assert not list(Path(target).parent.glob("*.partial"))


def changed(folder, tmp_path, **config):
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, **config}))
    return copy


def test_not_a_llama(folder, tmp_path):
    with pytest.raises(gguf_export.NotOursError, match="gpt2.*convert.to_gguf"):
        gguf_export.export(changed(folder, tmp_path, model_type="gpt2"), tmp_path / "m.gguf")


def test_config_that_does_not_match_or_is_damaged(folder, tmp_path):
    copy = changed(folder, tmp_path, num_hidden_layers=3)
    refused(copy, tmp_path / "m.gguf", "lacks model.layers.2")
    shutil.rmtree(copy)
    copy = changed(folder, tmp_path, intermediate_size=512)
    refused(copy, tmp_path / "m.gguf", "config.json says")
    (copy / "config.json").write_text("{")
    refused(copy, tmp_path / "m.gguf", "config.json' is damaged")


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("config, match", [
    ({"rope_parameters": {"rope_type": "linear"}}, "factor = nan"),
    ({"rope_parameters": ROPE | {"low_freq_factor": 0}}, "low_freq_factor = 0"),
    ({"rope_parameters": ROPE | {"high_freq_factor": "x"}}, "high_freq_factor = nan"),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta = nan"),
    ({"rope_parameters": [1]}, "RoPE"),
    ({"num_hidden_layers": -1}, "layers = -1"),
])  # fmt: skip
def test_hyperparameters_that_mean_nothing(folder, tmp_path, config, match):
    refused(changed(folder, tmp_path, **config), tmp_path / "m.gguf", match)


@pytest.mark.parametrize("name, content, match", [
    ("config.json", b"[]", "no JSON object"),
    ("tokenizer.json", b"[]", "no JSON object"),
    ("tokenizer_config.json", b"[]", "no JSON object"),
    ("model.safetensors.index.json", b'{"weight_map": 3}', "which file holds"),
    ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja cannot be read"),
])  # fmt: skip
def test_files_with_something_else_inside(folder, tmp_path, name, content, match):
    copy = changed(folder, tmp_path)
    (copy / "tokenizer_config.json").unlink(missing_ok=True)
    (copy / name).write_bytes(content)
    if "index" in name:  # which counts where there is no single file
        (copy / "model.safetensors").unlink()
    refused(copy, tmp_path / "m.gguf", match)


def tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("extra", [
    "lm_head.bias", "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.1.self_attn.q_norm.weight",
    "model.layers.0.mlp.up_proj.weight_scale", "model.layers.2.mlp.up_proj.weight",
])  # fmt: skip
def test_a_tensor_that_the_file_has_no_place_for(folder, tmp_path, extra):
    from safetensors.torch import save_file

    copy = changed(folder, tmp_path)
    save_file(tensors_of(folder) | {extra: torch.ones(4)}, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, tmp_path / "m.gguf", f"{extra} that a Llama's GGUF file has no place for")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_are_no_weights(folder, tmp_path, dtype):
    from safetensors.torch import save_file

    copy = changed(folder, tmp_path)
    coded = {name: w.to(dtype) if "proj" in name else w for name, w in tensors_of(folder).items()}
    save_file(coded, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, tmp_path / "m.gguf", "without its scales")
    shutil.rmtree(copy)
    copy = changed(folder, tmp_path, quantization_config={"quant_method": "fp8"})
    refused(copy, tmp_path / "m.gguf", "quantized already")


def test_another_activation_and_a_tokenizer_without_merges(folder, tmp_path):
    refused(changed(folder, tmp_path, hidden_act="gelu"), tmp_path / "m.gguf", "hidden_act 'gelu'")
    tok = json.loads((folder / "tokenizer.json").read_text())
    tok["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(tok))
    refused(folder, tmp_path / "m.gguf", "no merges", tokenizer=tmp_path / "tokenizer.json")


def test_a_single_file_comes_before_an_old_index(folder, f32, tmp_path):
    """As transformers reads the folder; the old shards may be gone."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    assert gguf_export.export(copy, tmp_path / "m.gguf").read_bytes() == f32.read_bytes()


def stored(folder, tensors):
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def read_tensors(path):
    return {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(path).tensors}


def test_tied_as_transformers_ties(folder, tmp_path):
    """The two matrices are tied where they are equal or one is missing; where they differ both count."""
    copy, tensors = changed(folder, tmp_path), tensors_of(folder)
    embedding = tensors.pop("model.embed_tokens.weight")
    pairs = ((embedding.clone(), embedding), (None, embedding), (embedding, None), (embedding + 1, embedding))
    for head, embed in pairs:
        both = {"lm_head.weight": head, "model.embed_tokens.weight": embed}
        stored(copy, tensors | {name: tensor for name, tensor in both.items() if tensor is not None})
        made, model = read_tensors(gguf_export.export(copy, tmp_path / "m.gguf")), hf(copy)
        assert torch.equal(made["token_embd.weight"], model.get_input_embeddings().weight)
        assert torch.equal(made.get("output.weight", made["token_embd.weight"]), model.lm_head.weight)
        assert ("output.weight" in made) == (head is not None and not torch.equal(head, embedding))
    stored(copy, tensors)
    refused(copy, tmp_path / "m2.gguf", "lacks model.embed_tokens.weight")


NOT_OURS = [
    "model.layers.7.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.lora_A.default.weight", "score.weight",
    "model.layers.0.mlp.gate_proj.weight_scale", "model.layers.0.mlp.gate_proj.weight_scale_inv",
    "model.layers.0.mlp.gate_proj.SCB", "model.layers.0.mlp.gate_proj.weight.absmax", "lm_head.bias",
    "model.layers.0.mlp.gate_proj.qweight", "model.layers.0.mlp.gate_proj.g_idx", "model.layers.0.input_scale",
    "model.layers.0.self_attn.q_proj.modules_to_save.default.weight", "lm_head.original_module.weight",
    "model.layers.0.self_attn.k_norm.weight", "model.mtp_layers.0.weight", "_orig_mod.model.norm.weight",
    "module.model.norm.weight", "base_model.model.model.norm.weight", "model.layers.0.mlp.gate_proj._extra_state",
    "model.layers.0.self_attn.q_proj.parametrizations.weight.original", "model.layers.0.mlp.up_proj.weight_mask",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_every_tensor_of_a_random_checkpoint_is_accounted_for(tmp_path, seed):
    """Written, tied, or refused by name: as it is, with a tensor too many, with one too few."""
    rng = np.random.default_rng(seed)
    heads, flag = int(rng.choice([2, 4])), lambda: bool(rng.integers(2))
    settings = dict(
        hidden_size=64, intermediate_size=int(rng.choice([64, 96])), num_attention_heads=heads,
        num_key_value_heads=int(rng.choice([1, 2, heads])), head_dim=int(rng.choice([8, 16, 32])),
        attention_bias=flag(), mlp_bias=flag(), tie_word_embeddings=flag(),
    )  # fmt: skip
    copy = tiny_llama.save(tmp_path / "m", tiny_llama.model(layers=int(rng.integers(1, 4)), **settings))
    tensors, made = tensors_of(copy), read_tensors(gguf_export.export(copy, tmp_path / "m.gguf"))
    for name, tensor in tensors.items():
        if ".q_proj." in name or ".k_proj." in name:
            n_heads = settings["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            tensor = gguf_export.permute(tensor, n_heads)
        assert torch.equal(made.pop(gguf_export.gguf_name(name)), tensor), name
    assert not made  # and nothing that is not of the checkpoint
    for extra in [*rng.choice(NOT_OURS, 3), "model.layers.0.mlp.down_proj.bias" if not settings["mlp_bias"] else "x"]:
        stored(copy, tensors | {extra: torch.ones(4)})
        refused(copy, tmp_path / "no.gguf", f"tensor {extra} that")
    for missing in rng.choice(sorted(tensors), 3):
        stored(copy, {name: tensor for name, tensor in tensors.items() if name != missing})
        refused(copy, tmp_path / "no.gguf", f"lacks {missing} ")


def test_the_model_inside_a_wrapper(tmp_path):
    """Compiled, in part or as a whole, and data parallel: plainly the same model."""
    model, tok = tiny_llama.model(layers=1), tiny_llama.tokenizer()
    plain = gguf_export.export(model, tmp_path / "a.gguf", tokenizer=tok).read_bytes()
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model), torch.nn.DataParallel(torch.compile(model))):
        assert gguf_export.export(wrapped, tmp_path / "b.gguf", tokenizer=tok).read_bytes() == plain
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert "_orig_mod" in "".join(model.state_dict())
    assert gguf_export.export(model, tmp_path / "b.gguf", tokenizer=tok).read_bytes() == plain


class Subclass(torch.Tensor):
    pass


def test_models_whose_weights_are_not_there_as_they_are(tmp_path):
    tok, target = tiny_llama.tokenizer(), tmp_path / "m.gguf"
    up = lambda model: model.model.layers[0].mlp.up_proj  # noqa: E731
    refused(tiny_llama.model(layers=1).to("meta"), target, "weight is a meta tensor", tokenizer=tok)
    for kind in ("sparse", "Subclass"):
        model = tiny_llama.model(layers=1)
        weight = up(model).weight.detach()
        weight = weight.to_sparse() if kind == "sparse" else weight.as_subclass(Subclass)
        up(model).weight = torch.nn.Parameter(weight)
        refused(model, target, f"up_proj.weight is a {kind} tensor", tokenizer=tok)
    model = tiny_llama.model(layers=1)
    torch.nn.utils.parametrize.register_parametrization(up(model), "weight", torch.nn.Identity())
    refused(model, target, "up_proj.parametrizations.weight.original", tokenizer=tok)
    model = tiny_llama.model(layers=1)
    model.peft_config = {}
    refused(model, target, "adapter", tokenizer=tok)
    refused(torch.nn.Linear(4, 4), target, "no config", tokenizer=tok)
    refused({"weight": 1}, target, "dict is no model", tokenizer=tok)
    model = tiny_llama.model(layers=1)
    up(model).weight = torch.nn.Parameter(up(model).weight.detach().T.contiguous().T)  # only laid out in another way
    plain = gguf_export.export(tiny_llama.model(layers=1), tmp_path / "a.gguf", tokenizer=tok).read_bytes()
    assert gguf_export.export(model, target, tokenizer=tok).read_bytes() == plain


def test_a_sharded_tensor(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_module, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = distribute_module(tiny_llama.model(layers=1), init_device_mesh("cpu", (1,)))
        refused(model, tmp_path / "m.gguf", "weight is a DTensor tensor", tokenizer=tiny_llama.tokenizer())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("config, match", [
    ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "factor 0.25"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not written here: use checkpoints"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not known here: use checkpoints"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not known here"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ({"model_type": "mistral"}, "use checkpoints.convert.to_gguf"),
    ({"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
])  # fmt: skip
def test_settings_that_the_file_would_not_follow(folder, tmp_path, config, match):
    refused(changed(folder, tmp_path, **config), tmp_path / "m.gguf", match)


def test_swish_is_silu_and_the_old_rope_key_wins_as_in_transformers(folder, tmp_path):
    from transformers import AutoConfig

    old = {"rope_scaling": {"type": "default", "rope_theta": 5e5}, "hidden_act": "swish"}
    copy = changed(folder, tmp_path, **old)
    meta = llamacpp.check_gguf(gguf_export.export(copy, tmp_path / "m.gguf")).metadata
    assert meta["llama.rope.freq_base"] == AutoConfig.from_pretrained(copy).rope_parameters["rope_theta"] == 5e5


def test_which_files_of_a_folder_count(folder, f32, tmp_path):
    """Those that transformers loads: variants, consolidated weights and subfolders lie beside."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    other = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    for name in ("model.fp16", "consolidated", "sub/model"):
        (copy / "sub").mkdir(exist_ok=True)
        stored(tmp_path, other)
        shutil.copy(tmp_path / "model.safetensors", copy / f"{name}.safetensors")
    torch.save(other, copy / "pytorch_model.bin")
    assert gguf_export.export(copy, tmp_path / "m.gguf").read_bytes() == f32.read_bytes()
    (copy / "model.safetensors").unlink()
    refused(copy, tmp_path / "no.gguf", "no model.safetensors: save the model with safetensors first")
    (copy / "adapter_config.json").write_text("{}")
    refused(copy, tmp_path / "no.gguf", "merge_and_unload")
    (copy / "adapter_config.json").unlink()
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, tmp_path / "no.gguf", "which file holds")


@pytest.mark.parametrize("how", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_a_gguf_file_cannot_say(folder, tmp_path, how):
    from tokenizers import AddedToken

    tok = tiny_llama.tokenizer(500)
    tok.add_tokens([AddedToken("<mask>", **{how: True})])
    refused(folder, tmp_path / "m.gguf", f"'<mask>' has {how}", tokenizer=tok)


def test_a_tokenizer_that_adds_other_tokens_than_bos_and_eos(folder, tmp_path):
    from tokenizers import processors

    tok = tiny_llama.tokenizer()
    tok.post_processor = processors.TemplateProcessing(single="a $A", special_tokens=[("a", tok.token_to_id("a"))])
    refused(folder, tmp_path / "m.gguf", "adds more to a text", tokenizer=tok)


def test_a_model_after_qat_is_baked_first(tmp_path):
    from qtutor import fake_quant, packed

    model = fake_quant.prepare(tiny_llama.model(layers=1), "int4", group_size=32)
    refused(model, tmp_path / "m.gguf", "bake", tokenizer=tiny_llama.tokenizer())
    refused(packed.convert(model), tmp_path / "m.gguf", "bake", tokenizer=tiny_llama.tokenizer())


@pytest.mark.parametrize("damage", [
    lambda tok: tok["model"].pop("merges"),
    lambda tok: tok["model"].update(vocab={}, merges=[]),
    lambda tok: tok.update(pre_tokenizer="x"),
    lambda tok: tok.update(added_tokens=[{"id": 0}]),
])
def test_a_tokenizer_with_a_part_missing(folder, tmp_path, damage):
    copy = changed(folder, tmp_path)
    tok = json.loads((copy / "tokenizer.json").read_text())
    damage(tok)
    (copy / "tokenizer.json").write_text(json.dumps(tok))
    refused(copy, tmp_path / "m.gguf", "tokenizer cannot be used")


def test_a_special_token_beyond_the_vocabulary_is_left_out(folder, tmp_path):
    copy = changed(folder, tmp_path, eos_token_id=10**6)
    meta = llamacpp.check_gguf(gguf_export.export(copy, tmp_path / "m.gguf")).metadata
    assert "tokenizer.ggml.eos_token_id" not in meta and "tokenizer.ggml.bos_token_id" in meta


def test_missing_things(folder, tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "m.gguf", "no model folder")
    refused(hf(folder), tmp_path / "m.gguf", "no tokenizer")
    copy = changed(folder, tmp_path)
    (copy / "tokenizer.json").unlink()
    refused(copy, tmp_path / "m.gguf", "tokenizer.json")
    (copy / "model.safetensors").unlink()
    refused(copy, tmp_path / "m.gguf", "model.safetensors")


def test_tokenizer_that_llamacpp_would_read_differently(folder, tmp_path):
    copy = changed(folder, tmp_path)
    tok = json.loads((copy / "tokenizer.json").read_text())
    tok["pre_tokenizer"] = {"type": "Whitespace"}
    (copy / "tokenizer.json").write_text(json.dumps(tok))
    refused(copy, tmp_path / "m.gguf", "pre-tokenizer")
    refused(folder, tmp_path / "m.gguf", "do not belong together", tokenizer=tiny_llama.tokenizer(600))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    model = tiny_llama.model(layers=1)
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] = value
    refused(model, tmp_path / "m.gguf", "ffn_down", tokenizer=tiny_llama.tokenizer())


def test_float16_overflow(tmp_path):
    model = tiny_llama.model(layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    refused(model, tmp_path / "m.gguf", "bf16", dtype="f16", tokenizer=tiny_llama.tokenizer())


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 3000, -1000, -1])
def test_truncated_safetensors(folder, tmp_path, keep):
    copy = changed(folder, tmp_path)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:keep])
    refused(copy, tmp_path / "m.gguf", "model.safetensors is damaged")


def test_bit_flips_in_the_safetensors_header(folder, tmp_path):
    """Every flip is refused in a sentence or leaves a sound file (the unused metadata entry)."""
    copy = changed(folder, tmp_path)
    data = (copy / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    for position in [*range(8), *rng.integers(8, header, 40)]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.integers(8)
        (copy / "model.safetensors").write_bytes(flipped)
        try:
            llamacpp.check_gguf(gguf_export.export(copy, tmp_path / "m.gguf"))
        except QtutorError as err:
            assert "\n" not in str(err)
        assert not list(tmp_path.glob("*.partial"))


def test_unwritable_targets(folder, tmp_path):
    (tmp_path / "file").write_text("")
    refused(folder, tmp_path / "file" / "m.gguf", "cannot be written")
    refused(folder, tmp_path, "is a folder")
    with pytest.raises(QtutorError, match="dtype"):
        gguf_export.export(folder, tmp_path / "m.gguf", "q8")


def test_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    refused(folder, tmp_path / "m.gguf", "cannot be written")


def test_an_old_file_survives_a_failed_export(folder, tmp_path):
    target = tmp_path / "m.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(QtutorError):
        gguf_export.export(changed(folder, tmp_path, num_hidden_layers=3), target)
    assert target.read_bytes() == b"precious"
