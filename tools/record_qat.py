"""Record what quantization-aware training gives back: results ``qat_recovery`` and ``qat_gguf``, and the Q4_0 model.

The trained arms are those of qtutor.qat; the others are llama.cpp's, and those of the lesson on quantization after
training by the functions of its cells.  :func:`train` is the loop of the QAT notebook (a test holds one to the other);
on a GPU it replays a CUDA graph, because a step of so small a model is otherwise the time that Python takes to launch
it.  ``python -m tools.record_qat --arms ptq`` records the arms that are not trained, ``--arms training`` the others, if
you like at the same time: both add to one file.  Without arguments data/qat/course_model_q4_0.safetensors is trained.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import operator
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
from qtutor import corpus, course_model, evaluate, fake_quant, gguf_export, llamacpp, measure, packed, ptq, results
from qtutor.files import ROOT, whole
from qtutor.formats import E4M3, nvfp4_scales
from qtutor.qat import Q4_0_FILE, Q4_0_TENSORS, SCHEMES, load_q4_0
from qtutor.rigs.decoding import llama_logits
from qtutor.ste import Target, find_grid

from . import keep
from .fetch_model import dequantized
from .record_llmcompressor import lesson

RATES = {"W4A16": 3e-4, "W3": 5e-4, "W2": 1e-3, "MXFP4": 3e-4}  # tried: a third of it, it, three times it
TRAINED = tuple(RATES)
AFTER = SCHEMES | {"W8A16": dict(weight="int8"),  # to what models are rounded without training
                   **{f"{name} weights": dict(weight=name) for name in ("FP8", "MXFP4", "NVFP4")},
                   **{f"{name} g128": SCHEMES[name] | {"group_size": 128} for name in ("W4A16", "W3")}}  # fmt: skip
METHODS = ("RTN", "searched scale", "GPTQ", "GPTQ, activation order", "GPTQ, no clipping", "AWQ", "AWQ, searched scale",
           "rotation, RTN", "rotation, GPTQ")  # GPTQ has searched scales, but for "no clipping"  # fmt: skip
K_QUANTS = {"W4A16": "Q4_K", "W3": "Q3_K", "W2": "Q2_K"}  # scheme: llama.cpp's type of that size
ARMS = "control", "QAT", "QAT, LSQ", "QAT, distilled", "QAT, distilled, LSQ"
ORDER = [*METHODS, "K-quant", "K-quant, imatrix", "control", "control, GPTQ", *ARMS[1:]]  # of a file's rows
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
def window_klds(kept, model, tokens):
    """The comparison of ``model`` with the float model, whose logits are ``kept``, and its mean KLD of each window."""
    targets, parts = evaluate.targets_of(tokens, CONTEXT), evaluate.iter_logits(model, tokens, CONTEXT)
    if isinstance(model, torch.nn.Module):  # 16 windows at a time: one alone leaves a GPU waiting for Python
        ids = torch.from_numpy(evaluate.windows(tokens, CONTEXT)).to(kept.device)
        parts = (llama_logits(model, part)[:, :-1].flatten(0, 1) for part in ids.split(16))
    found = evaluate.compare(kept, parts, targets)
    return found, found.token_kld.reshape(-1, CONTEXT - 1).mean(1)


def columns(found, klds, rival=None) -> dict:
    """Columns of a result, from what :func:`window_klds` found.  ``rival``: each window's KLD of what is compared."""
    row = {**{name: round(found.row()[name], 6) for name in KEPT}, "kld_mean_se_windows": stats.sem(klds),
           "scored_tokens": found.scored_tokens, "windows": len(klds), "perplexity_ratio_se_windows":
           found.perplexity_ratio * evaluate.standard_error(found.token_dnll, CONTEXT - 1)}  # fmt: skip
    if rival is not None:
        row |= {"kld_less_rival": (klds - rival).mean(), "kld_less_rival_se": stats.sem(klds - rival)}
    return row | {"text": corpus.fingerprint(corpus.eval_text())}


def grid_of(target: Target, whole=None):
    """Functions like ptq.nearest and ptq.clip_scale, on the grid of ``target``.  ``whole``: NVFP4's scale of a tensor,
    where the blocks are only a part of it."""
    if target.rule == "amax" and not target.is_float:
        return ptq.nearest, ptq.clip_scale

    def nearest(blocks, scale, bits):
        return target.fmt.round((blocks / scale).clamp(target.quant_min, target.quant_max)) * scale

    def search(blocks, importance, bits, ratios=ptq.RATIOS):
        if len(ratios) > 1:  # a power of two has neighbours; ternary's mean magnitude is the least that is tried
            ratios = {"mx": (0.5, 1, 2), "absmean": [2 * ratio for ratio in ratios]}.get(target.rule, ratios)
        amax, scale = blocks.abs().amax(1, keepdim=True), find_grid(blocks, target).scale
        scale = amax / target.quant_max if target.rule == "nvfp4" else scale
        tried = scale * torch.tensor(ratios, device=scale.device)[:, None, None]
        if target.rule == "nvfp4":
            of_all = nvfp4_scales(amax)[1] if whole is None else whole
            tried = E4M3.round((tried / of_all).clamp(min=E4M3.min_normal)) * of_all
        tried = tried.half().float() if target.rule == "gguf" else tried
        losses = ((nearest(blocks, tried, bits) - blocks).square() * importance).sum(2, keepdim=True)
        return tried.gather(0, losses.argmin(0, keepdim=True))[0]

    return nearest, search


@torch.no_grad()
def after_training(model, scheme: str, method: str, seen: dict | None = None, use: dict | None = None):
    """A copy of a float ``model``, its layers rounded by ``method`` of METHODS (a rotation is the caller's), with a
    scheme's quantizers of activations.  ``use``: the lesson's functions; ``seen``: what its ``watch`` has found."""
    how, quantized = AFTER[scheme], fake_quant.prepare(copy.deepcopy(model), **AFTER[scheme])
    if method == "RTN":
        return quantized
    target, layers = Target.of(how["weight"]), ptq.linears(quantized)
    for source, s in seen.items():
        names = use["readers"](layers, source)
        w = torch.cat([layers[name].weight.data for name in names])  # no row of a weight touches another
        group, bits = target.block or how.get("group_size") or w.shape[1], target.bits
        whole = nvfp4_scales(w.abs().reshape(-1, group).amax(1))[1] if "GPTQ" in method else None
        nearest, search = grid_of(target, whole)
        use |= {"GROUP": group, "nearest": nearest, "clip_scale": search,
                "scale_of": lambda blocks, bits, ratio=1, search=search: search(blocks, 1, bits, (ratio,))}  # fmt: skip
        if method == "searched scale":
            q = use["clipped"](w, bits, group, s.H.diag())
        elif "AWQ" in method:
            q = use["awq_of"](w, s, bits, source, clip="searched" in method)
        else:
            q = ptq.gptq(w, s.H, bits, group, clip="no clipping" not in method, order="order" in method,
                         onto=nearest, search=search)  # fmt: skip
        for name, part in zip(names, q.split([len(layers[name].weight) for name in names]), strict=True):
            layers[name].weight.data = part.clone()
            layers[name].weight_fake_quant = torch.nn.Identity()  # its own search would move the points
    return quantized


@torch.no_grad()
def k_quant(model, kind: str, imatrix=None):
    """(a copy of ``model`` with the weights of its layers as llama.cpp rounds them to ``kind``, bits of a weight)."""
    quantized, tokenizer = copy.deepcopy(model), course_model.load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        source = gguf_export.export(copy.deepcopy(model).cpu(), Path(folder) / "f32.gguf", tokenizer=tokenizer)
        file = llamacpp.quantize(source, Path(folder) / "k.gguf", kind, imatrix, {r"blk\..*\.weight$": kind})
        found = llamacpp.check_gguf(file)
        weights = dequantized(found, gguf_export.hyperparameters(model.config.to_dict()))
        held = [t for t in found.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    if {t.type for t in held} != {kind}:
        raise qtutor.QtutorError(f"llama.cpp gave some layers other types than {kind}: its blocks do not fit them.")
    for name, layer in ptq.linears(quantized).items():
        layer.weight.copy_(torch.from_numpy(weights[f"{name}.weight"]))
    return quantized, 8 * sum(t.nbytes for t in held) / sum(math.prod(t.shape) for t in held)


def next_rate(middle: float, found: dict):
    """The rate to try next: three around ``middle``, then up to two beyond them while the best of those ``found``,
    {rate: (KLD, ...)}, is at an end.  None where there is no next."""
    if len(found) < 3:
        return middle * (1 / 3, 1, 3)[len(found)]
    best = min(found, key=lambda rate: found[rate][0])
    beyond = best / 3 if best == min(found) else best * 3 if best == max(found) else None
    return beyond if len(found) < 5 else None


def experiment(base, ids, tokens, schemes=AFTER, steps: int = 700, seeds=(0, 1, 2), batch_size: int = 16,
               context: int = 512, curve=(), held_out: int = 40, calibration: int = 64, arms: str = "all"):  # fmt: skip
    """Yield the rows of ``qat_recovery``: every arm of every scheme and seed (order of batches; -1: not trained).

    Arms after training are METHODS and K_QUANTS.  Schemes of TRAINED have trained arms, too; each tries the rates of
    :func:`next_rate` on the first seed, and goes on with the one that is nearest to the float model on the last
    ``held_out`` windows of the training text, which nobody trains on (rows of kind "rate").  A control is the float
    model trained as an arm "QAT" is, then rounded.  ``curve``: further numbers of steps, on the first seed.  ``arms``:
    "ptq" or "training" for one half (GPTQ is in both: all are compared with it).
    """
    device, how = next(base.parameters()).device, dict(batch_size=batch_size, context=context)
    ids, chosen_on = ids[: -held_out * CONTEXT], ids[-held_out * CONTEXT :]
    kept, kept_for_rates = (evaluate.logits_of(base, text, CONTEXT).to(device) for text in (tokens, chosen_on))
    use, seen_by_all = lesson(base), evaluate.windows(ids[: calibration * CONTEXT], CONTEXT)
    plain = base, use["watch"](base, seen_by_all)
    compared = functools.partial(window_klds, kept, tokens=tokens)
    if arms != "training":
        rotated = use["rotate"](base)
        rotated = rotated, use["watch"](rotated, seen_by_all)
        imatrix = llamacpp.native() and llamacpp.imatrix(base, seen_by_all, CONTEXT)

    def rounded(scheme, method):
        model, seen = rotated if method.startswith("rotation") else plain
        return compared(after_training(model, scheme, method.removeprefix("rotation, "), seen, use))

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

    for scheme in schemes:
        gptq, stored = rounded(scheme, "GPTQ"), copy.deepcopy(base).to("cpu", torch.bfloat16)  # 16-bit scales
        stored = ptq.linears(packed.convert(fake_quant.prepare(stored, **AFTER[scheme]))).values()
        size = operator.truediv(*measure.stored_bytes(torch.nn.ModuleList(stored)))

        def row(arm, found, seed=-1, rate=0.0, steps=0, scheme=scheme, rival=gptq[1], bits=8 * size, **more):
            return dict(kind="result", scheme=scheme, arm=arm, seed=seed, rate=rate, steps=steps,
                        tokens_per_step=batch_size * context, bits_per_weight=bits, rival="GPTQ",
                        **columns(*found, rival), **more)  # fmt: skip

        for method in METHODS if arms != "training" else ["GPTQ"]:
            if not ("AWQ" in method and "activation" in AFTER[scheme]):  # AWQ is for weights alone
                yield row(method, gptq if method == "GPTQ" else rounded(scheme, method))
        if arms != "training" and scheme in K_QUANTS:
            for arm, matrix in (("K-quant", None), ("K-quant, imatrix", imatrix)):
                model, bits = k_quant(base, K_QUANTS[scheme], matrix)
                yield row(arm, compared(model), bits=bits, type=K_QUANTS[scheme])
        if arms == "ptq" or scheme not in TRAINED:
            continue

        def result(arm, model, scheme=scheme, row=row, **where):
            if arm != "control":
                return [row(arm, compared(model), **where)]
            by_gptq = after_training(model, scheme, "GPTQ", use["watch"](model, seen_by_all), use)
            return [row(arm, compared(after_training(model, scheme, "RTN")), **where),
                    row("control, GPTQ", compared(by_gptq), **where)]  # fmt: skip

        best = {}
        for arm in [arm for arm in ARMS if not ("LSQ" in arm and scheme == "MXFP4")]:
            found = {}
            while rate := next_rate(RATES[scheme], found):
                found[rate] = (math.inf,)
                with contextlib.suppress(qtutor.QtutorError):  # it may explode
                    model, cost = trained(scheme, arm, rate, seeds[0], steps)
                    judged = after_training(model, scheme, "RTN") if arm == "control" else model
                    found[rate] = window_klds(kept_for_rates, judged, chosen_on)[0].kld_mean, model, cost
                    yield dict(kind="rate", scheme=scheme, arm=arm, seed=seeds[0], rate=rate, steps=steps,
                               tokens_per_step=batch_size * context, kld_calibration=found[rate][0])  # fmt: skip
            best[arm] = rate = min(found, key=lambda rate: found[rate][0])
            for seed in seeds:
                model, cost = found[rate][1:] if seed == seeds[0] else trained(scheme, arm, rate, seed, steps)
                yield from result(arm, model, seed=seed, rate=rate, steps=steps, **cost)
        for arm in ("QAT, distilled", "QAT", "control") if scheme in ("W3", "W2") else ():
            for n in curve:
                model, cost = trained(scheme, arm, best[arm], seeds[0], n)
                yield from result(arm, model, seed=seeds[0], rate=best[arm], steps=n, **cost)


def earlier(name: str, full: bool, directory=None, **about) -> list[dict]:
    """The rows of results ``name`` of this machine, to which others may be added; raises QtutorError where they have
    another device, another profile, or other columns than ``about`` (text, windows)."""
    folder = results.machine_folder()
    if not results.exists(name, folder, directory):
        return []
    found, device = results.load(name, folder, directory), results.machine()["device"]
    pairs = [("device", found.device, device), ("profile", found.profile, "full" if full else "quick"),
             *((key, row.get(key, value), value) for row in found.rows for key, value in about.items())]  # fmt: skip
    if other := [f"{key} {there}, here it is {here}" for key, there, here in pairs if there != here]:
        raise qtutor.QtutorError(f"{folder}/{name}.json holds rows of {other[0]}: move the file away first.")
    return found.rows


def add(name: str, rows: list[dict], full: bool, directory=None) -> Path:
    """Save ``rows`` beside the rows of the same file that they do not replace, also while another process adds to it.
    What a difference is taken from is the GPTQ that the file then has: the same windows, so the means subtract."""
    import fcntl

    def key(row):
        return (list(AFTER).index(row["scheme"]), ORDER.index(row["arm"]), -row["steps"], row["seed"],
                float(f"{row['rate']:.2g}") if name == "qat_rates" else 0)  # fmt: skip

    with open(__file__) as lock:  # the same for all processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        about = {what: rows[0][what] for what in ("text", "windows") if what in rows[0]}
        rows = [{column: value for column, value in row.items() if column != "kind"} for row in rows]
        found = {key(row): row for row in [*earlier(name, full, directory, **about), *rows]}
        gptq = {row["scheme"]: row["kld_mean"] for row in found.values() if row["arm"] == "GPTQ"}
        for row in found.values():
            less = row.get("kld_mean", 0) - gptq.get(row["scheme"], 0)
            if abs(row.get("kld_less_rival", less) - less) > 2e-6 + 1e-5 * row.get("kld_mean", 0):  # no rounding
                row["kld_less_rival"] = less
        ordered = [found[place] for place in sorted(found)]
        return keep(results.save(name, ordered, profile="full" if full else "quick", directory=directory))


def record_recovery(full: bool, arms: str = "all", directory=None) -> Path:
    """Run :func:`experiment` on all GPUs, one scheme a GPU at a time, and add rows to ``qat_recovery`` as they come."""
    if not torch.cuda.is_available():
        raise qtutor.QtutorError("Training so many arms takes a CUDA GPU, and there is none.")
    earlier("qat_recovery", full, directory, text=corpus.fingerprint(corpus.eval_text()))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    others = [scheme for scheme in AFTER if scheme not in TRAINED and arms != "training"]
    with tempfile.TemporaryDirectory() as folder:
        text, jobs, path, saved = Path(folder, "train.npy"), [], None, 0
        np.save(text, corpus.tokens("train", course_model.load_tokenizer()))
        for number, gpu in enumerate(gpus[: len(others) + len(TRAINED) if full else 1]):
            mine = [*others[number :: len(gpus)], *TRAINED[number :: len(gpus)]] if full else ["W3"]
            out, command = Path(folder, f"{gpu}.jsonl"), [sys.executable, "-W", "ignore", "-m", "tools.record_qat"]
            jobs.append((out, subprocess.Popen([*command, out, text, str(int(full)), arms, *mine],
                                               env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu})))  # fmt: skip
        while True:
            running = any(job.poll() is None for _, job in jobs)
            rows = [json.loads(line) for out, _ in jobs if out.exists() for line in out.read_text().splitlines()]
            for kind, name in (("rate", "qat_rates"), ("result", "qat_recovery")) if len(rows) > saved else ():
                if some := [row for row in rows if row["kind"] == kind]:
                    path = add(name, some, full, directory)
            saved = len(rows)
            if not running:
                break
            time.sleep(5)
    if failed := sum(job.returncode != 0 for _, job in jobs):
        raise qtutor.QtutorError(f"{failed} of {len(jobs)} processes stopped early (why is above).")
    return path


def worker(out: str, text: str, full: str, arms: str, *schemes: str) -> None:
    """What one GPU (or, for a try, a CPU) runs: rows of its schemes into ``out``, one a line."""
    base = course_model.load(dtype=torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")
    tokens, size = corpus.tokens("eval", course_model.load_tokenizer()), dict(curve=(70, 210, 2100))
    if not int(full):
        tokens, size = tokens[: 4 * CONTEXT], dict(steps=20, seeds=(0,), batch_size=4, held_out=4, calibration=4)
    for row in experiment(base, np.load(text), tokens, schemes, arms=arms, **size):
        with open(out, "a") as file:
            print(json.dumps(row, default=float), file=file)


def gguf_rows(base, tokens, trained, types=("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"), matrix=None):
    """Yield the rows of ``qat_gguf``: the float model in llama.cpp's types ("PTQ"), in the first three by an importance
    ``matrix`` ("PTQ, imatrix"; this Q4_K_M is the rival of later rows), in Q4_0 with QAT's 8-bit head ("PTQ, head in
    Q8_0"), and in that layout each trained model ("QAT") of ``trained``, {seed: file}."""
    kept, tokenizer, rival = evaluate.logits_of(base, tokens, CONTEXT), course_model.load_tokenizer(), None
    models = [("PTQ", -1, base, types, None, None), ("PTQ, imatrix", -1, base, types[: 3 * bool(matrix)], None, matrix),
              ("PTQ, head in Q8_0", -1, base, ["Q4_0"], Q4_0_TENSORS, None),
              *(("QAT", seed, load_q4_0(path), ["Q4_0"], Q4_0_TENSORS, None) for seed, path in trained.items())]
    with tempfile.TemporaryDirectory() as folder:
        for name, seed, model, kinds, layout, by in models:
            source = gguf_export.export(model, Path(folder) / "f32.gguf", tokenizer=tokenizer)
            for kind in kinds:
                file = llamacpp.quantize(source, Path(folder) / f"{kind}.gguf", kind, by, layout)
                with llamacpp.Model(file) as quantized:
                    found, klds = window_klds(kept, quantized, tokens)
                yield {"model": name, "type": kind, "seed": seed, "file_mb": file.stat().st_size / 1e6,
                       "bits_per_weight": llamacpp.bits_per_weight(file), **columns(found, klds, rival)}
                rival = klds if by and kind == "Q4_K_M" else rival


def record_gguf(full: bool) -> Path:
    """Save ``qat_gguf``; raises QtutorError where llama.cpp is not here."""
    base, tokenizer = course_model.load(), course_model.load_tokenizer()
    seen = corpus.tokens("train", tokenizer, ("logging", "unittest", "email", "asyncio"), progress=False)
    matrix = llamacpp.imatrix(base, seen[: (64 if full else 2) * CONTEXT], CONTEXT)
    rows = gguf_rows(base, corpus.tokens("eval", tokenizer)[: None if full else 1026], {0: Q4_0_FILE}, matrix=matrix)
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
    subprocess.run([sys.executable, ROOT / "bench" / "bench_fake_quant.py", "--save", *rows], check=True)
    return results.RESULTS / results.machine_folder() / "fake_quant_speed.json"


RECORDS = {"qat_recovery": record_recovery, "qat_rates": record_recovery, "qat_gguf": record_gguf,
           "fake_quant_speed": record_speed}  # fmt: skip

if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            train_q4_0()
        case ["--arms", ("all" | "ptq" | "training") as arms]:
            print(record_recovery(qtutor.profile() == "full", arms))
        case job:
            worker(*job)
