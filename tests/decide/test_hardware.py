"""The table of devices: complete, priced by cost.PRICES, and found by the names that drivers give."""

import pytest

from qtutor import QtutorError
from qtutor.decide import cost, hardware


def test_the_table_is_complete():
    for device in hardware.DEVICES.values():
        assert device.source.startswith("https://") and device.watts > 0 and device.cuda == bool(device.link)
        assert not device.rented_as or device.usd_per_hour == cost.PRICES[device.rented_as].usd_per_hour


@pytest.mark.parametrize("driver, name", [
    ("NVIDIA H200", "H200"), ("H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("H100", "H100 SXM"),
    ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA B200", "B200"), ("NVIDIA L4", "L4"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB SXM"),
])  # fmt: skip
def test_names_of_drivers(driver, name):
    assert hardware.device(driver).name == name


def test_fp8_units():
    fp8 = {name for name, device in hardware.DEVICES.items() if device.fp8}
    assert fp8 == {"H100 SXM", "H100 PCIe", "H100 NVL", "H200", "B200", "L40S", "L4", "RTX PRO 6000", "RTX 5090",
                   "RTX 4090"}  # fmt: skip


def test_a_device_of_your_own():
    laptop = hardware.Device("my laptop", memory_gib=8, gb_per_s=60)
    assert hardware.device(laptop) is laptop and not laptop.cuda and not laptop.fp8 and laptop.usd_per_hour is None
    assert laptop.reserve_gib < hardware.DEVICES["L4"].reserve_gib


def test_what_is_no_device_is_one_sentence():
    for call in (lambda: hardware.device("Abacus"), lambda: hardware.Device("nothing", 0, 60)):
        with pytest.raises(QtutorError) as error:
            call()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
