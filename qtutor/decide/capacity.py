"""How big, does it fit, how fast at best: a model's needs before anything is downloaded or rented.

Four numbers decide whether a model runs on a device, and how fast it can write:

- **weights**   the tensors of the GGUF file.  Not parameters times bits: mixtures give each tensor a type of its own,
  so we ask llama.cpp.  Its quantizer has a dry run, and a *sparse* file (a header, then a hole of the right length that
  takes no disk) is all that it wants to see: a 70B model is planned to the byte in no space and a fifth of a second.
- **KV cache**  keys and values of every token so far: 2 x layers x kv_heads x head_dim values a token, in F16 two bytes
  each.  Grouped-query attention (few kv_heads) is what makes it small.
- **buffers**   activations and logits of the batch at work, plus what the driver takes for itself.
- **bandwidth** to write one token for every user the device reads all weights and caches once, so no program writes
  faster than bandwidth / bytes: the *ceiling*.

    capacity.size("Llama-2-70B", "Q6_K").gib                     # 52.7
    capacity.fits("Llama-2-70B", "Q6_K", 4096, "H100 SXM").fits  # True

Sources: llama.cpp's src/llama-quant.cpp (the mixtures) and src/llama-kv-cache.cpp.
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


def config_of(model) -> dict:
    """The configuration of a name in :data:`MODELS`, of a folder with a config.json, or such a dict itself."""
    if isinstance(model, dict):
        return model
    if model in MODELS:
        return MODELS[model]
    if (Path(model) / "config.json").is_file():
        return files.read_json(Path(model) / "config.json")
    raise QtutorError(f"There is no model {str(model)!r}: give a folder with a config.json, or one of "
                      f"{', '.join(MODELS)}.")  # fmt: skip


def _folder(model) -> Path | None:
    return Path(model).resolve() if not isinstance(model, dict) and model not in MODELS else None


def _hyper(model) -> dict:
    hyper = gguf_export.hyperparameters(config_of(model))
    if hyper["heads"] % hyper["kv_heads"] or hyper["layers"] > 512:  # llama.cpp would end the process
        raise QtutorError("This is not a usable Llama's configuration (heads or layers): check it.")
    return hyper


def _shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name -> shape (rows, columns), in the order in which a converter writes them."""
    hyper = _hyper(config)
    attention = ["self_attn." + name for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    mlp = ["mlp." + name for name in ("gate_proj", "up_proj", "down_proj")]
    stems = attention * bool(config.get("attention_bias")) + mlp * bool(config.get("mlp_bias"))
    biases = {f"model.layers.{layer}.{stem}.bias" for layer in range(hyper["layers"]) for stem in stems}
    extra = {"rope_freqs.weight": (hyper["head_dim"] // 2,)} if hyper["rope_type"] == "llama3" else {}
    return extra | {name: shape for name, (_, shape) in gguf_export.expected(hyper, biases).items()}


def parameters(model) -> int:
    """Number of weights, embeddings and norms included."""
    return sum(prod(shape) for name, shape in _shapes(config_of(model)).items() if name != "rope_freqs.weight")


def _up(n: int, step: int = 32) -> int:
    """``n`` rounded up to a multiple of ``step``; 32 is how GGUF aligns."""
    return -(-n // step) * step


def _add_vocabulary(writer, folder: Path | None, config: dict) -> None:
    """The folder's tokenizer, so that the header is as long as the real one; else words of Llama 2's form."""
    n = config["vocab_size"]
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
    hyper, weights, nbytes = _hyper(config), parameters(config), 0
    try:
        with contextlib.closing(GGUFWriter(path, "llama")) as writer:
            gguf_export.add_metadata(writer, hyper, "f16", folder.name if folder else name, folder)
            writer.add_size_label(size_label(weights, weights, 0, 0))
            if ftype is not None:
                writer.kv_data[0]["general.file_type"].value = ftype
            _add_vocabulary(writer, folder, config) if vocabulary else writer.add_tokenizer_model("no_vocab")
            for key, shape in _shapes(config).items():
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

    ``header_bytes``: metadata and vocabulary, exact for a model folder, of a placeholder vocabulary for a name (a real
    one is a few hundred kB to a few MB long).  ``read_bytes``: what one generated token reads, i.e. everything but the
    input embedding, of which it reads one row.
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
    tied = not any(t.name == "output.weight" for t in tensors)
    read = sum(t.nbytes for t in tensors if tied or t.name != "token_embd.weight")
    return Size(llamacpp.file_type(type).name, sum(prod(t.shape) for t in tensors),
                sum(_up(t.nbytes) for t in tensors), _header(_key(model), _folder(model)), read, kinds)  # fmt: skip


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


def kv_bytes_per_token(model, kv_type: str = "F16") -> float:
    """Bytes of keys and values of one token: 2 x layers x kv_heads x head_dim x bytes a value (34 / 32 in Q8_0)."""
    hyper, kind = _hyper(config_of(model)), str(kv_type).upper()
    if kind not in llamacpp.KV_TYPES:
        raise QtutorError(f"There is no cache type {kv_type!r}: choose one of {', '.join(llamacpp.KV_TYPES)}.")
    block = llamacpp.GGML[kind]
    if hyper["head_dim"] % block.weights:
        raise QtutorError(f"Heads of {hyper['head_dim']} values cannot be cached in blocks of 32: use F16.")
    return 2 * hyper["layers"] * hyper["kv_heads"] * hyper["head_dim"] * block.nbytes / block.weights


def _cells(context: int, users: int) -> int:
    """Tokens of cache that llama.cpp allocates for each user."""
    for name, value in (("context", context), ("users", users)):
        if not value >= 1 or value != int(value):
            raise QtutorError(f"{name}={value!r} must be a whole number of at least 1.")
    return _up(int(context), KV_STEP)


def kv_bytes(model, context: int, kv_type: str = "F16", users: int = 1) -> int:
    """Bytes of the KV cache for ``users`` sequences of ``context`` tokens each, as llama.cpp allocates it."""
    return int(kv_bytes_per_token(model, kv_type) * _cells(context, users) * users)


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
        if made := loaded and lib.llama_init_from_model(loaded, options):
            after.callback(lib.llama_free, made)
        sizes = re.findall(r"compute buffer size *= *([\d.]+) MiB", "".join(llamacpp.log))
        if not made or not sizes:
            raise QtutorError(f"llama.cpp cannot plan this context: {llamacpp.reason('no reason given')}.")
        return int(sum(map(float, sizes)) * MIB)


def step_bytes(model, type: str, cached: float, kv_type: str = "F16", users: int = 1) -> float:
    """Bytes that one step of generation reads: the weights once, and ``cached`` tokens of keys and values a user."""
    return size(model, type).read_bytes + users * cached * kv_bytes_per_token(model, kv_type)


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
    device, context = device_of(device), context or config_of(model)["max_position_embeddings"]
    return Fit(
        model if isinstance(model, str) else "model", llamacpp.file_type(type).name, context, str(kv_type).upper(),
        users, device, size(model, type).read_bytes / GIB, kv_bytes(model, context, kv_type, users) / GIB,
        buffer_bytes(model, type, context, kv_type, users) / GIB,
        ceiling(model, type, context, device.gb_per_s, kv_type, users))  # fmt: skip


def largest_context(model, type: str, device, users: int = 1, kv_type: str = "F16") -> int:
    """The longest context for each user that fits, a multiple of 256 up to the model's own; 0 where none does."""
    steps = range(KV_STEP, config_of(model)["max_position_embeddings"] + KV_STEP, KV_STEP)
    too_long = bisect.bisect_left(steps, True, key=lambda n: not fits(model, type, n, device, kv_type, users).fits)
    return too_long * KV_STEP
