"""From a Hugging Face Llama checkpoint to one GGUF file, step by step.

GGUF is the file that llama.cpp reads: a header, key-value metadata (hyper-parameters, the whole tokenizer), a table of
tensors (name, shape, type, offset) and their data, aligned so that the file can be memory-mapped and used as is.

Converting a Llama takes four steps:

1. rename the tensors       ``model.layers.0.self_attn.q_proj.weight`` -> ``blk.0.attn_q.weight``
2. permute the q and k rows  Hugging Face rotates the two *halves* of a head against each other, llama.cpp
   rotates *neighbouring pairs*; reordering the rows once makes both compute the same attention
3. choose a type            matrices become F32, F16 or BF16; norms and biases (1-D) always stay F32,
   they are tiny and every weight in them matters
4. write the tokenizer       the vocabulary, the merges, which tokens are special, the chat template, and ``pre``:
   the name of the regular expression that splits text before the merges, which llama.cpp has compiled in

Every tensor of the checkpoint is accounted for: written, tied, or refused by name.  This is the lesson, and what the
course model takes: a Llama with a byte-level BPE tokenizer.  Of any other family :mod:`qtutor.checkpoints.convert`
makes the file, with llama.cpp's own ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, size_label

from . import QtutorError, files

DTYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
CONVERTER = "use checkpoints.convert.to_gguf"


class NotOursError(QtutorError):
    """What this small converter leaves to llama.cpp's own."""


# llama.cpp's names for the pre-tokenizer regular expressions that Llama-family tokenizers use.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT_REGEX = {_CONTRACTIONS + r"\p{N}{1,3}" + _TAIL: "llama-bpe", _CONTRACTIONS + r"\p{N}" + _TAIL: "qwen2"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ROPE_NEEDS = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip


def gguf_name(hf_name: str) -> str | None:
    """GGUF's name of a Llama's tensor, e.g. blk.3.ffn_down.weight for model.layers.3.mlp.down_proj.weight, or None."""
    stem, _, suffix = hf_name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if match and match[2] in _LAYER_NAMES:
        return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{suffix}"
    return None


def permute(weight: torch.Tensor, n_head: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection, (n_head * d, ...), from halves (Hugging Face) to pairs (llama.cpp).

    Within each head of ``d`` rows, row ``i`` and row ``i + d/2`` are rotated together by Hugging Face's
    ``rotate_half``; llama.cpp rotates rows ``2i`` and ``2i + 1``.  Same as ``LlamaModel.permute`` in its converter.
    """
    half = weight.shape[0] // n_head // 2
    return weight.reshape(n_head, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class _Source:
    """A checkpoint: its configuration, its tensors' names, how to read one, and what to call it."""

    config: dict
    names: set
    read: Callable[[str], torch.Tensor]
    where: str
    folder: Path | None = None


def _read_json(path: Path) -> dict:
    if isinstance(found := files.read_json(path), dict):
        return found
    raise QtutorError(f"{path.name} holds no JSON object: restore it from the original.")


def checkpoint(folder: Path) -> tuple[dict, dict[str, object]]:
    """Open the checkpoint in a folder, which takes no memory: its config.json, and tensor name -> (file, safetensors
    handle), of the very files that transformers would load."""
    from safetensors import safe_open

    if not folder.is_dir():
        raise QtutorError(f"There is no model folder at '{folder}': give the path of a saved model.")
    if (folder / "adapter_config.json").exists():
        raise QtutorError(f"{folder.name}/ holds an adapter (adapter_config.json): load it with peft, call "
                          "merge_and_unload(), and save that model.")  # fmt: skip
    config, index = _read_json(folder / "config.json"), folder / "model.safetensors.index.json"
    if config.get("transformers_weights"):
        raise QtutorError("config.json names its own file of weights (transformers_weights): save the model again.")
    shards = {"model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():  # as transformers: a single file comes first
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(Path(str(file)).name == file for file in names.values()):
            raise QtutorError(f"{index.name} does not say which file holds which tensor: save the model again.")
        shards = set(names.values())
    where_is: dict[str, object] = {}
    for file in sorted(shards):
        if not (folder / file).is_file():
            raise QtutorError(f"{folder.name}/ has no {file}: save the model with safetensors first.")
        try:
            handle = safe_open(folder / file, framework="pt")
        except Exception as err:  # the Rust library has no class of its own for each
            raise QtutorError(f"{file} is damaged ({_first_line(err)}): copy or save the model again.") from None
        where_is.update(dict.fromkeys(handle.keys(), (file, handle)))
    return config, where_is


def plain(model):
    """The model inside torch.compile's and data-parallel wrappers; QtutorError for one whose weights are not what it
    computes with: adapters, fake quantization, packed codes, shards."""
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        model = getattr(model, "_orig_mod", None) or model.module
    if not isinstance(model, torch.nn.Module):
        raise QtutorError(f"A {type(model).__name__} is no model: pass a LlamaForCausalLM or a folder.")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise QtutorError(f"{type(model).__name__} has an adapter: call merge_and_unload() and export what it returns.")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise QtutorError("The model is sharded by FSDP: gather its state into the plain model first.")
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise QtutorError(f"{type(model).__name__} has no config of transformers: pass a LlamaForCausalLM or a folder.")
    state = model.state_dict()
    for name, module in model.named_modules():
        if any("fake_quant" in part for part in vars(module) | module._modules) or f"{name}.codes" in state:
            raise QtutorError(f"{name} has no ordinary weight: pass packed.bake(model), whose weights lie on the grid "
                              "that training saw.")  # fmt: skip
    return model


def _open_model(model) -> _Source:
    """Wrap a model object; torchao tensors are read through ``dequantize()``."""
    model = plain(model)
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}

    def read(name: str) -> torch.Tensor:
        tensor, ordinary = state[name].detach(), (torch.Tensor, torch.nn.Parameter)
        if type(tensor) not in ordinary and hasattr(type(tensor), "__tensor_flatten__"):
            with contextlib.suppress(Exception):  # sharded tensors cannot
                tensor = tensor.dequantize()
        if type(tensor) not in ordinary or tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else "sparse" if type(tensor) in ordinary else type(tensor).__name__
            raise QtutorError(f"{name} is a {kind} tensor: export a model with ordinary tensors, whole and in memory.")
        return tensor

    return _Source(model.config.to_dict(), set(state), read, type(model).__name__)


def _first_line(err: Exception) -> str:
    return str(err).strip().split("\n")[0].rstrip(".")


def hyperparameters(config: dict) -> dict:
    """The numbers of a Llama's config.json that GGUF needs, ``rope`` among them; QtutorError for another model."""
    if config.get("model_type") != "llama":
        raise NotOursError("Only the Llama architecture can be exported here, and this model is "
                           f"{config.get('model_type')!r}: {CONVERTER} for it.")  # fmt: skip
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise QtutorError(f"config.json has hidden_act {config['hidden_act']!r} and llama.cpp computes every Llama "
                          "with silu: train with silu.")  # fmt: skip
    if config.get("quantization_config"):
        raise NotOursError("This checkpoint is quantized already (quantization_config in config.json): export the "
                           "original weights.")  # fmt: skip
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        hyper = {
            "layers": int(config["num_hidden_layers"]), "hidden": hidden, "ffn": int(config["intermediate_size"]),
            "heads": heads, "kv_heads": int(config.get("num_key_value_heads") or heads),
            "head_dim": int(config.get("head_dim") or hidden // heads), "vocab": int(config["vocab_size"]),
            "ctx": int(config["max_position_embeddings"]), "eps": float(config["rms_norm_eps"]),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as err:
        raise QtutorError(f"config.json lacks a usable {err}: it does not describe a Llama model.") from None
    # transformers 5 keeps RoPE settings in rope_parameters; rope_scaling, from before, wins where both are there
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise QtutorError("The RoPE settings in config.json are no JSON object: restore it from the original.")
    kind, rope = rope.get("rope_type") or rope.get("type") or "default", dict(rope)
    if kind not in _ROPE_NEEDS:
        raise NotOursError(f"RoPE scaling {kind!r} is not known here: {CONVERTER}.")
    if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1):
        raise QtutorError(f"config.json has partial_rotary_factor {part} and llama.cpp rotates a Llama's whole heads: "
                          "this model cannot be exported.")  # fmt: skip
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    for key in ("rope_theta", *_ROPE_NEEDS[kind]):
        try:
            hyper[key] = float(rope[key])
        except (KeyError, TypeError, ValueError):
            hyper[key] = math.nan
    if wrong := [f"{key} = {value}" for key, value in hyper.items() if not 0 < value < math.inf]:
        raise QtutorError(f"config.json has {wrong[0]}: it does not describe a Llama model.")
    flags = {key: bool(config.get(key, False)) for key in ("attention_bias", "mlp_bias")}
    return hyper | flags | {"tied": bool(config.get("tie_word_embeddings", False)), "rope_type": kind}


def expected(hyper: dict, names=()) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (Hugging Face name, shape), in the order in which they are written.  Biases as config.json has them
    (attention_bias, mlp_bias), and those among ``names``."""
    d, f, dim = hyper["hidden"], hyper["ffn"], hyper["head_dim"]
    q, kv = hyper["heads"] * dim, hyper["kv_heads"] * dim
    shapes = [(d,), (q, d), (kv, d), (kv, d), (d, q), (d,), (f, d), (f, d), (d, f)]  # in the order of _LAYER_NAMES
    wanted = {"model.embed_tokens.weight": (hyper["vocab"], d), "model.norm.weight": (d,)}
    if not hyper["tied"]:
        wanted["lm_head.weight"] = (hyper["vocab"], d)
    for layer in range(hyper["layers"]):
        for stem, shape in zip(_LAYER_NAMES, shapes, strict=True):
            base, part = f"model.layers.{layer}.{stem}", stem.partition(".")[0].replace("self_attn", "attention")
            wanted[f"{base}.weight"] = shape
            if hyper.get(f"{part}_bias") or f"{base}.bias" in names:
                wanted[f"{base}.bias"] = shape[:1]
    return {gguf_name(name): (name, shape) for name, shape in wanted.items()}


def _account(source: _Source, hyper: dict) -> dict:
    """:func:`expected` of the checkpoint; refuses one that lacks a tensor or has one that GGUF has no place for."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if hyper["tied"] and head in source.names:  # transformers ties the two if they are equal, or one is missing
        if embedding in source.names and not torch.equal(source.read(head), source.read(embedding)):
            hyper["tied"] = False
    wanted = expected(hyper)
    if hyper["tied"] and head in source.names and embedding not in source.names:
        wanted["token_embd.weight"] = (head, wanted["token_embd.weight"][1])
    names = {hf for hf, _ in wanted.values()} | ({head} if hyper["tied"] else set())
    extra = sorted(name for name in source.names - names if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise QtutorError(f"{source.where} has a tensor {extra[0]} that a Llama's GGUF file has no place for: export "
                          "the plain model (adapters merged, quantization undone).")  # fmt: skip
    if missing := [hf for hf, _ in wanted.values() if hf not in source.names]:
        raise QtutorError(f"{source.where} lacks {missing[0]} ({len(missing)} missing): the checkpoint is incomplete.")
    return wanted


def _tokenizer_of(source: _Source, tokenizer) -> tuple[dict, str | list | None]:
    """The tokenizer as ``tokenizer.json`` holds it, and the chat template where there is one: Jinja, or (where several
    have names) a list of dicts.  A folder keeps it in chat_template.jinja, once in tokenizer_config.json."""
    if tokenizer is None and source.folder is None:
        raise QtutorError("A model object has no tokenizer: pass tokenizer=..., or export from a folder.")
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        path = Path(tokenizer or source.folder)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise NotOursError(f"{path.parent.name}/ has no {path.name}: save a fast tokenizer into the model folder.")
        found, jinja, config = _read_json(path), *map(path.with_name, ("chat_template.jinja", "tokenizer_config.json"))
        chat = _read_json(config).get("chat_template") if config.is_file() else None
        if chat is None and jinja.is_file():
            try:
                chat = jinja.read_text(encoding="utf-8")
            except (OSError, ValueError) as err:
                raise QtutorError(f"{jinja.name} cannot be read ({err}): restore it from the original.") from None
    else:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise QtutorError("This tokenizer has no tokenizer.json behind it: use a fast (Rust) tokenizer.")
        found, chat = json.loads(backend.to_str()), getattr(tokenizer, "chat_template", None)
    if isinstance(chat, dict):
        chat = [{"name": name, "template": text} for name, text in chat.items()]
    return found, chat


def pre_tokenizer_name(tokenizer: dict) -> str:
    """llama.cpp's name (``tokenizer.ggml.pre``) for the pre-tokenizer of a byte-level BPE ``tokenizer.json``.

    Text is cut by a regular expression before merges apply; the wrong name gives quietly worse output.
    """
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds, last = [step.get("type") for step in steps], steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space") and not tokenizer.get("normalizer"):
        regex = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and regex:
            return "smollm"
        split = steps[0].get("pattern", {}).get("Regex")
        if kinds == ["Split", "ByteLevel"] and not regex and not steps[0].get("invert") and split in _SPLIT_REGEX:
            return _SPLIT_REGEX[split]
    raise NotOursError(f"llama.cpp's name for this pre-tokenizer ({' + '.join(map(str, kinds))}) is not known here: "
                       f"{CONVERTER}.")  # fmt: skip


def add_tokenizer(writer, tok: dict, config: dict, n_vocab: int) -> None:
    """Write a byte-level BPE tokenizer (the dict of tokenizer.json) into the metadata of a GGUFWriter."""
    from tokenizers import Tokenizer

    model = tok.get("model", {})
    other = [key for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("type") != "BPE" or other:
        raise NotOursError(f"Only byte-level BPE tokenizers can be exported here: {CONVERTER}.")
    try:
        tokens = {int(i): (text, TokenType.NORMAL) for text, i in model["vocab"].items()}
        for one in tok.get("added_tokens", []):
            tokens[one["id"]] = one["content"], TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
            if how := [key for key in ("lstrip", "rstrip", "single_word") if one.get(key)]:
                raise QtutorError(f"The added token {one['content']!r} has {how[0]}, which a GGUF file cannot say: "
                                  "llama.cpp would split text around it into other tokens.")  # fmt: skip
        if max(tokens) >= n_vocab:
            raise QtutorError(f"The tokenizer has ids up to {max(tokens)} but the model only {n_vocab} embeddings: "
                              "they do not belong together.")  # fmt: skip
        rows = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(n_vocab)]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        if not merges:
            raise ValueError("it has no merges")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tok))
        writer.add_token_list([text for text, _ in rows])
        writer.add_token_types([int(kind) for _, kind in rows])
        writer.add_token_merges(merges)
        special = {}
        for name in ("bos", "eos", "pad"):
            number = config.get(f"{name}_token_id")
            special[name] = number[0] if isinstance(number, (list, tuple)) and number else number
            if isinstance(special[name], int) and 0 <= special[name] < n_vocab:  # as llama.cpp's converter
                getattr(writer, f"add_{name}_token_id")(special[name])
        # llama.cpp's tokenizer must add what Hugging Face's adds by default: ask it rather than guess
        backend = Tokenizer.from_str(json.dumps(tok))
        ids, text = (backend.encode("a", add_special_tokens=add).ids for add in (True, False))
        first, last = ids != text and ids[0] == special["bos"], ids != text and ids[-1] == special["eos"]
        if ids != [special["bos"]] * first + text + [special["eos"]] * last:
            raise ValueError("it adds more to a text than the model's bos and eos")
        writer.add_add_bos_token(first)
        writer.add_add_eos_token(last)
    except QtutorError:
        raise
    except Exception as err:  # a part is missing or of another kind; the Rust library has no narrower class
        raise QtutorError(f"The tokenizer cannot be used ({type(err).__name__}: {_first_line(err)}): save it "
                          "again.") from None  # fmt: skip


def _prepare(tensor: torch.Tensor, name: str, hyper: dict, dtype: str) -> np.ndarray:
    """Permute, convert and check one tensor; return the array to write."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise QtutorError(f"{name} is stored as {tensor.dtype}, without its scales: export the original weights.")
    x = tensor.to("cpu", torch.float32)
    if not torch.isfinite(x).all():
        raise QtutorError(f"{name} holds NaN or infinity: export a model whose weights are finite.")
    if ".attn_q." in name or ".attn_k." in name:
        x = permute(x, hyper["heads" if ".attn_q." in name else "kv_heads"])
    x = x.contiguous()
    if dtype == "f32" or x.ndim == 1:
        return x.numpy()
    if dtype == "bf16":  # numpy has no bfloat16: hand over the same bits as bytes, the last axis doubled
        return x.to(torch.bfloat16).view(torch.uint8).numpy()
    if x.abs().max() >= 65520:  # would round to infinity
        raise QtutorError(f"{name} has values beyond float16's 65504: export with dtype='bf16' or 'f32'.")
    return x.to(torch.float16).numpy()


def add_metadata(writer, hyper: dict, dtype: str, name: str, folder: Path | None = None) -> None:
    """Write a Llama's hyper-parameters into a GGUFWriter, with the licence that the folder's model card names."""
    card = folder / "README.md" if folder else None
    front = card.read_text(encoding="utf-8", errors="replace").split("---") if card and card.is_file() else []
    if len(front) > 2 and (found := re.search(r"^license:\s*([\w.\-]+)", front[1], re.M)):
        writer.add_license(found[1])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(DTYPES[dtype])
    writer.add_quantization_version(2)
    for field, key in {
        "block_count": "layers", "context_length": "ctx", "embedding_length": "hidden", "feed_forward_length": "ffn",
        "head_count": "heads", "head_count_kv": "kv_heads", "key_length": "head_dim", "value_length": "head_dim",
        "layer_norm_rms_eps": "eps", "rope_freq_base": "rope_theta", "rope_dimension_count": "head_dim",
        "vocab_size": "vocab",
    }.items():  # fmt: skip
        getattr(writer, f"add_{field}")(hyper[key])


def _write(partial: Path, source: _Source, dtype: str, tokenizer, name: str) -> None:
    from tqdm.auto import tqdm

    hyper = hyperparameters(source.config)
    if hyper["rope_type"] != "default":
        raise NotOursError(f"RoPE scaling {hyper['rope_type']!r} is not written here: {CONVERTER}.")
    tok, chat = _tokenizer_of(source, tokenizer)
    wanted = _account(source, hyper)
    total = sum(math.prod(shape) for _, shape in wanted.values())
    writer = GGUFWriter(partial, "llama")
    try:
        add_metadata(writer, hyper, dtype, name, source.folder)
        writer.add_size_label(size_label(total, total, 0, 0))  # e.g. "7.3M", shown by llama.cpp's tools
        add_tokenizer(writer, tok, source.config, hyper["vocab"])
        if chat:
            writer.add_chat_template(chat)
        for key, (_, shape) in wanted.items():
            stored, kind = np.dtype(np.float16 if dtype == "f16" and len(shape) > 1 else np.float32), None
            if dtype == "bf16" and len(shape) > 1:  # numpy lacks the type, and gguf wants the shape of the bytes
                stored, kind, shape = np.dtype(np.uint8), GGMLQuantizationType.BF16, (*shape[:-1], 2 * shape[-1])
            writer.add_tensor_info(key, shape, stored, math.prod(shape) * stored.itemsize, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # one tensor in memory at a time: a 7B model converts on a laptop
        for key, (hf, shape) in tqdm(wanted.items(), desc="export", leave=False, disable=total < 100e6):
            tensor = source.read(hf)
            if tuple(tensor.shape) != shape:
                raise QtutorError(f"{hf} is {tuple(tensor.shape)} but config.json says {shape}: restore the original.")
            writer.write_tensor_data(_prepare(tensor, key, hyper, dtype))
    finally:
        writer.close()


def export(model, path, dtype: str = "f32", tokenizer=None, *, name: str | None = None) -> Path:
    """Write a Hugging Face Llama as a GGUF file that llama.cpp runs, and return its path.

    ``model`` is a folder (config.json, safetensors, tokenizer.json; nothing is executed and no model is built) or a
    ``LlamaForCausalLM``.  ``dtype`` is the type of the matrices: ``"f32"``, ``"f16"`` or ``"bf16"``; 1-D tensors stay
    F32.  ``tokenizer`` is a fast tokenizer, a ``tokenizers.Tokenizer`` or a path, and is required with a model object.
    ``name`` goes to the metadata, by default the folder's.  The file appears only when it is complete.
    """
    if dtype not in DTYPES:
        raise QtutorError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}: quantize afterwards.")
    if isinstance(model, (str, os.PathLike)):
        config, at = checkpoint(folder := Path(model))
        source = _Source(config, set(at), lambda name: at[name][1].get_tensor(name), folder.name, folder)
    else:
        source = _open_model(model)
    name = name or (source.folder.resolve().name if source.folder else source.where)
    with files.whole(path) as partial:
        _write(partial, source, dtype, tokenizer, name)
    return Path(path)
