"""``autocast`` and what it governs: is FP8 on, by which recipe, with which quantizers, and when do scales change.

Delayed scaling keeps a state for each module and direction: a scale for each tensor and a history of its amaxes.  The
exit of the outermost region updates the forward scales (with gradients enabled only: an evaluation changes no scale);
the end of the backward pass of the region's first module updates the scales of the gradients.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .blocks import Float8BlockQuantizer, MXFP8Quantizer, NVFP4Quantizer
from .quantizers import FP32_MAX, DType, Float8CurrentScalingQuantizer, Float8Quantizer, largest_anywhere, scale_of
from .recipes import DelayedScaling, Format, Recipe, get_default_recipe


class Region:
    """What every module asks: is FP8 on, by which recipe, and is this the region's first FP8 module?

    ``members`` holds, for each recipe and group of ranks, the modules that take part in its updates: a module enters at
    its first forward pass and stays.  An update visits all of them, also a module that this step did not call; its
    amax is 0, which changes nothing.  The real library does the same.
    """

    enabled = False
    calibrating = False
    recipe: Recipe | None = None
    key = None  # of this region's members
    depth = 0
    first = False
    members: dict[tuple, tuple[Recipe, weakref.WeakKeyDictionary]] = {}
    parameter_recipe: Recipe | None = None  # inside quantized_model_init
    checkpoints: list[dict] = []  # inside checkpoint: module -> scales and history from before it was called

    @classmethod
    def update(cls, forward: bool) -> None:
        """Choose new scales for all members, forward or backward, by the amax of all ranks (``reduce_amax``): every
        rank must choose the same scale, and each has seen only its own batch and its own shard of the weights."""
        for (_, group), (recipe, modules) in cls.members.items():
            states = [module.fp8_meta.get("scaling_fwd" if forward else "scaling_bwd") for module in modules]
            states = [state for state in states if isinstance(state, DelayedState)]
            if states and recipe.reduce_amax:
                rows = [state.amax_history[0] for state in states]
                where = next((row.device for row in rows if row.is_cuda), rows[0].device)  # attention's is on the CPU
                amaxes = largest_anywhere(torch.cat([row.to(where) for row in rows]), group)
                for row, amax in zip(rows, amaxes.split([len(row) for row in rows]), strict=True):
                    row.copy_(amax)
            for state in states:
                state.update(recipe)


class autocast:  # noqa: N801 - the name of the real one
    """Run the modules called inside in FP8.

    ``calibrating``, with ``enabled=False``: run in high precision, make the FP8 state, so that a checkpoint has it, and
    note the amax of inputs and weights in row 0 of the histories (delayed scaling).  Scales are updated where they
    always are: at the exit of an enabled region.  ``recipe``: an instance, :class:`DelayedScaling` by default.

    Only forward passes belong inside; each module should be called once in a region.  Regions nest.
    """

    def __init__(self, enabled=True, calibrating=False, recipe: Recipe | None = None, amax_reduction_group=None):
        self._new, self._saved, self._group = (enabled, calibrating, recipe), None, amax_reduction_group

    def __enter__(self):
        enabled, calibrating, recipe = self._new
        if self._saved is not None:
            raise RuntimeError("autocast context manager cannot be entered more than once concurrently")
        recipe = get_default_recipe() if recipe is None else recipe
        if not hasattr(recipe, "float8_per_tensor_scaling"):  # the real one's error, too
            raise AttributeError(f"recipe is {recipe!r}: pass a recipe, for example DelayedScaling()")
        self._saved = (Region.enabled, Region.calibrating, Region.recipe, Region.key, Region.first)
        key = repr(recipe), self._group
        Region.enabled, Region.calibrating, Region.recipe, Region.key = enabled, calibrating, recipe, key
        Region.members.setdefault(key, (recipe, weakref.WeakKeyDictionary()))
        Region.first = Region.depth == 0 or Region.first
        Region.depth += 1
        return self

    def __exit__(self, *exception):
        Region.enabled, Region.calibrating, Region.recipe, Region.key, Region.first = self._saved
        self._saved = None
        Region.depth -= 1
        if self._new[0] and Region.depth == 0 and torch.is_grad_enabled():
            Region.update(forward=True)


def fp8_autocast(enabled: bool = True, calibrating: bool = False, fp8_recipe: Recipe | None = None, fp8_group=None):
    """Former name of :class:`autocast`, still there and deprecated in Transformer Engine 2.20."""
    warnings.warn("fp8_autocast is deprecated: use autocast(enabled=..., recipe=...)", DeprecationWarning, stacklevel=2)
    return autocast(enabled, calibrating, fp8_recipe, fp8_group)


@contextmanager
def quantized_model_init(enabled: bool = True, recipe: Recipe | None = None):
    """Modules made inside keep their weights in FP8 only.

    The weights are ``Float8Tensor`` parameters: one byte a value and a scale.  They go into the FP8 products as they
    are: no cast before each product, half the memory for inference (in training Hopper keeps a transposed copy, which
    takes it back).  An optimizer's update in place is computed in high precision and rounded to FP8 again, and lost
    where it is smaller than an FP8 step, unless the optimizer keeps master weights of its own.

    ``recipe``: delayed or current scaling, and the same kind in ``autocast``.  Under delayed scaling a new weight is
    rounded with scale 1, because nothing is known of it yet; the first update repairs that.
    """
    saved = Region.parameter_recipe
    Region.parameter_recipe = (recipe or get_default_recipe()) if enabled else None
    try:
        yield
    finally:
        Region.parameter_recipe = saved


def fp8_model_init(*args, **options):
    """Former name of :func:`quantized_model_init`, still there and deprecated in Transformer Engine 2.20."""
    warnings.warn("fp8_model_init is deprecated: use quantized_model_init(...)", DeprecationWarning, stacklevel=2)
    return quantized_model_init(*args, **options)


def checkpoint(function, *args, use_reentrant: bool = True, **kwargs):
    """Return ``function(*args, **kwargs)`` without keeping activations: the backward pass computes them again.

    ``torch.utils.checkpoint`` does not know FP8: it would compute again outside of the region.  Here the second
    forward pass runs in the region of the first one, with the scales that the first one used, and notes no amax, so
    that the gradients are those of a run without checkpointing, whatever ``use_reentrant`` is.
    """
    before: dict = {}
    region = Region.enabled, Region.calibrating, Region.recipe, Region.key

    @contextmanager
    def first():
        Region.checkpoints = [*Region.checkpoints, before]
        try:
            yield
        finally:  # which torch may put off until after others have come and gone
            Region.checkpoints = [other for other in Region.checkpoints if other is not before]

    @contextmanager
    def again():
        saved = Region.enabled, Region.calibrating, Region.recipe, Region.key, Region.first, Region.checkpoints
        states = {module: module.fp8_meta["scaling_fwd"] for module in before}
        now = {module: (state.scale.clone(), state.amax_history.clone()) for module, state in states.items()}
        Region.enabled, Region.calibrating, Region.recipe, Region.key = region
        Region.checkpoints = []
        try:
            for module, state in states.items():
                state.restore(*before[module])
            yield
        finally:
            for module, state in states.items():
                state.restore(*now[module])
            Region.enabled, Region.calibrating, Region.recipe, Region.key, Region.first, Region.checkpoints = saved

    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (first(), again()), **kwargs)


class State:
    """What a recipe keeps for one module and one direction: the recipe and the tensors' kinds, and nothing else.

    The tensors of each product: input, weight, output; backward: grad_output, grad_input.  Outputs and grad_inputs
    stay in high precision: they have a place, and nothing uses it.
    """

    def __init__(self, recipe: Recipe, forward: bool, device, products: int):
        self.recipe, self.forward, self.products = recipe, forward, products
        e4m3 = forward or recipe.fp8_format is Format.E4M3
        self.dtype = DType.kFloat8E4M3 if e4m3 else DType.kFloat8E5M2

    def make_quantizers(self) -> list:
        kinds = ("inp", "weight", "inp") if self.forward else ("grad", "grad")
        return [self._quantizer(kind) for kind in kinds] * self.products

    def _quantizer(self, kind: str):
        recipe, dtype = self.recipe, self.dtype
        if recipe.mxfp8():
            return MXFP8Quantizer(dtype)
        bits, direction = "fp4" if recipe.nvfp4() else "fp8", "fwd" if self.forward else "bwd"
        params = getattr(recipe, f"{bits}_quant_{direction}_{kind}")
        if recipe.nvfp4():
            return NVFP4Quantizer(with_rht=params.random_hadamard_transform,
                                  with_2d_quantization=params.fp4_2d_quantization,
                                  stochastic_rounding=params.stochastic_rounding)  # fmt: skip
        options = dict(amax_epsilon=params.amax_epsilon, force_pow_2_scales=params.power_2_scale)
        if recipe.float8_current_scaling():
            return Float8CurrentScalingQuantizer(dtype, **options)
        return Float8BlockQuantizer(dtype, block_scaling_dim=2 if kind == "weight" else 1, **options)


class DelayedState(State):
    """Scales (tensors,) and amax history (amax_history_len, tensors) of one module, one direction.

    Row 0 of the history is the step under way; the update moves it to the end and clears it, so that the
    rows from the last upward are the previous step, the one before, and so on.
    """

    def __init__(self, recipe: DelayedScaling, forward: bool, device, products: int):
        super().__init__(recipe, forward, device, products)
        n = products * (3 if forward else 2)
        self.scale = torch.ones(n, dtype=torch.float32, device=device)
        self.amax_history = torch.zeros(recipe.amax_history_len, n, dtype=torch.float32, device=device)

    def make_quantizers(self) -> list[Float8Quantizer]:
        amaxes = self.amax_history[0]
        return [Float8Quantizer(self.scale[i], amaxes[i : i + 1], self.dtype) for i in range(len(self.scale))]

    def resize(self, length: int) -> None:
        history = self.amax_history
        self.amax_history = nn.functional.pad(history, (0, 0, 0, max(0, length - len(history))))[:length].clone()

    def restore(self, scale: torch.Tensor, amax_history: torch.Tensor) -> None:
        """Write other numbers (in place: quantizers look at them)."""
        self.scale.copy_(scale), self.amax_history.copy_(amax_history)

    def update(self, recipe: DelayedScaling) -> None:
        """Choose amax, roll the history, set the next step's scales (in place: quantizers look at them)."""
        history = self.amax_history
        amax = history.amax(0) * (history[0] != 0) if recipe.amax_compute_algo == "max" else history[0].clone()
        if len(history) > 1:  # a tensor with amax 0 keeps its history (recorded on an H200) and its scale
            history.copy_(torch.where(history[0] != 0, history.roll(-1, 0), history))
        history[0].zero_()
        formats = recipe.fp8_format.value
        fp8_max = formats.max_fwd if self.forward else formats.max_bwd
        self.scale.copy_(next_scale(amax, self.scale, fp8_max, recipe.margin))


def next_scale(amax, scale, fp8_max: float, margin: int) -> torch.Tensor:
    """fp8_max / amax / 2**margin; the old scale where amax is 0, inf or NaN; FP32's maximum where it overflows."""
    new = scale_of(amax, fp8_max * 2.0**-margin, FP32_MAX, power_of_two=False)
    return torch.where((amax > 0) & torch.isfinite(amax), new, scale)
