"""Real low-bit storage for a model that was trained with fake quantization.

A fake-quantized model is a float model with extra work: nothing is smaller yet.  ``convert`` replaces its layers by
layers that store packed codes and scales, and compares every dequantized weight with what training saw before it lets
go of the floats.  ``bake`` is the way out to other tools: plain float layers whose weights lie on the grid, which an
exporter (a GGUF writer, say) then finds its codes for again.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from . import QtutorError, measure
from .fake_quant import FAKE_QUANTIZED, FakeQuantEmbedding, FakeQuantizer, FakeQuantNorm, swap
from .formats import to_blocks
from .ste import on_grid


def convert(model):
    """Replace each fake-quantized layer by one that *stores* low-bit weights, with exactly the trained numerics.

    All layers are built, and each dequantized weight compared with the fake-quantized one, before the first is
    replaced, in place.  Weights that were shared are stored once.  Returns the model (a new layer for a layer).
    """

    def stored_layer(name, module, made):
        if (stored := made.get(id(module.weight))) is None:
            seen = _seen(name, module)
            stored = made[id(module.weight)] = StoredWeight(module.weight_fake_quant, module.weight.detach())
            if not torch.equal(stored.dequantize(), seen):
                raise QtutorError(f"Layer {name!r} would not store what it was trained with: leave it unconverted.")
        if isinstance(module, FakeQuantNorm):
            return QuantizedNorm(module, stored)
        _plain_table(name, module)
        return (QuantizedEmbedding if isinstance(module, FakeQuantEmbedding) else QuantizedLinear)(module, stored)

    return _replaced(model, stored_layer, FAKE_QUANTIZED)


def bake(model):
    """Replace each fake-quantized or converted layer by a plain float layer, its weight on the points of the grid.

    Activation quantizers are dropped.  Weights that were shared stay shared.  The model is smaller by nothing, but any
    exporter can read it, and quantizing it again to the same format changes no value.
    """

    def float_layer(name, module, made):
        stored = isinstance(module, _Stored)
        key = id(module.stored if stored else module.weight)
        if key not in made:
            values = module.dequantize() if stored else _seen(name, module)
            made[key] = nn.Parameter(values.detach())
        weight = made[key]
        if isinstance(module, FakeQuantNorm | QuantizedNorm):
            module.norm.weight = weight
            return module.norm
        _plain_table(name, module)
        if isinstance(module, FakeQuantEmbedding | QuantizedEmbedding):
            plain = nn.Embedding(*weight.shape, module.padding_idx, device="meta")
        else:
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.bias = None if module.bias is None else nn.Parameter(module.bias.detach())
        plain.weight = weight
        return plain

    return _replaced(model, float_layer, (*FAKE_QUANTIZED, _Stored))


def _plain_table(name: str, module: nn.Module) -> None:
    if getattr(module, "max_norm", None) is not None:
        raise QtutorError(f"Embedding {name!r} has max_norm, which stored codes cannot follow: leave it out.")


def _seen(name: str, module: nn.Module) -> torch.Tensor:
    """The weight as training saw it."""
    values = module.weight_fake_quant(module.weight)
    if not values.isfinite().all():  # a scale of 16 bits ends at 65504
        target = module.weight_fake_quant.target
        raise QtutorError(f"The weight of layer {name!r} is NaN, infinite or too large in {target}: clip or mend it.")
    return values


@torch.no_grad()
def _replaced(model: nn.Module, build, kinds) -> nn.Module:
    """``model`` with ``build(name, module, made)`` in place of each module of ``kinds``; ``made``: weights so far."""
    swaps, made = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            activation = getattr(module, "activation_fake_quant", None)
            if activation is not None and activation.observer is not None and activation.scale is None:
                activation.freeze()  # raises where no data was seen
            swaps[module] = build(name, module, made).train(module.training)
    if not swaps:
        raise QtutorError("There is no fake-quantized layer, so nothing was converted: call prepare() first.")
    return swap(model, swaps)


class StoredWeight(nn.Module):
    """One weight, as buffers: codes (rows, ceil(columns / 8) * bits) uint8; scale (n_blocks, 1) in the weight's dtype
    or as the format stores it (E8M0, E4M3, float16); NVFP4's global_scale (1, 1); zero_point (n_blocks, 1) int16."""

    def __init__(self, quantizer: FakeQuantizer, weight: torch.Tensor):
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        self.target, self.granularity, self.group_size = quantizer.target, quantizer.granularity, quantizer.group_size
        grid = quantizer.grid(weight)
        seen = on_grid(quantizer.blocks(weight).float(), grid, self.target)
        scale = grid.scale.float()
        codes = torch.where(scale == 0, 0.0, seen / scale)
        if self.target.is_float:
            codes = self.target.fmt.encode(codes)
        else:
            codes = codes.round_() if grid.zero_point is None else codes.round_().add_(grid.zero_point)
            codes = codes.sub_(self.target.quant_min).to(torch.uint8)
        stored, *rest = grid.parts or (grid.scale.to(weight.dtype),)
        self.register_buffer("codes", pack_codes(codes.view(-1, weight.shape[-1]), self.target.bits))
        self.register_buffer("scale", stored)
        self.register_buffer("global_scale", rest[0] if rest else None)
        self.register_buffer("zero_point", None if grid.zero_point is None else grid.zero_point.to(torch.int16))

    def _apply(self, fn, recurse=True):
        # .half() is about what computes: dequantize() follows, and what is stored moves but keeps its own dtypes
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    def dequantize(self) -> torch.Tensor:
        """The weight, in its first shape and dtype."""
        codes = unpack_codes(self.codes, self.target.bits, self.shape[-1])
        values = self.target.fmt.decode(codes) if self.target.is_float else codes.float() + self.target.quant_min
        blocks = to_blocks(values, self.granularity, self.group_size)
        if self.zero_point is not None:
            blocks = blocks - self.zero_point
        scale = self.scale.float() if self.global_scale is None else self.scale.float() * self.global_scale
        return (blocks * scale).to(self.dtype).view(self.shape)

    nbytes = property(lambda self: sum(t.nbytes for t in self.buffers()))


class _Stored(nn.Module):
    """A layer without a float weight: it computes with ``dequantize()``, anew at each call; saves memory, not time."""

    def __init__(self, stored: StoredWeight):
        super().__init__()
        self.stored = stored

    def dequantize(self) -> torch.Tensor:
        return self.stored.dequantize()

    codes = property(lambda self: self.stored.codes)
    scale = property(lambda self: self.stored.scale)
    nbytes = property(lambda self: self.stored.nbytes)
    bits_per_weight = property(lambda self: 8 * self.nbytes / self.stored.shape.numel())

    def extra_repr(self) -> str:
        rows, columns = self.stored.shape[0], self.stored.shape[-1]
        return f"{columns} -> {rows}, {self.stored.target}, {self.bits_per_weight:.2f} bits per weight"


class QuantizedLinear(_Stored):
    """Linear layer on stored codes, (..., in_features) -> (..., out_features)."""

    def __init__(self, module, stored: StoredWeight):
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

    def __init__(self, module, stored: StoredWeight):
        super().__init__(stored)
        self.padding_idx = module.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.dequantize(), self.padding_idx)


class QuantizedNorm(_Stored):
    """A norm whose vector of weights is stored as codes."""

    def __init__(self, module, stored: StoredWeight):
        super().__init__(stored)
        self.norm = module.norm
        self.norm.weight = None

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.norm, {"weight": self.dequantize()}, args, kwargs)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes below 2**bits, (rows, n) -> uint8 (rows, ceil(n / 8) * bits): eight codes fill ``bits`` bytes."""
    codes = codes.long()
    if codes.numel() and not 0 <= codes.min() <= codes.max() < 2**bits:
        raise QtutorError(f"Codes of {bits} bits lie in 0..{2**bits - 1}: add {2 ** (bits - 1)} to signed ones.")
    codes = F.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    word = sum(codes[..., i] << (bits * i) for i in range(8))
    return torch.stack([(word >> (8 * k)) & 255 for k in range(bits)], dim=-1).to(torch.uint8).flatten(-2)


def unpack_codes(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of pack_codes: uint8 (rows, n)."""
    byte = packed.long().unflatten(-1, (-1, bits))
    word = sum(byte[..., k] << (8 * k) for k in range(bits))
    codes = torch.stack([(word >> (bits * i)) & (2**bits - 1) for i in range(8)], dim=-1)
    return codes.to(torch.uint8).flatten(-2)[..., :n]


def weight_bytes(model: nn.Module) -> list[dict]:
    """``layer, kind, bytes, bits_per_weight`` of each linear or quantized layer; a shared weight counts once."""
    rows, seen = [], set()
    for name, module in model.named_modules():
        if isinstance(module, _Stored):
            key, kind, size = module.stored, f"packed {module.stored.target}", module.nbytes
            weights = module.stored.shape.numel()
        elif isinstance(module, nn.Linear):
            weight = key = module.weight
            torchao = hasattr(weight, "qdata")  # its tensor subclasses name their codes so
            kind = f"torchao {type(weight).__name__}" if torchao else str(weight.dtype).removeprefix("torch.")
            size, weights = sum(t.nbytes for t in measure.plain_tensors(weight)), weight.numel()
        else:
            continue
        if id(key) not in seen:
            seen.add(id(key))
            rows.append(dict(layer=name, kind=kind, bytes=size, bits_per_weight=8 * size / weights))
    return rows
