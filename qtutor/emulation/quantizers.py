"""From a tensor to bytes and a scale: the FP8 formats, the cast, tensors stored in FP8, one scale for a tensor.

Transformer Engine's *scale* multiplies a value before the cast; *scale_inv*, its reciprocal, multiplies the code to
give the value back.  Everything in the emulation keeps to these two names.

A quantizer serves the reader, who calls it (``quantizer(x)`` returns a tensor that knows its scale), and the matrix
product, which takes *operands*: tuples (codes, scale_inv, amax of the tensor or None) from

    rows(x)        blocks, where there are any, along the last size of ``x`` (rows, columns)
    columns(x)     the same of the transpose of ``x``
    both(x)        the pair of them; with one scale a tensor the second is the first one transposed
    decode(*op)    an operand as FP32 numbers, where ``per_tensor`` without the scale, which the product applies
"""

from __future__ import annotations

import enum

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

FP32_MAX = torch.finfo(torch.float32).max


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


def largest(x: torch.Tensor) -> float:
    """Largest magnitude.  NaN does not count (the kernels compare with fmaxf, which drops it); inf does."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x)
    amax = max(-low.item(), high.item())
    if amax != amax:
        amax = x.float().nan_to_num(nan=0.0, posinf=torch.inf, neginf=torch.inf).abs().amax().item()
    return amax


def largest_anywhere(amaxes: torch.Tensor, group=None) -> torch.Tensor:
    """The largest of each of ``amaxes`` (n,) on any rank of ``group`` (None: on all), where there are several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(amaxes, dist.ReduceOp.MAX, group)
    return amaxes


def decode(codes: torch.Tensor) -> torch.Tensor:
    """FP32 values of an FP8 tensor, exactly.  On a CPU torch converts one by one: shifts are 7 times as fast."""
    if codes.device.type != "cpu" or not codes.numel():
        return codes.float()
    if codes.dtype == torch.float8_e5m2:  # the upper half of an FP16 number
        return (codes.view(torch.uint8).to(torch.int16) << 8).view(torch.float16).float()
    # E4M3's exponent and mantissa fit those of FP16, which then reads 2**-8 of the value; the sign was extended.
    half = codes.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(-0x4001).view(torch.float16)
    values, magnitude = half.float().mul_(256), codes.view(torch.uint8) & 0x7F
    return values.masked_fill_(magnitude == 0x7F, torch.nan) if magnitude.max() == 0x7F else values


_SHARDING = {op.default if hasattr(op, "default") else op.Tensor for op in (
    torch.ops.aten.split, torch.ops.aten.slice, torch.ops.aten.view, torch.ops.aten.as_strided,
    torch.ops.aten.new_zeros)}  # fmt: skip


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
    again with its quantizer.  :func:`quantized_model_init` makes parameters of this kind.  Attributes: ``_data`` (uint8
    codes), ``_scale_inv`` (float32, one element), ``_fp8_dtype`` and ``_quantizer``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data, scale_inv, fp8_dtype, dtype, quantizer=None):
        self = torch.Tensor._make_wrapper_subclass(cls, data.shape, strides=data.stride(), dtype=dtype,
                                                   device=data.device)  # fmt: skip
        self._data, self._scale_inv, self._fp8_dtype, self._quantizer = data, scale_inv, DType(fp8_dtype), quantizer
        return self

    def _values(self, dtype: torch.dtype) -> torch.Tensor:
        return (decode(self._data.view(self._fp8_dtype.torch)) * self._scale_inv).to(dtype)

    def _like(self, data, scale_inv) -> Float8Tensor:
        return Float8Tensor(data, scale_inv, self._fp8_dtype, self.dtype, self._quantizer)

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return codes * scale_inv as ``dtype`` (the one it shows by default): a plain tensor."""
        return _Dequantize.apply(self, dtype or self.dtype)

    def quantize_(self, tensor: torch.Tensor) -> Float8Tensor:
        """Round ``tensor`` (its shape, any float dtype) into this one, with its quantizer."""
        if isinstance(tensor, Float8Tensor):
            tensor = tensor._values(tensor.dtype)
        codes, scale_inv, _ = self._quantizer.rows(tensor.detach().to(self.device).expand(self.shape))
        self._data.copy_(codes), self._scale_inv.fill_(scale_inv)
        self._fp8_dtype = self._quantizer.dtype
        return self

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
        if func in _SHARDING and isinstance(self, Float8Tensor):  # fully_shard: pieces of the codes share one scale
            kwargs = {key: value for key, value in kwargs.items() if key == "storage_offset"}
            made = func(self._data, *args[1:], **kwargs)
            several = isinstance(made, (list, tuple))
            pieces = [self._like(piece, self._scale_inv) for piece in (made if several else [made])]
            return pieces if several else pieces[0]
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

    def fsdp_pre_all_gather(self, mesh, orig_size, contiguous_orig_stride, module, mp_policy):
        """FSDP2 asks what to send to the other ranks: the codes, one byte a weight.  The scale is not sent: every rank
        has it, since a scale is chosen by the amax of the whole weight (from here on under current scaling, too)."""
        if isinstance(self._quantizer, Float8CurrentScalingQuantizer) and mesh is not None:
            self._quantizer.amax_reduction_group = mesh.get_group()
        return (self._data,), (self._scale_inv, self._fp8_dtype)

    def fsdp_post_all_gather(self, all_gather_outputs, metadata, param_dtype, *, out=None):
        """Make the whole weight of the codes of all ranks."""
        (data,), (scale_inv, fp8_dtype) = all_gather_outputs, metadata
        if out is None:
            return Float8Tensor(data, scale_inv, fp8_dtype, param_dtype, self._quantizer), all_gather_outputs
        out._scale_inv, out._fp8_dtype = scale_inv, fp8_dtype

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = self._like(self._data.clone(), self._scale_inv.clone()).requires_grad_(self.requires_grad)
            if hasattr(self, "_is_param"):
                new._is_param = self._is_param
            if self.grad is not None:
                new.grad = self.grad.clone()
            memo[id(self)] = new
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return Float8Tensor, (self._data, self._scale_inv, int(self._fp8_dtype), self.dtype)

    def __repr__(self, *, tensor_contents=None) -> str:
        return (f"Float8Tensor(fp8_dtype={self._fp8_dtype.name}, scale_inv={self._scale_inv.item()}, "
                f"data={self._values(self.dtype)})")  # fmt: skip


torch.serialization.add_safe_globals([Float8Tensor])  # torch.load(weights_only=True) may rebuild one


class Quantizer:
    """What all quantizers share; ``dtype`` is a :class:`DType` (NVFP4: None)."""

    per_tensor = False
    dtype: DType | None = None

    def columns(self, x: torch.Tensor):
        return self.rows(x.t())

    def both(self, x: torch.Tensor, amax: float | None = None):
        return self.rows(x), self.columns(x)


class _TensorQuantizer(Quantizer):
    """One scale for the tensor: ``quantizer(x)`` returns a :class:`Float8Tensor`.  ``_scale(x, amax)`` returns the
    scale to quantize ``x`` with and its amax; ``amax``: found before ``x`` was rounded."""

    per_tensor = True

    def rows(self, x, amax=None):
        scale, amax = self._scale(x, amax)
        scaled = x.float() * scale  # rounded to nearest, ties to even; overflow saturates, NaN stays NaN
        if not amax * scale <= self.dtype.max:  # also when amax is inf
            scaled = scaled.clamp_(-self.dtype.max, self.dtype.max)
        return scaled.to(self.dtype.torch).view(torch.uint8), torch.tensor(1 / scale).item(), None

    def both(self, x, amax=None):
        codes, scale_inv, _ = self.rows(x, amax)
        return (codes, scale_inv, None), (codes.t(), scale_inv, None)

    def decode(self, codes, scale_inv=None, amax=None) -> torch.Tensor:
        return decode(codes.view(self.dtype.torch))

    def __call__(self, tensor: torch.Tensor) -> Float8Tensor:
        codes, scale_inv, _ = self.rows(tensor.detach())
        return Float8Tensor(codes, torch.tensor([scale_inv], device=tensor.device), self.dtype, tensor.dtype, self)


class Float8Quantizer(_TensorQuantizer):
    """Delayed scaling: quantize with the given ``scale`` and raise ``amax`` to that of what passes.  Both are float32
    tensors of one element, read and written at each call."""

    def __init__(self, scale: torch.Tensor, amax: torch.Tensor, fp8_dtype: DType):
        self.scale, self.amax, self.dtype = scale, amax, DType(fp8_dtype)

    def _scale(self, x, amax):
        amax = largest(x)
        if amax > self.amax.item():
            self.amax.fill_(amax)
        return self.scale.item(), amax


class Float8CurrentScalingQuantizer(_TensorQuantizer):
    """Current scaling: one pass finds amax (at least ``amax_epsilon``), the next quantizes.  ``force_pow_2_scales``
    rounds the scale down to a power of two."""

    def __init__(self, fp8_dtype: DType, device=None, *, force_pow_2_scales: bool = False, amax_epsilon: float = 0.0):
        self.dtype, self.force_pow_2_scales, self.amax_epsilon = DType(fp8_dtype), force_pow_2_scales, amax_epsilon
        self.amax_reduction_group = None  # of a weight that is sharded

    def _scale(self, x, amax):
        amax = largest(x) if amax is None else amax
        if self.amax_reduction_group is not None:
            amax = largest_anywhere(torch.tensor([amax], device=x.device), self.amax_reduction_group).item()
        least = torch.tensor(max(amax, self.amax_epsilon))
        return scale_of(least, self.dtype.max, FP32_MAX, self.force_pow_2_scales).item(), amax


def scale_of(amax: torch.Tensor, top: float, largest_scale: float, power_of_two: bool) -> torch.Tensor:
    """``top / amax`` in FP32, ``largest_scale`` where that overflows, 1 where amax is 0 or not finite.
    ``power_of_two``: rounded down to one, by clearing the mantissa."""
    # Not ``top / amax``: torch turns that into reciprocal-and-multiply, which is off by one bit now and then.
    scale = torch.div(torch.full_like(amax, top), amax)
    scale = scale.masked_fill_(scale.isinf(), largest_scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)
    return scale.masked_fill_((amax == 0) | ~amax.isfinite(), 1.0)
