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

import functools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

from . import QtutorError, llamacpp

GB, GIB, MIB = 10**9, 2**30, 2**20

# ---------------------------------------------------------------------------------------------------------- models


def _llama(hidden, ffn, layers, heads, kv_heads, vocab, ctx, theta=10000.0, eps=1e-5, tied=False, rope=None):
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
              "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
              "max_position_embeddings": ctx, "rope_theta": theta, "rms_norm_eps": eps,
              "tie_word_embeddings": tied}  # fmt: skip
    return config | ({"rope_scaling": rope} if rope else {})


_LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
_HUB = "https://huggingface.co/"

# The numbers of each model's config.json on the hub, and where that is.
MODELS: dict[str, dict] = {
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "Llama-2-13B": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "Llama-2-70B": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, 8192, 500000.0),
    "Llama-3-70B": _llama(8192, 28672, 80, 64, 8, 128256, 8192, 500000.0),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256, 131072, 500000.0, rope=_LLAMA31),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8, 128256, 131072, 500000.0, rope=_LLAMA31),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, 128256, 131072, 500000.0, tied=True,
                           rope=_LLAMA31 | {"factor": 32.0}),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, 128256, 131072, 500000.0, tied=True,
                           rope=_LLAMA31 | {"factor": 32.0}),
    "TinyLlama-1.1B": _llama(2048, 5632, 22, 32, 4, 32000, 2048),
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
        from .gguf_export import _read_json

        return _read_json(Path(model) / "config.json")
    raise QtutorError(f"There is no model {str(model)!r}: give a folder with a config.json, or one of "
                      f"{', '.join(MODELS)}.")  # fmt: skip


def _hyper(config: dict) -> dict:
    from .gguf_export import _hyperparameters

    hyper = _hyperparameters(config)
    sizes = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "ctx")
    bad = [key for key in sizes if hyper[key] < 1]
    if bad or hyper["heads"] % hyper["kv_heads"] or hyper["layers"] > 512:
        raise QtutorError(f"This is not a usable Llama's configuration ({bad[0] if bad else 'heads or layers'}): "
                          "check it.")  # fmt: skip
    return hyper


def shapes(model) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name -> shape (rows, columns), in the order in which a converter writes them."""
    from .gguf_export import _expected

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


def write_stub(path, model, types: dict[str, str] | None = None, name: str = "stub") -> llamacpp.Gguf:
    """Write a GGUF file with a complete header and a hole where the tensors would be; return what it declares.

    ``types`` maps tensor names to GGML types, by default what a converter writes (F16 matrices, F32 norms).  Where
    ``model`` is a folder with a tokenizer.json, the header holds that tokenizer, and is as long as the real one; else
    it holds placeholder words.  The hole takes no disk on file systems that know sparse files (ext4, tmpfs, APFS; NTFS
    stores the zeros).  Raises QtutorError where the file cannot be written.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, size_label

    from .gguf_export import _add_metadata, _add_tokenizer, _license_of, _read_json

    path, config = Path(path), config_of(model)
    hyper, wanted = _hyper(config), shapes(model)
    folder = Path(model) if isinstance(model, (str, os.PathLike)) and str(model) not in MODELS else None
    weights = parameters(model)
    try:
        writer = GGUFWriter(path, "llama")
        try:
            _add_metadata(writer, hyper, "f16", folder.resolve().name if folder else name, _license_of(folder))
            writer.add_size_label(size_label(weights, weights, 0, 0))
            if folder and (folder / "tokenizer.json").is_file():
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
    return _plan(*_key(model, type, imatrix))[0]


def size(model, type: str, imatrix: bool | None = None) -> Size:
    """The size of ``model`` in a llama.cpp type (a name in ``llamacpp.TYPES``), to the byte, without making the file.

    Raises QtutorError for an unknown model or type and for another architecture than Llama.
    """
    tensors, header = _plan(*_key(model, type, imatrix))
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


@functools.lru_cache(maxsize=512)
def _plan(key: str, stamp, type: str, imatrix: bool):
    model = json.loads(key) if stamp is None else key
    folder = tempfile.mkdtemp(prefix="qtutor-plan-")
    try:
        stub = write_stub(Path(folder) / "stub.gguf", model)
        return tuple(llamacpp.plan(stub.path, type, imatrix=imatrix)), stub.data_offset
    finally:
        shutil.rmtree(folder, ignore_errors=True)
