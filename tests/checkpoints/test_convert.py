"""convert: every family against transformers and llama.cpp's own tests of its vocabularies, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_llama
import torch
import vocabularies

from qtutor import QtutorError, course_model, gguf_export, llamacpp
from qtutor.checkpoints import convert

installed = (convert.folder() / convert.SCRIPT).is_file() if llamacpp.available()[0] else False
needs_converter = pytest.mark.skipif(
    not installed or not importlib.util.find_spec("sentencepiece"),
    reason="llama.cpp's converter is not installed: python -m tools.llamacpp_source --vocabularies",
)
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=512)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
GEMMA2 = dict(query_pre_attn_scalar=16, sliding_window=32)

# family -> (transformers class, vocabulary, settings)
FAMILIES = {
    "llama 2": ("Llama", "llama-spm", {"tie_word_embeddings": False}),
    "llama 3": ("Llama", "llama-bpe", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "tinyllama": ("Llama", "llama-spm", {"num_key_value_heads": 1, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", "llama-spm", {"sliding_window": None, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6}}),
    "qwen2": ("Qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "", {"tie_word_embeddings": True, "pad_token_id": None}),
    "gemma": ("Gemma", "llama-spm", {}),
    "gemma2": ("Gemma2", "llama-spm", GEMMA2),
    "gemma3": ("Gemma3", "gemma-4", GEMMA2 | {"tie_word_embeddings": True}),
    "phi 3": ("Phi3", "phi-3", {"num_key_value_heads": 4, "pad_token_id": None}),
}  # fmt: skip
TEXTS = [text for text in tiny_llama.TEXTS if "<|endoftext|>" not in text and text]
LIMIT = {"gemma": 5e-3, "gemma2": 5e-3, "gemma3": 5e-3}  # llama.cpp looks GELU up in a table of float16


def random_model(kind, vocab, **settings):
    """Any transformers family with random weights, large enough that an error in any of them shows."""
    import transformers

    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")
    settings = {**SMALL, "vocab_size": vocab, **settings}
    if kind == "Phi3":
        settings.pop("head_dim")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.1, generator=generator)
            elif "norm" in name and "Gemma" in kind:  # which adds one
                parameter.uniform_(-0.5, 0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def tokenizer_of(vocabulary, gemma=False):
    if not vocabulary:  # one that was trained here, behind Qwen's regular expression
        from test_gguf_export import other_tokenizer

        tok = other_tokenizer("qwen2")
        return tok, {"bos_token_id": 0, "eos_token_id": 0}, ["<|endoftext|>"] * tok.get_vocab_size()
    if vocabulary in ("llama-spm", "phi-3", "gemma-4"):
        return vocabularies.sentencepiece(vocabulary, prefix=not gemma)
    return vocabularies.byte_level(vocabulary)


def save(folder, model, tok, special, tokens):
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    named = {key.removesuffix("_id"): tokens[at] for key, at in special.items() if at is not None}
    PreTrainedTokenizerFast(tokenizer_object=tok, **named).save_pretrained(folder)
    return folder


def off_by(model, path, ids):
    """Largest difference of a logit, of their standard deviation."""
    with torch.inference_mode():
        theirs = model(torch.as_tensor(np.asarray(ids, np.int64))[None]).logits[0].float().numpy()
    with llamacpp.Model(path, ctx=256) as llama:
        return float(np.abs(llama.logits(ids) - theirs).max() / theirs.std())


@needs_converter
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path, family):
    kind, vocabulary, settings = FAMILIES[family]
    if vocabulary and not vocabularies.available(vocabulary):
        pytest.skip("the vocabulary files are not installed: python -m tools.llamacpp_source --vocabularies")
    tok, special, tokens = tokenizer_of(vocabulary, "Gemma" in kind)
    model = random_model(kind, len(tokens), **{**special, **settings})
    folder = save(tmp_path / family.replace(" ", "-"), model, tok, special, tokens)
    with pytest.raises(gguf_export.NotOursError):
        gguf_export.export(folder, tmp_path / "no.gguf")
    path = convert.to_gguf(folder, tmp_path / "m.gguf", "f32")
    off = off_by(model, path, np.random.default_rng(0).integers(3, len(tokens), 100))
    print(f"{family}: largest difference of a logit {off:.1e} of their spread")
    assert off < LIMIT.get(family, 5e-4)
    bos = [special["bos_token_id"]] if tok.post_processor else []
    with llamacpp.Model(path, ctx=16) as llama:
        for text in TEXTS:
            assert llama.tokenize(text) == tok.encode(text).ids, text
        if vocabulary and ("Gemma" not in kind or vocabulary == "gemma-4"):
            for text, ids in vocabularies.answers(vocabulary):
                assert llama.tokenize(text) == bos + ids, text
        for text in [text for text, at in tok.get_vocab().items() if at in tok.get_added_tokens_decoder()][:20]:
            assert tok.token_to_id(text) in llama.tokenize(f"a {text} b")
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("tmp*"))


@needs_converter
@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [("course", "bf16"), ("untied_bias_chat", "f16")])
def test_ours_and_llama_cpps_write_the_same(tmp_path, name, dtype):
    from test_gguf_export import converter

    folder = converter.model_folder(name, tmp_path)
    convert._run(convert._staged(folder, None, tmp_path / "t"), tmp_path / "theirs.gguf", dtype)
    ours = converter.digest(gguf_export.export(folder, tmp_path / "ours.gguf", dtype))
    theirs = converter.digest(tmp_path / "theirs.gguf")
    assert ours["tensors"] == theirs["tensors"]
    named = {"general.name": ours["metadata"]["general.name"]}  # theirs is made of the folder's
    quiet = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}
    assert ours["metadata"] == quiet | theirs["metadata"] | named


def test_a_llama_of_ours_is_written_without_the_converter(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "folder", lambda: tmp_path / "nowhere")
    folder = tiny_llama.save(tmp_path / "m", tiny_llama.model(layers=1))
    path = convert.to_gguf(folder, tmp_path / "a.gguf", "bf16")
    assert path.read_bytes() == gguf_export.export(folder, tmp_path / "b.gguf", "bf16").read_bytes()


# ------------------------------------------------------------------------------------------------- refusals


def refused(match, model, path, *args, **options):
    with pytest.raises(QtutorError, match=match) as info:
        convert.to_gguf(model, path, *args, **options)
    text = str(info.value)
    assert "\n" not in text and text.endswith(".") and "/tmp" not in text.replace(str(Path(path).parent), "")
    assert not Path(path).exists() and not list(Path(path).parent.glob("*.partial"))
    assert not list(Path(path).parent.glob("tmp*"))


def other_family(folder, tok=None):
    """A folder that is not ours: Mistral's, with the tiny tokenizer."""
    from transformers import PreTrainedTokenizerFast

    model = random_model("Mistral", 512, sliding_window=None, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tok or tiny_llama.tokenizer(), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return other_family(tmp_path_factory.mktemp("mistral") / "mistral")


def change(folder, target, **config):
    shutil.copytree(folder, target)
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | config))
    return target


def test_without_the_converter(mistral, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "folder", lambda: tmp_path / "nowhere")
    refused("python -m tools.llamacpp_source", mistral, tmp_path / "m.gguf")


STUB = """
class ModelBase:
    def index_tensors(self):
        return {}

class TextModel(ModelBase):
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError
"""


@pytest.mark.parametrize("code, match", [
    ("print('ERROR:hf-to-gguf:Model FooForCausalLM is not supported', file=sys.stderr); sys.exit(1)",
     "refuses mistral: Model FooForCausalLM is not supported"),
    ("raise NotImplementedError('BPE pre-tokenizer was not recognized - update it()')", "pre-tokenizer was not"),
    ("raise ValueError(\"Can not map tensor 'model.x'\")", "Can not map tensor 'model.x'"),
    ("raise FileNotFoundError(f'File not found: {sys.argv[1]}/tokenizer.model')", "not found: mistral/tokenizer.model"),
    ("assert 1 == 2", "AssertionError"),
    ("raise KeyError('hidden_size')", "'hidden_size'"),
    ("raise MemoryError", "lack of memory"),
    ("import os; os.kill(os.getpid(), 9)", "lack of memory"),
    ("pass", "no reason"),
    ("open(sys.argv[3], 'wb').write(b'GGUF')", "not a sound GGUF file"),
])  # fmt: skip
def test_what_the_converter_says_is_one_sentence(mistral, tmp_path, monkeypatch, code, match):
    stub = tmp_path / "stub"
    (stub / "conversion").mkdir(parents=True)
    (stub / "conversion" / "__init__.py").write_text(STUB)
    (stub / convert.SCRIPT).write_text(f"import sys\ndef main():\n    {code}\n")
    monkeypatch.setattr(convert, "folder", lambda: stub)
    refused(match, mistral, tmp_path / "m.gguf")


def test_the_child_is_offline_apart_and_meets_no_code(mistral, tmp_path, monkeypatch):
    """It gets a folder with links to the weights that count, copies of the rest, and nothing that names code."""
    folder = change(mistral, tmp_path / "mistral", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    staged = convert._staged(folder, None, tmp_path / "temporary")
    assert staged.name == "mistral"
    assert sorted(file.name for file in staged.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert "auto_map" not in json.loads((staged / "config.json").read_text())
    assert (staged / "model.safetensors").resolve() == (folder / "model.safetensors").resolve()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    convert._staged(folder, tiny_llama.tokenizer(), tmp_path / "again")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_shards_are_staged_with_an_index_of_their_own(mistral, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(mistral).save_pretrained(tmp_path / "m", max_shard_size="100KB")
    staged = convert._staged(tmp_path / "m", None, tmp_path / "temporary")
    index = json.loads((staged / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and all((staged / file).exists() for file in index.values())


@pytest.mark.slow
def test_the_rebuilt_sentencepiece_model_reads_back():
    """Pieces, kinds and the order of the scores, by sentencepiece itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    if not installed or not vocabularies.available():
        pytest.skip("the vocabulary files are not installed: python -m tools.llamacpp_source --vocabularies")
    tok, _, tokens = vocabularies.sentencepiece("llama-spm")
    model = sentencepiece.SentencePieceProcessor(model_proto=convert._sentencepiece(json.loads(tok.to_str())))
    assert [model.IdToPiece(at) for at in range(model.vocab_size())] == tokens
    kinds = vocabularies.read("llama-spm")["token_type"]
    for at, kind in enumerate(kinds):
        flags = (model.IsUnknown(at), model.IsControl(at), model.IsByte(at))
        assert flags == (kind == 2, kind == 3, kind == 6), tokens[at]
    for text in TEXTS:
        if "\x00" not in text:
            assert model.encode(text) == tok.encode(text, add_special_tokens=False).ids, text


@needs_converter
@pytest.mark.slow
@pytest.mark.parametrize("change_of, match", [
    ({"architectures": ["FooForCausalLM"]}, "Model FooForCausalLM is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*with 'silu'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                          "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}}, "longrope"),
    ({"num_hidden_layers": 1}, "Can not map tensor|no place"),
    ({"num_hidden_layers": 3}, "cannot load|missing tensor"),
])  # fmt: skip
def test_refusals_of_the_real_one(mistral, tmp_path, change_of, match):
    refused(match, change(mistral, tmp_path / "mistral", **change_of), tmp_path / "m.gguf")


@needs_converter
@pytest.mark.slow
def test_tokenizers_that_cannot_be_carried_over(mistral, tmp_path):
    from tokenizers import AddedToken, pre_tokenizers

    folder = change(mistral, tmp_path / "mistral")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused("refuses mistral", folder, tmp_path / "m.gguf")
    tok = tiny_llama.tokenizer()
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    refused("pre-tokenizer was not recognized", folder, tmp_path / "m.gguf", tokenizer=tok)
    tok = tiny_llama.tokenizer(500)
    tok.add_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    refused("added token '<mask>'", folder, tmp_path / "m.gguf", tokenizer=tok)


@needs_converter
@pytest.mark.slow
def test_a_model_object_its_wrapper_and_a_vocabulary_that_nobody_knows(mistral, tmp_path):
    """The converter tells tokenizers by a hash; one that was trained here is told by its regular expression."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mistral)
    path = convert.to_gguf(torch.compile(model), tmp_path / "m.gguf", "f32", tokenizer=tiny_llama.tokenizer())
    meta = llamacpp.check_gguf(path).metadata
    assert meta["tokenizer.ggml.pre"] == "gpt-2" and meta["general.architecture"] == "llama"
    assert off_by(model, path, np.arange(100)) < 5e-4
    stored = {t.name for t in gguf.GGUFReader(path).tensors}
    assert len(stored) == len(model.state_dict())


@needs_converter
@pytest.mark.slow
def test_weights_that_the_converter_would_drop(mistral, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = change(mistral, tmp_path / "mistral")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"vision_tower.weight": torch.ones(64, 64)}, folder / "model.safetensors", {"format": "pt"})
    refused(r"4,096 of its weights have no place in the file \(vision_tower.weight\)", folder, tmp_path / "m.gguf")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused("lm_head.weight is stored as F8_E4M3", folder, tmp_path / "m.gguf")


def test_the_course_model_needs_none(tmp_path):
    assert convert.to_gguf(course_model.model_dir(), tmp_path / "m.gguf").is_file()
