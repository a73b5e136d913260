"""Transformer layers whose matrix products run in FP8.

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

Sources: Transformer Engine 2.20 (pytorch/module, pytorch/transformer.py, common/normalization, common/activation);
RMSNorm, arXiv:1910.07467; GLU variants, arXiv:2002.05202; RoFormer, arXiv:2104.09864; GQA, arXiv:2305.13245.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .modules import FP8Module, Linear, check_unused
from .regions import Region


class _Fused(torch.autograd.Function):
    """``function(*tensors)``, of which the backward pass keeps the tensors only, as fused kernels do."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx, grad):
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            result = ctx.function(*tensors)
        return None, *torch.autograd.grad(result, tensors, grad)


def _norm(x, gamma, beta, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """RMSNorm or, with beta, LayerNorm over the last size, in FP32; its rounding comes later.

    RMSNorm:  y = x / sqrt(mean(x^2) + eps) * gamma         LayerNorm: the same of x - mean(x), plus beta
    """

    def function(*tensors):  # parameters are rounded to the activations' dtype, as in any module under torch.autocast
        x, gamma, *beta = (t.to(dtype).float() for t in tensors)
        norm = F.layer_norm if beta else F.rms_norm
        return norm(x, gamma.shape, gamma, *beta, eps=eps)

    return _Fused.apply(function, x, gamma, *([] if beta is None else [beta]))


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last size, ``normalized_shape``, computed in FP32."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, device=None, dtype=None, **unused):
        super().__init__()
        check_unused(self, unused)
        self.eps, options = eps, dict(device=device, dtype=dtype or torch.get_default_dtype())
        self.weight = nn.Parameter(torch.ones(normalized_shape, **options))
        self.bias = nn.Parameter(torch.zeros(normalized_shape, **options)) if isinstance(self, LayerNorm) else None

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """Normalize (..., normalized_shape); the result has the dtype of torch.autocast, or else of the weight."""
        device = inp.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return _norm(inp, self.weight, self.bias, self.eps, dtype).to(dtype)


class LayerNorm(RMSNorm):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last size, computed in FP32."""


class _NormedModule(FP8Module):
    """A module with a norm in front of its first product: layer_norm_weight and, for LayerNorm, layer_norm_bias."""

    def __init__(self, size: int, eps: float, normalization: str, params_dtype, device):
        super().__init__()
        options = dict(device=device, dtype=params_dtype or torch.get_default_dtype())
        assert normalization in ("LayerNorm", "RMSNorm"), "Unsupported normalization type!"
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = nn.Parameter(torch.ones(size, **options))
        beta = torch.zeros(size, **options)
        self.layer_norm_bias = nn.Parameter(beta) if normalization == "LayerNorm" else None

    def rounds_once(self) -> bool:
        """Whether norms and activations go to FP8 directly: under delayed scaling, whose scale is known beforehand."""
        return self.fp8 and self.fp8_meta["recipe"].delayed()

    def normalized(self, inp: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The norm's result: FP32 where quantization is fused with it, else rounded to ``dtype``."""
        out = _norm(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps, dtype)
        return out if self.rounds_once() else out.to(dtype)


class LayerNormLinear(_NormedModule):
    """Norm ("LayerNorm" or "RMSNorm"), then linear map: ``norm(x) @ weight.T + bias``; arguments as ``Linear``.

    ``parameters_split``: name -> rows of the parameters ``<name>_weight`` and ``<name>_bias`` that the
    weight is kept in; it is one matrix, with one scale, in the product.  Not with :func:`quantized_model_init`: one
    scale cannot serve several parameters.
    """

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-5, *, init_method: Callable | None = None,
                 bias: bool = True, normalization: str = "LayerNorm", return_bias: bool = False,
                 params_dtype: torch.dtype | None = None, parameters_split=None, device=None, **unused):  # fmt: skip
        super().__init__(in_features, eps, normalization, params_dtype, device)
        check_unused(self, unused)
        self.in_features, self.out_features, self.return_bias = in_features, out_features, return_bias
        split = {f"{name.rstrip('_')}_": rows for name, rows in (parameters_split or {}).items()} or {"": out_features}
        if sum(split.values()) != out_features:
            raise ValueError(f"Trying to split weight buffer ({out_features=}) with split sizes {list(split.values())}")
        if len(split) > 1 and Region.parameter_recipe is not None:
            raise RuntimeError("Splitting QuantizedTensor into multiple params is not supported")
        self.parts = list(split)
        weights = {part: ((rows, in_features), init_method) for part, rows in split.items()}
        self.add_weights(weights, bias=bias, params_dtype=params_dtype, device=device)

    def _joined(self, kind: str) -> torch.Tensor:
        tensors = [getattr(self, f"{part}{kind}") for part in self.parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None):
        """Apply norm and product to ``inp`` (..., in_features); the rest as for ``Linear``."""
        dtype = self.activation_dtype(inp, self.in_features)
        self.prepare_fp8()
        return self.last_product(0, self.normalized(inp, dtype), self._joined("weight"), self._joined("bias"), dtype,
                                 is_first_microbatch)  # fmt: skip


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x.float(), approximate="tanh")


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, -1)
    return F.silu(gate) * up


_ACTIVATIONS = {"gelu": _gelu, "swiglu": _swiglu}  # in FP32 whatever comes in; the result is FP32


class LayerNormMLP(_NormedModule):
    """Norm, linear map, activation, linear map: ``act(norm(x) @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias``.

    ``activation``: "gelu" or "swiglu".  SwiGLU takes two halves from fc1, silu(first half) * second half, so that for a
    Llama ``fc1_weight = cat([gate_proj, up_proj])``.  ``return_bias`` returns fc2's bias, too.

    Columns of the forward state in ``fp8_meta``: fc1's input, weight, output, then fc2's; of the backward state: the
    gradients of fc1's output and input, then fc2's.
    """

    products = 2

    def __init__(self, hidden_size: int, ffn_hidden_size: int, eps: float = 1e-5, *, return_bias: bool = False,
                 init_method: Callable | None = None, bias: bool = True, normalization: str = "LayerNorm",
                 activation: str = "gelu", output_layer_init_method: Callable | None = None,
                 params_dtype: torch.dtype | None = None, device=None, **unused):  # fmt: skip
        super().__init__(hidden_size, eps, normalization, params_dtype, device)
        check_unused(self, unused)
        if activation not in _ACTIVATIONS:
            raise NotImplementedError(f"LayerNormMLP({activation=}) is not emulated: use 'gelu' or 'swiglu'.")
        self.hidden_size, self.activation, self.return_bias = hidden_size, activation, return_bias
        rows = 2 * ffn_hidden_size if activation == "swiglu" else ffn_hidden_size
        self.add_weights({"fc1_": ((rows, hidden_size), init_method)},
                         {"fc2_": ((hidden_size, ffn_hidden_size), output_layer_init_method)},
                         bias=bias, params_dtype=params_dtype, device=device)  # fmt: skip

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None):
        """Apply the block to ``inp`` (..., hidden_size); the rest as for ``Linear``."""
        dtype = self.activation_dtype(inp, self.hidden_size)
        self.prepare_fp8()
        fused, amax = self.rounds_once(), None
        # The gradient of a plain activation is rounded to FP8 in the same kernel, that of a gated one is not.
        hidden = self.product(0, self.normalized(inp, dtype), self.fc1_weight, self.fc1_bias, dtype,
                              is_first_microbatch, wide=fused and self.activation == "gelu")  # fmt: skip
        act = _Fused.apply(_ACTIVATIONS[self.activation], hidden)
        if not fused:
            if self.fp8 and dtype != torch.float32 and self.fp8_meta["recipe"].float8_current_scaling():
                amax = act.detach().abs().amax().item()  # the kernel looks before it rounds
            act = act.to(dtype)
        return self.last_product(1, act, self.fc2_weight, self.fc2_bias, dtype, is_first_microbatch, amax=amax)


class RotaryPositionEmbedding(nn.Module):
    """Angles of the rotary position embedding, whose pairs are the two halves of a head, as in a Llama.

    ``dim`` is the head size, ``rotary_base`` the base of the geometric series of frequencies.
    """

    def __init__(self, dim: int, *, rotary_base: float = 10000.0, **unused):
        super().__init__()
        check_unused(self, unused)
        self.register_buffer("inv_freq", 1.0 / (rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)))

    def forward(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Return the angles of positions offset .. offset + max_seq_len, float32 (max_seq_len, 1, 1, dim)."""
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
        angles = positions[:, None] * self.inv_freq
        return torch.cat((angles, angles), -1)[:, None, None]


def _rotated(t: torch.Tensor, freqs: torch.Tensor, layout: str) -> torch.Tensor:
    """Turn queries or keys (s, b, h, d), or for "bshd" (b, s, h, d), by their positions; FP32, rounded once."""
    length = t.shape[0] if layout == "sbhd" else t.shape[1]
    if length > len(freqs):
        raise ValueError(f"The rotary embedding covers {len(freqs)} positions and the sequence has {length}: ask it "
                         "for a larger max_seq_len.")  # fmt: skip
    angles = freqs[:length, ..., : freqs.shape[-1] // 2].float()
    angles = angles.transpose(0, 1) if layout == "bshd" else angles
    (a, b), cos, sin = t.float().chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(t.dtype)


class DotProductAttention(FP8Module):
    """softmax(q k^T / sqrt(d)) v, not in FP8.

    ``num_gqa_groups``: key and value heads, which query heads share in equal, consecutive groups.  ``qkv_format``:
    "sbhd" (sequence, batch, head, size) or "bshd".  ``attn_mask_type``: "causal" or "no_mask".
    """

    products = 3  # columns of state for FP8 attention, which stay unused, as in the real one without fp8_dpa

    def __init__(self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None,
                 attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
                 **unused):  # fmt: skip
        super().__init__()
        check_unused(self, unused)
        if qkv_format not in ("sbhd", "bshd") or attn_mask_type not in ("causal", "no_mask"):
            raise NotImplementedError(f"DotProductAttention({qkv_format=}, {attn_mask_type=}) is not emulated: use "
                                      "'sbhd' or 'bshd', 'causal' or 'no_mask'.")  # fmt: skip
        if num_attention_heads % (num_gqa_groups or 1):
            raise AssertionError("The number of attention heads must be divisible by the number of GQA groups!")
        self.attention_dropout, self.qkv_format, self.attn_mask_type = attention_dropout, qkv_format, attn_mask_type

    def forward(self, query_layer, key_layer, value_layer):
        """Attend: (s, b, heads, d) to (s, b, heads * d), or (b, s, heads, d) to (b, s, heads * d)."""
        self.prepare_fp8()
        first = self.qkv_format == "sbhd"
        q, k, v = (t.permute((1, 2, 0, 3) if first else (0, 2, 1, 3)) for t in (query_layer, key_layer, value_layer))
        dropout, causal = self.attention_dropout if self.training else 0.0, self.attn_mask_type == "causal"
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal,
                                             enable_gqa=k.shape[1] != q.shape[1])  # fmt: skip
        return out.permute((2, 0, 1, 3) if first else (0, 2, 1, 3)).flatten(2)


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

    ``num_gqa_groups``: key and value heads, as many as query heads if None.  ``init_method`` fills the query, key,
    value and fc1 weights, ``output_layer_init_method`` those of proj and fc2.  ``fuse_qkv_params``: one parameter
    ``layernorm_qkv.weight`` instead of three, which :func:`quantized_model_init` requires; its rows go group by group:
    query heads of a group, its key head, its value head.  ``attn_input_format``: "sbhd" (sequence first) or "bshd"
    (batch first, as in Hugging Face models).
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int,
                 num_gqa_groups: int | None = None, layernorm_epsilon: float = 1e-5, hidden_dropout: float = 0.1,
                 attention_dropout: float = 0.1, init_method: Callable | None = None,
                 output_layer_init_method: Callable | None = None, *, kv_channels: int | None = None,
                 self_attn_mask_type: str = "causal",
                 params_dtype: torch.dtype | None = None, fuse_qkv_params: bool = False, bias: bool = True,
                 activation: str = "gelu", normalization: str = "LayerNorm", device=None,
                 attn_input_format: str = "sbhd", **unused):  # fmt: skip
        super().__init__()
        check_unused(self, unused)
        heads, groups = num_attention_heads, num_gqa_groups or num_attention_heads
        head = kv_channels or hidden_size // heads
        self.heads, self.groups, self.head, self.fused = heads, groups, head, fuse_qkv_params
        self.hidden_dropout, self.layout = hidden_dropout, attn_input_format
        common = dict(bias=bias, params_dtype=params_dtype, device=device)
        norm = dict(eps=layernorm_epsilon, normalization=normalization)
        rows = dict(query=head * heads, key=head * groups, value=head * groups)
        core = DotProductAttention(heads, head, groups, attention_dropout, attn_input_format,
                                   self_attn_mask_type)  # fmt: skip
        qkv = LayerNormLinear(hidden_size, sum(rows.values()), init_method=init_method,
                              parameters_split=None if fuse_qkv_params else rows, **norm, **common)  # fmt: skip
        proj = Linear(rows["query"], hidden_size, init_method=output_layer_init_method, return_bias=True, **common)
        self.self_attention = nn.ModuleDict(dict(layernorm_qkv=qkv, core_attention=core, proj=proj))
        self.layernorm_mlp = LayerNormMLP(
            hidden_size, ffn_hidden_size, activation=activation, return_bias=True, init_method=init_method,
            output_layer_init_method=output_layer_init_method, **norm, **common,
        )  # fmt: skip

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, *, is_first_microbatch: bool | None = None,
                rotary_pos_emb: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """Apply the layer to ``hidden_states`` (s, b, hidden_size), or (b, s, hidden_size) for "bshd".

        ``rotary_pos_emb``: from :class:`RotaryPositionEmbedding`.  A causal layer ignores ``attention_mask``, as there.
        """
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        part = self.self_attention
        q, k, v = self._heads(part.layernorm_qkv(hidden_states, is_first_microbatch))
        if rotary_pos_emb is not None:
            q, k = (_rotated(t, rotary_pos_emb, self.layout) for t in (q, k))
        out = part.core_attention(q, k, v)
        hidden_states = self._add(*part.proj(out, is_first_microbatch), hidden_states)
        return self._add(*self.layernorm_mlp(hidden_states, is_first_microbatch), hidden_states)

    def _heads(self, mixed: torch.Tensor):
        """Split (.., .., rows) into queries (.., .., heads, d), keys and values (.., .., groups, d)."""
        if self.fused:
            each = self.heads // self.groups
            parts = mixed.unflatten(-1, (self.groups, each + 2, self.head)).split((each, 1, 1), dim=-2)
            return [part.flatten(2, 3) for part in parts]
        return mixed.unflatten(-1, (-1, self.head)).split((self.heads, self.groups, self.groups), dim=-2)

    def _add(self, out, bias, residual):
        if bias.numel():
            out = out + bias
        return residual + F.dropout(out, self.hidden_dropout, self.training)
