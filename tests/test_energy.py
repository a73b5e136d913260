"""energy: arithmetic by hand, counters that are played, codecarbon's own figures."""

from __future__ import annotations

import math
import re
import sys
import types

import pytest
import tiny_llama

from qtutor import QtutorError, energy, measure

# ------------------------------------------------------------------------------------------------------ arithmetic


def test_cost_by_hand():
    # 3.60 USD an hour are 0.001 USD a second; at 1,000 tokens/s a million tokens take 1,000 s
    assert energy.cost_per_million_tokens(1000, 3.60) == pytest.approx(1.0)
    assert energy.cost_per_million_tokens(500, 3.60) == pytest.approx(2.0)


def test_kwh_and_co2e_by_hand():
    # 3.6 J a token are 3.6 MJ a million tokens, which is one kWh
    assert energy.kwh_per_million_tokens(3.6) == pytest.approx(1.0)
    assert energy.kwh_per_million_tokens(3.6, pue=1.5) == pytest.approx(1.5)
    assert energy.co2e_grams_per_million_tokens(3.6, 400) == pytest.approx(400)
    assert energy.co2e_grams_per_million_tokens(0.36, 500, pue=1.2) == pytest.approx(60)


@pytest.mark.parametrize("call", [
    lambda: energy.cost_per_million_tokens(0, 1),
    lambda: energy.cost_per_million_tokens(10, -1),
    lambda: energy.cost_per_million_tokens("fast", 1),
    lambda: energy.kwh_per_million_tokens(math.nan),
    lambda: energy.co2e_grams_per_million_tokens(1, 400, pue=0.5),
    lambda: energy.price("H9000"),
    lambda: energy.grid("Atlantis"),
    lambda: energy.energy_per(lambda: None, tokens=0),
    lambda: energy.energy_per(lambda: None, seconds=0),
    lambda: energy.energy_per(lambda: None, rounds=0),
])  # fmt: skip
def test_bad_input_is_one_sentence(call):
    with pytest.raises(QtutorError) as error:
        call()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ prices and grids


def test_every_price_has_a_source_and_a_date():
    frame = energy.prices_frame()
    assert {"H100", "H200", "A100", "L4", "L40S", "CPU 16 vCPU"} <= set(frame.name)
    assert (frame.usd_per_hour > 0).all() and frame.source.str.startswith("https://").all()
    assert frame.date.map(lambda d: re.fullmatch(r"20\d\d-\d\d-\d\d", d) is not None).all()
    assert energy.price("h100") is energy.PRICES["H100"]


def test_grids_are_codecarbons():
    pytest.importorskip("codecarbon")
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    library = Emissions(DataSource())
    for code in ("FRA", "DEU", "IND", "SWE"):
        kg = library.get_country_emissions(Energy.from_energy(kWh=1), GeoMetadata(code))
        assert energy.grid(code).grams_per_kwh == pytest.approx(1000 * kg)
    world = DataSource().get_carbon_intensity_per_source_data()["world_average"]
    assert energy.grid().grams_per_kwh == world and len(energy.grids()) > 150
    assert energy.grid("france") == energy.grid("FRA") and energy.grid("FRA").year >= 2023


def test_without_codecarbon_a_few_grids_remain(monkeypatch):
    everything = {g.code: g for g in energy.grids()}
    energy.grids.cache_clear()
    monkeypatch.setattr("importlib.resources.files", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    try:
        few = energy.grids()
    finally:
        energy.grids.cache_clear()
    assert 5 < len(few) < 20 and all(everything[g.code] == g for g in few)  # in step with the table


# ---------------------------------------------------------------------------------------------------------- meters


def _powercap(root, **domains):
    for folder, (name, value, limit) in domains.items():
        path = root / folder.replace("_", ":")
        path.mkdir()
        for file, content in (("name", name), ("energy_uj", value), ("max_energy_range_uj", limit)):
            (path / file).write_text(f"{content}\n")
    return root


def test_rapl_adds_packages_and_memory_and_wraps(tmp_path):
    root = _powercap(tmp_path, **{
        "intel-rapl_0": ("package-0", 1_000_000, 10_000_000), "intel-rapl_0_0": ("core", 500, 10_000_000),
        "intel-rapl_0_1": ("dram", 9_999_000, 9_999_999), "intel-rapl_1": ("psys", 7, 10_000_000),
    })  # fmt: skip
    meter = energy._Rapl(root)
    meter.start()
    (root / "intel-rapl:0" / "energy_uj").write_text("3500000")  # 2.5 J
    (root / "intel-rapl:0:0" / "energy_uj").write_text("9999999")  # part of the package: not again
    (root / "intel-rapl:0:1" / "energy_uj").write_text("499000")  # passed its end: 0.5 J
    (root / "intel-rapl:1" / "energy_uj").write_text("9999999")
    assert meter.stop() == pytest.approx(3.0)


def test_rapl_that_may_not_be_read_becomes_an_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "missing")
    with energy.track_energy("cpu") as used:
        sum(range(10**5))
    assert used.estimated and used.joules >= 0 and "estimate" in str(used)
    assert energy.source_of("cpu") == used.source


def test_the_estimate_is_cpu_time_times_watts(monkeypatch):
    clock = iter([10.0, 12.5])
    meter = energy._CpuEstimate()
    monkeypatch.setattr(energy.time, "process_time", lambda: next(clock))
    meter.start()
    assert meter.stop() == pytest.approx(2.5 * meter.watts_per_thread) and 0.5 < meter.watts_per_thread < 100


class _Nvml(types.ModuleType):
    """NVML, played: a GPU that draws 250 W, with a counter or without."""

    class NVMLError(Exception):
        pass

    def __init__(self, counter=True, power=True):
        super().__init__("pynvml")
        self.counter, self.power, self.millijoules = counter, power, 5_000_000

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counter:
            raise self.NVMLError
        self.millijoules += 40_000
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle):
        if not self.power:
            raise self.NVMLError
        return 250_000


@pytest.fixture
def gpu(monkeypatch):
    import torch

    monkeypatch.setattr(measure, "_on_gpu", lambda device: True)
    monkeypatch.setattr(measure, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))

    def install(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)

    return install


def test_nvml_counter_is_in_millijoules(gpu):
    gpu(_Nvml())
    with energy.track_energy() as used:
        pass
    assert used.joules == pytest.approx(40) and used.source == "NVML energy counter" and not used.estimated


def test_without_a_counter_power_is_sampled(gpu):
    gpu(_Nvml(counter=False))
    with energy.track_energy() as used:
        energy.time.sleep(0.1)
    assert used.source == "NVML power, sampled" and used.joules == pytest.approx(250 * used.seconds, rel=0.2)


@pytest.mark.parametrize("nvml", [None, _Nvml(counter=False, power=False)])
def test_without_nvml_there_is_no_figure_and_no_error(gpu, nvml):
    gpu(nvml)  # None in sys.modules: the import fails
    found = energy.energy_per(lambda: energy.time.sleep(0.001), seconds=0.002, rounds=2)
    assert math.isnan(found.joules_per_token) and found.source.startswith("none: ") and not found.estimated
    assert found.row()["joules_per_token"] is None


def test_track_energy_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), energy.track_energy("cpu") as used:
        1 / 0  # noqa: B018
    assert math.isfinite(used.joules) and used.seconds > 0


# -------------------------------------------------------------------------------------------------------- per token


def test_energy_per_divides_by_calls_and_tokens(monkeypatch):
    calls = []

    class Two:
        """Two joules a call."""

        source = "played"

        def start(self):
            self.before = len(calls)

        def stop(self):
            return 2.0 * (len(calls) - self.before)

    def work():
        calls.append(1)
        energy.time.sleep(0.002)

    monkeypatch.setattr(energy, "_meter", lambda device: Two())
    found = energy.energy_per(work, tokens=8, seconds=0.03, rounds=4, device="cpu")
    assert found.joules_per_token == pytest.approx(0.25) and found.se == pytest.approx(0) and found.rounds == 4
    assert found.low == pytest.approx(0.25) == pytest.approx(found.high)
    assert found.seconds >= 4 * 0.03  # every round lasts as long as was asked
    assert found.tokens_per_s * found.seconds == pytest.approx(8 * (len(calls) - 2))  # a warm-up, one to count by
    assert found.watts == pytest.approx(0.25 * found.tokens_per_s)


def test_generation_energy_has_both_halves():
    found = energy.generation_energy(tiny_llama.model(), 8, 3, batch=2, seconds=0.02, rounds=2)
    assert set(found) == {"prefill", "decode"}
    assert all(part.joules_per_token >= 0 and part.rounds == 2 for part in found.values())


def test_gpu_counter():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(4096, 4096, device="cuda")
    found = energy.energy_per(lambda: x @ x, seconds=0.5, rounds=2, device="cuda")
    assert found.source.startswith(("NVML", "none")) and not found.joules_per_token <= 0
