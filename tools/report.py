"""Every result of the course in one place: README's headline table and ``data/results/README.md``.

Both are written by this module from the files in ``data/results``, never by hand, and a test holds them in step:

    python -m tools.report write                    # README's tables and the page, from the files that are there
    python -m tools.report check                    # say what is out of step
    python -m tools.report record [gguf_quality]    # measure again what this machine can, then write; `make results`

A headline is a question, the name of the results that answer it, and a function that takes the rows and returns the
answer.  What has not been recorded has no headline: it is listed on the page as open, with what it takes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import re
import statistics
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import qtutor
from qtutor import QtutorError, files, paired, results
from qtutor.checkpoints import fetch
from qtutor.decide import pareto, side_by_side

from . import command, keep, notebooks, runs, topic

PAGE = "data/results/README.md"


def _cuda(least: int = 1) -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() >= least


#: what results may need -> (in words, whether this machine has it)
NEEDS = {
    "fp8": ("a GPU with FP8 units, with Transformer Engine", lambda: _cuda() and qtutor.te_switch.activate().real),
    "qlora": ("a GPU with FP8 units, with Transformer Engine and peft (pip install '.[gpu]')",
              lambda: NEEDS["fp8"][1]() and importlib.util.find_spec("peft") is not None),
    "gpus": ("several GPUs with FP8 units, with Transformer Engine", lambda: NEEDS["fp8"][1]() and _cuda(2)),
    "gpu": ("a CUDA GPU", _cuda),
    "80 GB": ("a CUDA GPU of 80 GB, with a llama.cpp that uses it", _cuda),  # the recorder says what is not enough
    "llama.cpp": ("llama.cpp", lambda: qtutor.llamacpp.available()[0]),
    "smollm2": ("SmolLM2: python -m qtutor model fetch smollm2", lambda: fetch.folder() is not None),
    "llm-compressor": ("llm-compressor, in an environment of its own: make llmc-env",
                       lambda: importlib.import_module(".record_llmcompressor", __package__).available()),
    "any": ("any machine", lambda: True),
}


#: What is known about results before they are measured: topic of the notebook that shows them, what they need (a key
#: of NEEDS), the module of tools whose RECORDS has their function, and what they show.
About = namedtuple("About", "topic needs by shows")

RESULTS = {
    "fp8_loss": About("fp8_training", "fp8", "record_fp8", "Loss curves of the course model, trained from nothing in "
                      "BF16 and by each FP8 recipe: the same seeds, the same batches."),
    "fp8_gemm": About("fp8_speed_and_memory", "fp8", "record_fp8", "One matrix product of a large layer in BF16 and "
                      "FP8, and what quantizing its input costs: time, clock, power."),
    "fp8_layers": About("fp8_speed_and_memory", "fp8", "record_fp8", "A training step of two layers, from Hugging Face "
                        "in BF16 to FP8 weights and CUDA graphs, one change at a time: time, energy, memory."),
    "fp8_profile": About("fp8_speed_and_memory", "fp8", "record_fp8", "Time of a training step, by kind of kernel."),
    "fp8_model": About("fp8_speed_and_memory", "fp8", "record_training", "Training steps of whole models, optimizer "
                       "included: Hugging Face, torch.compile, torchao FP8, Transformer Engine by recipe; memory too."),
    "fp8_finetune": About("fp8_speed_and_memory", "qlora", "record_training", "Fine-tuning Llama-3-8B's shape on one "
                          "GPU: all weights in BF16 and FP8, LoRA, QLoRA: tokens a second, memory, energy."),
    "fp8_breakeven": About("fp8_speed_and_memory", "fp8", "record_fp8", "BF16 against FP8 by width and by tokens in a "
                           "step: where FP8 begins to pay."),
    "fp8_inference": About("fp8_speed_and_memory", "fp8", "record_fp8", "Inference in BF16, FP8, INT8 and INT4: "
                           "quality on the course model; time, energy and memory at the shape of Llama-2-7B."),
    "fp8_scaling": About("fp8_on_several_gpus", "gpus", "record_fsdp", "Training steps under FSDP2 on 1, 2 and 4 GPUs, "
                         "in BF16, FP8 and with FP8 weights: speed, memory, energy, bytes, exposed communication."),
    "fp8_scaling_torchao": About("fp8_on_several_gpus", "gpus", "record_fsdp", "The same steps on all GPUs by "
                                 "torchao under torch.compile, FP8 or BF16 all-gather, beside Transformer Engine."),
    "fp8_scaling_loss": About("fp8_on_several_gpus", "gpus", "record_fsdp", "The training loss of the same global "
                              "batches on 1, 2 and 4 GPUs, in BF16 and with FP8 weights."),
    "qat_recovery": About("qat", "gpu", "record_qat", "The course model in few bits, by methods after training and by "
                          "training (straight through, LSQ, distilled; a control; three seeds), all against GPTQ."),
    "qat_rates": About("qat", "gpu", "record_qat", "The learning rates that each arm of qat_recovery tried, by the "
                       "KLD on held-back training text."),
    "qat_gguf": About("qat", "llama.cpp", "record_qat", "The course model as GGUF files: rounded by llama.cpp, and "
                      "trained on the grid of Q4_0, at their sizes."),
    "ptq_methods": About("ptq_fundamentals", "any", "record_ptq", "Quantization after training by hand (rounding, "
                         "clipping, SmoothQuant, AWQ, GPTQ): what each leaves of the course model's quality."),
    "ptq_backends": About("ptq_fundamentals", "any", "record_ptq", "The same job by the back ends that transformers "
                          "offers and that run here: size, speed, quality."),
    "ptq_official": About("ptq_fundamentals", "llm-compressor", "record_llmcompressor", "The same job by "
                          "llm-compressor, beside the notebook's functions at the same settings: bytes and quality."),
    "gguf_quality": About("ptq_llamacpp", "llama.cpp", "record_gguf", "What each llama.cpp type costs the course model "
                          "in quality, with and without an importance matrix."),
    "smollm2_quality": About("bits_where_they_matter", "smollm2", "record_gguf", "What quantizing a quantized chat "
                             "model costs: types of SmolLM2-135M-Instruct against its dequantized Q4_1 file."),
    "smollm2_chat": About("bits_where_they_matter", "smollm2", "record_gguf", "What the same files answer: the form of "
                          "an instruction, stopping, repeating, a fact in a long text; the validation gate."),
    "tensor_sensitivity": About("bits_where_they_matter", "llama.cpp", "record_bits", "What each tensor of the course "
                                "model costs in each type; mixtures chosen by that at the sizes of llama.cpp's own."),
    "kv_cache_quality": About("bits_where_they_matter", "llama.cpp", "record_bits", "What a quantized KV cache costs, "
                              "with and without llama.cpp's rotation, at a short and a long context."),
    "imatrix_search": About("ptq_llamacpp", "llama.cpp", "record_bits", "Three llama.cpp types without an importance "
                            "matrix, with a matrix of ones and with a real one: KLD, entropy, perplexity."),
    "llama70b": About("llama2_70b_on_one_gpu", "80 GB", "record_llama70b", "A model of Llama-2-70B's shape in four "
                      "types on one GPU: memory, speed, energy, batch sizes."),
    "serving": About("serving", "llama.cpp", "record_serving", "llama-server with four slots and the course model in "
                     "three types: time to first token, inter-token latency and goodput against the rate of requests."),
    "fake_quant_speed": About("fake_quantization", "gpu", "record_qat", "Fake quantization, forward and backward, "
                              "beside torchao and torch.compile: bytes a second as a share of a copy's."),
    "tradeoff": About("measuring_the_tradeoff", "any", "record_tradeoff", "Every technique of the course on one "
                      "machine: size, speed, quality, energy."),
    runs.NAME: About("start_here", "any", "runs", "What a run of each notebook takes: seconds, and memory at most."),
}  # fmt: skip


def recorded(directory=None) -> list[tuple[str, results.Results]]:
    """All recorded results: (folder of the machine, Results), GPUs first, in the order of RESULTS."""
    names, machines = list(RESULTS), list(results.MACHINES)
    found = [(path.parent.name, results.load(path.stem, path.parent.name, directory))
             for path in Path(directory or results.RESULTS).glob("*/*.json")]  # fmt: skip

    def place(value, order):
        return (order.index(value) if value in order else len(order)), value

    return sorted(found, key=lambda item: (place(item[0], machines), place(item[1].name, names)))


def missing(directory=None) -> dict[str, About]:
    """The results that no machine has recorded yet."""
    there = {data.name for _, data in recorded(directory)}
    return {name: about for name, about in RESULTS.items() if name not in there}


def matching(data: results.Results, most: float = math.inf, **where) -> list[dict]:
    """The rows whose columns equal ``where``; raises LookupError where there is none, or more than ``most``."""
    rows = [row for row in data.rows if all(row.get(key) == value for key, value in where.items())]
    if not 0 < len(rows) <= most:
        raise LookupError(f"{len(rows)} rows with " + ", ".join(f"{key} = {value}" for key, value in where.items()))
    return rows


def one(data: results.Results, **where) -> dict:
    """The only row whose columns equal ``where``."""
    return matching(data, most=1, **where)[0]


def mean(data: results.Results, column: str, **where) -> float:
    """Mean of ``column`` over the rows that match (its seeds)."""
    return statistics.fmean(row[column] for row in matching(data, **where))


def times(ratio: float) -> str:
    """A speed-up as it is read: "1.65 x"."""
    return f"{ratio:.2f} ×"


def faster(slow: dict, fast: dict) -> str:
    """How many times as fast a step is, with the outermost ends of both 10th to 90th percentiles."""
    low, high = slow["ms_p10"] / fast["ms_p90"], slow["ms_p90"] / fast["ms_p10"]
    return f"{times(slow['ms_per_step'] / fast['ms_per_step'])} ({low:.2f} to {high:.2f})"


def percent(change: float, digits: int = 0) -> str:
    """A relative change with its sign, typographic minus: 0.064 -> "+6 %", -0.4 -> "−40 %"."""
    shown = f"{100 * change:+.{digits}f}"
    return (shown if float(shown) else shown[1:]).replace("-", "−") + " %"


def _model(data) -> str:
    said, layers = [], max(row["layers"] for row in data.rows)
    for shape in dict.fromkeys(row["shape"] for row in data.rows):
        step = {row["rung"]: row for row in matching(data, shape=shape, layers=layers, batch=4) if "not_run" not in row}
        low, high = step["TE FP8 delayed"], step["TE BF16"]
        energy = low["joules_per_step"] / high["joules_per_step"] - 1
        over = [faster(min((row for name, row in step.items() if name.startswith(rival)),
                           key=lambda row: row["ms_per_step"]), low)
                for rival in ("TE BF16", "Hugging Face BF16, compiled", "torchao FP8")]  # fmt: skip
        said.append(f"{shape}'s shape: **{over[0]}** the speed of its BF16 at {percent(energy)} energy, {over[1]} that "
                    f"of torch.compile in BF16, {over[2]} that of torchao's FP8")  # fmt: skip
    return (f"Transformer Engine, delayed scaling, a whole step of {layers} layers with head, loss and optimizer. "
            + "; ".join(said))  # fmt: skip


def _several(data) -> str:
    most, layers = max(row["ranks"] for row in data.rows), matching(data, shape="Llama-2-70B")[0]["layers"]

    def best(kind, ranks=most, **where):  # however the weights are gathered
        rows = [row for row in matching(data, ranks=ranks, **where) if row["rung"].startswith(kind)]
        return max((row for row in rows if "not_run" not in row), key=lambda row: row["train_tokens_per_s"])

    fp8, seventy, seven = "FP8 delayed + FP8 weights", {"shape": "Llama-2-70B"}, {"shape": "Llama-2-7B", "layers": 32}
    each = percent(best(fp8, **seventy)["train_tokens_per_s"] / best(fp8, 1, **seventy)["train_tokens_per_s"] - 1)
    return (f"FSDP2 with FP8 weights and FP8 all-gather on {most} GPUs, optimizer included: {layers} layers of "
            f"Llama-2-70B's shape **{faster(best('BF16', **seventy), best(fp8, **seventy))}** the speed of BF16 on as "
            f"many GPUs (each in its fastest way; FP8 with fast accumulation), {each} a GPU against one GPU alone; "
            f"all of Llama-2-7B's shape "
            f"**{faster(best('BF16', **seven), best(fp8, **seven))}**")  # fmt: skip


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
    said, counts = [], set()
    for recipe in dict.fromkeys(row["recipe"] for row in data.rows):
        if recipe == "BF16" or "(again)" in recipe:
            continue
        lost = paired.paired_nll(paired.loss_gaps(data.rows, recipe))
        counts.add(lost.n)
        shown = f"**{lost.difference:+.4f}** ({lost.low:+.4f} to {lost.high:+.4f})".replace("-", "−")
        said.append(f"{recipe.removeprefix('FP8 ')} {shown}")
    return (f"held-out loss after {data.rows[0]['steps']:,} steps, FP8 minus BF16, nats per token, with 95 % "
            f"intervals: {'; '.join(said)} (course model, {' to '.join(map(str, sorted(counts)))} seeds, "
            "paired)")  # fmt: skip


def _qat(data) -> str:
    said, steps = [], max(row["steps"] for row in data.rows if row["seed"] > 0)
    for scheme, what in (("W4A16", "4-bit"), ("W3", "3-bit"), ("W2", "2-bit")):
        best = min(matching(data, scheme=scheme, seed=-1), key=lambda row: row["kld_mean"])
        qat = mean(data, "kld_mean", scheme=scheme, arm="QAT, distilled", steps=steps)
        said.append(f"{what} weights: {one(data, scheme=scheme, arm='RTN')['kld_mean']:.3f} rounded to nearest, "
                    f"{best['kld_mean']:.3f} by {best['arm']}, **{qat:.3f}** trained")  # fmt: skip
    return "KLD from the float model (the strongest method after training, distilled QAT); " + "; ".join(said)


def _qat_gguf(data) -> str:
    before = one(data, model="PTQ, head in Q8_0", type="Q4_0")
    after, size = (mean(data, column, model="QAT", type="Q4_0") for column in ("kld_mean", "file_mb"))
    other = one(data, model="PTQ", type="Q4_K_M")
    return (f"a Q4_0 file of {size:.2f} MB: KLD {before['kld_mean']:.3f} rounded, **{after:.3f}** trained on its grid; "
            f"Q4_K_M, {other['file_mb']:.2f} MB: {other['kld_mean']:.3f}")  # fmt: skip


def _types(data) -> str:
    rows = {row["type"]: row for row in data.rows if not row["imatrix"]}
    said = []
    for kind in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q2_K"):
        if row := rows.get(kind):
            bold, change = "**" if kind == "Q6_K" else "", percent(row["perplexity_ratio"] - 1, 2).removesuffix(" %")
            said.append(f"{bold}{kind} {change} ± {100 * row['perplexity_ratio_se']:.2f} %{bold} "
                        f"({row['bits_per_weight']:.1f} bits)")  # fmt: skip
    return "perplexity of the course model: " + ", ".join(said)


def _engine(rows: list[dict], engine: str) -> str:
    """Decoding in one engine against its own 16 bits, and who leads, by the one rule of pareto.difference."""
    ratios, said = pareto.relative([row for row in rows if row["runtime"] == engine], "decode_tokens_per_s"), {}
    for row in ratios:
        if row["batch"] in (1, 32) and row["technique"] != row["against"]:
            bold = "**" if abs(row["differs"]) == 1 else ""
            shown = f"{bold}{row['ratio']:.2f}{bold} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
            said.setdefault(row["technique"].split(maxsplit=1)[1], []).append(shown)
    alone = [row for row in ratios if row["batch"] == 1]
    if not said or not alone:
        return ""
    lead = [" or ".join(name.split(maxsplit=1)[1] for name in pareto.leaders(alone, axis))
            if any(row.get(column) for row in alone) else "not measured"
            for axis, column in (("decode speed", "decode_tokens_per_s"), ("decode energy", "joules_per_decode_token"))]
    return (f"{engine}, Llama-2-7B's shape, random weights, decoding 1 and 32 sequences, speed over that of its own 16 "
            "bits: " + "; ".join(f"{name} {' and '.join(shown)}" for name, shown in said.items())
            + f" (bold: apart by more than intervals and {pareto.AXES['decode speed'].tolerance:.0%}). Fastest with 1: "
            f"{lead[0]}; least energy: {lead[1]} (named together: not told apart)")  # fmt: skip


def _llama70b(data) -> str:
    said = []
    models = {row["type"]: row for row in data.rows if row["kind"] == "model"}
    for kind, row in [(kind, models[kind]) for kind in ("Q8_0", "Q6_K", "Q4_K_M") if kind in models]:
        if not row["fits"]:
            said.append(f"{kind} does not fit")
            continue
        bold = "**" if kind == "Q6_K" else ""
        error = f" ± {2 * row['decode_tokens_per_s_se']:.1f}" if row.get("decode_tokens_per_s_se") else ""
        line = f"{bold}{kind}: {row['gpu_used_gib']:.1f} GiB, {row['decode_tokens_per_s']:.1f}{error} tokens/s{bold}"
        if row.get("joules_per_decode_token"):
            line += f", {row['joules_per_decode_token']:.1f} J a token"
        many = [r for r in data.rows if r["kind"] == "batch" and r["type"] == kind and r["fits"]]
        if many:
            most = max(many, key=lambda r: r["batch"])
            line += f" ({most['decode_tokens_per_s']:.0f} tokens/s at batch {most['batch']})"
        said.append(line)
    return "; ".join(said) + " (llama.cpp, its shape, random weights)" if said else ""


def _served70b(data) -> str:
    """Of each engine, type and number of cards: what comes out for one user, and for the most with short prompts."""
    short = [row for row in data.rows if row["kind"] == "served" and row.get("prefill_tokens") == 128
             and row.get("kv_type") in ("BF16", "F16")]  # fmt: skip
    most, found = max((row["streams"] for row in short), default=0), {}
    for row in short:
        if row["streams"] in (1, most):
            name = row["type"] + f" on {row['cards']} cards, by {row['split']}," * (row["cards"] > 1)
            found.setdefault(row["runtime"], {}).setdefault(name, {})[row["streams"]] = row
    said = [f"**{engine}** " + ", ".join(
        f"{name} " + " and ".join(f"{row['output_tokens_per_s']:.0f}" for _, row in sorted(rows.items()))
        + f" ({rows[most]['joules_per_decode_token']:.1f} J)" for name, rows in types.items() if len(rows) == 2)
        for engine, types in found.items()]  # fmt: skip
    return (f"tokens/s of whole answers to 1 and to {most:.0f} users, 128 tokens in and 64 out (joules of a token "
            f"with {most:.0f}): " + "; ".join(said)
            + " (its shape, random weights; one setting of each engine, one run each)") if said else ""


#: (question, name of the results that answer it, function: Results -> Markdown)
HEADLINES = (
    ("Does FP8 train faster?", "fp8_model", _model),
    ("And on several GPUs?", "fp8_scaling", _several),
    ("From which size on?", "fp8_breakeven", _breakeven),
    ("Is the loss the same?", "fp8_loss", _loss),
    ("Does FP8 help inference?", "serving", lambda data: _engine(side_by_side.served(data), "vLLM")),
    ("What does training through the rounding bring back?", "qat_recovery", _qat),
    ("And in a llama.cpp file?", "qat_gguf", _qat_gguf),
    ("What do llama.cpp's types cost?", "gguf_quality", _types),
    ("Llama-2-70B on one GPU?", "llama70b", _llama70b),
    ("Or in 16 bits on two, or in another engine?", "llama70b", _served70b),
    ("Which llama.cpp type is fast?", "tradeoff", lambda data: _engine(
        [row for row in pareto.measured(data) if row["shape"] == side_by_side.SHAPE], "llama.cpp")),
)


def headlines(directory=None) -> list[tuple[str, str, results.Results, str]]:
    """(question, folder of the machine, results, answer) for each question that recorded results can answer.

    The first GPU whose results can answers, else the CPU: two machines never meet in one answer.
    """
    found, everything = {}, recorded(directory)
    for question, machine, data, function in ((q, machine, data, f) for q, name, f in HEADLINES for machine, data in
                                              everything if data.name == name and q not in found):  # fmt: skip
        try:
            answer = function(data)
        except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
            raise QtutorError(f"Results '{machine}/{data.name}' do not answer '{question}' ({type(error).__name__}: "
                              f"{error}): bring tools/report.py in step with them.") from None  # fmt: skip
        if answer:
            found[question] = (question, machine, data, answer)
    return list(found.values())


def _notebook_link(about: About, way: str, folder=None) -> str:
    """A link to the notebook, from a page whose way to the project's root is ``way``; its topic if it is missing."""
    name = next((name for name in notebooks.names(folder) if topic(name) == about.topic), None)
    return f"[{name[:2]}]({way}notebooks/{name}.ipynb)" if name else about.topic


def headline_table(directory=None, folder=None) -> str:
    """README's table of headline results, as Markdown."""
    lines = ["| Question | Answer | Measured on | From |", "|---|---|---|---|"]
    for question, machine, data, answer in headlines(directory):
        link = f"[{data.name}](data/results/{machine}/{data.name}.json)"
        notebook = _notebook_link(RESULTS[data.name], "", folder)
        lines.append(f"| {question} | {answer} | {data.device} | {notebook}, {link} |")
    return "\n".join(lines)


def _machine(about: dict) -> str:
    if "compute_capability" not in about:
        return f"{about['device']}; {about.get('cores', '?')} cores, {about.get('memory_gib', '?')} GiB"
    said = [about["device"], f"{about['memory_gib']:.1f} GiB, compute capability {about['compute_capability']}"]
    said += [f"driver {about['driver']}"] if about.get("driver") else []
    said += [f"host {about['cpu']}, {about.get('cores', '?')} cores"] if about.get("cpu") else []
    return "; ".join(said)


HEAD = """# All results, and where they come from

<!-- written by `python -m tools.report write`: change the measurements, not this page -->

One file holds what one machine measured: flat rows, the unit in the name of the column, the standard error
beside it as `..._se`. `qtutor.results.load(name, machine)` reads it; the schema, and what each column means,
are in [qtutor/results.py](../../qtutor/results.py). Comparisons stay within one file, because they must stay
within one machine. A `+` behind the commit: files of the package differed from it when the rows were
measured. `unknown`: measured from a copy of the files without its history. *Profile*: `full` is the size of
a run that a GPU gets, `quick` that of a laptop.

| File | What it shows | Machine | Measured | Rows | Notebook |
|---|---|---|---|---|---|
"""
OPEN = """
## Not recorded yet

`make results` on a machine that has what it takes records them, and this page then lists them.

| Results | What they would show | What it takes | Notebook |
|---|---|---|---|
"""


def page(directory=None, folder=None) -> str:
    """``data/results/README.md``: every file with its provenance, as Markdown."""
    listed, provenance, found = [], [], recorded(directory)
    for machine, data in found:
        about = RESULTS.get(data.name) or About("", "any", "?", "*not described yet: add it to tools/report.py*")
        link, columns = _notebook_link(about, "../../", folder), dict.fromkeys(key for row in data.rows for key in row)
        listed.append(f"| [{machine}/{data.name}]({machine}/{data.name}.json) | {about.shows} | {data.device} | "
                      f"{data.created[:10]} | {len(data.rows)} | {link} |\n")  # fmt: skip
        provenance += [
            f"\n### {machine}/{data.name}\n",
            f"- **recorded by** `tools/{about.by}.py`, shown in notebook {link}",
            f"- **machine** {_machine(data.machine)}",
            f"- **when** {data.created}, commit `{data.commit}`, profile {data.profile}",
            *([f"- **migrated** {data.migrated}"] if data.migrated else []),
            "- **versions** " + ", ".join(f"{name} {version}" for name, version in data.versions.items()),
            f"- **rows** {len(data.rows)}, with the columns " + ", ".join(f"`{name}`" for name in columns),
        ]
    open_ = [f"| {name} | {about.shows} | {NEEDS[about.needs][0]} | {_notebook_link(about, '../../', folder)} |\n"
             for name, about in missing(directory).items()]  # fmt: skip
    return (HEAD + "".join(listed) + (OPEN + "".join(open_) if open_ else "") + "\n## Provenance\n"
            + "\n".join(provenance) + "\n")  # fmt: skip


def with_block(text: str, name: str, inside: str) -> str:
    """``text`` with ``inside`` between its lines ``<!-- name -->`` and ``<!-- /name -->``."""
    match = re.fullmatch(rf"(.*<!-- {name} -->\n).*?(<!-- /{name} -->.*)", text, re.S)
    if not match:
        raise QtutorError(f"README.md lacks its markers <!-- {name} --> and <!-- /{name} -->: restore them with "
                          "'git checkout README.md'.")  # fmt: skip
    return match[1] + inside + ("\n" if inside else "") + match[2]


def documents(root=None, directory=None) -> dict[Path, str]:
    """What each generated file should hold: {path: text}."""
    root = Path(root or files.ROOT)
    folder, directory = root / "notebooks", directory or root / "data" / "results"
    found, front = notebooks.pages(root), root / "README.md"
    if front not in found:
        raise QtutorError("README.md is missing: restore it with 'git checkout README.md'.")
    text = with_block(found[front], "runs", runs.time_for_all(directory))
    found[front] = with_block(text, "results", headline_table(directory, folder))
    found[root / PAGE] = page(directory, folder)
    return found


def stale(root=None, directory=None) -> dict[Path, str]:
    """The generated files that differ from what they should hold: {path: text}."""
    return {path: text for path, text in documents(root, directory).items()
            if not path.is_file() or path.read_text("utf-8") != text}  # fmt: skip


def check(root=None, directory=None) -> list[str]:
    """What is out of step with ``data/results`` and the notebooks: one line each, an empty list when nothing is."""
    root = Path(root or files.ROOT)
    directory = directory or root / "data" / "results"
    found = [f"{path.relative_to(root)} is out of step: python -m tools.report write"
             for path in stale(root, directory)]  # fmt: skip
    for line in re.findall(r"^\| \d\d \| .* \|  \|$", (root / "README.md").read_text("utf-8"), re.M):
        found.append(f"README.md's map does not say what this notebook is about: {line}")
    return found + [f"results '{name}' are not described: add them to RESULTS in tools/report.py"
                    for name in sorted({data.name for _, data in recorded(directory)} - set(RESULTS))]  # fmt: skip


def write(root=None, directory=None) -> list[Path]:
    """Write the generated files that changed; return their paths."""
    return [files.write_text(path, text) for path, text in stale(root, directory).items()]


def can_record(name: str) -> bool:
    """Whether this machine has what results ``name`` need."""
    return NEEDS[RESULTS[name].needs][1]()


def recorder(name: str) -> Callable:
    """The function that records results ``name``: ``function(full)`` returns what it wrote, a path or several."""
    return importlib.import_module(f"{__package__}.{RESULTS[name].by}").RECORDS[name]


def record(only=(), full: bool = True) -> int:
    """Measure what this machine can, or only results of some names; write the tables; return the exit status.

    ``full``: at the size that is kept, whatever the machine; otherwise a try, in minutes.
    """
    if unknown := [name for name in only if name not in RESULTS]:
        raise QtutorError(f"There are no results {unknown[0]!r}: choose from {', '.join(RESULTS)}.")
    os.environ["QTUTOR_PROFILE"] = "full" if full else "quick"  # for the processes that a recorder starts
    done, failed = set(), 0
    for name in only or RESULTS:
        if not can_record(name):
            print(f"{name}: not here, it needs {NEEDS[RESULTS[name].needs][0]}", flush=True)
            continue
        try:
            function = recorder(name)
            if function in done:  # it has written this file together with another
                continue
            done.add(function)
            print(f"{name} ...", flush=True)
            written = function(full)
        except Exception as error:  # whatever stops one must not stop the others
            failed += 1
            reason = str(error) if isinstance(error, QtutorError) else f"{type(error).__name__}: {error}"
            print(f"{name}: failed: {reason}", flush=True)
            continue
        for path in [written] if isinstance(written, str | Path) else written:
            print(f"{name}: recorded {keep(Path(path))}", flush=True)
    for path in write():
        print(f"written: {path}")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    """``write | check | record [names]``; return 1 where ``check`` finds something or a recording fails."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description="write or check README's tables and "
                                     "the page of all results, or measure them again")  # fmt: skip
    parser.add_argument("action", choices=("write", "check", "record"))
    parser.add_argument("name", nargs="*", help="with record: names of results; all of them by default")
    parser.add_argument("--quick", action="store_true", help="with record: a try at a small size")
    options = parser.parse_args(argv)
    if options.action == "record":
        return record(options.name, not options.quick)
    found = [f"{path}: written" for path in write()] if options.action == "write" else check()
    print("\n".join(found) or "everything is in step")
    return 1 if found and options.action == "check" else 0


if __name__ == "__main__":
    command(main)
