"""Decoder layers in BF16 and FP8, one change at a time: how they are built, and what a training step of them takes.

Every figure comes from whole forward and backward passes of layers with the shapes of published models, on random
data: zeros switch no transistors, so that a GPU draws less power on them and clocks higher.  A *rung* is one way to
run the same layers; rungs are ordered so that each changes one thing.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import nn

from .. import QtutorError, te_switch
from ..decide import capacity

LAYERS = 2  # more than one, so that a layer's end overlaps with the next one's beginning as in a model


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama decoder layer, and of the batch it is measured with."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def weights(self) -> int:
        """Weights of the matrices of one layer: q, k, v, o and the three of the MLP."""
        kv = self.kv_heads * self.hidden // self.heads
        return self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)

    def flop(self, layers: int = LAYERS) -> float:
        """Floating-point operations of a forward and a backward pass.

        A weight takes part in one multiply-add a token forward and in two backward: 6 operations.  Causal attention
        computes half of the (sequence x sequence) scores, and as much again for the values: 2 * tokens * sequence *
        hidden, and twice that backward.
        """
        return layers * (6 * self.tokens * self.weights + 6 * self.tokens * self.sequence * self.hidden)


SIZES = "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"
SHAPES = {name: Shape(name, *(capacity.MODELS[name][size] for size in SIZES), batch, sequence) for name, batch, sequence
          in (("Llama-2-7B", 8, 2048), ("Llama-3-8B", 8, 2048), ("Llama-2-70B", 4, 4096))}  # fmt: skip


def require_fp8():
    """Return transformer_engine.pytorch, the real one; raises QtutorError where it does not run FP8."""
    status = te_switch.activate()
    if not status.real:
        raise QtutorError(f"These measurements need a GPU with FP8 units, and {status.reason}: look at the recorded "
                          "results instead (qtutor.results.load).")  # fmt: skip
    import transformer_engine.pytorch as te

    return te


def free() -> None:
    """Give back the GPU memory that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        # cuBLAS keeps a work space for each stream, which would count as the next model's memory
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()


def huggingface_layers(shape: Shape, compiled: bool = False):
    """Decoder layers of transformers' Llama in BF16 and their call ``f(x)``; x: (batch, sequence, hidden)."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    sizes = dict(hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
                 num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.sequence)  # fmt: skip
    config = LlamaConfig(**sizes, attn_implementation="sdpa")
    with torch.device("cuda"):
        stack = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(LAYERS)).to(torch.bfloat16)
        cos_sin = LlamaRotaryEmbedding(config)(torch.empty(1, dtype=torch.bfloat16), torch.arange(shape.sequence)[None])
    for layer in stack if compiled else ():
        layer.compile()

    def forward(x):
        for layer in stack:
            x = layer(x, position_embeddings=cos_sin, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x  # a tuple in older versions of transformers
        return x

    return stack, forward


def te_layers(shape: Shape, layers: int = LAYERS, recipe: str | None = None, fp8_weights=False, graph=False,
              checkpointing=False, **options):  # fmt: skip
    """The same layers as te.TransformerLayer, in BF16 or (with a ``recipe``) FP8; ``graph``: replayed from CUDA graphs,
    which launch all kernels of a pass at once; ``checkpointing``: each layer keeps its input only and computes the rest
    again in the backward pass; ``options`` are those of :func:`recipe_of`."""
    import transformer_engine.pytorch as te

    fp8 = {"enabled": recipe is not None, "recipe": recipe_of(recipe, **options)}
    rope = te.RotaryPositionEmbedding(shape.hidden // shape.heads)(max_seq_len=shape.sequence).to("cuda")

    class Stack(nn.ModuleList):
        def forward(self, x):
            for layer in self:
                x = (te.checkpoint(layer, x, rotary_pos_emb=rope) if checkpointing
                     else layer(x, rotary_pos_emb=rope))  # fmt: skip
            return x

    with te.quantized_model_init(enabled=fp8_weights, recipe=fp8["recipe"]):
        stack = call = Stack(te.TransformerLayer(
            shape.hidden, shape.intermediate, shape.heads, num_gqa_groups=shape.kv_heads, bias=False,
            normalization="RMSNorm", activation="swiglu", attn_input_format="bshd", self_attn_mask_type="causal",
            hidden_dropout=0.0, attention_dropout=0.0, fuse_qkv_params=True, params_dtype=torch.bfloat16,
            device="cuda") for _ in range(layers))  # fmt: skip
    if graph:
        call = te.make_graphed_callables(stack, (random_batch(shape).requires_grad_(),), **fp8)

    def forward(x):
        with te.autocast(**fp8):
            return call(x)

    return stack, forward


def random_batch(shape: Shape):
    """Inputs for a timed step: random, because zeros are faster and cooler."""
    return torch.randn(shape.batch, shape.sequence, shape.hidden, device="cuda", dtype=torch.bfloat16)


def training_step(shape: Shape, stack, forward):
    """Return ``step()``: one forward and backward pass of ``forward`` on random data."""
    x, dy, parameters = random_batch(shape).requires_grad_(), random_batch(shape) * 1e-3, list(stack.parameters())

    def step():
        for p in (x, *parameters):
            p.grad = None
        forward(x).backward(dy)

    return step


DELAYED = {"recipe": "delayed"}
STORED = DELAYED | {"fp8_weights": True}
RUNGS = {  # each changes one thing of the rung before; the arguments of huggingface_layers, with "recipe" of te_layers
    "Hugging Face BF16": {},
    "Hugging Face BF16, compiled": {"compiled": True},
    "TE BF16": {"recipe": None},
    "TE FP8 current": {"recipe": "current"},
    "TE FP8 delayed": DELAYED,
    "TE FP8 delayed + FP8 weights": STORED,
    "TE FP8 delayed + FP8 weights + fast accumulation": STORED | {"fast_accumulation": True},
}
BRANCHES = {  # name: (the rung that it changes, the arguments)
    "TE FP8 block": ("TE FP8 delayed", {"recipe": "block"}),
    "TE FP8 delayed + FP8 weights + FP8 attention": ("TE FP8 delayed + FP8 weights", STORED | {"fp8_attention": True}),
    "TE FP8 delayed + FP8 weights + CUDA graph": ("TE FP8 delayed + FP8 weights", STORED | {"graph": True}),
    "TE BF16 + CUDA graph": ("TE BF16", {"recipe": None, "graph": True}),
}


def recipe_of(name: str | None, fp8_attention: bool = False, fast_accumulation: bool = False):
    """A recipe by its short name: "delayed", "current" or "block"; None for None.

    ``fast_accumulation``: the products of the gradients, too, sum in the tensor core's short accumulator.  It is set on
    the finished recipe: DelayedScaling has no such argument, ignores it without a word, and obeys the attribute.
    """
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, MMParams

    if name is None:
        return None
    kinds = {"delayed": DelayedScaling, "current": Float8CurrentScaling, "block": Float8BlockScaling}
    recipe = kinds[name](**({"fp8_dpa": True} if fp8_attention else {}))
    for product in ("fp8_gemm_dgrad", "fp8_gemm_wgrad") if fast_accumulation else ():
        setattr(recipe, product, MMParams(use_split_accumulator=False))
    return recipe


def build(shape: Shape, rung: str):
    """Build the layers of a rung; return (module, ``step()``), where a step is one forward and backward pass."""
    torch.manual_seed(0)
    how = RUNGS[rung] if rung in RUNGS else BRANCHES[rung][1]
    stack, forward = te_layers(shape, **how) if "recipe" in how else huggingface_layers(shape, **how)
    return stack, training_step(shape, stack, forward)
