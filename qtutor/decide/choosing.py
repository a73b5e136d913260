"""From requirements to a decision: :mod:`qtutor.decide.rules` applied to what somebody needs.

What decides before any rule does is arithmetic: does it fit, is it accurate enough, fast enough, cheap enough?  Sizes
come from :mod:`qtutor.decide.capacity`, losses from measured rows, speeds from the memory bandwidth times the share of it that
was measured.  Then the rules give points, each with the measured rows it rests on.

    need = choosing.Need(model="Llama-2-70B", machine="H100 SXM", users=8, tokens_per_s=10, max_loss=0.005)
    decision = choosing.decide(need)
    print(decision.sentence)
    decision.frame()                # every technique, why or why not

Two things to know.  Losses were measured on the course model, which is small: larger models lose less at the same type
(compare notebook 08's table of llama.cpp's published figures), so a limit that holds here is on the safe side there.
And the share of the bandwidth was measured on one machine, at the shapes of Llama-2-7B and Llama-2-70B (GGUF) or of
Llama-2-7B alone (PyTorch); a slower memory is easier to keep busy.
"""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from .. import QtutorError
from .rules import LLAMA7B, RULES, TECHNIQUES, Technique, cell, evaluate, find, find_all, recorded, rules_frame

__all__ = ["Decision", "Machine", "Need", "Option", "decide", "decision_html", "explain", "explorer", "monthly",
           "readable", "rules_frame", "RULES", "TECHNIQUES"]  # fmt: skip
GIB = 2**30

# ----------------------------------------------------------------------------------------------------- requirements


@dataclass(frozen=True)
class Need:
    """What is wanted, and what there is.

    task:         "serve" (run a model) or "train" (train or fine-tune one)
    model:        a name in capacity.MODELS, or a folder with a config.json
    machine:      a name in capacity.GPUS, or None: then memory_gib, bandwidth_gb_per_s, gpu and fp8 say what it is
    memory_gib:   memory for the model, in GiB; of the machine by default
    bandwidth_gb_per_s: memory bandwidth in GB/s; of the machine by default
    context:      tokens that each user's cache holds;  users: sequences at the same time
    tokens_per_s: wanted speed for each user;  prompt_heavy: long prompts, short answers
    max_loss:     perplexity that may be lost, 0.01 is 1 %;  max_kld: mean KL divergence allowed, nats
    training:     what can be afforded before serving: "none", "fine-tune" (some thousand steps) or "pretrain"
    ecosystem:    "any", "PyTorch" or "llama.cpp"
    gpu, fp8:     a CUDA GPU? with FP8 units?
    usd_per_hour, max_usd_per_million: price of the machine, and the most that a million tokens may cost
    tokens_per_step: tokens in a training step, for "train" (which weighs speed and energy; whether a run fits into
                  memory depends on optimizer and sharding, and is not checked)
    keep_free_gib: memory to leave free, in GiB: for one more user, or a longer prompt
    prefer:       what decides among those that will do: "balanced" (the rules' points, then quality), or "quality",
                  "speed" (what was measured before what is only a ceiling) or "memory" alone
    """

    task: str = "serve"
    model: str = "Llama-2-7B"
    machine: str | None = None
    memory_gib: float | None = None
    bandwidth_gb_per_s: float | None = None
    gpu: bool | None = None
    fp8: bool | None = None
    context: int = 4096
    users: int = 1
    tokens_per_s: float = 0.0
    prompt_heavy: bool = False
    max_loss: float = math.inf
    max_kld: float = math.inf
    training: str = "none"
    ecosystem: str = "any"
    usd_per_hour: float | None = None
    max_usd_per_million: float = math.inf
    tokens_per_step: int = 16384
    prefer: str = "balanced"
    keep_free_gib: float = 0.0
    reserve_gib: float = 1.5  # buffers, and what a driver takes (for GGUF on a GPU: as capacity plans it)

    def __post_init__(self):
        choices = {"task": ("serve", "train"), "training": tuple(TRAINING), "ecosystem": ECOSYSTEMS,
                   "prefer": PREFER}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise QtutorError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        for name in ("context", "users", "tokens_per_step"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise QtutorError(f"{name} must be a whole number from 1 on, and is {getattr(self, name)!r}.")
        for name in ("tokens_per_s", "max_usd_per_million", "keep_free_gib", "reserve_gib", "max_loss", "max_kld",
                     "usd_per_hour", "memory_gib", "bandwidth_gb_per_s"):  # fmt: skip
            value, limit = getattr(self, name), name.startswith("max_")  # a limit may be infinite: there is none
            if value is None and name in ("usd_per_hour", "memory_gib", "bandwidth_gb_per_s"):
                continue
            if not isinstance(value, (int, float)) or not (0 <= value < math.inf or limit and value == math.inf):
                raise QtutorError(f"{name} must be a number that is not negative, and is {value!r}.")


TRAINING = {"none": 0, "fine-tune": 1, "pretrain": 2}
ECOSYSTEMS = ("any", "PyTorch", "llama.cpp")
PREFER = ("balanced", "quality", "speed", "memory")


@dataclass(frozen=True)
class Machine:
    """What the arithmetic needs to know of a machine."""

    name: str
    memory_gib: float
    bandwidth_gb_per_s: float
    gpu: bool
    fp8: bool


def machine_of(need: Need) -> Machine:
    """The machine of a need: from capacity's list, with what the need itself says in front.

    Raises QtutorError where the list does not have it, or where neither says how much memory there is.
    """
    memory, bandwidth, gpu, fp8 = need.memory_gib, need.bandwidth_gb_per_s, need.gpu, need.fp8
    if need.machine is not None:
        known = device(need.machine)
        memory = known.memory_gib if memory is None else memory
        bandwidth = known.bandwidth_gb_per_s if bandwidth is None else bandwidth
        gpu = known.gpu if gpu is None else gpu
        fp8 = known.fp8 if fp8 is None else fp8
    if memory is None or bandwidth is None or not memory > 0 or not bandwidth > 0:
        raise QtutorError("Say which machine it is: machine='H100 SXM', or memory_gib=... and bandwidth_gb_per_s=...")
    return Machine(need.machine or "this machine", float(memory), float(bandwidth), bool(gpu), bool(fp8))


ADA = ("L40S", "L4", "RTX 4090")  # compute capability 8.9: FP8 units, but no block scaling in Transformer Engine
# FP8 units came with Ada, Hopper and Blackwell (compute capability 8.9, 9.0, 10.0 and 12.0)
FP8_GPUS = ("H100", "H200", "B200", "L40S", "L4", "RTX PRO 6000", "RTX 5090", "RTX 4090")


def device(name: str) -> Machine:
    """A machine of capacity's list by its name there, or by the name that its driver gives it ("NVIDIA H200").

    Raises QtutorError for one that is not in the list.
    """
    from . import capacity

    if name not in capacity.GPUS:  # "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3": the entry with most words in common
        words = set(str(name).replace("-", " ").split()[1:])
        near = [known for known in capacity.GPUS if known.split()[0] in words]
        name = max(near, key=lambda known: len(words & set(known.split())), default=name)
    gpu = capacity.gpu_of(name)
    cuda = not gpu.name.startswith("Mac")
    return Machine(gpu.name, gpu.memory_gib, gpu.gb_per_s, cuda, gpu.name.startswith(FP8_GPUS))


@functools.lru_cache(maxsize=64)
def _shape(model: str) -> dict:
    """hidden, layers, kv_bytes a token (F16 cache), weights, and weights of embedding plus head, of a Llama."""
    from . import capacity

    config = capacity.config_of(model)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    tables = config["vocab_size"] * config["hidden_size"] * (1 if config.get("tie_word_embeddings") else 2)
    return {"hidden": config["hidden_size"], "layers": config["num_hidden_layers"],
            "kv_bytes": 2 * 2 * config["num_hidden_layers"] * kv_heads * head,
            "weights": capacity.parameters(model), "tables": tables, "embedding": config["vocab_size"]
            * config["hidden_size"]}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- deciding


@dataclass
class Option:
    """A technique under given requirements.

    ``memory_gib``: weights (``weights_gib``), cache and reserve.  ``loss`` (perplexity lost, a fraction) and ``kld`` as
    measured on the course model, None where they were not.  ``tokens_per_s``: for each user; ``at_most`` where it is
    the bandwidth's ceiling, because no share of it was measured.  ``blockers``: what stands against it.
    """

    technique: Technique
    weights_gib: float | None = None
    memory_gib: float | None = None
    loss: float | None = None
    kld: float | None = None
    tokens_per_s: float | None = None
    at_most: bool = True
    usd_per_million: float | None = None
    points: int = 0
    reasons: list = field(default_factory=list)  # (Rule, sentence)
    blockers: dict = field(default_factory=dict)  # requirement -> clause

    @property
    def fits(self) -> bool:
        """Whether nothing stands against it."""
        return not self.blockers

    @property
    def speed(self) -> str:
        """``"about 24"`` or ``"at most 61"``, tokens/s for each user."""
        return f"{'at most' if self.at_most else 'about'} {_number(self.tokens_per_s)}"


def weight_bytes(technique: Technique, model: str, directory=None) -> tuple[float, float] | None:
    """(bytes of the weights, bytes of them that a token reads); None where no measured size is there to go by.

    GGUF: to the byte, by llama.cpp's dry run.  PyTorch: what the layers of a 7B model took, scaled to this one;
    embedding and head stay in 16 bits.
    """
    from . import capacity

    kind, name = technique.store
    if kind == "gguf":
        size = capacity.size(model, name)
        return size.tensor_bytes, size.read_bytes
    shape, seven = _shape(model), _shape("Llama-2-7B")
    found = find(cell("fp8_inference", "weights_gib", model=LLAMA7B, format=name), directory)
    if found is None:
        return None
    per_weight = (found.value * GIB - 2 * seven["tables"]) / (seven["weights"] - seven["tables"])
    total = per_weight * (shape["weights"] - shape["tables"]) + 2 * shape["tables"]
    return total, total - 2 * shape["embedding"]


def _share_at_7b(technique: Technique, users: int, directory=None) -> float | None:
    """The same of a GGUF type from notebook 10's rows at Llama-2-7B's shape; None where they are not recorded."""
    found = recorded("tradeoff", directory, "gpu")
    rows = [row for row in (found[1].rows if found else ()) if row["shape"] == "llama2_7b" and row["batch"] <= users
            and row["technique"] == technique.name and row.get("decode_tokens_per_s")]  # fmt: skip
    if not rows:
        return None
    row = max(rows, key=lambda row: row["batch"])
    read = weight_bytes(technique, "Llama-2-7B", directory)[1]
    cache = row["batch"] * row["decode_context"] * _shape("Llama-2-7B")["kv_bytes"]
    try:
        bandwidth = device(found[1].device).bandwidth_gb_per_s * 1e9
    except QtutorError:
        return None
    return row["decode_tokens_per_s"] / row["batch"] * (read + cache) / bandwidth


def _share(technique: Technique, users: int, directory=None, weights: float = 70e9) -> float | None:
    """The share of the memory bandwidth that this technique's kernels reached where they were measured, or None.

    A small model keeps a fast memory less busy than a large one: of GGUF types the shape nearer to the model's
    ``weights`` counts, Llama-2-7B's (notebook 10) or Llama-2-70B's (notebook 09).
    """
    kind, name = technique.store
    if kind == "gguf" and weights < math.sqrt(7e9 * 70e9):
        return _share_at_7b(technique, users, directory)
    if kind == "gguf":
        found = recorded("llama70b", directory, "gpu")
        if found is None:
            return None
        rows = [row for row in found[1].rows if row.get("type") == name and row.get("ceiling_share")
                and (row["kind"] == "model" or row["kind"] == "batch" and row["batch"] <= users)]  # fmt: skip
        return max(rows, key=lambda row: row.get("batch", 0))["ceiling_share"] if rows else None
    batch = 32 if users >= 16 else 1
    names = find_all({"ms": cell("fp8_inference", f"decode_ms_batch{batch}", model=LLAMA7B, format=name),
                       "gib": cell("fp8_inference", "weights_gib", model=LLAMA7B, format=name),
                       "length": cell("fp8_inference", "length", model=LLAMA7B, format=name)}, directory)  # fmt: skip
    if names is None:
        return None
    shape = _shape("Llama-2-7B")
    read = names["gib"].value * GIB - 2 * shape["embedding"] + batch * names["length"].value * shape["kv_bytes"]
    try:
        bandwidth = device(names["ms"].device).bandwidth_gb_per_s * 1e9
    except QtutorError:  # measured on a GPU whose bandwidth the list does not have: no share to speak of
        return None
    return read / (names["ms"].value / 1000) / bandwidth


def _measured(part: tuple, directory) -> float | None:
    expression, evidence = part
    found = find_all(evidence, directory)
    return None if found is None else evaluate(expression, {name: one.value for name, one in found.items()})


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _serve(option: Option, need: Need, machine: Machine, directory) -> None:
    from . import capacity

    technique, shape, block = option.technique, _shape(need.model), option.blockers
    found = weight_bytes(technique, need.model, directory)
    if found is None:
        block["evidence"] = "its size has not been measured"
        return
    total, read = found
    cache = need.users * need.context * shape["kv_bytes"]
    option.weights_gib = total / GIB
    if technique.store[0] == "gguf" and machine.gpu:  # to the MiB, as notebook 09 plans it
        fit = capacity.fits(need.model, technique.store[1], need.context, users=need.users, gpu=capacity.Gpu(
            machine.name, round(machine.memory_gib * 1024), machine.bandwidth_gb_per_s, 0, ""))  # fmt: skip
        option.memory_gib = fit.total_gib
    else:
        option.memory_gib = (total + cache) / GIB + need.reserve_gib
    if option.memory_gib > machine.memory_gib - need.keep_free_gib:
        free = f", of which {need.keep_free_gib:g} are to stay free" if need.keep_free_gib else ""
        block["memory"] = f"it needs {option.memory_gib:.1f} GiB and there are {machine.memory_gib:.1f}{free}"
    share = _share(technique, need.users, directory, shape["weights"]) if machine.gpu else None
    ceiling = machine.bandwidth_gb_per_s * 1e9 / (read + cache)
    option.tokens_per_s, option.at_most = ceiling * (share or 1), share is None
    if option.tokens_per_s < need.tokens_per_s:
        block["speed"] = (f"it writes {option.speed} tokens/s for each user and {_number(need.tokens_per_s)} are "
                          "wanted")  # fmt: skip
    if need.usd_per_hour is not None:
        option.usd_per_million = need.usd_per_hour / 3600 / (need.users * option.tokens_per_s) * 1e6
        if option.usd_per_million > need.max_usd_per_million:
            least = "at least " if option.at_most else ""
            block["price"] = (f"a million tokens cost {least}{option.usd_per_million:.2f} USD and "
                              f"{need.max_usd_per_million:.2f} are allowed")  # fmt: skip


def _option(technique: Technique, need: Need, machine: Machine, directory) -> Option:
    option = Option(technique)
    block = option.blockers
    option.loss = _measured(technique.loss, directory) if technique.loss else None
    option.kld = _measured(technique.kld, directory) if technique.kld else None
    if need.ecosystem not in ("any", technique.ecosystem):
        block["ecosystem"] = f"it runs in {technique.ecosystem}, not in {need.ecosystem}"
    if technique.hardware.startswith("fp8") and not machine.fp8:
        block["hardware"] = f"it needs FP8 units, which {machine.name} does not have"
    elif technique.hardware == "fp8 block" and machine.name.startswith(ADA):
        block["hardware"] = f"it needs a GPU of Hopper or Blackwell, and {machine.name} is one of Ada"
    elif technique.hardware == "gpu" and not machine.gpu:
        block["hardware"] = "it was measured on a CUDA GPU, and there is none here"
    if need.task == "serve" and TRAINING[technique.training] > TRAINING[need.training]:
        block["training"] = "it must be trained, and there is no budget for that"
    if option.loss is None:
        if need.max_loss < math.inf:
            block["evidence"] = "its loss has not been measured"
    elif option.loss > need.max_loss:
        digits = 2 if f"{option.loss:.2%}" != f"{need.max_loss:.2%}" else 4
        block["loss"] = f"it costs {option.loss:+.{digits}%} perplexity and {need.max_loss:.{digits}%} are allowed"
    if option.kld is None:
        if need.max_kld < math.inf:
            block["evidence"] = "its KL divergence has not been measured"
    elif option.kld > need.max_kld:
        block["KLD"] = f"its KL divergence is {option.kld:.3f} nats and {need.max_kld:.3f} are allowed"
    if need.task == "serve" and "hardware" not in block:
        _serve(option, need, machine, directory)
    return option


@dataclass
class Decision:
    """What :func:`decide` found: ``options``, best first; the rules that were ``applied`` and those that were not."""

    need: Need
    machine: Machine
    options: list
    applied: list
    not_applied: list  # (Rule, why)

    @property
    def best(self) -> Option | None:
        """The recommended option; None where nothing will do."""
        return self.options[0] if self.options and self.options[0].fits else None

    @property
    def sentence(self) -> str:
        """The recommendation with its reasons; where nothing will do, what to relax, and by how much."""
        if self.best is None:
            return self.impossible()
        best, parts = self.best, []
        if best.memory_gib is not None:
            parts.append(f"{best.memory_gib:.1f} of {self.machine.memory_gib:.1f} GiB")
        if best.tokens_per_s is not None:
            parts.append(f"{best.speed} tokens/s for each user")
        if best.loss is not None:
            parts.append(f"perplexity {best.loss:+.2%} (course model)")
        second = next((o for o in self.options[1:] if o.fits), None)
        then = f" Next best: {second.technique.name}." if second else " Nothing else will do."
        if self.need.task == "train":
            then += " Whether the run fits into memory is not checked."
        return f"{best.technique.name}: {', '.join(parts)}.{then}"

    def impossible(self) -> str:
        """One sentence: the technique that comes closest, and which requirements to relax by how much."""
        if not self.options:
            return "There is no technique for this task."
        closest = self.options[0]
        relax = [text for name in closest.blockers if (text := self._relaxed(name, closest))]
        return (f"Nothing will do. {closest.technique.name} comes closest, but "
                f"{' and '.join(closest.blockers.values())}: {' and '.join(relax)}.")  # fmt: skip

    def _relaxed(self, name: str, option: Option) -> str:
        need, machine = self.need, self.machine
        if name == "memory":
            token = _shape(need.model)["kv_bytes"]
            over = option.memory_gib - (machine.memory_gib - need.keep_free_gib)
            tokens = need.users * need.context - int(over * GIB / token) - 1
            cut = f", or keep all users' contexts within {tokens:,} tokens together" if tokens >= 256 else ""
            return f"find {over:.1f} GiB more{cut}"
        if name == "speed":
            return f"accept {'at most ' if option.at_most else ''}{_number(option.tokens_per_s)} tokens/s"
        if name == "price":
            return f"allow {'at least ' if option.at_most else ''}{option.usd_per_million:.2f} USD"
        if name == "loss":
            return f"allow {option.loss:.2%} more perplexity"
        if name == "KLD":
            return f"allow {option.kld:.3f} nats"
        return {"training": "plan a fine-tuning run", "ecosystem": f"use {option.technique.ecosystem}",
                "hardware": f"use a {'GPU with FP8 units' if option.technique.hardware.startswith('fp8') else 'GPU'}",
                "evidence": "measure it first"}[name]  # fmt: skip

    def frame(self):
        """Every technique as a row of a pandas DataFrame, best first: will it do, and why or why not."""
        import pandas

        rows = []
        for option in self.options:
            reasons = list(option.blockers.values()) or [sentence for _, sentence in option.reasons]
            why = "; ".join(reasons) or "nothing speaks against it"
            row = {"technique": option.technique.name, "will do": "yes" if option.fits else "no"}
            if self.need.task == "serve":
                row["memory, GiB"] = "" if option.memory_gib is None else f"{option.memory_gib:.1f}"
                speed = "" if option.tokens_per_s is None else _number(option.tokens_per_s)
                row["tokens/s a user"] = f"≤ {speed}" if speed and option.at_most else speed
                if self.need.usd_per_hour is not None:
                    cost = option.usd_per_million
                    row["USD / 1M tokens"] = "" if cost is None else f"{'≥ ' * option.at_most}{cost:.2f}"
            row["perplexity"] = "" if option.loss is None else f"{option.loss:+.2%}"
            row |= {"points": option.points, "why": why}
            rows.append(row)
        return pandas.DataFrame(rows).set_index("technique")


_HARD = {"hardware": 4, "evidence": 3, "ecosystem": 2, "training": 2}  # what is harder to give way on than a number


def _distance(option: Option, need: Need, machine: Machine) -> tuple[int, float]:
    """How far from what is needed: how many requirements are missed, and by which factor all in all."""
    factor = 1.0
    if "memory" in option.blockers:
        factor *= option.memory_gib / max(machine.memory_gib - need.keep_free_gib, 1e-9)
    if "speed" in option.blockers:
        factor *= need.tokens_per_s / option.tokens_per_s
    if "price" in option.blockers:
        factor *= option.usd_per_million / max(need.max_usd_per_million, 1e-9)
    for name, value, limit in (("loss", option.loss, need.max_loss), ("KLD", option.kld, need.max_kld)):
        if name in option.blockers:
            factor *= value / max(limit, 1e-3)
    return sum(_HARD.get(name, 1) for name in option.blockers), factor


def decide(need: Need, rules=None, directory=None) -> Decision:
    """Rank all techniques for ``need``: those that meet it first, by the rules' points, then by what is preferred.

    ``rules``: :data:`RULES` by default.  ``directory``: where results are, by default the course's.  Raises
    QtutorError for a model or machine that is not known.
    """
    machine, rules = machine_of(need), RULES if rules is None else rules
    options = [_option(t, need, machine, directory) for t in TECHNIQUES.values() if t.task == need.task]
    names = {f.name: getattr(need, f.name) for f in fields(need)} | {
        "gpu": machine.gpu, "fp8": machine.fp8, "memory_gib": machine.memory_gib,
        "width": _shape(need.model)["hidden"], "weights": _shape(need.model)["weights"]}  # fmt: skip
    applied, not_applied = [], []
    for rule in rules:
        if not evaluate(rule.when, names):
            continue
        status = rule.status(directory)
        if status != "holds":
            not_applied.append((rule, rule.sentence(directory) if status == "not recorded" else
                                "not applied: the recorded measurement contradicts it"))  # fmt: skip
            continue
        applied.append(rule)
        for option in options:
            if option.technique.name in rule.techniques:
                option.points += rule.effect
                option.reasons.append((rule, rule.sentence(directory)))

    def rank(option):
        worst = math.inf
        kld = option.kld if option.kld is not None else option.loss
        kld = worst if kld is None else kld
        memory = worst if option.memory_gib is None else option.memory_gib
        by = {"balanced": (-option.points, kld), "quality": (kld, -option.points),
              "speed": (option.at_most, -(option.tokens_per_s or 0), -option.points),
              "memory": (memory, kld)}  # fmt: skip
        return _distance(option, need, machine), by[need.prefer], memory

    return Decision(need, machine, sorted(options, key=rank), applied, not_applied)


# ----------------------------------------------------------------------------------------------------- what it saves


def monthly(tokens_per_s: float, joules_per_token: float, tokens: float, usd_per_hour: float,
            grams_per_kwh: float, pue: float = 1.0) -> dict:  # fmt: skip
    """What ``tokens`` tokens a month take: usd_per_million, usd, hours, kwh, kg_co2e.

    ``tokens_per_s``: of the whole machine, all users together, busy all the time.  ``joules_per_token``: of the device;
    ``pue`` adds the data centre's share.  Raises QtutorError for numbers that are negative or no numbers.
    """
    from .. import energy

    for name, value in (("tokens", tokens), ("grams_per_kwh", grams_per_kwh)):
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise QtutorError(f"{name} must be a number that is not negative, and is {value!r}.")
    per_million = energy.cost_per_million_tokens(tokens_per_s, usd_per_hour)
    kwh = energy.kwh_per_million_tokens(joules_per_token, pue) * tokens / 1e6
    return {"usd_per_million": per_million, "usd": per_million * tokens / 1e6, "hours": tokens / tokens_per_s / 3600,
            "kwh": kwh, "kg_co2e": kwh * grams_per_kwh / 1000}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the widget


def readable(frame):
    """A table of words as a notebook should show it: everything to the left (a pandas Styler)."""
    left = [("text-align", "left")]
    styles = [{"selector": part, "props": left} for part in ("th", "th.col_heading", "th.row_heading", "td")]
    return frame.style.set_table_styles(styles)


def decision_html(need: Need, rows: int = 6) -> str:
    """A decision as HTML: the sentence, the best techniques, the rules that could not be applied."""
    try:
        decision = decide(need)
    except QtutorError as error:
        return f'<div style="border-left: 4px solid #d55e00; padding: 0.3em 0.8em">{html.escape(str(error))}</div>'
    color = "#029e73" if decision.best else "#d55e00"
    parts = [f'<div style="border-left: 4px solid {color}; padding: 0.3em 0.8em; margin: 0.3em 0">'
             f"<b>{html.escape(decision.sentence)}</b></div>"]  # fmt: skip
    frame = decision.frame().head(rows)
    style = "text-align: left; vertical-align: top; padding: 2px 8px"
    head = "".join(f'<th style="{style}">{html.escape(name)}</th>' for name in ["technique", *frame.columns])
    parts.append(f'<table style="line-height: 1.35"><tr>{head}</tr>')
    for name, row in frame.iterrows():
        weight = "bold" if row["will do"] == "yes" else "normal"
        cells = "".join(f'<td style="{style}">{html.escape(str(value))}</td>' for value in row)
        parts.append(f'<tr><td style="{style}; font-weight: {weight}">{html.escape(name)}</td>{cells}</tr>')
    parts.append("</table>")
    if decision.not_applied:
        waiting = sorted({f"{rule.name} ({why})" for rule, why in decision.not_applied})
        parts.append(f"<small>Rules not counted: {html.escape('; '.join(waiting))}.</small>")
    return "".join(parts)


def explorer(**start):
    """Requirements as controls, the decision below them; ``start`` sets fields of :class:`Need` to begin with.

    Without widgets, :func:`decision_html` and ``Decision.frame()`` show one state.  Raises QtutorError for a field, a
    model or a machine that is not known.
    """
    import ipywidgets as w

    from . import capacity

    if unknown := set(start) - {f.name for f in fields(Need)}:
        raise QtutorError(f"Need has no field {min(unknown)!r}: it has {', '.join(f.name for f in fields(Need))}.")
    need = Need(**({"machine": next(iter(capacity.GPUS)), "model": "Llama-2-70B"} | start))
    machine_of(need), _shape(need.model)  # a name that is not known is said here, not in every redraw
    wide, narrow = {"description_width": "105px"}, w.Layout(width="320px")
    percent = [("any", math.inf), *[(f"{100 * x:g} %", x) for x in (0.001, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1)]]

    def choice(label, options, value):
        pairs = [one if isinstance(one, tuple) else (str(one), one) for one in options]
        if value not in [one for _, one in pairs]:  # where it starts is one of the choices, in its place
            said = f"{100 * value:g} %" if options is percent else "this machine" if value is None else str(value)
            pairs.append((said, value))
            if isinstance(value, (int, float)):
                pairs.sort(key=lambda pair: (pair[1] != math.inf, pair[1]))  # "any" stays in front
        return w.Dropdown(options=pairs, value=value, description=label, style=wide, layout=narrow)

    controls = {
        "task": choice("task", ["serve", "train"], need.task),
        "model": choice("model", list(capacity.MODELS), need.model),
        "machine": choice("machine", list(capacity.GPUS), need.machine),
        "users": choice("users at once", [1, 2, 4, 8, 16, 32, 64], need.users),
        "context": choice("context, tokens", [512, 1024, 2048, 4096, 8192, 16384, 32768], need.context),
        "keep_free_gib": choice("keep free, GiB", [0.0, 1.0, 2.0, 4.0, 8.0], need.keep_free_gib),
        "tokens_per_s": w.BoundedFloatText(value=need.tokens_per_s, min=0, max=max(1000, need.tokens_per_s), step=1,
                                           style=wide, layout=narrow, description="tokens/s a user"),
        "max_loss": choice("perplexity lost", percent, need.max_loss),
        "training": choice("can train", list(TRAINING), need.training),
        "ecosystem": choice("ecosystem", list(ECOSYSTEMS), need.ecosystem),
        "prompt_heavy": choice("prompts", [("short", False), ("long, answers short", True)], need.prompt_heavy),
        "prefer": choice("decide by", list(PREFER), need.prefer),
    }  # fmt: skip
    shown = w.HTML()

    def redraw(_=None):
        values = {name: control.value for name, control in controls.items()}
        shown.value = decision_html(replace(need, **values))

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    boxes = list(controls.values())
    grid = w.GridBox(boxes, layout=w.Layout(grid_template_columns="repeat(auto-fit, minmax(330px, 1fr))"))
    return w.VBox([grid, shown])


def explain(decision: Decision, show: Callable = print) -> None:
    """Print the reasons of a decision: the sentence, each applied rule of the best option, the rules that wait."""
    show(decision.sentence)
    for rule, sentence in decision.best.reasons if decision.best else ():
        show(f"  {f'{rule.effect:+d}' if rule.effect else '  '}  {sentence}  [{rule.device() or 'no evidence'}]")
    for rule, why in decision.not_applied:
        show(f"   ·  {rule.name}: {why}")
