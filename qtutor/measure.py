"""How long, how much memory, on what machine: measurements that mean what they say.

Three mistakes make most timings wrong.  A GPU works *asynchronously*: the call returns before the work is done, so
a wall clock around it measures the launch (here: CUDA events, and a synchronization before reading them).  The
*first* calls pay for compilation, caches and memory pools (here: a warm-up that is thrown away).  And *means* follow
the one run that the operating system disturbed (here: the median, with the 10th and 90th percentile beside it to
show the noise).

    t = measure.time_ms(lambda: model(ids), warmup=3, repeats=20)
    print(t)                                    # 12.3 ms (12.1 to 13.0, n=20)

A language model has two speeds.  *Prefill* reads the whole prompt at once and is limited by arithmetic; *decoding*
writes one token after the other, reads every weight for each, and is limited by memory.  One figure for both means
neither, so :func:`generation_speed` gives them apart, for a Hugging Face model and for a GGUF file alike.

Joules, money and emissions are in :mod:`qtutor.energy`.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import QtutorError

GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, 10th and 90th percentile of ``n`` calls."""

    median_ms: float
    p10: float
    p90: float
    n: int

    def per_second(self, amount: float) -> float:
        """Throughput when one call handles ``amount`` (tokens, operations): amount per second at the median."""
        return amount / self.median_ms * 1000

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.p10:.3g} to {self.p90:.3g}, n={self.n})"


def _on_gpu(device) -> bool:
    torch = sys.modules.get("torch")  # who has not imported torch has nothing on a GPU to wait for
    if torch is None and device is None:
        return False
    import torch

    if device is None:
        return torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.device(device).type == "cuda"


def synchronize(device=None) -> None:
    """Wait until a GPU has done all that it was given; does nothing without one."""
    if _on_gpu(device):
        import torch

        torch.cuda.synchronize(device)


def _time_cuda(fn: Callable, repeats: int, device) -> list[float]:
    import torch

    with torch.cuda.device(device):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _time_cpu(fn: Callable, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(1000 * (time.perf_counter() - start))
    return times


def time_ms(fn: Callable[[], object], warmup: int = 3, repeats: int = 20, device=None) -> Timing:
    """Time ``fn()``: ``warmup`` calls thrown away, then the median of ``repeats``.

    ``device`` is where the work happens; by default the current CUDA GPU if this process has used one, else the CPU.
    On a GPU each call is timed by its own pair of CUDA events, so the figure is the GPU's time from one call to the
    next, launch gaps included.  Raises QtutorError for ``repeats < 1`` or ``warmup < 0``.
    """
    if repeats < 1 or warmup < 0:
        raise QtutorError(f"Timing needs repeats >= 1 and warmup >= 0, not {repeats} and {warmup}.")
    for _ in range(warmup):
        fn()
    synchronize(device)
    times = _time_cuda(fn, repeats, device) if _on_gpu(device) else _time_cpu(fn, repeats)
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return Timing(float(median), float(p10), float(p90), repeats)


def torch_timer(fn: Callable[[], object], seconds: float = 0.5) -> Timing:
    """Time ``fn()`` with ``torch.utils.benchmark.Timer``, PyTorch's own instrument, to check :func:`time_ms` by.

    It warms up, synchronizes GPUs and repeats for about ``seconds``; its values are means of blocks of calls, so the
    spread comes out smaller.  Left alone it runs on *one* CPU thread; here it gets as many as PyTorch uses otherwise,
    without which the two would not measure the same thing.
    """
    import torch
    from torch.utils import benchmark

    if not seconds > 0:
        raise QtutorError(f"torch_timer needs seconds > 0, not {seconds}.")
    timer = benchmark.Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    times = 1000 * np.array(timer.blocked_autorange(min_run_time=seconds).times)
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return Timing(float(median), float(p10), float(p90), len(times))


# ------------------------------------------------------------------------------------------------- prefill, decode


class _HuggingFaceRuns:
    """A causal language model of transformers (or any module with its call), with transformers' own KV cache."""

    def __init__(self, model, prompt: int, new: int, batch: int):
        import torch

        self.model = model
        self.device = self.power = next(model.parameters()).device
        config, limit = model.config, getattr(model.config, "max_position_embeddings", None)
        if limit and prompt + new > limit:
            raise QtutorError(f"{prompt} + {new} tokens do not fit this model's context of {limit}: use fewer.")
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, config.vocab_size, (batch, prompt), generator=generator).to(self.device)
        self.cache = self.kept = self.token = None

    def _run(self, ids, cache):
        import torch

        with torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.past_key_values, out.logits[:, -1:].argmax(-1)

    def prefill(self):
        self.cache, self.token = self._run(self.ids, None)
        self.first = self.token
        self.kept = [(layer.keys, layer.values) for layer in self.cache.layers]

    def rewind(self):
        from transformers import DynamicCache

        self.cache, self.token = DynamicCache(), self.first  # cache.crop() means two things in two versions of 5.x
        for i, (keys, values) in enumerate(self.kept):
            self.cache.update(keys, values, i)

    def step(self):
        self.cache, self.token = self._run(self.token, self.cache)

    def close(self):
        self.cache = self.kept = None


class _GraphRuns(_HuggingFaceRuns):
    """The same, replayed from CUDA graphs: no launches in the figure, as in a serving engine.

    A graph has fixed shapes, so every decoding step reads a cache of the full length.
    """

    def __init__(self, model, prompt: int, new: int, batch: int):
        import torch

        from .rigs.fp8_bench import _captured
        from .rigs.fp8_models import FixedCache, llama_logits

        super().__init__(model, prompt, new, batch)
        if self.device.type != "cuda" or not hasattr(getattr(model, "model", None), "rotary_emb"):
            raise QtutorError("graph=True needs a Llama model on a CUDA GPU: leave it out.")
        head = model.lm_head.weight
        dtype = head.dtype if head.is_floating_point() else torch.bfloat16
        cache = FixedCache(model.config, batch, prompt + new, self.device, dtype)
        token = self.ids[:, :1].contiguous()
        with torch.no_grad():
            self._prefill, _ = _captured(lambda: llama_logits(model, self.ids, last_only=True).argmax(-1))
            self._step, _ = _captured(lambda: llama_logits(model, token, cache).argmax(-1))
        self._held = cache, token

    def prefill(self):
        self._prefill()

    def rewind(self):
        pass

    def step(self):
        self._step()

    def close(self):
        self._prefill = self._step = self._held = None


class _LlamaCppRuns:
    """A llamacpp.Model with a context of its own, as people run llama.cpp: F16 cache, flash attention.

    ``batch`` sequences share each call, as the slots of llama-server do.
    """

    device = "cpu"  # of the clock: reading the logits waits for a GPU too, so that the wall clock is right

    def __init__(self, model, prompt: int, new: int, batch: int, threads):
        import psutil

        from . import llamacpp

        self.lib, self.prompt, self.batch, self.n_vocab = model._open(), prompt, batch, model.n_vocab
        self.power = "cuda" if getattr(model, "on_gpu", False) else "cpu"
        tokens = batch * (prompt + new)
        need = tokens * llamacpp.kv_bytes(model.gguf.metadata, 2)
        if need > psutil.virtual_memory().available:
            raise QtutorError(f"A cache of {tokens} tokens needs {need / GIB:.1f} GiB: use a smaller batch or prompt.")
        params = model._context_params(threads, False)
        params.n_ctx, params.n_seq_max = tokens, batch
        params.n_batch, params.n_ubatch = batch * prompt, min(512, batch * prompt)  # 512: llama.cpp's default
        self.context = self.lib.llama_init_from_model(model._model, params)
        if not self.context:
            raise QtutorError(f"llama.cpp cannot make a context of {batch} x {prompt + new} tokens: use fewer.")
        self.model = model  # whose weights the context uses
        self.ids = np.random.default_rng(0).integers(0, self.n_vocab, (batch, prompt), dtype=np.int32)
        self.batches = {n: self._new_batch(n) for n in (prompt, 1)}

    def _new_batch(self, n: int):
        """A llama_batch of ``n`` tokens for each sequence, and numpy views of its tokens and positions.

        Filling one through ctypes takes longer than a small model takes to compute, so it is done once.
        """
        import ctypes

        rows = self.batch
        batch = self.lib.llama_batch_init(rows * n, 0, 1)
        batch.n_tokens = rows * n
        for i in range(rows * n):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i // n, i % n == n - 1

        def view(array):
            return np.ctypeslib.as_array(ctypes.cast(array, ctypes.POINTER(ctypes.c_int32)), (rows, n))

        return batch, view(batch.token), view(batch.pos)

    def _run(self, ids: np.ndarray, at: int) -> np.ndarray:
        """Run ids (batch, n) at positions at...; return the likeliest next token of each sequence, (batch, 1)."""
        import ctypes

        batch, tokens, positions = self.batches[ids.shape[1]]
        tokens[:], positions[:] = ids, np.arange(at, at + ids.shape[1])
        status = self.lib.llama_decode(self.context, batch)
        if status != 0:
            raise QtutorError(f"llama.cpp could not run the model (status {status}).")
        pointer = ctypes.cast(self.lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(pointer, (len(ids), self.n_vocab))
        return logits.argmax(1)[:, None].astype(np.int32)

    def prefill(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        self.first = self.token = self._run(self.ids, 0)
        self.at = self.prompt

    def rewind(self):
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), -1, self.prompt, -1)
        self.token, self.at = self.first, self.prompt

    def step(self):
        self.token = self._run(self.token, self.at)
        self.at += 1

    def close(self):
        if self.context:
            for batch, *_ in self.batches.values():
                self.lib.llama_batch_free(batch)
            self.lib.llama_free(self.context)
            self.context = None


class Generation:
    """The two halves of generation as calls to measure: ``prefill()``, and ``decode()`` or its single ``step()``.

    ``model`` is a Hugging Face causal language model, quantized or not, a :class:`qtutor.llamacpp.Model`, or the path
    of a GGUF file.  The prompt is random tokens: ``batch`` sequences of ``prompt_tokens``.  ``prefill`` fills an empty
    KV cache and takes the likeliest next token; ``decode`` goes back to the end of the prompt and writes
    ``new_tokens``, each the likeliest (end-of-text tokens do not end it).  Use it in a ``with`` block.

    Raises QtutorError for sizes below one, for more tokens than the model's context holds, and for something that is
    no model.
    """

    def __init__(self, model, prompt_tokens: int = 128, new_tokens: int = 32, batch: int = 1, device=None,
                 graph: bool = False, threads: int | None = None):
        for name, value in dict(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch).items():
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise QtutorError(f"{name} must be a whole number of at least 1, and is {value!r}.")
        self.prompt_tokens, self.new_tokens, self.batch = prompt_tokens, new_tokens, batch
        self._opened = self._runs = None
        self._module = model if hasattr(model, "eval") and hasattr(model, "parameters") else None
        self._training = getattr(model, "training", False)
        sizes = (int(prompt_tokens), int(new_tokens), int(batch))
        if self._module is not None:
            if device is not None:
                model.to(device)
            model.eval()
            self._runs = (_GraphRuns if graph else _HuggingFaceRuns)(model, *sizes)
        elif graph:
            raise QtutorError("graph=True is for Hugging Face models on a GPU: leave it out for llama.cpp.")
        else:
            self._runs = _LlamaCppRuns(self._llamacpp(model, threads), *sizes, threads)
        self.device, self.power = self._runs.device, self._runs.power  # to time by, and to read energy from

    def _llamacpp(self, model, threads):
        from . import llamacpp

        if isinstance(model, llamacpp.Model):
            return model
        if not isinstance(model, (str, os.PathLike)):
            raise QtutorError("Give a Hugging Face model, a llamacpp.Model or the path of a .gguf file.")
        self._opened = llamacpp.Model(model, ctx=32, threads=threads, exact=False)
        return self._opened

    def prefill(self) -> None:
        """Read the prompts, from an empty cache."""
        self._runs.prefill()

    def rewind(self) -> None:
        """Go back to the end of the prompt."""
        self._runs.rewind()

    def step(self) -> None:
        """Write one token of each sequence."""
        self._runs.step()

    def decode(self) -> None:
        """Write ``new_tokens`` tokens of each sequence, from the end of the prompt."""
        self._runs.rewind()
        for _ in range(self.new_tokens):
            self._runs.step()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Free the cache, and the model where a path was given; harmless when repeated."""
        if self._runs is not None:
            self._runs.close()
            self._runs = None
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        if self._module is not None and self._training:
            self._module.train()


@dataclass(frozen=True)
class Speed:
    """Prefill and decoding apart: ``prefill`` is a :class:`Timing` of whole prompts, ``decode`` one of single steps.

    With a batch, one step writes a token of every sequence.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill: Timing
    decode: Timing

    @property
    def ttft_ms(self) -> float:
        """Time to first token: the prefill, whose last position predicts it."""
        return self.prefill.median_ms

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill.per_second(self.batch * self.prompt_tokens)

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.decode.per_second(self.batch)

    def row(self) -> dict:
        """Flat dict for a table or a results file."""
        found = {"batch": self.batch, "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        for name, t in (("prefill", self.prefill), ("decode", self.decode)):
            found |= {f"{name}_ms": t.median_ms, f"{name}_ms_p10": t.p10, f"{name}_ms_p90": t.p90,
                      f"{name}_tokens_per_s": getattr(self, f"{name}_tokens_per_s")}  # fmt: skip
        return found

    def __str__(self) -> str:
        return (f"batch {self.batch}: prefill {self.prefill}, {self.prefill_tokens_per_s:,.0f} tokens/s; "
                f"decode {self.decode} a step, {self.decode_tokens_per_s:,.0f} tokens/s")  # fmt: skip


def generation_speed(model, prompt_tokens: int = 128, new_tokens: int = 32, batch: int = 1, device=None,
                     warmup: int = 1, repeats: int = 5, graph: bool = False, threads: int | None = None) -> Speed:
    """How fast a model reads and how fast it writes.

    Args:
        model: a Hugging Face causal language model, a llamacpp.Model, or the path of a GGUF file, which is then opened
            as people run llama.cpp.
        prompt_tokens, new_tokens, batch: sizes; the KV cache grows from ``prompt_tokens`` by ``new_tokens``.
        device: moves a Hugging Face model there; by default it stays where it is.
        warmup, repeats: whole generations thrown away, and measured.  The percentiles of ``decode`` are over
            ``repeats * new_tokens`` single steps.
        graph: time CUDA graphs instead of Python's calls (Llama models on a GPU).
        threads: of llama.cpp, by default the physical cores (one thread for the decoding of a small model).

    Raises QtutorError as :class:`Generation` does, and for ``repeats < 1`` or ``warmup < 0``.
    """
    if repeats < 1 or warmup < 0:
        raise QtutorError(f"Timing needs repeats >= 1 and warmup >= 0, not {repeats} and {warmup}.")
    with Generation(model, prompt_tokens, new_tokens, batch, device, graph, threads) as runs:
        for _ in range(warmup):
            runs.prefill()
            runs.decode()
        prefill = time_ms(runs.prefill, warmup=0, repeats=repeats, device=runs.device)
        if not warmup:
            runs.prefill()
        steps: list[float] = []
        for _ in range(repeats):
            runs.rewind()
            synchronize(runs.device)
            timed = _time_cuda(runs.step, new_tokens, runs.device) if _on_gpu(runs.device) else _time_cpu(
                runs.step, new_tokens)  # fmt: skip
            steps += timed
    p10, median, p90 = np.percentile(steps, [10, 50, 90])
    return Speed(batch, prompt_tokens, new_tokens, prefill, Timing(float(median), float(p10), float(p90), len(steps)))


# ---------------------------------------------------------------------------------------------------------- memory


def peak_memory_gib(device=None) -> float:
    """Peak memory in GiB: of PyTorch's tensors on a GPU, or of this whole process since it began on the CPU.

    What libraries take from a GPU outside PyTorch (the context, llama.cpp) is not counted.
    """
    if _on_gpu(device):
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class Memory:
    """What :func:`track_memory` found, in GiB: ``before``, ``peak`` and their difference ``added``."""

    before = peak = 0.0

    @property
    def added(self) -> float:
        return max(0.0, self.peak - self.before)


def device_memory_gib(device=None) -> float:
    """GiB in use on a whole GPU now: PyTorch's tensors and what it keeps in reserve, the CUDA context, llama.cpp, and
    whatever other programs hold.  Raises QtutorError without a GPU."""
    if not _on_gpu("cuda" if device is None else device):
        raise QtutorError("Only a GPU has memory of its own: use peak_memory_gib() for this process.")
    import torch

    if not torch.cuda.is_available():
        raise QtutorError("There is no GPU here: use peak_memory_gib() for this process.")
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / GIB


@contextmanager
def track_memory(device=None, interval_s: float = 0.005, whole_device: bool = False) -> Iterator[Memory]:
    """Measure the peak memory of a block: ``with track_memory() as memory: ...; memory.added``.

    On a GPU exactly (PyTorch counts its tensors), on the CPU by sampling the resident size of the process every
    ``interval_s`` seconds: peaks shorter than that go unseen.  ``whole_device=True`` samples all that is in use on the
    GPU instead (:func:`device_memory_gib`), which is the only way to see what llama.cpp takes.
    """
    memory = Memory()
    if _on_gpu(device) and not whole_device:
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        memory.before = torch.cuda.memory_allocated(device) / GIB
        yield memory
        torch.cuda.synchronize(device)
        memory.peak = torch.cuda.max_memory_allocated(device) / GIB
        return
    if whole_device:
        synchronize(device)

        def in_use():
            return device_memory_gib(device)
    else:
        import psutil

        process = psutil.Process()

        def in_use():
            return process.memory_info().rss / GIB

    done = threading.Event()

    def sample():
        memory.peak = max(memory.peak, in_use())

    def watch():
        while not done.wait(interval_s):
            sample()

    memory.before = in_use()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        sample()
        done.set()
        watcher.join()


def file_size(path) -> int:
    """Size in bytes of a file, or of all files below a folder.  Raises QtutorError where there is none."""
    path = Path(path)
    try:
        if path.is_dir():
            return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return path.stat().st_size
    except OSError:
        raise QtutorError(f"There is no file '{path}': check the path.") from None


# --------------------------------------------------------------------------------------------------------- machine


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.M)
        if found:
            return " ".join(found[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
        return version.decode() if isinstance(version, bytes) else version
    except Exception:  # no library, no driver, no permission: all mean that there is nothing to report
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict:
    """What measurements were taken on: ``device``, ``cpu``, ``cores``, ``memory_gib`` of the device, and on a GPU
    ``driver``, ``compute_capability`` and ``host_memory_gib``.  Nothing in it names the computer or its owner.
    """
    import psutil
    import torch

    host = round(psutil.virtual_memory().total / GIB, 1)
    about = {"device": _cpu_model(), "cpu": _cpu_model(), "cores": _cores(), "memory_gib": host}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        about |= {
            "device": gpu.name,
            "memory_gib": round(gpu.total_memory / GIB, 1),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "driver": _driver(),
            "host_memory_gib": host,
        }
    return about
