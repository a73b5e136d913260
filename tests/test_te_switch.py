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
    assert real.optimizers.FusedAdam is te.FusedAdam and not hasattr(real, "FusedAdam")
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


@pytest.mark.parametrize("installed", [True, False])
def test_a_cudnn_that_does_not_load_stops_nobody(tmp_path, installed):
    """On a machine that says it has an H100: a damaged library is passed over, and none is touched without TE."""
    (tmp_path / "nvidia" / "cudnn" / "lib").mkdir(parents=True)
    (tmp_path / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9").write_text("no library")
    if installed:
        (tmp_path / "transformer_engine-2.20.2.dist-info").mkdir()
        (tmp_path / "transformer_engine-2.20.2.dist-info" / "METADATA").write_text("Name: transformer_engine\n"
                                                                                   "Version: 2.20.2\n")  # fmt: skip
    code = ("import os, torch\n"
            "torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda: (9, 0)\n"
            "from qtutor import te_switch; print(te_switch._why_not_real(), os.environ.get('CUDNN_PATH'), sep='|')")
    done = subprocess.run([sys.executable, "-S", "-W", "ignore", "-c",
                           f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT), *sys.path]!r}\n{code}"],
                          env={k: v for k, v in os.environ.items() if k != "CUDNN_PATH"}, capture_output=True,
                          text=True, check=True)  # fmt: skip
    reason, path = done.stdout.strip().split("|")
    if te_switch.activate().version is None:  # else it is really here, and may load
        assert "not installed" in reason
        assert path == (str(tmp_path / "nvidia" / "cudnn") if installed else "None")


@pytest.mark.gpu
def test_torch_and_transformer_engine_load_one_cudnn():
    """After torch has loaded parts of its own: a system's cuDNN beside it gave undefined symbols, or other results."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    code = ("import torch; x = torch.randn(2, 8, 8, 8, device='cuda'); torch.nn.functional.conv2d(x, x)\n"
            "from qtutor import te_switch; print(te_switch.activate().reason)\n"
            "print(*{line.split()[-1].rpartition('/')[0] for line in open('/proc/self/maps') if 'libcudnn_' in line})")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    reason, folders = done.stdout.splitlines()
    if "not installed" in reason:
        pytest.skip(reason)
    assert not reason and len(folders.split()) == 1, done.stdout + done.stderr


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


class LoRA(nn.Module):
    """A frozen base with two small matrices beside it, as adapters have."""

    def __init__(self, base, rank=8):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_lora_on_a_frozen_base_trains_the_adapters_alone():
    model = nn.Sequential(LoRA(nn.Linear(32, 32)), nn.ReLU(), LoRA(nn.Linear(32, 32)))
    assert te_switch.swap_linears(model) == 2  # a rank of 8 is no multiple of 16
    assert type(model[0].a) is nn.Linear and not model[0].base.weight.requires_grad
    with te.autocast(recipe=DelayedScaling()):
        y = model(torch.randn(16, 32))
    y.square().sum().backward()
    for layer in (model[0], model[2]):
        assert layer.base.weight.grad is None and layer.base.bias.grad is None
        assert layer.b.weight.grad.abs().sum() > 0 and layer.a.weight.grad is not None


def test_swap_linears_keeps_hooks_modes_and_dtypes():
    heard = []
    model = nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16), nn.Linear(32, 32)).eval()
    model[1].train()
    handles = [model[0].register_forward_pre_hook(lambda *_: heard.append("before")),
               model[0].register_forward_hook(lambda *_, **kwargs: heard.append("after"), with_kwargs=True),
               model[0].register_full_backward_hook(lambda *_: heard.append("backward"))]  # fmt: skip
    assert te_switch.swap_linears(model) == 2
    assert model[0].weight.dtype == torch.bfloat16 and not model[0].training and model[1].training
    model[0](torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert heard == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model[0](torch.randn(16, 32, dtype=torch.bfloat16))
    assert len(heard) == 3


def with_forward(layer):
    layer.forward = lambda x: x
    return layer


def with_a_part(layer):
    layer.register_buffer("mask", torch.ones(32))
    return layer


def with_state_hook(layer):
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


OWN_WAYS = {
    "a parametrization": nn.utils.parametrizations.weight_norm,
    "a weight that is computed": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "a forward of its own": with_forward, "parts of its own": with_a_part, "hooks of its state_dict": with_state_hook,
}  # fmt: skip


@pytest.mark.parametrize("what", OWN_WAYS)
def test_what_a_new_layer_would_lose_is_refused_by_name(what):
    import torch.nn.utils.prune  # noqa: F401

    from qtutor import fake_quant

    model = nn.Sequential(nn.Linear(32, 32), OWN_WAYS[what](nn.Linear(32, 32)))
    for swap in (te_switch.swap_linears, fake_quant.prepare):
        with pytest.raises(QtutorError, match=f"Layer '1' has {what}"):
            swap(model)
        assert type(model[0]) is nn.Linear and isinstance(model[1], nn.Linear)
        assert not model[0]._forward_pre_hooks
    assert te_switch.swap_linears(model, skip="1") == 1 and isinstance(model[1], nn.Linear)


def test_skip_may_be_one_name_and_subclasses_stay():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(dict(up=nn.Linear(32, 32), down=nn.Linear(32, 32), own=Own(32, 32)))
    assert te_switch.swap_linears(model, skip="down") == 1
    assert type(model["down"]) is nn.Linear and type(model["own"]) is Own
    assert not isinstance(model["up"], nn.Linear)
