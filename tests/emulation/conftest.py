"""Every test of the emulation begins outside of all regions, with the same random numbers."""

import pytest
import torch

from qtutor import emulation


@pytest.fixture(autouse=True)
def fresh_region(monkeypatch):
    for name, value in dict(members={}, enabled=False, calibrating=False, recipe=None, depth=0, first=False).items():
        monkeypatch.setattr(emulation.regions.Region, name, value)
    torch.manual_seed(0)
