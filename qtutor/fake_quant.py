"""Fake quantization: train in high precision, see the low precision.

Quantization-aware training (QAT) puts a quantizer into the forward pass and lets the gradient go straight through it
(:mod:`qtutor.ste`).  The optimizer keeps its full-precision *latent* weights, which collect many small steps until
one tips a weight over to the next grid point.

    FakeQuantizer         target type + granularity + range, as a module
    prepare               swap every nn.Linear of a model (and, where asked, embeddings, head, norms), then train
    calibrate             let static quantizers watch some batches
    convert, bake         swap in real low-bit storage; or floats that lie on the grid (for a GGUF export)

The range of a static quantizer comes from an observer (:mod:`qtutor.observers`), its storage is in
:mod:`qtutor.packed`; everything is at hand from here: ``fake_quant.fake_quantize``, ``fake_quant.MSEObserver`` ...
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from . import QtutorError
from .observers import MinMaxObserver, MovingAverageObserver, MSEObserver, PercentileObserver
from .ste import (
    Grid,
    Target,
    block_range,
    choose_qparams,
    fake_quantize,
    fake_quantize_float,
    fake_quantize_learned,
    find_grid,
    on_grid,
    to_blocks,
)

_LOW_BIT = ("QuantizedEmbedding", "QuantizedLinear", "bake", "convert", "pack_codes", "unpack_codes", "weight_bytes")

__all__ = [
    "FakeQuantEmbedding", "FakeQuantLinear", "FakeQuantizer", "Grid", "MSEObserver", "MinMaxObserver",
    "MovingAverageObserver", "PercentileObserver", "Target", "block_range", "calibrate", "choose_qparams",
    "fake_quantize", "fake_quantize_float", "fake_quantize_learned", "fake_quantizers", "find_grid", "on_grid",
    "prepare", "to_blocks", *_LOW_BIT,
]  # fmt: skip


def __getattr__(name: str):
    if name in _LOW_BIT:  # low_bit builds on this module
        from . import packed

        return getattr(packed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ------------------------------------------------------------------------------------ FakeQuantizer


class FakeQuantizer(nn.Module):
    """Fake-quantize a tensor to ``target`` at some granularity; the gradient is straight-through.

    Args:
        target: ``"int2"`` ... ``"int8"``; a float format (``"FP8"`` = ``"E4M3"``, ``"E5M2"``, ``"FP6"`` = ``"E3M2"``,
            ``"FP4"`` = ``"E2M1"`` ...); ``"ternary"``; or a format with blocks of its own: ``"MXFP8"``, ``"MXFP6"``,
            ``"MXFP4"``, ``"NVFP4"``, and llama.cpp's ``"Q8_0"``, ``"Q5_0"``, ``"Q4_0"``, ``"TQ2_0"``.
        granularity: ``"tensor"``, ``"channel"``, ``"group"`` (needs ``group_size``) or ``"token"``; see to_blocks.
            Formats with blocks of their own bring theirs.
        symmetric: zero_point 0, or (False) an affine grid (integers only).
        observer: None = *dynamic*: the range is measured anew on every call (weights in training; activations per
            token).  An observer = *static*: measured inside ``with calibrate(model):``, then frozen in
            the buffers ``scale`` and ``zero_point``.
        no_clipping: see choose_qparams and find_grid.
        learned: the scale is an nn.Parameter that is trained with the weights (LSQ); symmetric integers.  It begins at
            2 mean|x| / sqrt(quant_max) of the first tensor seen (``prepare`` shows it the weight), or where the
            observer puts it.

    Shapes: any x -> the same shape and dtype.  Attributes: ``enabled`` (False: let x through untouched),
    ``observing`` (feed the observer).

    Raises:
        QtutorError: a static quantizer that has seen no data, sizes that do not divide, or options that exclude
        each other.
    """

    def __init__(self, target="int8", granularity=None, group_size=None, symmetric=True, observer=None,
                 no_clipping=False, learned=False):  # fmt: skip
        super().__init__()
        self.target = Target.of(target)
        block = self.target.block
        if block:
            if granularity not in (None, "group") or group_size not in (None, block) or observer is not None:
                raise QtutorError(
                    f"{self.target} has blocks of {block} values with a scale each: give no other granularity or "
                    "group_size, and no observer."
                )
            granularity, group_size = "group", block
        granularity = granularity or "channel"
        if group_size is not None and granularity == "channel":
            granularity = "group"
        if observer is not None and granularity == "token":
            raise QtutorError("A static range per token cannot exist (tokens come and go): leave observer=None.")
        if observer is not None and self.target.rule != "amax":
            raise QtutorError(f"{self.target} takes its scale from the values themselves: leave observer=None.")
        if granularity == "group" and not group_size:
            raise QtutorError("granularity='group' needs a group_size, such as 32.")
        if learned and (self.target.rule != "amax" or self.target.is_float or not symmetric or granularity == "token"):
            raise QtutorError("A learned scale is for symmetric integers, per tensor, channel or group: drop learned.")
        self.granularity, self.group_size = granularity, group_size
        self.symmetric = symmetric or self.target.is_float or self.target.rule != "amax"
        self.no_clipping, self.learned, self.observer = no_clipping, learned, observer
        self.enabled, self.observing = True, False
        (self.register_parameter if learned else self.register_buffer)("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def is_dynamic(self) -> bool:
        return self.observer is None and not self.learned

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as (n_blocks, values per block): one row for each scale."""
        return to_blocks(x, self.granularity, self.group_size)

    def grid(self, x: torch.Tensor) -> Grid:
        """The :class:`~qtutor.ste.Grid` that forward would use for ``x``."""
        if self.is_dynamic:
            return find_grid(self.blocks(x.detach()), self.target, self.symmetric, self.no_clipping)
        if self.scale is None:
            self.freeze(x)
        scale = self.scale
        if self.learned:  # a step of the optimizer may go through zero
            scale = scale.detach().clamp(min=torch.finfo(scale.dtype).smallest_normal)
        return Grid(scale, self.zero_point)

    def qparams(self, x: torch.Tensor):
        """(scale, zero_point or None) that forward would use for ``x``, each of shape (n_blocks, 1)."""
        return self.grid(x)[:2]

    @torch.no_grad()
    def freeze(self, x: torch.Tensor | None = None) -> None:
        """Turn what the observer has seen into ``scale`` and ``zero_point``; a learned scale begins there.

        ``x``: what a learned scale without an observer begins with.
        """
        if self.observer is not None:
            scale, self.zero_point = self.observer.qparams(self.target, self.symmetric, self.no_clipping)
        else:
            scale = 2 * self.blocks(x.detach()).abs().mean(dim=1, keepdim=True) / math.sqrt(self.target.quant_max)
            scale = scale.clamp(min=torch.finfo(scale.dtype).smallest_normal)
        self.scale = nn.Parameter(scale) if self.learned else scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x
        if self.observing and self.observer is not None:
            self.observer.observe(self.blocks(x))
            self.scale = self.zero_point = None  # stale: recomputed when next needed
        if not self.enabled:
            return x
        blocks, target = self.blocks(x), self.target
        grid = self.grid(x)
        if self.learned:
            low, high = target.quant_min, target.quant_max
            factor = (blocks.shape[1] * high) ** -0.5
            scale = self.scale.clamp(min=torch.finfo(self.scale.dtype).smallest_normal)
            return fake_quantize_learned(blocks, scale, low, high, factor).view(x.shape)
        return on_grid(blocks, grid, target).view(x.shape)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("scale", "zero_point"):  # a checkpoint of a calibrated quantizer fits a fresh one
            if prefix + name in state_dict:
                value = torch.empty_like(state_dict[prefix + name])
                setattr(self, name, nn.Parameter(value) if self.learned and name == "scale" else value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        group = f" of {self.group_size}" if self.granularity == "group" else ""
        kind = "learned" if self.learned else "dynamic" if self.is_dynamic else type(self.observer).__name__
        return f"{self.target}, per {self.granularity}{group}, {'symmetric' if self.symmetric else 'affine'}, {kind}"


# ----------------------------------------------------------------------------------------- prepare


class FakeQuantLinear(nn.Linear):
    """nn.Linear that sees its weight (and its input) through fake quantizers; parameters are those of the original.

    Input (..., in_features) -> output (..., out_features).
    """

    def __init__(self, linear: nn.Linear, weight: FakeQuantizer, activation: FakeQuantizer | None = None):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias  # the same Parameters: an optimizer made before still works
        self.weight_fake_quant, self.activation_fake_quant = weight, activation
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation_fake_quant is not None:
            x = self.activation_fake_quant(x)
        return F.linear(x, self.weight_fake_quant(self.weight), self.bias)


class FakeQuantEmbedding(nn.Embedding):
    """nn.Embedding that sees its table through a fake quantizer; ids (...) -> (..., embedding_dim)."""

    def __init__(self, embedding: nn.Embedding, weight: FakeQuantizer):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx,
                         embedding.max_norm, embedding.norm_type, embedding.scale_grad_by_freq, embedding.sparse,
                         _weight=embedding.weight, _freeze=not embedding.weight.requires_grad)  # fmt: skip
        self.weight = embedding.weight
        self.weight_fake_quant = weight
        self.train(embedding.training)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight_fake_quant(self.weight), self.padding_idx, self.max_norm, self.norm_type,
                           self.scale_grad_by_freq, self.sparse)  # fmt: skip


class FakeQuantNorm(nn.Module):
    """A norm (or any module with a vector of weights) that sees its ``weight`` through a fake quantizer.

    Norm weights are a thousandth of a model and sensitive: libraries leave them in float, and so does ``prepare``
    unless ``overrides`` names them.
    """

    def __init__(self, norm: nn.Module, weight: FakeQuantizer):
        super().__init__()
        self.norm, self.weight_fake_quant = norm, weight
        self.train(norm.training)

    @property
    def weight(self) -> nn.Parameter:
        return self.norm.weight

    def forward(self, *args, **kwargs):
        seen = {"weight": self.weight_fake_quant(self.norm.weight[None])[0]}
        return torch.func.functional_call(self.norm, seen, args, kwargs)


FAKE_QUANTIZED = (FakeQuantLinear, FakeQuantEmbedding, FakeQuantNorm)


def _weight_quantizer(target, group_size, learned=False) -> FakeQuantizer:
    if isinstance(target, FakeQuantizer):
        return target
    if Target.of(target).block:
        return FakeQuantizer(target)
    return FakeQuantizer(target, "group" if group_size else "channel", group_size, learned=learned)


def _activation_quantizer(target) -> FakeQuantizer | None:
    if target is None or isinstance(target, FakeQuantizer):
        return target
    return FakeQuantizer(target) if Target.of(target).block else FakeQuantizer(target, "token", symmetric=False)


def prepare(model, weight="int4", activation=None, group_size=None, skip=("lm_head", "embed_tokens"), overrides=None,
            learned=False):  # fmt: skip
    """Swap every nn.Linear of ``model`` for a FakeQuantLinear, in place; train it, then ``convert``.

    Args:
        model: any nn.Module (or one nn.Linear, in which case use the returned module).
        weight: a target's name (integers: symmetric, per output channel, or per group with ``group_size``), or a
            FakeQuantizer, copied for each layer.
        activation: None; a target's name (integers: dynamic, per token, affine; floats: per token; formats with
            blocks of their own: in these); or a FakeQuantizer.
        group_size: neighbours along in_features that share a scale; None = the whole row.
        skip: layers whose dotted name contains one of these as a component stay as they are.
        overrides: {name component: target, FakeQuantizer or None} for the layers that are to have another weight
            format, or none; embeddings, head and norms are quantized only if they are named here:
            ``{"embed_tokens": "Q8_0", "lm_head": "Q8_0"}``.
        learned: train the scales of the weights, too (LSQ); make the optimizer after prepare then.

    Returns:
        The model.

    Raises:
        QtutorError: nothing to prepare, a group_size that does not divide a layer, NaN weights, a weight that two
        layers share and only one is to quantize.  The model is unchanged then.
    """
    overrides = dict(overrides or {})
    make_weight, make_activation = _weight_quantizer(weight, group_size, learned), _activation_quantizer(activation)
    swaps, used = {}, set()
    for name, module in model.named_modules():
        parts = name.split(".")
        named = next((part for part in parts if part in overrides), None)
        vector = isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1
        if named is not None and (type(module) in (nn.Linear, nn.Embedding) or vector):
            used.add(named)
            if overrides[named] is None:
                continue
            quantizer = _weight_quantizer(overrides[named], None if vector else group_size)
        elif type(module) is not nn.Linear or any(part in skip for part in parts):
            continue
        else:
            quantizer = make_weight
        swaps[module] = _fake(name, module, copy.deepcopy(quantizer), copy.deepcopy(make_activation))
    if not swaps:
        raise QtutorError("prepare() found no nn.Linear to fake-quantize: look at the model and at `skip`.")
    if set(overrides) - used:
        raise QtutorError(f"No layer is called {', '.join(sorted(set(overrides) - used))}: look at `overrides`.")
    _check_shared(model, swaps)
    return _swap(model, swaps)


def _fake(name: str, module: nn.Module, quantizer: FakeQuantizer, activation: FakeQuantizer | None) -> nn.Module:
    size, columns = quantizer.group_size, module.weight.shape[-1]
    if size and columns % size:
        raise QtutorError(
            f"group_size {size} does not divide the {columns} inputs of layer {name!r}: "
            "choose a smaller group_size or add the layer to skip."
        )
    refuse_nan(name, module.weight)
    if quantizer.learned and quantizer.observer is None:
        quantizer.freeze(module.weight)
    if isinstance(module, nn.Embedding):
        return FakeQuantEmbedding(module, quantizer)
    if isinstance(module, nn.Linear):
        return FakeQuantLinear(module, quantizer, activation)
    return FakeQuantNorm(module, quantizer)


def _check_shared(model: nn.Module, swaps: dict) -> None:
    """Tied weights (embedding and head, say) are one tensor: both layers must see it through the same quantizer."""
    seen: dict[int, tuple] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        how = repr(swaps[module].weight_fake_quant) if module in swaps else "float"
        other, other_how = seen.setdefault(id(weight), (name, how))
        if other_how != how:
            raise QtutorError(
                f"{other!r} and {name!r} share one weight but not one quantizer ({other_how}; {how}): give both the "
                "same override, or none."
            )


def fake_quantizers(model: nn.Module) -> Iterator[FakeQuantizer]:
    """All FakeQuantizers of a model, for switching them on and off."""
    return (m for m in model.modules() if isinstance(m, FakeQuantizer))


@contextlib.contextmanager
def calibrate(model: nn.Module):
    """Inside, the model runs in full precision while its static quantizers watch; on leaving, ranges are frozen.

        with calibrate(model), torch.no_grad():
            for batch in calibration_batches:
                model(batch)
    """
    quantizers = list(fake_quantizers(model))
    if all(q.observer is None for q in quantizers):
        raise QtutorError("Nothing to calibrate: no FakeQuantizer of this model has an observer.")
    before = [(q.enabled, q.observing) for q in quantizers]
    for q in quantizers:
        q.enabled, q.observing = False, q.observer is not None
    try:
        yield model
    finally:
        for q, (enabled, observing) in zip(quantizers, before, strict=True):
            q.enabled, q.observing = enabled, observing
    for q in quantizers:
        if q.observer is not None:
            q.freeze()


def refuse_nan(name: str, weight: torch.Tensor) -> None:
    """Raise QtutorError where the weight of layer ``name`` is not finite."""
    if not torch.isfinite(weight).all():
        raise QtutorError(f"The weight of layer {name!r} holds NaN or infinite values: it cannot be quantized.")


def _swap(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> nn.Module:
    if model in swaps:
        return swaps[model]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in swaps:
                setattr(parent, name, swaps[child])
    return model
