"""How long, how much memory, how many bytes, on what machine: measurements that mean what they say.

Three mistakes make most timings wrong.  A GPU works *asynchronously*: the call returns before the work is done, so a
wall clock around it measures the launch (here: CUDA events, and a synchronization before reading them).  The *first*
calls pay for compilation, caches and memory pools (here: a warm-up that is thrown away).  And *means* follow the one
run that the operating system disturbed (here: the median, and the 10th and 90th percentile to show the noise).

    t = measure.time_ms(lambda: model(ids), warmup=3, repeats=20)
    print(t)                                    # 12.3 ms (12.1 to 13.0, n=20)

A language model has two speeds, to be timed apart: *prefill* reads the whole prompt at once and is limited by
arithmetic; *decoding* writes one token after the other, reads every weight for each, and is limited by memory.
Joules are in :mod:`qtutor.energy`.
"""

from __future__ import annotations

import math
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each call, in order."""

    ms: tuple[float, ...]

    n = property(lambda self: len(self.ms))
    median_ms = property(lambda self: float(np.median(self.ms)))
    p10 = property(lambda self: float(np.percentile(self.ms, 10)))
    p90 = property(lambda self: float(np.percentile(self.ms, 90)))

    def mean_per_second(self, amount: float) -> tuple[float, float | None]:
        """(mean, standard error) of each call's own throughput when it handles ``amount``; no error for one call."""
        speeds = amount * 1000 / np.array(self.ms)
        return float(speeds.mean()), float(speeds.std(ddof=1) / math.sqrt(self.n)) if self.n > 1 else None

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.p10:.3g} to {self.p90:.3g}, n={self.n})"


def on_gpu(device=None) -> bool:
    """Whether work on ``device`` runs on a CUDA GPU; None: whether this process has used one."""
    if device is not None:
        return str(device).startswith("cuda")
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def synchronize(device=None) -> None:
    """Wait until a GPU has done all that it was given; does nothing without one."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def time_ms(fn: Callable[[], object], *args, **kwargs) -> Timing:
    """Time ``fn()``: the arguments, and what is measured, are those of :func:`compare_ms`."""
    return compare_ms({"": fn}, *args, **kwargs)[""]


def compare_ms(calls: dict[str, Callable[[], object]], warmup: int = 3, repeats: int = 20, device=None,
               seconds: float = 0.0, before: Callable[[], object] | None = None) -> dict[str, Timing]:  # fmt: skip
    """Time calls that take turns, so that whatever else the machine does meets all of them.

    ``warmup`` turns are thrown away; then come at least ``repeats`` turns, and at least ``seconds`` of them.
    ``before()`` runs untimed ahead of each call.  ``device`` is where the work happens: by default the current CUDA GPU
    if this process has used one, else the CPU.  On a GPU each call lies between two CUDA events of its own, launch gaps
    included.  A library that waits for its own work, such as llama.cpp, is timed by the wall clock: ``device="cpu"``.
    """
    gpu, marks = on_gpu(device), {name: [] for name in calls}

    def stamp():
        if not gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def turns(n):
        for _ in range(n):
            for name, fn in calls.items():
                if before:
                    before()
                start = stamp()
                fn()
                marks[name].append((start, stamp()))
        synchronize(device)  # the queue of a GPU hides how long its work takes

    with torch.cuda.device(device) if gpu else nullcontext():
        turns(warmup)
        began, done, more = time.perf_counter(), 0, repeats
        while more > 0:
            turns(more)
            done, passed = done + more, time.perf_counter() - began
            more = math.ceil((seconds - passed) / passed * done) if passed < seconds else 0
    return {name: Timing(tuple(start.elapsed_time(end) if gpu else 1000 * (end - start)
                               for start, end in pairs[warmup:])) for name, pairs in marks.items()}  # fmt: skip


def captured(fn: Callable[[], object]):
    """Record ``fn()`` into a CUDA graph, whose kernels one call launches; return (its replay, what ``fn`` returned).
    Each replay reads and writes the tensors of the recorded call: fill its inputs in place, read its result."""
    side = torch.cuda.Stream()  # warm-up on a side stream, as PyTorch's notes on CUDA graphs ask for
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fn()
    return graph.replay, result


def bandwidth(device=None, gib: float | None = None) -> dict[str, float]:
    """Memory bandwidth that a simple kernel gets, GB/s (10^9 bytes): of a copy (bytes read plus bytes written) and of
    reading (a sum) of a tensor of ``gib`` (beyond all caches), the best of several runs, and the better of both."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    n = int((gib or (4 if device.type == "cuda" else 0.25)) * GIB) // 4
    a, b = torch.ones(n, device=device), torch.empty(n, device=device)  # zeros could be one page, mapped n times
    copy, read = (min(time_ms(fn, repeats=12, device=device).ms) for fn in (lambda: b.copy_(a), lambda: a.sum()))
    if device.type == "cuda":  # PyTorch would keep it, and no other library could have it
        del a, b
        torch.cuda.empty_cache()
    found = {"copy_gb_per_s": 8 * n / copy / 1e6, "read_gb_per_s": 4 * n / read / 1e6}
    return found | {"bandwidth_gb_per_s": max(found.values())}


@dataclass
class Memory:
    """What :func:`track_memory` found, in GiB."""

    before: float = 0.0
    peak: float = 0.0
    added = property(lambda self: max(0.0, self.peak - self.before))


@contextmanager
def track_memory(device=None) -> Iterator[Memory]:
    """Measure the peak memory of a block: ``with track_memory() as memory: ...; memory.added``.  On a GPU exactly
    (PyTorch counts its tensors), on the CPU by sampling the process's resident size every 5 ms."""
    memory = Memory()
    if on_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        memory.before = torch.cuda.memory_allocated(device) / GIB
        yield memory
        torch.cuda.synchronize(device)
        memory.peak = torch.cuda.max_memory_allocated(device) / GIB
        return
    process, done = psutil.Process(), threading.Event()
    memory.before = process.memory_info().rss / GIB

    def watch():
        ended = False
        while not ended:
            ended = done.wait(0.005)
            memory.peak = max(memory.peak, process.memory_info().rss / GIB)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(watch)
        try:
            yield memory
        finally:
            done.set()


def device_memory_gib(device=None) -> float:
    """GiB in use on a whole GPU now: PyTorch's tensors and reserve, the CUDA context, llama.cpp, other programs."""
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / GIB


def plain_tensors(tensor) -> Iterator:
    """The plain tensors that a quantized one is made of (torchao, quanto, Transformer Engine), whose own dtype is only
    that of its results; itself for a plain one."""
    if hasattr(tensor, "get_data_tensors"):  # Transformer Engine
        scales = (getattr(tensor, f"{side}_scale_inv", None) for side in ("", "_rowwise", "_columnwise"))
        yield from (part for part in (*tensor.get_data_tensors(), *scales) if part is not None)
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif hasattr(tensor, "untyped_storage"):
        yield tensor


def stored_bytes(model) -> tuple[int, int]:
    """(bytes as stored, number of weights that the codes stand for) of a PyTorch module, or of one tensor.

    The storage of codes, scales, zero points and tables counts once, however many layers share it.  Count a
    bitsandbytes model before it computes anything: on some CPUs it rearranges 4-bit weights at their first use.
    """
    if hasattr(model, "state_dict"):
        tensors = [t for key, t in model.state_dict(keep_vars=True).items() if not key.endswith("_extra_state")]
        modules, weights = model.modules(), {}  # weights by the identity of the parameter, which layers may share
    else:
        tensors, modules, weights = [model], (), {0: model.numel()}
    for module in modules:
        sides = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if hasattr(module, "codes") and hasattr(module, "shape"):  # packed.StoredWeight: no parameters
            weights[id(module)] = math.prod(module.shape)
        for name, parameter in module.named_parameters(recurse=False):
            # 4-bit codes of bitsandbytes are a parameter with half as many elements
            weights[id(parameter)] = math.prod(sides) if name == "weight" and None not in sides else parameter.numel()
    storages = [part.untyped_storage() for tensor in tensors for part in plain_tensors(tensor)]
    size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return size, sum(weights.values())


def _cpu_model() -> str:
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(errors="replace") if listed.exists() else "", re.M)
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no library, no driver, no permission: all mean that there is nothing to report
        return None


def machine() -> dict:
    """What measurements were taken on: ``device``, ``cpu``, ``cores``, ``memory_gib`` of the device, and on a GPU
    ``driver``, ``compute_capability`` and ``host_memory_gib``.  Nothing in it names the computer or its owner."""
    host = round(psutil.virtual_memory().total / GIB, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = {"device": _cpu_model(), "cpu": _cpu_model(), "cores": cores, "memory_gib": host}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        about |= {"device": gpu.name, "memory_gib": round(gpu.total_memory / GIB, 1), "driver": _driver(),
                  "compute_capability": f"{gpu.major}.{gpu.minor}", "host_memory_gib": host}  # fmt: skip
    return about
