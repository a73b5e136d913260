"""llama.cpp from Python: quantize, importance matrix, logits, generation, speed.

llama.cpp quantizes weights after training (PTQ) into *blocks*: 32 or 256 neighbouring weights of a row share
a scale (and, in the K types, the scales share a scale of their own).  Three families matter here:

- ``Q4_0``, ``Q8_0`` ...     one float16 scale a block of 32, round to nearest: simple and fast
- ``Q4_K``, ``Q6_K`` ...     super-blocks of 256 with quantized scales; ``_S``/``_M``/``_L`` are *mixtures* that
  spend more bits on the tensors that hurt most (attention v, ffn down, the output matrix)
- ``IQ2_XS``, ``IQ4_XS`` ... codebooks; the lowest need an *importance matrix*: the mean squared activation
  that meets each weight column, so that rounding error goes where the model does not look

Everything goes through ``llama_cpp.llama_cpp``, the ctypes mirror of ``llama.h`` in llama-cpp-python, because
that is the C API that every other tool uses too.  C code does not raise exceptions: where it meets a file it
does not expect it may abort, and take a notebook's kernel along.  So every function here first runs
:func:`check_gguf`, a complete reader of the GGUF format in Python, and native code only sees sound files.

    gguf_export.export("data/model", "model-f32.gguf")
    llamacpp.quantize("model-f32.gguf", "model-q4.gguf", "Q4_K_M")
    with llamacpp.Model("model-q4.gguf", ctx=512) as model:
        logits = model.logits(tokens)               # float32, (n, vocab)

References: llama.h, src/llama-quant.cpp, tools/quantize and tools/imatrix in llama.cpp; the GGUF
specification at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import numpy as np

from . import QtutorError

# ---------------------------------------------------------------------------------------------------- tables

# GGML tensor types: id -> (name, weights per block, bytes per block).  From ggml-common.h.
GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip
_GGML_ID = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class QuantType:
    """One llama.cpp file type: a recipe that gives each tensor a GGML type.

    ``base`` is the GGML type of most matrices and ``bpw`` its bits per weight, scales included; the file of a
    mixture comes out higher (:func:`bits_per_weight` measures it).  ``needs_imatrix``: without an importance
    matrix llama.cpp refuses, because the result would be noise.
    """

    name: str
    ftype: int
    base: str
    needs_imatrix: bool = False
    overrides: tuple = ()

    @property
    def bpw(self) -> float:
        _, block, size = GGML_TYPES[_GGML_ID[self.base]]
        return 8 * size / block


_BLOCKS = "blk\\..*\\.weight$"  # every matrix inside the layers, not the embedding

TYPES: dict[str, QuantType] = {
    t.name: t
    for t in (
        QuantType("F32", 0, "F32"),
        QuantType("F16", 1, "F16"),
        QuantType("BF16", 32, "BF16"),
        QuantType("Q8_0", 7, "Q8_0"),
        QuantType("Q6_K", 18, "Q6_K"),
        QuantType("Q5_1", 9, "Q5_1"),
        QuantType("Q5_0", 8, "Q5_0"),
        QuantType("Q5_K_M", 17, "Q5_K"),
        QuantType("Q5_K_S", 16, "Q5_K"),
        QuantType("Q4_1", 3, "Q4_1"),
        QuantType("Q4_0", 2, "Q4_0"),
        QuantType("Q4_K_M", 15, "Q4_K"),
        QuantType("Q4_K_S", 14, "Q4_K"),
        QuantType("IQ4_NL", 25, "IQ4_NL"),
        QuantType("IQ4_XS", 30, "IQ4_XS"),
        QuantType("Q3_K_L", 13, "Q3_K"),
        QuantType("Q3_K_M", 12, "Q3_K"),
        QuantType("Q3_K_S", 11, "Q3_K"),
        QuantType("IQ3_M", 27, "IQ3_S"),
        QuantType("IQ3_S", 26, "IQ3_S"),
        QuantType("IQ3_XS", 22, "IQ3_S", True),
        QuantType("IQ3_XXS", 23, "IQ3_XXS", True),
        QuantType("Q2_K", 10, "Q2_K"),
        QuantType("Q2_K_S", 21, "Q2_K", True),
        QuantType("IQ2_M", 29, "IQ2_S", True),
        QuantType("IQ2_S", 28, "IQ2_XS", True),
        QuantType("IQ2_XS", 20, "IQ2_XS", True),
        QuantType("IQ2_XXS", 19, "IQ2_XXS", True),
        QuantType("IQ1_M", 31, "IQ1_M", True),
        QuantType("IQ1_S", 24, "IQ1_S", True),
        QuantType("TQ2_0", 37, "TQ2_0"),
        QuantType("TQ1_0", 36, "TQ1_0"),
        QuantType("Q2_0", 41, "Q2_0"),
        QuantType("Q1_0", 40, "Q1_0"),
        # llama.cpp's own MXFP4 file type is for mixtures of experts and turns a dense model into Q8_0;
        # naming the tensors gets the block formats of notebook 01 into a file all the same
        QuantType("MXFP4", 38, "MXFP4", overrides=((_BLOCKS, "MXFP4"),)),
        QuantType("NVFP4", 38, "NVFP4", overrides=((_BLOCKS, "NVFP4"),)),
    )
}
_ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}


def _type(name: str) -> QuantType:
    key = str(name).upper()
    key = _ALIASES.get(key, key)
    if key not in TYPES:
        raise QtutorError(f"There is no quantization type {name!r}: choose one of {', '.join(TYPES)}.")
    return TYPES[key]


# -------------------------------------------------------------------------------------- reading GGUF safely


@dataclass(frozen=True)
class Tensor:
    """A row of the tensor table.  ``shape`` is row-major as in numpy: (rows, columns); ``nbytes`` as stored."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Gguf:
    """What :func:`check_gguf` read: metadata (key -> value) and the tensor table."""

    path: Path
    metadata: dict
    tensors: tuple[Tensor, ...]
    data_offset: int
    file_bytes: int

    @property
    def n_weights(self) -> int:
        return sum(prod(t.shape) for t in self.tensors)


class _Damaged(Exception):
    """What is wrong with the file, as the end of a sentence that begins with its name."""


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Reader:
    """A cursor over the bytes of a GGUF file that never reads past the end."""

    def __init__(self, data):
        self.data, self.at, self.end = data, 0, len(data)

    def take(self, n: int) -> bytes:
        if n < 0 or n > self.end - self.at:
            raise _Damaged("ends too early")
        self.at += n
        return self.data[self.at - n : self.at]

    def scalar(self, code: str):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("has text that is not UTF-8") from None

    def value(self, kind: int):
        if kind in _SCALARS:
            raw = self.scalar(_SCALARS[kind])
            return raw
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _Damaged(f"has a value of unknown type {kind}")
        inner, n = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize("<" + code))))
        if inner != _STRING or n > (self.end - self.at) // 8:
            raise _Damaged(f"has a list of {n} values of type {inner}")
        return [self.string() for _ in range(n)]


def _read_header(read: _Reader) -> tuple[dict, dict, list, int]:
    """Metadata, metadata types, raw tensor rows and the start of the data section."""
    if read.take(4) != b"GGUF":
        raise _Damaged("does not begin with the letters GGUF")
    version = read.scalar("I")
    if version & 0xFFFF == 0:
        raise _Damaged("is big-endian")
    if version not in (2, 3):
        raise _Damaged(f"has GGUF version {version}, not 2 or 3")
    n_tensors, n_kv = read.scalar("Q"), read.scalar("Q")
    if n_tensors > read.end // 24 or n_kv > read.end // 12:  # the least that a row can take
        raise _Damaged("claims more entries than it has bytes")
    metadata, kinds = {}, {}
    for _ in range(n_kv):
        key = read.string()
        if not key or "\0" in key or key in metadata:  # C ends a text at a zero byte, and aborts on an empty key
            raise _Damaged(f"has an empty, cut or repeated key {key[:64]!r}")
        kinds[key] = read.scalar("I")
        start = read.at
        metadata[key] = read.value(kinds[key])
        if kinds[key] == _ARRAY:
            kinds[key] = (_ARRAY, struct.unpack("<I", read.data[start : start + 4])[0])
    rows = []
    for _ in range(n_tensors):
        name, n_dims = read.string(), read.scalar("I")
        if n_dims > 4 or not 0 < len(name.encode()) < 64 or "\0" in name:
            raise _Damaged(f"has a tensor {name[:64]!r} with a bad name or {n_dims} dimensions")
        dims = struct.unpack(f"<{n_dims}Q", read.take(8 * n_dims))
        rows.append((name, dims, read.scalar("I"), read.scalar("Q")))
    return metadata, kinds, rows, read.at


def _tensor_table(rows: list, metadata: dict, kinds: dict, at: int, size: int) -> tuple[tuple[Tensor, ...], int]:
    """Types, sizes and offsets of the tensors against each other and against the file's length."""
    align = metadata.get("general.alignment", 32)
    if kinds.get("general.alignment", 4) != 4 or align < 1 or align & (align - 1):
        raise _Damaged(f"has alignment {align!r}, which is not a power of two")
    start, expected, tensors, seen = -(-at // align) * align, 0, [], set()
    for name, dims, kind, offset in rows:
        if kind not in GGML_TYPES:
            raise _Damaged(f"stores {name} in an unknown type {kind}")
        label, block, width = GGML_TYPES[kind]
        if not dims or min(dims) < 1 or prod(dims) > 2**60:
            raise _Damaged(f"gives {name} the shape {dims}")
        if dims[0] % block:
            raise _Damaged(f"stores {name} as {label}, whose blocks of {block} do not divide {dims[0]} columns")
        if name in seen or offset != expected:
            raise _Damaged(f"repeats {name} or misplaces its data")
        nbytes = prod(dims) // block * width
        if start + offset + nbytes > size:
            raise _Damaged(f"ends before the data of {name}: it is truncated")
        seen.add(name)
        tensors.append(Tensor(name, label, tuple(reversed(dims)), start + offset, nbytes))
        expected = offset + -(-nbytes // align) * align
    if rows and start + expected > size + align - 1:
        raise _Damaged("is truncated")
    return tuple(tensors), start


def _is_dense_llama(meta: dict) -> bool:
    return meta.get("general.architecture") == "llama" and not meta.get("llama.expert_count")


def _check_llama(meta: dict, kinds: dict, tensors: tuple[Tensor, ...]) -> None:
    """Hyper-parameters against the tensors: what llama.cpp only asserts, and would abort on."""

    def number(key: str, default=None):
        value = meta.get("llama." + key, default)
        if value is None or isinstance(value, (str, bool, list)) or value <= 0 or not isfinite(value):
            raise _Damaged(f"has no usable llama.{key}")
        return value

    layers, hidden, heads = number("block_count"), number("embedding_length"), number("attention.head_count")
    kv_heads = number("attention.head_count_kv", heads)
    head_dim = number("attention.key_length", hidden // heads if heads <= hidden else None)
    ffn, eps = number("feed_forward_length"), number("attention.layer_norm_rms_epsilon")
    number("context_length"), number("rope.freq_base", 10000.0)
    if layers > 512 or heads % kv_heads or head_dim % 2 or eps > 1:
        raise _Damaged("has hyper-parameters that do not fit together")
    same = ("attention.value_length", "rope.dimension_count")
    if any(number(key, head_dim) != head_dim for key in same):
        raise _Damaged("has hyper-parameters that do not fit together")
    if meta.get("llama.rope.scaling.type", "none") not in ("none", "linear", "yarn", "longrope"):
        raise _Damaged("has an unknown RoPE scaling")
    shapes = {t.name: t.shape for t in tensors}
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise _Damaged("has no token embedding")
    vocab, q, kv = shapes["token_embd.weight"][0], heads * head_dim, kv_heads * head_dim
    wanted = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if "output.weight" in shapes:
        wanted["output.weight"] = (vocab, hidden)
    if "rope_freqs.weight" in shapes:
        wanted["rope_freqs.weight"] = (head_dim // 2,)
    for i in range(layers):
        block = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden),
                 "attn_v": (kv, hidden), "attn_output": (hidden, q), "ffn_gate": (ffn, hidden),
                 "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}  # fmt: skip
        for name, shape in block.items():
            wanted[f"blk.{i}.{name}.weight"] = shape
            if f"blk.{i}.{name}.bias" in shapes:
                wanted[f"blk.{i}.{name}.bias"] = shape[:1]
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise _Damaged(f"should hold {name} of shape {shape} and has {shapes.get(name)}")
    if set(shapes) - set(wanted):
        raise _Damaged(f"holds an unexpected tensor {sorted(set(shapes) - set(wanted))[0]!r}")
    small = [t.name for t in tensors if len(t.shape) == 1 and t.type != "F32"]
    if small:
        raise _Damaged(f"stores {small[0]} as something else than F32")
    if kinds.get("tokenizer.ggml.tokens") and len(meta["tokenizer.ggml.tokens"]) != vocab:
        raise _Damaged("has a vocabulary that does not match its embedding")
    if meta.get("llama.vocab_size", vocab) != vocab:
        raise _Damaged("has a vocabulary that does not match its embedding")


def _check_tokenizer(meta: dict, kinds: dict) -> None:
    model = meta.get("tokenizer.ggml.model")
    if model in ("no_vocab", "none"):
        return
    tokens = meta.get("tokenizer.ggml.tokens")
    if not isinstance(model, str) or kinds.get("tokenizer.ggml.tokens") != (_ARRAY, _STRING) or not tokens:
        raise _Damaged("has no vocabulary")
    # as llama.cpp reads them: C ends a text at a zero byte
    filled = [text.partition("\0")[0] or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    if len(set(filled)) != len(tokens):
        raise _Damaged("has the same token twice")
    types = meta.get("tokenizer.ggml.token_type")
    if types is not None and (kinds["tokenizer.ggml.token_type"] != (_ARRAY, 5) or len(types) != len(tokens)):
        raise _Damaged("has token types that do not match its tokens")
    if model == "gpt2" and kinds.get("tokenizer.ggml.merges") != (_ARRAY, _STRING):
        raise _Damaged("has no merges")
    for name in ("bos", "eos"):
        token = meta.get(f"tokenizer.ggml.{name}_token_id")
        added = meta.get(f"tokenizer.ggml.add_{name}_token", False)
        if token is None and not added:
            continue
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(tokens):
            raise _Damaged(f"has no usable {name} token")


def check_gguf(path) -> Gguf:
    """Read and validate the whole structure of a GGUF file in Python, before native code opens it.

    Checked: magic, endianness, version, every key and value, every tensor's type, shape, block divisibility,
    offset and extent against the file's length; for the Llama architecture also that the hyper-parameters
    agree with the shapes and that the vocabulary is sound, since llama.cpp asserts those (and an assertion
    ends the process).  The tensors' *values* are not read: a flipped bit inside a weight is a slightly
    different model, not a broken file.  Raises QtutorError with one sentence.
    """
    path = Path(path)
    if path.is_dir():
        raise QtutorError(f"'{path}' is a folder: give the path of a .gguf file.")
    try:
        size = path.stat().st_size
        if size == 0:
            raise QtutorError(f"{path.name} is empty: export or copy the model again.")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            meta, kinds, rows, at = _read_header(_Reader(data))
        tensors, start = _tensor_table(rows, meta, kinds, at, size)
        arch = meta.get("general.architecture")
        if not isinstance(arch, str):
            raise _Damaged("does not name its architecture")
        if meta.get("split.count", 1) not in (0, 1):
            raise QtutorError(f"{path.name} is one part of a split model: join it with llama-gguf-split --merge.")
        if _is_dense_llama(meta):
            _check_llama(meta, kinds, tensors)
        if arch != "imatrix" and "tokenizer.ggml.model" in meta:
            _check_tokenizer(meta, kinds)
    except FileNotFoundError:
        raise QtutorError(f"There is no file '{path}': export or quantize the model first.") from None
    except OSError as err:
        raise QtutorError(f"'{path}' cannot be read: {err.strerror or err}.") from None
    except _Damaged as err:
        raise QtutorError(
            f"{path.name} is not a sound GGUF file: it {err}; export, quantize or copy it again."
        ) from None
    return Gguf(path, meta, tensors, start, size)


def tensor_table(path) -> list[dict]:
    """One row a tensor: ``name``, ``type``, ``shape`` (rows, columns), ``weights``, ``bytes``."""
    return [
        {"name": t.name, "type": t.type, "shape": t.shape, "weights": prod(t.shape), "bytes": t.nbytes}
        for t in check_gguf(path).tensors
    ]


def bits_per_weight(path) -> float:
    """Stored bits per weight over all tensors (norms included), as llama.cpp reports it: BPW."""
    gguf = check_gguf(path)
    return 8 * sum(t.nbytes for t in gguf.tensors) / gguf.n_weights


# -------------------------------------------------------------------------------------- the native library

_log: deque[str] = deque(maxlen=20_000)  # what llama.cpp said since the last call, for error messages
_keep_alive: list = []  # a ctypes callback that Python collects would crash the process


def _native():
    """Import llama_cpp's ctypes bindings once, send its log to :data:`_log`, start the backend."""
    if _keep_alive:
        return _keep_alive[0]
    # OpenMP threads that wait by spinning keep the core from whoever has work to do: on two busy cores that
    # made llama.cpp five times slower.  libgomp reads this when it is loaded; the reader's own value wins.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        import llama_cpp.llama_cpp as lib
    except Exception as err:  # a broken build raises OSError, RuntimeError or FileNotFoundError
        raise QtutorError(
            f"llama-cpp-python does not load here ({type(err).__name__}): install it with a C++ compiler, "
            "pip install llama-cpp-python."
        ) from None

    @lib.llama_log_callback
    def collect(level, text, user_data):
        _log.append(text.decode("utf-8", "replace"))

    lib.llama_log_set(collect, ctypes.c_void_p(0))
    lib.llama_backend_init()
    _keep_alive.extend((lib, collect))
    return lib


def _reason(default: str) -> str:
    """The last error that llama.cpp logged, tidied into the middle of a sentence."""
    lines = [line.strip() for line in "".join(_log).split("\n") if line.strip()]
    marks = ("error loading model:", "failed to quantize:")
    for line in reversed(lines):
        for mark in marks:
            if mark in line:
                return line.split(mark)[1].strip().rstrip(".")
    errors = [line for line in lines if re.search(r"error|fail|invalid|unknown|missing", line, re.I)]
    return errors[-1].rstrip(".") if errors else default


def available() -> tuple[bool, str]:
    """``(True, version)`` where llama-cpp-python loads here, else ``(False, why in one sentence)``."""
    try:
        _native()
        from importlib.metadata import version

        return True, f"llama-cpp-python {version('llama-cpp-python')}"
    except Exception as err:
        return False, str(err)


def tool(name: str) -> Path:
    """Path of one of llama.cpp's programs, e.g. ``llama-quantize``, ``llama-perplexity``, ``llama-imatrix``.

    They are compiled together with llama-cpp-python when CMAKE_ARGS asks for tools, and land in
    site-packages/bin.  Raises QtutorError where there is none.
    """
    suffix = ".exe" if sys.platform == "win32" else ""
    try:
        from importlib.util import find_spec

        spec = find_spec("llama_cpp")
        beside = Path(spec.origin).parent.parent / "bin" / (name + suffix) if spec and spec.origin else None
    except (ImportError, ValueError):
        beside = None
    if beside and beside.is_file():
        return beside
    if found := shutil.which(name):
        return Path(found)
    raise QtutorError(
        f"{name} is not installed: reinstall llama-cpp-python with "
        "CMAKE_ARGS='-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_TOOLS_INSTALL=ON'."
    )


def n_threads() -> int:
    """Physical cores that this process may use (at most ``OMP_NUM_THREADS``): more would slow llama.cpp down."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a container's share of the machine, in microseconds of each period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    limit = os.environ.get("OMP_NUM_THREADS", "")  # whoever runs several programs side by side says so with this
    if limit.isdigit() and int(limit):
        allowed = min(allowed, int(limit))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


_PROBE = """
import sys, llama_cpp.llama_cpp as lib
params = lib.llama_model_default_params()
params.n_gpu_layers = 0
model = lib.llama_model_load_from_file(sys.argv[1].encode("utf-8", "surrogateescape"), params)
context = lib.llama_context_default_params()
context.n_ctx = context.n_batch = 32
sys.exit(0 if model and lib.llama_init_from_model(model, context) else 42)
"""
_REFUSED = 42  # llama.cpp said no; anything else: it ended the process (abort() gives 3 on Windows)
_probed: set = set()


def _probe(gguf: Gguf, gpu_build: bool = False) -> None:
    """Load a model in a child process first: one whose architecture :func:`check_gguf` does not know, and the first
    one that a build for a GPU is to load (seen to end the process, with a second libstdc++ linked into it).

    Where llama.cpp aborts, it is the child that ends, and the notebook goes on.
    """
    stat = gguf.path.stat()
    key = (gguf.path.resolve(), stat.st_size, stat.st_mtime_ns)
    known = _is_dense_llama(gguf.metadata)
    if key in _probed or (known and (_probed or not gpu_build)):
        return
    child = [sys.executable, "-c", _PROBE, os.fspath(gguf.path)]
    status = subprocess.run(child, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode
    if status:
        if known and gpu_build and status != _REFUSED:
            raise QtutorError(f"This build of llama.cpp ends the process when it loads {gguf.path.name}: see 'A GPU "
                              "machine' in README.md, or install llama-cpp-python without CUDA.")  # fmt: skip
        raise QtutorError(f"llama.cpp cannot load {gguf.path.name}: it is damaged or too large for this machine.")
    _probed.add(key)


# -------------------------------------------------------------------------------------------------- quantize


def _imatrix_array(lib, imatrix: dict):
    """A zero-terminated C array of {name, float32*, size}; the second result keeps the memory alive."""
    arrays = {}
    for name, values in imatrix.items():
        values = np.ascontiguousarray(values, dtype=np.float32).ravel()
        if values.size == 0 or not np.isfinite(values).all() or (values < 0).any():
            raise QtutorError(f"The importance matrix of {name} has negative or non-finite values: compute it again.")
        arrays[name.encode()] = values
    data = (lib.llama_model_imatrix_data * (len(arrays) + 1))()
    for slot, (name, values) in zip(data, arrays.items(), strict=False):
        slot.name, slot.size = name, values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return data, arrays


def _override_array(lib, overrides):
    data = (lib.llama_model_tensor_override * (len(overrides) + 1))()
    for slot, (pattern, name) in zip(data, overrides, strict=False):
        key = str(name).upper()
        if key not in _GGML_ID or key in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"):
            raise QtutorError(f"There is no tensor type {name!r}: choose one of {', '.join(_quantizable())}.")
        try:
            re.compile(pattern)
        except re.error as err:
            raise QtutorError(f"{pattern!r} is not a regular expression ({err}).") from None
        slot.pattern, slot.type = pattern.encode(), _GGML_ID[key]
    data[len(overrides)].type = lib.GGML_TYPE_COUNT
    return data


def _quantizable() -> list[str]:
    return [n for n in _GGML_ID if n not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")]


def _check_source(gguf: Gguf, kind: QuantType, imatrix, allow_requantize: bool) -> None:
    done = sorted({t.type for t in gguf.tensors} - set(_FLOATS))
    if done and not allow_requantize:
        raise QtutorError(
            f"{gguf.path.name} is already quantized ({', '.join(done)}): quantize from the F32, F16 or BF16 file, "
            "because errors add up."
        )
    if kind.needs_imatrix and not imatrix:
        raise QtutorError(
            f"{kind.name} needs an importance matrix: pass imatrix=llamacpp.imatrix(model, tokens)."
        )
    for tensor in gguf.tensors if imatrix else ():
        values = imatrix.get(tensor.name)
        if values is not None and np.size(values) != tensor.shape[-1]:
            raise QtutorError(
                f"The importance matrix of {tensor.name} has {np.size(values)} values for {tensor.shape[-1]} "
                "columns: it belongs to another model, compute it from this one."
            )


def _run_quantize(src: Path, dst: Path, kind: QuantType, imatrix, tensor_types, threads, pure, dry_run, again):
    lib = _native()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind.ftype, threads or n_threads()
    params.pure, params.dry_run, params.allow_requantize = pure, dry_run, again
    if imatrix:
        array, alive = _imatrix_array(lib, imatrix)
        params.imatrix = ctypes.cast(array, ctypes.POINTER(lib.llama_model_imatrix_data))
    overrides = [*(tensor_types or {}).items(), *kind.overrides]  # the first that matches wins
    if overrides:
        patterns = _override_array(lib, overrides)
        params.tt_overrides = ctypes.cast(patterns, ctypes.POINTER(lib.llama_model_tensor_override))
    _log.clear()
    status = lib.llama_model_quantize(os.fsencode(src), os.fsencode(dst), ctypes.byref(params))
    if status != 0:
        reason = _reason("it gave no reason")
        if "imatrix" in reason or "importance matrix" in reason:
            raise QtutorError(
                f"{kind.name} needs an importance matrix for every layer ({reason}): "
                "pass imatrix=llamacpp.imatrix(model, tokens)."
            )
        raise QtutorError(f"llama.cpp could not quantize {src.name} to {kind.name}: {reason}.")


def quantize(
    src, dst, type: str, imatrix=None, tensor_types=None, threads=None, *, pure: bool = False,
    allow_requantize: bool = False,
) -> Path:
    """Quantize a GGUF file and return the new file's path; same bytes as ``llama-quantize``.

    ``src`` is F32, F16 or BF16.  ``type`` is a name in :data:`TYPES`, e.g. ``"Q4_K_M"``.  ``imatrix`` maps GGUF
    tensor names to the mean squared activation of each column (float32, one value a column): see
    :func:`imatrix`.  ``tensor_types`` maps regular expressions to GGML types and overrules the recipe, e.g.
    ``{"attn_v": "Q8_0"}``.  ``pure`` gives every matrix the base type, no mixture.

    The result appears under ``dst`` only when complete.  Raises QtutorError for an unknown type, a missing
    importance matrix, a source that is already quantized or damaged, and a target that cannot be written.
    """
    kind, src, dst = _type(type), Path(src), Path(dst)
    gguf = check_gguf(src)
    _check_source(gguf, kind, imatrix, allow_requantize)
    _probe(gguf)
    if dst.is_dir():
        raise QtutorError(f"'{dst}' is a folder: give the name of the .gguf file to write.")
    partial = dst.with_name(dst.name + ".partial")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        if dst.exists() and dst.samefile(src):
            raise QtutorError(f"'{dst}' is the source itself: give the result another name.")
        partial.touch()  # llama.cpp's own message about a target that it cannot open names no file
        _run_quantize(src, partial, kind, imatrix, tensor_types, threads, pure, False, allow_requantize)
        os.replace(partial, dst)
    except OSError as err:
        raise QtutorError(
            f"'{dst}' cannot be written ({err.strerror or err}): choose another folder or free some space."
        ) from None
    finally:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass
    return dst


_PLAN = re.compile(
    r"\[ *\d+/ *\d+\] +(\S+) +- \[([\d, ]+)\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
)


def plan(src, type: str, tensor_types=None, *, pure: bool = False, imatrix: bool = False) -> list[Tensor]:
    """What :func:`quantize` would write, without writing it: the tensor table of the result (a dry run).

    ``imatrix`` says whether there would be one: a few types choose other tensor types when there is.
    """
    kind, src = _type(type), Path(src)
    gguf = check_gguf(src)
    fake = None
    if imatrix:
        fake = {t.name: np.ones(t.shape[-1], np.float32) for t in gguf.tensors if len(t.shape) == 2}
    _run_quantize(src, Path(os.devnull), kind, fake, tensor_types, 1, pure, True, True)
    chosen = {m[1]: (m[4] or m[3]).upper() for m in _PLAN.finditer("".join(_log))}
    rows, offset = [], 0
    for t in gguf.tensors:
        label, block, width = GGML_TYPES[_GGML_ID[chosen.get(t.name, t.type)]]
        nbytes = prod(t.shape) // block * width
        rows.append(Tensor(t.name, label, t.shape, offset, nbytes))
        offset += -(-nbytes // 32) * 32
    return rows


# -------------------------------------------------------------------------------------- importance matrix


def _hf_from_gguf(path: Path):
    """The full-precision Hugging Face model of a GGUF file, through transformers' own reader."""
    import torch
    import transformers

    gguf = check_gguf(path)
    if gguf.metadata["general.architecture"] != "llama":
        raise QtutorError("An importance matrix is computed for Llama models only: use llama-imatrix for others.")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:  # its bars go to stderr whatever the verbosity
        with contextlib.redirect_stderr(io.StringIO()):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.resolve().parent, gguf_file=path.name, dtype=torch.float32
            )
    finally:
        transformers.logging.set_verbosity(level)
    return model.eval()


def imatrix(model_or_gguf, tokens, ctx: int = 512) -> dict[str, np.ndarray]:
    """The importance matrix: for each weight matrix, the mean of x**2 of every input column.

    ``model_or_gguf`` is a Hugging Face Llama or the path of a GGUF file; ``tokens`` is a 1-D sequence of token
    ids, cut into windows of ``ctx`` (a last shorter one is dropped, as llama-imatrix does).  Returns
    GGUF name -> float32 (columns,), for every matrix inside the layers.

    Why x**2: rounding moves weight w_ij by e_ij, which moves output i by e_ij * x_j; the expected squared
    error is the sum of e_ij**2 * E[x_j**2].  The quantizer minimises exactly that sum when it has the matrix.
    Source: tools/imatrix in llama.cpp, which this agrees with to float32 rounding.
    """
    import torch
    from tqdm.auto import tqdm

    from .gguf_export import gguf_name

    tokens = np.asarray(tokens, dtype=np.int64).ravel()
    if ctx < 1 or len(tokens) < ctx:
        raise QtutorError(f"An importance matrix needs at least one window: {len(tokens)} tokens for ctx={ctx}.")
    is_path = isinstance(model_or_gguf, (str, os.PathLike))
    model = _hf_from_gguf(Path(model_or_gguf)) if is_path else model_or_gguf
    vocab = model.get_input_embeddings().num_embeddings
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise QtutorError(f"Token ids must lie in 0..{vocab - 1}: these come from another tokenizer.")
    device = next(model.parameters()).device
    sums: dict[str, torch.Tensor] = {}

    def collect(name):
        def hook(module, args):
            x = args[0].detach().float().flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.square().sum(0, dtype=torch.float64)

        return hook

    names = {m: gguf_name(f"{n}.weight") for n, m in model.named_modules() if hasattr(m, "weight")}
    layers = {m: n for m, n in names.items() if n and n.startswith("blk.") and m.weight.ndim == 2}
    hooks = [module.register_forward_pre_hook(collect(name)) for module, name in layers.items()]
    windows = torch.from_numpy(tokens[: len(tokens) // ctx * ctx].reshape(-1, ctx))
    was_training = model.training
    try:
        model.eval()
        with torch.inference_mode():
            for window in tqdm(windows, desc="imatrix", unit="window", leave=False, disable=len(windows) < 8):
                model(window[None].to(device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    result = {name: (total / windows.numel()).float().cpu().numpy() for name, total in sums.items()}
    bad = [name for name, values in result.items() if not np.isfinite(values).all()]
    if bad or not result:
        raise QtutorError(f"The activations of {bad[0] if bad else 'no layer'} are not usable: check the model.")
    return result


# ----------------------------------------------------------------------------------------------------- running


def _kv_bytes(meta: dict, width: int) -> int:
    """Bytes of keys and values a token, for a Llama's metadata; 0 where the architecture is another."""
    if not _is_dense_llama(meta):
        return 0
    heads = meta["llama.attention.head_count"]
    dim = meta.get("llama.attention.key_length", meta["llama.embedding_length"] // heads)
    return 2 * meta["llama.block_count"] * meta.get("llama.attention.head_count_kv", heads) * dim * width


class Model:
    """A GGUF model in memory, with a context of ``ctx`` tokens.  Use it in a ``with`` block.

    ``exact=True`` computes on the CPU, with keys and values in F32 and attention without the fused kernel: logits
    of an F32 file then agree with PyTorch's to 1e-4 (for some hundreds of tokens: the rotary angles drift apart
    by rounding as positions grow).  ``exact=False`` is how people run llama.cpp (F16 cache, flash
    attention): two to three times faster and a little different.  ``threads`` defaults to the physical cores.
    ``gpu_layers`` is the number of layers to put on a GPU, by default all where the build has one, and none
    where the computation is to be exact; ``on_gpu`` says whether any went there.

    Raises QtutorError for a file that :func:`check_gguf` refuses, weights that are not finite, a context that
    does not fit in memory, and every use after :meth:`close`.
    """

    def __init__(self, path, ctx: int = 512, threads: int | None = None, *, exact: bool = True,
                 gpu_layers: int | None = None):
        self._model = self._ctx = self._batch = None
        self.gguf, self.ctx = check_gguf(path), int(ctx)
        if "tokenizer.ggml.model" not in self.gguf.metadata:
            raise QtutorError(f"{self.gguf.path.name} holds no model with a tokenizer: give another file.")
        self._check_memory(exact)
        self.lib = lib = _native()
        _probe(self.gguf, bool(lib.llama_supports_gpu_offload()))
        params = lib.llama_model_default_params()
        params.check_tensors = True  # NaN or infinity in a scale: an error, not a wrong answer
        if exact or gpu_layers is not None:
            # A GPU computes F32 products in TF32, with 10 bits of mantissa: not exact.
            params.n_gpu_layers = gpu_layers or 0
        self.on_gpu = bool(lib.llama_supports_gpu_offload()) and params.n_gpu_layers != 0
        _log.clear()
        self._model = lib.llama_model_load_from_file(os.fsencode(self.gguf.path), params)
        if not self._model:
            raise QtutorError(f"llama.cpp cannot load {self.gguf.path.name}: {_reason('it gave no reason')}.")
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)
        self._ctx = lib.llama_init_from_model(self._model, self._context_params(threads, exact))
        if not self._ctx:
            reason = _reason("it gave no reason")
            self.close()
            raise QtutorError(f"llama.cpp cannot make a context of {ctx} tokens: {reason}.")
        self._batch = self._new_batch()

    def _check_memory(self, exact: bool) -> None:
        import psutil

        if self.ctx < 1:
            raise QtutorError(f"ctx={self.ctx} is not a context length: give at least 1.")
        meta = self.gguf.metadata
        logits = 4 * len(meta.get("tokenizer.ggml.tokens", ()))
        need = self.ctx * (_kv_bytes(meta, 4 if exact else 2) + logits)
        if need > psutil.virtual_memory().available:
            raise QtutorError(
                f"A context of {self.ctx} tokens needs {need / 2**30:.1f} GiB beside the weights: make ctx smaller."
            )

    def _context_params(self, threads, exact):
        lib = self.lib
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.ctx
        self.threads_prompt = params.n_threads_batch = threads or n_threads()
        # one token of a small model is microseconds of work a layer: waking a second thread costs more
        small = self.gguf.n_weights < 50e6
        self.threads_generate = params.n_threads = threads or (1 if small else n_threads())
        params.no_perf = True
        if exact:
            params.op_offload = False  # else a GPU build sends large products there all the same
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        try:
            self.close()
        except Exception:
            pass  # the interpreter is shutting down

    def close(self) -> None:
        """Free the native memory; harmless when repeated."""
        if self._batch:
            self.lib.llama_batch_free(self._batch[0])
        self._batch = None
        if self._ctx:
            self.lib.llama_free(self._ctx)
        if self._model:
            self.lib.llama_model_free(self._model)
        self._ctx = self._model = None

    def _open(self):
        if not self._ctx:
            raise QtutorError("This model is closed: open it again with llamacpp.Model(path).")
        return self.lib

    def tokenize(self, text: str, special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of ``text``.  ``special`` adds bos/eos where the model asks for them; ``parse_special``
        reads ``<|endoftext|>`` in the text as that token (both as Hugging Face does by default)."""
        lib = self._open()
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:
            raise QtutorError("The text has half a surrogate pair in it: it is not valid Unicode.") from None
        room = len(raw) + 4  # never more tokens than bytes, plus bos and eos
        out = (lib.llama_token * room)()
        n = lib.llama_tokenize(self.vocab, raw, len(raw), out, room, special, parse_special)
        if n < 0:
            raise QtutorError("llama.cpp could not tokenize this text.")
        return list(out[:n])

    def detokenize(self, tokens, special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 (half an emoji) become U+FFFD."""
        lib, pieces = self._open(), []
        # piece by piece: llama_detokenize would also "clean up" spaces before punctuation
        out = ctypes.create_string_buffer(1024)
        for token in self._ids(tokens):
            n = lib.llama_token_to_piece(self.vocab, int(token), out, len(out), 0, special)
            if n < 0:  # a longer token than the buffer: n is minus its length
                out = ctypes.create_string_buffer(-n)
                n = lib.llama_token_to_piece(self.vocab, int(token), out, len(out), 0, special)
            pieces.append(out.raw[:n])
        return b"".join(pieces).decode("utf-8", "replace")

    def _ids(self, tokens) -> np.ndarray:
        ids = np.asarray(tokens).ravel()
        if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self.n_vocab):
            raise QtutorError(f"Token ids must be integers in 0..{self.n_vocab - 1}: check the tokenizer.")
        return np.ascontiguousarray(ids, dtype=np.int32)

    def _new_batch(self):
        """One llama_batch for the life of the model, and numpy views of its arrays: token, position, output wanted.

        Setting four fields a token through ctypes takes longer than a small model takes to compute the token.
        """
        batch = self.lib.llama_batch_init(self.ctx, 0, 1)
        for i in range(self.ctx):
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0  # everything belongs to sequence 0

        def view(pointer, kind):
            return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), (self.ctx,))

        return (batch, view(batch.token, ctypes.c_int32), view(batch.pos, ctypes.c_int32),
                view(batch.logits, ctypes.c_int8))  # fmt: skip

    def _decode(self, ids: np.ndarray, past: int, first: int) -> np.ndarray:
        """Run ``ids`` after ``past`` cached tokens; float32 logits from position ``first`` on (-1: the last)."""
        lib, n = self._open(), len(ids)
        first = first % n
        batch, token, position, output = self._batch
        batch.n_tokens = n
        token[:n], position[:n], output[:n] = ids, np.arange(past, past + n), 0
        output[first:n] = 1  # the output matrix is not applied to the others
        _log.clear()
        status = lib.llama_decode(self._ctx, batch)
        if status != 0:
            raise QtutorError(f"llama.cpp could not run the model (status {status}): {_reason('no reason')}.")
        pointer = ctypes.cast(lib.llama_get_logits(self._ctx), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (n - first, self.n_vocab)).copy()

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self._ctx), False)

    def logits(self, tokens, first: int = 0) -> np.ndarray:
        """Logits after each token of one window, from an empty cache: float32, (n - first, vocab), n <= ctx.

        ``first`` leaves out the positions before it, which saves their share of the output matrix.
        """
        self._open()
        ids = self._ids(tokens)
        if not 0 < len(ids) <= self.ctx:
            raise QtutorError(f"logits() takes 1 to {self.ctx} tokens and got {len(ids)}: cut windows, or raise ctx.")
        if not 0 <= first < len(ids):
            raise QtutorError(f"first={first} must be one of the {len(ids)} positions: give 0 for all of them.")
        self._clear()
        return self._decode(ids, 0, first)

    def generate(self, prompt, max_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """Continue ``prompt`` (text or token ids) and return the new text only.

        ``temperature=0`` takes the likeliest token (greedy); above, samples from softmax(logits/temperature)
        with numpy's generator at ``seed``.  Ends at an end-of-text token, at ``max_tokens``, or when the
        context is full.
        """
        lib = self._open()
        ids = self._ids(self.tokenize(prompt) if isinstance(prompt, str) else prompt)
        if not 0 < len(ids) < self.ctx:
            raise QtutorError(f"The prompt has {len(ids)} tokens and must have 1 to {self.ctx - 1}: change it or ctx.")
        if temperature < 0:
            raise QtutorError("temperature is 0 (greedy) or positive.")
        rng, out = np.random.default_rng(seed), []
        self._clear()
        logits, past = self._decode(ids, 0, -1)[0], len(ids)
        while len(out) < max_tokens:
            token = int(logits.argmax())
            if temperature > 0:
                z = logits.astype(np.float64) / temperature
                p = np.exp(z - z.max())
                token = int(rng.choice(len(p), p=p / p.sum()))
            if lib.llama_vocab_is_eog(self.vocab, token):
                break
            out.append(token)
            if past >= self.ctx:
                break
            logits, past = self._decode(np.array([token], np.int32), past, -1)[0], past + 1
        return self.detokenize(out)


def bench(path, prompt: int = 512, generate: int = 64, repeats: int = 3, threads=None) -> dict:
    """Tokens per second as people run llama.cpp (F16 cache, flash attention): median of ``repeats``, after one
    run to warm up.

    ``prefill_tokens_per_s``: one batch of ``prompt`` tokens (limited by arithmetic).  ``decode_tokens_per_s``:
    one token at a time (limited by reading the weights from memory).  The same test as llama-bench's.
    """
    if prompt < 1 or generate < 1 or repeats < 1:
        raise QtutorError("bench() needs at least one prompt token, one generated token and one repeat.")
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"prompt": [], "generate": []}
    with Model(path, ctx=max(prompt, generate), threads=threads, exact=False) as model:
        ids = rng.integers(0, model.n_vocab, max(prompt, generate), dtype=np.int32)
        for _ in range(repeats + 1):
            model._clear()
            start = time.perf_counter()
            model._decode(ids[:prompt], 0, -1)
            times["prompt"].append(time.perf_counter() - start)
            model._clear()
            start = time.perf_counter()
            for i in range(generate):
                model._decode(ids[i : i + 1], i, -1)
            times["generate"].append(time.perf_counter() - start)
    return {
        "prefill_tokens_per_s": prompt / float(np.median(times["prompt"][1:])),
        "decode_tokens_per_s": generate / float(np.median(times["generate"][1:])),
        "prompt_tokens": prompt,
        "generate_tokens": generate,
        "repeats": repeats,
        "prompt_threads": model.threads_prompt,
        "generate_threads": model.threads_generate,
    }
