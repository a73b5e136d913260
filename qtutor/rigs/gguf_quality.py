"""What each llama.cpp type costs and keeps: every one of them measured, beside what llama.cpp has published.

One table answers "which type?": bits per weight and size on one side; perplexity, KL divergence, change of
probability and agreement on the other, each with its standard error.  :func:`record` fills it for the course model,
with and without an importance matrix, over a whole text, and writes it to ``data/results/<machine>/gguf_quality.json``:

    python -m qtutor.rigs.gguf_quality                     # the whole evaluation text
    python -m qtutor.rigs.gguf_quality --windows 32        # a part of it, spread evenly

Not every type uses the importance matrix.  Those that do not (``Q8_0``, the ternary, 1-bit and block float types) give
the same file with and without it: they have one row, marked ``imatrix_ignored``.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np

from .. import QtutorError, llamacpp

CALIBRATION = ("logging", "unittest", "email", "asyncio", "concurrent", "http", "json", "xml")  # in every Python

# https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md#llama-3-8b-scoreboard
# Llama-3-8B on Wikitext-2 against FP16, revision f364eb6f; of several importance matrices the largest ("WT 10m").
# type, imatrix, GiB, perplexity and error, mean KLD and error (nats), RMS change of probability and error (percent)
SOURCE = "https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md#llama-3-8b-scoreboard"
PUBLISHED = (
    ("F16", False, 14.97, 6.233160, 0.037828, 0.000551, 0.000002, 0.787, 0.004),
    ("Q8_0", False, 7.96, 6.234284, 0.037878, 0.001355, 0.000006, 1.198, 0.007),
    ("Q6_K", False, 6.14, 6.253382, 0.038078, 0.005452, 0.000035, 2.295, 0.019),
    ("Q5_K_M", False, 5.33, 6.288607, 0.038338, 0.010762, 0.000079, 3.160, 0.031),
    ("Q5_K_S", False, 5.21, 6.336598, 0.038755, 0.016595, 0.000122, 3.918, 0.036),
    ("Q5_1", False, 5.65, 6.337857, 0.038677, 0.018045, 0.000139, 4.123, 0.039),
    ("Q5_0", False, 5.21, 6.363224, 0.038861, 0.022239, 0.000166, 4.634, 0.043),
    ("Q4_K_M", True, 4.58, 6.382937, 0.039055, 0.028152, 0.000240, 5.251, 0.049),
    ("Q4_K_M", False, 4.58, 6.407115, 0.039119, 0.031273, 0.000238, 5.519, 0.050),
    ("Q4_K_S", True, 4.37, 6.409697, 0.039189, 0.031951, 0.000259, 5.645, 0.051),
    ("IQ4_NL", True, 4.35, 6.455593, 0.039630, 0.035742, 0.000288, 5.998, 0.054),
    ("IQ4_XS", True, 4.14, 6.459705, 0.039595, 0.036334, 0.000284, 6.044, 0.054),
    ("Q4_K_S", False, 4.37, 6.500529, 0.039778, 0.043136, 0.000314, 6.562, 0.055),
    ("Q4_1", False, 4.78, 6.682737, 0.041285, 0.071683, 0.000505, 8.512, 0.063),
    ("Q4_0", False, 4.34, 6.700147, 0.041226, 0.071940, 0.000491, 8.434, 0.061),
    ("Q3_K_L", True, 4.03, 6.671223, 0.041427, 0.073077, 0.000529, 8.662, 0.064),
    ("Q3_K_M", True, 3.74, 6.734255, 0.041838, 0.084358, 0.000588, 9.292, 0.065),
    ("Q3_K_L", False, 4.03, 6.787876, 0.042104, 0.087176, 0.000614, 9.432, 0.067),
    ("Q3_K_M", False, 3.74, 6.888498, 0.042669, 0.101913, 0.000677, 10.203, 0.068),
    ("IQ3_M", True, 3.53, 6.898327, 0.041643, 0.102534, 0.000663, 10.513, 0.066),
    ("IQ3_S", True, 3.42, 6.965501, 0.042406, 0.111278, 0.000710, 10.845, 0.068),
    ("IQ3_XS", True, 3.28, 7.163043, 0.043772, 0.138693, 0.000857, 12.148, 0.070),
    ("IQ3_XXS", True, 3.05, 7.458436, 0.046404, 0.183625, 0.001042, 13.836, 0.074),
    ("Q3_K_S", True, 3.41, 7.602878, 0.046848, 0.199821, 0.001008, 14.980, 0.070),
    ("Q3_K_S", False, 3.41, 7.863786, 0.048885, 0.228217, 0.001079, 15.541, 0.070),
    ("IQ2_M", True, 2.74, 8.600799, 0.055124, 0.325989, 0.001600, 18.519, 0.080),
    ("Q2_K", True, 2.96, 8.647825, 0.055610, 0.332223, 0.001572, 18.881, 0.078),
    ("Q2_K_S", True, 2.96, 9.323778, 0.061551, 0.403360, 0.001787, 20.050, 0.081),
    ("IQ2_S", True, 2.56, 9.650781, 0.063209, 0.439197, 0.001976, 21.491, 0.083),
    ("Q2_K", False, 2.96, 9.751568, 0.063312, 0.445132, 0.001835, 21.421, 0.079),
    ("IQ2_XS", True, 2.43, 10.761424, 0.071056, 0.546290, 0.002133, 23.872, 0.082),
    ("IQ2_XXS", True, 2.24, 14.091782, 0.098396, 0.812022, 0.002741, 28.576, 0.084),
    ("IQ1_M", True, 2.01, 25.493722, 0.177903, 1.393084, 0.003529, 38.287, 0.084),
    ("IQ1_S", True, 1.88, 60.694593, 0.471290, 2.254554, 0.004868, 46.271, 0.086),
)
# The same page, "LLaMA 2 vs. LLaMA 3": same top token in percent, given for four types only.
PUBLISHED_SAME_TOP = {"Q8_0": (97.674, 0.040), "Q6_K": (96.031, 0.051), "Q4_K_M": (91.901, 0.072),
                      "Q2_K": (71.138, 0.119)}  # fmt: skip
LLAMA3_8B_WEIGHTS = 8_030_261_248


def published():
    """llama.cpp's scoreboard of Llama-3-8B as a DataFrame with the column names of :func:`measure`'s rows.

    Shares are of one, as everywhere in this course; ``same_top`` is NaN where the page does not give it.
    """
    import pandas as pd

    columns = ["type", "imatrix", "gib", "perplexity", "perplexity_se", "kld_mean", "kld_mean_se", "delta_p_rms", "delta_p_rms_se"]
    table = pd.DataFrame(PUBLISHED, columns=columns)
    table[["delta_p_rms", "delta_p_rms_se"]] /= 100
    table["bits_per_weight"] = 8 * table["gib"] * 2**30 / LLAMA3_8B_WEIGHTS
    for column, place in (("same_top", 0), ("same_top_se", 1)):
        known = {name: pair[place] / 100 for name, pair in PUBLISHED_SAME_TOP.items()}
        table[column] = table["type"].map(known).where(~table["imatrix"])
    return table


def label(name: str, imatrix: bool) -> str:
    """``"Q2_K"`` or ``"Q2_K + imatrix"``."""
    return name + " + imatrix" * bool(imatrix)


def percentile_se(values, percent: float) -> float:
    """Standard error of a percentile of ``values`` (n,), without assuming a distribution.

    How many of n values fall below the true percentile is binomial, with standard deviation sqrt(n q (1 - q)): half
    the distance between the values so many ranks to either side is the error of the percentile.  With few values
    the upper rank ends at the largest one, and the error is then a lower bound.
    """
    values, q = np.sort(np.asarray(values, dtype=np.float64).ravel()), percent / 100
    if len(values) < 2:
        raise QtutorError(f"A percentile's error needs at least two values, here there are {len(values)}: add text.")
    middle, spread = q * (len(values) - 1), math.sqrt(len(values) * q * (1 - q))
    low, high = np.interp([middle - spread, middle + spread], np.arange(len(values)), values)
    return float(high - low) / 2


def measure(path, name: str, imatrix: bool, base, tokens, ctx: int = 512, *, bos=None, threads=None):
    """One row of the table, and the :class:`qtutor.evaluate.Comparison` it comes from.

    ``base``: logits of the unquantized file, float32 (n, vocab), made with ``exact=False`` from the same ``tokens``.
    """
    from .. import evaluate

    with llamacpp.Model(path, ctx=ctx, threads=threads, exact=False) as model:
        found = evaluate.compare_models(base, model, tokens, ctx, bos=bos)
    row = {"type": name, "imatrix": bool(imatrix), "bits_per_weight": llamacpp.bits_per_weight(path),
           "file_bytes": Path(path).stat().st_size, "ctx": ctx, **found.row(),
           "kld_p999_se": percentile_se(found.token_kld, 99.9)}  # fmt: skip
    if found.n >= 2 * (ctx - 1):  # one value a window: what neighbours share no longer makes the error look small
        row["kld_mean_se_windows"] = evaluate.standard_error(found.token_kld, block=ctx - 1)
    return row, found


def same_tensors(one, other) -> bool:
    """True when two GGUF files hold the same tensors, byte for byte (their metadata may differ)."""
    tables = [llamacpp.check_gguf(path).tensors for path in (one, other)]
    if [(t.name, t.type, t.shape) for t in tables[0]] != [(t.name, t.type, t.shape) for t in tables[1]]:
        return False
    with open(one, "rb") as a, open(other, "rb") as b:
        for x, y in zip(*tables, strict=True):
            a.seek(x.offset)
            b.seek(y.offset)
            if a.read(x.nbytes) != b.read(y.nbytes):
                return False
    return True


def _types(names) -> list[str]:
    """``names`` as llama.cpp spells them; every type but F32 for None.  Raises QtutorError for one it does not have."""
    return [n for n in llamacpp.TYPES if n != "F32"] if names is None else [llamacpp._type(n).name for n in names]


def measure_types(f32, base, tokens, importance, folder, names=None, ctx: int = 512, *, bos=None, threads=None,
                  progress: bool = False):
    """Rows for ``names`` (default: every type but F32), first without and then with the importance matrix.

    A type that ignores the matrix gets no second row.  Where there are two rows, the second has ``imatrix_gain``:
    the mean KLD that the matrix took away, with the error of paired values.  Yields (row, Comparison).
    """
    from tqdm.auto import tqdm

    from .. import evaluate

    names = _types(names)
    how = {"ctx": ctx, "bos": bos, "threads": threads}
    extra = {"imatrix_ignored": False, "imatrix_gain": None, "imatrix_gain_se": None, "imatrix_gain_se_windows": None}
    for name in tqdm(names, desc="types", leave=False, disable=not progress):
        plain, informed = (Path(folder) / f"{name}-{kind}.gguf" for kind in ("plain", "imatrix"))
        without, needs = None, llamacpp.TYPES[name].needs_imatrix
        try:
            if importance is not None:
                llamacpp.quantize(f32, informed, name, imatrix=importance, threads=threads)
            if not needs:
                llamacpp.quantize(f32, plain, name, threads=threads)
                ignored = importance is not None and same_tensors(plain, informed)
                row, without = measure(plain, name, False, base, tokens, **how)
                yield row | extra | {"imatrix_ignored": ignored}, without
                if ignored:
                    continue
            if importance is not None:
                row, found = measure(informed, name, True, base, tokens, **how)
                gain = {}
                if without is not None:
                    better = without.token_kld - found.token_kld
                    gain = {"imatrix_gain": float(better.mean()), "imatrix_gain_se": evaluate.standard_error(better)}
                    if len(better) >= 2 * (ctx - 1):
                        gain["imatrix_gain_se_windows"] = evaluate.standard_error(better, block=ctx - 1)
                yield row | extra | gain, found
        finally:
            for path in (plain, informed):
                path.unlink(missing_ok=True)


def spread_windows(ids, windows: int | None, ctx: int = 512) -> np.ndarray:
    """``windows`` windows of ``ctx`` tokens, spread evenly over ``ids`` (all of them when None): int64 (n * ctx,)."""
    from .. import evaluate

    cut = evaluate.windows(ids, ctx)
    if windows is None or windows >= len(cut):
        return cut.ravel()
    if windows < 1:
        raise QtutorError(f"{windows} windows of text measure nothing: give at least 1.")
    return cut[:: len(cut) // windows][:windows].ravel()


def record(windows: int | None = None, *, ctx: int = 512, calibration: int = 200, names=None, threads=None,
           directory=None, progress: bool = True) -> Path:
    """Measure every type on the course model (QTUTOR_MODEL: another one) and save ``gguf_quality``; return its path.

    ``windows``: so many windows of the evaluation text instead of all; ``calibration``: windows of docstrings for
    the importance matrix.  Needs 4 bytes times vocabulary for each token: the logits of the F32 file are kept.
    """
    from .. import corpus, course_model, evaluate, gguf_export, results

    names = _types(names)  # a misspelt one is found before the work, not after it
    model, tokenizer = course_model.load(), course_model.load_tokenizer()
    tokens = spread_windows(corpus.tokens("eval", tokenizer), windows, ctx)
    text = corpus.tokens("train", tokenizer, packages=CALIBRATION, progress=False)[: calibration * ctx]
    importance = llamacpp.imatrix(model, text, ctx=ctx)
    about = {"windows": len(tokens) // ctx, "calibration_tokens": len(text) // ctx * ctx,
             "text": corpus.fingerprint(corpus.eval_text())}  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="qtutor-quality-") as folder:
        f32 = gguf_export.export(model, Path(folder) / "f32.gguf", tokenizer=tokenizer, name="course-model")
        with llamacpp.Model(f32, ctx=ctx, threads=threads, exact=False) as original:
            bos = evaluate.bos_of(original)
            base = evaluate.logits_of(original, tokens, ctx, bos=bos, progress=progress)
        for row, _ in measure_types(f32, base, tokens, importance, folder, names, ctx, bos=bos, threads=threads,
                                    progress=progress):  # fmt: skip
            rows.append(row | about)
    return results.save("gguf_quality", rows, profile="full" if windows is None else "quick", directory=directory)


# ---------------------------------------------------------------------------------------------- tables and pictures


def pm(values, errors, digits: int = 4, scale: float = 1) -> list[str]:
    """``["0.0501 ± 0.0004", ...]``; an empty string where there is no value."""
    return ["" if v is None or v != v else f"{scale * v:.{digits}f} ± {scale * e:.{digits}f}"
            for v, e in zip(values, errors, strict=True)]  # fmt: skip


def table(rows):
    """The rows as a DataFrame to be read, largest first: "value ± standard error" in each column of quality."""
    import pandas as pd

    q = pd.DataFrame(rows).sort_values(["bits_per_weight", "kld_mean"], ascending=[False, True])
    return pd.DataFrame({
        "bits per weight": q["bits_per_weight"].map("{:.2f}".format).values,
        "file (MB)": (q["file_bytes"] / 1e6).map("{:.2f}".format).values,
        "perplexity": pm(q["perplexity"], q["perplexity_se"], 2),
        "KLD mean": pm(q["kld_mean"], q["kld_mean_se"], 5),
        "KLD 99.9 %": pm(q["kld_p999"], q["kld_p999_se"], 3),
        "RMS Δp (%)": pm(q["delta_p_rms"], q["delta_p_rms_se"], 2, 100),
        "same top (%)": pm(q["same_top"], q["same_top_se"], 2, 100),
    }, index=[label(*pair) for pair in zip(q["type"], q["imatrix"], strict=True)])  # fmt: skip


def family(name: str) -> str:
    """Which of llama.cpp's families a type belongs to, for colours and explanations."""
    if name.startswith("IQ"):
        return "IQ (codebook)"
    if name in ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0"):  # made for models that were trained in one bit or three values
        return "ternary, 1 bit"
    if name in ("MXFP4", "NVFP4"):
        return "block float"
    return "K (super-blocks)" if "_K" in name else "float16" if name in ("F16", "BF16") else "legacy (_0, _1)"


FAMILIES = ("legacy (_0, _1)", "K (super-blocks)", "IQ (codebook)", "ternary, 1 bit", "block float", "float16")


def picture(rows, title: str = "Every type: quality against size", ax=None, names: bool = True):
    """Figure: mean KLD (logarithmic) against bits per weight; the colour is the family, filled means with imatrix.

    Types of eight bits and less; the 16-bit ones would only push the others together.
    """
    import pandas as pd

    from .. import plots

    data = pd.DataFrame(rows)
    data = data[data["bits_per_weight"] < 9]
    fig = ax.figure if ax is not None else None
    if ax is None:
        fig, ax = plots.figure(8.5, 6)
    for number, (kind, marker) in enumerate(zip(FAMILIES, "osD^v", strict=False)):
        for flag in (False, True):
            d = data[(data["type"].map(family) == kind) & (data["imatrix"] == flag)]
            if len(d):
                color = plots.PALETTE[number]
                ax.errorbar(d["bits_per_weight"], d["kld_mean"], yerr=2 * d["kld_mean_se"], fmt=marker, ms=6,
                            color=color, mfc=color if flag else "white", capsize=2, lw=1,
                            label=kind + (" + imatrix" if flag else ""))  # fmt: skip
    ax.set(title=title, xlabel="bits per weight of the file", ylabel="mean KL divergence (nats per token)",
           yscale="log", xlim=(data["bits_per_weight"].min() - 0.35, 9))  # fmt: skip
    ax.legend(loc="upper right", fontsize=8)
    if names:
        best = data.sort_values("imatrix").drop_duplicates("type", keep="last")  # one label a type
        plots.annotate(ax, best["bits_per_weight"], best["kld_mean"], best["type"], fontsize=7.5)
    return fig


def main(argv=None) -> None:
    """``python -m qtutor.rigs.gguf_quality``: record the table and print where it went."""
    parser = argparse.ArgumentParser(prog="python -m qtutor.rigs.gguf_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, help="windows of evaluation text (default: all)")
    parser.add_argument("--threads", type=int, help="threads (default: the physical cores)")
    parser.add_argument("--types", nargs="+", help="only these types")
    options = parser.parse_args(argv)
    print(record(options.windows, threads=options.threads, names=options.types))


if __name__ == "__main__":
    try:
        main()
    except QtutorError as error:
        raise SystemExit(str(error)) from None
