"""``autocast``, the base of all modules with FP8 state, the FP8 product they share, and ``Linear``.

See :mod:`qtutor.emulation` for the idea and :mod:`qtutor.emulation.quantizers` for the numbers.
"""

from __future__ import annotations

import copy
import io
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import nn

from .blocks import Float8BlockQuantizer
from .mx import MXFP8Quantizer, NVFP4Quantizer
from .quantizers import (
    DelayedScaling,
    Float8CurrentScaling,
    Float8Quantizer,
    Float8Tensor,
    Format,
    Recipe,
    _amax,
    _CurrentState,
    _decode,
    _DelayedState,
    _fp8_dtype,
    get_default_recipe,
)

_UNSAFE_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


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
    fp8_parameters = False  # inside quantized_model_init
    parameter_recipe: Recipe | None = None
    keep_initial = False


def _update(forward: bool) -> None:
    key = "scaling_fwd" if forward else "scaling_bwd"
    for recipe, modules in _Region.members.values():
        for module in modules:
            state = module.fp8_meta.get(key)
            if isinstance(state, _DelayedState):
                state.update(recipe)


class _BlockState:
    """Block scaling remembers nothing either."""

    def __init__(self, recipe: Recipe, forward: bool, device, gemms: int = 1):
        self.recipe, self.forward, self.gemms = recipe, forward, gemms

    def make_quantizers(self) -> list:
        """Three for each product, (input, weight, output), or two, (grad_output, grad_input)."""
        kinds = ("inp", "weight", "inp") if self.forward else ("grad", "grad")
        return [self._quantizer(kind) for kind in kinds] * self.gemms

    def _quantizer(self, kind: str):
        recipe, dtype = self.recipe, _fp8_dtype(self.recipe, self.forward)
        if recipe.mxfp8():
            return MXFP8Quantizer(dtype)
        where = f"{'fwd' if self.forward else 'bwd'}_{kind}"
        if recipe.nvfp4():
            params = getattr(recipe, f"fp4_quant_{where}")
            return NVFP4Quantizer(with_rht=params.random_hadamard_transform,
                                  with_2d_quantization=params.fp4_2d_quantization,
                                  stochastic_rounding=params.stochastic_rounding)  # fmt: skip
        params = getattr(recipe, f"fp8_quant_{where}")
        dim = getattr(recipe, f"{dict(inp='x', weight='w', grad='grad')[kind]}_block_scaling_dim")
        return Float8BlockQuantizer(dtype, amax_epsilon=params.amax_epsilon, force_pow_2_scales=params.power_2_scale,
                                    block_scaling_dim=dim)  # fmt: skip


def _state_of(recipe: Recipe) -> type:
    if recipe.delayed():
        return _DelayedState
    return _CurrentState if recipe.float8_current_scaling() else _BlockState


class autocast:  # noqa: N801 - the name of the real one
    """Run the modules called inside in FP8.

    Args:
        enabled: False runs them in high precision.
        calibrating: with ``enabled=False``: run in high precision, allocate the FP8 state, so that a checkpoint
            holds it, and note the amax of inputs and weights in row 0 of the histories (delayed scaling; the other
            recipes have nothing to note).  Scales move where they always do: at the exit of a region that is enabled.
        recipe: an instance of a recipe, :class:`DelayedScaling` by default.
        amax_reduction_group: accepted; there is one device here.

    Only forward passes belong inside; each module should be called once in a region, because the outermost
    exit is what updates the forward scales (and only with gradients enabled: evaluation moves no scale).  The
    scales of the gradients are updated at the end of the backward pass of the region's first module.

    Regions nest; an exception leaves the region like any other way out.  A region that is entered by hand and left
    open keeps FP8 on for whatever follows, and no forward scale moves again, since no exit is the outermost one.

    Raises:
        RuntimeError: this object has been entered already.
        AttributeError: ``recipe`` is no recipe.
        TypeError: left without having been entered.
    """

    def __init__(self, enabled: bool = True, calibrating: bool = False, recipe: Recipe | None = None,
                 amax_reduction_group=None):  # fmt: skip
        self._new = (enabled, calibrating, recipe)
        self._saved = None

    def __enter__(self):
        enabled, calibrating, recipe = self._new
        if self._saved is not None:
            raise RuntimeError("autocast context manager cannot be entered more than once concurrently")
        recipe = get_default_recipe() if recipe is None else recipe
        if not hasattr(recipe, "float8_per_tensor_scaling"):  # the real one's error, too
            raise AttributeError(f"recipe is {recipe!r}: pass a recipe, for example DelayedScaling()")
        self._saved = (_Region.enabled, _Region.calibrating, _Region.recipe, _Region.first)
        _Region.enabled, _Region.calibrating, _Region.recipe = enabled, calibrating, recipe
        members = _Region.members.get(repr(recipe))
        _Region.members[repr(recipe)] = (recipe, members[1] if members else weakref.WeakSet())
        _Region.first = _Region.depth == 0 or _Region.first
        _Region.depth += 1
        return self

    def __exit__(self, *exception):
        if self._saved is None:
            raise TypeError("this autocast region is not open: __exit__ needs an __enter__ before it")
        _Region.enabled, _Region.calibrating, _Region.recipe, _Region.first = self._saved
        self._saved = None
        _Region.depth -= 1
        if self._new[0] and _Region.depth == 0 and torch.is_grad_enabled():
            _update(forward=True)


def fp8_autocast(enabled: bool = True, calibrating: bool = False, fp8_recipe: Recipe | None = None, fp8_group=None):
    """Former name of :class:`autocast`, still there and deprecated in Transformer Engine 2.20."""
    warnings.warn("fp8_autocast is deprecated: use autocast(enabled=..., recipe=...)", DeprecationWarning, stacklevel=2)
    return autocast(enabled, calibrating, fp8_recipe, fp8_group)


# -------------------------------------------------------------------------------------------- the FP8 product
def _check_dims(*tensors: torch.Tensor) -> None:
    for t in tensors:
        rows = t.numel() // t.shape[-1] if t.shape[-1] else 0
        if rows % 8 or t.shape[-1] % 16:
            raise ValueError(
                "FP8 execution requires the product of all dimensions except the last to be divisible by 8 and the "
                f"last dimension to be divisible by 16, but got tensor with dims={list(t.shape)} "
                f"(product of leading dims = {rows}, last dim = {t.shape[-1]})"
            )


def _check_gradient(dy: torch.Tensor) -> None:
    if dy.shape[0] % 16 or dy.shape[1] % 16:
        raise RuntimeError(
            "The backward pass in FP8 requires the number of rows (tokens) and out_features to be divisible by 16, "
            f"but got a gradient with dims={list(dy.shape)}: pad the batch or the layer."
        )


def _product(a: torch.Tensor, b: torch.Tensor, factor: float, dtype: torch.dtype, bias=None) -> torch.Tensor:
    """``factor * (a @ b) (+ bias)`` of FP32 matrices that hold FP8 numbers, rounded once to ``dtype``."""
    # beta=0 ignores its first argument, so any tensor that broadcasts will do.
    start, beta = (a.new_zeros(1), 0) if bias is None else (bias.float(), 1)
    return torch.addmm(start, a, b, beta=beta, alpha=factor).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """Three FP8 products: y = x w^T, dx = dy w, dw = dy^T x.  What is kept for the backward pass is in FP8."""

    @staticmethod
    def forward(ctx, weight, inp, bias, module, gemm, dtype, cached, amax, wide):
        x = inp.reshape(-1, inp.shape[-1])
        quantizers = module.quantizers["scaling_fwd"]
        x_codes, x_inv = quantizers[3 * gemm]._codes(x, amax)
        if isinstance(weight, Float8Tensor):
            w_codes, w_inv = weight._data.view(weight._fp8_dtype.torch), weight._scale_inv.item()
        else:
            w_codes, w_inv = cached or quantizers[3 * gemm + 1]._codes(weight)
            module._last_weights[gemm] = (w_codes, w_inv)
        ctx.save_for_backward(x_codes.view(torch.uint8), w_codes.view(torch.uint8))
        ctx.formats = x_codes.dtype, w_codes.dtype
        ctx.scales, ctx.module, ctx.gemm, ctx.dtype, ctx.shape = (x_inv, w_inv), module, gemm, dtype, inp.shape
        ctx.updates = False
        if any(ctx.needs_input_grad[:3]):  # the first module of a region comes last in the backward pass
            ctx.updates, _Region.first = _Region.first, False
        if bias is not None:  # cuBLAS takes no FP32 bias with FP8 operands
            bias = bias.to(torch.bfloat16 if dtype == torch.float32 else dtype)
        out = _product(_decode(x_codes), _decode(w_codes).t(), x_inv * w_inv, dtype, bias)
        return (out.float() if wide else out).view(*inp.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad_output):
        x_codes, w_codes = (codes.view(fmt) for codes, fmt in zip(ctx.saved_tensors, ctx.formats, strict=True))
        dy = grad_output.reshape(-1, grad_output.shape[-1])
        _check_gradient(dy)
        codes, inv = ctx.module.quantizers["scaling_bwd"][2 * ctx.gemm]._codes(dy)
        values = _decode(codes)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dw = _product(values.t(), _decode(x_codes), inv * ctx.scales[0], ctx.dtype)
        if ctx.needs_input_grad[1]:
            dx = _product(values, _decode(w_codes), inv * ctx.scales[1], ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[2]:  # a sum, not a matrix product: it reads the gradient before FP8
            db = dy.float().sum(0).to(ctx.dtype)
        if ctx.updates:
            _update(forward=False)
        return dw, dx, db, None, None, None, None, None, None


def _both(quantizer, x: torch.Tensor):
    """Operands of ``x`` by rows and by columns; squares have the same numbers in both."""
    rows = quantizer._rows(x)
    if getattr(quantizer, "block_scaling_dim", 1) == 2:
        return rows, (rows[0].t().contiguous(), rows[1].t(), None)
    return rows, quantizer._columns(x)


class _BlockLinear(torch.autograd.Function):
    """The same three products of block-scaled operands, quantized along the dimension that each product sums over."""

    @staticmethod
    def forward(ctx, weight, inp, bias, module, gemm, dtype, cached):
        x = inp.reshape(-1, inp.shape[-1])
        of_x, of_w = module.quantizers["scaling_fwd"][3 * gemm : 3 * gemm + 2]
        w_rows, w_columns = cached or _both(of_w, weight)
        module._last_weights[gemm] = w_rows, w_columns
        ctx.quantizers = of_x, of_w, module.quantizers["scaling_bwd"][2 * gemm]
        ctx.dtype, ctx.shape, ctx.updates = dtype, inp.shape, False
        ctx.save_for_backward(*(of_x._columns(x) if ctx.needs_input_grad[0] else (None,) * 3), *w_columns)
        if any(ctx.needs_input_grad[:3]):  # these recipes update nothing, but this was the region's first module
            ctx.updates, _Region.first = _Region.first, False
        if bias is not None:
            bias = bias.to(torch.bfloat16 if dtype == torch.float32 else dtype)
        a, b = of_x._dequantize(*of_x._rows(x)), of_w._dequantize(*w_rows)
        return _product(a, b.t(), 1.0, dtype, bias).view(*inp.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad_output):
        dy = grad_output.reshape(-1, grad_output.shape[-1])
        _check_gradient(dy)
        of_x, of_w, of_dy = ctx.quantizers
        x_columns, w_columns = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dw = _product(of_dy._dequantize(*of_dy._columns(dy)), of_x._dequantize(*x_columns).t(), 1.0, ctx.dtype)
        if ctx.needs_input_grad[1]:
            dx = _product(of_dy._dequantize(*of_dy._rows(dy)), of_w._dequantize(*w_columns).t(), 1.0, ctx.dtype)
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[2]:
            db = dy.float().sum(0).to(ctx.dtype)
        if ctx.updates:
            _update(forward=False)
        return dw, dx, db, None, None, None, None


def _linear(module, gemm: int, inp, weight, bias, dtype, is_first_microbatch=None, *, amax=None, wide=False):
    """``inp @ weight.T + bias``, in FP8 where ``module.fp8`` says so, else in ``dtype``.

    Args:
        module: a :class:`_TEModule`, prepared by ``_prepare_fp8``.
        gemm: which of its products, 0 or 1: it has its own quantizers and its own cached weight.
        inp: (..., in_features).  It may be FP32 where ``dtype`` is BF16, if a fused kernel would not have rounded it
            before it quantized it; its gradient is rounded to ``dtype``.
        weight: (out_features, in_features), or a :class:`Float8Tensor`, which needs no cast.
        bias: (out_features,) or None.
        dtype: of the activations.
        is_first_microbatch: None, or whether the FP8 weight is made (and kept) or reused.
        amax: see ``_Quantizer._codes``.
        wide: return FP32 (of numbers rounded to ``dtype``), so that the gradient may be FP32 as well.

    Raises:
        ValueError: sizes that FP8 matrix units cannot multiply.
    """
    if not module.fp8:
        if module.fp8_calibration:
            quantizers = module.quantizers["scaling_fwd"][3 * gemm : 3 * gemm + 2]
            for quantizer, tensor in zip(quantizers, (inp.to(dtype), weight), strict=True):
                if isinstance(quantizer, Float8Quantizer):  # the other recipes remember nothing
                    quantizer.amax.fill_(_amax(tensor.detach()))
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(inp.to(dtype), weight.to(dtype), bias)
    _check_dims(inp, weight)
    cached = module._last_weights.get(gemm) if is_first_microbatch is False else None
    with torch.autocast(inp.device.type, enabled=False):
        if module.fp8_meta["recipe"].float8_per_tensor_scaling():
            out = _Fp8Linear.apply(weight, inp, bias, module, gemm, dtype, cached, amax, wide)
        else:
            out = _BlockLinear.apply(weight, inp, bias, module, gemm, dtype, cached)
    if is_first_microbatch is None:
        module._last_weights.pop(gemm, None)
    return out


def _default_init(weight: torch.Tensor) -> None:
    weight.normal_(0.0, 0.023)


# ------------------------------------------------------------------------------------------------ base module
class _TEModule(nn.Module):
    """What every module with FP8 products has: quantizers, their state, its way into checkpoints and copies.

    A subclass says how many products it has (``_gemms``), calls ``_quantize_parameters`` at the end of its constructor
    and ``_prepare_fp8`` in its forward pass before ``_linear``.
    """

    _gemms = 1

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name
        self.fp8_meta, self.quantizers = {}, {}
        self.fp8 = self.fp8_calibration = False
        self._last_weights = {}  # product -> FP8 weight of this step's first microbatch
        self._fp8_weights = []  # names of FP8 parameters, by product

    def _device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    # -- FP8 parameters
    def _quantize_parameters(self, names: list[str]) -> None:
        """Inside quantized_model_init: replace the weight of each product by an FP8 parameter."""
        if not _Region.fp8_parameters:
            return
        recipe = _Region.parameter_recipe
        if not recipe.float8_per_tensor_scaling():
            raise NotImplementedError(f"FP8 weights under {type(recipe).__name__} are not emulated: use DelayedScaling "
                                      "or Float8CurrentScaling.")  # fmt: skip
        self._set_recipe(recipe)
        for gemm, name in enumerate(names):
            plain = getattr(self, name).detach()
            weight = nn.Parameter(self.quantizers["scaling_fwd"][3 * gemm + 1](plain))
            if _Region.keep_initial:
                weight._keep_initial(plain.cpu())
            setattr(self, name, weight)
        self._fp8_weights = list(names)

    def _link_parameters(self) -> None:
        """FP8 weights round with the module's quantizers, which are made anew now and then."""
        for gemm, name in enumerate(self._fp8_weights):
            if isinstance(getattr(self, name), Float8Tensor):  # Module.to(dtype) makes a plain one of it
                getattr(self, name)._quantizer = self.quantizers["scaling_fwd"][3 * gemm + 1]

    def _check_parameters(self) -> None:
        for name in self._fp8_weights:
            weight = getattr(self, name)
            if not isinstance(weight, Float8Tensor):
                continue
            delayed = isinstance(weight._quantizer, Float8Quantizer)
            kind = DelayedScaling if delayed else Float8CurrentScaling
            if not isinstance(_Region.recipe, kind):
                raise RuntimeError(
                    f"Recipe mismatch for {name!r}: tensor supports recipe {kind.__name__}, but got "
                    f"{type(_Region.recipe).__name__}. Please check the recipes assigned during quantized_model_init() "
                    "and autocast() calls."
                )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "_extra_state"
        if self._fp8_weights and key in state_dict:  # before the weights: they are rounded with these scales
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- FP8 state
    def _prepare_fp8(self) -> None:
        self.fp8, self.fp8_calibration = _Region.enabled, _Region.calibrating
        if not (self.fp8 or self.fp8_calibration):
            return
        self._check_parameters()
        old = self.fp8_meta.get("recipe")
        if old is not None and type(old) is not type(_Region.recipe):
            warnings.warn(f"Recipe type changed from {type(old).__name__} to {type(_Region.recipe).__name__}. "
                          "This may affect model behavior.", stacklevel=3)  # fmt: skip
        self._set_recipe(_Region.recipe)
        if self.fp8 and _Region.recipe.delayed():
            _Region.members[repr(_Region.recipe)][1].add(self)

    def _set_recipe(self, recipe: Recipe) -> None:
        self.fp8_meta["recipe"] = recipe
        kind = _state_of(recipe)
        for key, forward in (("scaling_fwd", True), ("scaling_bwd", False)):
            state = self.fp8_meta.get(key)
            if type(state) is not kind or type(state.recipe) is not type(recipe):
                state = self.fp8_meta[key] = kind(recipe, forward, self._device(), self._gemms)
            elif recipe.delayed() and len(state.amax_history) != recipe.amax_history_len:
                state.resize(recipe.amax_history_len)
            else:
                continue
            self.quantizers[key] = state.make_quantizers()
        self._link_parameters()

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
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = {} if key == "_last_weights" else copy.deepcopy(value, memo)
        new.quantizers = {k: s.make_quantizers() for k, s in new.fp8_meta.items() if k.startswith("scaling_")}
        new._link_parameters()
        return new

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for key in ("scaling_fwd", "scaling_bwd"):  # the state follows the module to its device, and stays FP32
            state = self.fp8_meta.get(key)
            if isinstance(state, _DelayedState):
                state.scale = state.scale.to(self._device())
                state.amax_history = state.amax_history.to(self._device())
                self.quantizers[key] = state.make_quantizers()
        self._link_parameters()
        return self

    def _activation_dtype(self, inp: torch.Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(inp.device.type):
            return torch.get_autocast_dtype(inp.device.type)
        for name, parameter in self.named_parameters():
            if parameter.dtype != inp.dtype:
                raise TypeError("Data types for parameters must match when outside of autocasted region. "
                                f"Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}")  # fmt: skip
        return inp.dtype


# ----------------------------------------------------------------------------------------------------- Linear
class Linear(_TEModule):
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
        super().__init__(name)
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias = bias, return_bias
        self._init_method = init_method
        options = dict(device=device, dtype=params_dtype or torch.get_default_dtype())
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **options))
        else:
            self.bias = torch.empty(0, **options)  # the real one has an empty tensor here, not None
        self.reset_parameters()
        self._quantize_parameters(["weight"])

    def reset_parameters(self) -> None:
        with torch.no_grad():
            (self._init_method or _default_init)(self.weight)
            if self.use_bias:
                self.bias.zero_()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}"

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
        out = _linear(self, 0, inp, self.weight, bias, dtype, is_first_microbatch)
        return (out, self.bias.to(dtype)) if self.return_bias else out
