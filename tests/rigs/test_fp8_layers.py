"""fp8_layers, as far as no GPU is needed: arithmetic, the rungs, the refusal."""

import itertools

import torch

from qtutor.rigs import fp8_layers


def test_shapes_are_those_of_the_published_models():
    """Whole models, from the layer's weights, embedding, head and norms: the published parameter counts."""
    published = {"Llama-2-7B": (32, 32000, 6_738_415_616), "Llama-3-8B": (32, 128256, 8_030_261_248),
                 "Llama-2-70B": (80, 32000, 68_976_648_192)}  # fmt: skip
    for name, (layers, vocabulary, count) in published.items():
        shape = fp8_layers.SHAPES[name]
        norms = (2 * layers + 1) * shape.hidden
        assert layers * shape.weights + 2 * vocabulary * shape.hidden + norms == count


def test_flop_count_agrees_with_pytorchs_counter():
    """PyTorch counts the products of a forward and backward pass; its attention counts the whole square, ours half."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    shape = fp8_layers.Shape("tiny", 64, 176, 4, 2, 2, 48)
    config = LlamaConfig(hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2,
                         attn_implementation="eager")  # fmt: skip
    layer = LlamaDecoderLayer(config, 0)
    x = torch.randn(2, 48, 64, requires_grad=True)
    cos_sin = LlamaRotaryEmbedding(config)(x, torch.arange(48)[None])
    with FlopCounterMode(display=False) as counter:
        out = layer(x, position_embeddings=cos_sin, attention_mask=None)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    attention = 6 * shape.tokens * shape.sequence * shape.hidden
    rotary = counter.get_total_flops() - (shape.flop(1) + attention)
    assert rotary == 0


def changed(one: dict, other: dict) -> int:
    return sum(one.get(key) != other.get(key) for key in {*one, *other})


def test_each_rung_changes_one_thing_of_the_rung_before():
    rungs = list(fp8_layers.RUNGS.values())
    assert {changed(a, b) for a, b in itertools.pairwise(rungs[2:])} == {1}
    assert changed(rungs[0], rungs[1]) == 1 and "recipe" not in rungs[1]  # then the library changes
    for base, how in fp8_layers.BRANCHES.values():
        assert changed(fp8_layers.RUNGS[base], how) == 1
