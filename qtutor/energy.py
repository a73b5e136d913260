"""Joules: what a token costs beside the time it takes.

The only honest way to know energy is a counter in the hardware.  NVIDIA data-centre GPUs have one that NVML reads;
Intel and AMD processors have one called RAPL, which Linux shows to whoever may read it.  A laptop, a container and a
rented virtual machine often have neither: then there is an *estimate*, from the time that this process kept the
processor busy, and every figure says that it is one.

    with energy.track_energy() as used:
        model.generate(...)
    print(used)                            # 412 J in 2.1 s (196 W; NVML energy counter)
    used.per(tokens)                       # joules a token; None where the block was too short to know

NVML renews its readings about ten times a second, so a block of one second is known to 10 % and one of ten seconds to
1 %: ``relative_error``.  A figure covers the whole board of one GPU (not the host, not the cooling); with RAPL the
processor packages with everything that runs on them; as an estimate, this process's share of the processor.  Counters
include idle power, because the bill includes it too.

References: Yang, Adamek and Armour 2023 (https://arxiv.org/abs/2312.02741) on NVML's renewals; Linux,
Documentation/power/powercap; codecarbon (https://github.com/mlco2/codecarbon), core/cpu.py, for the watts of a thread.
"""

from __future__ import annotations

import math
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import measure

WATTS_PER_THREAD = 4.0  # codecarbon's figure for a processor that it does not know
POWERCAP = Path("/sys/class/powercap")
NVML_STEP_S = 0.1  # 20 to 100 ms, by model
MOST_WATTS = {"board": 2000.0, "package": 600.0}  # no GPU or processor draws more: a counter that says so has jumped


@dataclass
class Energy:
    """What :func:`track_energy` found: ``joules`` in ``seconds``, and the ``source`` of the figure.

    ``joules`` is NaN until the block has ended, and where nothing could be read: ``source`` then says why.  The source
    is renewed every ``step_s`` seconds: ``relative_error`` is the share that may be missing or too much.
    """

    joules: float = math.nan
    seconds: float = math.nan
    source: str = ""
    step_s: float = 0.0

    watts = property(lambda self: self.joules / self.seconds)
    relative_error = property(lambda self: self.step_s / self.seconds)

    def per(self, amount: float, within: float = 0.2) -> float | None:
        """Joules for one of ``amount`` calls or tokens; None where they are not known as well as ``within``."""
        return self.joules / amount if math.isfinite(self.joules) and self.relative_error <= within else None

    def __str__(self) -> str:
        return f"{self.joules:.3g} J in {self.seconds:.3g} s ({self.watts:.3g} W; {self.source})"


class Board:
    """NVML's view of one GPU: joules since the driver was loaded, watts and MHz now, (bytes in use by everybody, in
    all).  A reading is None where the driver, or this model of GPU, does not offer it."""

    def __init__(self, nvml, handle):
        self._nvml, self._handle = nvml, handle

    def _ask(self, name: str, *args, scale=None):
        try:
            found = getattr(self._nvml, name)(self._handle, *args)
            return found / scale if scale else found
        except (self._nvml.NVMLError, AttributeError):  # AttributeError: a pynvml that is older than the function
            return None

    def joules(self) -> float | None:
        return self._ask("nvmlDeviceGetTotalEnergyConsumption", scale=1000)

    def watts(self) -> float | None:
        return self._ask("nvmlDeviceGetPowerUsage", scale=1000)

    def mhz(self) -> int | None:
        return self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)

    def memory(self) -> tuple[int, int]:
        found = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return found.used, found.total


def board(device=None) -> Board | None:
    """The GPU ``device`` (by default the current one) as NVML sees it; None without NVML or a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        # NVML numbers GPUs its own way: the UUID is the same on both sides
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return Board(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"))
    except Exception:  # no library, no driver, a part of a GPU (MIG): whatever it is, there is nothing to read
        return None


#: ``read()``: joules since some moment, or None; renewed every ``step_s`` seconds.  A source is read twice.  At most it
#: draws ``watts``, and after ``turn`` joules it begins again.
_Source = namedtuple("_Source", "name step_s read watts turn", defaults=[math.inf, math.inf])


def _rapl() -> _Source:
    """Running Average Power Limit: the processor's counters, one a package (and one for its memory), in microjoules."""
    names = {f: (f / "name").read_text().strip() for f in sorted(POWERCAP.glob("intel-rapl:*"))}
    # a package contains its cores, but not its memory; "psys" would count the packages again
    folders = [f for f, name in names.items() if name.startswith("package") or name == "dram"]
    turns = [int((f / "max_energy_range_uj").read_text()) + 1 for f in folders]
    began = [int((f / "energy_uj").read_text()) for f in folders]  # where only root may read, this raises
    if not folders:
        raise OSError("no RAPL domains")

    def read():
        try:
            now = [int((f / "energy_uj").read_text()) for f in folders]
        except (OSError, ValueError):
            return None
        # each wraps around at its range; a block shorter than one turn (minutes) is counted right, a longer one not
        return sum((b - a) % turn for a, b, turn in zip(began, now, turns, strict=True)) / 1e6

    n = len(folders)
    return _Source("RAPL energy counter", 0.001, read, n * MOST_WATTS["package"], n * min(turns) / 1e6)


def _estimate() -> _Source:
    """A figure for one busy thread, times the CPU seconds of this process (all its threads, and nobody else's)."""
    name = f"estimate: {WATTS_PER_THREAD:g} W a busy CPU thread (codecarbon's default) x CPU time"
    return _Source(name, 0.0, lambda: WATTS_PER_THREAD * time.process_time())


def source_of(device=None) -> _Source:
    """Where :func:`track_energy` takes its figure from on this device: ``name`` says it in words."""
    if not measure.on_gpu(device):
        try:
            return _rapl()
        except (OSError, ValueError):  # not there, or only for root
            return _estimate()
    gpu = board(device)
    if gpu and gpu.joules() is not None:
        return _Source("NVML energy counter", NVML_STEP_S, gpu.joules, MOST_WATTS["board"])
    return _Source("none: NVML has no energy counter here", 0.0, lambda: None)


@contextmanager
def track_energy(device=None) -> Iterator[Energy]:
    """Measure the energy of a block: ``with track_energy() as used: ...; used.joules``.

    ``device``: where the work happens; by default the current CUDA GPU if this process has used one, else the CPU.
    A GPU's figure comes from NVML's energy counter (Volta or newer), a CPU's from RAPL where it may be read, else from
    an estimate.  A counter that is missing or lost, stands still, jumps or runs backwards gives NaN.
    """
    source = source_of(device)
    used = Energy(source=source.name, step_s=source.step_s)
    measure.synchronize(device)
    before, began = source.read(), time.perf_counter()
    try:
        yield used
    finally:
        measure.synchronize(device)
        used.seconds = time.perf_counter() - began
        after = None if before is None else source.read()
        why = ("was lost" if after is None else "ran backwards" if after < before
               else "did not move" if after == before and source.step_s
               else "jumped" if after - before > source.watts * (used.seconds + source.step_s)
               else "may have begun again twice" if source.watts * used.seconds > source.turn else "")  # fmt: skip
        if not why:
            used.joules = after - before
        elif not source.name.startswith("none"):
            used.source = f"none: {source.name} {why}"


def timed(fn, warmup: int = 3, repeats: int = 5, seconds: float = 1.0, device=None, clock=None,
          before=None) -> tuple[measure.Timing, Energy]:  # fmt: skip
    """:func:`measure.time_ms` together with the energy of exactly the calls that were timed.  The energy is read on
    ``device``, the time on ``clock``: "cpu" for a library that waits for its own work."""
    measure.time_ms(fn, warmup, 0, clock or device, before=before)
    with track_energy(device) as used:
        timing = measure.time_ms(fn, 0, repeats, clock or device, seconds, before)
    return timing, used
