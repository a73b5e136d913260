"""Quantization-aware training of a language model, and the opponents that it has to beat.

"QAT recovered 90 %" means little by itself: 90 % of what, and what would the same hours of ordinary training have
given?  So a scheme has these arms, all evaluated on the same text:

    float           the model as it was
    PTQ             the float model, rounded
    control         the float model, trained on for as many steps on the same batches, then rounded
    QAT             trained for those steps on the next token, with the quantizer in the forward pass
    QAT, distilled  the same, but the target is the float model's whole distribution and not one token
                    (LLM-QAT, https://arxiv.org/abs/2305.17888)

and the share of the damage that is repaired is :func:`recovered`.  (A control for distillation would be the float
model taught by itself: its loss is zero from the first step on, so PTQ is that control.)

    model = course_model.load()
    fake_quant.prepare(model, **SCHEMES["W3"])
    train(model, ids, steps=500, teacher=course_model.load())
    fake_quant.convert(model)
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path

from . import QtutorError, results

HEAD = {"embed_tokens": "Q8_0", "lm_head": "Q8_0"}  # llama.cpp's name for 8 bits in blocks of 32

SCHEMES = {  # name -> options of fake_quant.prepare
    "W8A8": dict(weight="int8", activation="int8"),
    "W4A16": dict(weight="int4", group_size=32),
    "W4A8": dict(weight="int4", activation="int8", group_size=32),
    "W3": dict(weight="int3", group_size=32),
    "W2": dict(weight="int2", group_size=32),
    "ternary": dict(weight="ternary", group_size=32),
    "FP8": dict(weight="FP8", activation="FP8"),
    "MXFP4": dict(weight="MXFP4", activation="MXFP4"),
    "NVFP4": dict(weight="NVFP4", activation="NVFP4"),
    "Q4_0": dict(weight="Q4_0", overrides=HEAD),
}
# Peak learning rates where not 3e-4: the fewer the bits, the larger the steps that tip a weight over to the next point.
RATES = {"W8A8": 1e-4, "FP8": 1e-4, "W3": 5e-4, "W2": 1e-3, "ternary": 1e-3}
ARMS = ("PTQ", "control", "QAT", "QAT, distilled")


def rate_of(scheme: str) -> float:
    """The peak learning rate of AdamW for a scheme."""
    return RATES.get(scheme, 3e-4)


def recovered(ptq: float, qat: float, original: float) -> float:
    """The share of the loss by PTQ that QAT wins back: (PTQ - QAT) / (PTQ - float).

    1 is all of it, 0 nothing; beyond 1 QAT is better than the float model (more training can do that).  NaN where
    PTQ lost nothing.  Works on perplexities, on KL divergences (float: 0) and on arrays of either.
    """
    lost = ptq - original
    return (ptq - qat) / lost if lost > 0 else math.nan


def _logits(model, ids):
    """Logits of a model; on a GPU layer by layer, so that a CUDA graph can hold the call."""
    if ids.is_cuda:
        from .rigs.fp8_models import llama_logits

        return llama_logits(model, ids)
    return model(input_ids=ids, use_cache=False).logits


def loss_of(model, batch, teacher=None):
    """Mean loss in nats per token of one batch (rows, context + 1).

    Without ``teacher`` the cross-entropy with the next token; with a teacher KL(teacher || model) over the vocabulary.
    """
    import torch
    from torch.nn import functional as F

    logits = _logits(model, batch[:, :-1]).float().flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(logits, batch[:, 1:].flatten())
    with torch.no_grad():
        wanted = _logits(teacher, batch[:, :-1]).float().flatten(0, 1).log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")


def train(model, ids, steps: int, seed: int = 0, rate: float = 1e-3, batch_size: int = 8, context: int = 256,
          teacher=None, progress: bool = True) -> list[float]:  # fmt: skip
    """Train a causal LM in place, fake-quantized or not, and return the loss of every step.

    AdamW without weight decay, gradients clipped to a norm of 1, learning rate warmed up over a twentieth of the
    steps and then brought to zero along a cosine.  The batches depend on ``seed`` alone, so that arms can be compared.
    On a GPU forward and backward pass are computed under BF16 autocast and replayed from a CUDA graph.

    Args:
        model: a Llama (float32 weights), on its device.  ids: token ids, (n,).
        teacher: a float model to distil from; None trains on the next token.

    Raises:
        QtutorError: too few tokens, or a loss that is not a number any more.
    """
    import torch
    from tqdm.auto import tqdm

    from . import corpus

    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")
    stream = corpus.batches(ids, batch_size, context, seed=seed, device=device)
    model.train()
    if teacher is not None:
        teacher.eval()
    if device.type == "cuda":
        batch = next(stream).clone()
        run = _graph_step(model, batch, teacher)
    losses = torch.zeros(steps, device=device)
    for step in tqdm(range(steps), desc="training", disable=not progress, leave=False):
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        if device.type == "cuda":
            losses[step] = run()
            batch.copy_(next(stream))
        else:
            optimizer.zero_grad()
            loss = loss_of(model, next(stream), teacher)
            loss.backward()
            losses[step] = loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
    model.eval()
    losses = losses.tolist()
    if not all(map(math.isfinite, losses)):
        raise QtutorError("The loss is not a number any more: take a smaller rate.")
    return losses


def _graph_step(model, batch, teacher):
    """A function that replays forward and backward pass of whatever is in ``batch`` and returns the loss."""
    import torch

    from .rigs.fp8_bench import _captured

    def passes():
        for p in model.parameters():  # a replay writes into the gradients that it was recorded with
            p.grad = None
        # no cache of casts: they would be made once, outside of the graph
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = loss_of(model, batch, teacher)
        loss.backward()
        return loss.detach()

    replay, loss = _captured(passes)

    def run():
        replay()
        return loss

    return run


def _batched_logits(model, tokens, context: int, rows: int = 16):
    """Yield the logits of 16 windows at a time, in the order of evaluate.targets_of: a small model on a GPU spends
    a window's time on launching kernels."""
    import torch

    from . import evaluate

    model.eval()
    with torch.no_grad():
        for part in torch.from_numpy(evaluate.windows(tokens, context)).split(rows):
            yield _logits(model, part.to(next(model.parameters()).device))[:, :-1].flatten(0, 1)


def evaluated(base, model, tokens, context: int = 512) -> dict:
    """Perplexity of ``model`` and how far it is from ``base`` (its kept logits), as columns of a result."""
    from . import evaluate

    if next(model.parameters()).is_cuda:
        parts, targets = _batched_logits(model, tokens, context), evaluate.targets_of(tokens, context)
        found = evaluate.compare(base, parts, targets)
    else:
        found = evaluate.compare_models(base, model, tokens, ctx=context)
    return {"perplexity": found.perplexity, "perplexity_se": found.perplexity_se, "base_perplexity": found.base_perplexity,
            "ratio": found.perplexity_ratio, "ratio_se": found.perplexity_ratio_se, "kld_mean": found.kld_mean,
            "kld_mean_se": found.kld_mean_se, "same_top": found.same_top, "scored_tokens": found.n}  # fmt: skip


def experiment(schemes, ids, tokens, steps: int, seeds, arms=ARMS, batch_size: int = 8, context: int = 256,
               base=None, rates=None, keep=None, progress: bool = True) -> Iterator[dict]:  # fmt: skip
    """Yield the rows of ``qat_recovery``: every arm of every scheme and seed.

    Args:
        schemes: names of SCHEMES.  ids: training tokens.  tokens: evaluation tokens, never trained on.
        seeds: each gives the order of the batches; the initial model is the same.
        arms: a subset of ARMS.
        rates: {scheme: peak learning rate}; see :func:`rate_of`.  The control trains at its scheme's rate.
        keep: called with (row, model) after each row.

    Rows: scheme, arm, seed (-1: nothing was trained), rate, steps, tokens_per_step, and the columns of
    :func:`evaluated`.  The fine-tuned float model that the control is rounded from has scheme "float".
    """
    import torch

    from . import course_model, evaluate, fake_quant

    unknown = [*(set(arms) - set(ARMS)), *(set(schemes) - set(SCHEMES))]
    if unknown:
        raise QtutorError(f"There is no {unknown[0]!r}: arms are {', '.join(ARMS)}; schemes are {', '.join(SCHEMES)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = base if base is not None else course_model.load(dtype=torch.float32, device=device)
    kept = evaluate.logits_of(base, tokens, 512).to(device)
    rates = rates or {}
    tuned: dict = {}

    def quantized(model, scheme):
        return fake_quant.prepare(copy.deepcopy(model), **SCHEMES[scheme])

    def row(scheme, arm, model, seed=-1, rate=0.0):
        found = {k: round(v, 6) if isinstance(v, float) else v for k, v in evaluated(kept, model, tokens).items()}
        result = {"scheme": scheme, "arm": arm, "seed": seed, "rate": rate, "steps": steps if seed >= 0 else 0,
                  "tokens_per_step": batch_size * context, **found}  # fmt: skip
        if keep is not None:
            keep(result, model)
        return result

    for scheme in schemes:
        rate = rates.get(scheme, rate_of(scheme))
        if "PTQ" in arms:
            yield row(scheme, "PTQ", quantized(base, scheme))
        for seed in seeds:
            how = dict(steps=steps, seed=seed, rate=rate, batch_size=batch_size, context=context, progress=progress)
            if "control" in arms:
                if (seed, rate) not in tuned:
                    tuned[seed, rate] = copy.deepcopy(base)
                    train(tuned[seed, rate], ids, **how)
                    yield row("float", "fine-tuned", tuned[seed, rate], seed, rate)
                yield row(scheme, "control", quantized(tuned[seed, rate], scheme), seed, rate)
            for arm, teacher in (("QAT", None), ("QAT, distilled", base)):
                if arm in arms:
                    model = quantized(base, scheme)
                    train(model, ids, teacher=teacher, **how)
                    yield row(scheme, arm, model, seed, rate)


def record(schemes=tuple(SCHEMES), steps: int = 700, seeds=(0, 1, 2), arms=ARMS, batch_size: int = 16,
           context: int = 512, max_tokens: int | None = None):  # fmt: skip
    """Run :func:`experiment` and save ``qat_recovery`` after every row.  Returns the path."""
    from . import corpus, course_model

    tokenizer = course_model.load_tokenizer()
    ids, tokens = corpus.tokens("train", tokenizer), corpus.tokens("eval", tokenizer)[:max_tokens]
    rows, path = [], None
    for row in experiment(schemes, ids, tokens, steps, seeds, arms, batch_size, context):
        rows.append(row)
        path = results.save("qat_recovery", rows)
    return path


# ------------------------------------------------------------------------------------------- QAT for llama.cpp
# Codes and scales of the course model after QAT on llama.cpp's grid.
Q4_0_FILE = Path(__file__).resolve().parent.parent / "data" / "qat" / "course_model_q4_0.safetensors"
# What SCHEMES["Q4_0"] means to llamacpp.quantize; the second pattern is for models whose head is not tied.
Q4_0_TENSORS = {"token_embd": "Q8_0", r"^output\.weight": "Q8_0"}


def save_q4_0(model, path) -> None:
    """Write the codes and scales of a course model that was trained with SCHEMES["Q4_0"] (fake-quantized, not yet
    converted; left as it is) as safetensors, the tied table once."""
    from safetensors.torch import save_model

    from . import fake_quant

    stored = fake_quant.convert(copy.deepcopy(model), backend="packed")
    partial = f"{path}.partial"
    save_model(stored, partial)
    os.replace(partial, path)


def load_q4_0(path=None):
    """The course model after QAT on llama.cpp's Q4_0 grid (head and embedding: Q8_0), as a float model on that grid.

    ``path``: a file of :func:`save_q4_0`; by default the one that comes with the course.  Raises QtutorError where it
    is missing, damaged, or for another model than the one in use.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from . import course_model, fake_quant

    path = Path(path or Q4_0_FILE)
    if not path.is_file():
        raise QtutorError(f"There is no {path.name}: restore it with 'git checkout data/qat'.")
    model = fake_quant.convert(fake_quant.prepare(course_model.load(), **SCHEMES["Q4_0"]), backend="packed")
    try:
        load_model(model, path)
    except (SafetensorError, RuntimeError, ValueError, OSError):
        raise QtutorError(
            f"{path.name} does not fit the model in use: it belongs to the course model; unset QTUTOR_MODEL, "
            "or restore the file with 'git checkout data/qat'."
        ) from None
    return fake_quant.bake(model).eval()


def gguf_rows(name: str, model, types, tokens, kept, folder, tensor_types=None, seed: int = -1) -> Iterator[dict]:
    """Export a float model and yield a row of ``qat_gguf`` for each llama.cpp type it is quantized to.

    Args:
        name: goes into column ``model``.  types: names of llamacpp.TYPES.  tokens: evaluation tokens.
        kept: logits of the float model to compare with, from evaluate.logits_of.
        folder: where the files are written (and left).
        tensor_types: see llamacpp.quantize.
    """
    from . import course_model, evaluate, gguf_export, llamacpp

    folder = Path(folder)
    source = gguf_export.export(model, folder / f"{name}-{seed}-f32.gguf", tokenizer=course_model.load_tokenizer())
    for kind in types:
        file = llamacpp.quantize(source, folder / f"{name}-{seed}-{kind}.gguf", kind, tensor_types=tensor_types)
        with llamacpp.Model(file) as quantized:
            found = evaluate.compare_models(kept, quantized, tokens, 512)
        row = {"model": name, "type": kind, "seed": seed, "file_mb": file.stat().st_size / 1e6,
               "bits_per_weight": llamacpp.bits_per_weight(file), "perplexity": found.perplexity,
               "perplexity_se": found.perplexity_se, "base_perplexity": found.base_perplexity, "ratio": found.perplexity_ratio,
               "ratio_se": found.perplexity_ratio_se, "kld_mean": found.kld_mean, "kld_mean_se": found.kld_mean_se,
               "same_top": found.same_top, "scored_tokens": found.n}  # fmt: skip
        yield {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def record_gguf(trained: dict, types=("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"), max_tokens: int | None = None):
    """Compare QAT files with PTQ files in llama.cpp and save ``qat_gguf``.  Returns the path.

    ``trained``: {seed: file of save_q4_0}.  The rows: the float model in every type of ``types``; in Q4_0 with
    the head as QAT has it ("PTQ, head in Q8_0"); and each trained model ("QAT") in that same layout.
    """
    import tempfile

    from . import corpus, course_model, evaluate

    tokens = corpus.tokens("eval", course_model.load_tokenizer())[:max_tokens]
    base = course_model.load()
    kept = evaluate.logits_of(base, tokens, 512)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(gguf_rows("PTQ", base, types, tokens, kept, folder))
        rows += gguf_rows("PTQ, head in Q8_0", base, ["Q4_0"], tokens, kept, folder, Q4_0_TENSORS)
        for seed, path in trained.items():
            rows += gguf_rows("QAT", load_q4_0(path), ["Q4_0"], tokens, kept, folder, Q4_0_TENSORS, seed)
    return results.save("qat_gguf", rows)
