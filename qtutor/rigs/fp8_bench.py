"""What FP8 training buys on this GPU: the measurements behind notebook 04.

Every figure comes from whole forward and backward passes of decoder layers with the shapes of published models, on
random data (zeros switch no transistors: a GPU draws less power on them and clocks higher), warmed up, timed with
CUDA events, as medians; energy is read from the GPU's own counter around the timed passes.

A *rung* is one way to run the same layers.  Rungs are ordered so that each changes one thing:

    for rung in RUNGS:
        print(measure_rung(SHAPES["Llama-2-7B"], rung))

:func:`record` measures everything and writes ``data/results/<machine>/fp8_*.json``; it needs a GPU that runs FP8.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from dataclasses import dataclass

from .. import QtutorError, measure, results

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
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Weights of the matrices of one layer: q, k, v, o and the three of the MLP."""
        kv = self.kv_heads * self.head_dim
        return self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)

    def flop(self, layers: int = LAYERS) -> float:
        """Floating-point operations of a forward and a backward pass.

        A weight takes part in one multiply-add for each token in the forward pass and in two in the backward pass:
        6 operations.  Causal attention computes half of the (sequence x sequence) scores, and as much again for
        the values: 2 * tokens * sequence * hidden, and twice that backward.
        """
        return layers * (6 * self.tokens * self.weights + 6 * self.tokens * self.sequence * self.hidden)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Llama-2-7B", 4096, 11008, 32, 32, 8, 2048),
        Shape("Llama-3-8B", 4096, 14336, 32, 8, 8, 2048),
        Shape("Llama-2-70B", 8192, 28672, 64, 8, 4, 4096),
    )
}


def _require_fp8():
    """Return transformer_engine.pytorch, the real one."""
    from .. import te_switch as switch

    status = switch.activate()
    if not status.real:
        raise QtutorError(f"These measurements need a GPU with FP8 units, and {status.reason}: look at the recorded "
                          "results instead (qtutor.results.load).")  # fmt: skip
    import transformer_engine.pytorch as te

    return te


def _free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------- builders
def huggingface_layers(shape: Shape, layers: int = LAYERS):
    """Decoder layers of transformers' Llama in BF16 and their call ``f(x)``; x: (batch, sequence, hidden)."""
    import torch
    from torch import nn
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                         num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                         max_position_embeddings=shape.sequence, attn_implementation="sdpa")  # fmt: skip
    with torch.device("cuda"):
        stack = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(layers)).to(torch.bfloat16)
        rotary = LlamaRotaryEmbedding(config)
        positions = torch.arange(shape.sequence)[None]
    cos_sin = rotary(torch.empty(1, dtype=torch.bfloat16, device="cuda"), positions)

    def forward(x):
        for layer in stack:
            x = layer(x, position_embeddings=cos_sin, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
        return x

    return stack, forward


def te_layers(shape: Shape, layers: int = LAYERS, recipe=None, fp8_weights: bool = False):
    """The same layers as te.TransformerLayer, in BF16 or (with a recipe) FP8."""
    import torch
    import transformer_engine.pytorch as te

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                te.TransformerLayer(
                    shape.hidden, shape.intermediate, shape.heads, num_gqa_groups=shape.kv_heads, bias=False,
                    normalization="RMSNorm", activation="swiglu", attn_input_format="bshd",
                    self_attn_mask_type="causal", hidden_dropout=0.0, attention_dropout=0.0, fuse_qkv_params=True,
                    params_dtype=torch.bfloat16, device="cuda")
                for _ in range(layers))  # fmt: skip

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, rotary_pos_emb=rope)
            return x

    rope = te.RotaryPositionEmbedding(shape.head_dim)(max_seq_len=shape.sequence).to("cuda")
    with te.quantized_model_init(enabled=True, recipe=recipe) if fp8_weights else contextlib.nullcontext():
        stack = Stack()

    def forward(x):
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            return stack(x)

    return stack, forward


def _graphed(shape: Shape, stack, forward, recipe):
    """The same call replayed from a CUDA graph: all kernels of a pass are launched at once."""
    import torch
    import transformer_engine.pytorch as te

    sample = torch.randn(shape.batch, shape.sequence, shape.hidden, device="cuda", dtype=torch.bfloat16,
                         requires_grad=True)  # fmt: skip
    options = dict(enabled=True, recipe=recipe) if recipe is not None else dict(enabled=False)
    graphed = te.make_graphed_callables(stack, (sample,), **options)

    def call(x):
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            return graphed(x)

    return stack, call


def _captured(call):
    """Record ``call()`` into a CUDA graph; return (its replay, what the recorded call returned)."""
    import torch

    side = torch.cuda.Stream()  # warm-up on a side stream, as PyTorch's notes on CUDA graphs ask for
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def _recipe(name: str, fp8_attention: bool = False, fast_accumulation: bool = False):
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, MMParams

    if fp8_attention:
        return DelayedScaling(fp8_dpa=True)
    if fast_accumulation:  # the gradients' products too sum in the tensor core's short accumulator
        fast = MMParams(use_split_accumulator=False)
        return Float8CurrentScaling(fp8_gemm_dgrad=fast, fp8_gemm_wgrad=fast)
    return {"delayed": DelayedScaling, "current": Float8CurrentScaling, "block": Float8BlockScaling}[name]()


@dataclass(frozen=True)
class Rung:
    """How the layers of a rung are built: the library, the recipe (None: BF16), and what else is switched on."""

    library: str
    recipe: str | None = None
    fp8_weights: bool = False
    fp8_attention: bool = False
    fast_accumulation: bool = False
    graph: bool = False


RUNGS = {
    "Hugging Face BF16": Rung("hf"),
    "TE BF16": Rung("te"),
    "TE FP8 block": Rung("te", "block"),
    "TE FP8 current": Rung("te", "current"),
    "TE FP8 current + fast accumulation": Rung("te", "current", fast_accumulation=True),
    "TE FP8 delayed": Rung("te", "delayed"),
    "TE FP8 delayed + FP8 weights": Rung("te", "delayed", True),
    "TE FP8 delayed + FP8 weights + FP8 attention": Rung("te", "delayed", True, True),
    "TE FP8 delayed + FP8 weights + CUDA graph": Rung("te", "delayed", True, graph=True),
    "TE BF16 + CUDA graph": Rung("te", graph=True),
}


def build(shape: Shape, rung: str):
    """Build the layers of a rung; return (module, ``step()``), where a step is one forward and backward pass."""
    import torch

    how = RUNGS[rung]
    recipe = _recipe(how.recipe, how.fp8_attention, how.fast_accumulation) if how.recipe else None
    torch.manual_seed(0)
    if how.library == "hf":
        stack, forward = huggingface_layers(shape)
    else:
        stack, forward = te_layers(shape, recipe=recipe, fp8_weights=how.fp8_weights)
    if how.graph:
        stack, forward = _graphed(shape, stack, forward, recipe)
    size = (shape.batch, shape.sequence, shape.hidden)
    x = torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(size, device="cuda", dtype=torch.bfloat16) * 1e-3
    parameters = list(stack.parameters())

    def step():
        x.grad = None
        for p in parameters:
            p.grad = None
        forward(x).backward(dy)

    return stack, step


# -------------------------------------------------------------------------------------------------- instruments
class _Counter:
    """The GPU's energy counter and clock, through NVML; zeros where the driver does not offer them."""

    def __init__(self):
        import pynvml
        import torch

        pynvml.nvmlInit()
        self.nvml = pynvml
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

    def joules(self) -> float:
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000
        except self.nvml.NVMLError:
            return math.nan

    def mhz(self) -> int:
        return self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM)


def timed(step, seconds: float = 1.5, warmup: int = 3) -> dict:
    """Time ``step()`` for about ``seconds``: ms_per_step with percentiles, joules_per_step, watts and clock.

    The steps run back to back, so that the power limit acts as it does in training.
    """
    import torch

    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    one = (time.perf_counter() - began) / 3
    repeats = max(5, min(2000, round(seconds / one)))
    counter = _Counter()
    joules, began = counter.joules(), time.perf_counter()
    timing = measure.time_ms(step, warmup=0, repeats=repeats, device="cuda")
    mhz, seconds, joules = counter.mhz(), time.perf_counter() - began, counter.joules() - joules
    row = {"ms_per_step": round(timing.median_ms, 4), "ms_p10": round(timing.p10, 4), "ms_p90": round(timing.p90, 4),
           "n": timing.n, "mhz": mhz}  # fmt: skip
    if seconds > 0.3 and math.isfinite(joules):  # the counter ticks about every 0.1 s
        row |= {"joules_per_step": round(joules / repeats, 4), "watts": round(joules / seconds, 1)}
    return row


def peaks(size: int = 8192) -> dict:
    """Measured peak of the matrix units, in TFLOP/s, on random data: {"BF16": ..., "FP8": ...}."""
    rows = {row["what"]: row["tflop_per_s"] for row in gemm(((size, size, size),), quantization=False)}
    return {"BF16": rows["BF16 product"], "FP8": rows["FP8 product"]}


def measure_rung(shape: Shape, rung: str, peak: dict | None = None, seconds: float = 1.5) -> dict:
    """Build a rung, time it, and return its row of ``fp8_layers``.  ``peak``: what :func:`peaks` returned.

    ``peak_gib`` counts everything from an empty GPU on: weights, gradients, activations, FP8 copies, workspaces.
    """
    import torch

    _require_fp8()
    _free()
    before = torch.cuda.memory_allocated() / measure.GIB
    with measure.track_memory("cuda") as memory:
        stack, step = build(shape, rung)
        weights = torch.cuda.memory_allocated() / measure.GIB - before
        for _ in range(3):
            step()
    row = {"shape": shape.name, "hidden": shape.hidden, "intermediate": shape.intermediate, "heads": shape.heads,
           "kv_heads": shape.kv_heads, "layers": LAYERS, "batch": shape.batch, "sequence": shape.sequence,
           "tokens": shape.tokens, "rung": rung, **timed(step, seconds)}  # fmt: skip
    row |= {"peak_gib": round(memory.peak - before, 3)}
    if not RUNGS[rung].graph:  # a graph's memory is taken when it is recorded, with the weights
        row |= {"weights_gib": round(weights, 3)}
    del stack, step
    _free()
    return _with_rates(row, shape, peak)


def _with_rates(row: dict, shape: Shape, peak: dict | None) -> dict:
    row["tflop_per_s"] = round(shape.flop() / row["ms_per_step"] / 1e9, 1)
    if peak:
        row["peak_tflop_per_s"] = peak["FP8" if "FP8" in row["rung"] else "BF16"]
        row["share_of_peak"] = round(row["tflop_per_s"] / row["peak_tflop_per_s"], 4)
    return row


def ladder(shapes=tuple(SHAPES), rungs=tuple(RUNGS), seconds: float = 0.8, progress: bool = True) -> list[dict]:
    """Rows of ``fp8_layers``: every rung for every shape (names).

    Each shape's rungs are measured in order and then in reverse order, and the two figures averaged: a GPU that
    grows warm, and slows down, would otherwise favour the rungs that came first.
    """
    from tqdm.auto import tqdm

    peak, rows = peaks(), []
    turns = [(name, rung) for name in shapes for rung in (*rungs, *reversed(rungs))]
    found: dict = {}
    for name, rung in tqdm(turns, disable=not progress, desc="ladder", leave=False):
        try:
            found.setdefault((name, rung), []).append(measure_rung(SHAPES[name], rung, seconds=seconds))
        except Exception as error:  # noqa: BLE001 - what one version of the library cannot run must not cost the rest
            print(f"{name}, {rung}: left out, {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    for (name, _), pair in found.items():
        row = dict(pair[0])
        for key in ("ms_per_step", "ms_p10", "ms_p90", "mhz", "joules_per_step", "watts"):
            if all(key in r for r in pair):
                row[key] = round(sum(r[key] for r in pair) / len(pair), 4)
        row["n"] = sum(r["n"] for r in pair)
        rows.append(_with_rates(row, SHAPES[name], peak))
    return rows


# -------------------------------------------------------------------------------------------------- one product
def gemm(sizes=((8192, 4096, 4096), (8192, 11008, 4096), (8192, 28672, 8192)), quantization: bool = True) -> list[dict]:
    """Rows of ``fp8_gemm``: one (m, k) x (k, n) product in BF16 and FP8, and the passes that quantization adds.

    The FP8 product is timed alone, on operands that are FP8 already, with the fast accumulation of the forward
    pass and the exact one of the backward pass.  Sizes are (m, n, k): tokens, outputs, inputs.
    """
    import torch

    te = _require_fp8()
    rows = []
    for m, n, k in sizes:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        one = torch.ones((), device="cuda")
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)

        def product(fast, x8=x8, w8=w8, one=one):
            return torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)

        zeros = torch.zeros_like(x)
        work = {
            "BF16 product": lambda x=x, w=w: x @ w.t(),
            "BF16 product of zeros": lambda x=zeros, w=w: x @ w.t(),
            "FP8 product": lambda f=product: f(True),
            "FP8 product, split accumulation": lambda f=product: f(False),
        }
        if quantization:
            scale, amax = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
            kinds = {"delayed": te.Float8Quantizer(scale, amax, te.DType.kFloat8E4M3),
                     "current": te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3,
                                                                 device=torch.device("cuda"))}  # fmt: skip
            for name, quantizer in kinds.items():
                quantizer.set_usage(rowwise=True, columnwise=True)  # the transpose is for the backward pass
                work[f"quantize input, {name}"] = lambda q=quantizer, x=x: q(x)
        for what, f in work.items():
            row = timed(f, 0.8, warmup=10)
            if "product" in what:
                row["tflop_per_s"] = round(2 * m * n * k / row["ms_per_step"] / 1e9, 1)
            else:
                row["gb_per_s"] = round((2 + 1 + 1) * m * k / row["ms_per_step"] / 1e6, 1)  # BF16 in, FP8 out, twice
            row["ms"], row["repeats"] = row.pop("ms_per_step"), row.pop("n")
            rows.append({"m": m, "n": n, "k": k, "what": what, **row})
        del x, w, x8, w8, zeros, work
        _free()
    return rows


# ------------------------------------------------------------------------------------------- where the time goes
KINDS = (  # the first match wins; parts of the names of kernels, in lower case
    ("attention", ("fmha", "flash", "sdpa", "fused_attn", "dot_do_o", "convert_dq")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "xmma", "cublas", "splitk")),
    ("quantization", ("cast_", "transpose_optimized", "quantize", "amax", "compute_scale", "scaled_1d", "scaled_2d")),
    ("norms and activations", ("norm", "silu", "act_kernel", "rope", "functor", "reduce", "softmax", "pow_")),
)


def _kind(kernel: str) -> str:
    name = kernel.lower().replace("nocast", "")  # PyTorch: elementwise kernels *without* a cast
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "other")


def profile(shape: Shape, rung: str, steps: int = 3, names: bool = False) -> list[dict]:
    """Rows of ``fp8_profile``: milliseconds a step by kind of kernel; "idle" is what lies between them.

    With ``names``, one row a kernel instead, slowest first, with its kind.
    """
    import torch
    from torch.profiler import ProfilerActivity

    _require_fp8()
    _free()
    stack, step = build(shape, rung)
    timed(step, 0.5)  # as warm, and as slow, as in a long run
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels, span = {}, [math.inf, -math.inf]
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            span = [min(span[0], event.time_range.start), max(span[1], event.time_range.end)]
            spent = kernels.setdefault(event.name, [0.0, 0])
            spent[0] += event.time_range.elapsed_us() / 1000 / steps
            spent[1] += 1
    del stack, step
    _free()
    if names:
        return [{"kernel": name, "kind": _kind(name), "ms": round(ms, 4), "calls": calls // steps}
                for name, (ms, calls) in sorted(kernels.items(), key=lambda item: -item[1][0])]  # fmt: skip
    total = {}
    for name, (ms, _) in kernels.items():
        total[_kind(name)] = total.get(_kind(name), 0.0) + ms
    total["idle"] = max(0.0, (span[1] - span[0]) / 1000 / steps - sum(total.values()))
    return [{"shape": shape.name, "rung": rung, "kind": kind, "ms": round(ms, 4)} for kind, ms in total.items()]


# --------------------------------------------------------------------------------------------------- break-even
def breakeven(hiddens=(512, 1024, 2048, 4096, 8192), tokens=(256, 512, 1024, 2048, 4096, 8192, 16384),
              progress: bool = True) -> list[dict]:  # fmt: skip
    """Rows of ``fp8_breakeven``: one decoder layer, BF16 against FP8 (delayed), eager and from a CUDA graph.

    Heads of 128, an MLP of about 2.7 times the hidden size, sequences of at most 1024 tokens.  The graph holds the
    whole forward and backward pass: its figure is the GPU's own time, and the eager one includes the launches.
    """
    import torch
    from tqdm.auto import tqdm

    _require_fp8()
    rows = []
    for hidden, count in tqdm(list(itertools.product(hiddens, tokens)), disable=not progress, leave=False):
        sequence = min(count, 1024)
        intermediate = round(hidden * 11008 / 4096 / 256) * 256
        shape = Shape("", hidden, intermediate, hidden // 128, hidden // 128, count // sequence, sequence)
        size, found = (shape.batch, shape.sequence, hidden), {}
        for precision, graph in itertools.product(("bf16", "fp8"), (False, True)):
            torch.manual_seed(0)
            recipe = _recipe("delayed") if precision == "fp8" else None
            stack, forward = te_layers(shape, 1, recipe)
            x = torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            dy = torch.randn(size, device="cuda", dtype=torch.bfloat16) * 1e-3
            parameters = list(stack.parameters())

            def step(x=x, dy=dy, forward=forward, parameters=parameters):
                x.grad = None
                for p in parameters:
                    p.grad = None
                forward(x).backward(dy)

            work = _captured(step)[0] if graph else step
            found[precision, graph] = timed(work, 0.15, warmup=4)["ms_per_step"]
            del stack, forward, step, work, x, dy, parameters
        _free()
        for graph in (False, True):
            bf16, fp8 = found["bf16", graph], found["fp8", graph]
            rows.append({"hidden": hidden, "intermediate": intermediate, "tokens": count, "sequence": sequence,
                         "graph": graph, "ms_bf16": bf16, "ms_fp8": fp8, "speedup": round(bf16 / fp8, 4)})  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------------------------- recording
def record(names=("fp8_gemm", "fp8_layers", "fp8_profile", "fp8_breakeven", "fp8_inference")) -> list:
    """Measure and save the results that notebook 04 shows; about six minutes on an H200.  Returns the paths."""
    from . import fp8_models

    _require_fp8()
    profiled = ("TE BF16", "TE FP8 delayed", "TE FP8 delayed + FP8 weights")
    measurements = {
        "fp8_gemm": gemm,
        "fp8_layers": ladder,
        "fp8_profile": lambda: [row for shape in ("Llama-2-7B", "Llama-2-70B") for rung in profiled
                                for row in profile(SHAPES[shape], rung)],
        "fp8_breakeven": breakeven,
        "fp8_inference": fp8_models.inference,
    }  # fmt: skip
    return [results.save(name, measurements[name]()) for name in names]
