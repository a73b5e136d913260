"""Record what quantization-aware training gives back: results ``qat_recovery`` and ``qat_gguf``, and the Q4_0 model.

The arms are those of qtutor.qat.  :func:`train` is the loop of the QAT notebook (a test holds one to the other); on a
GPU it replays a CUDA graph, because a step of so small a model is otherwise the time that Python takes to launch it.
``python -m tools.record_qat`` trains data/qat/course_model_q4_0.safetensors anew.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F
from tqdm.auto import tqdm

import qtutor
from qtutor import (
    corpus,
    course_model,
    evaluate,
    fake_quant,
    files,
    formats,
    gguf_export,
    llamacpp,
    measure,
    packed,
    ptq,
    results,
)
from qtutor.files import whole
from qtutor.qat import Q4_0_FILE, Q4_0_TENSORS, SCHEMES, load_q4_0
from qtutor.rigs.decoding import llama_logits
from qtutor.ste import Target

from . import keep

RATES = {"W4A16": 3e-4, "W3": 5e-4, "W2": 1e-3, "MXFP4": 3e-4}  # tried: a third of it, it, three times it
TRAINED = tuple(RATES)
METHODS = "RTN", "searched scale", "GPTQ", "GPTQ, activation order"  # both GPTQ with searched scales
ARMS = "control", "QAT", "QAT, LSQ", "QAT, distilled", "QAT, distilled, LSQ"
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


def window_klds(kept, model, tokens):
    """The comparison of ``model`` with the float model, whose logits are ``kept``, and its mean KLD of each window."""
    targets, parts = evaluate.targets_of(tokens, CONTEXT), evaluate.iter_logits(model, tokens, CONTEXT)
    if isinstance(model, torch.nn.Module):  # 16 windows at a time: one alone leaves a GPU waiting for Python
        ids = torch.from_numpy(evaluate.windows(tokens, CONTEXT)).to(kept.device)
        parts = (llama_logits(model, part)[:, :-1].flatten(0, 1) for part in ids.split(16))
    found = evaluate.compare(kept, parts, targets)
    return found, found.token_kld.reshape(-1, CONTEXT - 1).mean(1)


@torch.no_grad()
def evaluated(kept, model, tokens, rival=None) -> dict:
    """Columns of a result: perplexity of ``model`` and its distance from the float model, whose logits are ``kept``.
    ``rival``: the KLD of each window of the model that it is compared with."""
    found, klds = window_klds(kept, model, tokens)
    row = {**{name: round(found.row()[name], 6) for name in KEPT}, "kld_mean_se_windows": stats.sem(klds),
           "scored_tokens": found.scored_tokens, "windows": len(klds)}  # fmt: skip
    if rival is not None:
        row |= {"kld_less_rival": (klds - rival).mean(), "kld_less_rival_se": stats.sem(klds - rival)}
    return row | {"text": corpus.fingerprint(corpus.eval_text())}


def hessians(model, ids, windows: int = 64) -> dict:
    """:func:`ptq.input_squares` of the first ``windows`` of ``ids``."""
    parts = torch.from_numpy(evaluate.windows(ids[: windows * CONTEXT], CONTEXT)).split(8)
    return ptq.input_squares(model, (part.to(next(model.parameters()).device) for part in parts))


def mx_nearest(blocks, scale, bits=4):
    """``blocks`` on E2M1's points times ``scale``."""
    return formats.E2M1.round((blocks / scale).clamp(-formats.E2M1.max, formats.E2M1.max)) * scale


def mx_scale(blocks, importance, bits=4, ratios=(1,)):
    """The power of two (n, 1) of each block of MXFP4: the standard's or, of several ``ratios``, that or a neighbour, by
    the squared error."""
    scale = formats.mx_scale(blocks.abs().amax(1, keepdim=True), formats.E2M1)
    tried = [scale * 2.0**i for i in ((-1, 0, 1) if len(ratios) > 1 else (0,))]
    losses = [((mx_nearest(blocks, s) - blocks).square() * importance).sum(1, keepdim=True) for s in tried]
    return torch.stack(tried).gather(0, torch.stack(losses).argmin(0, keepdim=True))[0]


@torch.no_grad()
def after_training(model, scheme: str, method: str, H: dict):
    """A copy of a float ``model`` with the weights of its layers rounded by ``method`` of METHODS, and a scheme's
    quantizers of activations where it has some."""
    quantized = fake_quant.prepare(copy.deepcopy(model), **SCHEMES[scheme])
    if method == "RTN":
        return quantized
    how = SCHEMES[scheme]
    onto, search = (mx_nearest, mx_scale) if how["weight"] == "MXFP4" else (ptq.nearest, ptq.clip_scale)
    bits = 4 if onto is mx_nearest else int(how["weight"].removeprefix("int"))
    for name, layer in ptq.linears(quantized).items():
        w, group = layer.weight.data, how.get("group_size") or (32 if onto is mx_nearest else layer.in_features)
        if method == "searched scale":
            blocks, importance = w.reshape(-1, group), H[name].diag().float().expand_as(w).reshape(-1, group)
            layer.weight.data = onto(blocks, search(blocks, importance, bits, ptq.RATIOS), bits).view_as(w)
        else:
            layer.weight.data = ptq.gptq(w, H[name], bits, group, clip=True, order=method.endswith("order"),
                                         onto=onto, search=search)  # fmt: skip
        layer.weight_fake_quant = torch.nn.Identity()  # its own search would move the points
    return quantized


def bits_of(scheme: str) -> float:
    """Bits that a weight of the layers takes, with a 16-bit scale (MXFP4: 8 bits, NVFP4: 8 bits of 16 values)."""
    target, group = Target.of(SCHEMES[scheme]["weight"]), SCHEMES[scheme].get("group_size")
    bits = {"ternary": math.log2(3), "FP8": 8, "E4M3": 8, "MXFP4": 4, "NVFP4": 4}.get(str(target)) or target.fmt.bits
    return bits + ((16 if target.rule == "gguf" else 8) / target.block if target.block else 16 / group if group else 0)


def experiment(base, ids, tokens, schemes=SCHEMES, steps: int = 700, seeds=(0, 1, 2), batch_size: int = 16,
               context: int = 512, curve=(), held_out: int = 40):  # fmt: skip
    """Yield the rows of ``qat_recovery``: every arm of every scheme and seed (order of batches; -1: not trained).

    Arms after training are METHODS.  Schemes of TRAINED have trained arms, too; each is trained with three rates on the
    first seed, and goes on with the one that is nearest to the float model on the last ``held_out`` windows of the
    training text, which nobody trains on (rows of kind "rate").  A control is the float model trained as an arm "QAT"
    is, then rounded.  ``curve``: further numbers of steps, on the first seed.
    """
    device, how = next(base.parameters()).device, dict(batch_size=batch_size, context=context)
    ids, chosen_on = ids[: -held_out * CONTEXT], ids[-held_out * CONTEXT :]
    kept, kept_for_rates = (evaluate.logits_of(base, text, CONTEXT).to(device) for text in (tokens, chosen_on))
    H_of_base = hessians(base, ids)

    def trained(scheme, arm, rate, seed, steps):
        model = copy.deepcopy(base)
        if arm != "control":
            model = fake_quant.prepare(model, **SCHEMES[scheme], learned="LSQ" in arm)
        if gpu := device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        train(model, ids, steps, rate, seed=seed, teacher=base if "distilled" in arm else None, **how)
        return model, {"seconds": time.perf_counter() - began} | (
            {"peak_gib": torch.cuda.max_memory_allocated() / measure.GIB} if gpu else {})  # fmt: skip

    def row(scheme, arm, model, rival=None, seed=-1, rate=0.0, steps=0, **more):
        return dict(kind="result", scheme=scheme, arm=arm, seed=seed, rate=rate, steps=steps,
                    tokens_per_step=batch_size * context, bits_per_weight=bits_of(scheme), rival="GPTQ",
                    **evaluated(kept, model, tokens, rival), **more)  # fmt: skip

    for scheme in schemes:
        weight = SCHEMES[scheme]["weight"]
        methods = METHODS if weight.startswith("int") or weight == "MXFP4" else METHODS[:1]
        models = {method: after_training(base, scheme, method, H_of_base) for method in methods}
        with torch.no_grad():
            rival = window_klds(kept, models["GPTQ"], tokens)[1] if "GPTQ" in models else None
        for method, model in models.items():
            yield row(scheme, method, model, rival)
        if scheme not in TRAINED:
            continue

        def result(arm, model, rival=rival, scheme=scheme, **where):
            if arm != "control":
                return [row(scheme, arm, model, rival, **where)]
            return [row(scheme, arm, after_training(model, scheme, "RTN", None), rival, **where),
                    row(scheme, "control, GPTQ", after_training(model, scheme, "GPTQ", hessians(model, ids)), rival,
                        **where)]  # fmt: skip

        best = {}
        for arm in [arm for arm in ARMS if not ("LSQ" in arm and weight == "MXFP4")]:
            found = {}
            for rate in [RATES[scheme] * factor for factor in (1 / 3, 1, 3)]:
                model, cost = trained(scheme, arm, rate, seeds[0], steps)
                judged = after_training(model, scheme, "RTN", None) if arm == "control" else model
                with torch.no_grad():
                    held = window_klds(kept_for_rates, judged, chosen_on)[0].kld_mean
                found[rate] = held, model, cost
                yield dict(kind="rate", scheme=scheme, arm=arm, seed=seeds[0], rate=rate, steps=steps,
                           tokens_per_step=batch_size * context, kld_calibration=held)  # fmt: skip
            best[arm] = rate = min(found, key=lambda rate: found[rate][0])
            yield from result(arm, found[rate][1], seed=seeds[0], rate=rate, steps=steps, **found[rate][2])
            for seed in seeds[1:]:
                model, cost = trained(scheme, arm, rate, seed, steps)
                yield from result(arm, model, seed=seed, rate=rate, steps=steps, **cost)
        for arm in ("QAT, distilled", "QAT", "control") if scheme in ("W3", "W2") else ():
            for n in curve:
                model, cost = trained(scheme, arm, best[arm], seeds[0], n)
                yield from result(arm, model, seed=seeds[0], rate=best[arm], steps=n, **cost)


def record_recovery(full: bool) -> Path:
    """Run :func:`experiment` on all GPUs, one scheme a GPU at a time, and save ``qat_recovery`` as rows come."""
    if not torch.cuda.is_available():
        raise qtutor.QtutorError("Training so many arms takes a CUDA GPU, and there is none.")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "train.npy")
        np.save(text, corpus.tokens("train", course_model.load_tokenizer()))
        gpus, jobs, path = torch.cuda.device_count(), [], None
        others = [scheme for scheme in SCHEMES if scheme not in TRAINED]
        for gpu in range(min(gpus, len(TRAINED))):
            mine = [*others[gpu::gpus], *TRAINED[gpu::gpus]] if full else ["W3"]
            out = Path(folder, f"{gpu}.jsonl")
            command = [sys.executable, "-W", "ignore", "-m", "tools.record_qat", str(out), str(text), str(int(full))]
            jobs.append((out, subprocess.Popen([*command, *mine],
                                               env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)})))  # fmt: skip
        while True:
            running = any(job.poll() is None for _, job in jobs)
            rows = [json.loads(line) for out, _ in jobs if out.exists() for line in out.read_text().splitlines()]
            if rows:
                for name, kind in (("qat_rates", "rate"), ("qat_recovery", "result")):
                    some = [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == kind]
                    if some:
                        path = keep(results.save(name, some, profile="full" if full else "quick"))
            if not running:
                return path
            time.sleep(5)


def worker(out: str, text: str, full: str, *schemes: str) -> None:
    """What one GPU runs: rows of its schemes into ``out``, one a line."""
    base, tokenizer = course_model.load(dtype=torch.float32, device="cuda"), course_model.load_tokenizer()
    size = dict(curve=(70, 210, 2100)) if int(full) else dict(steps=20, seeds=(0,))
    for row in experiment(base, np.load(text), corpus.tokens("eval", tokenizer), schemes, **size):
        with open(out, "a") as file:
            print(json.dumps(row, default=float), file=file)


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


RECORDS = {"qat_recovery": record_recovery, "qat_rates": record_recovery, "qat_gguf": record_gguf,
           "fake_quant_speed": record_speed}  # fmt: skip

if __name__ == "__main__":
    worker(*sys.argv[1:]) if sys.argv[1:] else train_q4_0()
