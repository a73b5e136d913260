"""From requirements to a decision: what is impossible goes, what is unknown says so, and the best of the rest is named.

    need = Need(model="Llama-2-70B", device="H100 SXM", users=8, tokens_per_s=10, max_loss=0.005)
    decision = decide(need)
    decision.sentence          # the recommendation, or what would have to give way, and by how much
    decision.frame()           # every technique, why or why not
    decision.best.rows         # the measured rows that the recommendation rests on

:func:`decide` goes three steps: constraints (memory, hardware, loss, speed, cost), then the front of what is left, then
one recommendation by what the reader prefers.  Sizes are computed (:mod:`qtutor.decide.capacity`).  Losses are those of
the course model, measured in the recording ``tradeoff``.  Speeds were measured at the shapes of Llama-2-7B
(``tradeoff``) and Llama-2-70B (``llama70b``), and are carried over to another device or a similar model as an interval.

A technique that nobody has measured is "unknown", which is no pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .. import QtutorError, paired, results
from . import capacity, cost, hardware
from .techniques import TECHNIQUES, Technique

GIB = 2**30
RUNTIMES = ("any", "pytorch", "llama.cpp")
PREFER = ("quality", "speed", "memory")
AFTER_QAT = Technique("torchao INT4 group 32, after QAT", "qat", "pytorch",
                      "QATConfig(base, step='prepare'), train, step='convert'", needs="gpu", trained=True)  # fmt: skip
# stored in the same form: trained weights do not change size and speed, torch.compile neither size nor quality
SAME_FORM = {AFTER_QAT.name: "torchao INT4 group 32", "QAT Q4_0": "GGUF Q4_0"}
SAME_FORM |= {name: name.removesuffix(", compiled") for name, one in TECHNIQUES.items() if one.compiled}


@dataclass(frozen=True)
class Need:
    """What is wanted, and what there is."""

    model: str = "Llama-2-7B"  # a name in capacity.MODELS, or a folder with a config.json
    device: str | hardware.Device = "H100 SXM"  # itself, its name in hardware.DEVICES, or its driver's name for it
    users: int = 1  # sequences at the same time
    context: int = 4096  # tokens that the cache of each user holds
    tokens_per_s: float = 0.0  # wanted speed for each user
    max_loss: float = math.inf  # perplexity that may be lost: 0.01 is 1 %
    usd_per_hour: float | None = None  # by default the device's example price
    max_usd_per_million: float = math.inf  # what a million tokens may cost
    can_train: bool = False  # whether there is a budget for quantization-aware training
    runtime: str = "any"  # or "pytorch" (Transformer Engine too), or "llama.cpp"
    keep_free_gib: float = 0.0  # memory to leave free: for one more user, or a longer prompt
    prefer: str = "quality"  # or "speed", or "memory": what decides among those that will do

    def __post_init__(self):
        for name, allowed in (("runtime", RUNTIMES), ("prefer", PREFER)):
            if getattr(self, name) not in allowed:
                raise QtutorError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        for name in ("tokens_per_s", "max_loss", "max_usd_per_million", "keep_free_gib"):
            if not getattr(self, name) >= 0:
                raise QtutorError(f"{name} must be a number that is not negative, and is {getattr(self, name)!r}.")


class Recording:
    """The results a decision rests on: ``tradeoff`` (of a GPU, else of a CPU), ``llama70b`` and ``qat_recovery``."""

    def __init__(self, directory=None):
        self.tradeoff, self.llama70b, self.qat = (
            results.on_gpu(name, directory) for name in ("tradeoff", "llama70b", "qat_recovery"))  # fmt: skip
        if self.tradeoff is None and results.exists("tradeoff", "cpu", directory):
            self.tradeoff = results.load("tradeoff", "cpu", directory)

    def quality(self, technique: Technique) -> list[dict]:
        """The rows of the course model with this technique, one for each seed."""
        if technique is AFTER_QAT:
            return _rows(self.qat, scheme="W4A16", arm="QAT, distilled")
        name = SAME_FORM[technique.name] if technique.compiled else technique.name
        rows = _rows(self.tradeoff, shape="course", technique=name, batch=1)
        return [row for row in rows if row.get("perplexity_ratio") is not None]

    def speeds(self, technique: Technique, model: str) -> tuple[str, str, list[dict]] | None:
        """(model, device, rows by batch) of a measured shape within twice the size of ``model``; None where none is.  A
        small model keeps a fast memory less busy than a large one: 7B says little about 70B."""
        name = SAME_FORM[technique.name] if technique.trained else technique.name
        seven = _rows(self.tradeoff, shape="llama2_7b", technique=name)
        seventy = _rows(self.llama70b, kind="batch", type=technique.gguf, fits=True)
        for known, run, rows in (("Llama-2-7B", self.tradeoff, seven), ("Llama-2-70B", self.llama70b, seventy)):
            rows = sorted((row for row in rows if row.get("decode_tokens_per_s")), key=lambda row: row["batch"])
            if rows and 0.5 < capacity.parameters(known) / capacity.parameters(model) < 2:
                return known, run.device, rows
        return None


def _rows(run: results.Results | None, **where) -> list[dict]:
    return [row for row in (run.rows if run else ()) if all(row.get(key) == value for key, value in where.items())]


def weight_bytes(technique: Technique, model: str, recording: Recording) -> tuple[float, float] | None:
    """(bytes of the weights, bytes of them that a token reads); None where no size is known.

    GGUF: to the byte, by llama.cpp's dry run.  PyTorch: what the layers of Llama-2-7B's shape took, scaled to this
    model's; embedding and head stay in 16 bits.
    """
    if technique.gguf:
        size = capacity.size(model, technique.gguf)
        return size.tensor_bytes, size.read_bytes
    rows = _rows(recording.tradeoff, shape="llama2_7b", technique=SAME_FORM.get(technique.name, technique.name))
    if not (rows := [row for row in rows if row.get("weights_mb")]):
        return None
    (weights7, tables7, _), (weights, tables, embedding) = _counts("Llama-2-7B"), _counts(model)
    per_weight = (rows[0]["weights_mb"] * 1e6 - 2 * tables7) / (weights7 - tables7)
    total = per_weight * (weights - tables) + 2 * tables
    return total, total - 2 * embedding


def _counts(model: str) -> tuple[int, int, int]:
    """Weights of a model, of its embedding and head together, and of the embedding that a token does not read."""
    shapes = capacity.shapes(model)
    table, tied = math.prod(shapes["token_embd.weight"]), "output.weight" not in shapes
    return capacity.parameters(model), table if tied else 2 * table, 0 if tied else table


def speed(technique: Technique, need: Need, read: float, recording: Recording) -> tuple[float, float, list[dict]]:
    """(at least, at most) tokens/s for each user, and the measured rows behind them.

    Where nothing was measured: 0, and the ceiling of the bandwidth.  A measured step is carried over in two ways: all
    of it in proportion to bytes / bandwidth; or only its wait for memory, while the rest (launching kernels, unpacking,
    arithmetic) takes as long as it did.  The truth lies between.  At the measured shape, on the measured device, both
    give back the measurement.
    """
    device, per_token = hardware.device(need.device), capacity.kv_bytes_per_token(need.model, cached=need.context)
    floor_s = (read + need.users * need.context * per_token) / (device.gb_per_s * 1e9)
    measured = recording.speeds(technique, need.model) if device.cuda else None
    if measured is None or not measured[2][0]["batch"] <= need.users <= measured[2][-1]["batch"]:
        return 0.0, 1 / floor_s, []
    known, on, rows = measured
    batches = [row["batch"] for row in rows]
    step_s = np.interp(need.users, batches, [row["batch"] / row["decode_tokens_per_s"] for row in rows])
    cached = np.interp(need.users, batches, [  # tokens of a sequence, on average over the measurement
        row.get("decode_context") or row["prefill_tokens"] + row["decode_tokens"] / 2 for row in rows])
    read_there = weight_bytes(technique, known, recording)[1]
    bytes_there = read_there + need.users * cached * capacity.kv_bytes_per_token(known)
    floor_there_s = bytes_there / (hardware.device(on).gb_per_s * 1e9)
    in_proportion, rest_stays = step_s / floor_there_s * floor_s, step_s - floor_there_s + floor_s
    used = [row for row in rows if row["batch"] == need.users] or rows
    return 1 / max(in_proportion, rest_stays), 1 / min(in_proportion, rest_stays), used


@dataclass
class Option:
    """A technique under given requirements; what was not measured is None."""

    technique: Technique
    missed: dict = field(default_factory=dict)  # requirement -> what is wrong
    relax: dict = field(default_factory=dict)  # requirement -> what to give way on, and by how much
    unknown: dict = field(default_factory=dict)  # requirement -> what nobody has measured
    memory_gib: float | None = None
    loss: float | None = None  # share of perplexity, of the course model
    loss_se: float | None = None
    kld: float | None = None  # nats, of the course model
    speed: tuple[float, float] | None = None  # tokens/s for each user, at least and at most
    usd_per_million: tuple[float, float] | None = None
    rows: list = field(default_factory=list)  # the measurements behind all of it
    faults: int = 0
    factor: float = 1.0

    @property
    def verdict(self) -> str:
        """ "yes", "no", or "unknown": nothing speaks against it, but not all of it was measured."""
        return "no" if self.missed else "unknown" if self.unknown else "yes"

    def miss(self, name: str, wrong: str, relax: str, factor: float | None = None) -> None:
        """Note a requirement that is missed by a ``factor``; None is harder to give way on than any number."""
        self.missed[name], self.relax[name] = wrong, relax
        self.faults += 3 if factor is None else 1
        self.factor *= factor or 1.0

    def distance(self) -> tuple:
        """How far it is from what is needed: verdict, requirements missed, by which factor; then its quality."""
        quality = math.inf if self.kld is None else self.kld
        verdict = ("yes", "unknown", "no").index(self.verdict)
        return verdict, self.faults + 0.5 * len(self.unknown), self.factor, quality


def assess(technique: Technique, need: Need, recording: Recording) -> Option:
    """Hold one technique against every requirement."""
    option, device = Option(technique), hardware.device(need.device)
    if need.runtime not in ("any", "pytorch" if technique.runtime == "te" else technique.runtime):
        option.miss("runtime", f"it runs in {technique.runtime}", f"use {technique.runtime}")
    if technique.needs == "fp8" and not device.fp8:
        option.miss("hardware", f"it needs FP8 units, which {device.name} does not have", "use a GPU that has them")
    elif technique.runtime != "llama.cpp" and not device.cuda:
        option.miss("hardware", "its size and speed were measured on a CUDA GPU, and there is none here", "use a GPU")
    if technique.trained and not need.can_train:
        option.miss("training", "it must be trained, and there is no budget for that", "plan a training run")
    _quality(option, need, recording)
    found = weight_bytes(technique, need.model, recording)
    if found is None:
        option.unknown["memory"] = "its size has not been measured"
    elif "hardware" not in option.missed:
        _memory(option, need, device, found[0])
        _speed(option, need, device, found[1], recording)
    return option


def _quality(option: Option, need: Need, recording: Recording) -> None:
    rows = recording.quality(option.technique)
    if not rows:
        option.unknown["quality"] = "its loss has not been measured"
        return
    option.rows += rows
    ratio, option.loss_se, option.kld = (
        float(np.mean([row[key] for row in rows])) for key in ("perplexity_ratio", "perplexity_ratio_se", "kld_mean"))
    option.loss = ratio - 1
    if option.loss > need.max_loss:
        wrong = f"it costs {option.loss:.2%} of perplexity, and {need.max_loss:.2%} of perplexity is allowed"
        option.miss("loss", wrong, f"allow {option.loss:.2%} more perplexity", option.loss / max(need.max_loss, 1e-3))


def _memory(option: Option, need: Need, device: hardware.Device, weights: float) -> None:
    if option.technique.gguf and device.cuda:  # to the MiB, as llama.cpp plans it
        fit = capacity.fits(need.model, option.technique.gguf, need.context, device, users=need.users)
        option.memory_gib = fit.total_gib
    else:
        cache = capacity.kv_bytes(need.model, need.context, users=need.users)
        option.memory_gib = (weights + cache) / GIB + device.reserve_gib
    there = device.memory_gib - need.keep_free_gib
    if (over := option.memory_gib - there) > 0:
        per_token = capacity.kv_bytes_per_token(need.model, cached=need.context)
        free = f", of which {need.keep_free_gib:g} are to stay free" if need.keep_free_gib else ""
        tokens = need.users * need.context - int(over * GIB / per_token) - 1
        cut = f", or keep all users' contexts within {tokens:,} tokens together" if tokens >= 256 else ""
        option.miss("memory", f"it needs {option.memory_gib:.1f} GiB and there are {device.memory_gib:.1f}{free}",
                    f"find {over:.1f} GiB more{cut}", option.memory_gib / max(there, 1e-9))  # fmt: skip


def _speed(option: Option, need: Need, device: hardware.Device, read: float, recording: Recording) -> None:
    low, high, rows = speed(option.technique, need, read, recording)
    option.speed = low, high
    option.rows += rows
    said = f"for each user, and {need.tokens_per_s:g} are wanted" if need.tokens_per_s else "for each user"
    if high < need.tokens_per_s * 0.999:  # floating-point noise decides nothing
        wrong = f"it writes at most {high:.3g} tokens/s {said}"
        option.miss("speed", wrong, f"accept {high:.3g} tokens/s", need.tokens_per_s / high)
    elif not rows:
        option.unknown["speed"] = f"its speed has not been measured ({_between(low, high)} tokens/s {said})"
    elif low < need.tokens_per_s * 0.999:
        option.unknown["speed"] = f"it writes {_between(low, high)} tokens/s {said}"
    usd_per_hour = device.usd_per_hour if need.usd_per_hour is None else need.usd_per_hour
    if usd_per_hour is not None:
        dearest = cost.cost_per_million_tokens(need.users * low, usd_per_hour) if low else math.inf
        option.usd_per_million = cost.cost_per_million_tokens(need.users * high, usd_per_hour), dearest
    cheapest, most = option.usd_per_million or (0.0, math.inf)
    if cheapest > need.max_usd_per_million:
        wrong = f"a million tokens cost at least {cheapest:.2f} USD, and {need.max_usd_per_million:.2f} are allowed"
        option.miss("price", wrong, f"allow {cheapest:.2f} USD", cheapest / max(need.max_usd_per_million, 1e-9))
    elif most > need.max_usd_per_million:
        option.unknown["price"] = f"a million tokens cost {cheapest:.2f} USD or more"


def _between(low: float, high: float, number: str = ".3g") -> str:
    if low == 0 or high == math.inf:
        return f"at most {high:{number}}" if low == 0 else f"{low:{number}} or more"
    return f"about {(low * high) ** 0.5:{number}}" if high < 1.1 * low else f"{low:{number}} to {high:{number}}"


# preference -> what is compared, in this order; the smaller wins
ORDER = {
    "quality": lambda o: (o.kld, o.memory_gib),
    "speed": lambda o: (-o.speed[0], o.kld),
    "memory": lambda o: (o.memory_gib, o.kld),
}


def dominates(a: Option, b: Option) -> bool:
    """True where ``a`` is no worse than ``b`` in memory, quality and speed, and better in one of them."""
    mine, other = ((o.memory_gib, o.kld, -o.speed[0]) for o in (a, b))
    return all(x <= y for x, y in zip(mine, other, strict=True)) and mine != other


def decide(need: Need, directory=None) -> Decision:
    """Constraints, then the front of what is left, then one recommendation by ``need.prefer``."""
    recording = Recording(directory)
    options = [assess(technique, need, recording) for technique in (*TECHNIQUES.values(), AFTER_QAT)
               if not technique.emulated and technique.name != "FP32"]  # fmt: skip
    will_do = [option for option in options if option.verdict == "yes"]
    front = [option for option in will_do if not any(dominates(other, option) for other in will_do)]
    front.sort(key=ORDER[need.prefer])
    rest = sorted((option for option in options if option not in front), key=Option.distance)
    return Decision(need, front, [*front, *rest])


@dataclass
class Decision:
    """What :func:`decide` found: the ``front`` (best first) and all ``options``: yes, then unknown, then no.  ``best``
    is the recommended option, None where nothing is known to do."""

    need: Need
    front: list
    options: list

    best = property(lambda self: self.front[0] if self.front else None)

    @property
    def sentence(self) -> str:
        """The recommendation with its numbers; where nothing is known to do, what to measure or to relax."""
        first = self.options[0]
        name, wrong, unknown = first.technique.name, first.missed.values(), first.unknown.values()
        if first.verdict == "no":
            relax = " and ".join(first.relax.values())
            return f"Nothing will do. {name} comes closest, but {' and '.join(wrong)}: {relax}."
        if first.verdict == "unknown":
            return f"Nothing is known to do. {name} may: {' and '.join(unknown)}. Measure it first."
        there = hardware.device(self.need.device).memory_gib
        then = [f"Next on the front: {other.technique.name}." for other in self.front[1:2]]
        return (f"{name}: {first.memory_gib:.1f} of {there:.1f} GiB, {_between(*first.speed)} tokens/s a user, "
                f"perplexity {first.loss:+.2%} (course model). {then[0] if then else 'Nothing else is known to do.'}")

    def frame(self):
        """Every technique as a row of a pandas DataFrame, best first: will it do, and why or why not."""
        import pandas

        return pandas.DataFrame([{
            "technique": o.technique.name, "will do": o.verdict,
            "memory, GiB": "" if o.memory_gib is None else f"{o.memory_gib:.1f}",
            "tokens/s a user": "" if o.speed is None else _between(*o.speed),
            "USD / 1M tokens": "" if o.usd_per_million is None else _between(*o.usd_per_million, ".2f"),
            "perplexity": "not measured" if o.loss is None else f"{o.loss:+.2%} ± {o.loss_se:.2%}",
            "why": "; ".join([*o.missed.values(), *o.unknown.values()])
                   or ("on the front" if o in self.front else "another is no worse in anything"),
        } for o in self.options]).set_index("technique")  # fmt: skip


RECIPES = {"BF16": 0.0, "FP8 delayed": 8.9, "FP8 current": 8.9, "FP8 block": 9.0}  # -> compute capability that it needs
SAME_LOSS_NATS = 0.02  # a recipe may end this much above BF16's held-out loss: 2 % of perplexity


def training(model: str, device="H100 SXM", tokens_per_step: int = 16384, directory=None):
    """Recipes of Transformer Engine as rows of a pandas DataFrame, the recommended one first.

    Recommended is the fastest that runs on ``device``, was measured to be faster than BF16 at this width and number of
    tokens in a step, and whose held-out loss ends within SAME_LOSS_NATS of BF16's.  ``memory``: peak, as a multiple of
    BF16's.  Whether the run fits (optimizer, sharding) is not checked.
    """
    import pandas

    device, width = hardware.device(device), capacity.shapes(model)["token_embd.weight"][1]
    rows = []
    for recipe, capability in RECIPES.items():
        speed, memory = _step_against_bf16(recipe, width, tokens_per_step, directory)
        loss, low, high = _loss(recipe, directory)
        why = (f"it needs compute capability {capability}" if (device.compute_capability or 0) < capability else
               "its speed was not measured at this size" if speed is None else
               "its loss was not measured" if loss is None else
               "its loss ends too far from BF16's" if loss > SAME_LOSS_NATS else
               "slower than BF16" if speed < 1 else "")  # fmt: skip
        rows.append({"recipe": recipe, "speed": speed, "memory": memory, "loss, nats": loss, "from": low, "to": high,
                     "will do": not why, "why not": why})  # fmt: skip
    return pandas.DataFrame(rows).sort_values(["will do", "speed"], ascending=False).set_index("recipe")


def _step_against_bf16(recipe: str, width: int, tokens: int, directory) -> tuple[float | None, float | None]:
    """Speed and peak memory of a training step as multiples of BF16's, measured at this width and no more tokens."""
    if recipe == "BF16":
        return 1.0, 1.0
    layers, steps = (results.on_gpu(name, directory) for name in ("fp8_layers", "fp8_breakeven"))
    rungs = {row["rung"]: row for row in _rows(layers, hidden=width) if row["tokens"] <= tokens}
    if {"TE BF16", f"TE {recipe}"} <= set(rungs):
        base, this = rungs["TE BF16"], rungs[f"TE {recipe}"]
        return base["ms_per_step"] / this["ms_per_step"], this["peak_gib"] / base["peak_gib"]
    near = [row for row in _rows(steps, graph=True) if row["hidden"] <= width and row["tokens"] <= tokens]
    best = max(near, key=lambda row: (row["hidden"], row["tokens"]), default={}) if recipe == "FP8 delayed" else {}
    return best.get("speedup"), None


def _loss(recipe: str, directory) -> tuple[float | None, float | None, float | None]:
    """Mean of the gaps to BF16's loss, and the ends of its 95 % interval over seeds."""
    gaps = paired.loss_gaps(_rows(results.on_gpu("fp8_loss", directory)), recipe)
    if len(gaps) < 2:
        return (*(gaps or [None]), None, None)
    gap = paired.paired_nll(gaps)
    return gap.difference, gap.low, gap.high
