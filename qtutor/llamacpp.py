"""llama.cpp from Python: quantize, importance matrix, logits, generation.

llama.cpp quantizes weights after training (PTQ) into *blocks*: 32 or 256 neighbouring weights of a row share
a scale (and, in the K types, the scales share a scale of their own).  Three families matter here:

- ``Q4_0``, ``Q8_0`` ...     one float16 scale a block of 32, round to nearest: simple and fast
- ``Q4_K``, ``Q6_K`` ...     super-blocks of 256 with quantized scales; ``_S``/``_M``/``_L`` are *mixtures* that
  spend more bits on the tensors that hurt most (attention v, ffn down, the output matrix)
- ``IQ2_XS``, ``IQ4_XS`` ... codebooks; the lowest need an *importance matrix*: the mean squared activation
  that meets each weight column, so that rounding error goes where the model does not look

Everything goes through ``llama_cpp.llama_cpp``, the ctypes mirror of ``llama.h``.  C code raises no exceptions: a file
that it does not expect may end the notebook's kernel.  So :func:`check_gguf` lets a child process open a file first.

    gguf_export.export("data/model", "model-f32.gguf")
    llamacpp.quantize("model-f32.gguf", "model-q4.gguf", "Q4_K_M")
    with llamacpp.Model("model-q4.gguf", ctx=512) as model:
        logits = model.logits(tokens)               # float32, (n, vocab)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from functools import partial
from math import prod
from pathlib import Path

import gguf
import numpy as np
import psutil

from . import QtutorError, files, gguf_file
from .gguf_file import GGML, STORED, TYPES, Gguf, Tensor, bits_per_weight, check_gguf, file_type, tensor_table, trust  # noqa: F401

log: deque[str] = deque(maxlen=20_000)  #: what llama.cpp said since the last call, for error messages
_keep_alive: list = []  # a ctypes callback that Python collects would crash the process


def native():
    """Import llama_cpp's ctypes bindings once, send its log to :data:`log`, start the backend."""
    if _keep_alive:
        return _keep_alive[0]
    # OpenMP threads that wait by spinning made llama.cpp five times slower on two busy cores.  libgomp reads this when
    # it is loaded; the reader's own value wins.
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
    lines = [line.strip().rstrip(".") for line in "".join(log).split("\n")]
    if told := [m[1] for line in lines if (m := re.search(r"(?:error loading model|failed to quantize): *(.+)", line))]:
        return told[-1]
    errors = [line for line in lines if re.search(r"error|fail|invalid|unknown|missing", line, re.I)]
    return errors[-1] if errors else default


def available() -> tuple[bool, str]:
    """``(True, version)`` where llama-cpp-python loads here, else ``(False, why in one sentence)``."""
    try:
        native()
    except QtutorError as err:
        return False, str(err)
    return True, f"llama-cpp-python {importlib.import_module('llama_cpp').__version__}"


def tool(name: str) -> Path:
    """Path of a program of llama.cpp, e.g. ``llama-perplexity``; they are compiled together with llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    beside = str(Path(spec.origin).parent.parent / "bin") if spec and spec.origin else ""
    if found := shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])):
        return Path(found)
    raise QtutorError(f"{name} is not installed: reinstall llama-cpp-python with the CMAKE_ARGS in docs/install.md.")


def run_tool(name: str, *arguments, until: str = "", tries: int = 30) -> tuple[str, float]:
    """Run one of llama.cpp's programs; return all that it printed, and the seconds that it took.

    ``until`` is a regular expression that the answer has to match.  The programs print through a thread of their own,
    which nobody waits for when the program ends: on a busy machine half of the runs lose their last lines, the result
    among them.  Such a program is asked again.
    """
    command, env = [str(part) for part in (tool(name), *arguments)], os.environ | {"LC_ALL": "C"}
    for _ in range(tries):
        with tempfile.TemporaryFile() as printed:  # somebody who reads a pipe would compete with that thread
            start = time.perf_counter()
            done = subprocess.run(command, stdout=printed, stderr=printed, env=env, check=False)
            seconds = time.perf_counter() - start
            printed.seek(0)
            said = printed.read().decode("utf-8", "replace")
        if done.returncode == -signal.SIGILL:
            raise QtutorError(gguf_file.NOT_HERE)
        if done.returncode:
            raise QtutorError(f"{name} ended with status {done.returncode}: run it by hand to see why.")
        if re.search(until, said):
            return said, seconds
    raise QtutorError(f"{name} did not print {until!r} in {tries} runs: run it by hand to see why.")


def n_threads() -> int:
    """Physical cores that this process may use (at most ``OMP_NUM_THREADS``): more would slow llama.cpp down."""
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


def read_imatrix(path) -> dict[str, np.ndarray]:
    """The importance matrix in a file of llama-imatrix: what :func:`imatrix` returns, from its sums and counts."""
    try:
        found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        sums = {name.removesuffix(".in_sum2"): sum2 for name, sum2 in found.items() if name.endswith(".in_sum2")}
        counts = {name: found[f"{name}.counts"].reshape(-1, 1) for name in sums}
        if sums:  # an expert that met no token counts all columns alike, as in llama-quantize
            return {name: np.where(n > 0, sums[name] / np.maximum(n, 1), 1).ravel() for name, n in counts.items()}
    except Exception:  # a damaged file: gguf's reader has no class of its own
        pass
    raise QtutorError(f"'{path}' is no importance matrix in GGUF: give the dict of llamacpp.imatrix(model, tokens), "
                      "or a file of llama-imatrix --output-format gguf (--in-file reads older ones).")  # fmt: skip


def _imatrix_array(lib, imatrix: dict):  # zero-terminated, and what keeps its memory alive
    arrays = {name: np.ascontiguousarray(values, dtype=np.float32).ravel() for name, values in imatrix.items()}
    for name, values in arrays.items():
        if values.size == 0 or not np.isfinite(values).all() or (values < 0).any():
            raise QtutorError(f"The importance matrix of {name} has negative or non-finite values: compute it again.")
    rows = [(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
            for name, values in arrays.items()]  # fmt: skip
    return (lib.llama_model_imatrix_data * (len(rows) + 1))(*rows), arrays


def _override_array(lib, overrides):
    for _, name in overrides:
        if str(name).upper() not in STORED:
            raise QtutorError(f"There is no tensor type {name!r}: choose one of {', '.join(STORED)}.")
    rows = [(pattern.encode(), GGML[name.upper()].number) for pattern, name in overrides]
    return (lib.llama_model_tensor_override * (len(rows) + 1))(*rows, (None, lib.GGML_TYPE_COUNT))


def _run_quantize(src: Path, dst, kind, imatrix, tensor_types, dry_run: bool = False) -> None:
    lib = native()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run, params.allow_requantize = kind.ftype, n_threads(), dry_run, True
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


def quantize(src, dst, type: str, imatrix=None, tensor_types: dict | None = None, requantize: bool = False) -> Path:
    """Quantize a GGUF file and return the new file's path; same bytes as ``llama-quantize``.

    ``src`` is F32, F16 or BF16.  ``type`` is a name in :data:`TYPES`, e.g. ``"Q4_K_M"``.  ``imatrix`` maps GGUF
    tensor names to the mean squared activation of each column (float32, one value a column, see :func:`imatrix`), or is
    the path of llama-imatrix's file.
    ``tensor_types`` maps regular expressions to GGML types and overrules the recipe, e.g. ``{"attn_v": "Q8_0"}``.
    ``requantize`` takes a quantized ``src``, too (llama-quantize's --allow-requantize), with the errors that it has.
    The result appears under ``dst`` only when complete.
    """
    kind, src, dst = file_type(type), Path(src), Path(dst)
    source = check_gguf(src)
    if imatrix is not None and not isinstance(imatrix, dict):
        imatrix = read_imatrix(imatrix)
    if source.quantized and not requantize:
        raise QtutorError(f"{src.name} is already quantized ({', '.join(source.quantized)}): quantize from the F32, "
                          "F16 or BF16 file, as errors add up, or pass requantize=True.")  # fmt: skip
    if kind.needs_imatrix and not imatrix:
        raise QtutorError(f"{kind.name} needs an importance matrix: pass imatrix=llamacpp.imatrix(model, tokens).")
    columns = {tensor.name: tensor.shape[-1] for tensor in source.tensors}
    for name, values in (imatrix or {}).items():
        if np.size(values) != columns.get(name, np.size(values)):
            raise QtutorError(f"The importance matrix of {name} has {np.size(values)} values for {columns[name]} "
                              "columns: it belongs to another model, compute it from this one.")  # fmt: skip
    if imatrix and not set(imatrix) & set(columns):
        raise QtutorError(f"The importance matrix names no tensor of {src.name}: its keys are names such as "
                          "blk.0.attn_q.weight.")  # fmt: skip
    with contextlib.suppress(re.error, TypeError):  # which are refused below
        if tensor_types and not any(re.search(pattern, name) for pattern in tensor_types for name in columns):
            raise QtutorError(f"No tensor of {src.name} is called {' or '.join(tensor_types)}: GGUF's names are like "
                              "blk.0.attn_v.weight.")  # fmt: skip
    if dst.exists() and dst.samefile(src):
        raise QtutorError(f"'{dst}' is the source itself: give the result another name.")
    with files.whole(dst) as partial:
        partial.touch()  # llama.cpp's own message about a target that it cannot open names no file
        _run_quantize(src, partial, kind, imatrix, tensor_types)
    return trust(dst)


_PLAN = re.compile(r"\] +(\S+) +- \[[\d, ]+\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?")


def plan(src, type: str, imatrix: bool = False) -> list[Tensor]:
    """The tensor table (without offsets) of what :func:`quantize` would write: a dry run.  ``imatrix`` says whether
    there would be one: a few types choose other tensor types when there is."""
    kind, source = file_type(type), check_gguf(src)
    fake = {t.name: np.ones(t.shape[-1], np.float32) for t in source.tensors if len(t.shape) == 2} if imatrix else None
    _run_quantize(source.path, os.devnull, kind, fake, None, dry_run=True)
    chosen = {m[1]: (m[3] or m[2]).upper() for m in _PLAN.finditer("".join(log))}
    rows = []
    for t in source.tensors:
        kind = GGML[label := chosen.get(t.name, t.type)]
        rows.append(Tensor(t.name, label, t.shape, 0, prod(t.shape) // kind.weights * kind.nbytes))
    return rows


def imatrix(model, tokens, ctx: int = 512) -> dict[str, np.ndarray]:
    """The importance matrix: for each weight matrix, the mean of x**2 of every input column.

    ``model`` is a Hugging Face Llama; ``tokens`` is a 1-D sequence of token ids, cut into windows of ``ctx`` (a last
    shorter one is dropped).  Returns GGUF name -> float32 (columns,), for every matrix inside the layers.

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
    sums, hooks = {}, []

    def collect(name, module, args):
        sums[name] = sums.get(name, 0) + args[0].float().flatten(0, -2).square().sum(0, dtype=torch.float64)

    for path, module in model.named_modules():
        name = gguf_name(f"{path}.weight") or ""
        if name.startswith("blk.") and hasattr(module, "weight") and module.weight.ndim == 2:
            hooks.append(module.register_forward_pre_hook(partial(collect, name)))
    was_training = model.training
    try:
        model.eval()
        with torch.inference_mode():
            for window in tqdm(windows.reshape(-1, ctx), desc="imatrix", unit="window", leave=False):
                model(window[None].to(device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: (total / windows.numel()).float().cpu().numpy() for name, total in sums.items()}


def kv_bytes(meta: dict, width: float) -> int:
    """Bytes of keys and values a token, ``width`` bytes each, for a Llama's metadata; 0 for another architecture."""
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
        threads: by default the physical cores, and one for the decoding of a small model.
        exact: compute on the CPU, with keys and values in F32 and attention without the fused kernel: logits of an
            F32 file then agree with PyTorch's to 1e-4 (for some hundreds of tokens: the rotary angles drift apart by
            rounding as positions grow).  ``False`` is how people run llama.cpp (F16 cache, flash attention): two to
            three times faster and a little different.
        gpu_layers: layers to put on a GPU, by default all where the build has one, and none where ``exact``;
            ``on_gpu`` says whether any went there.
        sequences: that :meth:`step` runs side by side, each of ``ctx`` tokens, as the slots of llama-server do.
        kv_type: one of KV_TYPES for keys and values, instead of F32 (``exact``) or F16.
    """

    def __init__(self, path, ctx: int = 512, threads: int | None = None, *, exact: bool = True,
                 gpu_layers: int | None = None, sequences: int = 1, kv_type: str | None = None):
        self._model = self._ctx = None
        self.gguf, self.threads, self.exact = check_gguf(path, to_compute=True), threads, exact
        if "tokenizer.ggml.model" not in self.gguf.metadata:
            raise QtutorError(f"{self.gguf.path.name} holds no model with a tokenizer: give another file.")
        self.kv_type = str(kv_type or ("F32" if exact else "F16")).upper()
        if self.kv_type not in KV_TYPES:
            raise QtutorError(f"There is no cache type {kv_type!r}: choose one of {', '.join(KV_TYPES)}.")
        self.lib = lib = native()
        params = lib.llama_model_default_params()
        # NaN in a scale is an error then, not a wrong answer; but it reads all weights
        params.check_tensors = self.gguf.file_bytes < 2**33
        if exact or gpu_layers is not None:
            params.n_gpu_layers = gpu_layers or 0  # a GPU computes F32 products in TF32: not exact
        self.on_gpu = bool(lib.llama_supports_gpu_offload()) and params.n_gpu_layers != 0
        if self.on_gpu:
            params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # read through pinned buffers: faster than page faults of a map
        log.clear()
        self._model = lib.llama_model_load_from_file(os.fsencode(self.gguf.path), params)
        if not self._model:
            raise QtutorError(f"llama.cpp cannot load {self.gguf.path.name}: {reason('it gave no reason')}.")
        self._weight_buffers = _BUFFER.findall("".join(log))
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = lib.llama_vocab_n_tokens(self._vocab)
        try:
            self.resize(ctx, sequences)
        except QtutorError:
            self.close()
            raise

    def resize(self, ctx: int, sequences: int = 1) -> None:
        """Make another context on the same weights; every token is forgotten."""
        lib, ctx, sequences = self._open(), int(ctx), int(sequences)
        if ctx < 1 or sequences < 1:
            raise QtutorError(f"A context of {sequences} x {ctx} tokens is none: give at least 1.")
        kind, meta = GGML[self.kv_type], self.gguf.metadata
        logits = 4 * len(meta.get("tokenizer.ggml.tokens", ()))
        need = ctx * (sequences * kv_bytes(meta, kind.nbytes / kind.weights) + logits)
        if not self.on_gpu and need > psutil.virtual_memory().available:
            raise QtutorError(f"A context of {sequences} x {ctx} tokens needs {need / 2**30:.1f} GiB beside the "
                              "weights: make ctx smaller.")  # fmt: skip
        if self._ctx:
            lib.llama_free(self._ctx)
            self._ctx = None
        self.ctx, self.sequences = ctx, sequences
        params = lib.llama_context_default_params()
        params.n_seq_max, params.no_perf = sequences, True
        params.n_ctx = params.n_batch = ctx * sequences
        params.n_ubatch = min(512, params.n_batch)  # tokens computed at once: llama.cpp's own choice
        params.n_threads_batch = self.threads or n_threads()
        # one token of a small model is microseconds of work a layer: waking a second thread costs more
        params.n_threads = self.threads or (1 if self.gguf.n_weights < 50e6 else n_threads())
        params.type_k = params.type_v = GGML[self.kv_type].number
        if self.kv_type not in ("F32", "F16", "BF16"):  # quantized values are read by the fused kernel only
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        elif self.exact:
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self.exact:
            params.op_offload = False  # else a GPU build sends large products there all the same
        log.clear()
        self._ctx = lib.llama_init_from_model(self._model, params)
        if not self._ctx:
            self.close()
            raise QtutorError(f"llama.cpp cannot make a context of {sequences} x {ctx} tokens: {reason('no reason')}.")
        self._buffers = self._weight_buffers + _BUFFER.findall("".join(log))
        # One llama_batch over numpy arrays: setting four fields a token through ctypes takes longer than a small model.
        n = params.n_ctx
        self._token, self._position, self._sequence = (np.zeros(n, np.int32) for _ in range(3))
        self._output, self._ones = np.zeros(n, np.int8), np.ones(n, np.int32)
        self._pointers = self._sequence.ctypes.data + np.arange(n, dtype=np.uintp) * np.uintp(4)
        fields = {"token": self._token, "pos": self._position, "n_seq_id": self._ones, "seq_id": self._pointers,
                  "logits": self._output}  # fmt: skip
        kinds = dict(lib.llama_batch._fields_)
        self._batch = lib.llama_batch(**{k: ctypes.cast(array.ctypes.data, kinds[k]) for k, array in fields.items()})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        try:
            self.close()
        except Exception:  # noqa: S110 - the interpreter may be shutting down, and modules be gone
            pass

    def close(self) -> None:
        """Free the native memory; harmless when repeated."""
        if self._ctx:
            self.lib.llama_free(self._ctx)
        if self._model:
            self.lib.llama_model_free(self._model)
        self._ctx = self._model = None

    def _open(self):
        if not self._model:
            raise QtutorError("This model is closed: open it again with llamacpp.Model(path).")
        return self.lib

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, bos and eos added where the model asks for them; ``<|endoftext|>`` in the text becomes
        that token (both as Hugging Face does by default)."""
        lib = self._open()
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:
            raise QtutorError("The text has half a surrogate pair in it: it is not valid Unicode.") from None
        out = (lib.llama_token * (len(raw) + 4))()  # never more tokens than bytes, plus bos and eos
        return out[: lib.llama_tokenize(self._vocab, raw, len(raw), out, len(out), True, True)]

    def detokenize(self, tokens) -> str:
        """Text of token ids; bytes that are not UTF-8 (half an emoji) become U+FFFD."""
        lib, pieces = self._open(), []
        out = ctypes.create_string_buffer(2**16)
        for token in self._ids(tokens).tolist():  # llama_detokenize would also "clean up" spaces before punctuation
            n = lib.llama_token_to_piece(self._vocab, token, out, len(out), 0, True)
            pieces.append(out[: max(n, 0)])
        return b"".join(pieces).decode("utf-8", "replace")

    def _ids(self, tokens) -> np.ndarray:
        ids = np.asarray(tokens)
        if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self.n_vocab):
            raise QtutorError(f"Token ids must be integers in 0..{self.n_vocab - 1}: check the tokenizer.")
        return ids.astype(np.int32)

    def _decode(self, ids: np.ndarray, at: int, first: int) -> np.ndarray:
        """Run ``ids`` (sequences, n) at positions ``at``...; logits from each one's position ``first`` on (-1: the
        last), float32 (sequences * (n - first), vocab): llama.cpp's own memory, which the next call overwrites."""
        lib, batch, (rows, n) = self._open(), self._batch, ids.shape
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
        which the next call overwrites.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or len(ids) != self.sequences or not 0 < ids.shape[1] <= self.ctx - at or at < 0:
            raise QtutorError(f"step() takes ids of shape ({self.sequences}, n) at positions below {self.ctx}, and got "
                              f"{ids.shape} at {at}.")  # fmt: skip
        return self._decode(self._ids(ids), at, -1)

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
        """Logits after each token of one window, from an empty cache: float32, (n - first, vocab), n <= ctx.  ``first``
        leaves out the positions before it, which saves their share of the output matrix."""
        ids = self._ids(tokens)
        if not 0 < len(ids) <= self.ctx:
            raise QtutorError(f"logits() takes 1 to {self.ctx} tokens and got {len(ids)}: cut windows, or raise ctx.")
        if not 0 <= first < len(ids):
            raise QtutorError(f"first={first} must be one of the {len(ids)} positions: give 0 for all of them.")
        self.clear()
        return self._decode(ids[None], 0, first).copy()

    def generate(self, prompt, max_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """Continue ``prompt`` (text or token ids) and return the new text only.

        ``temperature=0`` takes the likeliest token (greedy); above, samples from softmax(logits/temperature).  Ends at
        an end-of-text token, at ``max_tokens``, or when the context is full.
        """
        ids = self._ids(self.tokenize(prompt) if isinstance(prompt, str) else prompt)
        if not 0 < len(ids) < self.ctx:
            raise QtutorError(f"The prompt has {len(ids)} tokens and must have 1 to {self.ctx - 1}: change it or ctx.")
        if temperature < 0:
            raise QtutorError("temperature is 0 (greedy) or positive.")
        rng, out, past = np.random.default_rng(seed), [], 0
        self.clear()
        while len(out) < max_tokens and past < self.ctx:
            logits, past = self._decode(ids[None], past, -1)[0], past + len(ids)
            token = int((logits + temperature * rng.gumbel(size=len(logits))).argmax())  # Gumbel's trick
            if self.lib.llama_vocab_is_eog(self._vocab, token):
                break
            out.append(token)
            ids = np.array([token], np.int32)
        return self.detokenize(out)


def _open_as_child(path: Path) -> int:
    """Do with a file what the parent of this process may want to do; print what is wrong with it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (2**33 + 4 * path.stat().st_size,) * 2)
    try:
        found = gguf_file.read(path)
    except Exception as err:
        print(" ".join(str(err).split())[:200].rstrip(".") or type(err).__name__)
        return gguf_file.DAMAGED
    gguf_file.trust(path)
    gguf_file.computed.update((True, False))
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
        plan(path, "Q4_0")
    return 0


if __name__ == "__main__":
    sys.exit(_open_as_child(Path(sys.argv[1])))
