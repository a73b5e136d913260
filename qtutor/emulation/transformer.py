"""Transformer layers whose matrix products run in FP8, and weights that live in FP8.

A Llama layer has seven linear maps and a few cheap things between them.  Transformer Engine makes one module of a
cheap thing and the product after it, because that is where FP8 saves memory traffic: the norm (or the activation)
writes 8-bit numbers at once instead of BF16 ones that a second kernel would read again to round them.

    LayerNormLinear      norm -> product                                    query, key and value in one
    DotProductAttention  softmax(q k^T) v                                   in BF16: softmax needs the digits
    Linear               product                                            the attention's output
    LayerNormMLP         norm -> product -> activation -> product           gate and up in one, then down
    TransformerLayer     all of it, with rotary embedding, grouped queries, dropout and residuals

Fused also means that a number is rounded once where plain code rounds twice.  Under delayed scaling the norm's FP32
result goes to FP8 directly; under current scaling, whose scale is known only after the last value has been seen, it
is rounded to BF16 first.  The emulation does the same, so that its bytes are the hardware's.

:func:`quantized_model_init` drops the FP32 or BF16 weights and keeps FP8 ones only: no cast before each product, half
the memory for inference (in training Hopper keeps a transposed copy, which takes it back), and an optimizer whose
updates are lost where they are smaller than an FP8 step, unless it keeps master weights of its own.

Sources: Transformer Engine 2.20 (pytorch/module/layernorm_linear.py, layernorm_mlp.py, pytorch/transformer.py,
common/normalization, common/activation); Zhang and Sennrich, RMSNorm, arXiv:1910.07467; Shazeer, GLU variants,
arXiv:2002.05202; Su et al., RoFormer, arXiv:2104.09864; Ainslie et al., GQA, arXiv:2305.13245.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from .modules import Linear, _default_init, _linear, _Region, _TEModule
from .quantizers import Recipe, get_default_recipe

__all__ = [
    "DotProductAttention", "LayerNorm", "LayerNormLinear", "LayerNormMLP", "MultiheadAttention", "RMSNorm",
    "RotaryPositionEmbedding", "TransformerLayer", "apply_rotary_pos_emb", "fp8_model_init", "quantized_model_init",
]  # fmt: skip


# ------------------------------------------------------------------------------------- what is not emulated
# Arguments of the real modules that only matter with several GPUs, or with kernels that are not emulated, and the
# value that switches each off.
_OFF = {
    "tp_group": (None,), "tp_size": (1,), "get_rng_state_tracker": (None,), "fuse_wgrad_accumulation": (False,),
    "parallel_mode": (None, "column"), "sequence_parallel": (False, True), "set_parallel_mode": (False, True),
    "return_layernorm_output_gathered": (False,), "delay_wgrad_compute": (False,), "symmetric_ar_type": (None,),
    "checkpoint": (False,), "activation_params": (None,), "softcap": (0.0,), "softmax_type": ("vanilla",),
    "softmax_scale": (None,), "return_max_logit": (False,), "bottom_right_diagonal": (None, False),
    "window_size": (None, (-1, -1), (-1, 0)), "cp_group": (None,), "cp_global_ranks": (None,), "cp_stream": (None,),
    "cp_comm_type": ("p2p",), "enc_dec_attn_mask_type": ("no_mask",), "enc_dec_window_size": (None,),
    "enc_dec_bottom_right_diagonal": (None,), "output_layernorm": (False,), "parallel_attention_mlp": (False,),
    "apply_residual_connection_post_layernorm": (False,), "layer_type": ("encoder",), "drop_path_rate": (0.0,),
    "qk_norm_type": (None,), "attention_type": ("self",), "input_layernorm": (True,),
    "core_attention_bias_type": ("no_bias",), "core_attention_bias": (None,), "alibi_slopes": (None,),
    "inference_params": (None,), "pad_between_seqs": (None, False), "encoder_output": (None,),
    "enc_dec_attn_mask": (None,), "fp8_output": (False,), "fp8_grad": (False,), "cu_seqlens_q": (None,),
    "cu_seqlens_kv": (None,), "cu_seqlens_q_padded": (None,), "cu_seqlens_kv_padded": (None,),
}  # fmt: skip
# Arguments that change speed, not numbers.
_IGNORED = {
    "seq_length", "micro_batch_size", "ub_tp_comm_overlap", "ub_overlap_ag", "ub_overlap_rs", "ub_overlap_rs_dgrad",
    "ub_bulk_dgrad", "ub_bulk_wgrad", "ub_name", "sm_margin", "fast_zero_fill", "max_seqlen_q", "max_seqlen_kv",
    "qk_norm_eps", "qk_norm_before_rope",
}  # fmt: skip


def _check_unused(where: str, arguments: dict) -> None:
    """Accept arguments of the real module that are switched off; refuse what would change the result."""
    for name, value in arguments.items():
        if name in _OFF:
            if not any(value is off or (type(value) is type(off) and value == off) for off in _OFF[name]):
                raise NotImplementedError(f"{where}({name}={value!r}) is not emulated: it needs Transformer Engine "
                                          "on a GPU.")  # fmt: skip
        elif name not in _IGNORED:
            raise TypeError(f"{where} got an unexpected keyword argument {name!r}")


# -------------------------------------------------------------------------------------------------- norms
class _Norm(torch.autograd.Function):
    """RMSNorm or LayerNorm over the last axis, in FP32 whatever comes in; the result is FP32, its rounding comes later.

    RMSNorm:  y = x / sqrt(mean(x^2) + eps) * gamma         LayerNorm: the same of x - mean(x), plus beta
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, eps, centered, dtype):
        # Parameters are rounded to the activations' dtype, as in any other module under torch.autocast.
        ctx.parameters = gamma.dtype, None if beta is None else beta.dtype
        x, gamma = x.to(dtype), gamma.to(dtype).float()
        if centered:
            gamma = gamma + 1
        wide, n = x.float(), x.shape[-1]
        ctx.is_layernorm = beta is not None
        if ctx.is_layernorm:
            y, mean, scale = torch.native_layer_norm(wide, [n], gamma, beta.to(dtype).float(), eps)
        else:
            mean = None
            scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().mul_(1 / n).add_(eps).rsqrt_()
            y = (wide * scale).mul_(gamma)
        ctx.save_for_backward(x, gamma, scale, mean)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gamma, scale, mean = ctx.saved_tensors
        wide, dy, n = x.float(), dy.float(), x.shape[-1]
        dbeta = None
        if ctx.is_layernorm:
            beta = torch.zeros_like(gamma)
            dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(dy, wide, [n], mean, scale, gamma, beta,
                                                                          [True, True, True])  # fmt: skip
            dbeta = dbeta.to(x.dtype).to(ctx.parameters[1])
        else:
            unit = wide * scale
            dunit = dy * gamma
            dgamma = (dy * unit).reshape(-1, n).sum(0)
            dx = dunit.sub_(unit * (dunit * unit).mean(-1, keepdim=True)).mul_(scale)
        return dx.to(x.dtype), dgamma.to(x.dtype).to(ctx.parameters[0]), dbeta, None, None, None


class _NormModule(nn.Module):
    """What RMSNorm and LayerNorm share: the parameters and the dtypes."""

    def __init__(self, normalized_shape, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
                 hidden_size=None, *, device=None, dtype=None, **unused):  # fmt: skip
        super().__init__()
        _check_unused(type(self).__name__, unused)
        if normalized_shape is None:
            if hidden_size is None:
                raise RuntimeError("Neither `normalized_shape` nor `hidden_size` (deprecated) args are provided")
            normalized_shape = hidden_size
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        options = dict(device=device, dtype=dtype or params_dtype or torch.get_default_dtype())
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(shape, **options)) if isinstance(self, LayerNorm) else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.fill_(0.0 if self.zero_centered_gamma else 1.0)
            if self.bias is not None:
                self.bias.zero_()

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """Normalize (..., normalized_shape); the result has the dtype of torch.autocast, or else of the weight.

        Raises:
            ValueError: the last sizes are not ``normalized_shape``.
        """
        shape = self.weight.shape
        if inp.shape[inp.dim() - len(shape) :] != shape:
            raise ValueError(f"Input tensor (shape={tuple(inp.shape)}) and weight tensor (shape={tuple(shape)}) "
                             "are not compatible")  # fmt: skip
        device = inp.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        beta = None if self.bias is None else self.bias.flatten()
        flat = inp.reshape(*inp.shape[: inp.dim() - len(shape)], -1)
        return _Norm.apply(flat, self.weight.flatten(), beta, self.eps, self.zero_centered_gamma, dtype).to(dtype).view(
            inp.shape)  # fmt: skip


class RMSNorm(_NormModule):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last sizes, computed in FP32.

    Args:
        normalized_shape: int, or the last sizes.
        eps: added to the mean square.
        zero_centered_gamma: multiply by ``1 + weight`` and start with zeros: weight decay then pulls to 1.
        device, dtype (or params_dtype): of the weight.

    Source: Zhang and Sennrich, arXiv:1910.07467.
    """


class LayerNorm(_NormModule):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last sizes, computed in FP32.

    Arguments as :class:`RMSNorm`.
    """


def _norm_parameters(module: nn.Module, size: int, normalization: str, options: dict) -> None:
    """Give ``module`` layer_norm_weight and, for LayerNorm, layer_norm_bias."""
    assert normalization in ("LayerNorm", "RMSNorm"), "Unsupported normalization type!"
    module.layer_norm_weight = nn.Parameter(torch.empty(size, **options))
    if normalization == "LayerNorm":
        module.layer_norm_bias = nn.Parameter(torch.empty(size, **options))
    else:
        module.layer_norm_bias = None
    with torch.no_grad():
        module.layer_norm_weight.fill_(0.0 if module.zero_centered_gamma else 1.0)
        if module.layer_norm_bias is not None:
            module.layer_norm_bias.zero_()


def _normalized(module, inp: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The norm in front of a product: FP32 where quantization is fused with it, else rounded to ``dtype``."""
    out = _Norm.apply(inp, module.layer_norm_weight, module.layer_norm_bias, module.eps, module.zero_centered_gamma,
                      dtype)  # fmt: skip
    return out if _rounds_once(module) and not module.return_layernorm_output else out.to(dtype)


def _rounds_once(module) -> bool:
    """Whether norms and activations go to FP8 directly: under delayed scaling, whose scale is known beforehand."""
    return module.fp8 and module.fp8_meta["recipe"].delayed()


# -------------------------------------------------------------------------------------------- LayerNormLinear
class LayerNormLinear(_TEModule):
    """Norm, then linear map: ``norm(x) @ weight.T + bias``, the product in FP8 inside ``autocast``.

    Args:
        in_features, out_features: multiples of 16.
        eps: of the norm.
        init_method: fills each weight in place; normal with deviation 0.023 by default.
        bias: whether to add one.
        normalization: "LayerNorm" or "RMSNorm".
        return_bias: return the bias, too, and leave its addition to the caller.
        params_dtype, device: of the parameters.
        return_layernorm_output: return what the norm gave, too.  It is then rounded to the activations' dtype before
            it is quantized.
        parameters_split: names, or name -> rows, of the parameters ``<name>_weight`` and ``<name>_bias`` that the
            weight is kept in; it is one matrix, with one scale, in the product.
        zero_centered_gamma: see :class:`RMSNorm`.

    Attributes:
        layer_norm_weight, layer_norm_bias: (in_features,).
        weight: (out_features, in_features), or the parts.

    Raises:
        NotImplementedError: arguments that need several GPUs.
        RuntimeError: parts together with :func:`quantized_model_init`: one scale cannot serve several parameters.
    """

    _gemms = 1

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-5, *, init_method: Callable | None = None,
                 bias: bool = True, normalization: str = "LayerNorm", return_bias: bool = False,
                 params_dtype: torch.dtype | None = None, return_layernorm_output: bool = False, parameters_split=None,
                 zero_centered_gamma: bool = False, device=None, name: str | None = None, **unused):  # fmt: skip
        super().__init__(name)
        _check_unused(type(self).__name__, unused)
        self.in_features, self.out_features = in_features, out_features
        self.eps, self.normalization = eps, normalization
        self.use_bias, self.return_bias, self.return_layernorm_output = bias, return_bias, return_layernorm_output
        self.zero_centered_gamma = zero_centered_gamma
        options = dict(device=device, dtype=params_dtype or torch.get_default_dtype())
        _norm_parameters(self, in_features, normalization, options)
        parts = self._parts(parameters_split)
        self.weight_names = [f"{part}weight" for part in parts]
        self.bias_names = [f"{part}bias" for part in parts]
        if len(parts) > 1 and _Region.fp8_parameters:
            raise RuntimeError("Splitting QuantizedTensor into multiple params is not supported")
        with torch.no_grad():
            for name, rows in zip(self.weight_names, parts.values(), strict=True):
                self.register_parameter(name, nn.Parameter(torch.empty(rows, in_features, **options)))
                (init_method or _default_init)(getattr(self, name))
        for name, rows in zip(self.bias_names, parts.values(), strict=True):
            if bias:
                self.register_parameter(name, nn.Parameter(torch.zeros(rows, **options)))
            else:
                setattr(self, name, torch.empty(0, **options))
        self._quantize_parameters(self.weight_names)

    def _parts(self, split) -> dict[str, int]:
        """Prefix of the parameters' names -> rows."""
        if split is None:
            return {"": self.out_features}
        if not split:
            raise ValueError("Cannot split weight buffer into 0 parameters")
        if not isinstance(split, dict):
            split = {name: self.out_features // len(split) for name in split}
        if sum(split.values()) != self.out_features:
            raise ValueError(f"Trying to split weight buffer (out_features={self.out_features}) with split sizes "
                             f"{list(split.values())}")  # fmt: skip
        return {f"{name.rstrip('_')}_": rows for name, rows in split.items()}

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}, "
                f"normalization={self.normalization}")  # fmt: skip

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None, **unused):
        """Apply norm and product.

        Args:
            inp: (..., in_features).
            is_first_microbatch: as for ``Linear``.

        Returns:
            (..., out_features) in the dtype of the activations; with return_bias or return_layernorm_output a tuple
            (output, bias, norm's output).
        """
        _check_unused(type(self).__name__, unused)
        assert inp.shape[-1] == self.in_features, "GEMM not possible"
        dtype = self._activation_dtype(inp)
        self._prepare_fp8()
        normed = _normalized(self, inp, dtype)
        weights = [getattr(self, name) for name in self.weight_names]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None
        if self.use_bias:
            biases = [getattr(self, name) for name in self.bias_names]
            bias = biases[0] if len(biases) == 1 else torch.cat(biases)
        out = _linear(self, 0, normed, weight, None if self.return_bias else bias, dtype, is_first_microbatch)
        extra = ()
        if self.return_bias:
            extra += ((self.bias if bias is None else bias).to(dtype),)
        if self.return_layernorm_output:
            extra += (normed,)
        return (out, *extra) if extra else out


# ----------------------------------------------------------------------------------------------- LayerNormMLP
def _sigmoid_gradient(dy, x):
    s = torch.sigmoid(x)
    return dy * s * (1 - s)


def _qgelu_gradient(dy, x):
    s = torch.sigmoid(1.702 * x)
    return dy * (s + 1.702 * x * s * (1 - s))


_ACTIVATIONS = {  # name -> f(x), gradient(dy, x)
    "gelu": (lambda x: F.gelu(x, approximate="tanh"),
             lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh")),
    "qgelu": (lambda x: x * torch.sigmoid(1.702 * x), _qgelu_gradient),
    "relu": (F.relu, lambda dy, x: dy * (x > 0)),
    "srelu": (lambda x: F.relu(x).square_(), lambda dy, x: dy * F.relu(x).mul_(2)),
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "sigmoid": (torch.sigmoid, _sigmoid_gradient),
}  # fmt: skip
_GATED = {"glu": "sigmoid", "geglu": "gelu", "qgeglu": "qgelu", "reglu": "relu", "sreglu": "srelu", "swiglu": "silu"}


class _Activation(torch.autograd.Function):
    """f(x), or f(first half) * second half, in FP32 whatever comes in; the result is FP32."""

    @staticmethod
    def forward(ctx, x, name):
        ctx.save_for_backward(x)
        ctx.name = name
        if name in _GATED:
            gate, up = x.chunk(2, -1)
            return _ACTIVATIONS[_GATED[name]][0](gate.float()) * up
        return _ACTIVATIONS[name][0](x.float())

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dy = dy.float()
        if ctx.name not in _GATED:
            return _ACTIVATIONS[ctx.name][1](dy, x.float()).to(x.dtype), None
        f, gradient = _ACTIVATIONS[_GATED[ctx.name]]
        gate, up = (half.float() for half in x.chunk(2, -1))
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, -1)
        dgate.copy_(gradient(dy * up, gate)), dup.copy_(f(gate).mul_(dy))
        return dx, None


class LayerNormMLP(_TEModule):
    """Norm, linear map, activation, linear map: ``act(norm(x) @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias``.

    Args:
        hidden_size, ffn_hidden_size: multiples of 16.
        eps: of the norm.
        return_bias: return fc2's bias, too, and leave its addition to the caller.
        init_method, output_layer_init_method: fill fc1_weight and fc2_weight in place; normal, deviation 0.023.
        bias: whether both products add one.
        normalization: "LayerNorm" or "RMSNorm".
        activation: "gelu", "geglu", "glu", "qgelu", "qgeglu", "relu", "reglu", "srelu", "sreglu", "silu" or "swiglu".
            The gated ones (``...glu``) take two halves from fc1: act(first half) * second half, so that for a
            Llama ``fc1_weight = cat([gate_proj, up_proj])``.
        params_dtype, device: of the parameters.
        return_layernorm_output: return what the norm gave, too.
        zero_centered_gamma: see :class:`RMSNorm`.

    Attributes:
        layer_norm_weight, layer_norm_bias: (hidden_size,).
        fc1_weight: (ffn_hidden_size, hidden_size), twice as many rows for the gated activations.
        fc2_weight: (hidden_size, ffn_hidden_size).
        fp8_meta: columns of the forward state: fc1's input, weight, output, then fc2's; of the backward state: the
            gradients of fc1's output and input, then fc2's.

    Raises:
        NotImplementedError: an unknown activation, or arguments that need several GPUs.
    """

    _gemms = 2

    def __init__(self, hidden_size: int, ffn_hidden_size: int, eps: float = 1e-5, *, return_bias: bool = False,
                 init_method: Callable | None = None, bias: bool = True, normalization: str = "LayerNorm",
                 activation: str = "gelu", output_layer_init_method: Callable | None = None,
                 params_dtype: torch.dtype | None = None, return_layernorm_output: bool = False,
                 zero_centered_gamma: bool = False, device=None, name: str | None = None, **unused):  # fmt: skip
        super().__init__(name)
        _check_unused(type(self).__name__, unused)
        if activation not in _GATED and (activation not in _ACTIVATIONS or activation == "sigmoid"):
            raise NotImplementedError("Activation type " + activation + " is not supported!")
        self.hidden_size, self.activation, self.normalization, self.eps = hidden_size, activation, normalization, eps
        self.use_bias, self.return_bias, self.return_layernorm_output = bias, return_bias, return_layernorm_output
        self.zero_centered_gamma = zero_centered_gamma
        options = dict(device=device, dtype=params_dtype or torch.get_default_dtype())
        _norm_parameters(self, hidden_size, normalization, options)
        rows = 2 * ffn_hidden_size if activation in _GATED else ffn_hidden_size
        for fc, shape, init in (("fc1", (rows, hidden_size), init_method),
                                ("fc2", (hidden_size, ffn_hidden_size), output_layer_init_method)):  # fmt: skip
            weight = nn.Parameter(torch.empty(shape, **options))
            self.register_parameter(f"{fc}_weight", weight)
            if bias:
                self.register_parameter(f"{fc}_bias", nn.Parameter(torch.zeros(shape[0], **options)))
            else:
                setattr(self, f"{fc}_bias", torch.empty(0, **options))
            with torch.no_grad():
                (init or _default_init)(weight)
        self._quantize_parameters(["fc1_weight", "fc2_weight"])

    def extra_repr(self) -> str:
        return (f"hidden_size={self.hidden_size}, ffn_hidden_size={self.fc2_weight.shape[1]}, bias={self.use_bias}, "
                f"normalization={self.normalization}, activation={self.activation}")  # fmt: skip

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None):
        """Apply the block.

        Args:
            inp: (..., hidden_size).
            is_first_microbatch: as for ``Linear``.

        Returns:
            (..., hidden_size) in the dtype of the activations; with return_bias or return_layernorm_output a tuple
            (output, fc2's bias, norm's output).
        """
        assert inp.shape[-1] == self.hidden_size, "GEMM not possible"
        dtype = self._activation_dtype(inp)
        self._prepare_fp8()
        normed = _normalized(self, inp, dtype)
        fused = _rounds_once(self)
        # The gradient of a plain activation is rounded to FP8 in the same kernel, that of a gated one is not.
        hidden = _linear(self, 0, normed, self.fc1_weight, self.fc1_bias if self.use_bias else None, dtype,
                         is_first_microbatch, wide=fused and self.activation not in _GATED)  # fmt: skip
        act, amax = _Activation.apply(hidden, self.activation), None
        if not fused:
            if self.fp8 and dtype != torch.float32 and self.fp8_meta["recipe"].float8_current_scaling():
                amax = act.detach().abs().amax().item()  # the kernel looks before it rounds
            act = act.to(dtype)
        bias = self.fc2_bias if self.use_bias and not self.return_bias else None
        out = _linear(self, 1, act, self.fc2_weight, bias, dtype, is_first_microbatch, amax=amax)
        extra = (self.fc2_bias.to(dtype),) if self.return_bias else ()
        if self.return_layernorm_output:
            extra += (normed,)
        return (out, *extra) if extra else out


# ------------------------------------------------------------------------------------------ rotary embedding
class RotaryPositionEmbedding(nn.Module):
    """Angles of the rotary position embedding.

    Args:
        dim: head size.
        rotary_percent: turn only this share of each head.
        seq_len_interpolation_factor, pretrained_max_position_embeddings: divide positions (arXiv:2306.15595).
        rotary_base: base of the geometric series of frequencies.
        interleaved: pairs are neighbours, not halves.

    Source: Su et al., arXiv:2104.09864.
    """

    def __init__(self, dim: int, rotary_percent: float = 1.0, seq_len_interpolation_factor: int | None = None,
                 pretrained_max_position_embeddings: int | None = None, rotary_base: float = 10000.0,
                 interleaved: bool = False):  # fmt: skip
        super().__init__()
        if rotary_percent < 1.0:
            dim = int(dim * rotary_percent)
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        self.pretrained_max_position_embeddings = pretrained_max_position_embeddings
        self.rotary_base, self.interleaved = rotary_base, interleaved
        self.register_buffer("inv_freq", 1.0 / (rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)))

    def forward(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Return the angles of positions offset .. offset + max_seq_len, float32 (max_seq_len, 1, 1, dim)."""
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
        trained, factor = self.pretrained_max_position_embeddings, self.seq_len_interpolation_factor
        if trained is not None and factor is not None:
            positions *= trained / max_seq_len if max_seq_len > trained * factor else 1 / factor
        angles = positions[:, None] * self.inv_freq
        angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), -1)
        return angles[:, None, None]


class _Rotate(torch.autograd.Function):
    """Turn pairs (a, b) into (a cos - b sin, a sin + b cos); backwards, turn the other way."""

    @staticmethod
    def forward(ctx, t, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(t, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.interleaved), None, None, None


def _rotate(t, cos, sin, interleaved):
    """``t`` (..., head size); ``cos`` and ``sin`` (one angle a pair) broadcast; computed in their dtype."""
    size = 2 * cos.shape[-1]
    out = torch.empty_like(t)
    if size < t.shape[-1]:
        out[..., size:] = t[..., size:]

    def halves(x):
        return (x[..., 0:size:2], x[..., 1:size:2]) if interleaved else x[..., :size].chunk(2, -1)

    (a, b), (new_a, new_b) = halves(t), halves(out)
    new_a.copy_(a * cos - b * sin), new_b.copy_(b * cos + a * sin)
    return out


def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor, tensor_format: str = "sbhd", start_positions=None,
                         interleaved: bool = False, fused: bool = False, cu_seqlens=None, cp_size: int = 1,
                         cp_rank: int = 0) -> torch.Tensor:  # fmt: skip
    """Turn queries or keys by their positions.

    Args:
        t: (s, b, h, d) or, with tensor_format="bshd", (b, s, h, d).
        freqs: what :class:`RotaryPositionEmbedding` returned for at least s positions.
        interleaved: as there.
        fused: compute in FP32 and round once, as the kernel does that the layers use; otherwise sine, cosine and
            products are each rounded to the dtype of ``t``.

    Raises:
        NotImplementedError: start_positions, the "thd" format or context parallelism, which are not emulated.
    """
    if tensor_format not in ("sbhd", "bshd") or start_positions is not None or cp_size != 1:
        raise NotImplementedError(f"apply_rotary_pos_emb(tensor_format={tensor_format!r}, start_positions="
                                  f"{start_positions!r}, cp_size={cp_size}) is not emulated: use 'sbhd' or 'bshd' with "
                                  "the default positions.")  # fmt: skip
    length = t.shape[0] if tensor_format == "sbhd" else t.shape[1]
    if length > len(freqs):
        raise ValueError(f"The rotary embedding covers {len(freqs)} positions and the sequence has {length}: ask it "
                         "for a larger max_seq_len.")  # fmt: skip
    angles = freqs[:length].float()
    angles = angles[..., ::2] if interleaved else angles[..., : angles.shape[-1] // 2]
    if tensor_format == "bshd":
        angles = angles.transpose(0, 1)
    dtype = torch.float32 if fused else t.dtype
    return _Rotate.apply(t, angles.cos().to(dtype), angles.sin().to(dtype), interleaved)


# -------------------------------------------------------------------------------------------------- attention
_MASKS = ("no_mask", "causal", "causal_bottom_right", "arbitrary")


class DotProductAttention(_TEModule):
    """softmax(q k^T / sqrt(d)) v, not in FP8.

    Args:
        num_attention_heads: query heads.
        kv_channels: head size.
        num_gqa_groups: key and value heads; query heads share them in equal, consecutive groups.
        attention_dropout: of the softmax's output, in training.
        qkv_format: "sbhd" (sequence, batch, head, size) or "bshd".
        attn_mask_type: "causal", "no_mask", "causal_bottom_right" or "arbitrary".

    Raises:
        NotImplementedError: other masks and formats, softcap, FP8 attention.
    """

    _gemms = 3  # columns of state for FP8 attention, which stay unused, as in the real one without fp8_dpa

    def __init__(self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None,
                 attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal", *,
                 softmax_scale: float | None = None, layer_number: int | None = None, name: str | None = None,
                 **unused):  # fmt: skip
        super().__init__(name)
        _check_unused(type(self).__name__, unused)
        if num_attention_heads % (num_gqa_groups or 1):
            raise AssertionError("The number of attention heads must be divisible by the number of GQA groups!")
        self.num_attention_heads, self.hidden_size_per_attention_head = num_attention_heads, kv_channels
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.attention_dropout, self.qkv_format, self.attn_mask_type = attention_dropout, qkv_format, attn_mask_type
        self.softmax_scale = softmax_scale or 1 / math.sqrt(kv_channels)

    def extra_repr(self) -> str:
        return f"{self.num_attention_heads} heads on {self.num_gqa_groups}, {self.qkv_format}, {self.attn_mask_type}"

    def forward(self, query_layer: torch.Tensor, key_layer: torch.Tensor, value_layer: torch.Tensor,
                attention_mask: torch.Tensor | None = None, qkv_format: str | None = None, *,
                attn_mask_type: str | None = None, checkpoint_core_attention: bool = False, **unused):  # fmt: skip
        """Attend.

        Args:
            query_layer: (s, b, heads, d) or (b, s, heads, d).
            key_layer, value_layer: the same with num_gqa_groups heads.
            attention_mask: for "arbitrary", bool, broadcastable to (b, heads, s, s), True where it must not look.

        Returns:
            (s, b, heads * d) or (b, s, heads * d).
        """
        _check_unused(type(self).__name__, unused)
        self._prepare_fp8()
        layout, kind = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        if layout not in ("sbhd", "bshd") or kind not in _MASKS:
            raise NotImplementedError(f"DotProductAttention(qkv_format={layout!r}, attn_mask_type={kind!r}) is not "
                                      f"emulated: use 'sbhd' or 'bshd' and one of {', '.join(_MASKS)}.")  # fmt: skip
        order = (1, 2, 0, 3) if layout == "sbhd" else (0, 2, 1, 3)
        q, k, v = (t.permute(order) for t in (query_layer, key_layer, value_layer))  # (b, heads, s, d)
        n_q, n_k = q.shape[2], k.shape[2]
        mask, causal = None, kind == "causal"
        if kind == "arbitrary":
            if attention_mask is None:
                raise ValueError("attn_mask_type='arbitrary' needs an attention_mask.")
            mask = ~attention_mask
        elif kind == "causal_bottom_right" and n_q != n_k:
            mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        elif kind == "causal_bottom_right":
            causal = True
        options = dict(attn_mask=mask, is_causal=causal, scale=self.softmax_scale,
                       dropout_p=self.attention_dropout if self.training else 0.0,
                       enable_gqa=k.shape[1] != q.shape[1])  # fmt: skip
        if checkpoint_core_attention:
            from torch.utils.checkpoint import checkpoint

            out = checkpoint(lambda *t: F.scaled_dot_product_attention(*t, **options), q, k, v, use_reentrant=False)
        else:
            out = F.scaled_dot_product_attention(q, k, v, **options)
        return out.permute((2, 0, 1, 3) if layout == "sbhd" else (0, 2, 1, 3)).flatten(2)


class MultiheadAttention(nn.Module):
    """Norm, query/key/value product, rotary embedding, attention, output product.

    Args:
        hidden_size: of the input; num_attention_heads, kv_channels (head size), num_gqa_groups as for
            :class:`DotProductAttention`.
        attention_dropout, layernorm_epsilon, init_method, output_layer_init_method, attn_mask_type, params_dtype,
            bias, normalization, device, zero_centered_gamma: as their names say.
        input_layernorm: must be True here (the real one can do without).
        return_bias: return the output product's bias, too, and leave its addition to the caller.
        fuse_qkv_params: one parameter ``layernorm_qkv.weight`` instead of ``query_weight``, ``key_weight`` and
            ``value_weight``; required by :func:`quantized_model_init`.
        qkv_weight_interleaved: how the one parameter's rows are laid out: for each key head its query heads, the
            key head and the value head (True), or all queries, all keys, all values (False).  Ignored without
            fuse_qkv_params.
        rotary_pos_interleaved: see :class:`RotaryPositionEmbedding`.
        qkv_format: "sbhd" or "bshd".
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, kv_channels: int | None = None,
                 attention_dropout: float = 0.1, layernorm_epsilon: float = 1e-5, init_method: Callable | None = None,
                 output_layer_init_method: Callable | None = None, layer_number: int | None = None,
                 attn_mask_type: str = "causal", *, num_gqa_groups: int | None = None,
                 params_dtype: torch.dtype | None = None, return_bias: bool = False, input_layernorm: bool = False,
                 fuse_qkv_params: bool = False, zero_centered_gamma: bool = False, qkv_weight_interleaved: bool = True,
                 rotary_pos_interleaved: bool = False, bias: bool = True, normalization: str = "LayerNorm", device=None,
                 qkv_format: str = "sbhd", name: str | None = None, **unused):  # fmt: skip
        super().__init__()
        _check_unused(type(self).__name__, unused | {"input_layernorm": input_layernorm})
        head = kv_channels or hidden_size // num_attention_heads
        groups = num_gqa_groups or num_attention_heads
        assert num_attention_heads % groups == 0, (
            "The number of attention heads must be divisible by the number of GQA groups!"
        )
        self.num_attention_heads, self.num_gqa_groups = num_attention_heads, groups
        self.hidden_size_per_attention_head = head
        self.qkv_format, self.attn_mask_type, self.return_bias = qkv_format, attn_mask_type, return_bias
        self.qkv_weight_interleaved = qkv_weight_interleaved and fuse_qkv_params
        self.rotary_pos_interleaved = rotary_pos_interleaved
        rows = dict(query=head * num_attention_heads, key=head * groups, value=head * groups)
        common = dict(bias=bias, params_dtype=params_dtype, device=device)
        self.layernorm_qkv = LayerNormLinear(
            hidden_size, sum(rows.values()), eps=layernorm_epsilon, init_method=init_method,
            normalization=normalization, parameters_split=None if fuse_qkv_params else rows,
            zero_centered_gamma=zero_centered_gamma, **common,
        )  # fmt: skip
        self.core_attention = DotProductAttention(
            num_attention_heads, head, num_gqa_groups=groups, attention_dropout=attention_dropout, qkv_format=qkv_format
        )
        self.proj = Linear(rows["query"], hidden_size, init_method=output_layer_init_method, return_bias=return_bias,
                           **common)  # fmt: skip

    def _heads(self, mixed: torch.Tensor):
        """Split (.., .., rows) into queries (.., .., heads, d), keys and values (.., .., groups, d)."""
        head, groups = self.hidden_size_per_attention_head, self.num_gqa_groups
        each = self.num_attention_heads // groups
        if self.qkv_weight_interleaved:
            parts = mixed.unflatten(-1, (groups, each + 2, head)).split((each, 1, 1), dim=-2)
            return [part.flatten(2, 3) for part in parts]
        return mixed.unflatten(-1, (-1, head)).split((groups * each, groups, groups), dim=-2)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, *, attn_mask_type: str | None = None,
                is_first_microbatch: bool | None = None, checkpoint_core_attention: bool = False, rotary_pos_emb=None,
                **unused):  # fmt: skip
        """Attend to the sequence itself.

        Args:
            hidden_states: (s, b, hidden_size), or (b, s, hidden_size) for "bshd".
            rotary_pos_emb: what :class:`RotaryPositionEmbedding` returned, or a pair (of queries, of keys).

        Returns:
            The shape of ``hidden_states``; with return_bias a tuple (output, bias).
        """
        _check_unused(type(self).__name__, unused)
        q, k, v = self._heads(self.layernorm_qkv(hidden_states, is_first_microbatch=is_first_microbatch))
        if rotary_pos_emb is not None:
            angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
            q, k = (apply_rotary_pos_emb(t, a, self.qkv_format, interleaved=self.rotary_pos_interleaved, fused=True)
                    for t, a in zip((q, k), angles, strict=True))  # fmt: skip
        out = self.core_attention(q, k, v, attention_mask=attention_mask, qkv_format=self.qkv_format,
                                  attn_mask_type=attn_mask_type or self.attn_mask_type,
                                  checkpoint_core_attention=checkpoint_core_attention)  # fmt: skip
        return self.proj(out, is_first_microbatch=is_first_microbatch)


class TransformerLayer(nn.Module):
    """A transformer's layer: attention and MLP, each with its norm before it and a residual around it.

    With normalization="RMSNorm", activation="swiglu", bias=False and both dropouts 0 it is a Llama's layer, and
    these are the weights of a ``LlamaDecoderLayer`` in it::

        self_attention.layernorm_qkv.layer_norm_weight    input_layernorm.weight
        self_attention.layernorm_qkv.query_weight         self_attn.q_proj.weight          (key, value likewise)
        self_attention.proj.weight                        self_attn.o_proj.weight
        layernorm_mlp.layer_norm_weight                   post_attention_layernorm.weight
        layernorm_mlp.fc1_weight                          cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        layernorm_mlp.fc2_weight                          mlp.down_proj.weight

    Args:
        hidden_size, ffn_hidden_size: multiples of 16.
        num_attention_heads: query heads; num_gqa_groups: key and value heads, as many if None.
        layernorm_epsilon: of both norms.
        hidden_dropout: before each residual, in training.  0.1 by default, as in the real one: set 0 for a Llama.
        attention_dropout: as for :class:`DotProductAttention`; 0.1, too.
        init_method: fills the query, key, value and fc1 weights; output_layer_init_method: proj and fc2.
        kv_channels: head size, hidden_size / num_attention_heads if None.
        self_attn_mask_type: "causal", "no_mask", "causal_bottom_right" or "arbitrary".
        params_dtype, device: of the parameters.
        fuse_qkv_params, qkv_weight_interleaved, rotary_pos_interleaved: see :class:`MultiheadAttention`.
        zero_centered_gamma: see :class:`RMSNorm`.
        bias, activation: see :class:`LayerNormMLP`; normalization: "LayerNorm" or "RMSNorm".
        attn_input_format: "sbhd" (sequence first) or "bshd" (batch first, as in Hugging Face models).

    Raises:
        NotImplementedError: arguments that need several GPUs or are not emulated (decoder, parallel attention and
            MLP, norms of queries and keys, sliding windows, softcap, ...).
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int,
                 num_gqa_groups: int | None = None, layernorm_epsilon: float = 1e-5, hidden_dropout: float = 0.1,
                 attention_dropout: float = 0.1, init_method: Callable | None = None,
                 output_layer_init_method: Callable | None = None, layer_number: int | None = None,
                 kv_channels: int | None = None, self_attn_mask_type: str = "causal", *,
                 params_dtype: torch.dtype | None = None, fuse_qkv_params: bool = False,
                 rotary_pos_interleaved: bool = False, zero_centered_gamma: bool = False,
                 qkv_weight_interleaved: bool = True, bias: bool = True, activation: str = "gelu",
                 normalization: str = "LayerNorm", device=None, attn_input_format: str = "sbhd",
                 name: str | None = None, **unused):  # fmt: skip
        super().__init__()
        _check_unused(type(self).__name__, unused)
        self.layer_number, self.hidden_dropout = layer_number, hidden_dropout
        self.self_attn_mask_type = self_attn_mask_type
        common = dict(bias=bias, return_bias=True, params_dtype=params_dtype, normalization=normalization,
                      device=device, zero_centered_gamma=zero_centered_gamma, init_method=init_method,
                      output_layer_init_method=output_layer_init_method)  # fmt: skip
        self.self_attention = MultiheadAttention(
            hidden_size, num_attention_heads, kv_channels, attention_dropout, layernorm_epsilon,
            num_gqa_groups=num_gqa_groups, input_layernorm=True, fuse_qkv_params=fuse_qkv_params,
            qkv_weight_interleaved=qkv_weight_interleaved, rotary_pos_interleaved=rotary_pos_interleaved,
            qkv_format=attn_input_format, **common,
        )  # fmt: skip
        self.layernorm_mlp = LayerNormMLP(hidden_size, ffn_hidden_size, eps=layernorm_epsilon, activation=activation,
                                          **common)  # fmt: skip

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, self_attn_mask_type: str | None = None, *,
                is_first_microbatch: bool | None = None, checkpoint_core_attention: bool = False, rotary_pos_emb=None,
                **unused) -> torch.Tensor:  # fmt: skip
        """Apply the layer.

        Args:
            hidden_states: (s, b, hidden_size), or (b, s, hidden_size) for "bshd".
            attention_mask, self_attn_mask_type: see :class:`DotProductAttention`.
            is_first_microbatch: as for ``Linear``.
            rotary_pos_emb: what :class:`RotaryPositionEmbedding` returned.

        Returns:
            The shape of ``hidden_states``, in the dtype of the activations, residuals included.
        """
        _check_unused(type(self).__name__, unused)
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        attention = self.self_attention(hidden_states, attention_mask, attn_mask_type=self_attn_mask_type
                                        or self.self_attn_mask_type, is_first_microbatch=is_first_microbatch,
                                        checkpoint_core_attention=checkpoint_core_attention,
                                        rotary_pos_emb=rotary_pos_emb)  # fmt: skip
        hidden_states = self._add(*attention, hidden_states)
        return self._add(*self.layernorm_mlp(hidden_states, is_first_microbatch=is_first_microbatch), hidden_states)

    def _add(self, out, bias, residual):
        if bias.numel():
            out = out + bias
        return residual + F.dropout(out, self.hidden_dropout, self.training)


# --------------------------------------------------------------------------------------------- FP8 parameters
@contextmanager
def quantized_model_init(enabled: bool = True, recipe: Recipe | None = None,
                         preserve_high_precision_init_val: bool = False):  # fmt: skip
    """Modules made inside keep their weights in FP8 only.

    The weights are ``Float8Tensor`` parameters: one byte a value and a scale.  They go into the FP8 products as they
    are; an optimizer's update in place is computed in high precision and rounded to FP8 again.

    Args:
        enabled: False makes ordinary parameters.
        recipe: how to quantize; use the same kind in ``autocast``.  Under delayed scaling a new weight is rounded with
            scale 1, because nothing is known of it yet; the first update after a forward pass repairs that.
        preserve_high_precision_init_val: keep each weight's value from before rounding on the CPU, for the optimizer's
            master weights: ``weight.get_high_precision_init_val()``, then ``weight.clear_high_precision_init_val()``.

    Raises:
        NotImplementedError: when a module is made under a recipe other than delayed or current scaling.
    """
    saved = _Region.fp8_parameters, _Region.parameter_recipe, _Region.keep_initial
    _Region.fp8_parameters, _Region.parameter_recipe = enabled, recipe or get_default_recipe()
    _Region.keep_initial = preserve_high_precision_init_val
    try:
        yield
    finally:
        _Region.fp8_parameters, _Region.parameter_recipe, _Region.keep_initial = saved


def fp8_model_init(enabled: bool = True, recipe: Recipe | None = None,
                   preserve_high_precision_init_val: bool = False):  # fmt: skip
    """Former name of :func:`quantized_model_init`, still there and deprecated in Transformer Engine 2.20."""
    warnings.warn("fp8_model_init is deprecated: use quantized_model_init(...)", DeprecationWarning, stacklevel=2)
    return quantized_model_init(enabled, recipe, preserve_high_precision_init_val)
