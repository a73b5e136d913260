"""Money and CO2e of a token, from its time and its joules.

Both need a number that no program can measure: what an hour of the machine costs, and what the grid emits for a kWh.
:data:`PRICES` and :func:`grid` offer examples, each with its source and date: put in your own.

    cost.cost_per_million_tokens(50, cost.price("H100").usd_per_hour)                 # 22.2 USD
    cost.co2e_grams_per_million_tokens(12, cost.grid("FRA").grams_per_kwh, pue=1.2)   # 224 g
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .. import QtutorError, files

JOULES_PER_KWH = 3.6e6


def cost_per_million_tokens(tokens_per_s: float, usd_per_hour: float) -> float:
    """US dollars for a million tokens, on a machine that costs ``usd_per_hour`` and is busy all the time.
    ``usd_per_hour / 3600 / tokens_per_s * 1e6``.  A machine that waits half the time costs twice as much a token."""
    if not (0 < tokens_per_s < math.inf and 0 <= usd_per_hour < math.inf):
        raise QtutorError(f"{tokens_per_s!r} tokens/s at {usd_per_hour!r} USD an hour: give a speed above 0, and a "
                          "price that is not negative.")  # fmt: skip
    return usd_per_hour / 3600 / tokens_per_s * 1e6


def co2e_grams_per_million_tokens(joules_per_token: float, grams_per_kwh: float, pue: float = 1.0) -> float:
    """Grams of CO2 equivalent for a million tokens, of the electricity alone (making the hardware is not in it).

    ``joules_per_token * 1e6 / 3.6e6 * pue`` kilowatt-hours.  ``pue`` (power usage effectiveness): energy of the data
    centre / energy of its computers; 1.0 counts the device alone.  The mean over data centres is 1.5 to 1.6, that of
    the largest operators about 1.1 (Uptime Institute, Global Data Center Survey 2024,
    https://uptimeinstitute.com/resources/research-and-reports).
    """
    if not (0 <= joules_per_token < math.inf and 0 <= grams_per_kwh < math.inf and 1 <= pue < math.inf):
        raise QtutorError(f"{joules_per_token!r} J a token, {grams_per_kwh!r} g a kWh and a PUE of {pue!r}: none may "
                          "be negative, and a PUE is total energy over the computers' energy, at least 1.")  # fmt: skip
    return joules_per_token * 1e6 / JOULES_PER_KWH * pue * grams_per_kwh


def monthly(tokens_per_s: float, joules_per_token: float, tokens: float, usd_per_hour: float,
            grams_per_kwh: float, pue: float = 1.0) -> dict:  # fmt: skip
    """What ``tokens`` tokens a month take on a machine that is busy all the time."""
    per_million = cost_per_million_tokens(tokens_per_s, usd_per_hour)
    kwh = joules_per_token * tokens / JOULES_PER_KWH * pue
    return {"usd_per_million": per_million, "usd": per_million * tokens / 1e6, "hours": tokens / tokens_per_s / 3600,
            "kwh": kwh, "kg_co2e": kwh * grams_per_kwh / 1000}  # fmt: skip


@dataclass(frozen=True)
class Price:
    """An example of what an hour of a machine costs on demand, read at ``source`` on ``date``; it changes monthly."""

    name: str
    usd_per_hour: float
    what: str
    source: str
    date: str


# Providers' own list prices, but for the last four: a survey's lowest offer, which nobody has to honour.
_RUNPOD, _AWS = "https://www.runpod.io/pricing", "https://aws.amazon.com/ec2/pricing/on-demand/"
_SURVEY = "https://deploybase.ai/articles/runpod-gpu-pricing"
PRICES = {price.name: price for price in (
    Price("H200", 4.59, "one H200 141 GB, RunPod Secure Cloud", _RUNPOD, "2026-10-07"),
    Price("H100", 3.99, "one H100 SXM 80 GB, RunPod Secure Cloud", _RUNPOD, "2026-11-09"),
    Price("H100 PCIe", 2.89, "one H100 PCIe 80 GB, RunPod Secure Cloud", _RUNPOD, "2026-11-09"),
    Price("H100 NVL", 3.19, "one H100 NVL 94 GB, RunPod Secure Cloud", _RUNPOD, "2026-11-09"),
    Price("H100 AWS", 6.88, "an eighth of a p5.48xlarge, us-east-1", _AWS, "2026-11-09"),
    Price("B200", 6.79, "one B200 180 GB, RunPod Secure Cloud", _RUNPOD, "2026-10-07"),
    Price("A100", 1.79, "one A100 SXM 80 GB, RunPod Secure Cloud", _RUNPOD, "2026-11-09"),
    Price("A100 PCIe", 1.79, "one A100 PCIe 80 GB, RunPod Secure Cloud", _RUNPOD, "2026-11-09"),
    Price("L40S", 1.861, "g6e.xlarge: one L40S 48 GB, us-east-1", _AWS, "2026-01-19"),
    Price("L4", 0.8048, "g6.xlarge: one L4 24 GB, us-east-1", _AWS, "2026-01-19"),
    Price("CPU 16 vCPU", 0.714, "c7i.4xlarge: 16 vCPU, 32 GiB, us-east-1", _AWS, "2026-01-19"),
    Price("RTX PRO 6000", 0.89, "one RTX PRO 6000 96 GB, lowest offer of a survey", _SURVEY, "2026-03-10"),
    Price("RTX 5090", 0.69, "one RTX 5090 32 GB, lowest offer of a survey", _SURVEY, "2026-03-10"),
    Price("RTX 4090", 0.34, "one RTX 4090 24 GB, lowest offer of a survey", _SURVEY, "2026-03-10"),
    Price("RTX 3090", 0.22, "one RTX 3090 24 GB, lowest offer of a survey", _SURVEY, "2026-03-10"),
)}  # fmt: skip


def price(name: str) -> Price:
    """The example price of a machine, by its name in :data:`PRICES`."""
    found = {key.lower(): value for key, value in PRICES.items()}.get(str(name).lower())
    if found is None:
        raise QtutorError(f"There is no price for {name!r}: choose one of {', '.join(PRICES)}, or give your own.")
    return found


@dataclass(frozen=True)
class CarbonGrid:
    """Grams of CO2 equivalent for a kWh of a country's electricity, mean of ``year``."""

    code: str
    name: str
    grams_per_kwh: float
    year: int
    source: str


@cache
def grids() -> list[CarbonGrid]:
    """All grids, from the cleanest to the dirtiest: codecarbon's table, where it is installed, and the world's mean.
    Yearly means of a whole country: the hour and the place within it can differ by a factor of several."""
    spec, source = find_spec("codecarbon"), "Our World in Data and Ember, in codecarbon's global_energy_mix.json"
    path = Path(spec.origin).parent / "data/private_infra/global_energy_mix.json" if spec else None
    table = files.read_json(path) if path else {}
    found = [CarbonGrid(code, row["country_name"], float(row["carbon_intensity"]), int(row["year"]), source)
             for code, row in table.items() if row.get("carbon_intensity")]  # fmt: skip
    world = CarbonGrid("WLD", "World", 475.0, 2018,
                       "IEA, https://www.iea.org/reports/global-energy-co2-status-report-2019/emissions")  # fmt: skip
    return sorted([*found, world], key=lambda g: g.grams_per_kwh)


def grid(where: str = "World") -> CarbonGrid:
    """The grid of a country, by its English name or three-letter code (ISO 3166-1), or of the ``"World"``."""
    for row in grids():
        if str(where).lower() in (row.name.lower(), row.code.lower()):
            return row
    raise QtutorError(f"There is no grid {where!r} in the table: use an English country name or its three-letter code.")
