"""Real low-bit storage for a model that was trained with fake quantization.

A fake-quantized model is a float model with extra work: nothing is smaller yet.  ``convert`` replaces its layers by
layers that store packed codes and scales, and compares every dequantized weight with what training saw before it
lets go of the floats.  ``bake`` is the way out to other tools: plain float layers whose weights lie on the
grid, which an exporter (a GGUF writer, say) then finds its codes for again.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn import functional as F

from . import QtutorError
from .fake_quant import (
    FAKE_QUANTIZED,
    FakeQuantEmbedding,
    FakeQuantizer,
    FakeQuantLinear,
    FakeQuantNorm,
    _swap,
    refuse_nan,
)
from .ste import on_grid, to_blocks


def convert(model, backend: str = "auto"):
    """Replace each fake-quantized layer by one that *stores* low-bit weights, with exactly the trained numerics.

    backend:
        ``"packed"``: QuantizedLinear, QuantizedEmbedding: codes packed to ``bits`` bits each; works for every target.
        ``"torchao"``: torchao's storage, through the configuration with the numerics of the layer: symmetric integers
        per channel or group (activations none or dynamic int8), MXFP8 and MXFP4 (weights and activations alike,
        bfloat16 weights), NVFP4 (weights only).  On a CPU torchao stores one int8 per integer, whatever the bit width.
        ``"auto"``: torchao for int8 weights where it fits, packed otherwise.

    The dequantized weight of every converted layer is compared with the fake-quantized one: what is
    stored is what training saw.  All layers are built before the first is replaced.

    Returns:
        The model (in place; a single FakeQuantLinear returns the new module).

    Raises:
        QtutorError: there was nothing to convert (never silently!), NaN weights, a static activation quantizer that
        never saw data, or ``"torchao"`` does not fit.
    """
    if backend not in ("auto", "torchao", "packed"):
        raise QtutorError(f"Unknown backend {backend!r}: use 'auto', 'torchao' or 'packed'.")
    return _replaced(model, lambda name, module, made: _convert_one(name, module, backend, made))


def bake(model):
    """Replace each fake-quantized or converted layer by a plain float layer, its weight on the points of the grid.

    Activation quantizers are dropped.  Weights that were shared stay shared.  The model is smaller by nothing, but any
    exporter can read it, and quantizing it again to the same format changes no value.

    Returns:
        The model (in place; a single FakeQuantLinear returns the new module).

    Raises:
        QtutorError: no layer is fake-quantized, or NaN weights.
    """

    def float_layer(name, module, made):
        stored = isinstance(module, _Stored)
        key = id(module.stored if stored else module.weight)
        if key not in made:
            made[key] = nn.Parameter(module.dequantize() if stored else _rounded(module))
        weight = made[key]
        if isinstance(module, (FakeQuantNorm, QuantizedNorm)):
            module.norm.weight = weight
            return module.norm
        if isinstance(module, (FakeQuantEmbedding, QuantizedEmbedding)):
            plain = nn.Embedding(*weight.shape, module.padding_idx, device="meta")
        else:
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.bias = None if module.bias is None else nn.Parameter(module.bias.detach())
        plain.weight = weight
        return plain.train(module.training)

    return _replaced(model, float_layer, (*FAKE_QUANTIZED, _Stored))


@torch.no_grad()
def _replaced(model: nn.Module, build, kinds=FAKE_QUANTIZED) -> nn.Module:
    """``model`` with ``build(name, module, made)`` in place of each module of ``kinds``; ``made`` is build's own."""
    swaps, made = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            if isinstance(module, FAKE_QUANTIZED):
                refuse_nan(name, module.weight)
            activation = getattr(module, "activation_fake_quant", None)
            if activation is not None and activation.observer is not None and activation.scale is None:
                activation.freeze()  # raises where no data was seen
            swaps[module] = build(name, module, made)
    if not swaps:
        raise QtutorError(
            "convert() found no fake-quantized layer, so nothing was converted: call prepare() first."
        )
    return _swap(model, swaps)


def _rounded(module: nn.Module) -> torch.Tensor:
    """The weight as training saw it; a vector (of a norm) is one row."""
    weight = module.weight
    seen = module.weight_fake_quant(weight if weight.ndim > 1 else weight[None])
    return seen.detach().view(weight.shape)


def _convert_one(name: str, module: nn.Module, backend: str, made: dict) -> nn.Module:
    wanted = _rounded(module)
    q = module.weight_fake_quant
    config = None if backend == "packed" or not isinstance(module, FakeQuantLinear) else _torchao_config(module)
    if config is not None and (backend == "torchao" or q.target.name == "int8"):
        from torchao.quantization import quantize_

        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        linear.bias = module.bias
        box = nn.Sequential(linear)
        quantize_(box, config)
        weight = box[0].weight
        if hasattr(weight, "dequantize") and torch.equal(weight.dequantize().to(wanted.dtype), wanted):
            return box[0].train(module.training)
    if backend == "torchao":
        raise QtutorError(
            f"torchao cannot store layer {name!r} ({q.extra_repr()}) with the numbers it was "
            "trained with: use backend='packed'."
        )
    stored = made.get(id(module.weight))  # tied weights are stored once
    if stored is None:
        stored = made[id(module.weight)] = StoredWeight(q, module.weight.detach())
        if not torch.equal(stored.dequantize(), wanted):
            raise QtutorError(f"Layer {name!r} would not store the values it was trained with: keep it unconverted.")
    kind = {FakeQuantLinear: QuantizedLinear, FakeQuantEmbedding: QuantizedEmbedding, FakeQuantNorm: QuantizedNorm}
    return kind[type(module)](module, stored).train(module.training)


def _torchao_config(module: FakeQuantLinear):
    """torchao's PTQ config for the numerics of this layer, or None where it has none."""
    w, a = module.weight_fake_quant, module.activation_fake_quant
    torchao = _import_torchao()
    if w.target.name in ("MXFP8", "MXFP4") and a is not None and a.target.name == w.target.name:
        if a.no_clipping != w.no_clipping or module.weight.dtype != torch.bfloat16:
            return None
        from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.quantization.quantize_.common import KernelPreference

        dtype = torch.float8_e4m3fn if w.target.name == "MXFP8" else torch.float4_e2m1fn_x2
        mode = ScaleCalculationMode.RCEIL if w.no_clipping else ScaleCalculationMode.FLOOR
        return MXDynamicActivationMXWeightConfig(activation_dtype=dtype, weight_dtype=dtype, scaling_mode=mode,
                                                 kernel_preference=KernelPreference.EMULATED)  # fmt: skip
    if w.target.name == "NVFP4" and a is None:
        from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

        return NVFP4WeightOnlyConfig()
    plain = w.target.rule == "amax" and not w.target.is_float and w.symmetric and w.is_dynamic
    if not plain or w.granularity not in ("channel", "group"):
        return None
    dtype = getattr(torch, f"int{w.target.bits}")
    granularity = torchao.PerGroup(w.group_size) if w.granularity == "group" else torchao.PerAxis(0)
    mapping = torchao.MappingType.SYMMETRIC_NO_CLIPPING_ERR if w.no_clipping else torchao.MappingType.SYMMETRIC
    if a is None:
        return torchao.IntxWeightOnlyConfig(dtype, granularity, mapping)
    if a.is_dynamic and a.granularity == "token" and a.target.name == "int8" and not a.symmetric:
        return torchao.Int8DynamicActivationIntxWeightConfig(dtype, granularity, mapping)
    return None


def _import_torchao():
    for noisy in ("torchao", "torch.utils._pytree"):  # "Failed to load _C_*.so": true, and of no consequence on a CPU
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import torchao.quantization as torchao

    return torchao


# ----------------------------------------------------------------------------------------- storage


class StoredWeight(nn.Module):
    """Packed codes and scales of one weight.

    Buffers: codes (rows, ceil(columns / 8) * bits) uint8; scale (n_blocks, 1) in the weight's dtype, or as the format
    stores it (E8M0, E4M3, float16); global_scale (1, 1) float32 for NVFP4, else None; zero_point (n_blocks, 1)
    int16 or None.
    """

    def __init__(self, quantizer: FakeQuantizer, weight: torch.Tensor):
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        self.target, self.granularity, self.group_size = quantizer.target, quantizer.granularity, quantizer.group_size
        weight = weight if weight.ndim > 1 else weight[None]
        grid = quantizer.grid(weight)
        seen = on_grid(quantizer.blocks(weight).float(), grid, self.target)
        scale = grid.scale.float()
        codes = torch.where(scale == 0, 0.0, seen / scale)
        if self.target.is_float:
            codes = self.target.fmt.encode(codes)
        else:
            codes = codes.round_() if grid.zero_point is None else codes.round_().add_(grid.zero_point)
            codes = codes.sub_(self.target.quant_min).to(torch.uint8)
        self.register_buffer("codes", pack_codes(codes.view(weight.shape), self.target.bits))
        stored, *rest = grid.parts or (grid.scale.to(weight.dtype),)
        self.register_buffer("scale", stored)
        self.register_buffer("global_scale", rest[0] if rest else None)
        zero_point = grid.zero_point
        self.register_buffer("zero_point", None if zero_point is None else zero_point.to(torch.int16))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
                         for name, t in self.named_buffers())  # fmt: skip

    def dequantize(self) -> torch.Tensor:
        """The weight, in its first shape and dtype."""
        codes = unpack_codes(self.codes, self.target.bits, self.shape[-1])
        if self.target.is_float:
            values = self.target.fmt.decode(codes).to(self.scale.device)
        else:
            values = codes.float() + self.target.quant_min
        blocks = to_blocks(values, self.granularity, self.group_size)
        if self.zero_point is not None:
            blocks = blocks - self.zero_point
        scale = self.scale.float()
        if self.global_scale is not None:
            scale = scale * self.global_scale
        return (blocks * scale).to(self.dtype).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.shape.numel()


class _Stored(nn.Module):
    """What the layers have in common that hold a :class:`StoredWeight`: there is no float weight any more.

    They compute with ``dequantize()``, made anew at each call, which saves memory, not time.
    """

    def __init__(self, stored: StoredWeight):
        super().__init__()
        self.stored = stored

    def dequantize(self) -> torch.Tensor:
        return self.stored.dequantize()

    codes = property(lambda self: self.stored.codes)
    scale = property(lambda self: self.stored.scale)
    target = property(lambda self: self.stored.target)
    nbytes = property(lambda self: self.stored.nbytes)
    bits_per_weight = property(lambda self: self.stored.bits_per_weight)

    def extra_repr(self) -> str:
        rows, columns = self.stored.shape[0], self.stored.shape[-1]
        return f"{columns} -> {rows}, {self.target}, {self.bits_per_weight:.2f} bits per weight"


class QuantizedLinear(_Stored):
    """Linear layer on stored codes, (..., in_features) -> (..., out_features)."""

    def __init__(self, module: FakeQuantLinear, stored: StoredWeight):
        super().__init__(stored)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.register_buffer("bias", None if module.bias is None else module.bias.detach().clone())
        self.activation_fake_quant = module.activation_fake_quant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation_fake_quant is not None:
            x = self.activation_fake_quant(x)
        return F.linear(x, self.dequantize(), self.bias)


class QuantizedEmbedding(_Stored):
    """Embedding on stored codes, ids (...) -> (..., embedding_dim)."""

    def __init__(self, module: FakeQuantEmbedding, stored: StoredWeight):
        super().__init__(stored)
        self.padding_idx = module.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.dequantize(), self.padding_idx)


class QuantizedNorm(_Stored):
    """A norm whose vector of weights is stored as codes."""

    def __init__(self, module: FakeQuantNorm, stored: StoredWeight):
        super().__init__(stored)
        self.norm = module.norm
        self.norm.weight = None

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.norm, {"weight": self.dequantize()}, args, kwargs)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes below 2**bits, (rows, n) -> uint8 (rows, ceil(n / 8) * bits), little-endian.

    Eight codes of ``bits`` bits are exactly ``bits`` bytes, for every width from 2 to 8.
    """
    codes = F.pad(codes.long(), (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    word = codes[..., 0].clone()
    for i in range(1, 8):
        word |= codes[..., i] << (bits * i)
    return torch.stack([(word >> (8 * k)) & 255 for k in range(bits)], dim=-1).to(torch.uint8).flatten(-2)


def unpack_codes(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of pack_codes: uint8 (rows, n)."""
    byte = packed.long().unflatten(-1, (-1, bits))
    word = byte[..., 0].clone()
    for k in range(1, bits):
        word |= byte[..., k] << (8 * k)
    codes = torch.stack([(word >> (bits * i)) & (2**bits - 1) for i in range(8)], dim=-1)
    return codes.to(torch.uint8).flatten(-2)[..., :n]


def weight_bytes(model: nn.Module) -> list[dict]:
    """Where the bytes of the weights are: one row per layer with ``layer, kind, bytes, bits_per_weight``.

    Linear layers always, embeddings and norms where they are quantized.  A weight that two layers share counts once.
    """
    rows, seen = [], set()
    for name, module in model.named_modules():
        if isinstance(module, _Stored):
            key, kind, size = module.stored, f"packed {module.target}", module.nbytes
            weights = module.stored.shape.numel()
        elif isinstance(module, nn.Linear):
            weight = key = module.weight
            kind, parts = str(weight.dtype).removeprefix("torch."), [weight]
            if hasattr(weight, "qdata"):  # torchao's tensor subclasses name their parts so
                parts = [getattr(weight, part, None) for part in ("qdata", "scale", "zero_point", "per_tensor_scale")]
                parts = [part for part in parts if part is not None]
                kind = f"torchao {type(weight).__name__}"
            size, weights = sum(t.numel() * t.element_size() for t in parts), weight.numel()
        else:
            continue
        if id(key) not in seen:
            seen.add(id(key))
            rows.append(dict(layer=name, kind=kind, bytes=size, bits_per_weight=8 * size / weights))
    return rows
