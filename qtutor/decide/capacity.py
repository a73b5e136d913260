"""How big, does it fit, how fast at best: a model's needs before anything is downloaded or rented.

Four numbers decide whether a model runs on a device, and how fast it can write:

- **weights**   the tensors of the GGUF file.  Not parameters times bits: mixtures give each tensor a type of its own,
  so we ask llama.cpp.  Its quantizer has a dry run, and a *sparse* file (a header, then a hole of the right length that
  takes no disk) is all that it wants to see: a 70B model is planned to the byte in no space and a fifth of a second.
- **KV cache**  keys and values of every token so far: 2 x layers x kv_heads x head_dim values a token, in F16 two bytes
  each.  Grouped-query attention (few kv_heads) is what makes it small.
- **buffers**   activations and logits of the batch at work, plus what the driver takes for itself.
- **bandwidth** to write one token the device reads all weights and the cache once, so no program writes faster than
  bandwidth / bytes: the *ceiling*.

    capacity.size("Llama-2-70B", "Q6_K").gib                     # 52.7
    capacity.fits("Llama-2-70B", "Q6_K", 4096, "H100 SXM").fits  # True

Sources: llama.cpp's src/llama-quant.cpp (the mixtures) and src/llama-kv-cache.cpp; each model and device in the tables
below names its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .. import QtutorError, energy, llamacpp

GB, GIB, MIB = 10**9, 2**30, 2**20

# ---------------------------------------------------------------------------------------------------------- models


def llama(hidden, intermediate, layers, heads, kv_heads, vocab, context, theta=10000.0, eps=1e-5, tied=False, rope=None):
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
              "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
              "max_position_embeddings": context, "rope_theta": theta, "rms_norm_eps": eps,
              "tie_word_embeddings": tied}  # fmt: skip
    return config | ({"rope_scaling": rope} if rope else {})


_LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
_HUB = "https://huggingface.co/"

# The numbers of each model's config.json on the hub, and where that is.
MODELS: dict[str, dict] = {
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "Llama-2-13B": llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "Llama-2-70B": llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256, 8192, 500000.0),
    "Llama-3-70B": llama(8192, 28672, 80, 64, 8, 128256, 8192, 500000.0),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256, 131072, 500000.0, rope=_LLAMA31),
    "Llama-3.1-70B": llama(8192, 28672, 80, 64, 8, 128256, 131072, 500000.0, rope=_LLAMA31),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, 131072, 500000.0, tied=True,
                           rope=_LLAMA31 | {"factor": 32.0}),
    "Llama-3.2-3B": llama(3072, 8192, 28, 24, 8, 128256, 131072, 500000.0, tied=True,
                           rope=_LLAMA31 | {"factor": 32.0}),
    "TinyLlama-1.1B": llama(2048, 5632, 22, 32, 4, 32000, 2048),
}  # fmt: skip
SOURCES = {
    "Llama-2-7B": _HUB + "meta-llama/Llama-2-7b-hf", "Llama-2-13B": _HUB + "meta-llama/Llama-2-13b-hf",
    "Llama-2-70B": _HUB + "meta-llama/Llama-2-70b-hf", "Llama-3-8B": _HUB + "meta-llama/Meta-Llama-3-8B",
    "Llama-3-70B": _HUB + "meta-llama/Meta-Llama-3-70B", "Llama-3.1-8B": _HUB + "meta-llama/Llama-3.1-8B",
    "Llama-3.1-70B": _HUB + "meta-llama/Llama-3.1-70B", "Llama-3.2-1B": _HUB + "meta-llama/Llama-3.2-1B",
    "Llama-3.2-3B": _HUB + "meta-llama/Llama-3.2-3B",
    "TinyLlama-1.1B": _HUB + "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}  # fmt: skip


def config_of(model) -> dict:
    """The configuration of ``model`` as a plain dict with Hugging Face's keys.

    ``model`` is a name in :data:`MODELS`, a folder with a config.json, a dict, or an object with ``to_dict()``
    (a transformers config) or ``config`` (a model).  Raises QtutorError for anything else.
    """
    model = getattr(model, "config", model)
    if hasattr(model, "to_dict"):
        return model.to_dict()
    if isinstance(model, dict):
        return model
    if isinstance(model, str) and model in MODELS:
        return MODELS[model]
    if isinstance(model, (str, os.PathLike)) and (Path(model) / "config.json").is_file():
        from ..gguf_export import _read_json

        return _read_json(Path(model) / "config.json")
    raise QtutorError(f"There is no model {str(model)!r}: give a folder with a config.json, or one of "
                      f"{', '.join(MODELS)}.")  # fmt: skip


def _hyper(config: dict) -> dict:
    from ..gguf_export import _hyperparameters

    hyper = _hyperparameters(config)
    sizes = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "ctx")
    bad = [key for key in sizes if hyper[key] < 1]
    if bad or hyper["heads"] % hyper["kv_heads"] or hyper["layers"] > 512:
        raise QtutorError(f"This is not a usable Llama's configuration ({bad[0] if bad else 'heads or layers'}): "
                          "check it.")  # fmt: skip
    return hyper


def shapes(model) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name -> shape (rows, columns), in the order in which a converter writes them."""
    from ..gguf_export import _expected

    hyper = _hyper(config_of(model))
    extra = {"rope_freqs.weight": (hyper["head_dim"] // 2,)} if hyper["rope_type"] == "llama3" else {}
    return extra | {name: shape for name, (_, shape) in _expected(hyper, set()).items()}


def parameters(model) -> int:
    """Number of weights, embeddings and norms included."""
    return sum(prod(shape) for name, shape in shapes(model).items() if name != "rope_freqs.weight")


# ------------------------------------------------------------------------------------------- the size of a file


def _add_placeholder_vocabulary(writer, n: int) -> None:
    """A SentencePiece vocabulary of Llama 2's form: three specials, 256 bytes, then made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = (tokens + [f"w{i}" for i in range(n - len(tokens))])[:n]
    types = [{0: 2, 1: 3, 2: 3}.get(i, 6 if i < 259 else 1) for i in range(n)]  # unknown, control, byte, normal
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(n)])
    writer.add_token_types(types)
    writer.add_bos_token_id(min(1, n - 1))
    writer.add_eos_token_id(min(2, n - 1))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def write_stub(path, model, types: dict[str, str] | None = None, name: str = "stub",
               vocabulary: bool = True, ftype: int | None = None) -> llamacpp.Gguf:
    """Write a GGUF file with a complete header and a hole where the tensors would be; return what it declares.

    ``types`` maps tensor names to GGML types, by default what a converter writes (F16 matrices, F32 norms).  Where
    ``model`` is a folder with a tokenizer.json, the header holds that tokenizer, and is as long as the real one; else
    it holds placeholder words, and with ``vocabulary=False`` none.  The hole takes no disk on file systems that know
    sparse files (ext4, tmpfs, APFS; NTFS stores the zeros).  Raises QtutorError where the file cannot be written.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, size_label

    from ..gguf_export import _add_metadata, _add_tokenizer, _license_of, _read_json

    path, config = Path(path), config_of(model)
    hyper, wanted = _hyper(config), shapes(model)
    folder = Path(model) if isinstance(model, (str, os.PathLike)) and str(model) not in MODELS else None
    weights = parameters(model)
    try:
        writer = GGUFWriter(path, "llama")
        try:
            _add_metadata(writer, hyper, "f16", folder.resolve().name if folder else name, _license_of(folder))
            writer.add_size_label(size_label(weights, weights, 0, 0))
            if ftype is not None:  # llama.cpp's number of the mixture, which its tools print
                writer.kv_data[0]["general.file_type"].value = ftype
            if not vocabulary:
                writer.add_tokenizer_model("no_vocab")
            elif folder and (folder / "tokenizer.json").is_file():
                _add_tokenizer(writer, _read_json(folder / "tokenizer.json"), config, hyper["vocab"])
            else:
                _add_placeholder_vocabulary(writer, hyper["vocab"])
            for key, shape in wanted.items():
                kind = (types or {}).get(key, "F16" if len(shape) == 2 else "F32")
                number = llamacpp._GGML_ID[kind]
                _, block, width = llamacpp.GGML_TYPES[number]
                if shape[-1] % block:
                    raise QtutorError(f"{key} has rows of {shape[-1]}, which blocks of {block} ({kind}) do not divide.")
                stored = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
                row = shape[-1] // block * width // np.dtype(stored).itemsize
                writer.add_tensor_info(key, (*shape[:-1], row), np.dtype(stored), prod(shape) // block * width,
                                       raw_dtype=GGMLQuantizationType(number))  # fmt: skip
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        tensors, start = _extents(path)
        end = start + tensors
        os.truncate(path, end)
    except OSError as err:
        raise QtutorError(f"'{path}' cannot be written ({err.strerror or err}): choose another folder.") from None
    return llamacpp.check_gguf(path)


def _extents(path: Path) -> tuple[int, int]:
    """(bytes of tensor data with padding, where it starts) of a file that is so far a header only."""
    with open(path, "rb") as file:
        _, _, rows, at = llamacpp._read_header(llamacpp._Reader(file.read()))
    total = 0
    for _, dims, kind, _ in rows:
        _, block, width = llamacpp.GGML_TYPES[kind]
        total += -(-(prod(dims) // block * width) // 32) * 32
    return total, -(-at // 32) * 32


@dataclass(frozen=True)
class Size:
    """What a file of one type holds, in bytes.

    ``tensor_bytes``: the weights as stored, to the byte.  ``header_bytes``: metadata and vocabulary, exact for a model
    folder, of a placeholder vocabulary for a name (a real one is a few hundred kB to a few MB long).
    ``read_bytes``: what one generated token reads, i.e. everything but the input embedding, of which it reads one row.
    ``types``: bytes of each GGML type.
    """

    type: str
    weights: int
    tensor_bytes: int
    header_bytes: int
    read_bytes: int
    types: dict

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + self.tensor_bytes

    @property
    def gib(self) -> float:
        """The weights in GiB (2^30 bytes)."""
        return self.tensor_bytes / GIB

    @property
    def gb(self) -> float:
        """The file in GB (10^9 bytes), as model cards give it."""
        return self.file_bytes / GB

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.weights


def plan(model, type: str, imatrix: bool | None = None) -> tuple[llamacpp.Tensor, ...]:
    """The tensor table that llama.cpp's quantizer would write for ``model`` in ``type``, by its dry run on a stub.

    ``imatrix``: whether there would be an importance matrix; by default only where the type needs one.
    """
    return _plan(*_key(model, type, imatrix))


def size(model, type: str, imatrix: bool | None = None) -> Size:
    """The size of ``model`` in a llama.cpp type (a name in ``llamacpp.TYPES``), to the byte, without making the file.

    Raises QtutorError for an unknown model or type and for another architecture than Llama.
    """
    tensors, header = _plan(*_key(model, type, imatrix)), _header(*_key(model, type, imatrix)[:2])
    kinds: dict[str, int] = {}
    for t in tensors:
        kinds[t.type] = kinds.get(t.type, 0) + t.nbytes
    padded = sum(-(-t.nbytes // 32) * 32 for t in tensors)
    tied = not any(t.name == "output.weight" for t in tensors)
    read = sum(t.nbytes for t in tensors if tied or t.name != "token_embd.weight")
    weights = sum(prod(t.shape) for t in tensors)
    return Size(llamacpp._type(type).name, weights, padded, header, read, dict(sorted(kinds.items())))


def _key(model, type, imatrix):
    """Hashable arguments for the cache: folders are kept as paths, because their tokenizer counts."""
    kind = llamacpp._type(type)
    wants = kind.needs_imatrix if imatrix is None else bool(imatrix)
    if isinstance(model, (str, os.PathLike)) and str(model) not in MODELS:
        config_of(model)  # one clear sentence where there is none
        folder = str(Path(model).resolve())
        stamp = tuple(os.stat(p).st_mtime_ns for n in ("config.json", "tokenizer.json")
                      if (p := os.path.join(folder, n)) and os.path.exists(p))  # fmt: skip
        return folder, stamp, kind.name, wants
    return json.dumps(config_of(model), sort_keys=True, default=str), None, kind.name, wants


@functools.lru_cache(maxsize=1024)
def _plan(key: str, stamp, type: str, imatrix: bool) -> tuple[llamacpp.Tensor, ...]:
    with _folder() as folder:  # without a vocabulary: a hundred thousand words would take longer than the plan
        stub = write_stub(folder / "stub.gguf", json.loads(key) if stamp is None else key, vocabulary=False)
        return tuple(llamacpp.plan(stub.path, type, imatrix=imatrix))


@functools.lru_cache(maxsize=64)
def _header(key: str, stamp) -> int:
    with _folder() as folder:
        return write_stub(folder / "stub.gguf", json.loads(key) if stamp is None else key).data_offset


@contextlib.contextmanager
def _folder():
    folder = tempfile.mkdtemp(prefix="qtutor-plan-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------- cache, buffers, bandwidth

# The types that llama.cpp takes for keys and values (--cache-type-k, --cache-type-v in common/arg.cpp).
KV_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
KV_STEP = 256  # llama.cpp rounds the cache of each sequence up to a multiple of this


def _kv_type(kv_type: str) -> tuple[int, int]:
    """(weights per block, bytes per block) of a cache type."""
    key = str(kv_type).upper()
    if key not in KV_TYPES:
        raise QtutorError(f"There is no cache type {kv_type!r}: choose one of {', '.join(KV_TYPES)}.")
    return llamacpp.GGML_TYPES[llamacpp._GGML_ID[key]][1:]


def _whole(value, name: str) -> int:
    try:
        good = not isinstance(value, bool) and int(value) == value and value >= 1
    except (TypeError, ValueError, OverflowError):  # a word, NaN, infinity
        good = False
    if not good:
        raise QtutorError(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)


def kv_bytes(model, context: int, kv_type: str = "F16", users: int = 1) -> int:
    """Bytes of the KV cache for ``users`` sequences of ``context`` tokens each, as llama.cpp allocates it.

    2 (keys, values) x layers x kv_heads x head_dim x bytes a value, for each token; contexts are rounded up to a
    multiple of 256.  Raises QtutorError for an unknown type, and where its blocks of 32 do not divide a head.
    """
    hyper = _hyper(config_of(model))
    block, width = _kv_type(kv_type)
    if hyper["head_dim"] % block:
        raise QtutorError(f"Heads of {hyper['head_dim']} values cannot be cached in blocks of {block}: use F16.")
    tokens = _whole(users, "users") * -(-_whole(context, "context") // KV_STEP) * KV_STEP
    return 2 * hyper["layers"] * hyper["kv_heads"] * hyper["head_dim"] // block * width * tokens


def buffer_bytes(model, type: str, context: int, kv_type: str = "F16", users: int = 1) -> int:
    """Bytes of llama.cpp's compute buffer: activations and logits of up to 512 tokens at work.

    llama.cpp itself plans it, for the stub, with memory allocation switched off (``no_alloc``, what its
    llama-fit-params uses); the plan is the one for this machine's processor, a GPU's differs by some percent.
    """
    _whole(users, "users"), _kv_type(kv_type)
    key, stamp, kind, _ = _key(model, type, None)
    per_user = -(-_whole(context, "context") // KV_STEP) * KV_STEP
    return _buffer(key, stamp, kind, per_user, str(kv_type).upper(), users)


@functools.lru_cache(maxsize=512)
def _buffer(key: str, stamp, type: str, context: int, kv_type: str, users: int) -> int:
    model = json.loads(key) if stamp is None else key
    types = {t.name: t.type for t in plan(model, type)}
    lib, loaded, made = llamacpp._native(), None, None
    with _folder() as folder:
        stub = write_stub(folder / "stub.gguf", model, types, vocabulary=False)
        try:
            params = lib.llama_model_default_params()
            params.no_alloc, params.load_mode, params.n_gpu_layers = True, lib.LLAMA_LOAD_MODE_NONE, 0
            llamacpp._log.clear()
            loaded = lib.llama_model_load_from_file(os.fsencode(stub.path), params)
            options = lib.llama_context_default_params()
            options.n_ctx, options.n_seq_max = context * users, users
            options.n_batch, options.n_ubatch = 2048, 512
            options.op_offload = False
            options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            options.type_k = options.type_v = llamacpp._GGML_ID[kv_type]
            made = lib.llama_init_from_model(loaded, options) if loaded else None
            sizes = re.findall(r"compute buffer size *= *([\d.]+) MiB", "".join(llamacpp._log))
            if not made or not sizes:
                raise QtutorError(f"llama.cpp cannot plan this context: {llamacpp._reason('no reason given')}.")
            return int(sum(map(float, sizes)) * MIB)
        finally:
            if made:
                lib.llama_free(made)
            if loaded:
                lib.llama_model_free(loaded)


def step_bytes(model, type: str, cached: float, kv_type: str = "F16", users: int = 1) -> float:
    """Bytes that one step of generation reads: the weights once, and ``cached`` tokens of keys and values a user."""
    hyper = _hyper(config_of(model))
    block, width = _kv_type(kv_type)
    token = 2 * hyper["layers"] * hyper["kv_heads"] * hyper["head_dim"] / block * width
    return size(model, type).read_bytes + users * cached * token


def ceiling(model, type: str, cached: float, gb_per_s: float, kv_type: str = "F16", users: int = 1) -> float:
    """Tokens/s, of all users together, that memory of ``gb_per_s`` (10^9 bytes) cannot exceed: one step writes one
    token for every user and reads :func:`step_bytes`.  Arithmetic is not counted, so many users never get there."""
    if not gb_per_s > 0:
        raise QtutorError(f"gb_per_s={gb_per_s!r} is no memory bandwidth: give GB/s, such as 3350 for an H100.")
    return users * gb_per_s * GB / step_bytes(model, type, cached, kv_type, _whole(users, "users"))


# ----------------------------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class Gpu:
    """A device: ``memory_mib`` as its driver reports it, ``gb_per_s`` and ``watts`` as its maker states them.

    ``usd_per_hour`` is an example of a price and of a date, for you to replace: prices differ several-fold between
    providers and change monthly.  None: nobody rents it by the hour.
    """

    name: str
    memory_mib: int
    gb_per_s: float
    watts: int
    source: str
    usd_per_hour: float | None = None
    price_source: str = ""
    price_date: str = ""

    @property
    def memory_gib(self) -> float:
        return self.memory_mib / 1024


_NV, _GEFORCE = "https://www.nvidia.com/en-us/data-center/", "https://www.nvidia.com/en-us/geforce/graphics-cards/"
_MAC = "https://www.apple.com/mac-studio/specs/"
_RUNPOD, _SURVEY = "https://www.runpod.io/pricing", "https://deploybase.ai/articles/runpod-gpu-pricing"


def _price(name: str) -> tuple[float, str, str]:
    """USD an hour, source and date of a machine that :data:`energy.PRICES` lists: one price a machine in the course."""
    price = energy.price(name)
    return price.usd_per_hour, price.source, price.date


# Memory in MiB as nvidia-smi shows it with ECC as shipped; of a Mac, the three quarters of its memory that macOS lets
# the GPU use by default.  Bandwidth and power from the maker's page.  Prices: those of energy.PRICES where it has the
# machine; else one provider's on-demand list, and for consumer cards the lowest of a survey; examples, not advice.
# The watts of a Mac are the most that the whole machine takes from the wall (https://support.apple.com/en-us/102027).
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100 SXM", 81559, 3350, 700, _NV + "h100/", *_price("H100")),
        Gpu("H100 PCIe", 81559, 2000, 350, _NV + "h100/", *_price("H100 PCIe")),
        Gpu("H100 NVL", 95830, 3900, 400, _NV + "h100/", 3.19, _RUNPOD, "2026-11-09"),
        Gpu("H200", 143771, 4800, 700, _NV + "h200/", *_price("H200")),
        Gpu("B200", 183359, 8000, 1000, _NV + "hgx/", 6.79, _RUNPOD, "2026-10-07"),
        Gpu("A100 80 GB SXM", 81920, 2039, 400, _NV + "a100/", *_price("A100")),
        Gpu("A100 80 GB PCIe", 81920, 1935, 300, _NV + "a100/", 1.79, _RUNPOD, "2026-11-09"),
        Gpu("A100 40 GB", 40960, 1555, 400, _NV + "a100/"),
        Gpu("L40S", 46068, 864, 350, _NV + "l40s/", *_price("L40S")),
        Gpu("L4", 23034, 300, 72, _NV + "l4/", *_price("L4")),
        Gpu("A10", 23028, 600, 150, _NV + "products/a10-gpu/"),
        Gpu("RTX PRO 6000", 97887, 1792, 600, "https://www.nvidia.com/en-us/products/workstations/"
            "professional-desktop-gpus/rtx-pro-6000/", 0.89, _SURVEY, "2026-03-10"),
        Gpu("RTX 5090", 32607, 1792, 575, _GEFORCE + "50-series/rtx-5090/", 0.69, _SURVEY, "2026-03-10"),
        Gpu("RTX 4090", 24564, 1008, 450, _GEFORCE + "40-series/rtx-4090/", 0.34, _SURVEY, "2026-03-10"),
        Gpu("RTX 3090", 24576, 936, 350, _GEFORCE + "30-series/rtx-3090-3090ti/", 0.22, _SURVEY, "2026-03-10"),
        Gpu("Mac Studio M4 Max 128 GB", 98304, 546, 145, _MAC),
        Gpu("Mac Studio M3 Ultra 256 GB", 196608, 819, 270, _MAC),
    )
}  # fmt: skip

# What the driver, the CUDA context, kernels and library workspaces take, beside what llama.cpp accounts for.
OVERHEAD_GIB = 1.0


def gpu_of(gpu) -> Gpu:
    """A :class:`Gpu`, from itself or a name in :data:`GPUS`; raises QtutorError for another."""
    if isinstance(gpu, Gpu):
        return gpu
    if gpu not in GPUS:
        raise QtutorError(f"There is no GPU {gpu!r}: make a capacity.Gpu, or choose one of {', '.join(GPUS)}.")
    return GPUS[gpu]


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
    gpu: Gpu
    weights_gib: float
    kv_gib: float
    buffers_gib: float
    overhead_gib: float
    ceiling_tokens_per_s: float

    @property
    def total_gib(self) -> float:
        return self.weights_gib + self.kv_gib + self.buffers_gib + self.overhead_gib

    @property
    def free_gib(self) -> float:
        """What is left; negative where it does not fit."""
        return self.gpu.memory_gib - self.total_gib

    @property
    def fits(self) -> bool:
        return self.free_gib >= 0


def fits(model, type: str, context: int | None = None, gpu="H100 SXM", kv_type: str = "F16", users: int = 1,
         overhead_gib: float = OVERHEAD_GIB) -> Fit:
    """Does ``model`` in ``type`` run on one ``gpu``, for ``users`` with ``context`` tokens each?  See :class:`Fit`.

    ``context`` is the model's own by default.  ``gpu`` is a name in :data:`GPUS` or a :class:`Gpu`.
    """
    gpu = gpu_of(gpu)
    own = _hyper(config_of(model))["ctx"]
    context = _whole(context or own, "context")
    kv = kv_bytes(model, context, kv_type, users)
    return Fit(
        model if isinstance(model, str) else "model", llamacpp._type(type).name, context, str(kv_type).upper(), users,
        gpu, size(model, type).read_bytes / GIB, kv / GIB, buffer_bytes(model, type, context, kv_type, users) / GIB,
        overhead_gib, ceiling(model, type, context, gpu.gb_per_s, kv_type, users))  # fmt: skip


def largest_type(model, context: int, gpu, types=None, **options) -> str | None:
    """The type with most bits per weight that fits, or None; ``options`` as for :func:`fits`."""
    names = types or [t for t in llamacpp.TYPES if t not in ("F32", "MXFP4", "NVFP4", "Q2_0", "Q1_0")]
    room = gpu_of(gpu).memory_gib
    small = [t for t in names if size(model, t).read_bytes / GIB < room]
    by_size = sorted(small, key=lambda t: -size(model, t).tensor_bytes)
    return next((t for t in by_size if fits(model, t, context, gpu, **options).fits), None)


def largest_context(model, type: str, gpu, users: int = 1, kv_type: str = "F16", **options) -> int:
    """The longest context for each user that fits, a multiple of 256 up to the model's own; 0 where none does."""
    low, high = 0, -(-_hyper(config_of(model))["ctx"] // KV_STEP)
    while low < high:  # the need grows with the context: halve the interval
        middle = (low + high + 1) // 2
        enough = fits(model, type, middle * KV_STEP, gpu, kv_type, users, **options).fits
        low, high = (middle, high) if enough else (low, middle - 1)
    return low * KV_STEP
