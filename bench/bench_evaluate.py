"""How fast is evaluation from Python beside llama-perplexity?  Tokens per second and their ratio, from one run.

    python bench/bench_evaluate.py                          # the course model as Q4_K_M, the whole evaluation text
    python bench/bench_evaluate.py --type Q8_0 --threads 2
    python bench/bench_evaluate.py --gguf my-model.gguf --windows 64

Both programs read the same file and the same text, in the same windows, with the same threads, the same cache (F16)
and fused attention, and score the second half of each window.  They take turns, because a shared machine is not
equally fast from minute to minute.  What both do once (start, load the file, tokenize) is not evaluation: each program
runs over few windows and over all, and the rate is that of the windows in between.  Two modes: perplexity, and KL
divergence against kept logits of the F32 file.

That their results agree is what ``tests/test_evaluate.py`` is for; here they are printed side by side.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

from qtutor import QtutorError, corpus, course_model, evaluate, gguf_export, llamacpp


def tool_seconds(arguments, what: str) -> tuple[float, float]:
    """Seconds that llama-perplexity takes, and the number it prints after ``what``."""
    number = re.escape(what) + r"\s*[=:] +(-?[\d.]+)"
    said, seconds = llamacpp.run_tool("llama-perplexity", *arguments, until=number)
    return seconds, float(re.search(number, said)[1])


def python_seconds(path, tokens, ctx: int, threads: int, base) -> tuple[float, float]:
    """Seconds of the same from Python, and the same number."""
    start = time.perf_counter()
    with llamacpp.Model(path, ctx=ctx, threads=threads, exact=False) as model:
        bos = evaluate.bos_of(model)
        if base is None:
            value = evaluate.perplexity(model, tokens, ctx, second_half_only=True, bos=bos).value
        else:
            value = evaluate.compare_models(base, model, tokens, ctx, second_half_only=True, bos=bos).kld_mean
    return time.perf_counter() - start, value


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gguf", help="the file to evaluate; by default the course model, quantized to --type")
    parser.add_argument("--type", default="Q4_K_M", help="a type of qtutor.llamacpp.TYPES (default Q4_K_M)")
    parser.add_argument("--ctx", type=int, default=512, help="tokens a window (default 512)")
    parser.add_argument("--windows", type=int, default=192, help="windows of text, beyond the first few (default 192)")
    parser.add_argument("--few", type=int, default=8, help="windows of the short run (default 8)")
    parser.add_argument("--threads", type=int, default=llamacpp.n_threads(), help="threads of both programs")
    parser.add_argument("--rounds", type=int, default=3, help="how often they take turns (default 3)")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(argv)
    ctx, threads = options.ctx, options.threads
    import torch

    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory(prefix="qtutor-bench-") as folder:
        folder = Path(folder)
        f32 = gguf_export.export(course_model.load(), folder / "f32.gguf", tokenizer=course_model.load_tokenizer())
        path = Path(options.gguf) if options.gguf else llamacpp.quantize(f32, folder / "model.gguf", options.type)
        text = folder / "text.txt"
        text.write_text(corpus.eval_text(), encoding="utf-8", newline="")
        reference = path if options.gguf else f32  # KLD needs a base; of a stranger's file that is the file itself
        with llamacpp.Model(reference, ctx=ctx, threads=threads, exact=False) as model:
            tokens = model.tokenize(text.read_text(encoding="utf-8"))
            few, windows = options.few, min(options.few + options.windows, len(tokens) // ctx)
            if windows <= few:
                raise QtutorError(f"The text has {len(tokens) // ctx} windows: choose fewer --few or a smaller --ctx.")
            cut = {n: tokens[: n * ctx] for n in (few, windows)}
            base = evaluate.logits_of(model, cut[windows], ctx, second_half_only=True, bos=evaluate.bos_of(model))
        common = ["-f", text, "-c", ctx, "-b", ctx, "-ub", ctx, "-t", threads, "-tb", threads, "-ngl", 0, "-fa", "on"]
        for n in cut:
            keep = ["--kl-divergence-base", folder / f"{n}.kld"]
            tool_seconds(["-m", reference, *common, "--chunks", n, *keep], "PPL")
        kept = {n: base[: n * (ctx - ctx // 2 - 1)] for n in cut}
        for mode, what in (("perplexity", "Final estimate: PPL"), ("KL divergence", "Mean    KLD")):
            times: dict = {"llama-perplexity": [], "Python": []}
            for _ in range(options.rounds):
                taken = {"llama-perplexity": {}, "Python": {}}
                for n in cut:
                    extra = ["--kl-divergence", "--kl-divergence-base", folder / f"{n}.kld"] if mode[0] == "K" else []
                    taken["llama-perplexity"][n], theirs = tool_seconds(
                        ["-m", path, *common, "--chunks", n, *extra], what)
                    taken["Python"][n], ours = python_seconds(path, cut[n], ctx, threads,
                                                              kept[n] if mode[0] == "K" else None)  # fmt: skip
                for who, seconds in taken.items():
                    times[who].append(max(seconds[windows] - seconds[few], 1e-9))
            rate = {who: (windows - few) * ctx / statistics.median(seconds) for who, seconds in times.items()}
            ratio = rate["Python"] / rate["llama-perplexity"]
            rows.append({"mode": mode, "python_tokens_per_s": rate["Python"], "windows": windows - few, "ctx": ctx,
                         "tool_tokens_per_s": rate["llama-perplexity"], "ratio": ratio, "threads": threads,
                         "python_value": ours, "tool_value": theirs})  # fmt: skip
            print(f"{mode:14s} Python {rate['Python']:8,.0f} tokens/s   llama-perplexity "
                  f"{rate['llama-perplexity']:8,.0f} tokens/s   ratio {ratio:.2f}   values {ours:.5f}, {theirs:.5f}")
    print(f"{windows - few} windows of {ctx} tokens, {threads} threads, median of {options.rounds} rounds")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return {row["mode"]: row["ratio"] for row in rows}


if __name__ == "__main__":
    main()
