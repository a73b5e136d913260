"""The FP8 product with its gradients, the base of all modules that have one, and ``Linear``.

See :mod:`qtutor.emulation` for the idea and :mod:`qtutor.emulation.quantizers` for the numbers.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable

import torch
from torch import nn

from .quantizers import Float8Quantizer, Float8Tensor, largest
from .recipes import DelayedScaling, Format, Recipe
from .regions import DelayedState, Region, State

UNSAFE_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


# Arguments of the real modules that need several GPUs, or kernels that are not emulated, at the value that switches
# each of them off; then those that change no number.
_OFF = dict(
    tp_group=None, tp_size=1, parallel_mode=None, sequence_parallel=False, get_rng_state_tracker=None,
    fuse_wgrad_accumulation=False, delay_wgrad_compute=False, return_layernorm_output=False, window_size=None,
    zero_centered_gamma=False, layer_type="encoder", attention_type="self", qk_norm_type=None, rotary_percent=1.0,
    interleaved=False, qkv_weight_interleaved=True, drop_path_rate=0.0, checkpoint=False, output_layernorm=False,
    parallel_attention_mlp=False, apply_residual_connection_post_layernorm=False, softmax_scale=None,
)  # fmt: skip
_IGNORED = ("name", "layer_number", "seq_length", "micro_batch_size")


def check_unused(module, arguments: dict) -> None:
    """Accept arguments of the real module that are switched off; refuse what would change the result."""
    name = type(module).__name__
    for argument, value in arguments.items():
        if argument not in (*_OFF, *_IGNORED):
            raise TypeError(f"{name} got an unexpected keyword argument {argument!r}")
        if argument in _OFF and value != _OFF[argument]:
            raise NotImplementedError(f"{name}({argument}={value!r}) is not emulated: it needs Transformer Engine on "
                                      "a GPU.")  # fmt: skip


def _check_dims(*tensors: torch.Tensor) -> None:
    for t in tensors:
        rows = t.numel() // t.shape[-1] if t.shape[-1] else 0
        if rows % 8 or t.shape[-1] % 16:
            raise ValueError("FP8 execution requires the product of all dimensions except the last to be divisible by "
                             "8 and the last dimension to be divisible by 16, but got tensor with "
                             f"dims={list(t.shape)}: pad the batch or the layer.")  # fmt: skip


def _product(a, b, dtype: torch.dtype, bias=None) -> torch.Tensor:
    """``a @ b (+ bias)`` of (FP32 matrix, factor or None) pairs, rounded once to ``dtype``."""
    factor = (1.0 if a[1] is None else a[1]) * (1.0 if b[1] is None else b[1])
    # beta=0 ignores its first argument, so any tensor that broadcasts will do.
    start, beta = (a[0].new_zeros(1), 0) if bias is None else (bias.float(), 1)
    return torch.addmm(start, a[0], b[0], beta=beta, alpha=factor).to(dtype)


def _matrix(quantizer, operand):
    """An operand as (FP32 matrix, factor of the product)."""
    return quantizer.decode(*operand), operand[1] if quantizer.per_tensor else None


def _transposed(matrix):
    return matrix[0].t(), matrix[1]


class _Fp8Linear(torch.autograd.Function):
    """Three products of quantized operands: y = x w^T, dx = dy w, dw = dy^T x.  What is kept for the backward pass is
    quantized, along the dimension that the backward products sum over."""

    @staticmethod
    def forward(ctx, weight, inp, bias, module, number, dtype, cached, amax, wide):
        x = inp.reshape(-1, inp.shape[-1])
        of_x, of_w = module.quantizers["scaling_fwd"][3 * number : 3 * number + 2]
        if isinstance(weight, Float8Tensor):
            codes, scale_inv = weight._data, weight._scale_inv.item()
            of_rows, of_columns = (codes, scale_inv, None), (codes.t(), scale_inv, None)
        else:
            of_rows, of_columns = cached or of_w.both(weight)
            module.last_weights[number] = of_rows, of_columns
        ctx.updates = False
        if any(ctx.needs_input_grad[:3]):  # the first module of a region comes last in the backward pass
            ctx.updates, Region.first = Region.first, False
        rows, columns = of_x.both(x, amax) if ctx.needs_input_grad[0] else (of_x.rows(x, amax), (None,) * 3)
        kept = [*columns, *of_columns, of_rows[0]]  # Hopper keeps a weight's codes in both layouts
        ctx.numbers = [None if torch.is_tensor(v) else v for v in kept]
        ctx.save_for_backward(*(v if torch.is_tensor(v) else None for v in kept))
        ctx.quantizers = of_x, of_w, module.quantizers["scaling_bwd"][2 * number]
        ctx.dtype, ctx.shape = dtype, inp.shape
        if bias is not None:  # cuBLAS takes no FP32 bias with FP8 operands
            bias = bias.to(torch.bfloat16 if dtype == torch.float32 else dtype)
        out = _product(_matrix(of_x, rows), _transposed(_matrix(of_w, of_rows)), dtype, bias)
        out = out.float() if wide else out
        return out if inp.dim() == 2 else out.view(*inp.shape[:-1], weight.shape[0])  # FSDP2 warns of views

    @staticmethod
    def backward(ctx, grad_output):
        kept = [n if t is None else t for t, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        of_x, of_w, of_dy = ctx.quantizers
        dy = grad_output.reshape(-1, grad_output.shape[-1])
        if dy.shape[0] % 16 or dy.shape[1] % 16:
            raise RuntimeError("The backward pass in FP8 requires the number of rows (tokens) and out_features to be "
                               f"divisible by 16, but got a gradient with dims={list(dy.shape)}: pad the batch or the "
                               "layer.")  # fmt: skip
        rows = _matrix(of_dy, of_dy.rows(dy))
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            columns = _transposed(rows) if of_dy.per_tensor else _matrix(of_dy, of_dy.columns(dy))
            dw = _product(columns, _transposed(_matrix(of_x, kept[:3])), ctx.dtype)
        if ctx.needs_input_grad[1]:
            dx = _product(rows, _transposed(_matrix(of_w, kept[3:6])), ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[2]:  # a sum, not a matrix product: it reads the gradient before FP8
            db = dy.float().sum(0).to(ctx.dtype)
        if ctx.updates:
            Region.update(forward=False)
        return dw, dx, db, None, None, None, None, None, None


class FP8Module(nn.Module):
    """What every module with FP8 products has: quantizers, their state, its way into checkpoints and copies.

    A subclass says how many products it has (``products``), calls ``add_weights`` at the end of its constructor, and in
    its forward pass ``prepare_fp8``, then ``product`` for each of them, the last one by ``last_product``.
    """

    products = 1

    def __init__(self):
        super().__init__()
        self.fp8_meta = {}  # "recipe" and the states "scaling_fwd", "scaling_bwd"
        self.fp8 = self.fp8_calibration = False
        self.last_weights = {}  # product -> quantized weight of this step's first microbatch
        self._fp8_weights = []  # names of FP8 parameters, by product

    @property
    def quantizers(self) -> dict[str, list]:
        """The quantizers of each direction, made anew: all that lasts is in the states."""
        return {key: state.make_quantizers() for key, state in self.fp8_meta.items() if key != "recipe"}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))

    def _device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def add_weights(self, *groups: dict, bias: bool, params_dtype, device) -> None:
        """Make ``<prefix>weight`` and then ``<prefix>bias`` for each prefix -> (shape, init_method) of a group."""
        options = dict(device=device, dtype=params_dtype or torch.get_default_dtype())
        for group in groups:
            for prefix, (shape, init_method) in group.items():
                weight = nn.Parameter(torch.empty(shape, **options))
                setattr(self, f"{prefix}weight", weight)
                with torch.no_grad():
                    init_method(weight) if init_method else weight.normal_(0.0, 0.023)
            for prefix, (shape, _) in group.items():  # without bias the real one has an empty tensor there, not None
                value = nn.Parameter(torch.zeros(shape[0], **options)) if bias else torch.empty(0, **options)
                setattr(self, f"{prefix}bias", value)
        self._quantize_parameters([f"{prefix}weight" for group in groups for prefix in group])

    def product(self, number: int, inp, weight, bias, dtype, is_first_microbatch=None, *, amax=None, wide=False):
        """``inp @ weight.T + bias``, in FP8 where the region says so, else in ``dtype``; call ``prepare_fp8`` before.

        ``number``: of the product in this module; each has its own quantizers and its own cached weight.  ``inp`` may
        be FP32 where ``dtype`` is BF16, if a fused kernel would not have rounded it before it quantized it; its
        gradient is rounded to ``dtype``.  ``amax``: of ``inp`` where a kernel has found it before rounding it.
        ``wide``: return FP32 (of numbers rounded to ``dtype``), so that the gradient may be FP32 as well.
        """
        bias = bias if bias is not None and bias.numel() else None
        if not self.fp8:
            if self.fp8_calibration:
                quantizers = self.quantizers["scaling_fwd"][3 * number : 3 * number + 2]
                for quantizer, tensor in zip(quantizers, (inp.to(dtype), weight), strict=True):
                    if isinstance(quantizer, Float8Quantizer):  # the other recipes remember nothing
                        quantizer.amax.fill_(largest(tensor.detach()))
            return nn.functional.linear(inp.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        _check_dims(inp, weight)
        cached = self.last_weights.get(number) if is_first_microbatch is False else None
        with torch.autocast(inp.device.type, enabled=False):
            out = _Fp8Linear.apply(weight, inp, bias, self, number, dtype, cached, amax, wide)
        if is_first_microbatch is None:
            self.last_weights.pop(number, None)
        return out

    def last_product(self, number: int, inp, weight, bias, dtype, is_first_microbatch, **options):
        """The module's result: the product with its bias added or, with return_bias, (product, bias)."""
        added = None if self.return_bias else bias
        out = self.product(number, inp, weight, added, dtype, is_first_microbatch, **options)
        return (out, bias.to(dtype)) if self.return_bias else out

    def _quantize_parameters(self, names: list[str]) -> None:
        """Inside quantized_model_init: replace the weight of each product by an FP8 parameter."""
        recipe = Region.parameter_recipe
        if recipe is None:
            return
        if not recipe.float8_per_tensor_scaling():
            raise NotImplementedError(f"FP8 weights under {type(recipe).__name__} are not emulated: use DelayedScaling "
                                      "or Float8CurrentScaling.")  # fmt: skip
        self._set_recipe(recipe)
        for number, name in enumerate(names):
            quantizer = self.quantizers["scaling_fwd"][3 * number + 1]
            setattr(self, name, nn.Parameter(quantizer(getattr(self, name).detach())))
        self._fp8_weights = names

    def _link_parameters(self) -> None:
        """FP8 weights round with the module's states, which are new after a copy or a move."""
        for number, name in enumerate(self._fp8_weights):
            if isinstance(getattr(self, name), Float8Tensor):  # Module.to(dtype) makes a plain one of it
                getattr(self, name)._quantizer = self.quantizers["scaling_fwd"][3 * number + 1]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "_extra_state"
        if self._fp8_weights and key in state_dict:  # before the weights: they are rounded with these scales
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def prepare_fp8(self) -> None:
        """Take over what the region says; make quantizers where the recipe is new."""
        self.fp8, self.fp8_calibration = Region.enabled, Region.calibrating
        if not (self.fp8 or self.fp8_calibration):
            return
        old, new = (type(recipe).__name__ for recipe in (self.fp8_meta.get("recipe", Region.recipe), Region.recipe))
        if old != new and self._fp8_weights:
            raise RuntimeError(f"Recipe mismatch for {self._fp8_weights[0]!r}: tensor supports recipe {old}, but got "
                               f"{new}: use one kind in quantized_model_init() and autocast().")  # fmt: skip
        if old != new:
            warnings.warn(f"Recipe type changed from {old} to {new}. This may affect model behavior.", stacklevel=3)
        self._set_recipe(Region.recipe)
        if self.fp8 and Region.recipe.delayed():
            Region.members[Region.key][1][self] = None
            state = self.fp8_meta["scaling_fwd"]
            for before in Region.checkpoints:
                before.setdefault(self, (state.scale.clone(), state.amax_history.clone()))

    def _set_recipe(self, recipe: Recipe) -> None:
        self.fp8_meta["recipe"] = recipe
        for key, forward in (("scaling_fwd", True), ("scaling_bwd", False)):
            state = self.fp8_meta.get(key)
            if state is None or type(state.recipe) is not type(recipe):
                kind = DelayedState if recipe.delayed() else State
                self.fp8_meta[key] = kind(recipe, forward, self._device(), self.products)
            elif recipe.delayed() and len(state.amax_history) != recipe.amax_history_len:
                state.resize(recipe.amax_history_len)
        self._link_parameters()

    def _delayed_states(self) -> dict[str, DelayedState]:
        return {key: state for key, state in self.fp8_meta.items() if isinstance(state, DelayedState)}

    def get_extra_state(self) -> torch.Tensor:
        """Scales and amax histories as bytes, uint8 (n,); empty where there is nothing to remember."""
        states = self._delayed_states()
        if not (self.fp8 or self.fp8_calibration) or not states:
            return torch.empty(0, dtype=torch.uint8)
        recipe = self.fp8_meta["recipe"]
        settings = vars(recipe) | {"fp8_format": recipe.fp8_format.name}
        saved = {key: (state.scale.cpu(), state.amax_history.cpu()) for key, state in states.items()}
        file = io.BytesIO()
        torch.save({"recipe": settings, **saved}, file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Load what :meth:`get_extra_state` returned.  The real library's is a Python pickle, which can run code: it
        asks for an environment variable.  Ours is plain tensors, but code that works here must work there."""
        if state is None or state.numel() == 0:
            return
        if os.environ.get(UNSAFE_STATE) != "1":
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state: it can execute arbitrary "
                               f"code, so set {UNSAFE_STATE}=1 if you trust where it comes from.")  # fmt: skip
        try:
            saved = torch.load(io.BytesIO(state.cpu().numpy().tobytes()), weights_only=True)
            settings = saved.pop("recipe")
        except Exception as error:  # whatever a foreign or damaged pickle raises
            raise RuntimeError("This FP8 state was not written by the emulation: load it with Transformer Engine on a "
                               "GPU, or drop the keys that end with '_extra_state'.") from error  # fmt: skip
        self.fp8_meta.pop("scaling_fwd", None), self.fp8_meta.pop("scaling_bwd", None)
        self._set_recipe(DelayedScaling(**settings | {"fp8_format": Format[settings["fp8_format"]]}))
        for key, numbers in saved.items():
            self.fp8_meta[key].restore(*numbers)

    def __setstate__(self, state):  # of a copy
        super().__setstate__(state)
        self._link_parameters()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for state in self._delayed_states().values():  # it follows the module to its device, and stays FP32
            state.scale = state.scale.to(self._device())
            state.amax_history = state.amax_history.to(self._device())
        self._link_parameters()
        return self

    def activation_dtype(self, inp: torch.Tensor, features: int) -> torch.dtype:
        """The dtype that ``inp`` (..., features) is computed in."""
        assert inp.shape[-1] == features, "GEMM not possible"  # the real one's error
        if torch.is_autocast_enabled(inp.device.type):
            return torch.get_autocast_dtype(inp.device.type)
        for name, parameter in self.named_parameters():
            if parameter.dtype != inp.dtype:
                raise TypeError("Data types for parameters must match when outside of autocasted region. "
                                f"Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}")  # fmt: skip
        return inp.dtype


class Linear(FP8Module):
    """``nn.Linear`` whose three matrix products run in FP8 inside :class:`autocast`.

    ``in_features`` and ``out_features`` are multiples of 16.  ``init_method`` fills the weight in place, by default
    from a normal distribution with deviation 0.023.  ``return_bias``: return (output, bias) and leave the addition to
    the caller.  ``params_dtype``: keep FP32 for training and let ``torch.autocast`` choose the dtype of activations.

    ``weight`` (out_features, in_features) is never changed by FP8.  Under delayed scaling there are
    ``fp8_meta["scaling_fwd"].scale`` and ``.amax_history`` (columns: input, weight, output, the last of them not used)
    and ``["scaling_bwd"]`` (grad_output, grad_input); ``quantizers`` has the same columns.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, init_method: Callable | None = None,
                 return_bias: bool = False, params_dtype: torch.dtype | None = None, device=None,
                 **unused):  # fmt: skip
        super().__init__()
        check_unused(self, unused)
        self.in_features, self.out_features, self.return_bias = in_features, out_features, return_bias
        self.add_weights({"": ((out_features, in_features), init_method)}, bias=bias, params_dtype=params_dtype,
                         device=device)  # fmt: skip

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None):
        """Apply the layer to (..., in_features); for training in FP8 16 must divide the product of the other sizes.

        ``is_first_microbatch``: with gradient accumulation, True for the first batch of a step and False for the
        others, which then reuse its FP8 weight.
        """
        dtype = self.activation_dtype(inp, self.in_features)
        self.prepare_fp8()
        return self.last_product(0, inp, self.weight, self.bias, dtype, is_first_microbatch)
