"""How long, how much memory, on what machine: measurements that mean what they say.

Three mistakes make most timings wrong.  A GPU works *asynchronously*: the call returns before the work is done, so
a wall clock around it measures the launch (here: CUDA events, and a synchronization before reading them).  The
*first* calls pay for compilation, caches and memory pools (here: a warm-up that is thrown away).  And *means* follow
the one run that the operating system disturbed (here: the median, with the 10th and 90th percentile beside it to
show the noise).

    t = measure.time_ms(lambda: model(ids), warmup=3, repeats=20)
    print(t)                                    # 12.3 ms (12.1 to 13.0, n=20)
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


@contextmanager
def track_memory(device=None, interval_s: float = 0.005) -> Iterator[Memory]:
    """Measure the peak memory of a block: ``with track_memory() as memory: ...; memory.added``.

    On a GPU exactly (PyTorch counts its tensors), on the CPU by sampling the resident size of the process every
    ``interval_s`` seconds: peaks shorter than that go unseen.
    """
    memory = Memory()
    if _on_gpu(device):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        memory.before = torch.cuda.memory_allocated(device) / GIB
        yield memory
        torch.cuda.synchronize(device)
        memory.peak = torch.cuda.max_memory_allocated(device) / GIB
        return
    import psutil

    process, done = psutil.Process(), threading.Event()

    def sample():
        memory.peak = max(memory.peak, process.memory_info().rss / GIB)

    def watch():
        while not done.wait(interval_s):
            sample()

    memory.before = process.memory_info().rss / GIB
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
