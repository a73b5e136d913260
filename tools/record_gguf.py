"""Record what llama.cpp's types cost: ``gguf_quality`` (course model), ``smollm2_quality``, ``smollm2_chat`` (SmolLM2).

    make results ONLY=gguf_quality         # the whole evaluation text: a quarter of an hour on two cores
    make results ONLY=smollm2_quality      # after python -m qtutor model fetch smollm2: a quarter of an hour
    make results ONLY=smollm2_chat         # as long

``smollm2_quality`` has no original to compare with.  Its yardstick, ``F16``, is the downloaded Q4_1 file dequantized: a
row says what a second quantization costs, on top of what the first one did, which nobody can measure from this file.

Not every type uses the importance matrix.  Those that do not (``Q8_0``, the ternary, 1-bit and block float types) give
the same file with and without it: they have one row, marked ``imatrix_ignored``.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from qtutor import QtutorError, corpus, course_model, evaluate, gguf_export, llamacpp, paired, results
from qtutor.checkpoints import fetch
from qtutor.decide import gate

CALIBRATION = ("logging", "unittest", "email", "asyncio", "concurrent", "http", "json", "xml")  # in every Python


def percentile_se(values, percent: float) -> float:
    """Standard error of a percentile of ``values`` (n,), without assuming a distribution.

    How many of n values fall below the true percentile is binomial, with standard deviation sqrt(n q (1 - q)): half
    the distance between the values so many ranks to either side is the error of the percentile.  With few values
    the upper rank ends at the largest one, and the error is then a lower bound.
    """
    values, q = np.sort(np.asarray(values, dtype=np.float64).ravel()), percent / 100
    middle, spread = q * (len(values) - 1), math.sqrt(len(values) * q * (1 - q))
    low, high = np.interp([middle - spread, middle + spread], np.arange(len(values)), values)
    return float(high - low) / 2


def over_windows(values, ctx: int) -> float | None:
    """Standard error over whole windows: what neighbours share no longer makes it look small; None for one window."""
    return evaluate.standard_error(values, block=ctx - 1) if len(values) >= 2 * (ctx - 1) else None


def measure(path, name: str, imatrix: bool, base, tokens, ctx: int, bos):
    """One row of the table, and the :class:`qtutor.evaluate.Comparison` it comes from.

    ``base``: logits of the unquantized file, float32 (n, vocab), made with ``exact=False`` from the same ``tokens``.
    """
    with llamacpp.Model(path, ctx=ctx, exact=False) as model:
        found = evaluate.compare_models(base, model, tokens, ctx, bos=bos)
    row = {"type": name, "imatrix": imatrix, "bits_per_weight": llamacpp.bits_per_weight(path),
           "file_bytes": Path(path).stat().st_size, "ctx": ctx, **found.row(), "scored_tokens": len(found.token_kld),
           "kld_p999_se": percentile_se(found.token_kld, 99.9),
           "kld_mean_se_windows": over_windows(found.token_kld, ctx)}  # fmt: skip
    return row, found


def same_tensors(one, other) -> bool:
    """True when two GGUF files hold the same tensors, byte for byte (their metadata may differ)."""
    def content(path):
        data = np.memmap(path, mode="r")
        return [(t.name, t.type, t.shape, bytes(data[t.offset : t.offset + t.nbytes]))
                for t in llamacpp.check_gguf(path).tensors]  # fmt: skip

    return content(one) == content(other)


def measure_types(f32, base, tokens, importance, folder: Path, names, ctx: int, bos):
    """Yield a row for each of ``names``, first without and then with the importance matrix.

    A type that ignores the matrix gets no second row.  Where there are two rows, the second has ``imatrix_gain``:
    the mean KLD that the matrix took away, with the error of paired values.
    """
    extra = {"imatrix_ignored": False, "imatrix_gain": None, "imatrix_gain_se": None, "imatrix_gain_se_windows": None}
    for name in tqdm(names, desc="types", leave=False):
        plain, informed, without = folder / "plain.gguf", folder / "informed.gguf", None
        llamacpp.quantize(f32, informed, name, imatrix=importance)
        if not llamacpp.TYPES[name].needs_imatrix:
            llamacpp.quantize(f32, plain, name)
            ignored = same_tensors(plain, informed)
            row, without = measure(plain, name, False, base, tokens, ctx, bos)
            yield row | extra | {"imatrix_ignored": ignored}
            if ignored:
                continue
        row, found = measure(informed, name, True, base, tokens, ctx, bos)
        gain = {}
        if without is not None:
            better = without.token_kld - found.token_kld
            gain = {"imatrix_gain": float(better.mean()), "imatrix_gain_se": evaluate.standard_error(better),
                    "imatrix_gain_se_windows": over_windows(better, ctx)}  # fmt: skip
        yield row | extra | gain


def record(full: bool = True, *, windows: int | None = None, ctx: int = 512, calibration: int = 200, names=None,
           directory=None) -> Path:
    """Measure the types (every one but F32 by default) on the course model and save ``gguf_quality``; return its path.

    ``windows``: so many windows of the evaluation text, spread evenly; by default all, and 4 where not ``full``.
    ``calibration``: windows of docstrings for the importance matrix.  The logits of the F32 file are kept: 4 bytes
    times the vocabulary for each token.
    """
    names = [llamacpp.file_type(n).name for n in names or llamacpp.TYPES if n != "F32"]
    model, tokenizer = course_model.load(), course_model.load_tokenizer()
    cut = evaluate.windows(corpus.tokens("eval", tokenizer), ctx)
    windows = min(windows or (len(cut) if full else 4), len(cut))
    tokens = cut[:: len(cut) // windows][:windows].ravel()
    text = corpus.tokens("train", tokenizer, packages=CALIBRATION, progress=False)[: calibration * ctx]
    about = {"windows": windows, "calibration_tokens": len(text) // ctx * ctx,
             "text": corpus.fingerprint(corpus.eval_text())}  # fmt: skip
    importance = llamacpp.imatrix(model, text, ctx=ctx)
    with tempfile.TemporaryDirectory(prefix="qtutor-quality-") as folder:
        f32 = gguf_export.export(model, Path(folder) / "f32.gguf", tokenizer=tokenizer, name="course-model")
        with llamacpp.Model(f32, ctx=ctx, exact=False) as original:
            bos = evaluate.bos_of(original)
            base = evaluate.logits_of(original, tokens, ctx, bos=bos)
        rows = [row | about for row in measure_types(f32, base, tokens, importance, Path(folder), names, ctx, bos)]
    return results.save("gguf_quality", rows, profile="full" if full else "quick", directory=directory)


SMOLLM2_TYPES = "Q8_0 Q6_K Q5_K_M Q5_0 Q4_K_M Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_M Q3_K_S IQ3_S IQ3_XXS Q2_K IQ2_M".split()
WITH_IMATRIX = {"Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_M"}  # of these


def stored_as(path) -> str:
    """Which tensor types hold which share of the weights, e.g. "Q5_0 58 %, Q8_0 42 %", the largest first."""
    table = llamacpp.tensor_table(path)
    total, kinds = sum(t["weights"] for t in table), dict.fromkeys(t["type"] for t in table)
    shares = {kind: sum(t["weights"] for t in table if t["type"] == kind) / total for kind in kinds}
    order = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in order if share >= 0.005)


def interval(values, name: str, block: int) -> dict:
    """Mean and 95 % interval of a value of each token, over blocks of ``block`` tokens."""
    found = paired.paired_nll(values, block=block)
    return {name: found.difference, f"{name}_low": found.low, f"{name}_high": found.high}


def smollm2(calibration: int, ctx: int = 512):
    """SmolLM2's folder, its tokenizer, an importance matrix of so many windows of docstrings, and their tokens."""
    if (source := fetch.folder()) is None:
        raise QtutorError("SmolLM2 is not here: bring it with 'python -m qtutor model fetch smollm2'.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    text = corpus.tokens("train", tokenizer, packages=CALIBRATION, progress=False)[: calibration * ctx]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    return source, tokenizer, llamacpp.imatrix(model, text, ctx=ctx), text


def record_smollm2(full: bool = True, *, windows: int = 8, ctx: int = 512, calibration: int | None = None,
                   names=SMOLLM2_TYPES, directory=None) -> Path:  # fmt: skip
    """Measure SmolLM2-135M-Instruct in several types and save ``smollm2_quality``; return its path.

    ``kind`` says where a file comes from: "downloaded" (the Q4_1 file as it is), "float" (from the dequantized weights)
    or "requantized" (from the Q4_1 file itself, as llama-quantize --allow-requantize does).  ``windows`` of the
    evaluation text; ``calibration``: windows of docstrings, by default 24, 8 where not ``full``.
    """
    source, tokenizer, importance, text = smollm2(calibration or (24 if full else 8), ctx)
    parent, cut = source / fetch.FILE, evaluate.windows(corpus.tokens("eval", tokenizer), ctx)
    tokens = cut[:: len(cut) // windows][:windows].ravel()
    about = {"model": source.name, "windows": windows, "calibration_tokens": len(text),
             "text": corpus.fingerprint(corpus.eval_text())}  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="qtutor-smollm2-") as folder:
        f16, made = gguf_export.export(source, Path(folder) / "f16.gguf", "f16"), Path(folder) / "made.gguf"
        with llamacpp.Model(f16, ctx=ctx, exact=False) as original:
            bos = evaluate.bos_of(original)
            base = evaluate.logits_of(original, tokens, ctx, bos=bos)

        def add(path, name, kind, imatrix=False):
            row, found = measure(path, name, imatrix, base, tokens, ctx, bos)
            nll = paired.paired_nll(found.token_dnll, block=ctx - 1)  # 95 % intervals, over windows
            ends = {"perplexity_ratio_low": math.exp(nll.low), "perplexity_ratio_high": math.exp(nll.high)}
            kld = interval(found.token_kld, "kld_mean", ctx - 1)
            rows.append(about | {"kind": kind, "stored_as": stored_as(path)} | kld | row | ends)

        add(f16, "F16", "float")
        add(parent, "Q4_1", "downloaded")
        for name in tqdm(names, desc="types", leave=False):
            for imatrix in [False] * (not llamacpp.TYPES[name].needs_imatrix) + [True] * (name in WITH_IMATRIX):
                llamacpp.quantize(f16, made, name, imatrix=importance if imatrix else None)
                add(made, name, "float", imatrix)
            if name in ("Q8_0", "Q4_K_M", "Q3_K_M"):
                add(llamacpp.quantize(parent, made, name, requantize=True), name, "requantized")
    return results.save("smollm2_quality", rows, profile="full" if full else "quick", directory=directory)


FORMS = {  # form -> instruction, and what to put into it
    "yes or no": ("{} Answer yes or no.", ("Is ice cold?", "Is the sun a planet?", "Can fish fly?", "Is snow white?")),
    "three lines": ("List three {}, one on each line. Write nothing else.", ("fruits", "animals", "colors", "tools")),
    "JSON": ('Write a JSON object with the keys "name" and "age" for {}. Write only the JSON.',
             ("Anna, who is 30", "Tom, who is 7", "Maria, who is 52", "Ben, who is 19")),
    "one sentence": ("Explain in one sentence what {} is.", ("a dictionary", "rain", "a loop", "a river")),
    "repeat": ("Repeat this sentence exactly: {}",
               ("The cat sat on the mat.", "Rain fell all night.", "I like green tea.", "We met on Monday.")),
    "story": ("Write a short story about {}.", ("a fox", "a lost key")),
}  # fmt: skip
FACTS = {"number": "4817", "color": "orange", "city": "Lisbon", "animal": "otter"}  # hidden in a text
CHAT_ARMS = "F16 Q2_K Q4_K_M Q2_K+ Q4_K_M+ Q3_K_M Q3_K_M+ Q8_0 Q6_K".split()  # +: with an importance matrix


def chat_prompts(lengths) -> list[tuple[str, str, str]]:
    """(form, prompt, what a right answer holds): FORMS, and the FACTS in texts of so many characters."""
    found = [(form, say.format(what), what) for form, (say, about) in FORMS.items() for what in about]
    for length in lengths:
        lines = corpus.eval_text()[20_000 : 20_000 + length].splitlines()
        for i, (what, value) in enumerate(FACTS.items()):  # from late to early, so that no place moves another
            lines.insert(len(lines) * (len(FACTS) - i) // (len(FACTS) + 1), f"The secret {what} is {value}.")
        found += [(f"fact in {length:,} characters", "\n".join(lines) + f"\n\nWhat is the secret {what} in the text "
                   "above?", value) for what, value in FACTS.items()]  # fmt: skip
    return found


def record_chat(full: bool = True, *, arms=CHAT_ARMS, directory=None) -> Path:
    """Ask SmolLM2 in several types, greedily, save all answers and the gate's verdict as ``smollm2_chat``."""
    import llama_cpp  # slow: only here

    source, tokenizer, importance, _ = smollm2(24 if full else 2)
    prompts, rows = chat_prompts((1500, 6000) if full else (300,)), []
    asked = [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                           add_generation_prompt=True) for _, text, _ in prompts[1:12:5]]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qtutor-chat-") as folder:
        f16, made = gguf_export.export(source, Path(folder) / "f16.gguf", "f16"), Path(folder) / "made.gguf"
        with llamacpp.Model(f16, ctx=256, exact=False) as base:
            judge = gate.Gate.build(base, asked, tokenizer, corpus.tokens("eval", tokenizer)[:1024], name="F16")
        for name, imatrix in tqdm([(arm.rstrip("+"), arm.endswith("+")) for arm in arms], desc="files", leave=False):
            path = f16 if name == "F16" else llamacpp.quantize(f16, made, name, imatrix=importance if imatrix else None)
            with llamacpp.Model(path, ctx=256, exact=False) as model:
                table = judge.check(model, name).table
            about = {"type": name, "imatrix": imatrix, "bits_per_weight": llamacpp.bits_per_weight(path),
                     "gate_checks": len(table), "gate_failed": int((~table["passed"]).sum()),
                     "gate_says": "; ".join(dict.fromkeys(table["check"][~table["passed"]]))}  # fmt: skip
            model = llama_cpp.Llama(str(path), n_ctx=4096 if full else 1024, verbose=False)
            for form, prompt, wanted in prompts:
                reply = model.create_chat_completion([{"role": "user", "content": prompt}], temperature=0,
                                                     max_tokens=160 if form == "story" else 64)  # fmt: skip
                said, used = reply["choices"][0], reply["usage"]
                rows.append(about | {
                    "form": form, "prompt": prompt[-160:], "wanted": wanted, "answer": said["message"]["content"],
                    "stopped": said["finish_reason"] == "stop", "prompt_tokens": used["prompt_tokens"],
                    "answer_tokens": used["completion_tokens"], "repetition": gate.repetition(
                        tokenizer(said["message"]["content"], add_special_tokens=False)["input_ids"])})  # fmt: skip
            model.close()
            done = results.save("smollm2_chat", rows, profile="full" if full else "quick", directory=directory)
    return done


RECORDS = {"gguf_quality": record, "smollm2_quality": record_smollm2, "smollm2_chat": record_chat}
