"""Every result of the course in one place: README's headline table and ``data/results/README.md``.

Both are written by this module from the files in ``data/results``, never by hand, and a test holds them in step:

    python -m qtutor results write        # README's tables and the page, from the files that are there
    python -m qtutor results check        # say what is out of step
    python -m qtutor results record       # measure again what this machine can, then write; `make results`

A headline is a question, the name of the results that answer it, and a function that takes the rows and returns the
answer.  What has not been recorded has no headline: it is listed on the page as open, with what it takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qtutor import QtutorError, results

from . import notebooks

ROOT = Path(__file__).resolve().parent.parent
PAGE = "data/results/README.md"


# --------------------------------------------------------------------------------------------------- what there is


@dataclass(frozen=True)
class About:
    """What is known about results of one name before anything is measured.

    ``notebook``: number of the notebook that records them (None: recorded by hand, with ``by``) and shows them.
    ``needs``: what it takes, a key of NEEDS.  ``by``: the function that records.  ``shows``: one or two sentences.
    """

    notebook: str
    needs: str
    by: str
    shows: str


NEEDS = {
    "fp8": "a GPU with FP8 units, with Transformer Engine",
    "gpu": "a CUDA GPU",
    "gpu, llama.cpp": "a CUDA GPU of 80 GB, with a llama.cpp that uses it",
    "llama.cpp": "llama.cpp",
    "any": "any machine",
}
RESULTS = {
    "fp8_loss": About("02", "fp8", "fp8_models.record_loss", "Loss curves of the course model, trained from nothing "
                      "in BF16 and by each FP8 recipe: the same seeds, the same batches."),
    "fp8_gemm": About("04", "fp8", "fp8_bench.record", "One matrix product of a large layer in BF16 and FP8, and what "
                      "quantizing its input costs: time, clock, power."),
    "fp8_layers": About("04", "fp8", "fp8_bench.record", "A training step of two layers, from Hugging Face in BF16 to "
                        "FP8 weights and CUDA graphs, one change at a time: time, energy, memory."),
    "fp8_profile": About("04", "fp8", "fp8_bench.record", "Where the time of a training step goes, by kind of "
                         "kernel."),
    "fp8_breakeven": About("04", "fp8", "fp8_bench.record", "BF16 against FP8 by width and by tokens in a step: "
                           "where FP8 begins to pay."),
    "fp8_inference": About("04", "fp8", "fp8_bench.record", "Inference in BF16, FP8, INT8 and INT4: quality on the "
                           "course model; time, energy and memory at the shape of Llama-2-7B."),
    "qat_recovery": About("06", "gpu", "qat.record", "Quantization-aware training of the course model in ten schemes, "
                          "against rounding (PTQ) and against a control that trained as long, with three seeds."),
    "qat_gguf": About("06", "llama.cpp", "qat.record_gguf", "The course model as GGUF files: rounded by llama.cpp, and "
                      "trained on the grid of Q4_0, at their sizes."),
    "ptq_methods": About("07", "any", "the notebook itself", "Post-training quantization by hand (round-to-nearest, "
                         "clipping, SmoothQuant, AWQ, GPTQ): what each leaves of the course model's quality."),
    "ptq_backends": About("07", "any", "the notebook itself", "The same job by the back ends that transformers "
                          "offers and that run here: size, speed, quality."),
    "gguf_quality": About("08", "llama.cpp", "gguf_quality.record", "What each llama.cpp type costs the course model "
                          "in quality, with and without an importance matrix."),
    "llama70b": About("09", "gpu, llama.cpp", "llama70b.record", "A model of Llama-2-70B's shape in four types on one "
                      "GPU: memory, speed, energy, batch sizes."),
    "tradeoff": About("10", "any", "tradeoff.record", "Every technique of the course on one machine: size, speed, "
                      "quality, energy."),
}  # fmt: skip


def recorded(directory=None) -> list[tuple[str, results.Results]]:
    """All recorded results: (folder of the machine, Results), GPUs first, by notebook and name.

    Raises QtutorError for a file that does not follow the schema or lies in a folder that is none of a machine.
    """
    folder, found = Path(directory or results.RESULTS), []
    for path in sorted(folder.glob("*/*.json")):
        found.append((path.parent.name, results.load(path.stem, path.parent.name, directory)))
    names, machines = list(RESULTS), list(results.MACHINES)

    def place(value, order):
        return order.index(value) if value in order else len(order)

    def rank(item):
        machine, data = item
        return place(machine, machines), machine, place(data.name, names), data.name

    return sorted(found, key=rank)


def missing(directory=None) -> dict[str, About]:
    """The results that no machine has recorded yet."""
    there = {data.name for _, data in recorded(directory)}
    return {name: about for name, about in RESULTS.items() if name not in there}


def can_record(name: str) -> bool:
    """Whether this machine can measure results ``name``: their notebook asks before it does.

    Raises QtutorError for a name that is not in RESULTS.
    """
    if name not in RESULTS:
        raise QtutorError(f"There are no results {name!r}: choose from {', '.join(RESULTS)}.")
    needs = RESULTS[name].needs
    if needs == "any":
        return True
    if needs == "llama.cpp":
        from qtutor import llamacpp

        return llamacpp.available()[0]
    import torch

    if not torch.cuda.is_available():
        return False
    if needs == "fp8":
        from qtutor import te_switch

        return te_switch.activate().real
    return True  # that llama.cpp uses the GPU, and that there is room, is for the recording function to say


# ------------------------------------------------------------------------------------------------------- headlines


@dataclass(frozen=True)
class Headline:
    """A question that results ``name`` answer; ``answer`` takes the Results and returns Markdown."""

    question: str
    name: str
    answer: Callable


def one(data: results.Results, **where) -> dict:
    """The only row whose columns equal ``where``; raises QtutorError where there is none or more than one."""
    rows = [row for row in data.rows if all(row.get(key) == value for key, value in where.items())]
    if len(rows) != 1:
        shown = ", ".join(f"{key} = {value}" for key, value in where.items())
        raise QtutorError(f"Results '{data.name}' have {len(rows)} rows with {shown}, not one: bring qtutor/report.py "
                          "in step with them.")  # fmt: skip
    return rows[0]


def mean(data: results.Results, column: str, **where) -> float:
    """Mean of ``column`` over the rows that match (its seeds); raises QtutorError where no row does."""
    values = [row[column] for row in data.rows if all(row.get(key) == value for key, value in where.items())]
    if not values:
        shown = ", ".join(f"{key} = {value}" for key, value in where.items())
        raise QtutorError(f"Results '{data.name}' have no row with {shown}: bring qtutor/report.py in step with them.")
    return statistics.fmean(values)


def times(ratio: float) -> str:
    """A speed-up as it is read: "1.65 x"."""
    return f"{ratio:.2f} ×"


def percent(change: float, digits: int = 0) -> str:
    """A relative change with its sign, typographic minus: 0.064 -> "+6 %", -0.4 -> "−40 %"."""
    shown = f"{100 * change:+.{digits}f}"
    if float(shown) == 0:
        shown = shown[1:]
    return shown.replace("-", "−") + " %"


def nats(difference: float, error: float) -> str:
    """A difference with its standard error, typographic minus."""
    return f"{difference:+.3f}".replace("-", "−") + f" ± {error:.3f}"


def _training(data) -> str:
    said = []
    for shape in ("Llama-2-70B", "Llama-2-7B"):
        high, low = one(data, shape=shape, rung="TE BF16"), one(data, shape=shape, rung="TE FP8 delayed")
        energy = low["joules_per_step"] / high["joules_per_step"] - 1
        said.append(f"**{times(high['ms_per_step'] / low['ms_per_step'])}** the speed, {percent(energy)} energy at "
                    f"{shape}'s width")  # fmt: skip
    return "; ".join(said) + " (two layers, one step, delayed scaling against BF16, both Transformer Engine)"


def _breakeven(data) -> str:
    most = max(row["tokens"] for row in data.rows)
    rows = sorted((r for r in data.rows if r["tokens"] == most and r["graph"]), key=lambda r: r["hidden"])
    few = min(row["tokens"] for row in data.rows)
    least = one(data, hidden=rows[-1]["hidden"], tokens=few, graph=True)
    pays = next((row for row in rows if row["speedup"] > 1), None)
    first = f"from width {pays['hidden']:,} on" if pays else "nowhere"
    return (f"with {most:,} tokens in a step **{first}**: {times(rows[0]['speedup'])} at width {rows[0]['hidden']:,}, "
            + ", ".join(f"{times(row['speedup'])} at {row['hidden']:,}" for row in rows[1:])
            + f"; with {few} tokens {times(least['speedup'])} at {least['hidden']:,} (BF16 = 1, CUDA graphs)")


def _loss(data) -> str:
    last = max(row["step"] for row in data.rows)
    final = {(row["recipe"], row["seed"]): row["held_out_nats"] for row in data.rows if row["step"] == last}
    seeds = sorted({seed for recipe, seed in final if recipe == "BF16"})
    said = []
    for recipe in dict.fromkeys(recipe for recipe, _ in final if recipe != "BF16"):
        gaps = [final[recipe, seed] - final["BF16", seed] for seed in seeds if (recipe, seed) in final]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        said.append(f"{recipe.removeprefix('FP8 ')} **{nats(statistics.fmean(gaps), error)}**")
    return (f"held-out loss after {last:,} steps, FP8 minus BF16, nats per token: {', '.join(said)} "
            f"(course model; {len(seeds)} seeds, paired, ± standard error)")  # fmt: skip


def _inference(data) -> str:
    shape = "Llama-2-7B shape"
    high, low = one(data, model=shape, format="BF16"), one(data, model=shape, format="FP8 Transformer Engine")
    int4 = one(data, model=shape, format="INT4 weights")
    memory = low["weights_gib"] / high["weights_gib"] - 1
    energy = low["decode_joules_batch1"] / high["decode_joules_batch1"] - 1

    def faster(row, column):
        return times(high[column] / row[column])

    return (f"FP8 against BF16, Llama-2-7B's shape: {percent(memory)} memory, prefill **{faster(low, 'prefill_ms')}**, "
            f"decode **{faster(low, 'decode_ms_batch1')}** at batch 1 with {percent(energy)} energy; INT4 weights: "
            f"decode {faster(int4, 'decode_ms_batch1')}, prefill only {faster(int4, 'prefill_ms')}")


def _qat(data) -> str:
    said = []
    for scheme, what in (("W4A16", "4-bit"), ("W3", "3-bit"), ("ternary", "ternary")):
        before = one(data, scheme=scheme, arm="PTQ")
        after, kld = (mean(data, column, scheme=scheme, arm="QAT, distilled") for column in ("ratio", "kld_mean"))
        loss = percent(before["ratio"] - 1, 1) if before["ratio"] < 2 else f"{before['ratio']:.0f} ×"
        said.append(f"{what} weights: {loss} by rounding, **{percent(after - 1, 1)}** trained "
                    f"(KLD {before['kld_mean']:.2f} to {kld:.2f})")  # fmt: skip
    return "perplexity against the float model's; " + "; ".join(said)


def _qat_gguf(data) -> str:
    before = one(data, model="PTQ, head in Q8_0", type="Q4_0")
    after, size = (mean(data, column, model="QAT", type="Q4_0") for column in ("kld_mean", "file_mb"))
    other = one(data, model="PTQ", type="Q4_K_M")
    return (f"a Q4_0 file of {size:.2f} MB: KLD {before['kld_mean']:.3f} rounded, **{after:.3f}** trained on its grid; "
            f"Q4_K_M, {other['file_mb']:.2f} MB: {other['kld_mean']:.3f}")  # fmt: skip


def _types(data) -> str:
    rows = {row["type"]: row for row in data.rows if row.get("model", "PTQ") == "PTQ" and not row.get("imatrix")}
    said = []
    for kind in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q2_K"):
        if kind in rows:
            row = rows[kind]
            ratio = row.get("ratio", row.get("perplexity_ratio"))
            bold = "**" if kind == "Q6_K" else ""
            error = row.get("ratio_se", row.get("perplexity_ratio_se"))
            said.append(f"{bold}{kind} {percent(ratio - 1, 2).removesuffix(' %')} ± {100 * error:.2f} %{bold} "
                        f"({row['bits_per_weight']:.1f} bits)")  # fmt: skip
    return "perplexity of the course model: " + ", ".join(said)


def _tradeoff(data) -> str:
    rows = [row for row in data.rows if not row.get("not_run") and row["batch"] == 1
            and row.get("decode_tokens_per_s")]  # fmt: skip
    shape = "llama2_7b" if any(row["shape"] == "llama2_7b" for row in rows) else "course"
    rows = [row for row in rows if row["shape"] == shape]
    if not rows:
        return ""
    fast = max(rows, key=lambda row: row["decode_tokens_per_s"])
    counted = [r for r in rows if r.get("joules_per_decode_token") and "counter" in (r.get("energy_source") or "")]
    said = [f"fastest at decoding: **{fast['technique']}**, {fast['decode_tokens_per_s']:,.0f} tokens/s"]
    name = "GGUF F16" if fast["runtime"] == "llama.cpp" else "BF16"  # 16 bits in the same runtime
    base = next((row for row in rows if row["technique"] == name), None)
    if base is not None and fast is not base:
        ratio = fast["decode_tokens_per_s"] / base["decode_tokens_per_s"]
        said[-1] += f" ({times(ratio)} 16 bits in {fast['runtime']})"
    if counted:
        least = min(counted, key=lambda row: row["joules_per_decode_token"])
        said.append(f"least energy: **{least['technique']}**, {least['joules_per_decode_token']:.3g} J a token")
    what = "Llama-2-7B's shape" if shape == "llama2_7b" else "the course model"
    return f"{what}, batch 1: " + "; ".join(said)


def _llama70b(data) -> str:
    said = []
    for kind in ("Q8_0", "Q6_K", "Q4_K_M"):
        row = next((row for row in data.rows if row["kind"] == "model" and row["type"] == kind), None)
        if row is None:
            continue
        if not row["fits"]:
            said.append(f"{kind} does not fit")
            continue
        bold = "**" if kind == "Q6_K" else ""
        line = f"{bold}{kind}: {row['gpu_used_gib']:.1f} GiB, {row['decode_tokens_per_s']:.1f} tokens/s{bold}"
        if row.get("joules_per_decode_token"):
            line += f", {row['joules_per_decode_token']:.1f} J a token"
        many = [r for r in data.rows if r["kind"] == "batch" and r["type"] == kind and r["fits"]]
        if many:
            most = max(many, key=lambda r: r["batch"])
            line += f" ({most['decode_tokens_per_s']:.0f} tokens/s at batch {most['batch']})"
        said.append(line)
    return "; ".join(said) + " (its shape, random weights, llama.cpp)" if said else ""


HEADLINES = (
    Headline("Does FP8 train faster?", "fp8_layers", _training),
    Headline("From which size on?", "fp8_breakeven", _breakeven),
    Headline("Is the loss the same?", "fp8_loss", _loss),
    Headline("Does FP8 help inference?", "fp8_inference", _inference),
    Headline("What does training through the rounding bring back?", "qat_recovery", _qat),
    Headline("And in a llama.cpp file?", "qat_gguf", _qat_gguf),
    Headline("What do llama.cpp's types cost?", "gguf_quality", _types),
    Headline("Llama-2-70B on one GPU?", "llama70b", _llama70b),
    Headline("All techniques, side by side?", "tradeoff", _tradeoff),
)


def _chosen(name: str, directory) -> list[tuple[str, results.Results]]:
    """Where a headline's rows come from: the first GPU that has them, else the CPU; never two machines in one."""
    there = [(machine, data) for machine, data in recorded(directory) if data.name == name]
    return there[:1]


def headlines(directory=None) -> list[tuple[Headline, str, results.Results, str]]:
    """(headline, folder of the machine, results, answer) for each question that recorded results can answer."""
    found = []
    for headline in HEADLINES:
        for machine, data in _chosen(headline.name, directory):
            try:
                answer = headline.answer(data)
            except (KeyError, TypeError, ZeroDivisionError) as error:
                raise QtutorError(f"Results '{machine}/{data.name}' do not answer '{headline.question}' "
                                  f"({type(error).__name__}: {error}): bring qtutor/report.py in step with "
                                  "them.") from None  # fmt: skip
            if answer:
                found.append((headline, machine, data, answer))
    return found


# ---------------------------------------------------------------------------------------------------- what is written


def _notebook_link(number: str, folder: str, notebook_folder=None) -> str:
    """A link to a notebook, from a page whose way to the project's root is ``folder``; its number if it is missing."""
    names = [name for name in notebooks.names(notebook_folder) if name[:2] == number]
    return f"[{number}]({folder}notebooks/{names[0]}.ipynb)" if names else number


def headline_table(directory=None) -> str:
    """README's table of headline results, as Markdown."""
    lines = ["| Question | Answer | Measured on | From |", "|---|---|---|---|"]
    for headline, machine, data, answer in headlines(directory):
        link = f"[{data.name}](data/results/{machine}/{data.name}.json)"
        about = RESULTS.get(data.name)
        source = f"{_notebook_link(about.notebook, '')}, {link}" if about else link
        lines.append(f"| {headline.question} | {answer} | {data.device} | {source} |")
    return "\n".join(lines)


def _cell(text) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _versions(data: results.Results) -> str:
    return ", ".join(f"{name} {version}" for name, version in data.versions.items())


def _machine(data: results.Results) -> str:
    about = data.machine
    said = [about["device"]]
    if "compute_capability" in about:
        said.append(f"{about['memory_gib']:.1f} GiB, compute capability {about['compute_capability']}")
        if about.get("driver"):
            said.append(f"driver {about['driver']}")
        if about.get("cpu"):
            said.append(f"host {about['cpu']}, {about.get('cores', '?')} cores")
    else:
        said.append(f"{about.get('cores', '?')} cores, {about.get('memory_gib', '?')} GiB")
    return "; ".join(said)


def page(directory=None) -> str:
    """``data/results/README.md``: every file with its provenance, as Markdown."""
    found = recorded(directory)
    lines = [
        "# All results, and where they come from",
        "",
        "<!-- written by `python -m qtutor results write`: change the measurements, not this page -->",
        "",
        "One file holds what one machine measured: flat rows, the unit in the name of the column, the standard error",
        "beside it as `..._se`. `qtutor.results.load(name, machine)` reads it; the schema is in the docstring of",
        "[qtutor/results.py](../../qtutor/results.py). Comparisons stay within one file, because they must stay within",
        "one machine. A `+` behind the commit: files of the package differed from it when the rows were measured.",
        "`unknown`: measured from a copy of the files without its history. *Profile*: `full` is the size of a run that",
        "a GPU gets, `quick` that of a laptop.",
        "",
        "| File | What it shows | Machine | Measured | Rows | Notebook |",
        "|---|---|---|---|---|---|",
    ]
    for machine, data in found:
        about = RESULTS.get(data.name)
        lines.append(f"| [{machine}/{data.name}]({machine}/{data.name}.json) | "
                     f"{_cell(about.shows) if about else '*not described yet: add it to qtutor/report.py*'} | "
                     f"{_cell(data.device)} | {data.created[:10]} | {len(data.rows)} | "
                     f"{_notebook_link(about.notebook, '../../') if about else ''} |")  # fmt: skip
    if open_ := missing(directory):
        lines += ["", "## Not recorded yet", "",
                  "`make results` on a machine that has what it takes records them, and this page then lists them.", "",
                  "| Results | What they would show | What it takes | Notebook |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {name} | {_cell(about.shows)} | {NEEDS[about.needs]} | "
                  f"{_notebook_link(about.notebook, '../../')} |" for name, about in open_.items()]  # fmt: skip
    lines += ["", "## Provenance", ""]
    for machine, data in found:
        about = RESULTS.get(data.name)
        columns = list(dict.fromkeys(key for row in data.rows for key in row))
        lines += [f"### {machine}/{data.name}", ""]
        if about:
            lines += [f"- **recorded by** `{about.by}`" if "." in about.by else f"- **recorded by** {about.by}"]
            lines[-1] += f", through notebook {_notebook_link(about.notebook, '../../')}"
        lines += [
            f"- **machine** {_machine(data)}",
            f"- **when** {data.created}, commit `{data.commit}`, profile {data.profile}",
            f"- **versions** {_versions(data)}",
            f"- **rows** {len(data.rows)}, with the columns " + ", ".join(f"`{name}`" for name in columns),
            "",
        ]
    return "\n".join(lines).rstrip("\n") + "\n"


def notebook_map(text: str, notebook_folder=None) -> str:
    """The rows of README's map of notebooks, brought in step with the notebooks that are there.

    A row ``| 09 | ... | what it is about |`` gets the notebook's own title as a link and loses its "to come" once
    the file exists; what a row says the notebook is about stays as it was written.
    """
    there = {name[:2]: name for name in notebooks.names(notebook_folder)}
    folder = Path(notebook_folder or notebooks.NOTEBOOKS)
    lines = []
    for line in text.split("\n"):
        match = re.fullmatch(r"\| (\d\d) \| (.*?) \| (.*) \|", line)
        if match:
            number, name, about = match.groups()
            about = about.removeprefix("*to come:* ")
            if number in there:
                name = f"[{notebooks.title(folder / (there[number] + '.ipynb'))}](notebooks/{there[number]}.ipynb)"
            else:
                name = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", name)
                about = f"*to come:* {about}"
            line = f"| {number} | {name} | {about} |"
        lines.append(line)
    return "\n".join(lines)


def start_map(text: str, notebook_folder=None) -> str:
    """The same for the map in notebook 00, on the text of its file; the names in that map are short and stay."""
    there = {name[:2]: name for name in notebooks.names(notebook_folder)}

    def row(match):
        label = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", match[2]).removesuffix(" *(to come)*")
        link = f"[{label}]({there[match[1]]}.ipynb)" if match[1] in there else f"{label} *(to come)*"
        return f'"| {match[1]} | {link} |'

    return re.sub(r'"\| (\d\d) \| ([^|\n]+) \|', row, text)


def _block(text: str, name: str) -> tuple[str, str, str]:
    """The text before, inside and after ``<!-- name -->`` ... ``<!-- /name -->``."""
    match = re.fullmatch(rf"(.*<!-- {name} -->\n)(.*?)(\n?<!-- /{name} -->.*)", text, re.S)
    if not match:
        raise QtutorError(f"README.md lacks its markers <!-- {name} --> and <!-- /{name} -->: restore them with "
                          "'git checkout README.md'.")  # fmt: skip
    return match.groups()


def readme(text: str, directory=None, notebook_folder=None) -> str:
    """README's text with both of its generated tables brought in step."""
    before, inside, after = _block(text, "notebooks")
    text = before + notebook_map(inside, notebook_folder) + after
    before, _, after = _block(text, "results")
    return before + headline_table(directory) + "\n" + after.lstrip("\n")


def documents(root=None, directory=None) -> dict[Path, str]:
    """What each generated file should hold: {path: text}."""
    root = Path(root or ROOT)
    front = root / "README.md"
    try:
        text = front.read_text("utf-8")
    except OSError:
        raise QtutorError("README.md is missing: restore it with 'git checkout README.md'.") from None
    folder = root / "notebooks"
    directory = directory or root / "data" / "results"
    found = {front: readme(text, directory, folder), root / PAGE: page(directory)}
    start = folder / f"{notebooks.CONTENTS}.ipynb"
    if start.is_file():
        found[start] = start_map(start.read_text("utf-8"), folder)
    return found


def check(root=None, directory=None) -> list[str]:
    """What is out of step with ``data/results`` and the notebooks: one line each, an empty list when nothing is."""
    root, found = Path(root or ROOT), []
    directory = directory or root / "data" / "results"
    for path, text in documents(root, directory).items():
        there = path.read_text("utf-8") if path.is_file() else ""
        if there != text:
            found.append(f"{path.relative_to(root)} is out of step: python -m qtutor results write")
    undescribed = {data.name for _, data in recorded(directory)} - set(RESULTS)
    found += [f"results '{name}' are not described: add them to RESULTS in qtutor/report.py"
              for name in sorted(undescribed)]  # fmt: skip
    return found


def write(root=None, directory=None) -> list[Path]:
    """Write the generated files that changed; return their paths."""
    changed = []
    for path, text in documents(root, directory).items():
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        notebooks.write_whole(path, text)
        changed.append(path)
    return changed


# ---------------------------------------------------------------------------------------------------------- recording


def _stamps() -> dict[str, str]:
    """{"h200/fp8_loss": when it was created} of the results that are there."""
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text("utf-8")).get("created")
            for path in sorted(results.RESULTS.glob("*/*.json"))}  # fmt: skip


def record(only=()) -> int:
    """Run the notebooks that can record something on this machine, in copies; write the tables; say what came out.

    ``only``: numbers of notebooks, all of them by default.  The notebooks themselves stay as they are: ``make
    notebooks`` shows the new numbers in them.  One that fails does not stop the others.  Returns the exit status.
    """
    wanted = [str(number).zfill(2)[:2] for number in only]
    known = {about.notebook for about in RESULTS.values()}
    if unknown := [number for number in wanted if number not in known]:
        raise QtutorError(f"Notebook {unknown[0]} records nothing: choose from {', '.join(sorted(known))}.")
    here = {name: can_record(name) for name, about in RESULTS.items() if not wanted or about.notebook in wanted}
    numbers = sorted({RESULTS[name].notebook for name, able in here.items() if able})
    before, failed = _stamps(), 0
    keep = os.environ.get("QTUTOR_SAVE_RESULTS")
    os.environ["QTUTOR_SAVE_RESULTS"] = "1"  # the kernels inherit it
    try:
        with tempfile.TemporaryDirectory(prefix="qtutor-results-") as folder:
            copies = Path(shutil.copytree(notebooks.NOTEBOOKS, Path(folder) / "notebooks"))
            for name in notebooks.names(copies):
                if name[:2] not in numbers:
                    continue
                print(f"{name}: ", end="", flush=True)
                try:
                    print(f"{notebooks.execute(copies / f'{name}.ipynb'):.1f} s", flush=True)
                except QtutorError as error:
                    failed += 1
                    print(f"failed: {error}", flush=True)
    finally:
        if keep is None:
            del os.environ["QTUTOR_SAVE_RESULTS"]
        else:
            os.environ["QTUTOR_SAVE_RESULTS"] = keep
    after = _stamps()
    new = [name for name, created in after.items() if before.get(name) != created]
    print("\nrecorded: " + (", ".join(new) or "nothing"))
    for name, able in here.items():
        if not able:
            print(f"not here: {name} needs {NEEDS[RESULTS[name].needs]}")
    for path in write():
        print(f"written:  {path.relative_to(ROOT)}")
    return 1 if failed else 0


# -------------------------------------------------------------------------------------------------------- the command


def main(argv: list[str]) -> int:
    """``results write | check | record [notebooks]``; return 1 where ``check`` finds something or a notebook fails."""
    parser = argparse.ArgumentParser(prog="qtutor results", description="write or check README's tables and the page "
                                     "of all results, or measure them again")  # fmt: skip
    parser.add_argument("action", choices=("write", "check", "record"))
    parser.add_argument("notebook", nargs="*", help="with record: numbers of notebooks; all of them by default")
    options = parser.parse_args(argv)
    if options.action == "record":
        return record(options.notebook)
    if options.action == "write":
        changed = write()
        print("\n".join(f"{path.relative_to(ROOT)}: written" for path in changed) or "everything is in step")
        return 0
    found = check()
    print("\n".join(found) or "everything is in step")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
