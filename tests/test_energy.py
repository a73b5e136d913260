"""energy: counters that are played, and what is said where one fails."""

from __future__ import annotations

import math
import sys
import types

import pytest

from qtutor import energy, measure


def _powercap(root, **domains):
    for folder, (name, value, limit) in domains.items():
        path = root / folder.replace("_", ":")
        path.mkdir()
        for file, content in (("name", name), ("energy_uj", value), ("max_energy_range_uj", limit)):
            (path / file).write_text(f"{content}\n")
    return root


def test_rapl_adds_packages_and_memory_and_wraps(tmp_path, monkeypatch):
    root = _powercap(tmp_path, **{
        "intel-rapl_0": ("package-0", 1_000_000, 10_000_000), "intel-rapl_0_0": ("core", 500, 10_000_000),
        "intel-rapl_0_1": ("dram", 9_999_000, 9_999_999), "intel-rapl_1": ("psys", 7, 10_000_000),
    })  # fmt: skip
    monkeypatch.setattr(energy, "POWERCAP", root)
    meter = energy._rapl()
    before = meter.read()
    (root / "intel-rapl:0" / "energy_uj").write_text("3500000")  # 2.5 J
    (root / "intel-rapl:0:0" / "energy_uj").write_text("9999999")  # part of the package: not again
    (root / "intel-rapl:0:1" / "energy_uj").write_text("499000")  # passed its end: 0.5 J
    (root / "intel-rapl:1" / "energy_uj").write_text("9999999")
    assert meter.read() - before == pytest.approx(3.0)
    (root / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.read() is None


def test_rapl_says_where_it_cannot_know(tmp_path, monkeypatch):
    """A counter of 65 kJ that starts anew reads like one that went round; a block of minutes may hide a whole turn."""
    root = _powercap(tmp_path, **{"intel-rapl_0": ("package-0", 60_000_000_000, 65_532_610_987)})
    monkeypatch.setattr(energy, "POWERCAP", root)
    with energy.track_energy("cpu") as used:
        (root / "intel-rapl:0" / "energy_uj").write_text("1000")  # it was reset
    assert math.isnan(used.joules) and used.source == "none: RAPL energy counter jumped"
    clock = iter([0.0, 200.0, 0.0, 90.0])
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    for joules, why in ((math.nan, "none: RAPL energy counter may have begun again twice"),
                        (9.0, "RAPL energy counter")):  # fmt: skip
        with energy.track_energy("cpu") as used:
            now = int((root / "intel-rapl:0" / "energy_uj").read_text())
            (root / "intel-rapl:0" / "energy_uj").write_text(str(now + 9_000_000))
        assert used.joules == pytest.approx(joules, nan_ok=True) and used.source == why


def test_rapl_that_may_not_be_read_becomes_an_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "missing")
    with energy.track_energy("cpu") as used:
        sum(range(10**5))
    assert used.source.startswith("estimate") and used.joules >= 0 and "estimate" in str(used)
    assert used.relative_error == 0 and energy.source_of("cpu").name == used.source


def test_the_estimate_is_cpu_time_times_watts(monkeypatch):
    clock = iter([10.0, 12.5])
    meter = energy._estimate()
    monkeypatch.setattr(energy.time, "process_time", lambda: next(clock))
    assert -(meter.read() - meter.read()) == pytest.approx(2.5 * 4)


class _Nvml(types.ModuleType):
    """NVML, played.  ``counter``: what it reads, in mJ; an exception is raised instead."""

    class NVMLError(Exception):
        pass

    def __init__(self, counter=()):
        super().__init__("pynvml")
        self.counter = iter(counter)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        value = next(self.counter, self.NVMLError("Not Supported"))
        if isinstance(value, Exception):
            raise value
        return value


LOST = _Nvml.NVMLError("GPU is lost")


@pytest.fixture
def gpu(monkeypatch):
    import torch

    monkeypatch.setattr(measure, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))

    def install(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)

    return install


def test_nvml_counter_is_in_millijoules(gpu):
    gpu(_Nvml([5_000_000, 5_040_000, 5_080_000]))
    with energy.track_energy("cuda") as used:
        pass
    assert used.joules == pytest.approx(40) and used.source == "NVML energy counter"


def test_a_short_window_says_so(gpu):
    """The counter is renewed every 0.1 s: of 0.2 s it may have missed half."""
    used = energy.Energy(joules=50.0, seconds=0.2, source="NVML energy counter", step_s=0.1)
    assert used.relative_error == pytest.approx(0.5) and used.watts == 250
    assert used.per(10) is None and used.per(10, within=0.5) == 5.0
    used.seconds = 10.0
    assert used.relative_error == pytest.approx(0.01) and used.per(10) == 5.0 and used.per(used.seconds) == 5.0


@pytest.mark.parametrize("readings, words", [
    ([1, 2, LOST], "was lost"),  # while the block ran
    ([1, LOST, 3], "was lost"),  # at its start
    ([9000, 9000, 10], "ran backwards"),  # the driver was loaded again
    ([2**32 - 5, 2**32 - 5, 7], "ran backwards"),  # a counter of 32 bits began again
    ([5000, 5000, 5000], "did not move"),
    ([10, 10, 9_000_000], "jumped"),  # the driver was loaded again: 9 kJ in no time
])  # fmt: skip
def test_a_counter_that_fails_gives_no_number(gpu, readings, words):
    gpu(_Nvml(readings))
    with energy.track_energy("cuda") as used:
        pass
    assert math.isnan(used.joules) and used.per(1, within=math.inf) is None
    assert used.source.startswith("none: NVML energy counter") and words in used.source


@pytest.mark.parametrize("nvml", [None, _Nvml()])
def test_without_nvml_there_is_no_figure_and_no_error(gpu, nvml):
    gpu(nvml)  # None in sys.modules: the import fails
    with energy.track_energy("cuda") as used:
        energy.time.sleep(0.001)
    assert math.isnan(used.joules) and used.per(1) is None and used.source.startswith("none: ")


def test_track_energy_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), energy.track_energy("cpu") as used:
        1 / 0  # noqa: B018
    assert math.isfinite(used.joules) and used.seconds > 0


def test_timed_counts_the_timed_calls_only(monkeypatch):
    """Two joules a call: the warm-up is in neither figure."""
    calls = []
    monkeypatch.setattr(energy, "source_of", lambda device: energy._Source("played", 0.0, lambda: 2.0 * len(calls)))
    timing, used = energy.timed(lambda: (calls.append(1), energy.time.sleep(0.002)), warmup=3, repeats=4,
                                seconds=0.03, device="cpu")  # fmt: skip
    assert timing.n == len(calls) - 3 >= 4 and used.per(timing.n) == pytest.approx(2)
    assert used.seconds >= 0.03 and used.per(used.seconds) == pytest.approx(used.watts)


def test_gpu_counter():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(4096, 4096, device="cuda")
    timing, used = energy.timed(lambda: x @ x, seconds=1.0, device="cuda")
    assert used.source.startswith(("NVML", "none")) and not used.joules <= 0
    gpu = energy.board()
    if gpu is not None:
        used_bytes, total = gpu.memory()
        assert x.nbytes < used_bytes < total and gpu.watts() > 0 and gpu.mhz() > 0
