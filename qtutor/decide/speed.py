"""How fast an option writes: bytes over bandwidth, and what is left over, fitted where it was measured.

A step of generation takes

    a * bytes / bandwidth  +  b * bytes  +  c

seconds: waiting for memory, working on what was read (unpacking, arithmetic; faster memory does not help), and a fixed
time (launching kernels, sampling).  One card cannot tell the first two apart, and one model not the last two.  So we do
not pick one fit: every ``a, b, c`` that reproduces the measured steps to within some percent is allowed, and a
prediction is the range of what they say.  More measurements, on other cards and models, narrow it.

    alone = [p for p in speed.points()["GGUF Q6_K"] if p.users == 1 and p.step_s]
    speed.step(alone, read=56e9, device=hardware.device("H200"))      # seconds, at least and at most
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import linprog

from . import capacity, hardware
from .quality import recorded
from .techniques import TECHNIQUES, Technique

NOISE = 0.05  # two recordings of one thing differ by so much: a fit is never held to be better
VLLM = {f"vLLM {kind}": Technique(f"vLLM {kind}", "vllm", "vLLM", f"vllm serve <{kind} checkpoint>", needs=needs)
        for kind, needs in (("BF16", "gpu"), ("FP8", "fp8"), ("W4A16", "gpu"))}  # fmt: skip
SAME_FORM = {"QAT Q4_0": "GGUF Q4_0"}  # training changes neither size nor speed
# name -> (a dense model of the experts' shapes, experts in a layer, experts that a token uses)
MIXTURES = {"Mixtral-8x7B": (capacity.llama(4096, 14336, 32, 32, 8, 32000, 32768, 1e6), 8, 2)}


def shape(model) -> tuple[object, int, int]:
    """(what capacity plans, experts in a layer, experts that a token uses): of a dense model 1 and 1."""
    return MIXTURES.get(model, (model, 1, 1)) if isinstance(model, str) else (model, 1, 1)


def weights(technique: Technique, model, users: int = 1, directory=None) -> tuple[float, float] | None:
    """(bytes of all weights, bytes that a step for ``users`` reads); None where no size is known.

    GGUF: to the byte, by llama.cpp's dry run.  vLLM: to the byte, as compressed-tensors stores it (FP8: a scale a row;
    W4A16: one for 128 weights; embedding and head in 16 bits).  PyTorch: bytes a weight as measured at Llama-2-7B's
    shape.  A mixture stores all experts; each of ``users`` tokens picks its own at random: the expected ones are read.
    """
    base, experts, picked = shape(model)
    per_weight = None if technique.gguf or technique.runtime == "vLLM" else _per_weight(technique, directory)
    if technique.gguf:
        sizes = {t.name: -(-t.nbytes // 32) * 32 for t in capacity.plan(base, technique.gguf)}
    elif technique.runtime != "vLLM" and per_weight is None:
        return None
    else:
        sizes = {}
        for name, lengths in capacity.shapes(base).items():
            n, whole = math.prod(lengths), len(lengths) == 1 or name in ("token_embd.weight", "output.weight")
            kind = "BF16" if whole or technique.runtime != "vLLM" else technique.name.removeprefix("vLLM ")
            sizes[name] = {"BF16": 2 * n, "FP8": n + 2 * lengths[0], "W4A16": n / 2 + n / 64 + 16}[kind]
            if per_weight and not whole:
                sizes[name] = per_weight * n
    expert = sum(size for name, size in sizes.items() if ".ffn_" in name and "norm" not in name)
    idle = sizes["token_embd.weight"] if "output.weight" in sizes else 0  # of which a token reads one row
    rest, used = sum(sizes.values()) - expert, experts * (1 - (1 - picked / experts) ** users)
    return rest + experts * expert, rest - idle + used * expert


def _per_weight(technique: Technique, directory) -> float | None:
    """Bytes a weight in the layers of Llama-2-7B's shape, as ``tradeoff`` measured them."""
    name = technique.name.removesuffix(", compiled")  # which does not change the size
    for run in recorded("tradeoff", directory):
        for row in run.rows:
            if row["shape"] == "llama2_7b" and row["technique"] == name and row.get("weights_mb"):
                tables = 2 * 32000 * 4096
                return (row["weights_mb"] * 1e6 - 2 * tables) / (capacity.parameters("Llama-2-7B") - tables)
    return 2.0 if name == "BF16" else None


def kv_per_token(model, kv_type: str, cached: float = 0) -> float:
    """Bytes that one token of one user keeps; vLLM's FP8 is one byte a value."""
    half = kv_type == "FP8"
    return capacity.kv_bytes_per_token(shape(model)[0], "F16" if half else kv_type, cached) / (1 + half)


@dataclass(frozen=True)
class Point:
    """One measured step of generation, or (``step_s`` None) one measured prompt."""

    model: str
    device: str
    cards: int
    split: str | None  # over the cards: tensor, row (they work together), layer (one after the other)
    kv_type: str
    users: int
    read: float  # bytes
    cached: float  # tokens in the cache of each user
    step_s: float | None
    watts: float | None  # of all cards
    first_s: float | None  # until the first token of a prompt of ``prompt`` tokens, one user
    prompt: int | None
    served: bool = False  # between two tokens that a server sent, others' prompts included; else a step alone

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the cards that read at the same time."""
        return together(self.cards, self.split) * hardware.device(self.device).gb_per_s * 1e9


def together(cards: int, split: str | None) -> int:
    """Cards that work at the same time: all, but one where each holds some layers."""
    return 1 if split == "layer" else cards


def points(directory=None) -> dict[str, list[Point]]:
    """Technique -> its measured steps and prompts, of every GPU: ``tradeoff``, ``llama70b`` and ``serving``."""
    found: dict[str, list[Point]] = {}
    for file, run in ((name, run) for name in ("tradeoff", "llama70b", "serving")
                      for run in recorded(name, directory) if "compute_capability" in run.machine):  # fmt: skip
        for row in run.rows:
            model = {"tradeoff": "Llama-2-7B", "llama70b": "Llama-2-70B"}.get(file, row.get("shape"))
            kind = row.get("kind", "llama2_7b" if row.get("shape") == "llama2_7b" else None)
            known = ("llama2_7b", "model", "batch", "depth", "served", "fixed")
            if kind not in known or row.get("not_run") or row.get("options"):  # which are trials of other settings
                continue
            engine = row.get("runtime", "llama.cpp")
            name = row.get("technique") or (f"GGUF {row['type']}" if engine == "llama.cpp" else f"vLLM {row['type']}")
            if (technique := (TECHNIQUES | VLLM).get(name)) and (made := _point(row, model, run.device, technique,
                                                                                 directory)):  # fmt: skip
                found.setdefault(name, []).append(made)
    return found


def _point(row: dict, model: str, device: str, technique: Technique, directory) -> Point | None:
    users = int(row.get("streams") or row.get("batch") or 1)
    prompt, new = row.get("prefill_tokens"), row.get("decode_tokens") or 0
    cached = row.get("decode_context") or row.get("depth") or prompt or 0
    cached += 0 if row.get("decode_context") else new / 2  # on average over the measurement
    kv_type = row.get("kv_type") or ("F16" if technique.runtime == "llama.cpp" else "BF16")
    size = weights(technique, model, users, directory)
    mixed = users > 1 and not row.get("decode_context") and (prompt or 0) > 4 * new  # others' prompts, above all
    speed = row.get("decode_tokens_per_s") if new != 2 and not mixed else None  # two tokens are a prompt's measurement
    rate, ttft = row.get("prefill_tokens_per_s"), row.get("time_to_first_token_ms") or row.get("ttft_p50_ms")
    joules = row.get("joules_per_decode_token")
    first = ttft / 1000 if ttft else prompt / rate if rate and prompt else None
    if size is None or not (speed or first):
        return None
    return Point(model, device, int(row.get("cards") or 1), row.get("split"), kv_type, users,
                 size[1] + users * cached * kv_per_token(model, kv_type, cached), cached,
                 users / speed if speed else None, joules and joules * (row.get("output_tokens_per_s") or speed or 0),
                 first if users == 1 else None, prompt, row.get("loop") is not None)  # fmt: skip


def step(measured: list[Point], read: float, device: hardware.Device, cards: int = 1,
         split: str | None = None) -> tuple[float, float]:  # fmt: skip
    """(at least, at most) seconds of a step that reads ``read`` bytes, by all fits that ``measured`` allows (points
    of one technique and one number of users); never less than bytes over bandwidth."""
    bandwidth = together(cards, split) * device.gb_per_s * 1e9
    known = np.array([[p.read / p.bandwidth, p.read / together(p.cards, p.split) / 1e12, 1.0] for p in measured])
    seconds = np.array([p.step_s for p in measured])
    here = np.array([read / bandwidth, read / together(cards, split) / 1e12, 1.0])
    low, high = _range(tuple(map(tuple, known)), tuple(seconds), tuple(here))
    return max(low, read / bandwidth), max(high, read / bandwidth)


@lru_cache(maxsize=4096)
def _range(known, seconds, here) -> tuple[float, float]:
    """The least and the most of ``here @ x`` over x >= 0 with ``known @ x`` within a share of ``seconds``: NOISE, or
    twice the smallest that any x reaches, so that each of ``seconds`` lies in the range at its own place."""
    known, seconds, here = map(np.array, (known, seconds, here))
    off = linprog([0, 0, 0, 1], np.block([[known, -seconds[:, None]], [-known, -seconds[:, None]]]),
                  np.r_[seconds, -seconds]).x[3]  # fmt: skip
    share = max(NOISE, 2.002 * off / (1 - off))
    limits = np.r_[known, -known], np.r_[seconds * (1 + share), -seconds * (1 - share)]
    return tuple(sign * linprog(sign * here, *limits).fun for sign in (1, -1))


def choose_points(known: list[Point], model, device: str, users: int, kv_type: str, cards: int,
                  split: str | None) -> list[tuple[int, list[Point]]]:  # fmt: skip
    """[(users, points)] to predict from: those for ``users``, else of the next smaller and larger number, else nothing.
    Points of the very model and device are enough; else all models and devices count."""
    steps = [p for p in known if p.step_s and (p.cards, p.split, p.kv_type) == (cards, split, kv_type)]
    there = sorted({p.users for p in steps})
    if not there or not there[0] <= users <= there[-1]:
        return []
    around = {max(n for n in there if n <= users), min(n for n in there if n >= users)}
    groups = []
    for n in sorted(around):
        group = [p for p in steps if p.users == n]
        groups.append((n, [p for p in group if p.model == model and hardware.device(p.device).name == device] or group))
    return groups


def predict(groups, read: float, device: hardware.Device, users: int, cards: int = 1,
            split: str | None = None) -> tuple[float, float]:  # fmt: skip
    """(at least, at most) seconds of a step for ``users``, between the numbers of users that were measured."""
    ends = [step(group, read, device, cards, split) for _, group in groups]
    return tuple(float(np.interp(users, [n for n, _ in groups], [end[i] for end in ends])) for i in (0, 1))


def first_token(known: list[Point], model, prompt: int, device: hardware.Device, cards: int,
                split: str | None) -> tuple[float, float] | None:  # fmt: skip
    """(at least, at most) seconds until the first token of a prompt that has the engine for itself; None where no
    prompt was measured on this kind of processor.  Arithmetic decides: time in proportion to tokens x weights."""
    there = [p for p in known if p.first_s and (p.cards, p.split) == (cards, split)
             and hardware.device(p.device).chip == device.chip]  # fmt: skip
    there = [p for p in there if p.model == model] or there
    used = {name: weights(VLLM["vLLM BF16"], name)[1] for name in {model, *(p.model for p in there)}}
    each = [p.first_s * prompt / p.prompt * used[model] / used[p.model] for p in there]
    return ((1 - NOISE) * min(each), (1 + NOISE) * max(each)) if each else None
