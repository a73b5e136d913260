"""The devices of the course: memory, bandwidth, power, FP8 units and what connects several of them.

    hardware.device("NVIDIA H100 80GB HBM3").memory_gib        # 79.6: by its name here, or as its driver names it
    hardware.Device("my laptop", memory_gib=8, gb_per_s=60)    # one that is not in the table
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import QtutorError
from . import cost


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device.

    ``memory_gib`` as its driver reports it, ``gb_per_s`` (10^9 bytes) and ``watts`` as its maker states them;
    ``compute_capability`` of a CUDA GPU, None for anything else; ``link``: what connects several of them in one
    machine; ``rented_as``: its key in cost.PRICES, "" where nobody's price is known.
    """

    name: str
    memory_gib: float
    gb_per_s: float
    watts: float | None = None
    compute_capability: float | None = None
    link: str = ""
    source: str = ""
    rented_as: str = ""

    def __post_init__(self):
        if not self.memory_gib > 0 or not self.gb_per_s > 0:
            raise QtutorError(f"{self.name} needs memory_gib and gb_per_s above 0, such as 79.6 and 3350 of an H100.")

    @property
    def cuda(self) -> bool:
        return self.compute_capability is not None

    @property
    def fp8(self) -> bool:
        """FP8 tensor cores: Ada (8.9), Hopper (9.0), Blackwell (10.0, 12.0)."""
        return (self.compute_capability or 0) >= 8.9

    @property
    def chip(self) -> tuple:
        """Equal for cards that compute alike: an H200 is an H100 SXM with another memory."""
        return self.compute_capability, self.watts

    @property
    def reserve_gib(self) -> float:
        """Memory to leave for activations and, on a GPU, the CUDA context and its libraries."""
        return 1.5 if self.cuda else 0.5

    @property
    def usd_per_hour(self) -> float | None:
        return cost.PRICES[self.rented_as].usd_per_hour if self.rented_as else None


_NV, _GEFORCE = "https://www.nvidia.com/en-us/data-center/", "https://www.nvidia.com/en-us/geforce/graphics-cards/"
_PRO = "https://www.nvidia.com/en-us/products/workstations/professional-desktop-gpus/rtx-pro-6000/"
_MAC = "https://www.apple.com/mac-studio/specs/"

# Memory in MiB as nvidia-smi shows it with ECC as shipped; of a Mac, the three quarters of its memory that macOS lets
# the GPU use by default.  The watts of a Mac are the most that the whole machine takes from the wall
# (https://support.apple.com/en-us/102027).  Compute capabilities: https://developer.nvidia.com/cuda-gpus
# name, memory (MiB), GB/s, W, compute capability, link, source, key of cost.PRICES
DEVICES = {name: Device(name, mib / 1024, *rest) for name, mib, *rest in (
    ("H100 SXM", 81559, 3350, 700, 9.0, "NVLink", _NV + "h100/", "H100"),
    ("H100 PCIe", 81559, 2000, 350, 9.0, "PCIe", _NV + "h100/", "H100 PCIe"),
    ("H100 NVL", 95830, 3900, 400, 9.0, "NVLink bridge", _NV + "h100/", "H100 NVL"),
    ("H200", 143771, 4800, 700, 9.0, "NVLink", _NV + "h200/", "H200"),
    ("B200", 183359, 8000, 1000, 10.0, "NVLink", _NV + "hgx/", "B200"),
    ("A100 80 GB SXM", 81920, 2039, 400, 8.0, "NVLink", _NV + "a100/", "A100"),
    ("A100 80 GB PCIe", 81920, 1935, 300, 8.0, "PCIe", _NV + "a100/", "A100 PCIe"),
    ("A100 40 GB", 40960, 1555, 400, 8.0, "NVLink", _NV + "a100/", ""),
    ("L40S", 46068, 864, 350, 8.9, "PCIe", _NV + "l40s/", "L40S"),
    ("L4", 23034, 300, 72, 8.9, "PCIe", _NV + "l4/", ""),
    ("A10", 23028, 600, 150, 8.6, "PCIe", _NV + "products/a10-gpu/", ""),
    ("RTX PRO 6000", 97887, 1792, 600, 12.0, "PCIe", _PRO, ""),
    ("RTX 5090", 32607, 1792, 575, 12.0, "PCIe", _GEFORCE + "50-series/rtx-5090/", ""),
    ("RTX 4090", 24564, 1008, 450, 8.9, "PCIe", _GEFORCE + "40-series/rtx-4090/", "RTX 4090"),
    ("RTX 3090", 24576, 936, 350, 8.6, "PCIe", _GEFORCE + "30-series/rtx-3090-3090ti/", ""),
    ("Mac Studio M4 Max 128 GB", 98304, 546, 145, None, "", _MAC, ""),
    ("Mac Studio M3 Ultra 256 GB", 196608, 819, 270, None, "", _MAC, ""),
)}  # fmt: skip


def device(name) -> Device:
    """A :class:`Device`, from itself, its name in :data:`DEVICES`, or the name that its driver gives it."""
    if isinstance(name, Device) or name in DEVICES:
        return DEVICES.get(name, name)
    words = set(str(name).replace("-", " ").split())  # "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"
    near = [known for known in DEVICES if set(known.split()[: 2 if known.startswith("RTX") else 1]) <= words]
    if not near:
        raise QtutorError(f"There is no device {name!r} in the table: make a hardware.Device, or choose one of "
                          f"{', '.join(DEVICES)}.")  # fmt: skip
    return DEVICES[max(near, key=lambda known: len(words & set(known.split())))]
