"""How big, does it fit, how fast at best: a model's needs before anything is downloaded or rented.

Four numbers decide whether a model runs on a device, and how fast it can write:

- **weights**   the tensors of the GGUF file.  Not parameters times bits: mixtures give each tensor a type of its own,
  so we ask llama.cpp.  Its quantizer has a dry run, and a *sparse* file (a header, then a hole of the right length that
  takes no disk) is all that it wants to see: a 70B model is planned to the byte in no space and a fifth of a second.
- **KV cache**  keys and values of every token so far: 2 x layers x kv_heads x head_dim values a token, in F16 two bytes
  each.  Grouped-query attention (few kv_heads) makes it small; layers with a sliding window (Gemma 2 and 3) keep less.
- **buffers**   activations and logits of the batch at work, plus what the driver takes for itself.
- **bandwidth** to write one token for every user the device reads all weights and caches once, so no program writes
  faster than bandwidth / bytes: the *ceiling*.

    capacity.size("Llama-2-70B", "Q6_K").gib                     # 52.7
    capacity.fits("Llama-2-70B", "Q6_K", 4096, "H100 SXM").fits  # True

The numbers come from config.json alone, for every family in :data:`FAMILIES`: a Llama's by arithmetic, another's from
the shapes of transformers' own model on the meta device, which holds no weights.

Sources: llama.cpp's src/llama-quant.cpp (the mixtures), src/llama-kv-cache.cpp and -iswa.cpp (windows).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import os
import re
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .. import QtutorError, files, gguf_export, llamacpp
from .hardware import Device
from .hardware import device as device_of

GB, GIB, MIB = 10**9, 2**30, 2**20

def llama(hidden, intermediate, layers, heads, kv_heads, vocab, context, theta=10000.0, tied=False, rope_factor=None):
    """Return the configuration of a Llama with Hugging Face's keys; ``rope_factor``: Llama 3.1's scaling of RoPE."""
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
              "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "vocab_size": vocab, "max_position_embeddings": context, "rope_theta": theta, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": tied}  # fmt: skip
    if rope_factor:
        config["rope_scaling"] = {"rope_type": "llama3", "factor": rope_factor, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    return config


# The numbers of each model's config.json at https://huggingface.co/<the name behind it>
MODELS: dict[str, dict] = {
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000, 4096),  # meta-llama/Llama-2-7b-hf
    "Llama-2-13B": llama(5120, 13824, 40, 40, 40, 32000, 4096),  # meta-llama/Llama-2-13b-hf
    "Llama-2-70B": llama(8192, 28672, 80, 64, 8, 32000, 4096),  # meta-llama/Llama-2-70b-hf
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256, 8192, 5e5),  # meta-llama/Meta-Llama-3-8B
    "Llama-3-70B": llama(8192, 28672, 80, 64, 8, 128256, 8192, 5e5),  # meta-llama/Meta-Llama-3-70B
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256, 131072, 5e5, False, 8.0),  # meta-llama/Llama-3.1-8B
    "Llama-3.1-70B": llama(8192, 28672, 80, 64, 8, 128256, 131072, 5e5, False, 8.0),  # meta-llama/Llama-3.1-70B
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, 131072, 5e5, True, 32.0),  # meta-llama/Llama-3.2-1B
    "Llama-3.2-3B": llama(3072, 8192, 28, 24, 8, 128256, 131072, 5e5, True, 32.0),  # meta-llama/Llama-3.2-3B
    "TinyLlama-1.1B": llama(2048, 5632, 22, 32, 4, 32000, 2048),  # TinyLlama/TinyLlama-1.1B-Chat-v1.0
}


# transformers' model_type -> llama.cpp's architecture, and which layers attend to all tokens: every n-th, others to a
# window (src/models/gemma*.cpp).  llama.cpp ignores the windows of Mistral, Qwen and Phi.
FAMILIES = {"llama": ("llama", 1), "mistral": ("llama", 1), "qwen2": ("qwen2", 1), "qwen3": ("qwen3", 1),
            "phi3": ("phi3", 1), "gemma": ("gemma", 1), "gemma2": ("gemma2", 2), "gemma3_text": ("gemma3", 6)}


def config_of(model) -> dict:
    """The configuration of a name in :data:`MODELS`, of a folder with a config.json, or such a dict itself; of a model
    that also sees or hears, the language model's (``text_config``)."""
    if isinstance(model, dict):
        config = model
    elif model in MODELS:
        return MODELS[model]
    elif (Path(model) / "config.json").is_file():
        config = files.read_json(Path(model) / "config.json")
    else:
        raise QtutorError(f"There is no model {str(model)!r}: give a folder with a config.json, or one of "
                          f"{', '.join(MODELS)}.")  # fmt: skip
    if not isinstance(config, dict):
        raise QtutorError("config.json holds no JSON object: restore it from the original.")
    text = config.get("text_config")
    return {k: v for k, v in config.items() if not k.endswith("_config")} | text if isinstance(text, dict) else config


def _folder(model) -> Path | None:
    return Path(model).resolve() if not isinstance(model, dict) and model not in MODELS else None


@functools.lru_cache(maxsize=256)
def _described(config: str) -> tuple[str, dict, dict]:
    """(llama.cpp's architecture, hyper-parameters, GGUF tensor name -> shape) of a configuration as JSON text."""
    given = json.loads(config)
    given.pop("quantization_config", None)  # llama.cpp's converter undoes it: the file is as large as the original's
    kind = given.get("model_type")
    if kind not in FAMILIES:
        experts = " (mixtures of experts among the others)" if "moe" in str(kind) or kind == "mixtral" else ""
        raise QtutorError(f"Planning knows the families {', '.join(FAMILIES)}, and this config.json has model_type "
                          f"{kind!r}{experts}: convert the model and look at the file.")  # fmt: skip
    hyper, shapes = _llama(given) if kind == "llama" else _by_transformers(given, FAMILIES[kind][0])
    if hyper["heads"] % hyper["kv_heads"] or hyper["layers"] > 512:  # llama.cpp would end the process
        raise QtutorError(f"This is not a usable configuration of {kind} (heads or layers): check it.")
    if hyper["rope_type"] == "llama3" and FAMILIES[kind][0] == "llama":
        shapes = {"rope_freqs.weight": (hyper["head_dim"] // 2,)} | shapes
    return FAMILIES[kind][0], {"window": 0, "rope_dim": hyper["head_dim"]} | hyper, shapes


def _llama(config: dict) -> tuple[dict, dict]:
    hyper = gguf_export.hyperparameters(config)
    attention = ["self_attn." + name for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    mlp = ["mlp." + name for name in ("gate_proj", "up_proj", "down_proj")]
    stems = attention * bool(config.get("attention_bias")) + mlp * bool(config.get("mlp_bias"))
    biases = {f"model.layers.{layer}.{stem}.bias" for layer in range(hyper["layers"]) for stem in stems}
    return hyper, {name: shape for name, (_, shape) in gguf_export.expected(hyper, biases).items()}


def _by_transformers(config: dict, arch: str) -> tuple[dict, dict]:
    """Hyper-parameters and shapes of any other family; what config.json leaves out has transformers' defaults."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in config.items() if key != "auto_map"}  # nobody's code is executed
    try:
        try:
            full = AutoConfig.for_model(**config)
        except Exception:  # null, where a number must be
            full = AutoConfig.for_model(**{key: value for key, value in config.items() if value is not None})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(full)
        rope = getattr(full, "rope_parameters", None) or {}
        rope, heads = rope.get("full_attention", rope), full.num_attention_heads
        dim = getattr(full, "head_dim", None) or full.hidden_size // heads
        hyper = {"layers": full.num_hidden_layers, "hidden": full.hidden_size, "ffn": full.intermediate_size,
                 "heads": heads, "kv_heads": full.num_key_value_heads, "head_dim": dim, "vocab": full.vocab_size,
                 "ctx": full.max_position_embeddings, "eps": full.rms_norm_eps, "factor": rope.get("factor") or 1.0,
                 "rope_theta": rope.get("rope_theta") or 1e4}  # fmt: skip
        if wrong := [f"{key} = {value}" for key, value in hyper.items() if not 0 < value < 2**40]:
            raise ValueError(wrong[0])
    except Exception as err:  # a wrong number fails somewhere inside torch or transformers
        why = (str(err).strip().splitlines() or [type(err).__name__])[-1].strip().rstrip(".:")
        raise QtutorError(f"config.json does not describe a usable {arch} model ({why}): check it.") from None
    hyper["rope_dim"] = int(rope.get("partial_rotary_factor", 1) * dim)
    hyper["rope_type"] = rope.get("rope_type") or "default"
    hyper["window"] = getattr(full, "sliding_window", None) or 0
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), hyper["layers"])
    shapes = {names.get_name(name, (".weight", ".bias")): tuple(p.shape) for name, p in model.named_parameters()}
    if full.tie_word_embeddings or arch in ("gemma", "gemma2"):  # which llama.cpp never unties
        shapes.pop("output.weight", None)
    if rope.get("long_factor"):
        shapes |= dict.fromkeys(("rope_factors_long.weight", "rope_factors_short.weight"), (hyper["rope_dim"] // 2,))
    return hyper, shapes


def shapes(model) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name -> shape (rows, columns), without what RoPE scaling adds."""
    return {name: shape for name, shape in _described(_key(model))[2].items() if not name.startswith("rope_")}


def parameters(model) -> int:
    """Number of weights, embeddings and norms included."""
    return sum(map(prod, shapes(model).values()))


def _up(n: int, step: int = 32) -> int:
    """``n`` rounded up to a multiple of ``step``; 32 is how GGUF aligns."""
    return -(-n // step) * step


def _add_vocabulary(writer, folder: Path | None, config: dict, n: int) -> None:
    """The folder's tokenizer, so that the header is as long as the real one; else ``n`` words of Llama 2's form."""
    if folder and (folder / "tokenizer.json").is_file():
        try:
            return gguf_export.add_tokenizer(writer, files.read_json(folder / "tokenizer.json"), config, n)
        except QtutorError:  # one that cannot be exported, such as SentencePiece: a plan needs the numbers only
            for key in [key for key in writer.kv_data[0] if key.startswith("tokenizer.")]:
                del writer.kv_data[0][key]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"w{i}" for i in range(n - 259))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words[:n])
    writer.add_token_scores([float(-i) for i in range(n)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * n][:n])  # unknown, control, byte, normal
    writer.add_bos_token_id(min(1, n - 1))
    writer.add_eos_token_id(min(2, n - 1))
    writer.add_add_bos_token(True)


def write_stub(path, model, types: dict[str, str] | None = None, name: str = "stub",
               vocabulary: bool = True, ftype: int | None = None) -> llamacpp.Gguf:
    """Write a GGUF file with a complete header and a hole where the tensors would be; return what it declares.

    ``types``: tensor name -> GGML type, by default what a converter writes (F16 matrices, F32 norms); ``ftype``:
    llama.cpp's number of the mixture.  The hole takes no disk on ext4, tmpfs and APFS (NTFS stores the zeros).
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, size_label

    path, config, folder = Path(path), config_of(model), _folder(model)
    (arch, hyper, tensors), weights, nbytes = _described(_key(config)), parameters(config), 0
    try:
        with contextlib.closing(GGUFWriter(path, arch)) as writer:
            gguf_export.add_metadata(writer, hyper, "f16", folder.name if folder else name, folder)
            writer.add_size_label(size_label(weights, weights, 0, 0))
            writer.kv_data[0][f"{arch}.rope.dimension_count"].value = hyper["rope_dim"]
            if hyper["window"]:
                writer.add_sliding_window(hyper["window"])
            if ftype is not None:
                writer.kv_data[0]["general.file_type"].value = ftype
            if vocabulary:
                _add_vocabulary(writer, folder, config, hyper["vocab"])
            else:
                writer.add_tokenizer_model("no_vocab")
            for key, shape in tensors.items():
                kind = (types or {}).get(key, "F16" if len(shape) == 2 else "F32")
                number, block, width = llamacpp.GGML[kind]
                stored = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
                row, size = shape[-1] // block * width // stored.itemsize, prod(shape) // block * width
                writer.add_tensor_info(key, (*shape[:-1], row), stored, size, raw_dtype=GGMLQuantizationType(number))
                nbytes += _up(size)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        os.truncate(path, _up(path.stat().st_size) + nbytes)
    except OSError as err:
        raise QtutorError(f"'{path}' cannot be written ({err.strerror or err}): choose another folder.") from None
    return llamacpp.check_gguf(llamacpp.trust(path))


@dataclass(frozen=True)
class Size:
    """What a file of one type holds, in bytes; ``gib``: the weights, ``gb``: the file in 10^9 bytes, as model cards do.

    ``header_bytes``: metadata and vocabulary, exact for a folder that gguf_export takes, else with a placeholder
    vocabulary (a real one is a few hundred kB to a few MB long).  ``read_bytes``: what one generated token reads, i.e.
    everything but the input embedding, of which it reads one row.
    """

    type: str
    weights: int
    tensor_bytes: int
    header_bytes: int
    read_bytes: int
    types: dict  # bytes of each GGML type

    file_bytes = property(lambda self: self.header_bytes + self.tensor_bytes)
    gib = property(lambda self: self.tensor_bytes / GIB)
    gb = property(lambda self: self.file_bytes / GB)
    bits_per_weight = property(lambda self: 8 * self.tensor_bytes / self.weights)


def plan(model, type: str) -> tuple[llamacpp.Tensor, ...]:
    """The tensor table that llama.cpp's quantizer would write for ``model`` in ``type``, by its dry run on a stub."""
    return _plan(_key(model), llamacpp.file_type(type).name)


def size(model, type: str) -> Size:
    """The size of ``model`` in a type of ``llamacpp.TYPES``, to the byte, without making the file."""
    tensors = plan(model, type)
    kinds = {kind: sum(t.nbytes for t in tensors if t.type == kind) for kind in sorted({t.type for t in tensors})}
    return Size(llamacpp.file_type(type).name, sum(prod(t.shape) for t in tensors), sum(_up(t.nbytes) for t in tensors),
                _header(_key(model), _folder(model)), _read(tensors), kinds)  # fmt: skip


def _read(tensors) -> int:
    tied = not any(t.name == "output.weight" for t in tensors)
    return sum(t.nbytes for t in tensors if tied or t.name != "token_embd.weight")


@contextlib.contextmanager
def _stub(model, types=None, vocabulary: bool = False):
    """A stub in a folder of its own; a vocabulary of a hundred thousand words would take longer than the plan."""
    with tempfile.TemporaryDirectory(prefix="qtutor-plan-", ignore_cleanup_errors=True) as folder:
        yield write_stub(Path(folder) / "stub.gguf", model, types, vocabulary=vocabulary)


def _key(model) -> str:
    return json.dumps(config_of(model), sort_keys=True, default=str)  # text, which a cache can compare


@functools.lru_cache(maxsize=1024)
def _plan(config: str, type: str) -> tuple[llamacpp.Tensor, ...]:
    with _stub(json.loads(config)) as stub:
        return tuple(llamacpp.plan(stub.path, type, imatrix=llamacpp.TYPES[type].needs_imatrix))


@functools.lru_cache(maxsize=64)
def _header(config: str, model_folder: Path | None) -> int:
    with _stub(model_folder or json.loads(config), vocabulary=True) as stub:
        return stub.data_offset


KV_STEP = 256  # llama.cpp rounds the cache of each sequence up to a multiple of this


def kv_bytes_per_token(model, kv_type: str = "F16", cached: float = 0) -> float:
    """Bytes of keys and values of one token: 2 x layers x kv_heads x head_dim x bytes a value (34 / 32 in Q8_0).

    Of a model with sliding windows: the mean over ``cached`` tokens, since some layers keep the last ones only.
    """
    (_, hyper, _), kind = _described(_key(model)), str(kv_type).upper()
    if kind not in llamacpp.KV_TYPES:
        raise QtutorError(f"There is no cache type {kv_type!r}: choose one of {', '.join(llamacpp.KV_TYPES)}.")
    block = llamacpp.GGML[kind]
    if hyper["head_dim"] % block.weights:
        raise QtutorError(f"Heads of {hyper['head_dim']} values cannot be cached in blocks of 32: use F16.")
    full, windowed, window = _attention(model)
    layers = full + windowed * min(1, window / cached if cached else 1)
    return 2 * layers * hyper["kv_heads"] * hyper["head_dim"] * block.nbytes / block.weights


def _attention(model) -> tuple[int, int, int]:
    """(layers that attend to all tokens, layers that attend to a window, tokens of the window)."""
    config = config_of(model)
    _, hyper, _ = _described(_key(model))
    every, layers, window = FAMILIES[config["model_type"]][1], hyper["layers"], hyper["window"]
    full = layers // every if window and config.get("sliding_window_pattern") != 1 else layers
    return full, layers - full, window


def _cells(context: int, users: int) -> int:
    """Tokens of cache that llama.cpp allocates for each user."""
    for name, value in (("context", context), ("users", users)):
        if not value >= 1 or value != int(value):
            raise QtutorError(f"{name}={value!r} must be a whole number of at least 1.")
    return _up(int(context), KV_STEP)


def kv_bytes(model, context: int, kv_type: str = "F16", users: int = 1) -> int:
    """Bytes of the KV cache for ``users`` sequences of ``context`` tokens each, as llama.cpp allocates it: for a window
    as its programs do (without --swa-full), the window and the 512 tokens at work."""
    cells, (full, windowed, window) = _cells(context, users), _attention(model)
    layer = kv_bytes_per_token(model, kv_type) / (full + windowed)
    return int(layer * (full * cells + windowed * min(cells, _up(window + 512, KV_STEP)))) * users


def buffer_bytes(model, type: str, context: int, kv_type: str = "F16", users: int = 1) -> int:
    """Bytes of llama.cpp's compute buffer: activations and logits of up to 512 tokens at work.  llama.cpp plans it for
    the stub without allocating (``no_alloc``), for this machine's processor; a GPU's plan differs by some percent."""
    return _buffer(_key(model), llamacpp.file_type(type).name, _cells(context, users), str(kv_type).upper(), users)


@functools.lru_cache(maxsize=512)
def _buffer(config: str, type: str, context: int, kv_type: str, users: int) -> int:
    lib, types = llamacpp.native(), {t.name: t.type for t in _plan(config, type)}
    with _stub(json.loads(config), types) as stub, contextlib.ExitStack() as after:
        params = lib.llama_model_default_params()
        params.no_alloc, params.load_mode, params.n_gpu_layers = True, lib.LLAMA_LOAD_MODE_NONE, 0
        llamacpp.log.clear()
        if loaded := lib.llama_model_load_from_file(os.fsencode(stub.path), params):
            after.callback(lib.llama_model_free, loaded)
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch, options.n_ubatch = context * users, users, 2048, 512
        options.flash_attn_type, options.op_offload = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, False
        options.type_k = options.type_v = llamacpp.GGML[kv_type].number
        options.swa_full = False  # as llama.cpp's programs
        if made := loaded and lib.llama_init_from_model(loaded, options):
            after.callback(lib.llama_free, made)
        sizes = re.findall(r"compute buffer size *= *([\d.]+) MiB", "".join(llamacpp.log))
        if not made or not sizes:
            raise QtutorError(f"llama.cpp cannot plan this context: {llamacpp.reason('no reason given')}.")
        return int(sum(map(float, sizes)) * MIB)


def step_bytes(model, type: str, cached: float, kv_type: str = "F16", users: int = 1) -> float:
    """Bytes that one step of generation reads: the weights once, and ``cached`` tokens of keys and values a user."""
    return _read(plan(model, type)) + users * cached * kv_bytes_per_token(model, kv_type, cached)


def ceiling(model, type: str, cached: float, gb_per_s: float, kv_type: str = "F16", users: int = 1) -> float:
    """Tokens/s of all users together that memory of ``gb_per_s`` (10^9 bytes) cannot exceed; arithmetic not counted."""
    return users * gb_per_s * GB / step_bytes(model, type, cached, kv_type, users)

@dataclass(frozen=True)
class Fit:
    """What a model needs on a device, in GiB, and what the device can give.

    ``weights_gib`` counts what lies on the device: llama.cpp leaves the input embedding, of which a token reads one
    row, in the computer's memory.  ``ceiling_tokens_per_s`` is for all users together, with every context full.
    """

    model: str
    type: str
    context: int
    kv_type: str
    users: int
    device: Device
    weights_gib: float
    kv_gib: float
    buffers_gib: float
    ceiling_tokens_per_s: float

    overhead_gib = 1.0  # what driver, CUDA context and libraries take, beside what llama.cpp accounts for
    total_gib = property(lambda self: self.weights_gib + self.kv_gib + self.buffers_gib + self.overhead_gib)
    free_gib = property(lambda self: self.device.memory_gib - self.total_gib)  # negative where it does not fit
    fits = property(lambda self: self.free_gib >= 0)


def fits(model, type: str, context: int | None = None, device="H100 SXM", kv_type: str = "F16", users: int = 1) -> Fit:
    """Does ``model`` run on one ``device``, for ``users`` with ``context`` tokens each, by default the model's own?"""
    device, context = device_of(device), context or _described(_key(model))[1]["ctx"]
    return Fit(
        model if isinstance(model, str) else "model", llamacpp.file_type(type).name, context, str(kv_type).upper(),
        users, device, _read(plan(model, type)) / GIB, kv_bytes(model, context, kv_type, users) / GIB,
        buffer_bytes(model, type, context, kv_type, users) / GIB,
        ceiling(model, type, context, device.gb_per_s, kv_type, users))  # fmt: skip


def largest_context(model, type: str, device, users: int = 1, kv_type: str = "F16") -> int:
    """The longest context for each user that fits, a multiple of 256 up to the model's own; 0 where none does."""
    steps = range(KV_STEP, _described(_key(model))[1]["ctx"] + KV_STEP, KV_STEP)
    too_long = bisect.bisect_left(steps, True, key=lambda n: not fits(model, type, n, device, kv_type, users).fits)
    return too_long * KV_STEP
