"""The rules of the decision guide, as data: each is tied to the measured rows that it rests on.

A guide written as prose goes out of date without anybody noticing.  Here a rule is a row of data:

    when      an expression over the requirements:       "task == 'serve' and prompt_heavy"
    evidence  named cells of data/results:               fp8 = prefill_ms of the row FP8 in fp8_inference ...
    claim     an expression over the evidence:           "bf16 / fp8 > 1.2"
    because   a sentence whose numbers are computed:     "its prompt processing is {bf16 / fp8:.2f} times as fast"
    effect    points for (or against) a technique

A rule is applied where its condition is met *and* its claim is true of what was measured.  Where nothing was measured
it says so and counts for nothing; where a new measurement contradicts it, it is not applied, and a test fails.
:mod:`qtutor.decide.choosing` decides with them.
"""

from __future__ import annotations

import ast
import functools
import re
import statistics
from dataclasses import dataclass, field

from .. import QtutorError, results

# ------------------------------------------------------------------------------------------------------ expressions

_ALLOWED = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub,
            ast.Mult, ast.Div, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn,
            ast.Name, ast.Load, ast.Constant, ast.Tuple)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _compiled(expression: str):
    try:
        tree = ast.parse(str(expression).strip(), mode="eval")
    except SyntaxError:
        raise QtutorError(f"{expression!r} is not an expression: write something like 'users >= 8 and gpu'.") from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise QtutorError(f"{expression!r} has a {type(node).__name__}: an expression of a rule may only compare "
                              "and compute.")  # fmt: skip
    return compile(tree, expression, "eval")


def evaluate(expression: str, names: dict):
    """The value of an expression of names, numbers, strings, comparisons and arithmetic: ``"bf16 / fp8 > 1.2"``.

    Raises QtutorError for anything else (calls, attributes, ...), for a name that is not in ``names``, and for values
    that cannot be computed with or compared.
    """
    try:
        return eval(_compiled(expression), {"__builtins__": {}}, names)
    except NameError as error:
        raise QtutorError(f"{expression!r}: {error}; there are {', '.join(sorted(names))}.") from None
    except (ArithmeticError, TypeError) as error:
        raise QtutorError(f"{expression!r} cannot be computed: {error}.") from None


def fill(template: str, names: dict) -> str:
    """A sentence with its numbers: ``{expression:format}`` is replaced by the formatted value of the expression."""

    def one(match):
        try:
            return format(evaluate(match[1], names), match[2] or "")
        except (ValueError, TypeError):
            raise QtutorError(f"{match[0]} has no format that fits its number: write {{a / b:.2f}}.") from None

    return re.sub(r"\{([^{}:]+)(?::([^{}]*))?\}", one, template)


# --------------------------------------------------------------------------------------------------------- evidence


@dataclass(frozen=True)
class Cell:
    """A measured number: column ``column`` of the rows of results ``result`` whose columns equal ``where``.

    Where several rows match (seeds), their mean.  ``machine``: "gpu" (the first GPU that has recorded them), "cpu", or
    "any" (a GPU before a CPU).
    """

    result: str
    column: str
    where: tuple = ()  # (column, value), ...
    machine: str = "any"

    def __str__(self) -> str:
        rows = ", ".join(f"{key} = {value}" for key, value in self.where)
        return f"{self.result}: {self.column} where {rows}"


def cell(result: str, column: str, on: str = "any", **where) -> Cell:
    """A :class:`Cell`, with ``where`` as keyword arguments, ``on`` a machine."""
    return Cell(result, column, tuple(where.items()), on)


@dataclass(frozen=True)
class Found:
    """The value of a cell, how many rows it is the mean of, and the machine (folder, device) that measured them."""

    value: float
    rows: int
    machine: str
    device: str


@functools.lru_cache(maxsize=64)
def _loaded(name: str, machine: str, directory: str | None, stamp: float) -> results.Results:
    return results.load(name, machine, directory)


def recorded(name: str, directory=None, on: str = "any") -> tuple[str, results.Results] | None:
    """(folder, results) of the first machine that has them, GPUs first; None where none has.  ``on``: see Cell."""
    for machine in (*[m for m in results.MACHINES if m != "cpu"], "cpu"):
        if (on == "any" or (machine == "cpu") == (on == "cpu")) and results.exists(name, machine, directory):
            path = results._path(name, machine, directory)
            return machine, _loaded(name, machine, None if directory is None else str(directory), path.stat().st_mtime)
    return None


def find(cells, directory=None) -> Found | None:
    """Resolve a cell, or the first of several alternatives that resolves; None where nothing was recorded."""
    for one in cells if isinstance(cells, (list, tuple)) else (cells,):
        found = recorded(one.result, directory, one.machine)
        if found is None:
            continue
        machine, data = found
        rows = [row for row in data.rows if all(row.get(key) == value for key, value in one.where)]
        values = [row[one.column] for row in rows if row.get(one.column) is not None]
        if any(isinstance(value, str) for value in values):
            raise QtutorError(f"The column {one.column} of {one.result} holds words: a rule rests on numbers.")
        if values:
            return Found(statistics.fmean(values), len(values), machine, data.device)
    return None


def _cells(one) -> tuple:
    return tuple(one) if isinstance(one, (list, tuple)) else (one,)


def find_all(evidence: dict, directory=None) -> dict[str, Found] | None:
    """All cells of a piece of evidence, from one machine; None where one is missing."""
    found = {name: find(one, directory) for name, one in evidence.items()}
    if any(one is None for one in found.values()):
        return None
    return found if len({one.machine for one in found.values()}) <= 1 else None


# ------------------------------------------------------------------------------------------------------- techniques


@dataclass(frozen=True)
class Technique:
    """One way to store and run, or to train, a model.

    ``store``: ("gguf", type) or ("pytorch", the name of its row in fp8_inference), for its size and speed.
    ``loss`` and ``kld``: (expression, {name: cell, or alternatives}).  ``hardware``: "any", "gpu", "fp8", or
    "fp8 block" (FP8 units of Hopper or Blackwell: Transformer Engine has no block scaling on Ada).
    """

    name: str
    task: str
    ecosystem: str
    training: str
    hardware: str
    how: str
    notebook: str
    store: tuple = ()
    loss: tuple = ()
    kld: tuple = ()


COURSE, LLAMA7B = "course model", "Llama-2-7B shape"


def _pytorch(name: str, row: str, hardware: str, how: str) -> Technique:
    perplexity = {"its": cell("fp8_inference", "perplexity", model=COURSE, format=row),
                  "bf16": cell("fp8_inference", "perplexity", model=COURSE, format="BF16")}  # fmt: skip
    return Technique(name, "serve", "PyTorch", "none", hardware, how, "04", ("pytorch", row),
                     ("its / bf16 - 1", perplexity),
                     ("its", {"its": cell("fp8_inference", "kld_mean", model=COURSE, format=row)}))  # fmt: skip


def _gguf(kind: str) -> Technique:
    def column(name, other):
        return (cell("gguf_quality", name, type=kind, imatrix=False), cell("qat_gguf", other, model="PTQ", type=kind))

    return Technique(f"GGUF {kind}", "serve", "llama.cpp", "none", "any", f"llama-quantize model.gguf {kind}", "08",
                     ("gguf", kind), ("its - 1", {"its": column("perplexity_ratio", "ratio")}),
                     ("its", {"its": column("kld_mean", "kld_mean")}))  # fmt: skip


def _recipe(name: str, how: str, recipe: str | None) -> Technique:
    loss = {"its": cell("fp8_loss", "held_out_nats", recipe=recipe or "BF16", step=3000),
            "bf16": cell("fp8_loss", "held_out_nats", recipe="BF16", step=3000)}  # fmt: skip
    # a difference of d nats multiplies perplexity by exp(d), which is 1 + d for differences as small as these
    needs = {None: "gpu", "FP8 block": "fp8 block"}.get(recipe, "fp8")
    return Technique(name, "train", "PyTorch", "fine-tune", needs, how, "02",
                     loss=("its - bf16", loss))  # fmt: skip


def _qat(scheme: str, column: str) -> Cell:
    return cell("qat_recovery", column, scheme=scheme, arm="QAT, distilled")


TECHNIQUES = {one.name: one for one in (
    _pytorch("BF16", "BF16", "gpu", "model.to(torch.bfloat16)"),
    _pytorch("FP8 (Transformer Engine)", "FP8 Transformer Engine", "fp8", "te.Linear, quantized_model_init, autocast"),
    _pytorch("FP8 (torchao)", "FP8 torchao", "fp8", "quantize_(model, Float8DynamicActivationFloat8WeightConfig())"),
    _pytorch("INT8 weights (torchao)", "INT8 weights", "gpu", "quantize_(model, Int8WeightOnlyConfig())"),
    _pytorch("INT8 weights and activations (torchao)", "INT8 weights+activations", "gpu",
             "quantize_(model, Int8DynamicActivationInt8WeightConfig())"),
    _pytorch("INT4 weights (torchao)", "INT4 weights", "gpu", "quantize_(model, Int4WeightOnlyConfig())"),
    Technique("INT4 weights, after QAT", "serve", "PyTorch", "fine-tune", "gpu", "QATConfig(base, step='prepare'), "
              "train, step='convert'", "06", ("pytorch", "INT4 weights"), ("its - 1", {"its": _qat("W4A16", "ratio")}),
              ("its", {"its": _qat("W4A16", "kld_mean")})),
    *[_gguf(kind) for kind in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")],
    Technique("GGUF Q4_0, after QAT", "serve", "llama.cpp", "fine-tune", "any", "train on the grid of Q4_0, export",
              "06", ("gguf", "Q4_0"),
              ("its - 1", {"its": cell("qat_gguf", "ratio", model="QAT", type="Q4_0")}),
              ("its", {"its": cell("qat_gguf", "kld_mean", model="QAT", type="Q4_0")})),
    _recipe("BF16 training", "torch.autocast or te, BF16", None),
    _recipe("FP8 training, delayed scaling", "te.autocast(recipe=DelayedScaling())", "FP8 delayed"),
    _recipe("FP8 training, current scaling", "te.autocast(recipe=Float8CurrentScaling())", "FP8 current"),
    _recipe("FP8 training, block scaling", "te.autocast(recipe=Float8BlockScaling())", "FP8 block"),
)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ rules


@dataclass(frozen=True)
class Rule:
    """One row of the guide; see the module's docstring.  ``effect``: points, negative against the technique."""

    name: str
    techniques: tuple
    when: str
    effect: int
    because: str
    evidence: dict = field(hash=False)
    claim: str

    def __post_init__(self):
        unknown = [self.techniques] if isinstance(self.techniques, str) else set(self.techniques) - set(TECHNIQUES)
        if unknown:
            raise QtutorError(f"Rule {self.name}: techniques is a tuple of names of rules.TECHNIQUES, and "
                              f"{min(unknown)!r} is none.")  # fmt: skip
        if not isinstance(self.effect, int):
            raise QtutorError(f"Rule {self.name}: the effect is a whole number of points, not {self.effect!r}.")

    def status(self, directory=None) -> str:
        """``"holds"``, ``"not recorded"``, or ``"contradicted"`` by what was measured."""
        names = find_all(self.evidence, directory)
        if names is None:
            return "not recorded"
        return "holds" if evaluate(self.claim, {key: found.value for key, found in names.items()}) else "contradicted"

    def sentence(self, directory=None) -> str:
        """The rule's reason with the measured numbers; where there are none, which results it waits for."""
        names = find_all(self.evidence, directory)
        if names is None:
            missing = sorted({one.result for cells in self.evidence.values() for one in _cells(cells)})
            return f"not applied: {' or '.join(missing)} has not been recorded"
        return fill(self.because, {key: found.value for key, found in names.items()})

    def device(self, directory=None) -> str | None:
        """The device that the evidence was measured on; None where it was not."""
        found = find_all(self.evidence, directory)
        return next(iter(found.values())).device if found else None


def _two(result: str, column: str, **rows) -> dict:
    """Evidence of one column in several rows: ``_two("fp8_layers", "ms_per_step", bf16={...}, fp8={...})``."""
    return {name: cell(result, column, **where) for name, where in rows.items()}


def _layers(column: str, shape: str = "Llama-2-70B", **rungs) -> dict:
    return _two("fp8_layers", column, **{name: {"shape": shape, "rung": rung} for name, rung in rungs.items()})


def _inference(column: str, **formats) -> dict:
    return _two("fp8_inference", column, **{n: {"model": LLAMA7B, "format": f} for n, f in formats.items()})


def _quality(kind: str, column: str, other: str) -> tuple:
    return cell("gguf_quality", column, type=kind, imatrix=False), cell("qat_gguf", other, model="PTQ", type=kind)


FP8_RECIPES = {"FP8 training, delayed scaling": "TE FP8 delayed", "FP8 training, current scaling": "TE FP8 current",
               "FP8 training, block scaling": "TE FP8 block"}  # fmt: skip
ALL_FP8 = tuple(FP8_RECIPES)
PLAIN_4_BITS = ("INT4 weights (torchao)", "GGUF Q4_0", "GGUF Q4_K_M")
BOTH_INT4 = ("INT4 weights (torchao)", "INT4 weights, after QAT")
TE, INT8 = "FP8 (Transformer Engine)", "INT8 weights (torchao)"
# Where FP8 was measured to pay (fp8_breakeven): the narrower the layers, the more tokens a step must have, 512 at width
# 8,192, 1,024 at 4,096, 2,048 at 2,048.  Their product is 2 ** 22 each time.
ENOUGH = f"width * tokens_per_step >= {2**22}"
WIDE = f"task == 'train' and width >= 4096 and {ENOUGH}"

RULES = [
    # -- training
    *[Rule(f"{name.split(', ')[1].split()[0]}_is_faster", (name,), WIDE, 2,
           "a training step of two Llama-2-70B layers is {bf16 / fp8:.2f} times as fast as in BF16",
           _layers("ms_per_step", bf16="TE BF16", fp8=rung), "bf16 / fp8 > 1.2") for name, rung in FP8_RECIPES.items()],
    *[Rule(f"{name.split(', ')[1].split()[0]}_saves_energy", (name,), WIDE, 1,
           "and takes {1 - fp8 / bf16:.0%} less energy",
           _layers("joules_per_step", bf16="TE BF16", fp8=rung), "fp8 / bf16 < 0.9")
      for name, rung in FP8_RECIPES.items()],
    Rule("delayed_is_the_fastest", ALL_FP8[:1], WIDE, 1,
         "the fastest recipe: {current / delayed - 1:.0%} ahead of current scaling, {block / delayed - 1:.0%} of block",
         _layers("ms_per_step", delayed="TE FP8 delayed", current="TE FP8 current", block="TE FP8 block"),
         "delayed < current < block"),
    *[Rule(f"narrow_{width}", ALL_FP8, f"task == 'train' and {low} <= width < {high} and {ENOUGH}",
           points, said + " at width {width:.0f}: {speedup:.2f} times BF16's speed (8,192 tokens, CUDA graphs)",
           {"speedup": cell("fp8_breakeven", "speedup", hidden=width, tokens=8192, graph=True),
            "width": cell("fp8_breakeven", "hidden", hidden=width, tokens=8192, graph=True)}, claim)
      for width, low, high, points, said, claim in (
          (512, 0, 1024, -3, "FP8 is slower", "speedup < 1"),
          (1024, 1024, 2048, 0, "FP8 hardly pays", "1 < speedup < 1.2"),
          (2048, 2048, 4096, 1, "FP8 pays", "speedup > 1.2"))],
    Rule("few_tokens", ALL_FP8, "task == 'train' and tokens_per_step <= 256", -4,
         "with 256 tokens in a step FP8 is slower even at width 8192: {speedup:.2f} times BF16's speed",
         {"speedup": cell("fp8_breakeven", "speedup", hidden=8192, tokens=256, graph=True)}, "speedup < 1"),
    Rule("not_enough_tokens", ALL_FP8, f"task == 'train' and tokens_per_step > 256 and not {ENOUGH}", 0,
         "a step has too few tokens for this width: 512 at width 4096 give {wide:.2f} times BF16's speed, 1,024 at "
         "width 2048 {narrow:.2f} times (CUDA graphs)",
         {"wide": cell("fp8_breakeven", "speedup", hidden=4096, tokens=512, graph=True),
          "narrow": cell("fp8_breakeven", "speedup", hidden=2048, tokens=1024, graph=True)},
         "wide < 1.1 and narrow < 1.1"),
    *[Rule(f"{name.split(', ')[1].split()[0]}_trains_as_well", (name,), "task == 'train'", 0,
           "the course model's held-out loss ends {fp8 - bf16:+.3f} nats from BF16's (mean over seeds)",
           _two("fp8_loss", "held_out_nats", bf16={"recipe": "BF16", "step": 3000},
                fp8={"recipe": f"FP8 {name.split(', ')[1].split()[0]}", "step": 3000}), "-0.05 < fp8 - bf16 < 0.05")
      for name in ALL_FP8],
    Rule("fp8_training_takes_memory", ALL_FP8, "task == 'train'", 0,
         "it takes more memory, not less: {fp8:.1f} against {bf16:.1f} GiB, two layers ({both:.1f} with FP8 weights)",
         _layers("peak_gib", bf16="TE BF16", fp8="TE FP8 delayed", both="TE FP8 delayed + FP8 weights"),
         "fp8 > both > bf16"),
    # -- serving with PyTorch
    Rule("fp8_is_fast_at_prompts", (TE,), "task == 'serve' and (prompt_heavy or users >= 16)", 2,
         "prompt processing is {bf16 / fp8:.2f} times as fast as in BF16 (7B shape)",
         _inference("prefill_ms", bf16="BF16", fp8="FP8 Transformer Engine"), "bf16 / fp8 > 1.15"),
    Rule("fp8_halves_memory", (TE, "FP8 (torchao)"), "task == 'serve'", 0,
         "the weights take {1 - fp8 / bf16:.0%} less memory than BF16's",
         _inference("weights_gib", bf16="BF16", fp8="FP8 Transformer Engine"), "fp8 / bf16 < 0.6"),
    Rule("fp8_writes_no_faster", (TE,), "task == 'serve' and not prompt_heavy and users < 16", 0,
         "writing is no faster than BF16 at batch 1 ({bf16 / fp8:.2f} times, 7B shape), though it reads half the bytes",
         _inference("decode_ms_batch1", bf16="BF16", fp8="FP8 Transformer Engine"), "0.9 < bf16 / fp8 < 1.15"),
    Rule("fp8_saves_energy", (TE,), "task == 'serve'", 1, "a written token takes {1 - fp8 / bf16:.0%} less energy than "
         "BF16's (7B shape, batch 1)",
         _inference("decode_joules_batch1", bf16="BF16", fp8="FP8 Transformer Engine"), "fp8 / bf16 < 0.95"),
    Rule("int4_writes_fast", BOTH_INT4, "task == 'serve' and users == 1 and not prompt_heavy", 1,
         "writing for one user is {bf16 / int4:.2f} times as fast as in BF16 (7B shape)",
         _inference("decode_ms_batch1", bf16="BF16", int4="INT4 weights"), "bf16 / int4 > 1.1"),
    Rule("int4_is_slow_at_prompts", BOTH_INT4, "task == 'serve' and prompt_heavy", -3,
         "prompt processing takes {int4 / bf16:.0f} times as long as in BF16 (7B shape)",
         _inference("prefill_ms", bf16="BF16", int4="INT4 weights"), "int4 / bf16 > 2"),
    Rule("int4_is_slow_in_batches", BOTH_INT4, "task == 'serve' and users >= 16", -2,
         "with 32 users a step takes {int4 / bf16:.1f} times as long as in BF16 (7B shape)",
         _inference("decode_ms_batch32", bf16="BF16", int4="INT4 weights"), "int4 / bf16 > 1.2"),
    Rule("int8_is_slow", (INT8,), "task == 'serve' and gpu", -1,
         "writing takes {int8 / bf16:.1f} times as long as in BF16 without torch.compile (7B shape)",
         _inference("decode_ms_batch1", bf16="BF16", int8="INT8 weights"), "int8 / bf16 > 1.2"),
    Rule("int8_loses_nothing", (INT8,), "task == 'serve'", 1, "a KL divergence of {kld:.4f} nats: nothing to see",
         {"kld": cell("fp8_inference", "kld_mean", model=COURSE, format="INT8 weights")}, "kld < 0.005"),
    # -- GGUF types
    Rule("q8_0_is_the_original", ("GGUF Q8_0",), "task == 'serve'", 0, "perplexity {ratio - 1:+.2%}: the original, in "
         "half of BF16's memory", {"ratio": _quality("Q8_0", "perplexity_ratio", "ratio")}, "0.995 < ratio < 1.002"),
    Rule("q6_k_loses_little", ("GGUF Q6_K",), "task == 'serve'", 1, "perplexity {ratio - 1:+.2%}, a KL divergence of "
         "{kld:.4f} nats, at 6.6 bits a weight", {"ratio": _quality("Q6_K", "perplexity_ratio", "ratio"),
         "kld": _quality("Q6_K", "kld_mean", "kld_mean")}, "0.995 < ratio < 1.01 and kld < 0.02"),
    Rule("q4_k_m_beats_q4_0", ("GGUF Q4_0",), "task == 'serve'", -1,
         "Q4_K_M is hardly larger and closer to the original: KLD {km:.3f} against {q40:.3f}",
         {"km": _quality("Q4_K_M", "kld_mean", "kld_mean"), "q40": _quality("Q4_0", "kld_mean", "kld_mean")},
         "km < q40"),
    Rule("four_bits_write_faster", ("GGUF Q4_K_M", "GGUF Q4_0", "GGUF Q4_0, after QAT"),
         "task == 'serve' and gpu and users == 1 and not prompt_heavy", 1,
         "writing for one user is {q4 / f16:.2f} times as fast as from an F16 file (7B shape, Q4_K_M)",
         {"q4": cell("tradeoff", "decode_tokens_per_s", "gpu", shape="llama2_7b", technique="GGUF Q4_K_M", batch=1),
          "f16": cell("tradeoff", "decode_tokens_per_s", "gpu", shape="llama2_7b", technique="GGUF F16", batch=1)},
         "q4 / f16 > 1.2"),
    Rule("llama_cpp_on_a_cpu", tuple(name for name, one in TECHNIQUES.items() if one.ecosystem == "llama.cpp"),
         "task == 'serve' and not gpu", 0,
         "on a CPU llama.cpp writes {gguf / torch:.1f} times as fast as PyTorch in FP32 (course model, Q8_0)",
         {"gguf": cell("tradeoff", "decode_tokens_per_s", "cpu", shape="course", technique="GGUF Q8_0", batch=1),
          "torch": cell("tradeoff", "decode_tokens_per_s", "cpu", shape="course", technique="FP32", batch=1)},
         "gguf / torch > 1.2"),
    # -- with a training budget
    Rule("qat_at_4_bits", ("INT4 weights, after QAT",), "task == 'serve' and training != 'none'", 2,
         "QAT changes perplexity by {qat - 1:+.1%} where rounding costs {ptq - 1:+.1%} (W4A16, course model)",
         {"qat": _qat("W4A16", "ratio"), "ptq": cell("qat_recovery", "ratio", scheme="W4A16", arm="PTQ")},
         "qat < ptq - 0.02"),
    Rule("qat_onto_the_grid", ("GGUF Q4_0, after QAT",), "task == 'serve' and training != 'none'", 2,
         "trained on its grid, Q4_0 has a KLD of {qat:.3f} instead of {ptq:.3f}, below Q4_K_M's {km:.3f}",
         {"qat": cell("qat_gguf", "kld_mean", model="QAT", type="Q4_0"),
          "ptq": cell("qat_gguf", "kld_mean", model="PTQ, head in Q8_0", type="Q4_0"),
          "km": cell("qat_gguf", "kld_mean", model="PTQ", type="Q4_K_M")}, "qat < km < ptq"),
    Rule("fine_tune_then_round", PLAIN_4_BITS, "task == 'serve' and training != 'none'", -1,
         "fine-tuning first and rounding afterwards costs {control - 1:+.1%} perplexity, training through the rounding "
         "{qat - 1:+.1%} (W4A16)",
         {"control": cell("qat_recovery", "ratio", scheme="W4A16", arm="control"), "qat": _qat("W4A16", "ratio")},
         "control > qat"),
    Rule("nothing_to_recover_at_8_bits", ("INT8 weights and activations (torchao)", "GGUF Q8_0"),
         "task == 'serve' and training != 'none'", 0,
         "at 8 bits there is nothing to train back: rounding alone changes perplexity by {ptq - 1:+.2%} (W8A8)",
         {"ptq": cell("qat_recovery", "ratio", scheme="W8A8", arm="PTQ")}, "0.995 < ptq < 1.005"),
    # -- the 70B model on one GPU
    *[Rule(f"{kind.lower()}_70b_runs_on_80_gb", (f"GGUF {kind}",), "task == 'serve' and weights > 60e9", 2,
           "measured at Llama-2-70B's shape: {memory:.1f} GiB of GPU memory with 4,096 tokens of context, {speed:.1f} "
           "tokens/s", {"memory": cell("llama70b", "gpu_used_gib", kind="model", type=kind),
                        "speed": cell("llama70b", "decode_tokens_per_s", kind="model", type=kind)},
           "memory < 74 and speed > 5") for kind in ("Q6_K", "Q8_0")],
    Rule("q8_0_70b_is_faster", ("GGUF Q8_0",), "task == 'serve' and weights > 60e9", 1,
         "measured at Llama-2-70B's shape: {q8 / q6:.2f} times the speed of Q6_K, whose weights take longer to unpack "
         "than they save in reading", {"q8": cell("llama70b", "decode_tokens_per_s", kind="model", type="Q8_0"),
                                       "q6": cell("llama70b", "decode_tokens_per_s", kind="model", type="Q6_K")},
         "q8 / q6 > 1.02"),
    Rule("q4_k_m_70b_is_faster", ("GGUF Q4_K_M",), "task == 'serve' and weights > 60e9", 1,
         "measured at Llama-2-70B's shape: {q4 / q6:.2f} times the speed of Q6_K",
         {"q4": cell("llama70b", "decode_tokens_per_s", kind="model", type="Q4_K_M"),
          "q6": cell("llama70b", "decode_tokens_per_s", kind="model", type="Q6_K")}, "q4 / q6 > 1.02"),
    Rule("q4_k_m_70b_saves_energy", ("GGUF Q4_K_M",), "task == 'serve' and weights > 60e9", 0,
         "and {1 - q4 / q6:.0%} less energy a token",
         {"q4": cell("llama70b", "joules_per_decode_token", kind="model", type="Q4_K_M"),
          "q6": cell("llama70b", "joules_per_decode_token", kind="model", type="Q6_K")}, "q4 / q6 < 0.99"),
]  # fmt: skip


def rules_frame(directory=None):
    """All rules as a pandas DataFrame: name, techniques, condition, points, claim, status, the sentence, the device."""
    import pandas

    return pandas.DataFrame([{
        "rule": rule.name, "technique": ", ".join(rule.techniques), "when": rule.when, "points": rule.effect,
        "claim": rule.claim, "status": rule.status(directory), "because": rule.sentence(directory),
        "measured on": rule.device(directory) or "", "evidence": "; ".join(
            f"{name} = {' or '.join(map(str, _cells(cells)))}" for name, cells in rule.evidence.items()),
    } for rule in RULES]).set_index("rule")  # fmt: skip
