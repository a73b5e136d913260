"""Record where llama.cpp's bits go: ``tensor_sensitivity`` (KLD of each tensor alone in each type, and mixtures chosen
by it at the sizes of llama.cpp's own), ``kv_cache_quality`` (of quantized keys and values), ``imatrix_search``."""

from __future__ import annotations

import os
import re
import tempfile
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtutor import corpus, course_model, evaluate, gguf_export, llamacpp, results
from qtutor.checkpoints import fetch
from qtutor.decide import mixture

from .record_gguf import CALIBRATION, interval

KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
RIVALS = ("Q4_K_M", "Q4_K_S", "Q3_K_M", "Q3_K_S")


def record_sensitivity(full: bool = True, *, directory=None) -> Path:
    """Scores on training text, mixtures chosen by them, all scored on the evaluation text; all with the same matrix."""
    ctx, model, tokenizer = 512, course_model.load(), course_model.load_tokenizer()
    seen = corpus.tokens("train", tokenizer, packages=CALIBRATION, progress=False)
    scored = (8 if full else 2) * ctx  # text that the matrix has not seen
    importance = llamacpp.imatrix(model, seen[: (200 if full else 4) * ctx][: len(seen) - scored], ctx=ctx)
    chosen = seen[-scored:]
    cut = evaluate.windows(corpus.tokens("eval", tokenizer), ctx)
    held = cut[:: 1 if full else len(cut) // 3].ravel()
    base, rows = evaluate.logits_of(model, chosen, ctx), []
    about = {"windows": len(held) // ctx, "text": corpus.fingerprint(corpus.eval_text())}
    own = {name: x.detach().clone() for name, x in model.named_parameters()}  # a tied head is the embedding, once

    def kld(state, tokens=chosen, reference=base) -> np.ndarray:
        model.load_state_dict(own | {name: x for name, x in state.items() if name in own}, strict=False)
        return evaluate.compare_models(reference, model, tokens, ctx).token_kld

    with tempfile.TemporaryDirectory(prefix="qtutor-bits-") as folder:
        folder = Path(folder)
        f32 = gguf_export.export(model, folder / "f32.gguf", tokenizer=tokenizer, name="course-model")

        def loaded(path) -> dict:
            return AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype="float32").state_dict()

        states, tables = {}, {}
        for kind in KINDS:
            path = llamacpp.quantize(f32, folder / f"{kind}.gguf", "Q4_K_S", imatrix=importance,
                                     tensor_types={r"\.weight$": kind})  # each matrix, norms stay F32
            states[kind] = loaded(path)
            tables[kind] = {t["name"]: t for t in llamacpp.tensor_table(path)}
        names = {gguf_export.gguf_name(name): name for name, x in own.items() if x.ndim == 2}
        for name, hf in tqdm(names.items(), desc="tensors", leave=False):
            for kind in KINDS:
                found = kld({hf: states[kind][hf]})
                rows.append({"tensor": name, "type": tables[kind][name]["type"],
                             "stored_bytes": tables[kind][name]["bytes"],
                             **interval(found, "kld_mean", ctx - 1)})  # fmt: skip
        scores, sizes = (np.reshape([row[key] for row in rows], (len(names), len(KINDS)))
                         for key in ("kld_mean", "stored_bytes"))  # fmt: skip
        known = {(row["tensor"], row["type"]): row["kld_mean"] for row in rows}
        model.load_state_dict(own, strict=False)
        far, klds = evaluate.logits_of(model, held, ctx), {}

        def add(label, path, predicted=None, rival=None, imatrix=True):
            state = loaded(path)
            near, klds[label] = kld(state), kld(state, held, far)
            row = {"mixture": label, "imatrix": imatrix, "file_bytes": path.stat().st_size, "kld_predicted": predicted,
                   "bits_per_weight": llamacpp.bits_per_weight(path), **about}  # fmt: skip
            row |= interval(near, "kld_calibration", ctx - 1) | interval(klds[label], "kld_mean", ctx - 1)
            if rival is not None:
                row |= {"rival": rival} | interval(klds[label] - klds[rival], "kld_less_rival", ctx - 1)
            rows.append(row)

        def predict(path) -> float | None:  # the sum of its types' scores, None where one has no score
            kinds = {t["name"]: t["type"] for t in llamacpp.tensor_table(path)}
            found = [known.get((name, kinds[name])) for name in names]
            return None if None in found else float(sum(found))

        for rival in RIVALS:
            plain = llamacpp.quantize(f32, folder / "plain.gguf", rival)
            add(rival, plain, imatrix=False)
            informed = llamacpp.quantize(f32, folder / f"{rival}.gguf", rival, imatrix=importance)
            add(f"{rival}, imatrix", informed, predict(informed))
            table = {t["name"]: t for t in llamacpp.tensor_table(informed)}
            types = mixture.choose(scores, sizes, sum(table[name]["bytes"] for name in names))
            overrides = {f"^{re.escape(n)}$": KINDS[k] for n, k in zip(names, types, strict=True)}
            made = llamacpp.quantize(f32, folder / "made.gguf", rival, imatrix=importance, tensor_types=overrides)
            add(f"by scores, size of {rival}", made, predict(made), f"{rival}, imatrix")
        for kind in KINDS:
            path = folder / f"{kind}.gguf"
            add(f"all {kind}", path, predict(path))
    return results.save("tensor_sensitivity", rows, profile="full" if full else "quick", directory=directory)


def record_kv(full: bool = True, *, directory=None) -> Path:
    """KLD from an F32 cache without fused attention; weights F16.  The same tokens at a short and at a long context."""
    rows, text = [], corpus.fingerprint(corpus.eval_text())
    models = [("course model", course_model.load(), course_model.load_tokenizer(), (512, 1024), 8)]
    if full and (source := fetch.folder()) is not None:
        models.append((source.name, source, AutoTokenizer.from_pretrained(source), (512, 2048), 2))
    for name, model, tokenizer, contexts, windows in models:
        ids, block = corpus.tokens("eval", tokenizer)[: (windows if full else 2) * contexts[-1]], contexts[0] - 1
        with tempfile.TemporaryDirectory(prefix="qtutor-kv-") as folder:
            extra = {"tokenizer": tokenizer, "name": name} if isinstance(model, torch.nn.Module) else {}
            file = gguf_export.export(model, Path(folder) / "f16.gguf", "f16", **extra)
            for ctx in contexts:
                with llamacpp.Model(file, ctx=ctx) as original:
                    bos = evaluate.bos_of(original)
                    base = evaluate.logits_of(original, ids, ctx, bos=bos)
                for kind in tqdm(("F16", "Q8_0", "Q5_1", "Q4_0"), desc=f"{name}, {ctx} tokens", leave=False):
                    for rotated in (True, False) if kind != "F16" else (False,):
                        with (patch.dict(os.environ, LLAMA_ATTN_ROT_DISABLE=str(int(not rotated))),
                              llamacpp.Model(file, ctx=ctx, exact=False, kv_type=kind) as quantized):
                            found = evaluate.compare_models(base, quantized, ids, ctx, bos=bos)
                        rows.append({"model": name, "ctx": ctx, "kv_type": kind, "rotation": rotated,
                                     "scored_tokens": len(found.token_kld), "block": block, "text": text,
                                     **interval(found.token_kld, "kld_mean", block)})  # fmt: skip
    return results.save("kv_cache_quality", rows, profile="full" if full else "quick", directory=directory)


def record_search(full: bool = True, *, directory=None) -> Path:
    """What changes when llama.cpp searches for scales (a matrix of ones) and weighs columns, too (a real one)."""
    ctx, model, tokenizer, base, rows = 512, course_model.load(), course_model.load_tokenizer(), [], []
    seen = corpus.tokens("train", tokenizer, packages=CALIBRATION, progress=False)[: (200 if full else 2) * ctx]
    cut = evaluate.windows(corpus.tokens("eval", tokenizer), ctx)[:: 1 if full else 40]

    def measured(path) -> np.ndarray:  # of each token: KLD, entropy, nll, nll with logits / 1.1
        parts = []
        with llamacpp.Model(path, ctx=ctx, exact=False) as run:
            every = evaluate.iter_logits(run, cut.ravel(), ctx, bos=evaluate.bos_of(run))
            for n, (logits, true) in enumerate(zip(every, torch.from_numpy(cut[:, 1:]), strict=True)):
                logp, nll = logits.log_softmax(-1), [evaluate.token_nll(logits / heat, true) for heat in (1, 1.1)]
                base[n:] = base[n:] or [logp]  # of the first file that is measured
                parts.append([(base[n].exp() * (base[n] - logp)).sum(-1), -(logp.exp() * logp).sum(-1), *nll])
        return np.concatenate([torch.stack(part) for part in parts], 1)

    with tempfile.TemporaryDirectory(prefix="qtutor-search-") as folder:
        f32 = gguf_export.export(model, Path(folder) / "f32.gguf", tokenizer=tokenizer, name="course-model")
        original, real = measured(f32), llamacpp.imatrix(model, seen, ctx)
        arms = {"without": None, "ones": {name: 0 * x + 1 for name, x in real.items()}, "imatrix": real}
        names = ("kld_mean", "entropy_diff", "nll_less_rival", "nll_hot_less_rival")
        for kind, (arm, matrix) in product(("Q4_0", "Q5_0", "Q5_K_S"), arms.items()):
            found = measured(llamacpp.quantize(f32, Path(folder) / "made.gguf", kind, imatrix=matrix))
            plain = found if arm == "without" else plain  # noqa: F821 - the first arm of each type
            rows.append({"type": kind, "arm": arm, "windows": len(cut), "text": corpus.fingerprint(corpus.eval_text())})
            for name, values, other in zip(names, found, (0, original[1], *plain[2:]), strict=True):
                rows[-1] |= interval(values - other, name, ctx - 1)
    return results.save("imatrix_search", rows, profile="full" if full else "quick", directory=directory)


RECORDS = {"tensor_sensitivity": record_sensitivity, "kv_cache_quality": record_kv, "imatrix_search": record_search}
