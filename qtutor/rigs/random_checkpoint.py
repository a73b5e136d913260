"""A Hugging Face checkpoint of any Llama's shape with random codes and real scales, for engines that read such folders.

The same idea as :mod:`.random_gguf`, for vLLM and transformers: the time and the memory of a step depend on shapes and
types, and not on what was learned.  Three schemes, as llm-compressor writes them (``compressed-tensors``):

- ``BF16``   matrices as they are
- ``FP8``    E4M3 codes, one scale an output channel; activations are rounded for each token while the model runs
- ``W4A16``  4-bit integers, eight to an int32, one scale for 128 weights of a row; activations stay in 16 bits

Weights are normally distributed (:data:`random_gguf.STD`), so codes are varied and activations stay finite.  (An
engine's own dummy weights are not: cast to FP8 they are nearly all zero, which costs a GPU less power.)

    random_checkpoint.write("/dev/shm/7b", "Llama-2-7B", "FP8")        # 7 GB in seconds, shard by shard
    vllm serve /dev/shm/7b --served-model-name model                   # in a terminal
"""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

import torch

from .. import QtutorError, course_model, files
from ..decide import capacity
from . import random_gguf

SCHEMES = ("BF16", "FP8", "W4A16")
GROUP = 128  # weights that share a scale in W4A16
SHARD, POOL_SCALES = 4 * 10**9, 65537
_BYTES = {"I64": 8, "I32": 4, "BF16": 2, "F8_E4M3": 1}
_WEIGHTS = {"FP8": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
            "W4A16": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}}
_ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
_FORMATS = {"FP8": "float-quantized", "W4A16": "pack-quantized"}


def tensors(config, scheme: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype as safetensors calls it, shape) of all tensors; embedding, head and norms stay in 16 bits."""
    if scheme not in SCHEMES:
        raise QtutorError(f"There is no scheme {scheme!r}: choose one of {', '.join(SCHEMES)}.")
    c = capacity.config_of(config)
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}  # fmt: skip
    found = {"model.embed_tokens.weight": ("BF16", (vocab, hidden)), "model.norm.weight": ("BF16", (hidden,))}
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = ("BF16", (vocab, hidden))
    for layer in range(c["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{start}{norm}.weight"] = ("BF16", (hidden,))
        for name, (out, n) in linear.items():
            key = f"{start}{name}.weight"
            if scheme == "BF16":
                found[key] = ("BF16", (out, n))
            elif scheme == "FP8":
                found |= {key: ("F8_E4M3", (out, n)), f"{key}_scale": ("BF16", (out, 1))}
            elif n % GROUP:
                raise QtutorError(f"{key} has rows of {n} weights, no multiple of {GROUP}: take another shape.")
            else:
                found |= {f"{key}_packed": ("I32", (out, n // 8)), f"{key}_scale": ("BF16", (out, n // GROUP)),
                          f"{key}_shape": ("I64", (2,))}  # fmt: skip
    return found


def nbytes(config, scheme: str) -> int:
    """Bytes of all tensors, to the byte; headers and tokenizer come on top."""
    return sum(_BYTES[dtype] * prod(shape) for dtype, shape in tensors(config, scheme).values())


def _pools(scheme: str, seed: int) -> dict:
    """Random bytes, by what they are for; a prime number of values, so that rows begin at different ones."""
    draw, n = torch.Generator().manual_seed(seed), random_gguf.POOL_BLOCKS * 256 + 1
    normal = torch.randn(n, generator=draw)
    most, top = {"FP8": (4.0, 448.0), "W4A16": (2.8, 7.5)}.get(scheme, (1.0, 1.0))  # largest of a row, its code
    scales = random_gguf.STD * most / top * (0.8 + 0.4 * torch.rand(POOL_SCALES, generator=draw))
    made = {"BF16": (normal * random_gguf.STD).bfloat16(), "scale": scales.bfloat16(),
            "norm": torch.ones(2**16, dtype=torch.bfloat16),
            "F8_E4M3": (normal * 448 / 4).clamp(-448, 448).to(torch.float8_e4m3fn)}  # fmt: skip
    codes = (normal[: n // 8 * 8] * 7.5 / 2.8).round().clamp(-8, 7).to(torch.int64).view(-1, 8) + 8
    packed = (codes << (4 * torch.arange(8))).sum(1)  # the first weight in the lowest four bits
    made["I32"] = torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32)
    raw = {name: value.view(torch.uint8).numpy() for name, value in made.items()}
    return {name: random_gguf.tiled(value) for name, value in raw.items()}


def write_head(folder, config, scheme: str) -> Path:
    """Write config.json and the tokenizer alone: a shape, for an engine that invents the weights, or for a GGUF file.

    The tokenizer is the course model's, with filler words up to the vocabulary's end that no text is cut into; where
    the vocabulary has no room for it, there is none.
    """
    folder, config = Path(folder), capacity.config_of(config)
    about = config | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_act": "silu",
                      "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    if scheme in _FORMATS:
        group = {"targets": ["Linear"], "weights": _WEIGHTS[scheme], "output_activations": None,
                 "input_activations": _ACTIVATIONS if scheme == "FP8" else None}  # fmt: skip
        about["quantization_config"] = {"quant_method": "compressed-tensors", "format": _FORMATS[scheme],
                                        "quantization_status": "compressed", "ignore": ["lm_head"],
                                        "config_groups": {"group_0": group}}  # fmt: skip
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    written = {"config.json": about, "tokenizer.json": files.read_json(course_model.model_dir() / "tokenizer.json"),
               "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**6}
               | special}  # fmt: skip
    words = written["tokenizer.json"]["model"]["vocab"]
    words |= {f"w{i}": i for i in range(len(words), config["vocab_size"])}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        if name == "config.json" or len(words) <= config["vocab_size"]:
            (folder / name).write_text(json.dumps(content, indent=1), "utf-8")
    return folder


def write(folder, config="Llama-2-7B", scheme: str = "FP8", seed: int = 0) -> Path:
    """Write a checkpoint of the shape ``config`` (anything that ``capacity.config_of`` takes) and return its folder.

    With it comes what :func:`write_head` writes.  The same arguments give the same bytes.
    """
    folder, found, need = Path(folder), tensors(config, scheme), nbytes(config, scheme)
    write_head(folder, config, scheme)
    if (free := shutil.disk_usage(folder).free) < need:
        raise QtutorError(f"'{folder}' has {free / 1e9:.1f} GB free and the checkpoint needs {need / 1e9:.1f} GB: "
                          "choose another folder or free some space.")  # fmt: skip
    shards, room = [{}], SHARD
    for name, (dtype, shape) in found.items():
        size = _BYTES[dtype] * prod(shape)
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][name] = (dtype, shape, size)
        room -= size
    pools, where = _pools(scheme, seed), {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(path, shard, pools)
        where |= dict.fromkeys(shard, path.name)
    index = {"metadata": {"total_size": need}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def _write_shard(path: Path, shard: dict, pools: dict) -> None:
    order, header, at = sorted(shard, key=lambda name: -_BYTES[shard[name][0]]), {}, 0  # wide types first: aligned
    for name in order:
        dtype, shape, size = shard[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    jobs = []
    for number, name in enumerate(order):
        dtype, shape, size = shard[name]
        offset = 8 + len(text) + header[name]["data_offsets"][0]
        if dtype == "I64":  # the shape of what is packed
            out, n = shard[name.removesuffix("_shape") + "_packed"][1]
            pool, first = torch.tensor([out, n * 8]).view(torch.uint8).numpy(), 0
        else:
            kind = "scale" if name.endswith("_scale") else "norm" if len(shape) == 1 else dtype
            pool, first = pools[kind], number * 7919 * _BYTES[dtype]  # each tensor begins elsewhere in the pool
        jobs += [(path, pool, *piece) for piece in random_gguf.pieces(size, offset, pool.size, first)]
    random_gguf.write_pieces(jobs)
