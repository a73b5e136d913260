"""A 70B model on one GPU, measured without a 70B download: the real shape, random weights.

How large a model is, how fast it runs and what energy it takes depend on the *shapes and types* of its tensors, not on
the values in them: a matrix product takes as long with random numbers as with learned ones.  So :func:`write` makes a
GGUF file of Llama-2-70B's shape in which every tensor has exactly the type that llama.cpp's quantizer would give it
(``capacity.plan``), filled with valid random blocks, and :func:`measure` runs it.  **The weights are random, so the
text is nonsense; size, memory, speed and energy are those of the real file.**

The blocks come from llama.cpp's own quantizer, run on normally distributed weights (standard deviation 0.02, what
Llamas begin training with), so activations neither overflow nor vanish and the bits are as varied as real ones, which
matters for the power that a GPU draws.  One pool of blocks a type is repeated over the file, with a length that is a
prime number, so that no two rows of a matrix are alike for thousands of rows.

What is measured, in one process that loads the file once:

- GPU memory in use (NVML's figure, before and after), and llama.cpp's own account: weights, KV cache, buffers
- prompt processing and generation: tokens/s and joules a token, each over at least three seconds, loading excluded
- generation with a nearly full context, and with 1 to 32 sequences at once
- copy and read bandwidth of the device, and with it the ceiling: bandwidth / bytes read for a token
- llama-bench and llama-batched-bench on the same file, to check our figures against the field's tools

    python -m qtutor.rigs.llama70b --folder /dev/shm --types Q6_K,Q4_K_M      # writes data/results/<machine>/llama70b.json
    python -m qtutor.rigs.llama70b --tiny                                     # the same code in seconds on any CPU

The measuring runs in a child process: where native code dies (a GPU out of memory can end a process), the notebook
goes on and a row says ``"fits": false``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .. import QtutorError, llamacpp
from ..decide import capacity

GIB = 2**30
TYPES = ("Q6_K", "Q4_K_M", "Q8_0", "Q5_K_M")  # the seed case first: an interrupted recording has it
POOL_BLOCKS = 16411  # a prime: no row of a matrix starts at the same block as its neighbours
LEAST_FOR_ENERGY_S = 1.0  # the counter is renewed some ten times a second: shorter parts get no joules
STD = 0.02  # of the random weights: initializer_range in Llama's configuration

# Llama-2-70B made small: the same rules (grouped queries 8:1, ffn 3.5 x hidden), every row a multiple of 256
TINY = capacity.llama(256, 1024, 2, 8, 1, 512, 512)
# an eighth of its width with the same head size, and few layers: a minute's work for a CPU, more than its caches hold
SMALL = capacity.llama(1024, 3584, 6, 8, 1, 8192, 4096)
MEDIUM = capacity.llama(4096, 14336, 8, 32, 4, 32000, 4096)  # the same for a GPU: 2 GB in Q8_0

# What measure() runs.  "least_s": repeat until the measured part has taken so long, for the energy counter's sake.
FULL = {"prompt": 512, "generate": 128, "repeats": 3, "least_s": 3.0, "ctx": 4096, "depth": 3840, "depth_generate": 64,
        "batches": (1, 2, 4, 8, 16, 32), "batch_prompt": 128, "batch_generate": 64, "kv_type": "F16"}  # fmt: skip
QUICK = FULL | {"prompt": 128, "generate": 24, "repeats": 3, "least_s": 0.0, "ctx": 256, "depth": 0,
                "batches": (1, 4), "batch_prompt": 8, "batch_generate": 4}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- writing


def _ggml():
    """libggml's quantizer, with argument types: ctypes would guess wrong ones."""
    llamacpp._native()
    from llama_cpp import llama_cpp

    # libllama links libggml, and on most systems its handle finds the functions there: the build that computes, too
    lib = getattr(llama_cpp, "_lib", None)
    if not hasattr(lib, "ggml_quantize_chunk"):
        try:  # where LLAMA_CPP_LIB_PATH names another folder there may be no libggml beside the bindings
            from llama_cpp import _ggml

            lib = _ggml.libggml if hasattr(_ggml.libggml, "ggml_quantize_chunk") else None
        except (ImportError, AttributeError, OSError):  # FileNotFoundError among them
            lib = None
    if lib is None:
        raise QtutorError("This llama-cpp-python does not export ggml_quantize_chunk: install 0.3.36 or later.")
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
                                        ctypes.c_int64, ctypes.c_void_p]  # fmt: skip
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return lib


def quantize_blocks(kind: str, weights, threads: int | None = None) -> np.ndarray:
    """``weights`` (float, any shape; their number a multiple of the type's block) as GGML blocks of type ``kind``,
    uint8 (n, bytes per block), by llama.cpp's own quantizer.  Raises QtutorError for another type or number."""
    if kind not in llamacpp._quantizable():
        raise QtutorError(f"There is no tensor type {kind!r}: choose one of {', '.join(llamacpp._quantizable())}.")
    number = llamacpp._GGML_ID[kind]
    _, per_block, width = llamacpp.GGML_TYPES[number]
    weights = np.ascontiguousarray(weights, np.float32)
    if weights.size == 0 or weights.size % per_block:
        raise QtutorError(f"{weights.size} weights are no whole number of {kind} blocks of {per_block}.")
    weights = weights.reshape(-1, per_block)
    n = len(weights)
    if kind in ("F32", "F16"):
        return weights.astype({"F32": np.float32, "F16": np.float16}[kind]).view(np.uint8).reshape(n, width)
    if kind == "BF16":  # the upper half of a float32
        return np.ascontiguousarray(weights.view(np.uint16).reshape(n, 2)[:, 1:]).view(np.uint8).reshape(n, width)
    lib, out = _ggml(), np.empty((n, width), np.uint8)
    ones = np.ones(per_block, np.float32)
    importance = ones.ctypes.data if lib.ggml_quantize_requires_imatrix(number) else None
    # one call by itself: some types build their tables in the first
    lib.ggml_quantize_chunk(number, weights[:1].ctypes.data, out[:1].ctypes.data, 0, 1, per_block, importance)

    def work(part):  # ctypes lets go of the interpreter's lock: threads do run side by side
        rows = slice(*part)
        lib.ggml_quantize_chunk(number, weights[rows].ctypes.data, out[rows].ctypes.data, 0, part[1] - part[0],
                                per_block, importance)  # fmt: skip

    threads = threads or llamacpp.n_threads()
    edges = np.linspace(0, n, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(work, [(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]))
    return out


def blocks(kind: str, n: int, seed: int = 0, std: float = STD, threads: int | None = None) -> np.ndarray:
    """``n`` blocks of N(0, std) weights: :func:`quantize_blocks` of numpy's generator at ``seed``."""
    per_block = llamacpp.GGML_TYPES.get(llamacpp._GGML_ID.get(kind), ("", 1, 1))[1]
    weights = np.random.default_rng(seed).standard_normal((n, per_block), dtype=np.float32) * np.float32(std)
    return quantize_blocks(kind, weights, threads)


def _pieces(tensor: llamacpp.Tensor, pool: np.ndarray, first: int, most: int):
    """(offset in the file, offset in the pool, bytes) of the writes that fill one tensor, none longer than ``most``."""
    done, at = 0, first % pool.size
    while done < tensor.nbytes:
        n = min(tensor.nbytes - done, pool.size - at, most)
        yield tensor.offset + done, at, n
        done, at = done + n, (at + n) % pool.size


def write(path, config="Llama-2-70B", type: str = "Q6_K", seed: int = 0, threads: int | None = None) -> Path:
    """Write a GGUF file of the shape ``config`` (anything that ``capacity.config_of`` takes) with random weights.

    Every tensor has the type that llama.cpp's quantizer would choose for ``type``; norms are 1.  The same arguments
    give the same bytes.  The vocabulary is made up, of the right length.  ``threads`` write side by side (by default
    as many as there are cores, at most 8): 56 GB take ten to thirty seconds in memory-backed storage.

    The file appears under ``path`` only when complete.  Raises QtutorError for an unknown type or shape, and before
    it writes anything where the folder has too little room.
    """
    path = Path(path)
    planned = {t.name: t.type for t in capacity.plan(config, type)}
    need = capacity.size(config, type).file_bytes
    if path.is_dir():
        raise QtutorError(f"'{path}' is a folder: give the name of the .gguf file to write.")
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < need:
            raise QtutorError(f"'{path.parent}' has {free / 1e9:.1f} GB free and the file needs {need / 1e9:.1f} GB: "
                              "choose another folder or free some space.")  # fmt: skip
        name = config if isinstance(config, str) and config in capacity.MODELS else "llama"
        stub = capacity.write_stub(partial, config, planned, f"{name} {type}, random weights",
                                   ftype=llamacpp._type(type).ftype)  # fmt: skip
        _fill(stub, seed, threads or min(8, llamacpp.n_threads()))
        os.replace(partial, path)
    except OSError as err:
        raise QtutorError(f"'{path}' cannot be written ({err.strerror or err}): choose another folder or free some "
                          "space.") from None  # fmt: skip
    finally:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass
    return path


def _fill(stub: llamacpp.Gguf, seed: int, threads: int) -> None:
    from tqdm.auto import tqdm

    pools, jobs = {}, []
    for number, t in enumerate(stub.tensors):
        if len(t.shape) == 1:  # norms are 1; RoPE factors of 1 leave every frequency as it is
            pool, first = np.ones(t.nbytes // 4, np.float32).view(np.uint8), 0
        else:
            if t.type not in pools:
                _, per_block, width = llamacpp.GGML_TYPES[llamacpp._GGML_ID[t.type]]
                # about as many weights whatever the block, and never a round number of rows
                n = POOL_BLOCKS * 256 // per_block + (0 if per_block == 256 else 1)
                n = min(n, -(-max(x.nbytes for x in stub.tensors) // width))
                unit = blocks(t.type, n, seed).reshape(-1)
                # large writes: repeat the pool until it is about 64 MB
                pools[t.type] = np.tile(unit, max(1, min(2**26, t.nbytes) // unit.size)), width
            pool, width = pools[t.type]
            first = number * 7919 * width  # each tensor begins elsewhere in the pool
        jobs += [(pool, *piece) for piece in _pieces(t, pool, first, 2**28)]

    def work(job):
        pool, offset, start, n = job
        with open(stub.path, "r+b", buffering=0) as file:  # a handle for each: threads would share its position
            file.seek(offset)
            view = memoryview(pool)[start : start + n]
            while view:
                view = view[file.write(view) :]
        return n

    total = sum(n for _, _, _, n in jobs)
    quiet = total < 2**30
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False, disable=quiet)
    with bar, ThreadPoolExecutor(threads) as workers:
        for n in workers.map(work, jobs):
            bar.update(n)


# --------------------------------------------------------------------------------------------- energy and memory


class Gpu:
    """NVML's view of the GPU that this process computes on: memory in use, power, and energy since it was switched on.

    ``Gpu.open()`` is None where there is no NVIDIA GPU.  ``source`` says where joules come from: ``counter`` (the
    GPU's own total-energy counter) or ``sampled power`` (the mean of power readings times the time).
    """

    def __init__(self, nvml, handle):
        self.nvml, self.handle, self._powers, self._stop = nvml, handle, [], threading.Event()
        self.peak = 0
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self.source = "counter"
        except nvml.NVMLError:
            self.source = "sampled power"
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @classmethod
    def open(cls):
        try:
            import pynvml

            pynvml.nvmlInit()
            chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "none"
            if chosen.isdigit():
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(chosen))
            elif chosen.startswith("GPU-"):
                handle = pynvml.nvmlDeviceGetHandleByUUID(chosen)
            else:  # hidden on purpose, or a slice of a GPU, whose energy nobody counts
                return None
            pynvml.nvmlDeviceGetMemoryInfo(handle)
            return cls(pynvml, handle)
        except Exception:  # no library, no driver, no permission: nothing to report
            return None

    def used(self) -> int:
        """Bytes of GPU memory in use, by everybody."""
        return self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used

    def total(self) -> int:
        return self.nvml.nvmlDeviceGetMemoryInfo(self.handle).total

    def watts(self) -> float | None:
        try:
            return self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000
        except self.nvml.NVMLError:
            return None

    def _watch(self):
        while not self._stop.wait(0.02):
            try:
                self.peak = max(self.peak, self.used())
            except self.nvml.NVMLError:
                continue
            if self.source != "counter" and (watts := self.watts()) is not None:
                self._powers.append((time.perf_counter(), watts))

    def begin(self):
        """A mark for :meth:`joules`."""
        if self.source == "counter":
            return time.perf_counter(), self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        return time.perf_counter(), None

    def joules(self, mark) -> float | None:
        """Joules that the whole GPU took since ``mark``, idle power included."""
        began, millijoules = mark
        if millijoules is not None:
            return (self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - millijoules) / 1000
        seen = [watts for when, watts in self._powers if when >= began]
        return float(np.mean(seen)) * (time.perf_counter() - began) if seen else None

    def close(self):
        self._stop.set()
        self._thread.join()


def bandwidth(device: str | None = None, gib: float | None = None) -> dict:
    """``copy_gb_per_s`` (bytes read plus bytes written), ``read_gb_per_s`` (a sum over a tensor), each the best of
    several runs, and ``bandwidth_gb_per_s``, the better of the two: what a simple kernel gets, in GB/s (10^9).

    ``device`` is a torch device, the GPU where there is one; ``gib`` the size of the tensor, beyond every cache.
    """
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    n = int((gib or (4 if gpu else 0.25)) * GIB) // 4
    a, b = torch.ones(n, device=device), torch.empty(n, device=device)  # zeros could be one page, mapped n times

    def best(fn, nbytes, repeats=12):
        times = []
        for _ in range(repeats + 3):
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            fn()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return nbytes / min(times[3:]) / 1e9

    found = {"copy_gb_per_s": best(lambda: b.copy_(a), 8 * n), "read_gb_per_s": best(lambda: a.sum(), 4 * n)}
    if gpu:  # PyTorch would keep it, and the model could not have it
        del a, b
        torch.cuda.empty_cache()
    return found | {"bandwidth_gb_per_s": max(found.values())}


# ------------------------------------------------------------------------------------------------------- measuring

_BUFFER = re.compile(r"(\S+) +(model|KV|compute|output) buffer size *= *([\d.]+) MiB")


def _buffers() -> dict:
    """MiB by (device, kind) from what llama.cpp logged since the log was cleared.

    ``host`` is memory of the computer, ``device`` the GPU's; on a CPU everything is ``host``.
    """
    found: dict = {}
    for name, kind, mib in _BUFFER.findall("".join(llamacpp._log)):
        where = "host" if "CPU" in name or "Host" in name else "device"
        found[where, kind] = found.get((where, kind), 0.0) + float(mib)
    return found


class _Context:
    """One llama.cpp context for ``sequences`` sequences of ``ctx`` tokens each, as people run it: fused attention."""

    def __init__(self, lib, model, ctx: int, sequences: int, kv_type: str, threads: int | None):
        params = lib.llama_context_default_params()
        per_sequence = -(-ctx // 256) * 256
        params.n_ctx, params.n_seq_max = per_sequence * sequences, sequences
        params.n_batch, params.n_ubatch = 2048, 512  # llama-bench's own
        params.kv_unified = False
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = llamacpp._GGML_ID[kv_type]
        params.n_threads = params.n_threads_batch = threads or llamacpp.n_threads()
        params.no_perf = True
        self.lib, self.n_vocab = lib, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._ctx = lib.llama_init_from_model(model, params)
        if not self._ctx:
            raise QtutorError(f"The device has no room for a context of {sequences} x {per_sequence} tokens "
                              f"({llamacpp._reason('no reason given')}): use a smaller type or context.")  # fmt: skip
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)
        self._room = params.n_batch
        self._rng = np.random.default_rng(0)

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self._ctx), False)

    def _put(self, positions, sequences, last):
        batch, n = self._batch, len(positions)
        batch.n_tokens = n
        np.ctypeslib.as_array(batch.token, (n,))[:] = self._rng.integers(0, self.n_vocab, n)
        np.ctypeslib.as_array(batch.pos, (n,))[:] = positions
        np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1
        for i, s in enumerate(sequences):
            batch.seq_id[i][0] = s
            batch.logits[i] = last[i]
        status = self.lib.llama_decode(self._ctx, batch)
        if status != 0:
            raise QtutorError(f"llama.cpp could not run the model (status {status}): "
                              f"{llamacpp._reason('no reason given')}.")  # fmt: skip

    def prompt(self, tokens: int, sequences: int = 1, past: int = 0):
        """Random tokens for each sequence, ``tokens`` long, in batches of at most 2048; waits for the result."""
        positions = np.tile(np.arange(past, past + tokens), sequences)
        owner = np.repeat(np.arange(sequences), tokens)
        last = (positions == past + tokens - 1).astype(int)
        for at in range(0, len(positions), self._room):
            part = slice(at, at + self._room)
            self._put(positions[part], owner[part].tolist(), last[part].tolist())
        self.lib.llama_synchronize(self._ctx)

    def generate(self, tokens: int, sequences: int = 1, past: int = 0):
        """``tokens`` steps, in each one token for every sequence; each step waits for the one before, as it must."""
        owner = list(range(sequences))
        for i in range(tokens):
            self._put(np.full(sequences, past + i), owner, [1] * sequences)
            self.lib.llama_synchronize(self._ctx)

    def finite(self) -> bool:
        """Whether the last logits are numbers: random weights must not have overflowed."""
        pointer = ctypes.cast(self.lib.llama_get_logits_ith(self._ctx, -1), ctypes.POINTER(ctypes.c_float))
        return bool(np.isfinite(np.ctypeslib.as_array(pointer, (self.n_vocab,))).all())

    def close(self):
        if self._ctx:
            self.lib.llama_batch_free(self._batch)
            self.lib.llama_free(self._ctx)
        self._ctx = None


def _region(gpu, run, tokens: int, repeats: int, least_s: float, before=None) -> dict:
    """Repeat ``run``, with ``before`` (quick, untimed) ahead of each; return speed, its standard error, energy a token.

    The energy is that of all repeats together, and None where they are too short for the counter.
    """
    times, mark = [], None
    while len(times) < repeats or sum(times) < least_s:
        if before:
            before()
        if gpu and mark is None:
            mark = gpu.begin()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    joules = gpu.joules(mark) if gpu else None
    speeds = tokens / np.array(times)
    error = float(speeds.std(ddof=1) / np.sqrt(len(speeds))) if len(speeds) > 1 else None
    found = {"tokens_per_s": float(speeds.mean()), "se": error, "joules_per_token": None, "watts": None}
    if joules is not None and sum(times) >= LEAST_FOR_ENERGY_S:
        found |= {"joules_per_token": joules / (tokens * len(times)), "watts": joules / sum(times)}
    return found


def _named(found: dict, what: str) -> dict:
    return {f"{what}_tokens_per_s": found["tokens_per_s"], f"{what}_se": found["se"],
            f"joules_per_{'prompt' if what == 'prompt' else 'generated'}_token": found["joules_per_token"],
            f"{what}_watts": found["watts"]}  # fmt: skip


def _load(lib, gguf: llamacpp.Gguf, gpu) -> tuple[object, float]:
    weights = sum(t.nbytes for t in gguf.tensors)
    if gpu and lib.llama_supports_gpu_offload():
        if weights > gpu.total() - gpu.used():
            raise QtutorError(f"The weights ({weights / GIB:.1f} GiB) are larger than the free GPU memory "
                              f"({(gpu.total() - gpu.used()) / GIB:.1f} GiB): use a smaller type.")  # fmt: skip
    elif weights > 16 * GIB:
        raise QtutorError("This build of llama.cpp computes on the CPU only, which takes hours at this size: "
                          "install llama-cpp-python with CMAKE_ARGS=-DGGML_CUDA=ON.")  # fmt: skip
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 999
    params.split_mode = lib.LLAMA_SPLIT_MODE_NONE  # one GPU is the point, however many there are
    params.main_gpu = 0
    if gpu:
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # read through pinned buffers: faster than page faults of a map
    llamacpp._log.clear()
    start = time.perf_counter()
    model = lib.llama_model_load_from_file(os.fsencode(gguf.path), params)
    if not model:
        raise QtutorError(f"{gguf.path.name} cannot be loaded: {llamacpp._reason('no reason given')}.")
    return model, time.perf_counter() - start


def _measure_here(path: Path, job: dict, say) -> None:
    """Load the file once and hand each row to ``say`` as soon as it is there.  Runs in the child process."""
    gguf = llamacpp.check_gguf(path)
    gpu = Gpu.open()
    before, idle = (gpu.used(), gpu.watts()) if gpu else (0, None)
    lib = llamacpp._native()
    if gpu and not lib.llama_supports_gpu_offload():
        gpu.close()
        gpu = None
    used = (lambda: (gpu.used() - before) / GIB) if gpu else (lambda: None)
    model, load_s = _load(lib, gguf, gpu)
    weights = sum(t.nbytes for t in gguf.tensors)
    embedding = next(t.nbytes for t in gguf.tensors if t.name == "token_embd.weight")
    untied = any(t.name == "output.weight" for t in gguf.tensors)
    threads, kv = job.get("threads"), job["kv_type"]
    row = {"kind": "model", "type": job["type"], "fits": True, "file_bytes": gguf.file_bytes,
           "weights_gib": weights / GIB, "read_bytes_per_token": weights - (embedding if untied else 0),
           "load_s": load_s, "gpu_used_loaded_gib": used(), "energy_source": gpu.source if gpu else None,
           "idle_watts": idle}  # fmt: skip
    ctx = _Context(lib, model, job["ctx"], 1, kv, threads)
    buffers = _buffers()
    for kind in ("model", "KV", "compute"):
        for where in ("device", "host"):
            row[f"{where}_{kind.lower()}_mib"] = buffers.get((where, kind), 0.0)
    ctx.prompt(job["prompt"])
    ctx.clear()
    ctx.generate(4)  # kernels chosen, clocks up, graphs captured: not measured
    found = _region(gpu, lambda: ctx.prompt(job["prompt"]), job["prompt"], job["repeats"], job["least_s"], ctx.clear)
    row |= {"prompt_tokens": job["prompt"], "generate_tokens": job["generate"], "ctx": job["ctx"], "kv_type": kv}
    row |= _named(found, "prompt")
    n = job["generate"]
    found = _region(gpu, lambda: ctx.generate(n), n, job["repeats"], job["least_s"], ctx.clear)
    row |= _named(found, "generate") | {"gpu_used_gib": used()}
    if not ctx.finite():
        raise QtutorError("The random weights overflow in this shape: make STD in qtutor/llama70b.py smaller.")
    say(row)
    if job["depth"]:
        ctx.clear()
        found = _region(gpu, lambda: ctx.prompt(job["depth"]), job["depth"], 1, 0)
        deep = {"kind": "depth", "type": job["type"], "depth": job["depth"], "kv_type": kv} | _named(found, "prompt")
        n = job["depth_generate"]
        found = _region(gpu, lambda: ctx.generate(n, past=job["depth"]), n, 1, 0)
        say(deep | {"generate_tokens": n} | _named(found, "generate") | {"gpu_used_gib": used()})
    ctx.close()
    for batch in job["batches"]:
        say(_batch(lib, model, gpu, job, batch, used))
    lib.llama_model_free(model)
    if gpu:
        gpu.close()


def _batch(lib, model, gpu, job: dict, batch: int, used) -> dict:
    """One row: ``batch`` sequences, each with a prompt of its own, writing side by side."""
    prompt, generate = job["batch_prompt"], job["batch_generate"]
    row = {"kind": "batch", "type": job["type"], "batch": batch, "prompt_tokens": prompt, "generate_tokens": generate}
    try:
        ctx = _Context(lib, model, prompt + generate, batch, job["kv_type"], job.get("threads"))
    except QtutorError as err:
        return row | {"fits": False, "note": str(err)}
    try:
        ctx.prompt(8, batch)
        ctx.generate(4, batch, past=8)
        ctx.clear()
        found = _region(gpu, lambda: ctx.prompt(prompt, batch), prompt * batch, 1, 0)
        row |= {"fits": True} | _named(found, "prompt")
        found = _region(gpu, lambda: ctx.generate(generate, batch, past=prompt), generate * batch, 1, 0)
        return row | _named(found, "generate") | {"ms_per_step": 1000 * batch / found["tokens_per_s"],
                                                  "gpu_used_gib": used()}  # fmt: skip
    finally:
        ctx.close()


def _child(argv, limit_s: float, on_row) -> str | None:
    """Run this module in a fresh process; hand over its rows as they come; return why it stopped early, or None."""
    command = [sys.executable, "-m", "qtutor.rigs.llama70b", *argv]
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    error = None
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # a library's chatter
                if "error" in row:
                    error = row["error"]
                else:
                    on_row(row)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
        stderr.seek(0)
        last = [line.strip() for line in stderr.read().splitlines() if line.strip()][-1:]
    if error or code == 0:
        return error
    return f"The measuring process ended with code {code} ({last[0][:200] if last else 'time is up or out of memory'})."


def measure(path, type: str | None = None, limit_s: float = 300.0, threads: int | None = None,
            device_bandwidth: dict | None = None, on_row=None, **settings) -> list[dict]:
    """Measure a GGUF model in a child process and return rows; see the module's docstring for what is measured.

    ``type`` names the rows (by default read off the file).  ``settings`` override :data:`FULL`, e.g.
    ``batches=(1, 8)``.  ``device_bandwidth`` is the result of :func:`bandwidth`; with it, each row with a generation
    speed gets ``ceiling_tokens_per_s`` and the ``ceiling_share`` that was reached.  ``on_row`` is called with each row
    as it arrives.  The child process is ended after ``limit_s``.

    Rows have a ``kind``: ``model`` (one; ``fits`` is False, with a ``note``, where memory did not suffice), ``depth``
    and ``batch``.  Units are in the keys; what this machine cannot measure is None.  Raises QtutorError for a
    file that is not sound and for settings that do not exist.
    """
    gguf = llamacpp.check_gguf(path)
    if unknown := set(settings) - set(FULL):
        raise QtutorError(f"measure() has no setting {sorted(unknown)[0]!r}: choose from {', '.join(FULL)}.")
    weights_type = max(gguf.tensors, key=lambda t: t.nbytes).type
    job = FULL | settings | {"type": type or weights_type, "threads": threads}
    job["kv_type"] = str(job["kv_type"]).upper()
    capacity.kv_width(job["kv_type"])  # one clear sentence where there is no such type
    if job["depth"] + job["depth_generate"] > job["ctx"] or max(job["prompt"], job["generate"]) > job["ctx"]:
        raise QtutorError(f"The settings need more than ctx={job['ctx']} tokens of context: make ctx larger.")
    rows: list[dict] = []

    def add(row):
        read = row.get("read_bytes_per_token") or (rows[0]["read_bytes_per_token"] if rows else None)
        if device_bandwidth and row.get("decode_tokens_per_s") and read:
            row |= _ceiling(gguf, row, read, device_bandwidth["bandwidth_gb_per_s"], job["kv_type"])
        rows.append(row)
        if on_row:
            on_row(row)

    why = _child(["--child", os.fspath(path), "--job", json.dumps(job)], limit_s, add)
    if why and not any(row["kind"] == "model" for row in rows):
        add({"kind": "model", "type": job["type"], "fits": False, "note": why, "file_bytes": gguf.file_bytes,
             "weights_gib": sum(t.nbytes for t in gguf.tensors) / GIB})  # fmt: skip
    elif why:
        add({"kind": "note", "type": job["type"], "note": why})
    return rows


def _ceiling(gguf, row: dict, read: int, gb_per_s: float, kv_type: str) -> dict:
    """Tokens/s when memory did nothing but deliver: weights once a step, each sequence's keys and values besides.

    The cache grows while we write, so its mean length counts.
    """
    batch = row.get("batch", 1)
    past = row.get("depth") or (row["prompt_tokens"] if row["kind"] == "batch" else 0)
    cached = past + row["generate_tokens"] / 2
    step = read + batch * cached * llamacpp._kv_bytes(gguf.metadata, 1) * capacity.kv_width(kv_type)
    ceiling = batch * gb_per_s * 1e9 / step
    return {"ceiling_tokens_per_s": ceiling, "ceiling_share": row["decode_tokens_per_s"] / ceiling}


def run_tools(path, type: str, threads=None, limit_s: float = 120.0, job: dict = FULL) -> list[dict]:
    """The same tests by llama.cpp's own programs: rows of kind ``tool``; [] where there are none.

    On a GPU machine the PATH is looked at first: it may hold a build for the GPU beside pip's for the CPU.
    """
    rows, n_threads = [], str(threads or llamacpp.n_threads())
    longest = job["batch_prompt"] + job["batch_generate"]
    many = sorted({job["batches"][0], job["batches"][-1]}) if job["batches"] else []
    runs = {
        "llama-bench": ["-p", str(job["prompt"]), "-n", str(job["generate"]), "-r", "2", "-ngl", "99", "-fa", "on",
                        "-sm", "none", "-t", n_threads, "-o", "jsonl"],
        "llama-batched-bench": ["-npp", str(job["batch_prompt"]), "-ntg", str(job["batch_generate"]), "-npl",
                                ",".join(map(str, many)), "-c", str(longest * max(many, default=1)), "-ngl", "99",
                                "-fa", "on", "-sm", "none", "-t", n_threads, "--output-format", "jsonl"],
    }  # fmt: skip
    for name, options in runs.items():
        try:
            program = shutil.which(name) or llamacpp.tool(name)
            done = subprocess.run([os.fspath(program), "-m", os.fspath(path), *options], capture_output=True, text=True,
                                  timeout=limit_s, check=False)  # fmt: skip
        except (QtutorError, OSError, subprocess.SubprocessError):
            continue
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                rows.append(_tool_row(name, type, json.loads(line)))
    return rows


def _tool_row(name: str, type: str, found: dict) -> dict:
    row = {"kind": "tool", "tool": name, "type": type}
    if name == "llama-bench":
        what = "generate" if found["n_gen"] else "prompt"
        return row | {f"tool_{what}_tokens_per_s": found["avg_ts"], f"tool_{what}_stdev": found["stddev_ts"],
                      "build": found.get("build_commit"), "backends": found.get("backends")}  # fmt: skip
    return row | {"batch": found["pl"], "tool_prefill_tokens_per_s": found["speed_pp"],
                  "tool_decode_tokens_per_s": found["speed_tg"]}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- recording


def ready(folder, type: str = "Q6_K", config="Llama-2-70B") -> tuple[bool, str]:
    """Whether :func:`record` can run here: ``(True, what there is)`` or ``(False, what is missing)``, one sentence."""
    gpu, size = Gpu.open(), capacity.size(config, type)
    if gpu is None:
        return False, "There is no NVIDIA GPU here."
    total = gpu.total()
    gpu.close()
    need = capacity.fits(config, type, FULL["ctx"]).total_gib
    if not llamacpp._native().llama_supports_gpu_offload():
        return False, "This llama.cpp was built without CUDA: install llama-cpp-python with CMAKE_ARGS=-DGGML_CUDA=ON."
    if total / GIB < need:
        return False, f"The GPU has {total / GIB:.0f} GiB, and {type} needs {need:.0f}."
    if not Path(folder).is_dir() or shutil.disk_usage(folder).free < size.file_bytes:
        return False, f"'{folder}' has no room for a file of {size.gb:.0f} GB."
    return True, f"A GPU of {total / GIB:.0f} GiB, and room for the file in '{folder}'."


def record(folder, types=TYPES, config="Llama-2-70B", budget_s: float = 420.0, tools: str = "first", name="llama70b",
           directory=None, keep: bool = True, seed: int = 0, say=print, **settings) -> list[dict]:
    """Write, measure and delete a file of each type in ``folder``; save the rows after each.  Returns all rows.

    ``folder``: memory-backed storage such as /dev/shm, with room for one file at a time.  ``tools``: "first", "all" or
    "none" of the types are also run through llama.cpp's programs.  ``budget_s``: no type is begun that is not likely to
    end within it.  ``keep``: rows that this machine recorded before, of types not measured now, stay.  ``directory``:
    where results go instead of the course's data/results.  Raises QtutorError for an unknown type and a full folder.
    """
    from .. import results

    folder, began = Path(folder), time.perf_counter()
    types = [llamacpp._type(t).name for t in types]
    if not folder.is_dir():
        raise QtutorError(f"There is no folder '{folder}': give one with room for the model, such as /dev/shm.")
    rows: list[dict] = []
    _child(["--child-bandwidth"], 120, rows.append)
    if not rows:
        raise QtutorError("The memory bandwidth could not be measured: does 'python -m qtutor doctor' find the GPU?")
    found = rows[0]
    say(f"memory bandwidth: copy {found['copy_gb_per_s']:.0f} GB/s, read {found['read_gb_per_s']:.0f} GB/s")
    longest = 0.0  # of writing and measuring one type, without the tools
    for number, type in enumerate(types):
        start = time.perf_counter()
        if number and start - began + longest > budget_s:
            say(f"{type}: left out, {start - began:.0f} of {budget_s:.0f} s are used")
            continue
        path = folder / f"qtutor-{os.getpid()}-{type}.gguf"
        try:
            write(path, config, type, seed)
            write_s = time.perf_counter() - start
            say(f"{type}: {path.stat().st_size:,} bytes written in {write_s:.0f} s")
            measured = measure(path, type, device_bandwidth=found, on_row=lambda row: say("  " + _short(row)),
                               **settings)  # fmt: skip
            measured[0]["write_s"] = write_s
            longest = max(longest, time.perf_counter() - start)
            before = _kept(name, {type, *(row.get("type") for row in rows)}, directory, keep) + rows
            saved = results.save(name, before + measured, directory=directory)
            if measured[0]["fits"] and (tools == "all" or (tools == "first" and not number)):
                for row in run_tools(path, type, job=FULL | settings):
                    say("  " + _short(row))
                    measured.append(row)
                results.save(name, before + measured, directory=directory)
            rows += measured
        finally:
            path.unlink(missing_ok=True)
        say(f"{type}: {time.perf_counter() - start:.0f} s; saved {saved.name}")
    return rows


def _kept(name: str, types, directory, keep: bool) -> list[dict]:
    """Rows of this very device that are on file, but for those of ``types``, which are measured now."""
    from .. import measure as machine
    from .. import results

    about = machine.machine()
    where = results.machine_folder(about)
    if not keep or not results.exists(name, where, directory):
        return []
    old = results.load(name, where, directory)
    if old.device != about["device"]:
        return []
    return [row for row in old.rows if row.get("type") and row["type"] not in types]


def _short(row: dict) -> str:
    parts = [str(row.get(key)) for key in ("kind", "tool") if row.get(key)]
    for key, unit in (("batch", ""), ("depth", ""), ("prefill_tokens_per_s", ""), ("decode_tokens_per_s", ""),
                      ("tool_prefill_tokens_per_s", ""), ("tool_decode_tokens_per_s", ""), ("gpu_used_gib", ""),
                      ("joules_per_decode_token", ""), ("ceiling_share", ""), ("load_s", ""), ("note", "")):
        value = row.get(key)
        if value is not None:
            parts.append(f"{key}={value:.4g}{unit}" if isinstance(value, float) else f"{key}={value}")
    return " ".join(parts)


def main(argv=None) -> int:
    """The command line: ``python -m qtutor.rigs.llama70b --help``.  Returns 0, or 1 after one sentence of what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m qtutor.rigs.llama70b", description="Measure a 70B-shaped model.")
    parser.add_argument("--folder", help="where the files go, one at a time: memory-backed, e.g. /dev/shm")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp types, by commas")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further type is begun")
    parser.add_argument("--tools", choices=("first", "all", "none"), default="first")
    parser.add_argument("--tiny", action="store_true", help="two layers and short runs, to try the code anywhere")
    parser.add_argument("--small", action="store_true", help="the shape that the notebook runs on a CPU")
    parser.add_argument("--out", help="folder for the results instead of data/results")
    parser.add_argument("--name", default="llama70b")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--child-bandwidth", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    def say(row):
        print(json.dumps(row), flush=True)

    try:
        if args.child_bandwidth:
            say({"kind": "bandwidth"} | bandwidth())
            return 0
        if args.child:
            _measure_here(Path(args.child), json.loads(args.job), say)
            return 0
        small = args.tiny or args.small
        if args.small and not args.out:
            parser.error("--small needs --out: data/results is for the real shape")
        with tempfile.TemporaryDirectory(prefix="qtutor-70b-") as temporary:
            config = TINY if args.tiny else SMALL if args.small else "Llama-2-70B"
            out = args.out or (temporary if small else None)
            record(args.folder or (temporary if small else "/dev/shm"), args.types.split(","), config, args.budget,
                   args.tools, args.name, out, say=lambda text: print(text, flush=True),
                   **(QUICK if small else {}))  # fmt: skip
    except QtutorError as err:
        if args.child:
            say({"error": str(err)})
        else:
            print(err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
