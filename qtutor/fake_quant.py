"""Fake quantization: train in high precision, see the low precision.

Rounding has a derivative of zero almost everywhere, so a network cannot be trained through it.
Quantization-aware training (QAT) goes around that with the *straight-through estimator* (STE,
Bengio et al. 2013, https://arxiv.org/abs/1308.3432): in the forward pass a value is quantized and
dequantized at once ("fake" quantized: a float that lies on the low-bit grid); in the backward pass
the gradient goes through as if nothing had happened, except where the value was clipped, where it
is zero (a weight beyond the end of the grid has no influence on the output).

        forward     q = clamp(round(x / scale) + zero_point, quant_min, quant_max)
                    y = (q - zero_point) * scale
        backward    dL/dx = dL/dy  where quant_min <= round(x / scale) + zero_point <= quant_max,  else 0

The optimizer keeps its full-precision *latent* weights, which collect many small steps until one
tips a weight over to the next grid point.  In this module, from the inside out:

    fake_quantize         the STE as a torch.autograd.Function (integers); fake_quantize_float (FP8, FP6, FP4)
    choose_qparams        from the range of a block of values to its scale and zero_point
    *Observer             how a *static* range is found from calibration data
    FakeQuantizer         target type + granularity + range, as a module
    prepare / convert     swap every nn.Linear of a model, train, then swap in real low-bit storage

Every granularity is one case: a tensor is cut into blocks (all of it, one row, one group of a row,
one token), shape ``(n_blocks, values_per_block)``, and every block has its own scale.

The integer numerics are those of torchao's ``IntxFakeQuantizer`` and of
``torch.fake_quantize_per_channel_affine``, bit for bit (tests/test_fake_quant.py).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from . import QtutorError

# ------------------------------------------------------------------ the straight-through estimator


class _FakeQuantize(torch.autograd.Function):
    """Integer fake quantization; ``zero_point`` may be None (symmetric)."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max):
        # Multiply by the reciprocal, as torch and torchao do: x / scale differs in the last bit.
        q = (x * (1.0 / scale)).round_()
        if zero_point is not None:
            q.add_(zero_point)
        if ctx.needs_input_grad[0]:
            clipped = q.clamp(quant_min, quant_max)
            ctx.save_for_backward(clipped == q)  # one byte per value; two compares and an "and" would be three passes
            q = clipped
        else:
            q.clamp_(quant_min, quant_max)
        if zero_point is not None:
            q.sub_(zero_point)
        return q.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None, None, None


class _FakeQuantizeFloat(torch.autograd.Function):
    """Float fake quantization: the grid is that of ``fmt``, scaled."""

    @staticmethod
    def forward(ctx, x, scale, fmt):
        y = x.float() / scale
        if ctx.needs_input_grad[0]:
            # Inside as for integers: what rounds to a number of the format, i.e. up to half a step beyond the largest.
            # (amax / (amax / max) can come out a hair above max, and the largest value must not lose its gradient.)
            half_step = 2.0 ** (fmt.max_exponent - fmt.mantissa_bits - 1)
            ctx.save_for_backward(y.abs() <= fmt.max + half_step)
        return (_round_float(y, fmt) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None


_TORCH_FLOAT8 = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


def _round_float(y: torch.Tensor, fmt) -> torch.Tensor:
    """Nearest value of ``fmt``, saturating; the two FP8 types through torch's own (much faster) casts."""
    dtype = _TORCH_FLOAT8.get(fmt.name)
    if dtype is not None:
        return y.clamp(-fmt.max, fmt.max).to(dtype).float()  # clamp: the cast to E5M2 overflows to inf
    from .formats import round_to

    return round_to(y, fmt)


def fake_quantize(x, scale, zero_point=None, quant_min: int = -128, quant_max: int = 127) -> torch.Tensor:
    """Quantize and dequantize ``x`` on an integer grid, with the straight-through gradient.

    Args:
        x: float32 or bfloat16 tensor of any shape.
        scale: number or tensor, float; the step of the grid, in units of ``x``.  Broadcast against
            ``x``; a last dimension of ``n`` against ``n * group_size`` columns means one scale per group.
        zero_point: None (symmetric) or integers of the same shape as ``scale``: the code that stands for 0.0.
        quant_min, quant_max: first and last code, e.g. -8 and 7 for signed 4 bits.

    Returns:
        Tensor of the shape and dtype of ``x``.  The arithmetic is float32 (codes up to 8 bits are exact).

    Raises:
        QtutorError: scale does not fit x, or the range of codes is empty.
    """
    if quant_min >= quant_max:
        raise QtutorError(f"quant_min ({quant_min}) must be smaller than quant_max ({quant_max}).")
    shape = x.shape
    scale = _like(scale, x)
    zero_point = None if zero_point is None else _like(zero_point, x)
    n_groups = scale.shape[-1] if scale.ndim else 1
    if scale.ndim == x.ndim and n_groups not in (1, shape[-1]):
        if shape[-1] % n_groups:
            raise QtutorError(f"{n_groups} scales per row cannot share {shape[-1]} columns evenly.")
        x, scale = x.unflatten(-1, (n_groups, -1)), scale.unsqueeze(-1)
        zero_point = zero_point if zero_point is None else zero_point.unsqueeze(-1)
    try:
        fits = torch.broadcast_shapes(x.shape, scale.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise QtutorError(f"A scale of shape {tuple(scale.shape)} does not broadcast to x of shape {tuple(shape)}.")
    return _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max).view(shape)


def fake_quantize_float(x, scale, fmt) -> torch.Tensor:
    """The same on the grid of a float format (``"E4M3"``, ``"E2M1"``, ... or a ``formats.FloatFormat``)."""
    return _FakeQuantizeFloat.apply(x, _like(scale, x), Target.of(fmt).fmt)


def _like(value, x: torch.Tensor) -> torch.Tensor:
    """A float32 (float64 for float64 x) tensor on the device of x, with at least one dimension per dimension of x.

    (A tensor without dimensions would not promote bfloat16 to float32.)
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    value = torch.as_tensor(value, dtype=dtype, device=x.device)
    return value.reshape((1,) * x.ndim) if value.ndim == 0 else value


# --------------------------------------------------------------------------- targets and parameters


class Target:
    """What we quantize to: ``.name .bits``, and ``.quant_min .quant_max`` (integers) or ``.fmt`` (floats)."""

    def __init__(self, name: str, bits: int, quant_min=None, quant_max=None, fmt=None):
        self.name, self.bits, self.quant_min, self.quant_max, self.fmt = name, bits, quant_min, quant_max, fmt

    def __repr__(self):
        return self.name

    @property
    def is_float(self) -> bool:
        return self.fmt is not None

    @classmethod
    def of(cls, target) -> Target:
        """From ``"int4"``, ``"E4M3"``, a format of qtutor.formats, or a Target."""
        if isinstance(target, cls):
            return target
        name = target if isinstance(target, str) else getattr(target, "name", str(target))
        integer = re.fullmatch(r"int([2-8])", name.lower())
        if integer:
            bits = int(integer[1])
            return cls(name.lower(), bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        from .formats import FORMATS

        fmt = FORMATS.get(name.upper())
        if fmt is None or not hasattr(fmt, "exponent_bits") or name.upper() == "E8M0":
            floats = [n for n, f in FORMATS.items() if hasattr(f, "exponent_bits") and n != "E8M0"]
            raise QtutorError(f"Cannot quantize to {name!r}: choose int2 to int8 or one of {', '.join(floats)}.")
        return cls(fmt.name, fmt.bits, fmt=fmt)


@torch.no_grad()
def choose_qparams(lo, hi, target, symmetric: bool = True, no_clipping: bool = False):
    """Scale and zero_point for values between ``lo`` and ``hi`` (tensors of one value per block).

    symmetric
        ``scale = amax / ((quant_max - quant_min) / 2)``, zero_point None.  For int4 that is amax / 7.5: the grid
        is -8..7, so the largest positive value loses half a step to clipping (torchao's SYMMETRIC).
        With ``no_clipping`` the scale grows just enough for both ends (torchao's SYMMETRIC_NO_CLIPPING_ERR).
    affine (``symmetric=False``)
        the whole of [min(lo, 0), max(hi, 0)] on all codes; 0.0 stays exactly representable.
    float targets
        ``scale = amax / fmt.max``; always symmetric.

    Computed in the dtype of ``lo`` (so a bfloat16 model gets bfloat16 scales, as in torchao).
    """
    target = Target.of(target)
    zero = torch.zeros_like(lo)
    lo, hi = torch.minimum(lo, zero), torch.maximum(hi, zero)
    eps = torch.finfo(lo.dtype).smallest_normal  # an all-zero block must not divide by zero
    if target.is_float:
        return (torch.maximum(-lo, hi) / target.fmt.max).clamp(min=eps), None
    quant_min, quant_max = target.quant_min, target.quant_max
    if not symmetric:
        scale = ((hi - lo) / float(quant_max - quant_min)).clamp(min=eps)
        return scale, (quant_min - (lo / scale).round()).clamp(quant_min, quant_max)
    if no_clipping:
        scale = torch.maximum(lo / float(quant_min), hi / float(quant_max))
    else:
        scale = torch.maximum(-lo, hi) / (float(quant_max - quant_min) / 2)
    return scale.clamp(min=eps), None


def to_blocks(x: torch.Tensor, granularity: str, group_size: int | None = None) -> torch.Tensor:
    """View ``x`` as ``(n_blocks, values_per_block)``: the values in one row share one scale.

    granularity: ``"tensor"`` | ``"channel"`` (dimension 0, the output features of a weight) |
    ``"token"`` (all dimensions but the last) | ``"group"`` (``group_size`` neighbours along the last dimension).
    """
    if granularity == "tensor":
        return x.reshape(1, -1)
    if granularity == "channel":
        return x.reshape(x.shape[0], -1)
    if granularity == "token":
        return x.reshape(-1, x.shape[-1])
    if granularity != "group":
        raise QtutorError(f"Unknown granularity {granularity!r}: use 'tensor', 'channel', 'group' or 'token'.")
    if not group_size or x.shape[-1] % group_size:
        raise QtutorError(
            f"group_size {group_size} does not divide the last dimension ({x.shape[-1]}): choose one that does."
        )
    return x.reshape(-1, group_size)


def block_range(blocks: torch.Tensor):
    """Smallest and largest value of each row, each (n_blocks, 1).  (torch.aminmax is the slower way on a CPU.)"""
    return blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------- observers


class MinMaxObserver:
    """Static range: the smallest and the largest value ever seen.  One outlier sets the scale for good."""

    def __init__(self):
        self.lo = self.hi = None

    def observe(self, blocks: torch.Tensor) -> None:
        lo, hi = block_range(blocks.detach())
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    @property
    def seen(self) -> bool:
        return self.lo is not None

    def qparams(self, target, symmetric: bool = True, no_clipping: bool = False):
        """(scale, zero_point), each of shape (n_blocks, 1).  Raises QtutorError before any observation, or for NaN."""
        if not self.seen:
            raise QtutorError(
                "This static quantizer has seen no data: run some batches inside `with calibrate(model):` first."
            )
        lo, hi = self.range(target, symmetric, no_clipping)
        if not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):
            raise QtutorError("The calibration data held NaN or infinite values: find where they come from first.")
        return choose_qparams(lo, hi, target, symmetric, no_clipping)

    def range(self, target, symmetric, no_clipping):
        return self.lo, self.hi


class MovingAverageObserver(MinMaxObserver):
    """Static range: exponential moving average of each batch's min and max (torch's MovingAverageMinMaxObserver)."""

    def __init__(self, averaging_constant: float = 0.01):
        super().__init__()
        self.averaging_constant = averaging_constant

    def observe(self, blocks):
        lo, hi = block_range(blocks.detach())
        if self.seen:
            lo = self.lo + self.averaging_constant * (lo - self.lo)
            hi = self.hi + self.averaging_constant * (hi - self.hi)
        self.lo, self.hi = lo, hi


class _SampleObserver(MinMaxObserver):
    """Keeps values: every k-th, at most ``max_samples`` per batch, plus the exact extremes."""

    def __init__(self, max_samples: int = 1 << 16):
        super().__init__()
        self.max_samples, self.samples = max_samples, []

    def observe(self, blocks):
        super().observe(blocks)
        step = -(-blocks.shape[1] // self.max_samples)
        self.samples.append(blocks.detach()[:, ::step].float().clone())

    def values(self) -> torch.Tensor:
        return torch.cat(self.samples, dim=1)


class PercentileObserver(_SampleObserver):
    """Static range that cuts the tails: [100 - p, p] percentiles of the values seen (NVIDIA, arXiv:2004.09602)."""

    def __init__(self, percentile: float = 99.9, max_samples: int = 1 << 16):
        super().__init__(max_samples)
        if not 50 < percentile <= 100:
            raise QtutorError(f"percentile is {percentile}: give a number above 50 and up to 100, such as 99.9.")
        self.percentile = percentile

    def range(self, target, symmetric, no_clipping):
        values = self.values().sort(dim=1).values
        last = values.shape[1] - 1
        cut = round((1 - self.percentile / 100) * last)
        lo, hi = values[:, cut : cut + 1], values[:, last - cut : last - cut + 1]
        return lo.to(self.lo.dtype), hi.to(self.hi.dtype)


class MSEObserver(_SampleObserver):
    """Static range with the least mean squared quantization error, of ``steps`` shrunken copies of [min, max].

    Clipping a few large values makes the grid finer for all the others: at few bits that pays.
    """

    def __init__(self, steps: int = 80, smallest: float = 0.2, max_samples: int = 1 << 14):
        super().__init__(max_samples)
        self.steps, self.smallest = steps, smallest

    @torch.no_grad()
    def range(self, target, symmetric, no_clipping):
        values, target = self.values(), Target.of(target)
        best = torch.full_like(self.lo, torch.inf, dtype=torch.float32)
        shrink = torch.ones_like(best)
        for factor in torch.linspace(1.0, self.smallest, self.steps).tolist():
            scale, zero_point = choose_qparams(
                self.lo * factor, self.hi * factor, target, symmetric, no_clipping
            )
            error = (_apply(values, scale, zero_point, target) - values).square().mean(dim=1, keepdim=True)
            better = error < best
            best, shrink = torch.where(better, error, best), shrink.masked_fill(better, factor)
        return self.lo * shrink.to(self.lo.dtype), self.hi * shrink.to(self.hi.dtype)


def _apply(blocks, scale, zero_point, target: Target):
    if target.is_float:
        return fake_quantize_float(blocks, scale, target)
    return fake_quantize(blocks, scale, zero_point, target.quant_min, target.quant_max)


# ------------------------------------------------------------------------------------ FakeQuantizer


class FakeQuantizer(nn.Module):
    """Fake-quantize a tensor to ``target`` at some granularity; the gradient is straight-through.

    Args:
        target: ``"int2"`` ... ``"int8"``, or a float format (``"E4M3"``, ``"E5M2"``, ``"E3M2"``, ``"E2M1"`` ...).
        granularity: ``"tensor"``, ``"channel"``, ``"group"`` (needs ``group_size``) or ``"token"``; see to_blocks.
        symmetric: zero_point 0, or (False) an affine grid.  Float targets are always symmetric.
        observer: None = *dynamic*: the range is measured anew on every call (weights in training; activations per
            token).  An observer = *static*: measured inside ``with calibrate(model):``, then frozen in
            the buffers ``scale`` and ``zero_point``.
        no_clipping: see choose_qparams.

    Shapes: any x -> the same shape and dtype.  Attributes: ``enabled`` (False: let x through untouched),
    ``observing`` (feed the observer).

    Raises:
        QtutorError: a static quantizer that has seen no data, or sizes that do not divide.
    """

    def __init__(self, target="int8", granularity="channel", group_size=None, symmetric=True, observer=None,
                 no_clipping=False):  # fmt: skip
        super().__init__()
        if group_size is not None and granularity == "channel":
            granularity = "group"
        if observer is not None and granularity == "token":
            raise QtutorError("A static range per token cannot exist (tokens come and go): leave observer=None.")
        if granularity == "group" and not group_size:
            raise QtutorError("granularity='group' needs a group_size, such as 32.")
        self.target = Target.of(target)
        self.granularity, self.group_size = granularity, group_size
        self.symmetric, self.no_clipping = symmetric or self.target.is_float, no_clipping
        self.observer = observer
        self.enabled, self.observing = True, False
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def is_dynamic(self) -> bool:
        return self.observer is None

    def qparams(self, x: torch.Tensor):
        """(scale, zero_point or None) that forward would use for ``x``, each of shape (n_blocks, 1)."""
        if self.is_dynamic:
            blocks = to_blocks(x.detach(), self.granularity, self.group_size)
            return choose_qparams(
                *block_range(blocks), self.target, self.symmetric, self.no_clipping
            )
        if self.scale is None:
            self.freeze()
        return self.scale, self.zero_point

    def freeze(self) -> None:
        """Turn what the observer has seen into ``scale`` and ``zero_point``."""
        self.scale, self.zero_point = self.observer.qparams(self.target, self.symmetric, self.no_clipping)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x
        if self.observing and not self.is_dynamic:
            self.observer.observe(to_blocks(x, self.granularity, self.group_size))
            self.scale = self.zero_point = None  # stale: recomputed when next needed
        if not self.enabled:
            return x
        blocks = to_blocks(x, self.granularity, self.group_size)
        return _apply(blocks, *self.qparams(x), self.target).view(x.shape)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("scale", "zero_point"):  # a checkpoint of a calibrated quantizer fits a fresh one
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        group = f" of {self.group_size}" if self.granularity == "group" else ""
        kind = "dynamic" if self.is_dynamic else type(self.observer).__name__
        return f"{self.target}, per {self.granularity}{group}, {'symmetric' if self.symmetric else 'affine'}, {kind}"


# ------------------------------------------------------------------------------ prepare and convert


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


def prepare(model, weight="int4", activation=None, group_size=None, skip=("lm_head", "embed_tokens")):
    """Swap every nn.Linear of ``model`` for a FakeQuantLinear, in place; train it, then ``convert``.

    Args:
        model: any nn.Module (or one nn.Linear, in which case use the returned module).
        weight: ``"int4"``-like name (symmetric, per output channel, or per group with ``group_size``), or a
            FakeQuantizer, copied for each layer.
        activation: None; ``"int8"``-like name (dynamic, per token, affine; float names: per token); or a FakeQuantizer.
        group_size: neighbours along in_features that share a scale; None = the whole row.
        skip: layers whose dotted name contains one of these as a component stay as they are.

    Returns:
        The model.

    Raises:
        QtutorError: nothing to prepare, a group_size that does not divide a layer, NaN weights.  The model is
        unchanged then.
    """
    if isinstance(weight, FakeQuantizer):
        make_weight = weight
    else:
        make_weight = FakeQuantizer(weight, "group" if group_size else "channel", group_size)
    if activation is None or isinstance(activation, FakeQuantizer):
        make_activation = activation
    else:
        make_activation = FakeQuantizer(activation, "token", symmetric=False)

    swaps = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or any(part in skip for part in name.split(".")):
            continue
        size = make_weight.group_size
        if size and module.in_features % size:
            raise QtutorError(
                f"group_size {size} does not divide the {module.in_features} inputs of layer {name!r}: "
                "choose a smaller group_size or add the layer to skip."
            )
        _refuse_nan(name, module.weight)
        swaps[module] = FakeQuantLinear(module, copy.deepcopy(make_weight), copy.deepcopy(make_activation))
    if not swaps:
        raise QtutorError("prepare() found no nn.Linear to fake-quantize: look at the model and at `skip`.")
    return _swap(model, swaps)


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
    if all(q.is_dynamic for q in quantizers):
        raise QtutorError("Nothing to calibrate: no FakeQuantizer of this model has an observer.")
    before = [(q.enabled, q.observing) for q in quantizers]
    for q in quantizers:
        q.enabled, q.observing = False, not q.is_dynamic
    try:
        yield model
    finally:
        for q, (enabled, observing) in zip(quantizers, before, strict=True):
            q.enabled, q.observing = enabled, observing
    for q in quantizers:
        if not q.is_dynamic:
            q.freeze()


def convert(model, backend: str = "auto"):
    """Replace each FakeQuantLinear by a layer that *stores* low-bit weights, with exactly the trained numerics.

    backend:
        ``"packed"``: QuantizedLinear, codes packed to ``bits`` bits each; works for every target.
        ``"torchao"``: torchao's IntxWeightOnlyConfig / Int8DynamicActivationIntxWeightConfig (symmetric integers per
        channel or group; activations none or dynamic int8).  On a CPU its storage is one int8 per weight, whatever
        the bit width.
        ``"auto"``: torchao for int8 weights where it fits, packed otherwise.

    The dequantized weight of every converted layer is compared with the fake-quantized one: what is
    stored is what training saw.  All layers are built before the first is replaced.

    Returns:
        The model (in place; a single FakeQuantLinear returns the new module).

    Raises:
        QtutorError: there was nothing to convert (never silently!), NaN weights, or ``"torchao"`` does not fit.
    """
    if backend not in ("auto", "torchao", "packed"):
        raise QtutorError(f"Unknown backend {backend!r}: use 'auto', 'torchao' or 'packed'.")
    swaps = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            _refuse_nan(name, module.weight)
            swaps[module] = _convert_one(name, module, backend)
    if not swaps:
        raise QtutorError("convert() found no fake-quantized layer, so nothing was converted: call prepare() first.")
    return _swap(model, swaps)


@torch.no_grad()
def _convert_one(name: str, module: FakeQuantLinear, backend: str) -> nn.Module:
    wanted = module.weight_fake_quant(module.weight)
    config = None if backend == "packed" else _torchao_config(module)
    if config is not None and (backend == "torchao" or module.weight_fake_quant.target.bits == 8):
        from torchao.quantization import quantize_

        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        linear.bias = module.bias
        box = nn.Sequential(linear)
        quantize_(box, config)
        if hasattr(box[0].weight, "dequantize") and torch.equal(box[0].weight.dequantize(), wanted):
            return box[0].train(module.training)
    if backend == "torchao":
        raise QtutorError(
            f"torchao cannot store layer {name!r} ({module.weight_fake_quant.extra_repr()}) with the numbers it was "
            "trained with: use backend='packed'."
        )
    packed = QuantizedLinear(module)
    if not torch.equal(packed.dequantize(), wanted):
        raise QtutorError(f"Layer {name!r} would not store the values it was trained with: keep it unconverted.")
    return packed


def _torchao_config(module: FakeQuantLinear):
    """torchao's PTQ config for the numerics of this layer, or None where it has none."""
    w, a = module.weight_fake_quant, module.activation_fake_quant
    if w.target.is_float or not w.symmetric or not w.is_dynamic or w.granularity not in ("channel", "group"):
        return None
    torchao = _import_torchao()
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


class QuantizedLinear(nn.Module):
    """Linear layer that stores ``codes`` (packed, uint8), ``scale`` and ``zero_point``; dequantizes when called.

    Buffers: codes (out_features, ceil(in_features / 8) * bits) uint8; scale (n_blocks, 1) of the weight's dtype;
    zero_point (n_blocks, 1) int16 or None; bias.  There is no float weight any more: it computes
    with ``dequantize()``, made anew at each call, which saves memory, not time.
    """

    def __init__(self, module: FakeQuantLinear):
        super().__init__()
        q, weight = module.weight_fake_quant, module.weight.detach()
        self.in_features, self.out_features = module.in_features, module.out_features
        self.target, self.granularity, self.group_size = q.target, q.granularity, q.group_size
        scale, zero_point = q.qparams(weight)
        blocks = to_blocks(weight, q.granularity, q.group_size)
        if q.target.is_float:
            codes = q.target.fmt.encode(_round_float(blocks.float() / scale.float(), q.target.fmt))
        else:
            codes = (blocks * (1.0 / scale.float())).round_()
            codes = codes if zero_point is None else codes.add_(zero_point)
            codes = codes.clamp_(q.target.quant_min, q.target.quant_max).sub_(q.target.quant_min)
        self.register_buffer("codes", pack_codes(codes.to(torch.uint8).view(weight.shape), q.target.bits))
        self.register_buffer("scale", scale.to(weight.dtype))
        self.register_buffer("zero_point", None if zero_point is None else zero_point.to(torch.int16))
        self.register_buffer("bias", None if module.bias is None else module.bias.detach().clone())
        self.activation_fake_quant = module.activation_fake_quant
        self.train(module.training)

    def dequantize(self) -> torch.Tensor:
        """The weight, (out_features, in_features), in the dtype of ``scale``."""
        codes = unpack_codes(self.codes, self.target.bits, self.in_features)
        if self.target.is_float:
            values = self.target.fmt.decode(codes).to(self.scale.device)
        else:
            values = codes.float() + self.target.quant_min
        blocks = to_blocks(values, self.granularity, self.group_size)
        if self.zero_point is not None:
            blocks = blocks - self.zero_point
        return (blocks * self.scale.float()).to(self.scale.dtype).view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation_fake_quant is not None:
            x = self.activation_fake_quant(x)
        return F.linear(x, self.dequantize(), self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points (not the bias)."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero_point) if t is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.target}, {self.bits_per_weight:.2f} bits per weight"


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
    """Where the bytes of the linear layers are: one row per layer with ``layer, kind, bytes, bits_per_weight``."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            rows.append(dict(layer=name, kind=f"packed {module.target}", bytes=module.nbytes,
                             bits_per_weight=module.bits_per_weight))  # fmt: skip
        elif isinstance(module, nn.Linear):
            weight, kind, parts = module.weight, str(module.weight.dtype).removeprefix("torch."), [module.weight]
            if hasattr(weight, "qdata"):  # torchao's tensor subclasses name their parts so
                parts = [t for t in (weight.qdata, weight.scale, weight.zero_point) if t is not None]
                kind = f"torchao {type(weight).__name__}"
            size = sum(t.numel() * t.element_size() for t in parts)
            rows.append(dict(layer=name, kind=kind, bytes=size, bits_per_weight=8 * size / weight.numel()))
    return rows


def _refuse_nan(name: str, weight: torch.Tensor) -> None:
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
