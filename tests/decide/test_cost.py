"""cost: arithmetic by hand, codecarbon's own figures."""

from __future__ import annotations

import math
import re

import pytest

from qtutor import QtutorError
from qtutor.decide import cost


def test_cost_by_hand():
    # 3.60 USD an hour are 0.001 USD a second; at 1,000 tokens/s a million tokens take 1,000 s
    assert cost.cost_per_million_tokens(1000, 3.60) == pytest.approx(1.0)
    assert cost.cost_per_million_tokens(500, 3.60) == pytest.approx(2.0)


def test_kwh_and_co2e_by_hand():
    # 3.6 J a token are 3.6 MJ a million tokens, which is one kWh
    assert cost.co2e_grams_per_million_tokens(3.6, 400) == pytest.approx(400)
    assert cost.co2e_grams_per_million_tokens(0.36, 500, pue=1.2) == pytest.approx(60)


@pytest.mark.parametrize("call", [
    lambda: cost.cost_per_million_tokens(0, 1),
    lambda: cost.cost_per_million_tokens(10, -1),
    lambda: cost.co2e_grams_per_million_tokens(math.nan, 400),
    lambda: cost.co2e_grams_per_million_tokens(1, 400, pue=0.5),
    lambda: cost.price("H9000"),
    lambda: cost.grid("Atlantis"),
])  # fmt: skip
def test_bad_input_is_one_sentence(call):
    with pytest.raises(QtutorError) as error:
        call()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_every_price_has_a_source_and_all_gpus_one_date():
    assert {"H100", "H200", "A100", "L40S", "CPU 16 vCPU"} <= set(cost.PRICES)
    for price in cost.PRICES.values():
        assert price.usd_per_hour > 0 and price.source.startswith("https://") and price.what
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", price.date)
    gpus = [price for name, price in cost.PRICES.items() if not name.startswith("CPU")]
    assert len({(price.source, price.date) for price in gpus}) == 1
    assert cost.price("h100") is cost.PRICES["H100"]


def test_grids_are_codecarbons_of_one_year():
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    library = Emissions(DataSource())
    for code in ("FRA", "DEU", "IND", "SWE"):
        kg = library.get_country_emissions(Energy.from_energy(kWh=1), GeoMetadata(code))
        assert cost.grid(code).grams_per_kwh == pytest.approx(1000 * kg)
    assert {grid.year for grid in cost.grids()} == {cost.YEAR} and len(cost.grids()) > 70
    assert cost.grid("france") == cost.grid("FRA")


def test_the_world_is_of_the_same_series_as_the_countries():
    """The world's figure lies where the mean over codecarbon's countries does, weighted by what they generate."""
    from codecarbon.input import DataSource

    table = DataSource().get_global_energy_mix_data().values()
    rows = [row for row in table if row.get("carbon_intensity") and row.get("total_TWh")]
    mean = sum(r["carbon_intensity"] * r["total_TWh"] for r in rows) / sum(r["total_TWh"] for r in rows)
    assert cost.grid().grams_per_kwh == pytest.approx(mean, rel=0.01)
