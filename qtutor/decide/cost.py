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


@dataclass(frozen=True)
class Price:
    """An example of what an hour of a machine costs on demand, read at ``source`` on ``date``; it changes monthly."""

    name: str
    usd_per_hour: float
    what: str
    source: str
    date: str


# One list, of one day: what RunPod's page asked for one card in its own data centres (Secure Cloud), as transcribed in
# https://github.com/tgarg01/silybench-data/blob/main/derived/csv/gpu_prices.csv.  It has no CPUs: that price is AWS's,
# of c7i.4xlarge in us-east-1.
_RUNPOD, _AWS = "https://www.runpod.io/pricing", "https://aws.amazon.com/ec2/pricing/on-demand/"
PRICES = {name: Price(name, usd, f"one {what}, RunPod Secure Cloud", _RUNPOD, "2026-09-25") for name, usd, what in (
    ("H200", 4.59, "H200 141 GB"), ("H100", 3.49, "H100 SXM 80 GB"), ("H100 PCIe", 2.89, "H100 PCIe 80 GB"),
    ("H100 NVL", 3.19, "H100 NVL 94 GB"), ("B200", 6.79, "B200 180 GB"), ("A100", 1.59, "A100 SXM 80 GB"),
    ("A100 PCIe", 1.59, "A100 PCIe 80 GB"), ("L40S", 1.09, "L40S 48 GB"), ("RTX 4090", 0.74, "RTX 4090 24 GB"),
)}  # fmt: skip
PRICES["CPU 16 vCPU"] = Price("CPU 16 vCPU", 0.714, "c7i.4xlarge: 16 vCPU, 32 GiB, us-east-1", _AWS, "2026-01-19")


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


YEAR = 2023  # of all grids, so that they compare


@cache
def grids() -> list[CarbonGrid]:
    """All grids, from the cleanest to the dirtiest: one series, Ember's life-cycle CO2 equivalent of :data:`YEAR`.
    Countries from codecarbon's table, where it is installed and has that year; the world from the same edition.
    Yearly means of a whole country: the hour and the place within it can differ by a factor of several."""
    spec, source = find_spec("codecarbon"), "Ember by way of Our World in Data, in codecarbon's global_energy_mix.json"
    path = Path(spec.origin).parent / "data/private_infra/global_energy_mix.json" if spec else None
    table = files.read_json(path) if path else {}
    found = [CarbonGrid(code, row["country_name"], float(row["carbon_intensity"]), YEAR, source)
             for code, row in table.items() if row.get("carbon_intensity") and int(row["year"]) == YEAR]  # fmt: skip
    world = CarbonGrid("WLD", "World", 481.0, YEAR, "Ember, edition of July 2024: https://www.statista.com/statistics/"
                       "943137/global-emissions-intensity-power-sector-by-country/")  # fmt: skip
    return sorted([*found, world], key=lambda g: g.grams_per_kwh)


def grid(where: str = "World") -> CarbonGrid:
    """The grid of a country, by its English name or three-letter code (ISO 3166-1), or of the ``"World"``."""
    for row in grids():
        if str(where).lower() in (row.name.lower(), row.code.lower()):
            return row
    raise QtutorError(f"There is no grid {where!r} in the table: use an English country name or its three-letter code.")
