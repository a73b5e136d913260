"""Recipes, casts and quantizers of the FP8 emulation: how a tensor becomes bytes and a scale, and what is remembered.

See :mod:`qtutor.emulation` for the idea; this module is its arithmetic, and :mod:`qtutor.emulation.modules` applies it to
layers.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

_FP32_MAX = torch.finfo(torch.float32).max


# ---------------------------------------------------------------------------------------------- recipes
class _Maxima(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    """Which format holds what: ``value.max_fwd`` and ``value.max_bwd`` are the largest magnitudes."""

    E2M1 = _Maxima(6, 6)
    E4M3 = _Maxima(448, 448)
    E5M2 = _Maxima(57344, 57344)
    HYBRID = _Maxima(448, 57344)  # E4M3 forward, E5M2 backward


@dataclass(frozen=True)
class MMParams:
    """How the hardware sums a product.  Accepted and without effect: the emulation always sums in FP32."""

    use_split_accumulator: bool = True


@dataclass(frozen=True)
class QParams:
    """How a recipe quantizes one kind of tensor.

    Args:
        power_2_scale, amax_epsilon: current and block scaling: round scales to powers of two; the least amax.
        random_hadamard_transform, stochastic_rounding, fp4_2d_quantization: NVFP4's remedies.
    """

    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


def _switch(name: str, default: str = "0") -> bool:
    """An environment variable that the real library reads when it is imported."""
    return os.environ.get(name, default) == "1"


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

    @classmethod
    def custom(cls) -> bool:
        return False  # quantizers of the user's own are not emulated

    def _check(self) -> None:
        """Raise AssertionError, as the real library does, for what makes no sense; refuse what is not emulated."""
        assert self.fp8_format != Format.E5M2, "Pure E5M2 training is not supported."
        assert self.backward_override in (None, "high_precision", "dequantized"), (
            f"backward_override is {self.backward_override!r}: use None, 'high_precision' or 'dequantized'."
        )
        if self.fp8_dpa or self.fp8_mha:
            raise NotImplementedError("FP8 attention is not emulated: leave fp8_dpa and fp8_mha at False.")
        if self.backward_override is not None:
            raise NotImplementedError("A backward pass in high precision is not emulated: leave backward_override "
                                      "at None.")  # fmt: skip

    def __repr__(self) -> str:
        # Modules of one repr share their update of delayed scaling.
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = {k: v.name if isinstance(v, Format) else v for k, v in shown.items()}
        return f"recipe_type={type(self).__name__}, " + ", ".join(f"{k}={v}" for k, v in shown.items())


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
        fp8_dpa, fp8_mha, backward_override: only as they are.

    Raises:
        AssertionError: ``Format.E5M2``; a backward_override, which this recipe does not know.
        ValueError: an unknown amax_compute_algo.
        NotImplementedError: FP8 attention.
    """

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable = "max"
    scaling_factor_compute_algo: Callable | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None

    def __post_init__(self):
        assert self.backward_override is None, "Delayed scaling only supports backward_override=None."
        self._check()
        if not callable(self.amax_compute_algo) and self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"amax_compute_algo is {self.amax_compute_algo!r}: use 'max', 'most_recent' or a function")

    def __repr__(self) -> str:
        # The algorithms are not part of it in the real library either.
        return (f"recipe_type={type(self).__name__}, margin={self.margin}, format={self.fp8_format.name}, "
                f"amax_history_len={self.amax_history_len}, reduce_amax={self.reduce_amax}, fp8_dpa={self.fp8_dpa}, "
                f"fp8_mha={self.fp8_mha}, backward_override={self.backward_override}")  # fmt: skip


@dataclass(repr=False)
class Float8CurrentScaling(Recipe):
    """One scale a tensor, from the tensor's own amax.  Nothing is remembered.

    Args:
        use_power_2_scales: what NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1 sets; given here it changes nothing, in the
            real library too: set ``recipe.fp8_quant_fwd_inp`` and its siblings.
        fp8_format: ``Format.HYBRID`` (E4M3 forward, E5M2 backward) or ``Format.E4M3``.
        fp8_gemm_fprop, fp8_gemm_dgrad, fp8_gemm_wgrad: accepted; see :class:`MMParams`.
        fp8_dpa, fp8_mha, backward_override: only as they are.

    Raises:
        AssertionError: ``Format.E5M2``, an unknown backward_override.
        NotImplementedError: FP8 attention, a backward pass in high precision.
    """

    use_power_2_scales: bool = _switch("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES")
    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp = QParams(power_2_scale=use_power_2_scales)  # class attributes, as in the real library
    fp8_quant_fwd_weight = QParams(power_2_scale=use_power_2_scales)
    fp8_quant_bwd_grad = QParams(power_2_scale=use_power_2_scales)
    fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=False)
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None

    def __post_init__(self):
        self._check()


@dataclass(repr=False)
class Float8BlockScaling(Recipe):
    """One FP32 scale for each 128 values (128 x 128 for weights), a power of two by default.

    Args:
        use_f32_scales: what NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 sets; given here it changes nothing, in the real
            library too: set ``recipe.fp8_quant_fwd_inp`` and its siblings.
        fp8_format: ``Format.E4M3`` in both directions, or ``Format.HYBRID``.
        x_block_scaling_dim, w_block_scaling_dim, grad_block_scaling_dim: 1 or 2: rows of 128 or squares, for inputs,
            weights and gradients; no two of them squares.
        fp8_gemm_fprop, fp8_gemm_dgrad, fp8_gemm_wgrad: accepted; see :class:`MMParams`.
        fp8_dpa, fp8_mha, backward_override: only as they are.

    Raises:
        AssertionError: other block dimensions, ``Format.E5M2``, FP8 attention, an accumulator that is not split.
        NotImplementedError: a backward pass in high precision.
    """

    use_f32_scales: bool = _switch("NVTE_FP8_BLOCK_SCALING_FP32_SCALES")
    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp = QParams(power_2_scale=not use_f32_scales)
    fp8_quant_fwd_weight = QParams(power_2_scale=not use_f32_scales)
    fp8_quant_bwd_grad = QParams(power_2_scale=not use_f32_scales)
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams()
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None

    def __post_init__(self):
        squares = 0
        for name in "x", "w", "grad":
            dim = getattr(self, f"{name}_block_scaling_dim")
            assert dim in (1, 2), f"Only 1D or 2D blocks supported for {name}"
            squares += dim == 2
        assert squares < 2, "2D by 2D block gemm not supported."
        for name in "fprop", "dgrad", "wgrad":
            split = getattr(self, f"fp8_gemm_{name}").use_split_accumulator
            assert split, f"Split accumulator required for {name}."
        assert not (self.fp8_dpa or self.fp8_mha), "FP8 attention is not supported for Float8BlockScaling."
        self._check()


@dataclass(repr=False)
class MXFP8BlockScaling(Recipe):
    """One power-of-two scale for each 32 values.  The hardware for it is Blackwell; the emulation runs anywhere.

    Args:
        margin: accepted; without effect in the real library, too.
        fp8_format: ``Format.E4M3`` in both directions, or ``Format.HYBRID``.
        fp8_dpa, fp8_mha, backward_override, enable_2d_quantization: only as they are.

    Raises:
        AssertionError: ``Format.E5M2``, an unknown backward_override.
        NotImplementedError: FP8 attention, a backward pass in high precision, squares of 32 x 32.
    """

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None
    enable_2d_quantization: bool = False

    def __post_init__(self):
        self._check()
        if self.enable_2d_quantization:
            raise NotImplementedError("MXFP8 weights in squares are not emulated: leave enable_2d_quantization at "
                                      "False.")  # fmt: skip


@dataclass(repr=False)
class NVFP4BlockScaling(Recipe):
    """E2M1 values, one E4M3 scale for each 16.  The hardware for it is Blackwell; the emulation runs anywhere.

    Args:
        disable_rht: leave the random Hadamard transform out.
        disable_stochastic_rounding: round gradients to nearest.
        disable_2d_quantization: a scale for each 16 values of a row of the weights, too, instead of squares.
        fp4_format, fp8_format: E2M1 values, E4M3 scales; nothing else.
        row_scaled_activation, nvfp4_4over6, fp8_dpa, fp8_mha, backward_override: only as they are.
        nvfp4_4over6_e4m3_use_256, nvfp4_4over6_err_mode: accepted; they belong to nvfp4_4over6.

    Raises:
        AssertionError: other formats, unknown names.
        NotImplementedError: FP8 attention, a backward pass in high precision, a scale for each row, 4over6.
    """

    disable_rht: bool = _switch("NVTE_NVFP4_DISABLE_RHT")
    disable_stochastic_rounding: bool = _switch("NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING")
    disable_2d_quantization: bool = _switch("NVTE_NVFP4_DISABLE_2D_QUANTIZATION")
    row_scaled_activation: bool = False
    nvfp4_4over6: str = "none"
    nvfp4_4over6_e4m3_use_256: str = "all"
    nvfp4_4over6_err_mode: str = "MAE"
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3  # of the scales
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None

    def __post_init__(self):
        assert self.fp4_format is Format.E2M1, "Only E2M1 is supported for NVFP4 scaling"
        assert self.fp8_format is Format.E4M3, "Only E4M3 is supported for NVFP4 scaling"
        scopes = "none", "weights", "activations", "all"
        for name in "nvfp4_4over6", "nvfp4_4over6_e4m3_use_256":
            assert getattr(self, name) in scopes, f"{name} must be one of {', '.join(scopes)}."
        assert self.nvfp4_4over6_err_mode in ("MAE", "MSE"), "nvfp4_4over6_err_mode must be 'MAE' or 'MSE'."
        self._check()
        if self.row_scaled_activation or self.nvfp4_4over6 != "none":
            raise NotImplementedError("A scale for each row and 4over6 are not emulated: leave row_scaled_activation "
                                      "at False and nvfp4_4over6 at 'none'.")  # fmt: skip
        rotate = not self.disable_rht
        self.fp4_quant_fwd_inp = QParams(random_hadamard_transform=rotate)
        self.fp4_quant_fwd_weight = QParams(fp4_2d_quantization=not self.disable_2d_quantization)
        self.fp4_quant_bwd_grad = QParams(random_hadamard_transform=rotate,
                                          stochastic_rounding=not self.disable_stochastic_rounding)  # fmt: skip


# ----------------------------------------------------------------------------------------- what runs here
def _answer(available: bool, reason: str, return_reason: bool):
    return (available, reason) if return_reason else available


def is_fp8_available(return_reason: bool = False):
    """True: delayed and current scaling are emulated on every device.  With ``return_reason``, (bool, str)."""
    return _answer(True, "", return_reason)


def is_fp8_block_scaling_available(return_reason: bool = False):
    """True here; the hardware needs compute capability 9.0 or higher."""
    return _answer(True, "", return_reason)


def is_mxfp8_available(return_reason: bool = False):
    """True here; the hardware needs compute capability 10.0 or higher."""
    return _answer(True, "", return_reason)


def is_nvfp4_available(return_reason: bool = False):
    """True here; the hardware needs compute capability 10.0 or higher."""
    return _answer(True, "", return_reason)


def is_bf16_available(return_reason: bool = False):
    """True: torch computes in BF16 on every device, if slowly on some."""
    return _answer(True, "", return_reason)


def get_default_recipe() -> Recipe:
    """The recipe of ``autocast()`` without one: delayed scaling, as on Hopper."""
    return DelayedScaling()


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


def _decode(codes: torch.Tensor) -> torch.Tensor:
    """FP32 values of an FP8 tensor, exactly.  On a CPU torch converts one by one: shifts are 7 times as fast."""
    if codes.device.type != "cpu" or not codes.numel():
        return codes.float()
    if codes.dtype == torch.float8_e5m2:  # the upper half of an FP16 number
        return (codes.view(torch.uint8).to(torch.int16) << 8).view(torch.float16).float()
    # E4M3's exponent and mantissa fit those of FP16, which then reads 2**-8 of the value; the sign was extended.
    half = codes.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(-0x4001).view(torch.float16)
    values, magnitude = half.float().mul_(256), codes.view(torch.uint8) & 0x7F
    return values.masked_fill_(magnitude == 0x7F, torch.nan) if magnitude.max() == 0x7F else values


def _fp32(value: float) -> float:
    """Round a Python float to FP32: scales are FP32 numbers."""
    return torch.tensor(value, dtype=torch.float32).item()


class _Dequantize(torch.autograd.Function):
    """codes * scale_inv; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, tensor, dtype):
        return tensor._values(dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Float8Tensor(torch.Tensor):
    """A tensor that is stored in FP8 and looks like one of ``dtype``.

    Arithmetic sees ``codes * scale_inv``; writing into it in place (what an optimizer does) rounds the result to FP8
    again with its quantizer.  :func:`quantized_model_init` makes parameters of this kind.

    Args:
        data: uint8 codes, any shape.
        scale_inv: float32 (1,), the reciprocal of the scale.
        fp8_dtype: :class:`DType`.
        dtype: the dtype it shows and :meth:`dequantize` returns.
        quantizer: rounds again after a change in place.

    Attributes:
        _data, _scale_inv, _fp8_dtype, _quantizer: as above; one byte a value is all that is kept.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data, scale_inv, fp8_dtype, dtype, quantizer=None):
        self = torch.Tensor._make_wrapper_subclass(cls, data.shape, strides=data.stride(), dtype=dtype,
                                                   device=data.device)  # fmt: skip
        self._data, self._scale_inv, self._fp8_dtype, self._quantizer = data, scale_inv, DType(fp8_dtype), quantizer
        return self

    def _values(self, dtype: torch.dtype) -> torch.Tensor:
        return (_decode(self._data.view(self._fp8_dtype.torch)) * self._scale_inv).to(dtype)

    def _like(self, data, scale_inv) -> Float8Tensor:
        return Float8Tensor(data, scale_inv, self._fp8_dtype, self.dtype, self._quantizer)

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return codes * scale_inv as ``dtype`` (the one it shows by default): a plain tensor."""
        return _Dequantize.apply(self, dtype or self.dtype)

    def quantize_(self, tensor: torch.Tensor) -> Float8Tensor:
        """Round ``tensor`` (its shape, any float dtype) into this one, with its quantizer.

        Raises:
            RuntimeError: it has no quantizer.
        """
        if self._quantizer is None:
            raise RuntimeError("This Float8Tensor has no quantizer to round new values with.")
        if isinstance(tensor, Float8Tensor):
            tensor = tensor._values(tensor.dtype)
        codes, scale_inv = self._quantizer._codes(tensor.detach().to(self.device).expand(self.shape))
        self._data.copy_(codes.view(torch.uint8)), self._scale_inv.fill_(scale_inv)
        self._fp8_dtype = self._quantizer.dtype
        return self

    def _keep_initial(self, value: torch.Tensor | None) -> None:
        """Remember the value from before rounding, for master weights."""
        self._initial = value
        self.get_high_precision_init_val = lambda: self._initial
        self.clear_high_precision_init_val = lambda: setattr(self, "_initial", None)

    def __tensor_flatten__(self):  # how nn.Module.to(device) takes it apart and moves it
        return ["_data", "_scale_inv"], (self._fp8_dtype, self.dtype, self._quantizer)

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Float8Tensor(inner["_data"], inner["_scale_inv"], *context)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        aten, kwargs, self = torch.ops.aten, kwargs or {}, args[0] if args else None
        if func is aten.detach.default:
            return self._like(self._data, self._scale_inv)
        if func is aten.clone.default:
            return self._like(self._data.clone(), self._scale_inv.clone())
        if func is aten._to_copy.default and kwargs.get("dtype") in (None, self.dtype):
            device = kwargs.get("device")
            return self._like(self._data.to(device, copy=True), self._scale_inv.to(device, copy=True))
        if func is aten.copy_.default and isinstance(self, Float8Tensor):
            other = args[1]
            if isinstance(other, Float8Tensor) and other._fp8_dtype is self._fp8_dtype:
                self._data.copy_(other._data), self._scale_inv.copy_(other._scale_inv)
                return self
            return self.quantize_(other)

        def plain(value):
            return value._values(value.dtype) if isinstance(value, Float8Tensor) else value

        new_args, new_kwargs = tree_map(plain, args), tree_map(plain, kwargs)
        result = func(*new_args, **new_kwargs)
        if not func._schema.is_mutable:
            return result
        for argument, old, new in zip(func._schema.arguments, args, new_args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for o, n in zip(*((v if isinstance(v, (list, tuple)) else [v]) for v in (old, new)), strict=True):
                if written and isinstance(o, Float8Tensor):
                    o.quantize_(n)
        return self if isinstance(self, Float8Tensor) else result

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = self._like(self._data.clone(), self._scale_inv.clone()).requires_grad_(self.requires_grad)
            if hasattr(self, "_is_param"):
                new._is_param = self._is_param
            if hasattr(self, "_initial"):
                new._keep_initial(self._initial)
            if self.grad is not None:
                new.grad = self.grad.clone()
            memo[id(self)] = new
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _make_float8_tensor, (self._data, self._scale_inv, int(self._fp8_dtype), self.dtype)

    def __repr__(self, *, tensor_contents=None) -> str:
        return (f"Float8Tensor(fp8_dtype={self._fp8_dtype.name}, scale_inv={self._scale_inv.item()}, "
                f"data={self._values(self.dtype)})")  # fmt: skip


def _make_float8_tensor(data, scale_inv, fp8_dtype, dtype) -> Float8Tensor:
    return Float8Tensor(data, scale_inv, fp8_dtype, dtype)


torch.serialization.add_safe_globals([_make_float8_tensor])  # torch.load(weights_only=True) may rebuild one


class _Quantizer:
    """``quantizer(x)`` -> :class:`Float8Tensor`."""

    dtype: DType

    def _codes(self, x: torch.Tensor, amax: float | None = None) -> tuple[torch.Tensor, float]:
        """Return the FP8 tensor (torch dtype) and the scale's reciprocal.

        ``amax`` replaces the tensor's own where a kernel has found it before rounding (current scaling only).
        """
        raise NotImplementedError

    def quantize(self, tensor: torch.Tensor) -> Float8Tensor:
        codes, scale_inv = self._codes(tensor.detach())
        return Float8Tensor(codes.view(torch.uint8), torch.tensor([scale_inv], device=tensor.device), self.dtype,
                            tensor.dtype, self)  # fmt: skip

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

    def _codes(self, x, amax=None):
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

    def _codes(self, x, amax=None):
        amax = _amax(x) if amax is None else amax
        scale = self._scale(amax)
        return _cast(x, scale, amax, self.dtype), _fp32(1 / scale)


# ------------------------------------------------------------------------------- the state of delayed scaling
class _DelayedState:
    """Scales (tensors,) and amax history (amax_history_len, tensors) of one module, one direction.

    The tensors of each product: input, weight, output; backward: grad_output, grad_input.

    Row 0 of the history is the step under way; the update moves it to the end and clears it, so that the
    rows from the last upward are the previous step, the one before, and so on.
    """

    def __init__(self, recipe: DelayedScaling, forward: bool, device, gemms: int = 1):
        n = gemms * (3 if forward else 2)  # outputs stay in high precision: their columns do not change
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

    def __init__(self, recipe: Float8CurrentScaling, forward: bool, device, gemms: int = 1):
        self.recipe, self.dtype = recipe, _fp8_dtype(recipe, forward)
        if forward:
            self.params = (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, QParams()) * gemms
        else:
            self.params = (recipe.fp8_quant_bwd_grad, QParams()) * gemms

    def make_quantizers(self) -> list[Float8CurrentScalingQuantizer]:
        return [Float8CurrentScalingQuantizer(self.dtype, force_pow_2_scales=p.power_2_scale,
                                              amax_epsilon=p.amax_epsilon) for p in self.params]  # fmt: skip


def _fp8_dtype(recipe: Recipe, forward: bool) -> DType:
    return DType.kFloat8E4M3 if forward or recipe.fp8_format is Format.E4M3 else DType.kFloat8E5M2
