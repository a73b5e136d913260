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

import json
import math
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import QtutorError, measure

JOULES_PER_KWH = 3.6e6
WATTS_PER_THREAD = 4.0  # codecarbon's figure for a processor that it does not know
POWERCAP = Path("/sys/class/powercap")
NVML_STEP_S = 0.1  # 20 to 100 ms, by model


@dataclass
class Energy:
    """What :func:`track_energy` found: ``joules`` in ``seconds``, and the ``source`` of the figure.

    ``joules`` is NaN until the block has ended, and where nothing could be read: ``source`` then says why.
    ``relative_error`` is the share of ``joules`` that may be missing or too much, because the source is renewed only
    every ``step_s`` seconds.
    """

    joules: float = math.nan
    seconds: float = math.nan
    source: str = ""
    step_s: float = 0.0

    watts = property(lambda self: self.joules / self.seconds)
    relative_error = property(lambda self: self.step_s / self.seconds)

    def per(self, amount: float, within: float = 0.2) -> float | None:
        """Joules for one of ``amount`` calls or tokens (for ``amount`` seconds: watts).

        None where the joules are not known, or only with a larger ``relative_error`` than ``within``.
        """
        return self.joules / amount if math.isfinite(self.joules) and self.relative_error <= within else None

    def __str__(self) -> str:
        return f"{self.joules:.3g} J in {self.seconds:.3g} s ({self.watts:.3g} W; {self.source})"


class Board:
    """NVML's view of one GPU: joules since the driver was loaded, watts and MHz now, (bytes in use by everybody, bytes
    in all).  A reading is None where the driver, or this model of GPU, does not offer it."""

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
        import torch

        # NVML numbers GPUs its own way: the UUID is the same on both sides
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return Board(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"))
    except Exception:  # no library, no driver, a part of a GPU (MIG): whatever it is, there is nothing to read
        return None


#: ``read()``: joules since some moment, or None; renewed every ``step_s`` seconds.  A source is read twice.
_Source = namedtuple("_Source", "name step_s read")


def _sampled_power(gpu: Board) -> _Source:
    """For GPUs before Volta, which have no energy counter: power, read again and again, times time."""
    seen, ended = [], threading.Event()

    def watch():
        while not ended.is_set():
            seen.append((time.perf_counter(), gpu.watts()))
            ended.wait(0.02)
        seen.append((time.perf_counter(), gpu.watts()))

    thread = threading.Thread(target=watch, daemon=True)

    def read():
        if not thread.ident:
            thread.start()
            return 0.0
        ended.set()
        thread.join()
        at, watts = zip(*seen, strict=True)
        return None if None in watts else float(np.trapezoid(watts, at))

    return _Source("NVML power, sampled", NVML_STEP_S, read)


def _rapl(root: Path | None = None) -> _Source:
    """Running Average Power Limit: the processor's counters, one a package (and one for its memory), in microjoules."""
    names = {f: (f / "name").read_text().strip() for f in sorted((root or POWERCAP).glob("intel-rapl:*"))}
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
        # each wraps around at its range; a block shorter than one turn (minutes) is counted right
        return sum((b - a) % turn for a, b, turn in zip(began, now, turns, strict=True)) / 1e6

    return _Source("RAPL energy counter", 0.001, read)


def _estimate() -> _Source:
    """A figure for one busy thread, times the CPU seconds of this process (all its threads, and nobody else's)."""
    name = f"estimate: {WATTS_PER_THREAD:g} W a busy CPU thread (codecarbon's default) x CPU time"
    return _Source(name, 0.0, lambda: WATTS_PER_THREAD * time.process_time())


def _source(device) -> _Source:
    if not measure.on_gpu(device):
        try:
            return _rapl()
        except (OSError, ValueError):  # not there, or only for root
            return _estimate()
    gpu = board(device)
    if gpu and gpu.joules() is not None:
        return _Source("NVML energy counter", NVML_STEP_S, gpu.joules)
    if gpu and gpu.watts() is not None:
        return _sampled_power(gpu)
    return _Source("none: NVML reads neither energy nor power here", 0.0, lambda: None)


def source_of(device=None) -> str:
    """Where :func:`track_energy` would take its figure from on this device, in words."""
    return _source(device).name


@contextmanager
def track_energy(device=None) -> Iterator[Energy]:
    """Measure the energy of a block: ``with track_energy() as used: ...; used.joules``.

    ``device``: where the work happens; by default the current CUDA GPU if this process has used one, else the CPU.
    Sources, in this order: on a GPU NVML's energy counter, or its power sampled every 20 ms; on a CPU RAPL where it may
    be read, else an estimate.  Never raises for a counter that is missing, lost, stands still or runs backwards:
    ``joules`` is NaN then and ``source`` says why.
    """
    source = _source(device)
    used = Energy(source=source.name, step_s=source.step_s)
    measure.synchronize(device)
    before, began = source.read(), time.perf_counter()
    try:
        yield used
    finally:
        measure.synchronize(device)
        used.seconds = time.perf_counter() - began
        after, why = None if before is None else source.read(), None
        if after is None:
            why = "was lost"
        elif after < before:
            why = "ran backwards"
        elif after == before and source.step_s:
            why = f"did not move in {used.seconds:.2g} s"
        else:
            used.joules = after - before
        if why and not source.name.startswith("none"):
            used.source = f"none: {source.name} {why}"


def timed(fn, warmup: int = 3, repeats: int = 5, seconds: float = 1.0, device=None, clock=None,
          before=None) -> tuple[measure.Timing, Energy]:  # fmt: skip
    """:func:`measure.time_ms` together with the energy of exactly the calls that were timed.

    ``device`` is where the energy is read, ``clock`` where the time is: "cpu" for a library that waits for its own
    work, such as llama.cpp on a GPU; by default the same.
    """
    measure.time_ms(fn, warmup, 0, clock or device, before=before)
    with track_energy(device) as used:
        timing = measure.time_ms(fn, 0, repeats, clock or device, seconds, before)
    return timing, used


# -------------------------------------------------------------------------------------------- money and emissions


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float, np.number)) and math.isfinite(value) and value >= 0):
            raise QtutorError(f"{name} must be a number that is not negative, and is {value!r}.")


def cost_per_million_tokens(tokens_per_s: float, usd_per_hour: float) -> float:
    """US dollars for a million tokens, on a machine that costs ``usd_per_hour`` and is busy all the time.

    ``usd_per_hour / 3600 / tokens_per_s * 1e6``.  A machine that waits half the time costs twice as much a token.
    """
    _positive(tokens_per_s=tokens_per_s, usd_per_hour=usd_per_hour)
    if tokens_per_s == 0:
        raise QtutorError("At zero tokens per second a million tokens never come: check the measurement.")
    return usd_per_hour / 3600 / tokens_per_s * 1e6


def kwh_per_million_tokens(joules_per_token: float, pue: float = 1.0) -> float:
    """Kilowatt-hours for a million tokens: ``joules_per_token * 1e6 / 3.6e6 * pue``.

    ``pue`` (power usage effectiveness): energy of the data centre / energy of its computers; 1.0 counts the device
    alone.  The mean over data centres is 1.5 to 1.6, that of the largest operators about 1.1 (Uptime Institute, Global
    Data Center Survey 2024, https://uptimeinstitute.com/resources/research-and-reports).
    """
    _positive(joules_per_token=joules_per_token, pue=pue)
    if pue < 1:
        raise QtutorError(f"PUE is total energy over the computers' energy: at least 1, not {pue}.")
    return joules_per_token * 1e6 / JOULES_PER_KWH * pue


def co2e_grams_per_million_tokens(joules_per_token: float, grams_per_kwh: float, pue: float = 1.0) -> float:
    """Grams of CO2 equivalent for a million tokens, of the electricity alone (making the hardware is not in it)."""
    _positive(grams_per_kwh=grams_per_kwh)
    return kwh_per_million_tokens(joules_per_token, pue) * grams_per_kwh


@dataclass(frozen=True)
class Price:
    """US dollars for an hour of a machine, on demand; list price at ``source`` on ``date``."""

    name: str
    usd_per_hour: float
    what: str
    source: str
    date: str


_RUNPOD, _AWS = "https://www.runpod.io/pricing", "https://aws.amazon.com/ec2/pricing/on-demand/"
PRICES: dict[str, Price] = {
    price.name: price
    for price in (
        Price("H200", 4.59, "one H200 141 GB, RunPod Secure Cloud", _RUNPOD, "2026-10-07"),
        Price("H100", 3.99, "one H100 SXM 80 GB, RunPod Secure Cloud", _RUNPOD, "2026-11-09"),
        Price("H100 PCIe", 2.89, "one H100 PCIe 80 GB, RunPod Secure Cloud", _RUNPOD, "2026-11-09"),
        Price("H100 AWS", 6.88, "an eighth of a p5.48xlarge, us-east-1", _AWS, "2026-11-09"),
        Price("A100", 1.79, "one A100 SXM 80 GB, RunPod Secure Cloud", _RUNPOD, "2026-11-09"),
        Price("L40S", 1.861, "g6e.xlarge: one L40S 48 GB, us-east-1", _AWS, "2026-01-19"),
        Price("L4", 0.8048, "g6.xlarge: one L4 24 GB, us-east-1", _AWS, "2026-01-19"),
        Price("CPU 16 vCPU", 0.714, "c7i.4xlarge: 16 vCPU, 32 GiB, us-east-1", _AWS, "2026-01-19"),
    )
}


def price(name: str) -> Price:
    """The default price of a machine, by its name in :data:`PRICES`; raises QtutorError for one that is not there."""
    found = {key.lower(): value for key, value in PRICES.items()}.get(str(name).lower())
    if found is None:
        raise QtutorError(f"There is no price for {name!r}: choose one of {', '.join(PRICES)}, or give your own.")
    return found


@dataclass(frozen=True)
class Grid:
    """Grams of CO2 equivalent for a kWh of a country's electricity, mean of ``year``."""

    code: str
    name: str
    grams_per_kwh: float
    year: int
    source: str


_OWID = "Our World in Data and Ember, in codecarbon's global_energy_mix.json"
# what the tables of codecarbon 3.3 say, for where it is not installed
_WORLD = Grid("WLD", "World", 475.0, 2018, "IEA, https://www.iea.org/reports/global-energy-co2-status-report-2019/emissions")
_BUILT_IN = [("SWE", "Sweden", 40.695), ("FRA", "France", 56.039), ("GBR", "United Kingdom", 237.589),
             ("USA", "United States", 369.473), ("DEU", "Germany", 380.95), ("CHN", "China", 582.317),
             ("POL", "Poland", 661.926), ("IND", "India", 713.441)]  # fmt: skip


@lru_cache(maxsize=1)
def grids() -> list[Grid]:
    """All grids, from the cleanest to the dirtiest; codecarbon's offline table, or nine of its rows without it.

    Yearly means of a whole country: the hour and the place within it can differ by a factor of several.
    """
    try:
        from importlib.resources import files

        data = json.loads((files("codecarbon") / "data/private_infra/global_energy_mix.json").read_text("utf-8"))
        found = [Grid(code, row["country_name"], float(row["carbon_intensity"]), int(row["year"]), _OWID)
                 for code, row in data.items() if row.get("carbon_intensity")]  # fmt: skip - zero: not known
    except (ImportError, OSError, ValueError, KeyError):
        found = [Grid(*row, 2023, _OWID) for row in _BUILT_IN]
    return sorted([*found, _WORLD], key=lambda g: g.grams_per_kwh)


def grid(where: str = "World") -> Grid:
    """The grid of a country, by its English name or three-letter code (ISO 3166-1), or of the ``"World"``.

    Raises QtutorError for a country that is not in the table.
    """
    key = str(where).strip().lower()
    for row in grids():
        if key in (row.name.lower(), row.code.lower()):
            return row
    raise QtutorError(f"There is no grid {where!r} in the table: use an English country name or its three-letter code.")


def prices_frame():
    """:data:`PRICES` as a pandas DataFrame, one row a machine."""
    import pandas

    return pandas.DataFrame([asdict(p) for p in PRICES.values()])


def grids_frame():
    """:func:`grids` as a pandas DataFrame, one row a country."""
    import pandas

    return pandas.DataFrame([asdict(g) for g in grids()])
