"""Transformer Engine's FP8 training on any device: the same names, the same numbers, none of the speed.

FP8 training in one paragraph.  The weights that the optimizer updates stay in FP32 (or BF16).  For each
matrix product, and only for it, both operands are rounded to 8 bits: the forward pass multiplies an input
and a weight in E4M3 (range 448, 3 bits of mantissa), the backward pass multiplies the incoming gradient in
E5M2 (range 57344, 2 bits of mantissa: gradients need range more than they need digits) with the weight and
with the input again.  An 8-bit number reaches neither far up nor far down, so each tensor is first multiplied
by one FP32 number, its *scale*, which puts its largest magnitude (*amax*) at the top of the format:

    scale = max_of_format / amax / 2**margin
    codes = round_to_fp8(clamp(tensor * scale))         x_hat = codes / scale

Products are summed in high precision and divided by both scales.  What is left to choose is where amax
comes from, and that is the *recipe*:

- :class:`DelayedScaling`: from the last ``amax_history_len`` steps.  One pass over the tensor quantizes it
  and notes its amax for later; the price is a scale that is a step old.
- :class:`Float8CurrentScaling`: from the tensor itself.  Two passes, never out of date.

This module repeats what NVIDIA Transformer Engine 2.20 computes on a Hopper GPU: bytes, scales and amax
histories are the same bit for bit; matrix products are summed in FP32, where the hardware keeps fewer bits, so
outputs and gradients agree within the rounding of BF16.  Sources: Transformer Engine's documentation, "Using
FP8 and FP4 with Transformer Engine"; Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.

    with autocast(enabled=True, recipe=DelayedScaling(amax_history_len=16)):
        y = Linear(256, 768)(x)                       # y keeps the dtype of x
    y.sum().backward()                                # outside the autocast

How it stays cheap: an FP8 number is exactly representable in FP32, so the products run on the FP32 matrix
units with the two scales folded into one factor of the result, and a clamp runs only when a value overflows.
"""

from __future__ import annotations

import enum
import io
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import nn

__all__ = [
    "DType", "Float8CurrentScalingQuantizer", "Float8Quantizer", "Float8Tensor", "Linear", "autocast",
    "fp8_autocast", "get_default_recipe", "is_bf16_available", "is_fp8_available",
    "is_fp8_block_scaling_available", "is_mxfp8_available", "is_nvfp4_available",
]  # fmt: skip
RECIPES = (
    "DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MXFP8BlockScaling",
    "NVFP4BlockScaling", "QParams", "Recipe",
)  # fmt: skip

_FP32_MAX = torch.finfo(torch.float32).max
_UNSAFE_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_INPUT, _WEIGHT, _GRAD_OUTPUT = 0, 1, 0  # columns of scale and amax_history, forward and backward


# ---------------------------------------------------------------------------------------------- recipes
class _Maxima(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    """Which FP8 format holds what: ``value.max_fwd`` and ``value.max_bwd`` are the largest magnitudes."""

    E4M3 = _Maxima(448, 448)
    E5M2 = _Maxima(57344, 57344)
    HYBRID = _Maxima(448, 57344)  # E4M3 forward, E5M2 backward


@dataclass(frozen=True)
class QParams:
    """How current scaling turns amax into a scale: rounded to a power of two, with a least amax."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0


class Recipe:
    """Base class of the recipes; the class methods say which one a recipe is."""

    @classmethod
    def delayed(cls) -> bool:
        return issubclass(cls, DelayedScaling)

    @classmethod
    def float8_current_scaling(cls) -> bool:
        return issubclass(cls, Float8CurrentScaling)

    @classmethod
    def float8_per_tensor_scaling(cls) -> bool:
        return issubclass(cls, (DelayedScaling, Float8CurrentScaling))

    @classmethod
    def float8_block_scaling(cls) -> bool:
        return issubclass(cls, Float8BlockScaling)

    @classmethod
    def mxfp8(cls) -> bool:
        return issubclass(cls, MXFP8BlockScaling)

    @classmethod
    def nvfp4(cls) -> bool:
        return issubclass(cls, NVFP4BlockScaling)

    def _check_format(self) -> None:
        # AssertionError, because that is what the real library raises.
        assert self.fp8_format != Format.E5M2, "Pure E5M2 training is not supported."


@dataclass(repr=False)
class DelayedScaling(Recipe):
    """One scale a tensor, from the amax of earlier steps.

    Args:
        margin: scale is divided by ``2**margin``, room for an amax that grows.
        fp8_format: ``Format.HYBRID`` (E4M3 forward, E5M2 backward) or ``Format.E4M3``.
        amax_history_len: how many steps are remembered.
        amax_compute_algo: ``"max"`` of the history, ``"most_recent"``, or a function of the history
            (amax_history_len, tensors) that returns one amax for each tensor.
        scaling_factor_compute_algo: function ``(amax, old_scale, fp8_max, recipe) -> scale`` in place of the
            formula.
        reduce_amax: accepted; there is one device here.
    """

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable = "max"
    scaling_factor_compute_algo: Callable | None = None
    reduce_amax: bool = True

    def __post_init__(self):
        self._check_format()
        if not callable(self.amax_compute_algo) and self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"amax_compute_algo is {self.amax_compute_algo!r}: use 'max', 'most_recent' or a function")

    def __repr__(self) -> str:
        # Modules of one repr share their update; the algorithms are not part of it in the real library either.
        return (f"recipe_type=DelayedScaling, margin={self.margin}, format={self.fp8_format.name}, "
                f"amax_history_len={self.amax_history_len}, reduce_amax={self.reduce_amax}")  # fmt: skip


@dataclass
class Float8CurrentScaling(Recipe):
    """One scale a tensor, from the tensor's own amax.  Nothing is remembered."""

    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp = QParams()  # class attributes, as in the real library: set them on the instance
    fp8_quant_fwd_weight = QParams()
    fp8_quant_bwd_grad = QParams()

    def __post_init__(self):
        self._check_format()


@dataclass
class Float8BlockScaling(Recipe):
    """One scale for each 128 values (128 x 128 for weights).  Not emulated: see is_fp8_block_scaling_available."""

    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling(Recipe):
    """One power-of-two scale for each 32 values.  Not emulated: see is_mxfp8_available."""

    fp8_format: Format = Format.E4M3


@dataclass
class NVFP4BlockScaling(Recipe):
    """E2M1 values, one E4M3 scale for each 16.  Not emulated: see is_nvfp4_available."""


# ----------------------------------------------------------------------------------------- what runs here
def _answer(available: bool, reason: str, return_reason: bool):
    return (available, reason) if return_reason else available


def is_fp8_available(return_reason: bool = False):
    """True: delayed and current scaling are emulated on every device.  With ``return_reason``, (bool, str)."""
    return _answer(True, "", return_reason)


def is_fp8_block_scaling_available(return_reason: bool = False):
    """False here, with the reason: block scaling is not emulated."""
    return _answer(False, "FP8 block scaling is not emulated: it needs a GPU of compute capability 9.0 or higher "
                          "and CUDA 12.9 or higher.", return_reason)  # fmt: skip


def is_mxfp8_available(return_reason: bool = False):
    """False here, with the reason: MXFP8 training is not emulated."""
    return _answer(False, "MXFP8 training is not emulated: it needs a GPU of compute capability 10.0 or higher.",
                   return_reason)  # fmt: skip


def is_nvfp4_available(return_reason: bool = False):
    """False here, with the reason: NVFP4 training is not emulated."""
    return _answer(False, "NVFP4 training is not emulated: it needs a GPU of compute capability 10.0 or higher.",
                   return_reason)  # fmt: skip


def is_bf16_available(return_reason: bool = False):
    """True: torch computes in BF16 on every device, if slowly on some."""
    return _answer(True, "", return_reason)


def get_default_recipe() -> Recipe:
    """The recipe of ``autocast()`` without one: delayed scaling, as on Hopper."""
    return DelayedScaling()


def _check_recipe(recipe: Recipe) -> None:
    for kind, check, error in (
        (Float8BlockScaling, is_fp8_block_scaling_available, RuntimeError),
        (MXFP8BlockScaling, is_mxfp8_available, RuntimeError),
        (NVFP4BlockScaling, is_nvfp4_available, AssertionError),  # the real library's kind of error, each
    ):
        if isinstance(recipe, kind):
            raise error(check(return_reason=True)[1])


# -------------------------------------------------------------------------------------- numbers and tensors
class DType(enum.IntEnum):
    """Names of the two FP8 formats, as quantizers take them."""

    kFloat8E4M3 = 7
    kFloat8E5M2 = 8

    @property
    def torch(self) -> torch.dtype:
        return torch.float8_e4m3fn if self is DType.kFloat8E4M3 else torch.float8_e5m2

    @property
    def max(self) -> float:
        return 448.0 if self is DType.kFloat8E4M3 else 57344.0


def _amax(x: torch.Tensor) -> float:
    """Largest magnitude.  NaN does not count (the kernels compare with fmaxf, which drops it); inf does."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x)
    amax = max(-low.item(), high.item())
    if amax != amax:
        amax = x.float().nan_to_num(nan=0.0, posinf=torch.inf, neginf=torch.inf).abs().amax().item()
    return amax


def _cast(x: torch.Tensor, scale: float, amax: float, dtype: DType) -> torch.Tensor:
    """Round ``x * scale`` to FP8: to nearest, ties to even, overflow saturates, NaN stays NaN."""
    scaled = x.float() * scale
    if not amax * scale <= dtype.max:  # also when amax is inf
        scaled = scaled.clamp_(-dtype.max, dtype.max)
    return scaled.to(dtype.torch)


def _fp32(value: float) -> float:
    """Round a Python float to FP32: scales are FP32 numbers."""
    return torch.tensor(value, dtype=torch.float32).item()


class Float8Tensor:
    """An FP8 tensor: bytes and the FP32 number that they are multiplied by.

    Attributes:
        _data: uint8 codes, the shape of the tensor.
        _scale_inv: float32 (1,), the reciprocal of the scale.
        _fp8_dtype: :class:`DType`.
        dtype: what it was, and what :meth:`dequantize` returns.
    """

    def __init__(self, data: torch.Tensor, scale_inv: torch.Tensor, fp8_dtype: DType, dtype: torch.dtype):
        self._data, self._scale_inv, self._fp8_dtype, self.dtype = data, scale_inv, fp8_dtype, dtype

    @property
    def shape(self) -> torch.Size:
        return self._data.shape

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return codes * scale_inv as ``dtype`` (the original one by default)."""
        return (self._data.view(self._fp8_dtype.torch).float() * self._scale_inv).to(dtype or self.dtype)

    def __repr__(self) -> str:
        return f"Float8Tensor(fp8_dtype={self._fp8_dtype.name}, scale_inv={self._scale_inv.item()}, shape={self.shape})"


class _Quantizer:
    """``quantizer(x)`` -> :class:`Float8Tensor`."""

    dtype: DType

    def _codes(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the FP8 tensor (torch dtype) and the scale's reciprocal."""
        raise NotImplementedError

    def quantize(self, tensor: torch.Tensor) -> Float8Tensor:
        codes, scale_inv = self._codes(tensor.detach())
        return Float8Tensor(codes.view(torch.uint8), torch.tensor([scale_inv], device=tensor.device), self.dtype,
                            tensor.dtype)  # fmt: skip

    __call__ = quantize


class Float8Quantizer(_Quantizer):
    """Delayed scaling: quantize with the given scale and note amax.

    Args:
        scale: float32 tensor of one element, read at each call.
        amax: float32 tensor of one element; raised to the amax of what passes, never lowered.
        fp8_dtype: :class:`DType`.
    """

    def __init__(self, scale: torch.Tensor, amax: torch.Tensor, fp8_dtype: DType):
        self.scale, self.amax, self.dtype = scale, amax, DType(fp8_dtype)

    def _codes(self, x):
        scale, amax = self.scale.item(), _amax(x)
        if amax > self.amax.item():
            self.amax.fill_(amax)
        return _cast(x, scale, amax, self.dtype), _fp32(1 / scale)


class Float8CurrentScalingQuantizer(_Quantizer):
    """Current scaling: one pass finds amax, the next quantizes.

    Args:
        fp8_dtype: :class:`DType`.
        device: accepted and not used.
        force_pow_2_scales: round the scale down to a power of two.
        amax_epsilon: smaller amaxes count as this.
    """

    def __init__(self, fp8_dtype: DType, device=None, *, force_pow_2_scales: bool = False, amax_epsilon: float = 0.0):
        self.dtype, self.force_pow_2_scales, self.amax_epsilon = DType(fp8_dtype), force_pow_2_scales, amax_epsilon

    def _scale(self, amax: float) -> float:
        amax = max(amax, self.amax_epsilon)
        if amax == 0 or amax == float("inf"):
            return 1.0
        scale = min((torch.tensor(self.dtype.max) / torch.tensor(amax)).item(), _FP32_MAX)
        if self.force_pow_2_scales:
            scale = 2.0 ** torch.tensor(scale).log2().floor().item()
        return scale

    def _codes(self, x):
        amax = _amax(x)
        scale = self._scale(amax)
        return _cast(x, scale, amax, self.dtype), _fp32(1 / scale)


# ------------------------------------------------------------------------------- the state of delayed scaling
class _DelayedState:
    """Scales (tensors,) and amax history (amax_history_len, tensors) of one module, one direction.

    Row 0 of the history is the step under way; the update moves it to the end and clears it, so that the
    rows from the last upward are the previous step, the one before, and so on.
    """

    def __init__(self, recipe: DelayedScaling, forward: bool, device):
        n = 3 if forward else 2  # input, weight, output; grad_output, grad_input (outputs stay in high precision)
        self.recipe, self.forward = recipe, forward
        self.dtype = _fp8_dtype(recipe, forward)
        self.scale = torch.ones(n, dtype=torch.float32, device=device)
        self.amax_history = torch.zeros(recipe.amax_history_len, n, dtype=torch.float32, device=device)

    def make_quantizers(self) -> list[Float8Quantizer]:
        return [Float8Quantizer(self.scale[i], self.amax_history[0, i : i + 1], self.dtype)
                for i in range(len(self.scale))]  # fmt: skip

    def resize(self, length: int) -> None:
        history = self.amax_history
        self.amax_history = nn.functional.pad(history, (0, 0, 0, max(0, length - len(history))))[:length].clone()

    def update(self, recipe: DelayedScaling) -> None:
        """Choose amax, roll the history, set the next step's scales (in place: quantizers look at them)."""
        history = self.amax_history
        if callable(recipe.amax_compute_algo):
            amax = recipe.amax_compute_algo(history)
        else:
            amax = history.amax(0) if recipe.amax_compute_algo == "max" else history[0].clone()
        if len(history) > 1:
            # The fused kernel leaves the history of a tensor with amax 0 alone (recorded on an H200); the path for
            # functions of the user's, written in Python, rolls it all the same.
            unfused = callable(recipe.amax_compute_algo) or callable(recipe.scaling_factor_compute_algo)
            history.copy_(torch.where((history[0] != 0) | unfused, history.roll(-1, 0), history))
        history[0].zero_()
        fp8_max = recipe.fp8_format.value.max_fwd if self.forward else recipe.fp8_format.value.max_bwd
        compute = recipe.scaling_factor_compute_algo or _next_scale
        self.scale.copy_(compute(amax, self.scale, fp8_max, recipe))


def _next_scale(amax, scale, fp8_max: float, recipe: DelayedScaling) -> torch.Tensor:
    """fp8_max / amax / 2**margin; the old scale where amax is 0, inf or NaN; FP32's maximum where it overflows."""
    # Not ``fp8_max / amax``: torch turns that into reciprocal-and-multiply, which is off by one bit now and then.
    new = torch.div(torch.full_like(amax, fp8_max * 2.0**-recipe.margin), amax)
    usable = (amax > 0) & torch.isfinite(amax)
    return torch.where(usable, new.clamp(max=_FP32_MAX), scale)


class _CurrentState:
    """Current scaling remembers nothing; it only knows the format."""

    def __init__(self, recipe: Float8CurrentScaling, forward: bool, device):
        self.recipe, self.dtype = recipe, _fp8_dtype(recipe, forward)
        if forward:
            self.params = (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, QParams())
        else:
            self.params = (recipe.fp8_quant_bwd_grad, QParams())

    def make_quantizers(self) -> list[Float8CurrentScalingQuantizer]:
        return [Float8CurrentScalingQuantizer(self.dtype, force_pow_2_scales=p.power_2_scale,
                                              amax_epsilon=p.amax_epsilon) for p in self.params]  # fmt: skip


def _fp8_dtype(recipe: Recipe, forward: bool) -> DType:
    return DType.kFloat8E4M3 if forward or recipe.fp8_format is Format.E4M3 else DType.kFloat8E5M2


# ----------------------------------------------------------------------------------------------- autocast
class _Region:
    """What every module asks: is FP8 on, by which recipe, and is this the region's first FP8 module?

    ``members`` holds, for each recipe, the modules that take part in its updates: a module enters at its first
    forward pass and stays.  An update visits all of them, also a module that this step did not call; its amax is 0,
    which changes nothing.  The real library does the same.
    """

    enabled = False
    calibrating = False
    recipe: Recipe | None = None
    depth = 0
    first = False
    members: dict[str, tuple[Recipe, weakref.WeakSet]] = {}


def _update(forward: bool) -> None:
    key = "scaling_fwd" if forward else "scaling_bwd"
    for recipe, modules in _Region.members.values():
        for module in modules:
            state = module.fp8_meta.get(key)
            if isinstance(state, _DelayedState):
                state.update(recipe)


class autocast:  # noqa: N801 - the name of the real one
    """Run the modules called inside in FP8.

    Args:
        enabled: False runs them in high precision.
        calibrating: allocate the FP8 state, so that a checkpoint holds it, while running in high precision.
        recipe: :class:`DelayedScaling` by default.
        amax_reduction_group: accepted; there is one device here.

    Only forward passes belong inside; each module should be called once in a region, because the outermost
    exit is what updates the forward scales (and only with gradients enabled: evaluation moves no scale).  The
    scales of the gradients are updated at the end of the backward pass of the region's first module.

    Raises:
        RuntimeError: the recipe does not run here, or this object has been entered already.
    """

    def __init__(self, enabled: bool = True, calibrating: bool = False, recipe: Recipe | None = None,
                 amax_reduction_group=None):  # fmt: skip
        self._new = (enabled, calibrating, recipe)
        self._saved = None

    def __enter__(self):
        enabled, calibrating, recipe = self._new
        if self._saved is not None:
            raise RuntimeError("autocast context manager cannot be entered more than once concurrently")
        recipe = recipe or get_default_recipe()
        if enabled:
            _check_recipe(recipe)
        self._saved = (_Region.enabled, _Region.calibrating, _Region.recipe, _Region.first)
        _Region.enabled, _Region.calibrating, _Region.recipe = enabled, calibrating, recipe
        members = _Region.members.get(repr(recipe))
        _Region.members[repr(recipe)] = (recipe, members[1] if members else weakref.WeakSet())
        _Region.first = _Region.depth == 0 or _Region.first
        _Region.depth += 1
        return self

    def __exit__(self, *exception):
        _Region.enabled, _Region.calibrating, _Region.recipe, _Region.first = self._saved
        self._saved = None
        _Region.depth -= 1
        if self._new[0] and _Region.depth == 0 and torch.is_grad_enabled():
            _update(forward=True)


def fp8_autocast(enabled: bool = True, calibrating: bool = False, fp8_recipe: Recipe | None = None, fp8_group=None):
    """Former name of :class:`autocast`, still there and deprecated in Transformer Engine 2.20."""
    warnings.warn("fp8_autocast is deprecated: use autocast(enabled=..., recipe=...)", DeprecationWarning, stacklevel=2)
    return autocast(enabled, calibrating, fp8_recipe, fp8_group)


# ------------------------------------------------------------------------------------------------- Linear
def _check_dims(*tensors: torch.Tensor) -> None:
    for t in tensors:
        rows = t.numel() // t.shape[-1] if t.shape[-1] else 0
        if rows % 8 or t.shape[-1] % 16:
            raise ValueError(
                "FP8 execution requires the product of all dimensions except the last to be divisible by 8 and the "
                f"last dimension to be divisible by 16, but got tensor with dims={list(t.shape)} "
                f"(product of leading dims = {rows}, last dim = {t.shape[-1]})"
            )


def _product(a: torch.Tensor, b: torch.Tensor, factor: float, dtype: torch.dtype, bias=None) -> torch.Tensor:
    """``factor * (a @ b) (+ bias)`` of two FP8 matrices, summed in FP32, rounded once to ``dtype``."""
    a, b = a.float(), b.float()  # exact
    # beta=0 ignores its first argument, so any tensor that broadcasts will do.
    start, beta = (a.new_zeros(1), 0) if bias is None else (bias.float(), 1)
    return torch.addmm(start, a, b, beta=beta, alpha=factor).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """Three FP8 products: y = x w^T, dx = dy w, dw = dy^T x.  What is kept for the backward pass is in FP8."""

    @staticmethod
    def forward(ctx, weight, inp, bias, module, dtype, cached):
        x = inp.reshape(-1, inp.shape[-1])
        x_codes, x_inv = module.quantizers["scaling_fwd"][_INPUT]._codes(x)
        w_codes, w_inv = cached or module.quantizers["scaling_fwd"][_WEIGHT]._codes(weight)
        module._last_weight = (w_codes, w_inv)
        ctx.save_for_backward(x_codes.view(torch.uint8), w_codes.view(torch.uint8))
        ctx.formats = x_codes.dtype, w_codes.dtype
        ctx.scales, ctx.module, ctx.dtype, ctx.shape = (x_inv, w_inv), module, dtype, inp.shape
        ctx.updates = False
        if any(ctx.needs_input_grad[:3]):  # the first module of a region comes last in the backward pass
            ctx.updates, _Region.first = _Region.first, False
        if bias is not None:  # cuBLAS takes no FP32 bias with FP8 operands
            bias = bias.to(torch.bfloat16 if dtype == torch.float32 else dtype)
        out = _product(x_codes, w_codes.t(), x_inv * w_inv, dtype, bias)
        return out.view(*inp.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad_output):
        x_codes, w_codes = (codes.view(fmt) for codes, fmt in zip(ctx.saved_tensors, ctx.formats, strict=True))
        dy = grad_output.reshape(-1, grad_output.shape[-1])
        if dy.shape[0] % 16 or dy.shape[1] % 16:
            raise RuntimeError(
                "The backward pass in FP8 requires the number of rows (tokens) and out_features to be divisible by 16, "
                f"but got a gradient with dims={list(grad_output.shape)}: pad the batch or the layer."
            )
        codes, inv = ctx.module.quantizers["scaling_bwd"][_GRAD_OUTPUT]._codes(dy)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dw = _product(codes.t(), x_codes, inv * ctx.scales[0], ctx.dtype)
        if ctx.needs_input_grad[1]:
            dx = _product(codes, w_codes, inv * ctx.scales[1], ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[2]:  # a sum, not a matrix product: it reads the gradient before FP8
            db = dy.float().sum(0).to(ctx.dtype)
        if ctx.updates:
            _update(forward=False)
        return dw, dx, db, None, None, None


class Linear(nn.Module):
    """``nn.Linear`` whose three matrix products run in FP8 inside :class:`autocast`.

    Args:
        in_features, out_features: multiples of 16.
        bias: whether to add one.
        init_method: function that fills the weight in place; normal with deviation 0.023 by default.
        return_bias: return (output, bias) and leave the addition to the caller.
        params_dtype: dtype of the parameters, torch's default one if None.  Keep FP32 for training and let
            ``torch.autocast`` choose the dtype of activations.
        device: where the parameters live.
        name: a label.

    Attributes:
        weight: (out_features, in_features), never changed by FP8.
        fp8_meta: under delayed scaling ``fp8_meta["scaling_fwd"].scale`` and ``.amax_history`` (columns: input,
            weight, output, the last of them not used) and ``["scaling_bwd"]`` (grad_output, grad_input).
        quantizers: the quantizers of the same columns.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, init_method: Callable | None = None,
                 return_bias: bool = False, params_dtype: torch.dtype | None = None, device=None,
                 name: str | None = None):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias, self.name = bias, return_bias, name
        self._init_method = init_method
        options = dict(device=device, dtype=params_dtype or torch.get_default_dtype())
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **options))
        else:
            self.bias = torch.empty(0, **options)  # the real one has an empty tensor here, not None
        self.fp8_meta, self.quantizers = {}, {}
        self.fp8 = self.fp8_calibration = False
        self._last_weight = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            (self._init_method or (lambda w: w.normal_(0.0, 0.023)))(self.weight)
            if self.use_bias:
                self.bias.zero_()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}"

    # -- FP8 state
    def _prepare_fp8(self) -> None:
        self.fp8, self.fp8_calibration = _Region.enabled, _Region.calibrating
        if not (self.fp8 or self.fp8_calibration):
            return
        old = self.fp8_meta.get("recipe")
        if old is not None and type(old) is not type(_Region.recipe):
            warnings.warn(f"Recipe type changed from {type(old).__name__} to {type(_Region.recipe).__name__}. "
                          "This may affect model behavior.", stacklevel=3)  # fmt: skip
        self._set_recipe(_Region.recipe)
        if self.fp8 and _Region.recipe.delayed():
            _Region.members[repr(_Region.recipe)][1].add(self)

    def _set_recipe(self, recipe: Recipe) -> None:
        self.fp8_meta["recipe"] = recipe
        kind = _DelayedState if recipe.delayed() else _CurrentState
        for key, forward in (("scaling_fwd", True), ("scaling_bwd", False)):
            state = self.fp8_meta.get(key)
            if type(state) is not kind:
                state = self.fp8_meta[key] = kind(recipe, forward, self.weight.device)
            elif recipe.delayed() and len(state.amax_history) != recipe.amax_history_len:
                state.resize(recipe.amax_history_len)
            else:
                continue
            self.quantizers[key] = state.make_quantizers()

    def get_extra_state(self) -> torch.Tensor:
        """Scales and amax histories as bytes, uint8 (n,); empty where there is nothing to remember."""
        state = self.fp8_meta.get("scaling_fwd")
        if not (self.fp8 or self.fp8_calibration) or not isinstance(state, _DelayedState):
            return torch.empty(0, dtype=torch.uint8)
        recipe = self.fp8_meta["recipe"]
        settings = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
        settings["fp8_format"] = recipe.fp8_format.name
        settings = {k: v for k, v in settings.items() if isinstance(v, (bool, int, str))}  # no functions
        saved = {"recipe": settings}
        for direction in ("fwd", "bwd"):
            state = self.fp8_meta[f"scaling_{direction}"]
            saved[f"scale_{direction}"] = state.scale.cpu()
            saved[f"amax_history_{direction}"] = state.amax_history.cpu()
        file = io.BytesIO()
        torch.save(saved, file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Load what :meth:`get_extra_state` returned.

        Raises:
            RuntimeError: the environment does not allow it.  The real library keeps this state as a Python
                pickle, which can run code, and asks for the same variable; ours is plain tensors, but code that
                works here must work there.
        """
        if state is None or state.numel() == 0:
            return
        if os.environ.get(_UNSAFE_STATE) != "1":
            raise RuntimeError(
                f"Refusing to load pickled Transformer Engine extra state for {type(self).__name__}: it can execute "
                f"arbitrary code, so set {_UNSAFE_STATE}=1 if the checkpoint is from a trusted source."
            )
        try:
            saved = torch.load(io.BytesIO(state.cpu().numpy().tobytes()), weights_only=True)
            settings = saved["recipe"]
        except Exception as error:  # whatever a foreign or damaged pickle raises
            raise RuntimeError("This FP8 state was not written by the emulation: load it with Transformer Engine on a "
                               "GPU, or drop the keys that end with '_extra_state'.") from error  # fmt: skip
        settings["fp8_format"] = Format[settings["fp8_format"]]
        self.fp8_meta.pop("scaling_fwd", None), self.fp8_meta.pop("scaling_bwd", None)
        self._set_recipe(DelayedScaling(**settings))
        for direction in ("fwd", "bwd"):
            target = self.fp8_meta[f"scaling_{direction}"]
            target.scale.copy_(saved[f"scale_{direction}"])
            target.amax_history.copy_(saved[f"amax_history_{direction}"])

    def __deepcopy__(self, memo):
        # Quantizers are views of the state's tensors: rebuild them, or they would look at copies.
        import copy

        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = None if key == "_last_weight" else copy.deepcopy(value, memo)
        new.quantizers = {k: s.make_quantizers() for k, s in new.fp8_meta.items() if k.startswith("scaling_")}
        return new

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for key in ("scaling_fwd", "scaling_bwd"):  # the state follows the module to its device, and stays FP32
            state = self.fp8_meta.get(key)
            if isinstance(state, _DelayedState):
                state.scale = state.scale.to(self.weight.device)
                state.amax_history = state.amax_history.to(self.weight.device)
                self.quantizers[key] = state.make_quantizers()
        return self

    # -- forward
    def _activation_dtype(self, inp: torch.Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(inp.device.type):
            return torch.get_autocast_dtype(inp.device.type)
        for name, parameter in self.named_parameters():
            if parameter.dtype != inp.dtype:
                raise TypeError("Data types for parameters must match when outside of autocasted region. "
                                f"Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}")  # fmt: skip
        return inp.dtype

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None):
        """Apply the layer.

        Args:
            inp: (..., in_features); in FP8 the product of the other sizes must be a multiple of 16 for training.
            is_first_microbatch: with gradient accumulation, True for the first batch of a step and False for the
                others, which then reuse its FP8 weight.

        Returns:
            (..., out_features) in the dtype of the activations.

        Raises:
            ValueError: sizes that FP8 matrix units cannot multiply.
            TypeError: outside ``torch.autocast``, parameters of another dtype than the input.
        """
        dtype = self._activation_dtype(inp)
        self._prepare_fp8()
        bias = self.bias if self.use_bias and not self.return_bias else None
        if inp.shape[-1] != self.in_features:
            raise AssertionError("GEMM not possible")  # the real one's error
        if self.fp8:
            _check_dims(inp, self.weight)
            cached = self._last_weight if is_first_microbatch is False else None
            with torch.autocast(inp.device.type, enabled=False):
                out = _Fp8Linear.apply(self.weight, inp, bias, self, dtype, cached)
            if is_first_microbatch is None:
                self._last_weight = None
        else:
            out = nn.functional.linear(inp.to(dtype), self.weight.to(dtype), None if bias is None else bias.to(dtype))
        return (out, self.bias.to(dtype)) if self.return_bias else out
