"""Decoder layers in BF16 and FP8, one change at a time: how they are built, and what a training step of them takes.

Every figure comes from whole forward and backward passes of layers with the shapes of published models, on random
data: zeros switch no transistors, so that a GPU draws less power on them and clocks higher.  A *rung* is one way to
run the same layers; rungs are ordered so that each changes one thing.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .. import QtutorError, energy, measure, te_switch
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


def timed(step, seconds: float = 1.5, warmup: int = 3) -> dict:
    """Time ``step()`` for about ``seconds``: ms_per_step with percentiles, repeats, joules_per_step and the interval
    that the counter's resolution leaves, watts and clock.  The steps run back to back, so that the power limit acts as
    it does in training."""
    timing, used = energy.timed(step, warmup=warmup, repeats=5, seconds=seconds, device="cuda")
    board, n, joules = energy.board("cuda"), timing.n, used.per(timing.n)
    row = {"ms_per_step": timing.median_ms, "ms_p10": timing.p10, "ms_p90": timing.p90, "repeats": n,
           "mhz": board and board.mhz(), "joules_per_step": joules, "watts": used.per(used.seconds)}  # fmt: skip
    if joules is not None:
        row |= {f"joules_per_step_{end}": joules * (1 + sign * used.relative_error)
                for end, sign in (("low", -1), ("high", 1))}  # fmt: skip
    return {key: round(value, 4) for key, value in row.items() if value is not None}


def peaks(seconds: float = 1.0, size: int = 8192) -> dict:
    """Measured peak of the matrix units, in TFLOP/s, of one large product of random data: {"BF16": ..., "FP8": ...}."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    one, (a8, b8) = torch.ones((), device="cuda"), (t.to(torch.float8_e4m3fn) for t in (a, b))
    work = {"BF16": lambda: a @ b.t(), "FP8": lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16,
                                                                       use_fast_accum=True)}  # fmt: skip
    return {name: round(2 * size**3 / timed(product, seconds, 10)["ms_per_step"] / 1e9, 1)
            for name, product in work.items()}  # fmt: skip


def measure_rung(shape: Shape, rung: str, seconds: float) -> dict:
    """Build a rung, time it, and return its row; ``peak_gib`` counts all that the rung allocates."""
    require_fp8()
    free()
    before = torch.cuda.memory_allocated() / measure.GIB
    with measure.track_memory("cuda") as memory:
        stack, step = build(shape, rung)
        weights = torch.cuda.memory_allocated() / measure.GIB - before
        for _ in range(3):
            step()
    sizes = asdict(shape)
    row = {"shape": sizes.pop("name"), **sizes, "layers": LAYERS, "tokens": shape.tokens, "rung": rung,
           **timed(step, seconds), "peak_gib": round(memory.peak - before, 3)}  # fmt: skip
    if "graph" not in rung:  # a graph's memory is taken when it is recorded, with the weights
        row["weights_gib"] = round(weights, 3)
    del stack, step
    free()
    return row


def ladder(shapes=("Llama-2-7B", "Llama-2-70B"), rungs=(*RUNGS, *BRANCHES, "TE BF16"), seconds: float = 10.0) -> list:
    """Rows of ``fp8_layers``: every rung for every shape (names), on a GPU that is warm from the first on.  A rung that
    comes twice, "TE BF16 (again)", shows how far the figures drift within one recording."""
    from tqdm.auto import tqdm

    require_fp8()
    peak, rows = peaks(seconds), []  # which also warms the GPU up: a cold one clocks higher
    for name, rung in tqdm([(name, rung) for name in shapes for rung in rungs], desc="ladder", leave=False):
        try:
            row = measure_rung(SHAPES[name], rung, min(seconds, 3) if rung in BRANCHES else seconds)
        except Exception as error:  # noqa: BLE001 - what one version of the library cannot run must not cost the rest
            print(f"{name}, {rung}: left out, {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        rate, most = SHAPES[name].flop() / row["ms_per_step"] / 1e9, peak["FP8" if "FP8" in rung else "BF16"]
        if any((r["shape"], r["rung"]) == (name, rung) for r in rows):
            row["rung"] += " (again)"
        rows.append(row | {"tflop_per_s": round(rate, 1), "peak_tflop_per_s": most,
                           "share_of_peak": round(rate / most, 4)})  # fmt: skip
    return rows
