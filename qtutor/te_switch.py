"""``import transformer_engine.pytorch as te`` that works everywhere.

Transformer Engine needs an NVIDIA GPU of compute capability 8.9 or more for FP8 (Ada, Hopper, Blackwell)
and a CUDA build to import at all.  :func:`activate` looks at this machine.  Where the real library can run,
it does nothing; elsewhere it registers :mod:`qtutor.emulation` under Transformer Engine's names, so that
the notebooks' imports, which are those of any real project, mean the emulation:

    status = te.activate()
    import transformer_engine.pytorch as te                    # real, or emulated
    from transformer_engine.common.recipe import DelayedScaling

The emulation rounds the numbers as the hardware does; it is not faster than BF16, and cannot be.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import sys
import types
from dataclasses import dataclass, field

_NAMES = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common",
          "transformer_engine.common.recipe")  # fmt: skip
_CHECKS = {  # recipe -> (function of transformer_engine.pytorch that says whether it runs here)
    "DelayedScaling": "is_fp8_available",
    "Float8CurrentScaling": "is_fp8_available",
    "Float8BlockScaling": "is_fp8_block_scaling_available",
    "MXFP8BlockScaling": "is_mxfp8_available",
    "NVFP4BlockScaling": "is_nvfp4_available",
}
_status = None


@dataclass(frozen=True)
class Status:
    """What :func:`activate` found.

    Attributes:
        real: True where NVIDIA's library runs FP8 on this machine.
        reason: one clause that says why not, empty where ``real``.
        version: Transformer Engine's version where it is installed, else None.
        recipes: recipe name -> (runs here, on the hardware or in the emulation; the reason if not).
    """

    real: bool
    reason: str
    version: str | None
    recipes: dict = field(default_factory=dict)

    def __str__(self) -> str:
        if self.real:
            return f"Transformer Engine {self.version}, real FP8"
        return f"emulated: {self.reason}"


def _why_not_real() -> str:
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA GPU here"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        return f"this GPU has compute capability {major}.{minor} and FP8 needs 8.9 or more"
    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return "Transformer Engine is not installed (pip install '.[gpu]')"
    except (RuntimeError, OSError) as error:  # an installation without its GPU library raises RuntimeError
        return f"Transformer Engine does not load ({str(error).splitlines()[0]})"
    available, reason = te.is_fp8_available(return_reason=True)
    return "" if available else reason


def _recipes() -> dict:
    module = sys.modules["transformer_engine.pytorch"]
    found = {}
    for recipe, check in _CHECKS.items():
        function = getattr(module, check, None)
        if function is None:
            found[recipe] = (False, "this version of Transformer Engine does not have it")
        else:
            available, reason = function(return_reason=True)
            found[recipe] = (bool(available), reason if not available else "")
    return found


def _install_emulation() -> None:
    from . import emulation

    modules = {name: types.ModuleType(name, doc=emulation.__doc__) for name in _NAMES}
    for name, module in modules.items():
        module.__version__ = "emulated"
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)  # find_spec() asks for it
        module.__path__ = []  # a package, so that submodule imports look into sys.modules
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for name in emulation.__all__:
        setattr(modules["transformer_engine.pytorch"], name, getattr(emulation, name))
    for name in emulation.RECIPES:
        setattr(modules["transformer_engine.common.recipe"], name, getattr(emulation, name))
    for name in list(sys.modules):  # what a failed import of the real one left behind
        if name == "transformer_engine" or name.startswith("transformer_engine."):
            del sys.modules[name]
    sys.modules.update(modules)


def activate() -> Status:
    """Make Transformer Engine importable on this machine, real where it can run, else emulated.

    Call it before the first ``import transformer_engine``; further calls return the same status.
    """
    global _status
    if _status is None:
        try:
            version = importlib.metadata.version("transformer_engine")
        except importlib.metadata.PackageNotFoundError:
            version = None
        reason = _why_not_real()
        if reason:
            _install_emulation()
        _status = Status(not reason, reason, version, _recipes())
    return _status


def swap_linears(model, skip: tuple[str, ...] = ("lm_head",)) -> int:
    """Replace every ``nn.Linear`` of a model by a ``te.Linear`` with the same weights, in place.

    Args:
        model: any module; its parameters keep their names, dtype and device.
        skip: layers whose name ends with one of these stay as they are.  The head stays in higher precision:
            its output goes into the loss, where FP8's error would be seen most.

    Returns:
        The number of layers replaced.  Layers whose sizes are not multiples of 16 stay too: FP8 tensor
        cores cannot multiply them.
    """
    import torch

    activate()
    te = importlib.import_module("transformer_engine.pytorch")
    count = 0
    for name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            full = f"{name}.{child_name}" if name else child_name
            if type(child) is not torch.nn.Linear or full.endswith(tuple(skip)):
                continue
            if child.in_features % 16 or child.out_features % 16:
                continue
            weight = child.weight
            new = te.Linear(child.in_features, child.out_features, bias=child.bias is not None,
                            params_dtype=weight.dtype, device=weight.device)  # fmt: skip
            with torch.no_grad():
                new.weight.copy_(weight)
                if child.bias is not None:
                    new.bias.copy_(child.bias)
            new.train(child.training)
            setattr(parent, child_name, new)
            count += 1
    return count
