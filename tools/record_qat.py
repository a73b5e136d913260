"""Record what quantization-aware training gives back: results ``qat_recovery`` and ``qat_gguf``, and the Q4_0 model.

The arms are those of qtutor.qat.  :func:`train` is the loop of the QAT notebook (a test holds one to the other); on a
GPU it replays a CUDA graph, because a step of so small a model is otherwise the time that Python takes to launch it.
``python -m tools.record_qat`` trains data/qat/course_model_q4_0.safetensors anew.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import qtutor
from qtutor import corpus, course_model, evaluate, fake_quant, files, gguf_export, llamacpp, measure, packed, results
from qtutor.files import whole
from qtutor.qat import Q4_0_FILE, Q4_0_TENSORS, SCHEMES, load_q4_0
from qtutor.rigs.decoding import llama_logits

RATES = {"W8A8": 1e-4, "FP8": 1e-4, "W3": 5e-4, "W2": 1e-3, "ternary": 1e-3}  # see the notebook; otherwise 3e-4
CONTEXT = 512  # of the evaluation
KEPT = ("perplexity", "perplexity_se", "base_perplexity", "perplexity_ratio", "perplexity_ratio_se", "kld_mean",
        "kld_mean_se", "same_top")  # fmt: skip


def loss_of(model, batch, teacher=None):
    """Mean nats per token of a batch (rows, context + 1): cross-entropy, or KL(teacher || model)."""
    found = llama_logits(model, batch[:, :-1]).float().flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(found, batch[:, 1:].flatten())
    with torch.no_grad():
        wanted = llama_logits(teacher, batch[:, :-1]).float().flatten(0, 1).log_softmax(-1)
    return F.kl_div(found.log_softmax(-1), wanted, log_target=True, reduction="batchmean")


def train(model, ids, steps: int, rate: float, batch_size: int = 16, context: int = 512, seed: int = 0, teacher=None):
    """Train a Llama (float32 weights) in place and return the loss of every step; BF16 autocast on a GPU.

    ``teacher``: a float model to distil from.  The batches depend on ``seed`` alone.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")
    stream = corpus.batches(ids, batch_size, context, seed=seed, device=device)
    batch = torch.zeros(batch_size, context + 1, dtype=torch.long, device=device)
    model.train()

    def passes():
        optimizer.zero_grad()
        # no cache of casts: they would be made once, outside of the graph
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            loss = loss_of(model, batch, teacher)
        loss.backward()
        return loss.detach()

    replay, loss = measure.captured(passes) if device.type == "cuda" else (None, None)
    losses = torch.zeros(steps, device=device)
    for step in tqdm(range(steps), desc="training", leave=False):
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch.copy_(next(stream))
        losses[step] = passes() if replay is None else (replay(), loss)[1]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
    model.eval()
    if not losses.isfinite().all():
        raise qtutor.QtutorError("The loss is not a number any more: take a smaller rate.")
    return losses.tolist()


@torch.no_grad()
def evaluated(kept, model, tokens) -> dict:
    """Columns of a result: perplexity of ``model`` and its distance from the float model, whose logits are ``kept``."""
    targets, parts = evaluate.targets_of(tokens, CONTEXT), evaluate.iter_logits(model, tokens, CONTEXT)
    if isinstance(model, torch.nn.Module):  # 16 windows at a time: one alone leaves a GPU waiting for Python
        ids = torch.from_numpy(evaluate.windows(tokens, CONTEXT)).to(kept.device)
        parts = (llama_logits(model, part)[:, :-1].flatten(0, 1) for part in ids.split(16))
    row = evaluate.compare(kept, parts, targets).row()
    return {**{name: round(row[name], 6) for name in KEPT}, "scored_tokens": len(targets),
            "text": corpus.fingerprint(corpus.eval_text())}  # fmt: skip


def experiment(base, ids, tokens, schemes=SCHEMES, steps: int = 700, seeds=(0, 1, 2), batch_size: int = 16,
               context: int = 512):  # fmt: skip
    """Yield the rows of ``qat_recovery``: every arm of every scheme and seed (order of batches; -1: not trained).
    The control trains at its scheme's rate; the float model that it is rounded from has scheme "float"."""
    kept = evaluate.logits_of(base, tokens, CONTEXT).to(next(base.parameters()).device)
    how, tuned = dict(steps=steps, batch_size=batch_size, context=context), {}

    def quantized(model, scheme):
        return fake_quant.prepare(copy.deepcopy(model), **SCHEMES[scheme])

    def row(scheme, arm, model, seed=-1, rate=0.0):
        return dict(scheme=scheme, arm=arm, seed=seed, rate=rate, steps=steps if seed >= 0 else 0,
                    tokens_per_step=batch_size * context, **evaluated(kept, model, tokens))  # fmt: skip

    for scheme in schemes:
        rate = RATES.get(scheme, 3e-4)
        yield row(scheme, "PTQ", quantized(base, scheme))
        for seed in seeds:
            if (seed, rate) not in tuned:
                tuned[seed, rate] = copy.deepcopy(base)
                train(tuned[seed, rate], ids, rate=rate, seed=seed, **how)
                yield row("float", "fine-tuned", tuned[seed, rate], seed, rate)
            yield row(scheme, "control", quantized(tuned[seed, rate], scheme), seed, rate)
            for arm, teacher in (("QAT", None), ("QAT, distilled", base)):
                model = quantized(base, scheme)
                train(model, ids, rate=rate, seed=seed, teacher=teacher, **how)
                yield row(scheme, arm, model, seed, rate)


def record_recovery(full: bool) -> Path:
    """Run :func:`experiment` on a GPU and save ``qat_recovery`` after every row: what was done is there if it stops."""
    if not torch.cuda.is_available():
        raise qtutor.QtutorError("Training in ten schemes takes a CUDA GPU, and there is none.")
    rows, path, size = [], None, {} if full else dict(schemes=["W3"], steps=20, seeds=(0,))
    base, tokenizer = course_model.load(dtype=torch.float32, device="cuda"), course_model.load_tokenizer()
    for row in experiment(base, corpus.tokens("train", tokenizer), corpus.tokens("eval", tokenizer), **size):
        rows.append(row)
        path = results.save("qat_recovery", rows, profile="full" if full else "quick")
    return path


def gguf_rows(base, tokens, trained, types=("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")):
    """Yield the rows of ``qat_gguf``: the float model in every llama.cpp type ("PTQ") and in Q4_0 with QAT's 8-bit head
    ("PTQ, head in Q8_0"), and in that layout each trained model ("QAT") of ``trained``, {seed: file}."""
    kept, tokenizer = evaluate.logits_of(base, tokens, CONTEXT), course_model.load_tokenizer()
    models = [("PTQ", -1, base, types, None), ("PTQ, head in Q8_0", -1, base, ["Q4_0"], Q4_0_TENSORS),
              *(("QAT", seed, load_q4_0(path), ["Q4_0"], Q4_0_TENSORS) for seed, path in trained.items())]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, seed, model, kinds, layout in models:
            source = gguf_export.export(model, Path(folder) / "f32.gguf", tokenizer=tokenizer)
            for kind in kinds:
                file = llamacpp.quantize(source, Path(folder) / f"{kind}.gguf", kind, tensor_types=layout)
                with llamacpp.Model(file) as quantized:
                    yield {"model": name, "type": kind, "seed": seed,
                           "file_mb": file.stat().st_size / 1e6, "bits_per_weight": llamacpp.bits_per_weight(file),
                           **evaluated(kept, quantized, tokens)}  # fmt: skip


def record_gguf(full: bool) -> Path:
    """Save ``qat_gguf``; raises QtutorError where llama.cpp is not here."""
    tokens = corpus.tokens("eval", course_model.load_tokenizer())
    rows = gguf_rows(course_model.load(), tokens if full else tokens[:1026], {0: Q4_0_FILE})
    return results.save("qat_gguf", list(rows), profile="full" if full else "quick")


def save_q4_0(model, path) -> None:
    """Write codes and scales of a course model that was trained with SCHEMES["Q4_0"], the tied table once."""
    from safetensors.torch import save_model

    with whole(path) as partial:
        save_model(packed.convert(copy.deepcopy(model)), str(partial))


def train_q4_0(path=Q4_0_FILE, steps: int = 2500, seed: int = 0) -> None:
    """On a GPU, train the course model onto the grid of Q4_0, distilled from the float model, and save it."""
    base, tokenizer = course_model.load(dtype=torch.float32, device="cuda"), course_model.load_tokenizer()
    model = fake_quant.prepare(copy.deepcopy(base), **SCHEMES["Q4_0"])
    train(model, corpus.tokens("train", tokenizer), steps, 3e-4, seed=seed, teacher=base)
    save_q4_0(model, path)


def record_speed(full: bool = True) -> Path:
    """``fake_quant_speed``: bench/bench_fake_quant.py on a GPU, saved."""
    rows = [] if full else ["--rows", "256", "--columns", "256", "--rounds", "2"]
    subprocess.run([sys.executable, files.ROOT / "bench" / "bench_fake_quant.py", "--save", *rows], check=True)
    return results.RESULTS / results.machine_folder() / "fake_quant_speed.json"


RECORDS = {"qat_recovery": record_recovery, "qat_gguf": record_gguf, "fake_quant_speed": record_speed}

if __name__ == "__main__":
    train_q4_0()
