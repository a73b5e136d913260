"""Joules, money and grams of CO2e: what a token costs beside the time it takes.

*Energy* is power times time, and the only honest way to know it is a counter in the hardware.  NVIDIA data-centre GPUs
have one that NVML reads; Intel and AMD processors have one called RAPL, which Linux shows to whoever may read it.  A
laptop, a container and a rented virtual machine often have neither: then there is an *estimate*, from the processor's
design power and the time that this process kept it busy, and every figure says that it is one.

    with energy.track_energy() as used:
        model.generate(...)
    print(used)                            # 41.2 J in 0.21 s (196 W; NVML energy counter)

NVML's readings move in steps (20 to 100 ms, by model): a single short call reads as zero or as a whole step.
:func:`energy_per` therefore repeats the work for a second or more, several times, and reports the spread.

What a figure covers: on a GPU the whole board of that GPU and nothing else (not the host, not the cooling); with RAPL
the processor packages with everything that runs on them; as an estimate, this process's share of the processor.
Idle power is included where a counter is read, because the bill includes it too.

Money and CO2e need two numbers that no program can measure: the price of an hour and what the grid emits for a kWh.
Both are parameters; :data:`PRICES` and :func:`grid` offer defaults, each with its source and date.

References: NVML API, nvmlDeviceGetTotalEnergyConsumption; how often it is updated: Yang, Adamek and Armour 2023
(https://arxiv.org/abs/2312.02741); Linux, Documentation/power/powercap; codecarbon
(https://github.com/mlco2/codecarbon, MIT licence), whose tables of processor power and of national grids are used here.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import QtutorError, measure

JOULES_PER_KWH = 3.6e6
WATTS_PER_THREAD = 4.0  # codecarbon's figure for a processor that it does not know: codecarbon/core/cpu.py
POWERCAP = Path("/sys/class/powercap")


# -------------------------------------------------------------------------------------------------------- meters


@dataclass
class Energy:
    """What :func:`track_energy` found: ``joules`` in ``seconds``, and the ``source`` of the figure.

    ``joules`` is NaN until the block has ended, and where the device has no counter and no estimate is possible.
    """

    joules: float = math.nan
    seconds: float = math.nan
    source: str = ""

    @property
    def watts(self) -> float:
        """Mean power over the block."""
        return self.joules / self.seconds if self.seconds else math.nan

    @property
    def estimated(self) -> bool:
        """True where no counter was read."""
        return self.source.startswith("estimate")

    def __str__(self) -> str:
        return f"{self.joules:.3g} J in {self.seconds:.3g} s ({self.watts:.3g} W; {self.source})"


class _NvmlCounter:
    """The GPU's own energy counter, in millijoules since the driver was loaded."""

    source = "NVML energy counter"

    def __init__(self, nvml, handle):
        self.nvml, self.handle = nvml, handle
        self._read()

    def _read(self) -> float:
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000

    def start(self) -> None:
        self.began = self._read()

    def stop(self) -> float:
        return self._read() - self.began


class _NvmlPower:
    """For GPUs before Volta, which have no energy counter: power, read again and again, times time."""

    source = "NVML power, sampled"

    def __init__(self, nvml, handle, interval_s: float = 0.02):
        self.nvml, self.handle, self.interval = nvml, handle, interval_s
        self._sample()

    def _sample(self) -> tuple[float, float]:
        return time.perf_counter(), self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000

    def start(self) -> None:
        self.samples, self.done = [self._sample()], threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(self.interval):
            self.samples.append(self._sample())

    def stop(self) -> float:
        self.done.set()
        self.thread.join()
        self.samples.append(self._sample())
        at, watts = np.array(self.samples).T
        return float((np.diff(at) * (watts[1:] + watts[:-1]) / 2).sum())  # trapezoids


class _Rapl:
    """Running Average Power Limit: the processor's counters, one a package (and one for its memory), in microjoules."""

    source = "RAPL energy counter"

    def __init__(self, root: Path | None = None):
        self.domains = []
        for folder in sorted((root or POWERCAP).glob("intel-rapl:*")):  # AMD processors carry this name too
            name = (folder / "name").read_text().strip()
            # a package contains its cores, but not its memory; "psys" would count the packages again
            if name.startswith("package") or name == "dram":
                self.domains.append((folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        if not self.domains:
            raise OSError("no RAPL domains")
        self._read()  # a file that only root may read raises here

    def _read(self) -> list[int]:
        return [int(path.read_text()) for path, _ in self.domains]

    def start(self) -> None:
        self.began = self._read()

    def stop(self) -> float:
        """Microjoules wrap around at the domain's range; a block shorter than one turn (minutes) is counted right."""
        turns = zip(self._read(), self.began, self.domains, strict=True)
        return sum((now - before) % (limit + 1) for now, before, (_, limit) in turns) / 1e6


class _CpuEstimate:
    """Design power of the processor, shared among its threads, times the CPU seconds that this process used."""

    def __init__(self):
        self.watts_per_thread, how = _watts_per_thread()
        self.source = f"estimate: {how} x CPU time"

    def start(self) -> None:
        self.began = time.process_time()  # of all threads of this process, and of nobody else

    def stop(self) -> float:
        return (time.process_time() - self.began) * self.watts_per_thread


class _NoMeter:
    def __init__(self, why: str):
        self.source = f"none: {why}"

    def start(self) -> None:
        pass

    def stop(self) -> float:
        return math.nan


@lru_cache(maxsize=1)
def _watts_per_thread() -> tuple[float, str]:
    """Watts of one busy hardware thread, and in words where that comes from.

    The table of codecarbon knows the design power (TDP) of a whole chip.  A virtual machine sees the chip's name but
    only some of its threads, so there, as where the name is unknown, codecarbon's figure for a single thread is used.
    """
    import psutil

    default = WATTS_PER_THREAD, f"{WATTS_PER_THREAD:g} W a busy CPU thread (codecarbon's default)"
    try:
        virtual = "hypervisor" in Path("/proc/cpuinfo").read_text()
    except OSError:
        virtual = False
    if virtual:
        return default
    logger = logging.getLogger("codecarbon")
    level = logger.level
    try:
        from codecarbon.core.cpu import TDP

        logger.setLevel(logging.ERROR)  # it says at length when it does not know a processor
        found = TDP()
        threads = psutil.cpu_count() or 1
        if found.tdp and found.tdp != threads * WATTS_PER_THREAD:
            return found.tdp / threads, f"{found.tdp:g} W (TDP of {found.model}, codecarbon) / {threads} threads"
    except Exception:  # not installed, or it cannot read this processor: there is a default
        pass
    finally:
        logger.setLevel(level)
    return default


def _nvml_meter(device):
    """The best meter of a GPU.  NVML numbers GPUs its own way: the UUID is the same on both sides."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception as error:  # no library, no driver, a part of a GPU (MIG): whatever it is, there is no counter
        return _NoMeter(f"NVML is not usable here ({type(error).__name__})")
    for kind in (_NvmlCounter, _NvmlPower):
        try:
            return kind(pynvml, handle)
        except pynvml.NVMLError:
            continue
    return _NoMeter("this GPU reports neither energy nor power")


def _meter(device):
    if measure._on_gpu(device):
        return _nvml_meter(device)
    try:
        return _Rapl()
    except (OSError, ValueError):  # not there, or only for root
        return _CpuEstimate()


def source_of(device=None) -> str:
    """Where :func:`track_energy` would take its figure from on this device, in words."""
    return _meter(device).source


@contextmanager
def track_energy(device=None) -> Iterator[Energy]:
    """Measure the energy of a block: ``with track_energy() as used: ...; used.joules``.

    ``device``: where the work happens; by default the current CUDA GPU if this process has used one, else the CPU.
    The GPU is synchronized at both ends.  Sources, in this order: on a GPU NVML's energy counter, or its power sampled
    every 20 ms; on a CPU RAPL where it may be read, else an estimate (see the module).  Never raises for a missing
    counter: ``joules`` is NaN then and ``source`` says why.
    """
    meter = _meter(device)
    used = Energy(source=meter.source)
    measure.synchronize(device)
    meter.start()
    began = time.perf_counter()
    try:
        yield used
    finally:
        measure.synchronize(device)
        used.seconds = time.perf_counter() - began
        used.joules = meter.stop()


# ----------------------------------------------------------------------------------------------------- per token


@dataclass(frozen=True)
class EnergyPer:
    """Joules a token: mean of ``rounds``, its standard error, 10th and 90th percentile; mean ``watts`` on the way."""

    joules_per_token: float
    se: float
    low: float
    high: float
    watts: float
    rounds: int
    seconds: float
    tokens_per_s: float
    source: str

    @property
    def estimated(self) -> bool:
        """True where no counter was read."""
        return self.source.startswith("estimate")

    def row(self) -> dict:
        """Flat dict for a table or a results file; None where there is no figure."""
        found = {"joules_per_token": self.joules_per_token, "joules_per_token_se": self.se, "watts": self.watts}
        found = {key: value if math.isfinite(value) else None for key, value in found.items()}
        return found | {"energy_source": self.source, "energy_estimated": self.estimated}

    def __str__(self) -> str:
        return f"{self.joules_per_token:.3g} ± {self.se:.1g} J a token ({self.watts:.3g} W; {self.source})"


def energy_per(fn: Callable[[], object], tokens: float = 1, seconds: float = 1.0, rounds: int = 5, warmup: int = 1,
               device=None) -> EnergyPer:  # fmt: skip
    """Joules a token of ``fn()``, which handles ``tokens`` tokens a call.

    Each of ``rounds`` rounds repeats ``fn`` for at least ``seconds``, so that the counter's steps do not matter: with
    steps of 0.1 s, a round of 1 s is read to 10 % and five of them to about 4 %.  Raises QtutorError for ``tokens``
    or ``seconds`` that are not positive, ``rounds < 1`` or ``warmup < 1`` (a warm-up call decides how many calls make
    a round).
    """
    if not tokens > 0 or not seconds > 0 or rounds < 1 or warmup < 1:
        raise QtutorError("energy_per needs tokens > 0, seconds > 0, and at least one round and one warm-up call.")
    for _ in range(warmup):
        fn()
    measure.synchronize(device)
    began = time.perf_counter()
    fn()
    measure.synchronize(device)
    calls = max(1, math.ceil(seconds / max(time.perf_counter() - began, 1e-6)))
    joules, spent = [], []
    for _ in range(rounds):
        done = 0
        with track_energy(device) as used:
            began = time.perf_counter()
            while done < calls or time.perf_counter() - began < seconds:  # the first call may have been a slow one
                fn()
                done += 1
                if done % calls == 0:
                    measure.synchronize(device)  # a GPU's queue hides the time that its work takes
        joules.append(used.joules / done / tokens)
        spent.append((used.seconds, used.watts, done))
    total, calls_done = sum(s for s, _, _ in spent), sum(d for _, _, d in spent)
    se = float(np.std(joules, ddof=1) / math.sqrt(rounds)) if rounds > 1 else math.nan
    low, high = np.percentile(joules, [10, 90])
    watts = sum(s * w for s, w, _ in spent) / total
    return EnergyPer(float(np.mean(joules)), se, float(low), float(high), float(watts), rounds, total,
                     calls_done * tokens / total, used.source)  # fmt: skip


def generation_energy(model, prompt_tokens: int = 128, new_tokens: int = 32, batch: int = 1, device=None,
                      seconds: float = 1.0, rounds: int = 3, graph: bool = False, threads: int | None = None) -> dict:
    """Energy of reading a prompt and of writing, apart: ``{"prefill": EnergyPer, "decode": EnergyPer}``.

    Joules per prompt token and per generated token.  Arguments as in :func:`qtutor.measure.generation_speed`.
    """
    with measure.Generation(model, prompt_tokens, new_tokens, batch, device, graph=graph, threads=threads) as runs:
        how = dict(seconds=seconds, rounds=rounds, device=runs.power)
        prefill = energy_per(runs.prefill, tokens=batch * prompt_tokens, **how)
        runs.prefill()
        return {"prefill": prefill, "decode": energy_per(runs.decode, tokens=batch * new_tokens, **how)}


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
