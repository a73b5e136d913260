"""A Llama whose calls a CUDA graph can hold: its layers called one by one, with a KV cache of fixed length.

What transformers does around the layers (choosing masks, growing caches) looks at values on the CPU, and a CUDA graph
cannot contain that.  Training and inference of the same model are measured with these calls, so that the figure is
the GPU's time and not Python's.
"""

from __future__ import annotations


def llama_logits(model, ids, cache=None, last_only: bool = False):
    """Return the logits (batch, tokens or 1, vocabulary) of a LlamaForCausalLM for ``ids`` (batch, tokens).

    ``cache``: a :class:`FixedCache`; then ``ids`` (batch, 1) is the token at its end.  ``last_only``: of the last
    token alone, as generation needs it.
    """
    import torch

    body = model.model
    x = body.embed_tokens(ids)
    first = 0 if cache is None else cache.length - ids.shape[1]
    positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    cos_sin = body.rotary_emb(x, positions)
    for layer, past in zip(body.layers, [None] * len(body.layers) if cache is None else cache.layers, strict=True):
        x = layer(x, attention_mask=None, position_embeddings=cos_sin, past_key_values=past, use_cache=past is not None)
        x = x[0] if isinstance(x, tuple) else x  # a tuple in older versions of transformers
    return model.lm_head(body.norm(x[:, -1:] if last_only else x))


def compile_layers(model) -> None:
    """torch.compile each decoder layer of a LlamaForCausalLM, in place: compiled once, since all look alike, and
    without the search of kernel sizes that torchao switches on, which takes minutes for each shape."""
    import torch
    import torch._inductor.config as inductor

    inductor.coordinate_descent_tuning = False
    # whose patterns in torch 2.11 map INT8 weights onto a kernel that takes twice as long as no compiling
    inductor.pattern_matcher = not any("Int8Tensor" in type(layer.weight).__name__ for layer in model.modules()
                                       if isinstance(layer, torch.nn.Linear))  # fmt: skip
    torch.compiler.reset()  # after eight versions of a function, of other models too, torch runs it uncompiled
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0  # FixedCache needs no number, and torch.compile would compile for each
        layer.compile(dynamic=False)


class FixedCache:
    """Keys and values of ``length`` tokens, random but for the last one: what one decoding step reads.  Each of
    ``layers`` has the one method of transformers' caches that an attention layer calls."""

    def __init__(self, config, batch: int, length: int, device, dtype):
        import torch

        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = (batch, config.num_key_value_heads, length, dim)
        self.length = length
        self.layers = [_LayerCache(*(torch.randn(size, device=device, dtype=dtype) for _ in range(2)))
                       for _ in range(config.num_hidden_layers)]  # fmt: skip


class _LayerCache:
    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def update(self, keys, values, *_, **__):
        n = keys.shape[2]
        self.keys[:, :, -n:], self.values[:, :, -n:] = keys, values
        return self.keys, self.values
