"""What FP8 costs and buys on whole models: the loss curves behind notebook 02 and the inference behind notebook 04.

Both replay CUDA graphs.  The course model is so small that launching its kernels takes several times longer than
running them, and a decoding step is short at any size; a graph leaves the GPU's own time.  See
:mod:`qtutor.rigs.fp8_bench` for the instruments.
"""

from __future__ import annotations

import itertools
import math
import sys
import traceback

from .. import measure, results
from .fp8_bench import _captured, _free, _recipe, _require_fp8, timed


# ---------------------------------------------------------------------- a Llama whose calls a CUDA graph can hold
def llama_logits(model, ids, cache=None, last_only: bool = False):
    """Logits (batch, tokens or 1, vocabulary) of a LlamaForCausalLM, its layers called one by one.

    What transformers does around the layers (choosing masks, growing caches) looks at values on the CPU, which a
    CUDA graph cannot contain.  ``cache``: a :class:`FixedCache`; then ids (batch, 1) is the token at its end.
    """
    import torch

    body = model.model
    x = body.embed_tokens(ids)
    first = 0 if cache is None else cache.length - ids.shape[1]
    positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    cos_sin = body.rotary_emb(x, positions)
    for layer in body.layers:
        x = layer(x, attention_mask=None, position_embeddings=cos_sin, past_key_values=cache,
                  use_cache=cache is not None)  # fmt: skip
        x = x[0] if isinstance(x, tuple) else x
    return model.lm_head(body.norm(x[:, -1:] if last_only else x))


class FixedCache:
    """Keys and values of ``length`` tokens, random but for the last one: what one decoding step reads.

    Has the one method of transformers' caches that an attention layer calls.
    """

    def __init__(self, config, batch: int, length: int, device, dtype):
        import torch

        size = (batch, config.num_key_value_heads, length, config.head_dim)
        self.length = length
        options, layers = dict(device=device, dtype=dtype), range(config.num_hidden_layers)
        self.keys, self.values = ([torch.randn(size, **options) for _ in layers] for _ in range(2))

    def update(self, keys, values, layer: int, *_, **__):
        n = keys.shape[2]
        self.keys[layer][:, :, -n:], self.values[layer][:, :, -n:] = keys, values
        return self.keys[layer], self.values[layer]


# ---------------------------------------------------------------------------------------------------------- loss
LOSS_RECIPES = {"BF16": None, "FP8 delayed": "delayed", "FP8 current": "current", "FP8 block": "block"}


def _captured_step(model, batch, recipe):
    """Record forward and backward pass of one batch into a CUDA graph; return (replay, loss).

    The course model is small: launching its kernels one by one takes several times longer than running them.
    """
    import torch
    import transformer_engine.pytorch as te
    from torch.nn import functional as F

    def passes():
        with torch.autocast("cuda", torch.bfloat16):
            with te.autocast(enabled=recipe is not None, recipe=recipe):
                logits = llama_logits(model, batch[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    def fresh():  # a replay writes into the gradients that it was recorded with: no need to clear them
        for p in model.parameters():
            p.grad = None
        return passes()

    return _captured(fresh)


def loss_run(precision: str, seed: int, ids, held_out, steps: int = 3000, batch_size: int = 16, context: int = 512,
             rate: float = 3e-3, every: int = 150, progress: bool = True) -> list[dict]:  # fmt: skip
    """Train the course model from nothing and return rows of ``fp8_loss``, one each ``every`` steps.

    Args:
        precision: a key of ``LOSS_RECIPES``.
        seed: of the initial weights and of the order of the batches.
        ids, held_out: token ids, (n,).

    Returns:
        Rows with recipe, seed, step, train_nats (mean since the row before) and held_out_nats, computed in BF16
        whatever the training precision.
    """
    import torch
    from torch.nn import functional as F
    from tqdm.auto import tqdm

    from .. import corpus, course_model
    from .. import te_switch as switch

    _require_fp8()
    torch.manual_seed(seed)
    model = course_model.new_model(seed).cuda().train()
    recipe = _recipe(LOSS_RECIPES[precision]) if LOSS_RECIPES[precision] else None
    if recipe is not None:
        switch.swap_linears(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    stream = corpus.batches(ids, batch_size, context, seed=seed, device="cuda")
    batch = next(stream).clone()
    replay, loss = _captured_step(model, batch, recipe)
    windows = torch.as_tensor(held_out[: len(held_out) // (context + 1) * (context + 1)].astype("int64"))
    windows = windows.view(-1, context + 1)[:256].cuda()

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        total = 0.0
        for rows in windows.split(32):
            with torch.autocast("cuda", torch.bfloat16):
                logits = llama_logits(model, rows[:, :-1])
            total += F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        model.train()
        return total / windows[:, 1:].numel()

    found, running = [], torch.zeros((), device="cuda")
    for step in tqdm(range(1, steps + 1), disable=not progress, desc=f"{precision}, seed {seed}", leave=False):
        optimizer.param_groups[0]["lr"] = course_model.learning_rate(step - 1, steps, rate)
        replay()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        running += loss
        batch.copy_(next(stream))
        if step % every == 0 or step == steps:
            count = step % every or every
            found.append({"recipe": precision, "seed": seed, "step": step, "steps": steps,
                          "tokens_per_step": batch_size * context, "train_nats": round(running.item() / count, 5),
                          "held_out_nats": round(evaluate(), 5)})  # fmt: skip
            running.zero_()
            if not math.isfinite(found[-1]["held_out_nats"]):
                break  # a run that diverged is a result too
    return found


def record_loss(ids=None, held_out=None, steps: int = 3000, seeds=(0, 1, 2, 3, 4), batch_size: int = 16):
    """Train the course model with every recipe and seed and save ``fp8_loss``; about ten minutes on an H200.

    ``ids`` and ``held_out``: token ids (n,); by default the docstrings of the installed packages, of which the
    last 2 % are held out.  Returns the path.
    """
    if ids is None:
        from .. import corpus, course_model

        ids = corpus.tokens("train", course_model.load_tokenizer())
        ids, held_out = ids[: -len(ids) // 50], ids[-len(ids) // 50 :]
    rows, path = [], None
    for seed, precision in itertools.product(seeds, LOSS_RECIPES):
        rows += loss_run(precision, seed, ids, held_out, steps=steps, batch_size=batch_size)
        path = results.save("fp8_loss", rows)  # after each run, so that an interruption costs one run and not twelve
    return path


# ----------------------------------------------------------------------------------------------------- inference
def _te_inference(model):
    """te.Linear with FP8 weights and nothing else, in every layer; rows padded to 8, which FP8 products ask for."""
    import torch
    import transformer_engine.pytorch as te
    from torch.nn import functional as F
    from transformer_engine.common.recipe import Float8CurrentScaling

    recipe = Float8CurrentScaling()

    class Padded(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            sizes, weight = (linear.in_features, linear.out_features), linear.weight
            with te.quantized_model_init(enabled=True, recipe=recipe):
                self.inner = te.Linear(*sizes, bias=False, device="cuda", params_dtype=weight.dtype)
            self.inner.weight.copy_(weight)  # quantizes; an init_method would keep the BF16 weight alive

        def forward(self, x):
            rows = x.reshape(-1, x.shape[-1])
            padded = F.pad(rows, (0, 0, 0, -len(rows) % 8)) if len(rows) % 8 else rows
            with te.autocast(enabled=True, recipe=recipe):
                return self.inner(padded)[: len(rows)].view(*x.shape[:-1], -1)

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, Padded(child))
                    child.weight = None
    return model


def _torchao(config_name: str, **options):
    """A function that quantizes the linear layers of a model's body with a torchao configuration."""

    def apply(model):
        import torchao.quantization as ao

        made = {k: v() if isinstance(v, type) else v for k, v in options.items()}
        ao.quantize_(model.model.layers, getattr(ao, config_name)(**made))
        return model

    return apply


def _int_mm(a, b):
    """int8 (m, k) x (k, n) -> int32, padded to the 32 rows that cuBLAS wants at least."""
    import torch
    from torch.nn import functional as F

    return torch._int_mm(F.pad(a, (0, 0, 0, max(0, 32 - len(a)))), b)[: len(a)]


def inference_formats() -> dict:
    """format -> function that converts a BF16 LlamaForCausalLM on the GPU in place and returns it."""
    import torchao.kernel.intmm
    from torchao.quantization import PerRow

    # torchao 0.18 prints its operand in each eager call to see what it is, which a CUDA graph cannot hold, and
    # multiplies fewer than 17 rows in FP32.
    torchao.kernel.intmm.safe_int_mm = _int_mm
    return {
        "BF16": lambda model: model,
        "FP8 Transformer Engine": _te_inference,
        "FP8 torchao": _torchao("Float8DynamicActivationFloat8WeightConfig", granularity=PerRow),
        "INT8 weights+activations": _torchao("Int8DynamicActivationInt8WeightConfig"),
        "INT8 weights": _torchao("Int8WeightOnlyConfig"),
        "INT4 weights": _torchao("Int4WeightOnlyConfig", group_size=32, int4_packing_format="tile_packed_to_4d"),
    }


def _latency(call) -> dict:
    """Capture ``call()`` into a CUDA graph and time it: no launches in the figure, as in a serving engine."""
    replay, _ = _captured(call)
    return timed(replay, 0.7)


def inference(prefill_tokens: int = 2048, length: int = 1024, formats=None, progress: bool = True) -> list[dict]:
    """Rows of ``fp8_inference``: memory and latency at Llama-2-7B's shape, quality of the course model, by format.

    The head and the embedding stay in BF16 everywhere.  Latency: one sequence of ``prefill_tokens``, and one decoding
    step at ``length`` tokens for batches of 1 and 32, each replayed from a CUDA graph, without torch.compile.
    """
    import torch
    from tqdm.auto import tqdm

    from .. import corpus, course_model, evaluate

    _require_fp8()
    all_formats = inference_formats()
    formats, rows = list(formats or all_formats), []
    text = corpus.tokens("eval", course_model.load_tokenizer())[:32769]
    reference = course_model.load(dtype=torch.bfloat16, device="cuda")
    kept = {"perplexity": "perplexity", "perplexity_se": "perplexity_se", "kld_mean": "kld_mean", "kld_mean_se": "kld_mean_se",
            "same_top": "same_top", "same_top_se": "same_top_se", "n": "scored_tokens"}  # fmt: skip

    def quality(name, convert):
        model = convert(course_model.load(dtype=torch.bfloat16, device="cuda"))
        compared = evaluate.compare_models(reference, model, text, ctx=512)
        return {"model": "course model", "format": name, **{v: getattr(compared, k) for k, v in kept.items()}}

    def speed(name, convert):
        return _inference_row(name, convert, prefill_tokens, length)

    for measured, name in tqdm(list(itertools.product((quality, speed), formats)), disable=not progress, leave=False):
        _free()
        try:
            with torch.no_grad():
                rows.append(measured(name, all_formats[name]))
        except Exception as error:  # noqa: BLE001 - what one version of a library cannot run must not cost the rest
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            traceback.print_exc(file=sys.stdout)
    _free()
    return rows


def _inference_row(name: str, convert, prefill_tokens: int, length: int) -> dict:
    """Memory and latency of a model of Llama-2-7B's shape in one format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096)  # fmt: skip
    before = torch.cuda.memory_allocated() / measure.GIB
    torch.manual_seed(0)
    with torch.no_grad():
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
        model = convert(model)
        _free()
        row = {"model": "Llama-2-7B shape", "format": name, "prefill_tokens": prefill_tokens, "length": length,
               "weights_gib": round(torch.cuda.memory_allocated() / measure.GIB - before, 3)}  # fmt: skip
        ids = torch.randint(0, 32000, (1, prefill_tokens), device="cuda")
        with measure.track_memory("cuda") as memory:
            llama_logits(model, ids, last_only=True)
        row["peak_gib"] = round(memory.peak - before, 3)
        timing = _latency(lambda: llama_logits(model, ids, last_only=True))
        row |= {"prefill_ms": timing["ms_per_step"], "prefill_joules": timing.get("joules_per_step")}
        for batch in (1, 32):
            cache = FixedCache(config, batch, length, "cuda", torch.bfloat16)
            token = torch.randint(0, 32000, (batch, 1), device="cuda")
            timing = _latency(lambda token=token, cache=cache: llama_logits(model, token, cache))
            row |= {f"decode_ms_batch{batch}": timing["ms_per_step"],
                    f"decode_joules_batch{batch}": timing.get("joules_per_step")}  # fmt: skip
            del cache
    return row
