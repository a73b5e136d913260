"""Fake quantization: train in high precision, see the low precision.

Quantization-aware training (QAT) puts a quantizer into the forward pass and lets the gradient go straight through it
(:mod:`qtutor.ste`).  The optimizer keeps its full-precision *latent* weights, which collect many small steps until one
tips a weight over to the next grid point.

    FakeQuantizer   target type + granularity + range (static ones have an observer, see qtutor.observers), as a module
    prepare         swap every nn.Linear of a model (and, where asked, embeddings, head, norms), then train
    calibrate       let static quantizers watch some batches

After training, :mod:`qtutor.packed` swaps in real low-bit storage, or floats that lie on the grid.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from . import QtutorError
from .formats import to_blocks
from .ste import Grid, Target, fake_quantize_learned, find_grid, on_grid, on_own_grid


def _no_fast_path(module, inputs) -> None:
    """A hook that does nothing: where there is one, nn.TransformerEncoderLayer does not read ``weight`` itself."""


class FakeQuantizer(nn.Module):
    """Fake-quantize a tensor to ``target`` at some granularity; the gradient is straight-through.

    Args:
        target: a name of ste.TARGETS or ALIASES, such as ``"int4"``, ``"FP8"``, ``"MXFP4"``, ``"ternary"``, ``"Q4_0"``.
        granularity, group_size: see formats.to_blocks; formats with blocks of their own bring theirs.
        symmetric: zero_point 0, or (False) an affine grid (integers only).
        observer: None = *dynamic*: the range is measured anew on every call.  An observer = *static*: measured inside
            ``with calibrate(model):``, then frozen in the buffers ``scale`` and ``zero_point``.
        no_clipping: see formats.choose_qparams and formats.mx_scale.
        learned: the scale is an nn.Parameter that is trained with the weights (LSQ); symmetric integers.  It begins at
            2 mean|x| / sqrt(quant_max) of the first tensor seen (``prepare`` shows it the weight), or where the
            observer puts it.  Its sign does not count: an optimizer's step may cross zero.

    Any x -> the same shape and dtype.  While ``observing`` is set, x feeds the observer and goes through untouched.
    """

    def __init__(self, target="int8", granularity=None, group_size=None, symmetric=True, observer=None,
                 no_clipping=False, learned=False):  # fmt: skip
        super().__init__()
        self.target = Target.of(target)
        block, plain = self.target.block, self.target.rule == "amax"
        if block and (granularity not in (None, "group") or group_size not in (None, block)):
            raise QtutorError(f"{self.target} has blocks of {block} values: give no other granularity or group_size.")
        if observer is not None and (granularity == "token" or not plain):
            raise QtutorError("A static range is for integers and floats, and not per token: leave observer=None.")
        self.group_size = block or group_size
        if granularity in (None, "channel"):
            granularity = "group" if self.group_size is not None else "channel"
        if granularity == "group" and not (isinstance(self.group_size, int) and self.group_size > 0):
            raise QtutorError(f"A group_size of {self.group_size!r} makes no groups: give a whole number, such as 32.")
        if learned and (not plain or self.target.is_float or not symmetric or granularity == "token"):
            raise QtutorError("A learned scale is for symmetric integers, per tensor, channel or group: drop learned.")
        self.granularity, self.symmetric = granularity, symmetric or self.target.is_float or not plain
        self.no_clipping, self.learned, self.observer = no_clipping, learned, observer
        self.observing, self.is_dynamic = False, observer is None and not learned
        (self.register_parameter if learned else self.register_buffer)("scale", None)
        self.register_buffer("zero_point", None)
        self.register_buffer("place", torch.empty(0), persistent=False)  # moves with the model: on which device we are
        self.register_forward_pre_hook(_no_fast_path)

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as (n_blocks, values per block): one row for each scale."""
        return to_blocks(x, self.granularity, self.group_size)

    def grid(self, x: torch.Tensor) -> Grid:
        """The :class:`~qtutor.ste.Grid` that forward would use for ``x``."""
        if self.is_dynamic:
            return find_grid(self.blocks(x.detach()), self.target, self.symmetric, self.no_clipping)
        if self.scale is None:
            self.freeze(x)
        if len(self.scale) != (found := len(self.blocks(x))):
            raise QtutorError(f"There are {len(self.scale)} scales for {found} blocks of values: use the shape they"
                              " were calibrated with, or a checkpoint of the same group_size.")  # fmt: skip
        return Grid(self.scale.abs().clamp(min=torch.finfo(self.scale.dtype).smallest_normal), self.zero_point)

    def qparams(self, x: torch.Tensor):
        """(scale, zero_point or None) that forward would use for ``x``, each of shape (n_blocks, 1)."""
        return self.grid(x)[:2]

    @torch.no_grad()
    def freeze(self, x: torch.Tensor | None = None) -> None:
        """Set ``scale`` and ``zero_point`` from what the observer has seen, or a learned scale from ``x``."""
        if self.observer is not None:
            scale, self.zero_point = self.observer.qparams(self.target, self.symmetric, self.no_clipping)
        else:
            scale = 2 * self.blocks(x).abs().mean(dim=1, keepdim=True) / math.sqrt(self.target.quant_max)
            scale = scale.clamp(min=torch.finfo(torch.float32).eps)  # zeros: from a scale of 0 no gradient leads away
        if self.learned and self.scale is not None and self.scale.shape == scale.shape:
            self.scale.copy_(scale)  # optimizers know it
        else:
            self.scale = nn.Parameter(scale) if self.learned else scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x
        if self.observing:
            if self.observer is not None:
                self.observer.observe(self.blocks(x))
                if not self.learned:
                    self.scale = self.zero_point = None  # stale: recomputed when next needed
            return x
        blocks, target = self.blocks(x), self.target
        if self.is_dynamic:
            return on_own_grid(blocks, target, self.symmetric, self.no_clipping).view(x.shape)
        grid = self.grid(blocks)
        if not self.learned:
            return on_grid(blocks, grid, target).view(x.shape)
        factor = (blocks.shape[1] * target.quant_max) ** -0.5
        return fake_quantize_learned(blocks, grid.scale, target.quant_min, target.quant_max, factor).view(x.shape)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A calibrated checkpoint fits a fresh quantizer.  A scale that is there is filled in place: optimizers know it.
        for name in ("scale",) if self.symmetric else ("scale", "zero_point"):
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and mine is None and not self.is_dynamic:
                value = torch.empty_like(saved, device=self.place.device)
                setattr(self, name, nn.Parameter(value) if self.learned and name == "scale" else value)
            elif saved is not None and mine is not None and mine.shape != saved.shape:
                raise QtutorError(f"The checkpoint has {saved.numel()} values in {prefix}{name} and this model "
                                  f"{mine.numel()}: prepare the model with the checkpoint's group_size.")  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):
        if self.observer is not None:  # what it has seen goes where the model goes
            vars(self.observer).update(tree_map_only(torch.Tensor, fn, vars(self.observer)))
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        group = f" of {self.group_size}" if self.granularity == "group" else ""
        kind = "learned" if self.learned else "dynamic" if self.is_dynamic else type(self.observer).__name__
        return f"{self.target}, per {self.granularity}{group}, {'symmetric' if self.symmetric else 'affine'}, {kind}"


class FakeQuantLinear(nn.Linear):
    """nn.Linear that sees its weight (and its input) through fake quantizers; parameters are those of the original."""

    def __init__(self, linear: nn.Linear, weight: FakeQuantizer, activation: FakeQuantizer | None = None):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias  # the same Parameters: an optimizer made before still works
        self.weight_fake_quant, self.activation_fake_quant = weight, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation_fake_quant is not None:
            x = self.activation_fake_quant(x)
        return F.linear(x, self.weight_fake_quant(self.weight), self.bias)


class FakeQuantEmbedding(nn.Embedding):
    """nn.Embedding that sees its table through a fake quantizer; ids (...) -> (..., embedding_dim)."""

    def __init__(self, embedding: nn.Embedding, weight: FakeQuantizer):
        super().__init__(*embedding.weight.shape, embedding.padding_idx, embedding.max_norm, embedding.norm_type,
                         embedding.scale_grad_by_freq, embedding.sparse, device="meta")  # fmt: skip
        self.weight, self.weight_fake_quant = embedding.weight, weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight_fake_quant(self.weight), self.padding_idx, self.max_norm, self.norm_type,
                           self.scale_grad_by_freq, self.sparse)  # fmt: skip


class FakeQuantNorm(nn.Module):
    """A norm that sees its ``weight`` through a fake quantizer (libraries leave it in float: it is small)."""

    def __init__(self, norm: nn.Module, weight: FakeQuantizer):
        super().__init__()
        self.norm, self.weight_fake_quant = norm, weight

    weight = property(lambda self: self.norm.weight)

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.norm, {"weight": self.weight_fake_quant(self.weight)}, args, kwargs)


FAKE_QUANTIZED = (FakeQuantLinear, FakeQuantEmbedding, FakeQuantNorm)


def _quantizer(target, **options) -> FakeQuantizer | None:
    """A copy of a FakeQuantizer, or one for a target's name, with ``options`` where it has no blocks of its own."""
    if target is None or isinstance(target, FakeQuantizer):
        return copy.deepcopy(target)
    return FakeQuantizer(target, **({} if Target.of(target).block else options))


def _named(name: str, entries) -> str | None:
    """The first of ``entries`` that occurs in the dotted ``name`` as one or more whole components."""
    return next((entry for entry in entries if f".{entry}." in f".{name}."), None)


def prepare(model, weight="int4", activation=None, group_size=None, skip=None, overrides=None, learned=False):
    """Swap every nn.Linear of ``model`` for a FakeQuantLinear, in place; return the model (a new layer for a layer).

    Args:
        weight: a target's name (symmetric, per channel, or per group with ``group_size``), or a FakeQuantizer, copied
            for each layer.
        activation: None; a target's name (dynamic, per token, integers affine); or a FakeQuantizer.
        group_size: neighbours along in_features that share a scale; None = the whole row.
        skip: names, such as ``"mlp.down_proj"``, of layers that stay as they are; None: head and embedding, if any.
        overrides: {name: target, FakeQuantizer or None} for layers with another weight format, or none; embeddings,
            head and norms are quantized only if named here: ``{"embed_tokens": "Q8_0", "lm_head": "Q8_0"}``.
        learned: train the scales of the weights, too (LSQ); make the optimizer after prepare then.

    Parameters, ties and hooks of forward and backward stay.  Subclasses of nn.Linear have a forward of their own: they
    stay as they are.  Where it raises QtutorError, it leaves the model unchanged.
    """
    if isinstance(activation, FakeQuantizer) and activation.learned and activation.observer is None:
        raise QtutorError("A learned range of activations begins where an observer puts it: give it one.")
    skip_named = [skip] if isinstance(skip, str) else ["lm_head", "embed_tokens"] if skip is None else list(skip)
    overrides = overrides or {}
    swaps, unused = {}, {*overrides, *skip_named}
    for name, module in model.named_modules():
        override, skipped = _named(name, overrides), _named(name, skip_named)
        unused.discard(skipped)
        vector = isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1
        if override is not None and (type(module) in (nn.Linear, nn.Embedding) or vector):
            unused.discard(override)
            quantizer = _quantizer(overrides[override], group_size=None if vector else group_size)
        elif skipped or not plain_linear(module):
            continue
        else:
            quantizer = _quantizer(weight, group_size=group_size, learned=learned)
        if quantizer is not None:
            swaps[module] = _fake(name, module, quantizer, _quantizer(activation, granularity="token", symmetric=False))
    missing = f"No layer is called {', '.join(sorted(unused))}: look at `skip` and `overrides`."
    if unused & set(overrides) or skip and unused >= set(skip_named):
        raise QtutorError(missing)
    if skip and unused:
        warnings.warn(missing, stacklevel=2)
    if not swaps:
        raise QtutorError("prepare() found no nn.Linear to fake-quantize: look at the model and at `skip`.")
    _check_shared(model, swaps)
    return swap(model, swaps)


def _fake(name: str, module: nn.Module, quantizer: FakeQuantizer, activation: FakeQuantizer | None) -> nn.Module:
    columns = module.weight.shape[-1]
    if columns % (quantizer.group_size or 1):
        raise QtutorError(f"Groups of {quantizer.group_size} do not divide the {columns} inputs of layer {name!r}: use "
                          "a smaller group_size or add the layer to skip.")  # fmt: skip
    if isinstance(module, nn.Linear | nn.Embedding):  # a norm is kept inside
        refuse_own_ways(name, module)
    if not torch.isfinite(module.weight).all():
        raise QtutorError(f"The weight of layer {name!r} holds NaN or infinite values: it cannot be quantized.")
    if quantizer.learned and quantizer.observer is None:
        quantizer.freeze(module.weight)
    if type(module) is nn.Linear:
        made = FakeQuantLinear(module, quantizer, activation)
    else:
        made = (FakeQuantEmbedding if type(module) is nn.Embedding else FakeQuantNorm)(module, quantizer)
    for part in fake_quantizers(made):
        part.to(module.weight.device)
    return made.train(module.training)


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
            raise QtutorError(f"{other!r} and {name!r} share one weight but not one quantizer ({other_how}; {how}): "
                              "give both the same override, or none.")  # fmt: skip


def fake_quantizers(model: nn.Module) -> Iterator[FakeQuantizer]:
    """All FakeQuantizers of a model, for switching them on and off."""
    return (m for m in model.modules() if isinstance(m, FakeQuantizer))


@contextlib.contextmanager
def calibrate(model: nn.Module):
    """Inside, the model runs in full precision while its static quantizers watch; on leaving, ranges are frozen."""
    quantizers = list(fake_quantizers(model))
    static = [q for q in quantizers if q.observer is not None]
    if not static:
        raise QtutorError("Nothing to calibrate: no FakeQuantizer of this model has an observer.")
    try:
        for q in quantizers:
            q.observing = True
        yield model
    finally:
        for q in quantizers:
            q.observing = False
    for q in static:
        q.freeze()


def plain_linear(module: nn.Module) -> bool:
    """Whether this is an nn.Linear: not a subclass, unless a parametrization made one of it."""
    return type(module) is nn.Linear or isinstance(module, nn.Linear) and parametrize.is_parametrized(module)


def refuse_own_ways(name: str, module: nn.Module) -> None:
    """Raise QtutorError where a new layer in the place of ``module`` would lose something that works in it."""
    hooks = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    own = {"a parametrization": parametrize.is_parametrized(module), "a forward of its own": "forward" in vars(module),
           "a weight that is computed from others": "weight" not in module._parameters,
           "parts of its own": module._modules or module._buffers or set(module._parameters) - {"weight", "bias"},
           "hooks of its state_dict": any(getattr(module, hook) for hook in hooks)}  # fmt: skip
    if found := [what for what, there in own.items() if there]:
        raise QtutorError(f"Layer {name!r} has {found[0]}, which a new layer would lose: remove it, or skip the layer.")


def swap(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> nn.Module:
    """``model`` with ``swaps[module]`` in the place of each module that is a key; it gets the hooks of forward and
    backward (the dicts themselves, so that their handles work), unless one of the two contains the other."""
    for old, new in swaps.items():
        if old not in new.modules() and new not in old.modules():
            vars(new).update({k: hooks for k, hooks in vars(old).items() if re.search("(for|back)ward_.*hook", k)})
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in swaps and module is not model:
            model.set_submodule(name, swaps[module])
    return swaps.get(model, model)
