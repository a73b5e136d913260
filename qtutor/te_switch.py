"""``import transformer_engine.pytorch as te`` that works everywhere.

Transformer Engine needs an NVIDIA GPU of compute capability 8.9 or more for FP8 (Ada, Hopper, Blackwell) and a CUDA
build to import at all.  Where it cannot run, :func:`activate` registers :mod:`qtutor.emulation` under its names, so
that the notebooks' imports, which are those of any real project, mean the emulation:

    status = te_switch.activate()
    import transformer_engine.pytorch as te                    # real, or emulated
    from transformer_engine.common.recipe import DelayedScaling

The emulation rounds the numbers as the hardware does; it is not faster than BF16, and cannot be.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import types
from dataclasses import dataclass
from importlib import import_module, machinery, metadata
from pathlib import Path

from . import QtutorError

_CHECKS = {"DelayedScaling": "is_fp8_available", "Float8CurrentScaling": "is_fp8_available",
           "Float8BlockScaling": "is_fp8_block_scaling_available", "MXFP8BlockScaling": "is_mxfp8_available",
           "NVFP4BlockScaling": "is_nvfp4_available"}  # fmt: skip


@dataclass(frozen=True)
class Status:
    """What :func:`activate` found."""

    real: bool  # NVIDIA's library runs FP8 on this machine
    reason: str  # one clause that says why not
    version: str | None  # of Transformer Engine, where it is installed
    recipes: dict  # name -> (runs here, on the hardware or in the emulation; the reason if not)

    def __str__(self) -> str:
        return f"Transformer Engine {self.version}, real FP8" if self.real else f"emulated: {self.reason}"


def _why_not_real() -> str:
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA GPU here"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        return f"this GPU has compute capability {major}.{minor} and FP8 needs 8.9 or more"
    with contextlib.suppress(ImportError, OSError):  # torch's cuDNN first: TE takes the system's, and two do not mix
        metadata.version("transformer_engine")
        cudnn = Path(import_module("nvidia.cudnn").__path__[0])
        os.environ.setdefault("CUDNN_PATH", str(cudnn))
        for library in sorted((cudnn / "lib").glob("lib*.so.*")):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    try:
        te = import_module("transformer_engine.pytorch")
    except ImportError:
        return "Transformer Engine is not installed (pip install '.[gpu]')"
    except (RuntimeError, OSError) as error:  # an installation without its GPU library raises RuntimeError
        return f"Transformer Engine does not load ({str(error).splitlines()[0]})"
    available, reason = te.is_fp8_available(return_reason=True)
    return "" if available else reason


def _install_emulation() -> None:
    from . import emulation

    def missing(name: str):
        what = " is not emulated: it needs Transformer Engine on a GPU." if not name.startswith("__") else ""
        raise AttributeError(f"transformer_engine.pytorch.{name}{what}")

    root, pytorch, common, recipe, optimizers = modules = [types.ModuleType(name, doc=emulation.__doc__) for name in (
        "transformer_engine", "transformer_engine.pytorch", "transformer_engine.common",
        "transformer_engine.common.recipe", "transformer_engine.pytorch.optimizers")]  # fmt: skip
    for module in modules:
        module.__version__ = "emulated"
        module.__spec__ = machinery.ModuleSpec(module.__name__, None, is_package=True)  # for find_spec
        module.__path__ = []  # a package, so that submodule imports look into sys.modules
    root.pytorch, root.common, common.recipe, pytorch.__getattr__ = pytorch, common, recipe, missing
    pytorch.optimizers = optimizers
    for name, value in vars(emulation).items():
        home = getattr(value, "__module__", None) or ""
        if home.startswith(emulation.__name__):
            is_recipe = home == emulation.recipes.__name__ and isinstance(value, type)
            is_optimizer = home == emulation.optimizers.__name__
            setattr(recipe if is_recipe else optimizers if is_optimizer else pytorch, name, value)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]  # what a failed import of the real one left behind
    sys.modules.update({module.__name__: module for module in modules})


@functools.cache
def activate() -> Status:
    """Make Transformer Engine importable on this machine, real where it can run, else emulated.  Call it before the
    first ``import transformer_engine``; further calls return the same status."""
    try:
        version = metadata.version("transformer_engine")
    except metadata.PackageNotFoundError:
        version = None
    reason = _why_not_real()
    if reason:
        _install_emulation()
    te = sys.modules["transformer_engine.pytorch"]
    recipes = {recipe: getattr(te, check)(return_reason=True) for recipe, check in _CHECKS.items()}
    return Status(not reason, reason, version, recipes)


def swap_linears(model, skip: str | tuple[str, ...] = ("lm_head",)) -> int:
    """Replace every ``nn.Linear`` of a model by a ``te.Linear`` with the same parameters, in place.

    The parameters are the same objects: frozen ones stay frozen, tied ones tied, a layer that occurs twice stays one
    layer, and an optimizer made before goes on training them.  Returns the number of layers replaced.

    Hooks of forward and backward stay.  A layer that has more (a parametrization, hooks of its state_dict, a forward
    put into it) is refused by name, before anything is changed.

    Layers whose name ends with one of ``skip`` stay as they are.  The head stays in higher precision: its output goes
    into the loss, where FP8's error would be seen most.  Layers whose sizes are not multiples of 16 stay too: FP8
    tensor cores cannot multiply them; and subclasses of nn.Linear, which have a forward of their own.
    """
    from torch import nn

    from .fake_quant import plain_linear, refuse_own_ways, swap

    if type(model) is nn.Linear:
        raise QtutorError("A bare nn.Linear cannot be replaced in place: make a te.Linear, or put it into a model.")
    activate()
    te, ends, new = import_module("transformer_engine.pytorch"), (skip,) if isinstance(skip, str) else tuple(skip), {}
    named = [item for item in model.named_modules(remove_duplicate=False) if plain_linear(item[1])]
    kept = {old for name, old in named if name.endswith(ends) or old.in_features % 16 or old.out_features % 16}
    for name, old in named:
        if old not in kept and old not in new:
            refuse_own_ways(name, old)
            layer = te.Linear(old.in_features, old.out_features, bias=old.bias is not None,
                              params_dtype=old.weight.dtype, device=old.weight.device)  # fmt: skip
            layer.weight = old.weight
            if old.bias is not None:
                layer.bias = old.bias
            new[old] = layer.train(old.training)
    swap(model, new)
    return len(new)
