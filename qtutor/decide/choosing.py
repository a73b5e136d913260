"""From requirements to a decision: what is impossible goes, what is unknown says so, and one of the rest is advised.

    need = Need(model="Llama-2-70B", device="H100 SXM", cards=2, users=8, tokens_per_s=10, max_loss=0.005)
    decision = decide(need)
    decision.sentence          # the advice, or what would have to give way, and by how much
    decision.frame()           # every option, why or why not
    decision.sources()         # every number of the advice, its interval, where it comes from
    decision.changes()         # what would change it

No points are given.  Constraints come first: memory, licence, engine, training budget, loss, speed, time to the first
token, goodput, price.  An option that misses one is out; one of which something is not known is "unknown", which is no
pass.  Of the rest the Pareto front over money, energy and quality is kept, with intervals; the reader's preference
picks from it.  An option is a technique with a type of cache on a number of cards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from .. import QtutorError
from . import capacity, cost, hardware, pareto, quality, speed
from .quality import Known
from .techniques import TECHNIQUES, Technique

GIB = 2**30
#: engine -> its licence
ENGINES = {"pytorch": "BSD-3-Clause", "te": "Apache-2.0", "llama.cpp": "MIT", "vLLM": "Apache-2.0"}
#: how a model's name begins -> its licence, and whether that is an open-source one
LICENCES = {"Llama-2": ("Llama 2 Community", False), "Llama-3": ("Llama 3 Community", False),
            "TinyLlama": ("Apache-2.0", True), "Mixtral": ("Apache-2.0", True)}  # fmt: skip
CACHES = {"llama.cpp": ("F16", "Q8_0"), "vLLM": ("BF16", "FP8")}  # engine -> types of KV cache to choose from
SPLITS = {"llama.cpp": ("layer", "tensor"), "vLLM": ("tensor",)}  # engine -> how it uses several cards
VLLM_SHARE = 0.92  # of a card's memory that vLLM takes (--gpu-memory-utilization)
SAID = {"tokens/s": "its speed is", "loss": "its loss is", "USD": "its price is", "goodput": "its goodput is",
        "first token": "the first token comes after"}  # fmt: skip
#: what a reader may prefer -> the number it is about
PREFER = {"money": "USD", "energy": "kWh", "quality": "loss"}
AXES = {"USD": pareto.AXES["decode cost"], "kWh": pareto.AXES["decode energy"],
        "loss": replace(pareto.AXES["perplexity"], tolerance=0.001)}  # fmt: skip
CHOICES = {"engine": ("any", *ENGINES), "licence": ("any", "open source"), "prefer": tuple(PREFER),
           "kv_type": ("any", *(kind for kinds in CACHES.values() for kind in kinds))}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What is wanted, and what there is."""

    model: str = "Llama-2-7B"  # a name in capacity.MODELS or speed.MIXTURES, or a folder with a config.json
    device: str | hardware.Device = "H100 SXM"  # itself, its name in hardware.DEVICES, or its driver's name for it
    cards: int = 1  # so many of them there are, at most
    users: int = 1  # sequences at the same time
    context: int = 4096  # tokens that the cache of each user holds
    prompt: int = 512  # tokens of a prompt, for the time to the first token
    tokens_per_s: float = 0.0  # wanted speed for each user
    ttft_ms: float = math.inf  # time to the first token of a prompt that does not wait for others
    goodput_per_s: float = 0.0  # requests a second within the limits of the recording ``serving``
    max_loss: float = math.inf  # perplexity that may be lost: 0.01 is 1 %
    usd_per_hour: float | None = None  # of one card; by default the device's example price
    usd_per_kwh: float = 0.30  # of electricity, where the machine is your own
    max_usd_per_million: float = math.inf  # what a million tokens may cost
    can_train: bool = False  # whether there is a budget for quantization-aware training
    engine: str = "any"  # or a key of ENGINES
    licence: str = "any"  # or "open source", of the model
    kv_type: str = "any"  # or one of CACHES
    keep_free_gib: float = 0.0  # memory to leave free: for one more user, or a longer prompt
    prefer: str = "quality"  # or "money", or "energy": what picks from the front

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise QtutorError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        for name in ("tokens_per_s", "max_loss", "max_usd_per_million", "keep_free_gib", "ttft_ms", "goodput_per_s"):
            if not getattr(self, name) >= 0:
                raise QtutorError(f"{name} must be a number that is not negative, and is {getattr(self, name)!r}.")
        for name in ("cards", "users", "context", "prompt"):
            if not getattr(self, name) >= 1 or getattr(self, name) != int(getattr(self, name)):
                raise QtutorError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1.")


@dataclass
class Option:
    """A technique, a type of cache and a number of cards under given requirements; ``known``: memory (GiB), tokens/s
    (of each user), first token (s), loss (share of perplexity), USD and kWh (of a million tokens)."""

    technique: Technique
    kv_type: str = "BF16"
    cards: int = 1
    split: str | None = None
    known: dict[str, Known] = field(default_factory=dict)
    missed: dict = field(default_factory=dict)  # requirement -> what is wrong
    relax: dict = field(default_factory=dict)  # requirement -> what to give way on, and by how much
    unknown: dict = field(default_factory=dict)  # requirement -> what nobody has measured
    place: str = ""  # front, open (the intervals do not say) or dominated, among those that will do
    factor: float = 1.0

    @property
    def name(self) -> str:
        cache = "" if self.kv_type in quality.EXACT else f", {self.kv_type} cache"
        return self.technique.name + cache + (f", {self.cards} cards by {self.split}" if self.cards > 1 else "")

    @property
    def guesses(self) -> list[str]:
        """Numbers that are carried over from other models or cards: a "yes" that rests on them is to be tested."""
        words = {"interpolated": "loss", "modelled": "tokens/s"}
        return [f"{key} {word}" for word, key in words.items() if key in self.known and word in self.known[key].source]

    @property
    def verdict(self) -> str:
        """ "yes", "no", or "unknown": nothing speaks against it, but not all of it was measured."""
        return "no" if self.missed else "unknown" if self.unknown else "yes"

    def miss(self, name: str, wrong: str, relax: str, factor: float = 100.0) -> None:
        """Note a requirement that is missed by a ``factor``; what no number can mend is hardest to give way on."""
        self.missed[name], self.relax[name] = wrong, relax
        self.factor *= factor

    def hold(self, name: str, value: Known, low: float = -math.inf, high: float = math.inf, say="{:.3g}".format,
             unit: str = "") -> None:  # fmt: skip
        """Note a number, and hold it against its limits: missed, undecided, or neither (floating-point noise aside)."""
        self.known[name] = value
        best, worst, limit = (value.high, value.low, low) if high == math.inf else (-value.low, -value.high, -high)
        if best < limit - abs(limit) * 1e-3:
            there, asked = say(abs(best)) + unit, say(abs(limit))
            ratio = max(abs(limit), 1e-9) / max(abs(best), 1e-9)
            self.miss(name, f"{SAID[name]} {'at most' if low > -math.inf else 'at least'} {there}, asked for: {asked}",
                      f"accept {there}", max(ratio, 1 / ratio))  # fmt: skip
        elif worst < limit - abs(limit) * 1e-3 and name not in self.unknown:
            self.unknown[name] = f"{SAID[name]} {between(value, say)}{unit}, asked for: {say(abs(limit))}"

    def distance(self) -> tuple:
        """How far it is from what is needed: its verdict, by which factor it misses, how much is unknown; its loss."""
        loss = self.known["loss"].high if "loss" in self.known else math.inf
        return ("yes", "unknown", "no").index(self.verdict), self.factor, len(self.unknown), loss, self.cards


def between(value: Known, say="{:.3g}".format) -> str:
    """An interval in words."""
    if value.high == math.inf or value.low == 0 < value.high:
        return f"{say(value.low)} or more" if value.low else f"at most {say(value.high)}"
    low, high = say(value.low), say(value.high)
    return low if low == high else f"{low} to {high}"


def percent(share: float) -> str:
    """0.0016 -> "0.16 %"."""
    return f"{100 * share:.2g} %"


def candidates(need: Need) -> list[Option]:
    """Every technique with every type of cache, on one card and on as many as there are (doubling)."""
    found = []
    for technique in (TECHNIQUES | speed.VLLM).values():
        if technique.emulated or technique.name == "FP32":
            continue
        for kv_type in CACHES.get(technique.runtime, ("BF16",)):
            for cards in (2**i for i in range(need.cards.bit_length())):
                splits = SPLITS.get(technique.runtime, ()) if cards > 1 else (None,)
                found += [Option(technique, kv_type, cards, split) for split in splits
                          if need.kv_type in ("any", kv_type)]  # fmt: skip
    return found


def assess(option: Option, need: Need, points: dict, directory=None) -> Option:
    """Hold one option against every requirement; ``points``: speed.points."""
    technique, device = option.technique, hardware.device(need.device)
    name = next((licence for start, licence in LICENCES.items() if str(need.model).startswith(start)), None)
    if need.licence != "any" and name is None:
        option.unknown["licence"] = "the model's licence is not in the table"
    elif need.licence != "any" and not name[1]:
        option.miss("licence", f"the model's licence is {name[0]}, which is not open source", "use another model")
    if need.engine not in ("any", technique.runtime):
        option.miss("engine", f"it runs in {technique.runtime}", f"use {technique.runtime}")
    if technique.needs == "fp8" and not device.fp8:
        option.miss("hardware", f"it needs FP8 units, which {device.name} does not have", "use a GPU that has them")
    elif technique.runtime != "llama.cpp" and not device.cuda:
        option.miss("hardware", "it was measured on CUDA GPUs, and there is none here", "use a GPU")
    if technique.trained and not need.can_train:
        option.miss("training", "it must be trained, and there is no budget for that", "plan a training run")
    _loss(option, need, directory)
    size = speed.weights(technique, need.model, need.users, directory)
    if size is None:
        option.unknown["memory"] = "its size has not been measured"
    elif "hardware" not in option.missed:
        _memory(option, need, device, size[0], directory)
        _speed(option, need, device, size[1], points)
        _first_token(option, need, device, points, directory)
    return option


def _loss(option: Option, need: Need, directory) -> None:
    technique = option.technique
    kind = technique.gguf or technique.name.removeprefix("vLLM ").removeprefix("torchao ").removesuffix(", compiled")
    kind = "FP8" if kind == "FP8 dynamic" else technique.name if technique.trained else kind
    weights, cache = quality.loss(kind, need.model, directory), quality.cache_loss(option.kv_type, directory)
    if weights is None or cache is None:
        what = f"{kind} weights lose" if weights is None else f"an {option.kv_type} cache loses"
        if need.max_loss < math.inf:
            option.unknown["loss"] = f"what {what} has not been measured"
        if weights is None:
            return
    more = cache or Known(0.0, math.inf, "unknown")
    source = weights.source + (f"; cache: {more.source}" if option.kv_type not in quality.EXACT else "")
    option.hold("loss", Known(weights.low + more.low, weights.high + more.high, source), high=need.max_loss,
                say=percent)  # fmt: skip


def _memory(option: Option, need: Need, device: hardware.Device, total: float, directory) -> None:
    base, gguf, cards = speed.shape(need.model)[0], option.technique.gguf, option.cards
    per_token = speed.kv_per_token(need.model, option.kv_type, need.context)
    cache, tokens = need.users * need.context * per_token, need.users * need.context
    there, source = cards * device.memory_gib - need.keep_free_gib, "computed to the byte: weights, cache, reserve"
    if gguf and device.cuda:  # llama.cpp leaves the embedding in the computer's memory, and says what else it takes
        on_cards = speed.weights(option.technique, need.model, 10**6, directory)[1]  # so many users read all experts
        buffers = capacity.buffer_bytes(base, gguf, need.context, option.kv_type, need.users)
        needed = (on_cards + cache + buffers) / GIB + capacity.Fit.overhead_gib * cards
        source = "computed: llama.cpp's own plan"
    else:
        needed = (total + cache) / GIB + cards * device.reserve_gib
    if option.technique.runtime == "vLLM":
        here, wide = (_recorded("llama70b", "served", "kv_tokens", one, need, device, directory)
                      for one in (option, replace(option, kv_type="BF16")))  # fmt: skip
        if room := here or [2 * n for n in wide if option.kv_type == "FP8"]:  # half the bytes a token
            needed = VLLM_SHARE * cards * device.memory_gib - (min(room) - tokens) * per_token / GIB
            source = (f"measured: in {VLLM_SHARE:.0%} of the memory its cache holds {min(room):,} tokens"
                      + ("" if here else ", twice those in BF16"))
    option.known["memory"] = Known(needed, needed, source)
    if (over := needed - there) > 0:
        free = f", {need.keep_free_gib:g} of them to stay free" if need.keep_free_gib else ""
        fit = tokens - int(over * GIB / per_token) - 1
        cut = f", or keep all users' contexts within {fit:,} tokens together" if fit >= 256 else ""
        option.miss("memory", f"it does not fit: {needed:.1f} of {cards * device.memory_gib:.1f} GiB{free}",
                    f"find {over:.1f} GiB more{cut}", needed / max(there, 1e-9))  # fmt: skip


def _speed(option: Option, need: Need, device: hardware.Device, read: float, points: dict) -> None:
    """Tokens/s of a user, then money and energy, which follow from it."""
    bytes_ = read + need.users * need.context * speed.kv_per_token(need.model, option.kv_type, need.context)
    name = speed.SAME_FORM.get(option.technique.name, option.technique.name)
    known = points.get(name, []) if device.cuda else []
    groups = speed.choose_points(known, need.model, device.name, need.users, option.kv_type, option.cards, option.split)
    if groups:
        low, high = speed.predict(groups, bytes_, device, need.users, option.cards, option.split)
        used = [point for _, group in groups for point in group]
        here = all(p.model == need.model and hardware.device(p.device).name == device.name for p in used)
        if speed.shape(need.model)[1] > 1:
            option.unknown["tokens/s"] = "its speed is modelled from dense models: a mixture was not measured"
        source = (f"{'measured' if here else 'modelled from measurements'} on {', '.join({p.device for p in used})} at "
                  f"{', '.join(f'{n}' for n, _ in groups)} users, carried to {need.context:,} tokens of cache")
    else:
        low = bytes_ / (speed.together(option.cards, option.split) * device.gb_per_s * 1e9)
        high, used, source = math.inf, [], "bandwidth / bytes: a ceiling, not measured"
        share = f" (it needs {percent(need.tokens_per_s * low)} of the ceiling)" if need.tokens_per_s else ""
        option.unknown["tokens/s"] = f"its speed is not measured{share}"
    wanted = need.tokens_per_s or -math.inf
    option.hold("tokens/s", Known(1 / high, 1 / low, source), low=wanted, unit=" tokens/s a user")
    _bill(option, need, device, low, high, used)


def _bill(option: Option, need: Need, device: hardware.Device, low: float, high: float, used: list) -> None:
    """Money and energy of a million tokens from the seconds of a step."""
    rented = device.usd_per_hour if need.usd_per_hour is None else need.usd_per_hour
    own = rented is None and device.watts is not None and not device.cuda
    hourly = device.watts / 1000 * need.usd_per_kwh if own else rented
    if hourly is not None:
        what = f"{need.usd_per_kwh:g} USD a kWh" if own else f"{hourly:g} USD an hour" + (
            f" ({cost.PRICES[device.rented_as].what}, {cost.PRICES[device.rented_as].date})"
            if need.usd_per_hour is None else "")  # fmt: skip
        usd = [cost.cost_per_million_tokens(need.users / s, hourly * option.cards) if s < math.inf else math.inf
               for s in (low, high)]  # fmt: skip
        option.hold("USD", Known(*usd, f"seconds x {what}"), high=need.max_usd_per_million, say="{:.2f}".format,
                    unit=" USD a million tokens")  # fmt: skip
        if "USD" in option.relax and need.users == 1:
            option.relax["USD"] += " for one user, or let more users share the card"
    powers = [p.watts / hardware.device(p.device).watts for p in used if p.watts] or [1.0] * (not device.cuda)
    if not (powers and device.watts):
        return
    watts = [edge * device.watts for edge in (min(powers), max(powers))]
    source = "seconds x " + ("measured share of the power limit, no PUE" if device.cuda else f"{device.watts:g} W")
    kwh = [w * s / need.users / cost.JOULES_PER_KWH * 1e6 for w, s in zip(watts, (low, high), strict=True)]
    option.known["kWh"] = Known(*kwh, source)


def _first_token(option: Option, need: Need, device: hardware.Device, points: dict, directory) -> None:
    name = speed.SAME_FORM.get(option.technique.name, option.technique.name)
    found = speed.first_token(points.get(name, []), need.model, need.prompt, device, option.cards, option.split)
    if found:
        option.hold("first token", Known(*found, f"measured prompts, carried to {need.prompt:,} tokens"),
                    high=need.ttft_ms / 1000, unit=" s")  # fmt: skip
    elif need.ttft_ms < math.inf:
        option.unknown["first token"] = "its time to the first token has not been measured"
    if not need.goodput_per_s:
        return
    if best := _recorded("serving", "best", "goodput_per_s", option, need, device, directory):
        lost = _recorded("serving", "best", "rate_lost_per_s", option, need, device, directory)
        option.hold("goodput", Known(max(best), max(*lost, *best) if lost else math.inf, "measured: kept at this rate, "
                    "lost at the next that was tried"), low=need.goodput_per_s, unit=" requests/s")  # fmt: skip
    else:
        option.unknown["goodput"] = "its goodput has not been measured for this model, device and cache"


def _recorded(file: str, kind: str, column: str, option: Option, need: Need, device, directory) -> list[float]:
    """Values of a column in rows of this very option, model and device."""
    engine = {"GGUF": "llama.cpp"}.get(option.technique.name.split()[0], option.technique.runtime)
    wanted = {"kind": kind, "shape": need.model, "runtime": engine, "type": option.technique.name.split()[-1],
              "kv_type": option.kv_type, "cards": option.cards}  # fmt: skip
    runs = (run for run in quality.recorded(file, directory) if "compute_capability" in run.machine)
    return [row[column] for run in runs if hardware.device(run.device).name == device.name for row in run.rows
            if row.get(column) and all(row.get(key) == value for key, value in wanted.items())]  # fmt: skip


def place(options: list[Option]) -> list[Option]:
    """Say of each option that will do whether another is better by :func:`pareto.difference`: the front over money,
    energy and quality (perplexity over the original's).  An unknown number is neither better nor worse."""
    axes = [axis for axis in PREFER.values() if any(axis in o.known for o in options)]
    values = np.full((len(axes), 3, len(options)), np.nan)
    for i, j in np.ndindex(len(axes), len(options)):
        if found := options[j].known.get(axes[i]):
            values[i, :, j] = np.array([found.mid, found.low, found.high]) + (axes[i] == "loss")
    for option, word in zip(options, pareto.verdicts(values, [AXES[axis] for axis in axes]), strict=True):
        option.place = str(word)
    return [option for option in options if option.place != "dominated"]


def rank(option: Option, prefer: str) -> list[float]:
    """What the preference compares: the worse end of its interval (hope is no argument), then those of the others."""
    order = [PREFER[prefer], *(axis for axis in ("loss", "USD", "kWh") if axis != PREFER[prefer])]
    return [option.known[axis].high if axis in option.known else math.inf for axis in order]


def decide(need: Need, directory=None) -> Decision:
    """Constraints, then the front of what is left, then one piece of advice by ``need.prefer``."""
    points = speed.points(directory)
    options = [assess(option, need, points, directory) for option in candidates(need)]
    front = place([option for option in options if option.verdict == "yes"])
    front.sort(key=lambda option: rank(option, need.prefer))
    rest = sorted((option for option in options if option not in front), key=Option.distance)
    return Decision(need, front, [*front, *rest])


@dataclass
class Decision:
    """What :func:`decide` found: the ``front`` (best first) and all ``options``: yes, then unknown, then no.  ``best``
    is what is advised, None where nothing is known to do."""

    need: Need
    front: list
    options: list

    best = property(lambda self: self.front[0] if self.front else None)

    @property
    def sentence(self) -> str:
        """The advice with its numbers; where nothing is known to do, what to measure or to relax."""
        first, device = self.options[0], hardware.device(self.need.device)
        wrong, unknown, relax = (" and ".join(d.values()) for d in (first.missed, first.unknown, first.relax))
        if first.verdict == "no":
            if also := [key for key in first.missed if "memory" in first.missed and key != "memory"]:  # stop there
                wrong, relax = first.missed["memory"], f"it misses {' and '.join(also)} as well"
            wrong += f". {relax[0].upper()}{relax[1:]}"
            return f"No option meets the requirements. {first.name} comes closest, but {wrong}."
        if first.verdict == "unknown":
            return f"No option is known to meet the requirements. {first.name} may, but {unknown}. Measure it first."
        axis = PREFER[self.need.prefer]
        tied = [o.name for o in self.front[1:] if axis in o.known and axis in first.known
                and o.known[axis].low <= first.known[axis].high]  # fmt: skip
        words = {"USD": ("{:.2f}".format, " USD and"), "kWh": ("{:.2g}".format, " kWh a million tokens"),
                 "loss": (percent, " of perplexity lost"), "tokens/s": ("{:.3g}".format, " tokens/s a user")}
        said = [between(first.known[key], say) + unit for key, (say, unit) in words.items() if key in first.known]
        said += ["an unknown loss"] * ("loss" not in first.known)
        return (f"Preferring {self.need.prefer}: {first.name}, with {', '.join(said).replace('and,', 'and')}, in "
                f"{first.known['memory'].mid:.1f} of {first.cards * device.memory_gib:.1f} GiB."
                + (f" The intervals do not tell it from {'; '.join(tied)}." if tied else "")
                + (f" Test it first: {' and '.join(first.guesses)}." if first.guesses else ""))  # fmt: skip

    def changes(self) -> list[str]:
        """What would change the advice: measurements that are missing, and how far its requirements may move."""
        best, need, axis = self.best, self.need, PREFER[self.need.prefer]

        def far(option: Option) -> tuple:  # from being known to do: what must be measured; a ceiling promises anything
            value = option.known.get(axis, Known(math.inf, math.inf, ""))
            return len(option.unknown), value.high == math.inf, value.low

        rivals = [o for o in self.options if o.verdict == "unknown" and (
            best is None or far(o)[2] < rank(best, need.prefer)[0] or axis not in o.known)]  # fmt: skip
        one_each = {o.technique.runtime: o for o in sorted(rivals, key=far, reverse=True)}  # engine -> its nearest
        rivals = sorted(one_each.values(), key=far)
        found = [f"A measurement of {o.name}: {' and '.join(o.unknown.values())}." for o in rivals]
        if best is not None:
            free = best.cards * hardware.device(need.device).memory_gib - need.keep_free_gib - best.known["memory"].mid
            each = need.context * speed.kv_per_token(need.model, best.kv_type, need.context) / GIB
            found.append(f"More than {need.users + int(free / each)} users with {need.context:,} tokens each: it no "
                         "longer fits.")  # fmt: skip
            if need.max_loss < math.inf and (loss := best.known["loss"].high) > 0:
                found.append(f"Less than {percent(loss)} of perplexity allowed, or a text of yours on which it loses "
                             f"more than {percent(need.max_loss)}.")  # fmt: skip
            if need.prefer != "quality" or len(self.front) > 1:
                found += [f"Preferring {other}: {name}." for other in PREFER if other != need.prefer
                          and (name := min(self.front, key=lambda o: rank(o, other)).name) != best.name]  # noqa: B023
        return found

    def sources(self):
        """Every number of the first option: between what, and where it comes from (a pandas DataFrame)."""
        import pandas

        grid = cost.grid()
        said = {key: [between(value, percent if key == "loss" else "{:.3g}".format), value.source]
                for key, value in self.options[0].known.items()}  # fmt: skip
        if "kWh" in said:
            kwh = self.options[0].known["kWh"]
            grams = Known(kwh.low * grid.grams_per_kwh, kwh.high * grid.grams_per_kwh, "")
            said["g CO2e"] = [between(grams, "{:,.0f}".format),
                              f"kWh x {grid.grams_per_kwh:.0f} g ({grid.name}, {grid.year}; {grid.source})"]
        return pandas.DataFrame(said, index=["value", "source"]).T

    def frame(self):
        """Every option as a row of a pandas DataFrame, best first: will it do, and why or why not."""
        import pandas

        columns = {"memory": ("memory, GiB", "{:.1f}".format), "tokens/s": ("tokens/s a user", "{:.3g}".format),
                   "first token": ("first token, s", "{:.2g}".format), "loss": ("loss", percent),
                   "USD": ("USD / 1M", "{:.2f}".format), "kWh": ("kWh / 1M", "{:.2g}".format)}  # fmt: skip
        return pandas.DataFrame([{
            "option": o.name, "will do": o.verdict,
            **{title: between(o.known[key], say) if key in o.known else "" for key, (title, say) in columns.items()},
            "why": "; ".join([*o.missed.values(), *o.unknown.values()] or [{
                "front": "on the front", "open": "perhaps on the front"}.get(o.place, o.place), *o.guesses]),
        } for o in self.options]).set_index("option")  # fmt: skip
