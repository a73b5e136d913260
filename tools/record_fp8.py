"""Records of FP8 on a GPU: one product, layers, where the time goes, break-even, training loss, inference.

All of it needs a GPU with FP8 units and Transformer Engine; at full size about a quarter of an hour on an H200.  Steps
that are short beside their launches are replayed from a CUDA graph, which leaves the GPU's own time.
"""

from __future__ import annotations

import itertools
import math

from qtutor import corpus, course_model, evaluate, measure, results, te_switch
from qtutor.rigs import fp8_layers as rig
from qtutor.rigs import techniques
from qtutor.rigs.decoding import FixedCache, compile_layers, llama_logits

from . import record_training
from .steps import ladder, timed
from .train_course_model import learning_rate


def _save(name: str, rows: list[dict], full: bool):
    return results.save(name, rows, profile="full" if full else "quick")


def gemm(m: int, n: int, k: int, seconds: float) -> list[dict]:
    """Rows of ``fp8_gemm``: a product of m tokens, n outputs and k inputs in BF16 and FP8, and what quantization adds.

    The FP8 product is timed on operands that are FP8 already, with the forward pass's fast accumulation and the
    backward pass's exact one.
    """
    import torch

    te = rig.require_fp8()
    x, w = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
    one, zeros = torch.ones((), device="cuda"), torch.zeros_like(x)
    x8, w8 = (t.to(torch.float8_e4m3fn) for t in (x, w))
    delayed = te.Float8Quantizer(torch.ones(1, device="cuda"), torch.zeros(1, device="cuda"), te.DType.kFloat8E4M3)
    current = te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, device=torch.device("cuda"))
    for quantizer in (delayed, current):
        quantizer.set_usage(rowwise=True, columnwise=True)  # the transpose is for the backward pass

    def product(fast):
        return torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)

    work = {"BF16 product": lambda: x @ w.t(), "BF16 product of zeros": lambda: zeros @ w.t(),
            "FP8 product": lambda: product(True), "FP8 product, split accumulation": lambda: product(False),
            "quantize input, delayed": lambda: delayed(x), "quantize input, current": lambda: current(x)}  # fmt: skip
    rows = []
    for what, call in work.items():
        window = seconds if "product" in what else min(seconds, 1.0)
        row = {"m": m, "n": n, "k": k, "what": what, **timed(call, window, warmup=10)}
        if "product" in what:
            row["tflop_per_s"] = round(2 * m * n * k / row["ms_per_step"] / 1e9, 1)
        else:  # BF16 in, FP8 out, twice
            row["gb_per_s"] = round((2 + 1 + 1) * m * k / row["ms_per_step"] / 1e6, 1)
        rows.append(row)
    return rows


def record_gemm(full: bool):
    """``fp8_gemm``: one product in BF16 and FP8, with what the casts cost."""
    rows = []
    for n, k in ((4096, 4096), (11008, 4096), (28672, 8192)) if full else ((4096, 4096),):
        rows += gemm(8192, n, k, 10 if full else 0.2)
        rig.free()
    return _save("fp8_gemm", rows, full)


def record_layers(full: bool):
    """Every rung of every shape; see :func:`qtutor.rigs.fp8_layers.ladder`."""
    rows = ladder() if full else ladder(("Llama-2-7B",), ("TE BF16", "TE FP8 delayed"), 0.2)
    return _save("fp8_layers", rows, full)


KINDS = (  # the first match wins; parts of the names of kernels, in lower case
    ("optimizer", ("multi_tensor", "adam")),
    ("attention", ("fmha", "flash", "sdpa", "fused_attn", "dot_do_o", "convert_dq")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "xmma", "cublas", "splitk")),
    ("quantization", ("cast_", "transpose_optimized", "quantize", "amax", "compute_scale", "scaled_1d", "scaled_2d")),
    ("norms and activations", ("norm", "silu", "act_kernel", "rope", "functor", "reduce", "softmax", "pow_")),
)


def kind_of(kernel: str) -> str:
    """What a GPU kernel does, by its name."""
    name = kernel.lower().replace("nocast", "")  # PyTorch: elementwise kernels *without* a cast
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "other")


def profile(step, steps: int = 3) -> list[dict]:
    """Rows of ``fp8_profile``: milliseconds of ``step()`` by kind of kernel; "idle" is what lies between them."""
    import torch
    from torch.profiler import ProfilerActivity

    timed(step, 0.5)  # as warm, and as slow, as in a long run
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    total, begin, end = {}, math.inf, -math.inf
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
            kind = kind_of(event.name)
            total[kind] = total.get(kind, 0.0) + event.time_range.elapsed_us() / 1000 / steps
    total["idle"] = max(0.0, (end - begin) / 1000 / steps - sum(total.values()))
    return [{"kind": kind, "ms": round(ms, 4)} for kind, ms in total.items()]


def record_profile(full: bool):
    """``fp8_profile``: time of a step by kind of kernel, of two layers and of a whole model with its optimizer."""
    rig.require_fp8()
    rows, stored = [], "TE FP8 delayed + FP8 weights"
    for name in ("Llama-2-7B", "Llama-2-70B") if full else ("Llama-2-7B",):
        for rung in ("TE BF16", "TE FP8 delayed", stored, f"{stored} + fast accumulation"):
            rig.free()
            about = {"shape": name, "layers": rig.LAYERS, "rung": rung, "tokens": rig.SHAPES[name].tokens}
            rows += [about | row for row in profile(rig.build(rig.SHAPES[name], rung)[1])]
    layers = record_training.LAYERS if full else 2
    for rung in ("Hugging Face BF16", "TE BF16", "TE FP8 delayed"):
        rig.free()
        step = record_training.build("Llama-2-7B", layers, record_training.ARMS[rung], 4, 2048)[2]
        about = {"shape": "Llama-2-7B", "layers": layers, "rung": rung, "tokens": 4 * 2048}
        rows += [about | row for row in profile(step)]
        del step
    return _save("fp8_profile", rows, full)


def breakeven(hidden: int, tokens: int) -> list[dict]:
    """Rows of ``fp8_breakeven``: one decoder layer, BF16 against FP8 (delayed), eager and from a CUDA graph.

    Heads of 128, an MLP of about 2.7 times the hidden size, sequences of at most 1024 tokens.  The graph holds the
    whole step, so its figure has no launches in it.
    """
    import torch

    rig.require_fp8()
    sequence = min(tokens, 1024)
    intermediate = round(hidden * 11008 / 4096 / 256) * 256
    shape, found = rig.Shape("", hidden, intermediate, hidden // 128, hidden // 128, tokens // sequence, sequence), {}
    for precision, graph in itertools.product(("bf16", "fp8"), (False, True)):
        torch.manual_seed(0)
        step = rig.training_step(shape, *rig.te_layers(shape, 1, "delayed" if precision == "fp8" else None))
        work = measure.captured(step)[0] if graph else step
        found[precision, graph] = timed(work, 0.15, warmup=4)["ms_per_step"]
        del step, work
    rig.free()
    return [{"hidden": hidden, "intermediate": intermediate, "tokens": tokens, "sequence": sequence, "graph": graph,
             "ms_bf16": found["bf16", graph], "ms_fp8": found["fp8", graph],
             "speedup": round(found["bf16", graph] / found["fp8", graph], 4)} for graph in (False, True)]  # fmt: skip


def record_breakeven(full: bool):
    """``fp8_breakeven``: BF16 against FP8 by width and tokens."""
    from tqdm.auto import tqdm

    hiddens = (512, 1024, 2048, 4096, 8192) if full else (512, 4096)
    tokens = (256, 512, 1024, 2048, 4096, 8192, 16384) if full else (256, 4096)
    sizes = list(itertools.product(hiddens, tokens))
    return _save("fp8_breakeven", [row for size in tqdm(sizes, leave=False) for row in breakeven(*size)], full)


LOSS_RECIPES = {"BF16": {"name": None}, "FP8 delayed": {"name": "delayed"}, "FP8 current": {"name": "current"},
                "FP8 block": {"name": "block"},
                "FP8 delayed (again)": {"name": "delayed"}}  # fmt: skip  # a control: what chance alone does
LOSS_SEEDS = 8


def loss_run(precision: str, seed: int, ids, held_out, steps: int, batch_size: int = 16, context: int = 512,
             rate: float = 3e-3, every: int = 150) -> list[dict]:  # fmt: skip
    """Train the course model from nothing and return rows of ``fp8_loss``, one each ``every`` steps.

    train_nats is the mean since the row before; held_out_nats is computed in BF16 whatever ``precision`` is.
    """
    import torch
    from torch.nn import functional as F
    from tqdm.auto import tqdm

    te = rig.require_fp8()
    torch.manual_seed(seed)
    model, recipe = course_model.new_model(seed).cuda().train(), rig.recipe_of(**LOSS_RECIPES[precision])
    if recipe is not None:
        te_switch.swap_linears(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    stream = corpus.batches(ids, batch_size, context, seed=seed, device="cuda")
    batch, count = next(stream).clone(), min(256, len(held_out) // (context + 1))
    windows = torch.as_tensor(held_out[: count * (context + 1)].astype("int64")).view(count, -1).cuda()

    def nats(rows, recipe, reduction="mean"):
        with torch.autocast("cuda", torch.bfloat16), te.autocast(enabled=recipe is not None, recipe=recipe):
            logits = llama_logits(model, rows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)

    def passes():
        for p in parameters:  # a replay writes into the gradients that it was recorded with: no need to clear them
            p.grad = None
        loss = nats(batch, recipe)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def held_out_nats() -> float:  # a Llama without dropout computes the same in train and in eval mode
        return sum(nats(rows, None, "sum").item() for rows in windows.split(32)) / windows[:, 1:].numel()

    replay, loss = measure.captured(passes)
    found, running = [], torch.zeros((), device="cuda")
    for step in tqdm(range(1, steps + 1), desc=f"{precision}, seed {seed}", leave=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step - 1, steps, rate)
        replay()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        running += loss
        batch.copy_(next(stream))
        if step % every == 0 or step == steps:
            found.append({"recipe": precision, "seed": seed, "step": step, "steps": steps,
                          "tokens_per_step": batch_size * context,
                          "train_nats": round(running.item() / (step % every or every), 5),
                          "held_out_nats": round(held_out_nats(), 5)})  # fmt: skip
            running.zero_()
            if not math.isfinite(found[-1]["held_out_nats"]):
                break  # a run that diverged is a result too
    return found


def record_loss(full: bool):
    """The docstrings of the installed packages, the last 2 % held out; the same seeds and batches for each recipe."""
    rig.require_fp8()
    ids, rows, path = corpus.tokens("train", course_model.load_tokenizer()), [], None
    ids, held_out = ids[: -len(ids) // 50], ids[-len(ids) // 50 :]
    for seed, precision in itertools.product(range(LOSS_SEEDS if full else 1), LOSS_RECIPES):
        rows += loss_run(precision, seed, ids, held_out, 3000 if full else 40)
        path = _save("fp8_loss", rows, full)  # after each run, so that an interruption costs one run only
    return path


INFERENCE = ("BF16", "FP8 (Transformer Engine)", "torchao FP8 dynamic", "torchao INT8 dynamic",
             "torchao INT8 weight-only", "torchao INT4 group 32")  # fmt: skip
UNTIMED = "torchao INT8 weight-only"  # its kernels are good after torchao's search alone, minutes a shape
EAGER = ("torchao INT8 dynamic", "torchao INT4 group 32")  # once more without torch.compile


def quality(technique: str) -> list[dict]:
    """The row of the course model: quality against BF16.  The head and the embedding stay in BF16 everywhere."""
    reference = techniques.build("BF16", "course", "cuda")
    text = corpus.tokens("eval", course_model.load_tokenizer())[:32769]
    compared = evaluate.compare_models(reference, techniques.build(technique, "course", "cuda"), text, ctx=512)
    return [{"model": "course model", "technique": technique, **compared.row()}]


def speed(technique: str, seconds: float, compiled: bool, prefill_tokens: int = 2048, length: int = 1024) -> list[dict]:
    """Rows of Llama-2-7B's shape, one a batch: memory, time and energy of one sequence of ``prefill_tokens`` and of one
    decoding step at ``length`` tokens, each replayed from a CUDA graph; ``compiled``: torch.compile made the kernels,
    as torchao expects (Transformer Engine brings its own)."""
    import torch

    before, rows = torch.cuda.memory_allocated() / measure.GIB, []
    model = techniques.build(technique, "Llama-2-7B", "cuda")
    rig.free()
    weights = torch.cuda.memory_allocated() / measure.GIB - before
    if compiled:
        compile_layers(model)
    ids = torch.randint(0, 32000, (1, prefill_tokens), device="cuda")
    with measure.track_memory("cuda") as memory:
        llama_logits(model, ids, last_only=True)
    prefill = timed(measure.captured(lambda: llama_logits(model, ids, last_only=True))[0], min(seconds, 3.0))
    for batch in (1, 32):
        cache = FixedCache(model.config, batch, length, "cuda", torch.bfloat16)
        token = torch.randint(0, 32000, (batch, 1), device="cuda")
        replay, _ = measure.captured(lambda token=token, cache=cache: llama_logits(model, token, cache))
        step = timed(replay, seconds if batch > 1 else min(seconds, 3.0))
        row = {"model": "Llama-2-7B shape", "technique": technique, "compiled": compiled, "batch": batch,
               "prefill_tokens": prefill_tokens, "length": length, "weights_gib": round(weights, 3),
               "peak_gib": round(memory.peak - before, 3), "ms_per_step": step["ms_per_step"],
               "decode_tokens_per_s": batch / step["ms_per_step"] * 1000}  # fmt: skip
        if batch == 1:
            row |= {"time_to_first_token_ms": prefill["ms_per_step"],
                    "prefill_tokens_per_s": prefill_tokens / prefill["ms_per_step"] * 1000}  # fmt: skip
        phases = {"decode": (step, batch)} | ({"prefill": (prefill, prefill_tokens)} if batch == 1 else {})
        for name, (run, tokens) in phases.items():
            row |= {key.replace("step", f"{name}_token"): value / tokens
                    for key, value in run.items() if key.startswith("joules_per_step")}  # fmt: skip
        rows.append(row)
    return rows


def record_inference(full: bool):
    """``fp8_inference``: quality of the course model, speed and memory of the 7B shape."""
    import torch
    from tqdm.auto import tqdm

    rig.require_fp8()
    rows, path, wanted = [], None, INFERENCE if full else INFERENCE[:2]
    work = [(quality, (name,)) for name in wanted]
    work += [(speed, (name, 10 if full else 0.3, "Transformer Engine" not in name)) for name in wanted
             if name != UNTIMED]
    work += [(speed, (name, 1.0, False)) for name in EAGER if full]
    for measured, arguments in tqdm(work, leave=False):
        rig.free()
        try:
            with torch.no_grad():
                rows += measured(*arguments)
            path = _save("fp8_inference", rows, full)  # after each: torch.compile can take minutes
        except Exception as error:  # noqa: BLE001 - what one version of a library cannot run must not cost the rest
            print(f"{arguments[0]}: left out, {type(error).__name__}: {str(error).splitlines()[0][:300]}")
    rig.free()
    return path


RECORDS = {"fp8_gemm": record_gemm, "fp8_layers": record_layers, "fp8_profile": record_profile,
           "fp8_breakeven": record_breakeven, "fp8_loss": record_loss, "fp8_inference": record_inference}  # fmt: skip
