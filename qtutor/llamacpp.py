"""llama.cpp from Python: quantize, importance matrix, logits, generation.

llama.cpp quantizes weights after training (PTQ) into *blocks*: 32 or 256 neighbouring weights of a row share
a scale (and, in the K types, the scales share a scale of their own).  Three families matter here:

- ``Q4_0``, ``Q8_0`` ...     one float16 scale a block of 32, round to nearest: simple and fast
- ``Q4_K``, ``Q6_K`` ...     super-blocks of 256 with quantized scales; ``_S``/``_M``/``_L`` are *mixtures* that
  spend more bits on the tensors that hurt most (attention v, ffn down, the output matrix)
- ``IQ2_XS``, ``IQ4_XS`` ... codebooks; the lowest need an *importance matrix*: the mean squared activation
  that meets each weight column, so that rounding error goes where the model does not look

Everything goes through ``llama_cpp.llama_cpp``, the ctypes mirror of ``llama.h`` in llama-cpp-python, because
that is the C API that every other tool uses too.  C code does not raise exceptions: where it meets a file it
does not expect it may abort, and take a notebook's kernel along.  So every function here begins with
:func:`check_gguf`, which lets a child process open the file first.

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
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from math import prod
from pathlib import Path

import numpy as np

from . import QtutorError, files, gguf_file
from .gguf_file import (  # noqa: F401 - they are part of what a reader finds here
    GGML,
    STORED,
    TYPES,
    Gguf,
    QuantType,
    Tensor,
    bits_per_weight,
    check_gguf,
    file_type,
    tensor_table,
    trust,
)

# -------------------------------------------------------------------------------------- the native library

log: deque[str] = deque(maxlen=20_000)  #: what llama.cpp said since the last call, for error messages
_keep_alive: list = []  # a ctypes callback that Python collects would crash the process


def native():
    """Import llama_cpp's ctypes bindings once, send its log to :data:`log`, start the backend."""
    if _keep_alive:
        return _keep_alive[0]
    # OpenMP threads that wait by spinning keep the core from whoever has work to do: on two busy cores that
    # made llama.cpp five times slower.  libgomp reads this when it is loaded; the reader's own value wins.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        import llama_cpp.llama_cpp as lib
    except Exception as err:  # a broken build raises OSError, RuntimeError or FileNotFoundError
        raise QtutorError(f"llama-cpp-python does not load here ({type(err).__name__}): install it with a C++ "
                          "compiler, pip install llama-cpp-python.") from None  # fmt: skip

    @lib.llama_log_callback
    def collect(level, text, user_data):
        log.append(text.decode("utf-8", "replace"))

    lib.llama_log_set(collect, ctypes.c_void_p(0))
    lib.llama_backend_init()
    _keep_alive.extend((lib, collect))
    return lib


def reason(default: str) -> str:
    """The last error that llama.cpp logged, tidied into the middle of a sentence."""
    lines = [line.strip() for line in "".join(log).split("\n") if line.strip()]
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
        native()
        from importlib.metadata import version

        return True, f"llama-cpp-python {version('llama-cpp-python')}"
    except Exception as err:
        return False, str(err)


def tool(name: str) -> Path:
    """Path of one of llama.cpp's programs, e.g. ``llama-quantize``, ``llama-perplexity``, ``llama-imatrix``.

    They are compiled together with llama-cpp-python when CMAKE_ARGS asks for tools, and land in
    site-packages/bin.  Raises QtutorError where there is none.
    """
    spec = importlib.util.find_spec("llama_cpp")
    beside = str(Path(spec.origin).parent.parent / "bin") if spec and spec.origin else ""
    if found := shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])):
        return Path(found)
    raise QtutorError(f"{name} is not installed: reinstall llama-cpp-python with "
                      "CMAKE_ARGS='-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_TOOLS_INSTALL=ON'.")


# A program's main function, called from Python so that its log can be written out before the process ends.
_FLUSHED = """
import ctypes, sys
path, common, function, *argv = sys.argv[1:]
common, run = ctypes.CDLL(common), ctypes.CDLL(path)[function]
status = run(len(argv), (ctypes.c_char_p * (len(argv) + 1))(*map(str.encode, argv)))
common._Z15common_log_mainv.restype = ctypes.c_void_p
common._Z16common_log_flushP10common_log(ctypes.c_void_p(common._Z15common_log_mainv()))
sys.exit(status)
"""


def run_tool(name: str, *arguments, until: str = "", tries: int = 20) -> tuple[str, float]:
    """Run one of llama.cpp's programs; return all that it printed, and the seconds that it took.

    ``until`` is a regular expression that the answer has to match.  The programs print through a thread of their own,
    which is cut off when the program ends: on a busy machine the last lines, which hold the result, are often missing.
    So the log is waited for where the build lets us (Linux), and a program whose answer is missing is asked again.
    Raises QtutorError where it fails, and where the answer stays away.
    """
    program, function = tool(name), name.replace("-", "_")
    library, common = (program.parent.parent / "lib" / f"lib{part}.so" for part in (f"{name}-impl", "llama-common"))
    command = [program, *arguments]
    if library.is_file() and common.is_file():
        command = [sys.executable, "-c", _FLUSHED, library, common, f"_Z{len(function)}{function}iPPc", *command]
    for _ in range(tries):
        env = os.environ | {"LC_ALL": "C"} | ({"LLAMA_ARG_REPACK": "0"} if gguf_file.kernels["plain"] else {})
        start = time.perf_counter()
        done = subprocess.run([str(part) for part in command], capture_output=True, env=env, check=False)
        seconds, said = time.perf_counter() - start, (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace")
        if done.returncode == -getattr(signal, "SIGILL", 0) and not gguf_file.kernels["plain"]:
            gguf_file.kernels["plain"] = True
            continue
        if done.returncode:
            raise QtutorError(f"{name} ended with status {done.returncode}: run it by hand to see why.")
        if re.search(until, said):
            return said, seconds
    raise QtutorError(f"{name} did not print {until!r} in {tries} runs: run it by hand to see why.")


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
        if key not in STORED:
            raise QtutorError(f"There is no tensor type {name!r}: choose one of {', '.join(STORED)}.")
        try:
            re.compile(pattern)
        except re.error as err:
            raise QtutorError(f"{pattern!r} is not a regular expression ({err}): correct it.") from None
        slot.pattern, slot.type = pattern.encode(), GGML[key].number
    data[len(overrides)].type = lib.GGML_TYPE_COUNT
    return data


def _check_source(source: Gguf, kind: QuantType, imatrix, allow_requantize: bool) -> None:
    if source.quantized and not allow_requantize:
        raise QtutorError(f"{source.path.name} is already quantized ({', '.join(source.quantized)}): quantize from the "
                          "F32, F16 or BF16 file, because errors add up.")  # fmt: skip
    if kind.needs_imatrix and not imatrix:
        raise QtutorError(f"{kind.name} needs an importance matrix: pass imatrix=llamacpp.imatrix(model, tokens).")
    for tensor in source.tensors if imatrix else ():
        values = imatrix.get(tensor.name)
        if values is not None and np.size(values) != tensor.shape[-1]:
            raise QtutorError(f"The importance matrix of {tensor.name} has {np.size(values)} values for "
                              f"{tensor.shape[-1]} columns: it belongs to another model, compute it from this one.")


def _run_quantize(src: Path, dst: Path, kind: QuantType, imatrix, tensor_types, threads, pure, dry_run, again):
    lib = native()
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
    log.clear()
    if lib.llama_model_quantize(os.fsencode(src), os.fsencode(dst), ctypes.byref(params)) != 0:
        why = reason("it gave no reason")
        if "imatrix" in why or "importance matrix" in why:
            raise QtutorError(f"{kind.name} needs an importance matrix for every layer ({why}): pass "
                              "imatrix=llamacpp.imatrix(model, tokens).")  # fmt: skip
        raise QtutorError(f"llama.cpp could not quantize {src.name} to {kind.name}: {why}.")


def quantize(
    src, dst, type: str, imatrix=None, tensor_types=None, threads=None, *, pure: bool = False,
    allow_requantize: bool = False,
) -> Path:
    """Quantize a GGUF file and return the new file's path; same bytes as ``llama-quantize``.

    ``src`` is F32, F16 or BF16.  ``type`` is a name in :data:`TYPES`, e.g. ``"Q4_K_M"``.  ``imatrix`` maps GGUF
    tensor names to the mean squared activation of each column (float32, one value a column, see :func:`imatrix`),
    or is the path of a file that llama-imatrix wrote.  ``tensor_types`` maps regular expressions to GGML types and
    overrules the recipe, e.g. ``{"attn_v": "Q8_0"}``.  ``pure`` gives every matrix the base type, no mixture.

    The result appears under ``dst`` only when complete.  Raises QtutorError for an unknown type, a missing
    importance matrix, a source that is already quantized or damaged, and a target that cannot be written.
    """
    kind, src, dst = file_type(type), Path(src), Path(dst)
    source = check_gguf(src)
    if isinstance(imatrix, (str, os.PathLike)):
        imatrix = read_imatrix(imatrix)
    _check_source(source, kind, imatrix, allow_requantize)
    if dst.exists() and dst.samefile(src):
        raise QtutorError(f"'{dst}' is the source itself: give the result another name.")
    with files.whole(dst) as partial:
        partial.touch()  # llama.cpp's own message about a target that it cannot open names no file
        _run_quantize(src, partial, kind, imatrix, tensor_types, threads, pure, False, allow_requantize)
    return trust(dst)


_PLAN = re.compile(
    r"\[ *\d+/ *\d+\] +(\S+) +- \[([\d, ]+)\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
)


def plan(src, type: str, tensor_types=None, *, pure: bool = False, imatrix: bool = False) -> list[Tensor]:
    """What :func:`quantize` would write, without writing it: the tensor table of the result (a dry run).

    ``imatrix`` says whether there would be one: a few types choose other tensor types when there is.
    """
    kind, src = file_type(type), Path(src)
    source = check_gguf(src)
    fake = None
    if imatrix:
        fake = {t.name: np.ones(t.shape[-1], np.float32) for t in source.tensors if len(t.shape) == 2}
    _run_quantize(src, Path(os.devnull), kind, fake, tensor_types, 1, pure, True, True)
    chosen = {m[1]: (m[4] or m[3]).upper() for m in _PLAN.finditer("".join(log))}
    rows, offset = [], 0
    for t in source.tensors:
        label = chosen.get(t.name, t.type)
        nbytes = prod(t.shape) // GGML[label].weights * GGML[label].nbytes
        rows.append(Tensor(t.name, label, t.shape, offset, nbytes))
        offset += -(-nbytes // 32) * 32
    return rows


# -------------------------------------------------------------------------------------- importance matrix


def imatrix(model, tokens, ctx: int = 512) -> dict[str, np.ndarray]:
    """The importance matrix: for each weight matrix, the mean of x**2 of every input column.

    ``model`` is a Hugging Face Llama; ``tokens`` is a 1-D sequence of token ids, cut into windows of ``ctx`` (a last
    shorter one is dropped, as llama-imatrix does).  Returns GGUF name -> float32 (columns,), for every matrix inside
    the layers.

    Why x**2: rounding moves weight w_ij by e_ij, which moves output i by e_ij * x_j; the expected squared
    error is the sum of e_ij**2 * E[x_j**2].  The quantizer minimises exactly that sum when it has the matrix.
    Source: tools/imatrix in llama.cpp, which this agrees with to float32 rounding.
    """
    import torch
    from tqdm.auto import tqdm

    from .gguf_export import gguf_name

    tokens, device = np.asarray(tokens, dtype=np.int64).ravel(), next(model.parameters()).device
    vocab, windows = model.get_input_embeddings().num_embeddings, torch.from_numpy(tokens[: len(tokens) // ctx * ctx])
    if not len(windows):
        raise QtutorError(f"An importance matrix needs at least one window: {len(tokens)} tokens for ctx={ctx}.")
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise QtutorError(f"Token ids must lie in 0..{vocab - 1}: these come from another tokenizer.")
    sums, windows = {}, windows.reshape(-1, ctx)

    def collect(name):
        def hook(module, args):
            x = args[0].detach().float().flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.square().sum(0, dtype=torch.float64)

        return hook

    names = {m: gguf_name(f"{n}.weight") for n, m in model.named_modules() if hasattr(m, "weight")}
    hooks = [module.register_forward_pre_hook(collect(name)) for module, name in names.items()
             if name and name.startswith("blk.") and module.weight.ndim == 2]  # fmt: skip
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
    return {name: (total / windows.numel()).float().cpu().numpy() for name, total in sums.items()}


def read_imatrix(path) -> dict[str, np.ndarray]:
    """The importance matrix in a file that llama-imatrix wrote, as :func:`imatrix` returns it."""
    import gguf

    if check_gguf(path).metadata["general.architecture"] != "imatrix":
        raise QtutorError(f"{Path(path).name} holds no importance matrix: give a file that llama-imatrix wrote.")
    data = {t.name: np.array(t.data, np.float32).ravel() for t in gguf.GGUFReader(path).tensors}
    ends = (".in_sum2", ".counts")
    try:
        return {name.removesuffix(ends[0]): total / data[name.removesuffix(ends[0]) + ends[1]]
                for name, total in data.items() if name.endswith(ends[0])}  # fmt: skip
    except (KeyError, ValueError):
        raise QtutorError(f"{Path(path).name} lacks a part of its importance matrix: make it again.") from None


# ----------------------------------------------------------------------------------------------------- running


def kv_bytes(meta: dict, width: float) -> int:
    """Bytes of keys and values a token, for a Llama's metadata; 0 where the architecture is another."""
    if meta.get("general.architecture") != "llama":
        return 0
    heads = meta["llama.attention.head_count"]
    dim = meta.get("llama.attention.key_length", meta["llama.embedding_length"] // heads)
    return int(2 * meta["llama.block_count"] * meta.get("llama.attention.head_count_kv", heads) * dim * width)


# The types that llama.cpp takes for keys and values: --cache-type-k and --cache-type-v in common/arg.cpp
KV_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
_BUFFER = re.compile(r"(\S+) +(model|KV|compute) buffer size *= *([\d.]+) MiB")


class Model:
    """A GGUF model in memory, with a context of ``ctx`` tokens.  Use it in a ``with`` block.

    Args:
        path: of the GGUF file.
        ctx: tokens of a sequence.
        threads: by default the physical cores, and one for the decoding of a small model.
        exact: compute on the CPU, with keys and values in F32 and attention without the fused kernel: logits of an
            F32 file then agree with PyTorch's to 1e-4 (for some hundreds of tokens: the rotary angles drift apart by
            rounding as positions grow).  ``False`` is how people run llama.cpp (F16 cache, flash attention): two to
            three times faster and a little different.
        gpu_layers: layers to put on a GPU, by default all where the build has one, and none where ``exact``;
            ``on_gpu`` says whether any went there.
        sequences: that :meth:`step` runs side by side, each of ``ctx`` tokens, as the slots of llama-server do.
        kv_type: one of KV_TYPES for keys and values, instead of F32 (``exact``) or F16.

    Raises QtutorError for a file that :func:`check_gguf` refuses, weights that are not finite, a context that
    does not fit in memory, and every use after :meth:`close`.
    """

    def __init__(self, path, ctx: int = 512, threads: int | None = None, *, exact: bool = True,
                 gpu_layers: int | None = None, sequences: int = 1, kv_type: str | None = None):
        self._model = self._ctx = None
        self.gguf, self.ctx, self.sequences = check_gguf(path), int(ctx), int(sequences)
        if "tokenizer.ggml.model" not in self.gguf.metadata:
            raise QtutorError(f"{self.gguf.path.name} holds no model with a tokenizer: give another file.")
        self.kv_type = str(kv_type or ("F32" if exact else "F16")).upper()
        if self.kv_type not in KV_TYPES:
            raise QtutorError(f"There is no cache type {kv_type!r}: choose one of {', '.join(KV_TYPES)}.")
        self.lib = lib = native()
        gguf_file.compute_first(self.gguf)
        params = lib.llama_model_default_params()
        params.use_extra_bufts = not gguf_file.kernels["plain"]
        weights = sum(t.nbytes for t in self.gguf.tensors)
        params.check_tensors = weights < 2**33  # NaN in a scale is an error, not a wrong answer; but it reads them all
        if exact or gpu_layers is not None:
            # A GPU computes F32 products in TF32, with 10 bits of mantissa: not exact.
            params.n_gpu_layers = gpu_layers or 0
        self.on_gpu = bool(lib.llama_supports_gpu_offload()) and params.n_gpu_layers != 0
        if self.on_gpu:
            params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # read through pinned buffers: faster than page faults of a map
        self._check_memory()
        log.clear()
        self._model = lib.llama_model_load_from_file(os.fsencode(self.gguf.path), params)
        if not self._model:
            raise QtutorError(f"llama.cpp cannot load {self.gguf.path.name}: {reason('it gave no reason')}.")
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)
        self._options, self._buffers_of_weights = (threads, exact), _BUFFER.findall("".join(log))
        try:
            self._new_context()
        except QtutorError:
            self.close()
            raise

    def resize(self, ctx: int, sequences: int = 1) -> None:
        """Make another context on the same weights; every token is forgotten.  Raises QtutorError without room."""
        self._open()
        self.ctx, self.sequences = int(ctx), int(sequences)
        self._check_memory()
        self.lib.llama_free(self._ctx)
        self._ctx = None
        self._new_context()

    def _new_context(self) -> None:
        log.clear()
        self._ctx = self.lib.llama_init_from_model(self._model, self._context_params(*self._options))
        if not self._ctx:
            raise QtutorError(f"llama.cpp cannot make a context of {self.sequences} x {self.ctx} tokens: "
                              f"{reason('it gave no reason')}.")  # fmt: skip
        self._buffers = self._buffers_of_weights + _BUFFER.findall("".join(log))
        self._new_batch()

    def _check_memory(self) -> None:
        import psutil

        if self.ctx < 1 or self.sequences < 1:
            raise QtutorError(f"A context of {self.sequences} x {self.ctx} tokens is none: give at least 1.")
        meta = self.gguf.metadata
        logits = 4 * len(meta.get("tokenizer.ggml.tokens", ()))
        kind = GGML[self.kv_type]
        need = self.ctx * (self.sequences * kv_bytes(meta, kind.nbytes / kind.weights) + logits)
        if not self.on_gpu and need > psutil.virtual_memory().available:
            raise QtutorError(f"A context of {self.sequences} x {self.ctx} tokens needs {need / 2**30:.1f} GiB beside "
                              "the weights: make ctx smaller.")  # fmt: skip

    def _context_params(self, threads, exact):
        lib = self.lib
        params = lib.llama_context_default_params()
        params.n_seq_max = self.sequences
        params.n_ctx = params.n_batch = self.ctx * self.sequences
        params.n_ubatch = min(512, params.n_batch)  # tokens computed at once: llama.cpp's own choice
        self.threads_prompt = params.n_threads_batch = threads or n_threads()
        # one token of a small model is microseconds of work a layer: waking a second thread costs more
        small = self.gguf.n_weights < 50e6
        self.threads_generate = params.n_threads = threads or (1 if small else n_threads())
        params.no_perf = True
        params.type_k = params.type_v = GGML[self.kv_type].number
        if self.kv_type not in ("F32", "F16", "BF16"):  # quantized values are read by the fused kernel only
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        elif exact:
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if exact:
            params.op_offload = False  # else a GPU build sends large products there all the same
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

    def _new_batch(self) -> None:
        """One llama_batch for the life of the model, over numpy arrays: token, position, sequence, output wanted.

        Setting four fields a token through ctypes takes longer than a small model takes to compute the token.
        """
        n = self.ctx * self.sequences
        self._token, self._position, self._sequence = (np.zeros(n, np.int32) for _ in range(3))
        self._output, self._ones = np.zeros(n, np.int8), np.ones(n, np.int32)
        self._pointers = self._sequence.ctypes.data + np.arange(n, dtype=np.uintp) * np.uintp(4)
        fields = {"token": self._token, "pos": self._position, "n_seq_id": self._ones, "seq_id": self._pointers,
                  "logits": self._output}  # fmt: skip
        kinds = dict(self.lib.llama_batch._fields_)
        self._batch = self.lib.llama_batch(**{name: ctypes.cast(array.ctypes.data, kinds[name])
                                              for name, array in fields.items()})  # fmt: skip

    def _decode(self, ids: np.ndarray, at: int, first: int) -> np.ndarray:
        """Run ``ids`` (sequences, n) at positions ``at``...; logits from each one's position ``first`` on (-1: the
        last), float32 (sequences * (n - first), vocab): llama.cpp's own memory, which the next call overwrites."""
        lib, (rows, n) = self._open(), ids.shape
        batch = self._batch
        batch.n_tokens = size = rows * n
        self._token[:size] = ids.reshape(-1)
        self._position[:size].reshape(rows, n)[:] = np.arange(at, at + n)
        self._sequence[:size].reshape(rows, n)[:] = np.arange(rows)[:, None]
        output = self._output[:size].reshape(rows, n)
        output[:], output[:, first:] = 0, 1  # the output matrix is not applied to the others
        log.clear()
        status = lib.llama_decode(self._ctx, batch)
        if status != 0:
            raise QtutorError(f"llama.cpp could not run the model (status {status}): {reason('no reason')}.")
        pointer = ctypes.cast(lib.llama_get_logits(self._ctx), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (rows * (n - first % n), self.n_vocab))

    def step(self, ids, at: int) -> np.ndarray:
        """Run ``ids`` (sequences, n) at positions ``at`` to ``at + n - 1`` of each sequence, after what is cached.

        Returns the logits of each sequence's last position, float32 (sequences, vocab): a view of llama.cpp's memory,
        which the next call overwrites.  Raises QtutorError for another shape and beyond the context.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or len(ids) != self.sequences or not 0 < ids.shape[1] <= self.ctx - at or at < 0:
            raise QtutorError(f"step() takes ids of shape ({self.sequences}, n) at positions below {self.ctx}, and got "
                              f"{ids.shape} at {at}.")  # fmt: skip
        return self._decode(self._ids(ids).reshape(ids.shape), at, -1)

    def clear(self) -> None:
        """Forget every token."""
        self._open().llama_memory_clear(self.lib.llama_get_memory(self._ctx), False)

    def rewind(self, at: int) -> None:
        """Forget what lies at positions ``at`` and beyond, in every sequence."""
        self._open().llama_memory_seq_rm(self.lib.llama_get_memory(self._ctx), -1, at, -1)

    def memory(self) -> dict[str, float]:
        """llama.cpp's own account in MiB: ``device_model_mib``, ``host_model_mib``, and the same of ``kv`` and
        ``compute``.  ``host`` is the computer's memory, ``device`` a GPU's; on a CPU everything is ``host``."""
        found = {f"{where}_{kind}_mib": 0.0 for kind in ("model", "kv", "compute") for where in ("device", "host")}
        for name, kind, mib in self._buffers:
            where = "host" if "CPU" in name or "Host" in name else "device"
            found[f"{where}_{kind.lower()}_mib"] += float(mib)
        return found

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
        self.clear()
        return self._decode(ids[None], 0, first).copy()

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
        self.clear()
        logits, past = self._decode(ids[None], 0, -1)[0], len(ids)
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
            logits, past = self._decode(np.array([[token]], np.int32), past, -1)[0], past + 1
        return self.detokenize(out)


# ------------------------------------------------------------------------------------------------------- the child


def _open_as_child(path: Path, plain: bool) -> int:
    """Do with a file what the parent of this process may want to do; print what is wrong with it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (2**33 + 4 * path.stat().st_size,) * 2)
    try:
        found = gguf_file.read(path)
    except Exception as err:
        print(" ".join(str(err).split())[:200].rstrip(".") or type(err).__name__)
        return gguf_file.DAMAGED
    trust(path)
    gguf_file.computed.update((True, False))
    gguf_file.kernels["plain"] = plain
    with contextlib.suppress(QtutorError):  # llama.cpp says no and lives: it will say so again
        if "tokenizer.ggml.model" in found.metadata and found.file_bytes < 2**29:
            for exact in (True, False):
                with Model(path, ctx=64, exact=exact) as model:
                    model.logits(np.arange(33) % model.n_vocab)
                    model.generate("The <|endoftext|> 1\r\n😀", 2)
        elif "tokenizer.ggml.model" in found.metadata:  # structure only: it takes no memory
            params = native().llama_model_default_params()
            params.no_alloc, params.load_mode, params.n_gpu_layers = True, native().LLAMA_LOAD_MODE_NONE, 0
            native().llama_model_load_from_file(os.fsencode(path), params)
    with contextlib.suppress(QtutorError):
        if found.metadata["general.architecture"] != "imatrix":
            plan(path, "Q4_0")
    return 0


if __name__ == "__main__":
    sys.exit(_open_as_child(Path(sys.argv[1]), "plain" in sys.argv[2:]))
