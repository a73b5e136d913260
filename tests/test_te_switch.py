"""te_switch: the real library or the emulation under its name, and swap_linears."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qtutor import QtutorError, te_switch
from qtutor import emulation as te
from qtutor.emulation import DelayedScaling

ROOT = Path(__file__).resolve().parents[1]


def test_activate_installs_the_names():
    status = te_switch.activate()
    assert te_switch.activate() is status
    if status.real:
        return
    import transformer_engine.common.recipe as recipe
    import transformer_engine.pytorch as real

    assert real.Linear is te.Linear and recipe.DelayedScaling is DelayedScaling
    assert importlib.util.find_spec("transformer_engine.pytorch") is not None  # accelerate asks
    assert "emulated" in str(status) and status.recipes["DelayedScaling"] == (True, "")
    for name, (available, reason) in status.recipes.items():
        assert available or reason.endswith("."), name


@pytest.mark.slow
def test_activate_survives_an_installation_without_its_gpu_library(tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('no GPU library')\n")
    code = ("from qtutor import te_switch; s = te_switch.activate(); import transformer_engine.pytorch as m; "
            "print(s.real, m.Linear.__module__)")  # fmt: skip
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "PYTHONPATH": paths},
                            capture_output=True, text=True, check=True)  # fmt: skip
    if not torch.cuda.is_available():
        assert result.stdout.split() == ["False", "qtutor.emulation.modules"]


def test_what_is_not_emulated_is_named_and_not_merely_missing():
    if te_switch.activate().real:
        return
    import transformer_engine.pytorch as real

    with pytest.raises(
        AttributeError, match="MultiheadAttention is not emulated: it needs Transformer Engine on a GPU"
    ):
        real.MultiheadAttention  # noqa: B018
    with pytest.raises(ImportError, match="GroupedLinear"):
        from transformer_engine.pytorch import GroupedLinear  # noqa: F401


def test_swap_linears_keeps_function_names_and_weights():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(a=nn.Linear(32, 48), odd=nn.Linear(20, 48), lm_head=nn.Linear(48, 64, bias=False)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert te_switch.swap_linears(model) == 1
    assert type(model["odd"]) is type(model["lm_head"]) is nn.Linear and type(model["a"]) is not nn.Linear
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_swap_linears_changes_nothing_but_the_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
            self.a, self.frozen = nn.Linear(32, 32), nn.Linear(32, 32).requires_grad_(False)
            self.out.weight, self.b = self.table.weight, self.a

    model = Model()
    before, weight = list(model.parameters()), model.a.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in before if p.requires_grad], lr=1.0)
    assert te_switch.swap_linears(model) == 3
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert model.a is model.b and type(model.a) is not nn.Linear
    model.a(torch.randn(16, 32)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, model.a.weight)


def test_a_bare_linear_is_refused():
    with pytest.raises(QtutorError, match="make a te.Linear"):
        te_switch.swap_linears(nn.Linear(32, 32))
