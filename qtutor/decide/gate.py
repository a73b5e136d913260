"""A validation gate: what a quantized model has to show before it ships.

A table of averages does not stop a bad file.  A gate does: a small set of prompts and a stretch of text, what the base
model makes of them, and how far a quantized model may be from that.  It runs in seconds, needs only a JSON file at
check time (not the base model, not its tokenizer), and says *what* fell out of range and by how much.

    Gate.build(base_model, DEFAULT_PROMPTS, items=accuracy.build_items(50)).save("gate.json")
    report = Gate.load("gate.json").check(quantized_model, name="Q4_K_M")
    print(report)
    report.raise_for_failure()              # in a release script or in CI

What is checked, from the crude to the fine:

- *finite*: no NaN or infinity in any logits
- for each prompt, *log-probability*: of a reference continuation, per token, within a range around the base's;
  *first token*: one that the base finds plausible; *repetition*: the greedy continuation does not loop more than the
  base's does (a damaged model babbles long before its averages look alarming)
- on the text, *perplexity*, *KLD* (mean, and 99th percentile: rare large errors hide in a mean), and *same top token*
- *accuracy*: not significantly below the base's on multiple-choice items (McNemar's exact test, one-sided)

The defaults of :class:`Limits` are looser than run-to-run noise and tighter than what a reader of the output notices.
KLD here compares the base's :data:`TOP` likeliest tokens and "all others" taken together, so that the file stays small.
Merging outcomes never increases a KL divergence (the data-processing inequality): the figure is a little below the full
KLD, never above it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .. import QtutorError, corpus, course_model, evaluate, files, paired
from . import accuracy

DEFAULT_PROMPTS = (
    "Return a new array with the same", "If the sequence is empty, a", "The default value of this parameter",
    "Raises\n------\nValueError\n    If", "Examples\n--------\n>>> import numpy as np\n>>>", "This function is used to",
)  # fmt: skip
TOP = 16  # the likeliest tokens that are kept of each position
REFERENCE, WRITTEN = 16, 32  # tokens that the base writes: the reference, and what is searched for loops


class Recorded(BaseModel):
    """What is written to the file: no field too many, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(Recorded):
    """How far a model may be from its base."""

    logprob: float = Field(0.25, ge=0)  # change of a reference's log-probability, nats per token, either way
    plausible: float = Field(0.5, ge=0)  # of the top token's probability: from there on a first token is plausible
    # added share of repeated 4-grams: a sound small model repeats a phrase now and then, a loop nearly everything
    repetition: float = Field(0.5, ge=0)
    perplexity: float = Field(0.02, ge=0)  # added share of the base's perplexity on the text
    kld_mean: float = Field(0.05, ge=0)  # KL divergence from the base, nats per token
    kld_p99: float = Field(0.5, ge=0)
    same_top: float = Field(0.9, ge=0)  # least share of tokens where both put the same token first
    accuracy_alpha: float = Field(0.05, ge=0)  # level at which a loss of accuracy counts as shown


def row(check: str, where: str, value: float, low: float, high: float, unit: str = "", note: str = "") -> dict:
    """One check: ``value`` is expected from ``low`` to ``high``; ``margin`` to the nearer one, negative outside."""
    words = [f"{x:,.4g}" for x in (low, high)]
    expected = words[0] if low == high else f"{words[0]} to {words[1]}"
    expected = f"at most {words[1]}" if math.isinf(low) else f"at least {words[0]}" if math.isinf(high) else expected
    return {"check": check, "where": where, "value": value, "unit": unit, "expected": expected,
            "margin": min(value - low, high - value), "passed": low <= value <= high, "note": note}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """All checks of one model, ``table`` with one :func:`row` each."""

    name: str
    base: str
    table: pandas.DataFrame

    passed = property(lambda self: bool(self.table["passed"].all()))
    failures = property(lambda self: self.table[~self.table["passed"]])

    @property
    def headline(self) -> str:
        failed, n = len(self.failures), len(self.table)
        verdict = f"FAILS {failed} of {n} checks" if failed else f"PASSES all {n} checks"
        return f"{self.name} {verdict} against {self.base}"

    def sentences(self) -> list[str]:
        """What fell out of range, and by how much."""
        return [f"{r.check} [{r.where}]: {r.value:,.4g} {r.unit}, expected {r.expected}{r.note and '; '}{r.note}"
                for r in self.failures.itertuples()]  # fmt: skip

    def raise_for_failure(self) -> None:
        """Raise QtutorError, naming the first three failures, unless everything passed."""
        if not self.passed:
            raise QtutorError(f"{self.headline}: {'; '.join(self.sentences()[:3])}. Do not ship it.")

    def __str__(self) -> str:
        return "\n  FAIL  ".join([f"{self.headline}.", *self.sentences()])


class Reader:
    """Log-probabilities of a model, counting the positions where its logits are not numbers."""

    def __init__(self, source, n_vocab: int | None = None):
        self.source, self.n_vocab, self.bad, self.n = source, n_vocab, 0, 0

    def __call__(self, ids, first: int = 0) -> np.ndarray:
        """Log-probabilities after positions first, first + 1, ... of ``ids``: float64 (n - first, vocab)."""
        with torch.inference_mode(), evaluate.eval_mode(self.source):
            logits = evaluate.logits_function(self.source, first)(np.asarray(ids, dtype=np.int64)).cpu().double()
        if logits.shape[1] != (self.n_vocab or logits.shape[1]):
            raise QtutorError(f"This model has {logits.shape[1]} tokens and the gate was built for {self.n_vocab}: "
                              "they have different tokenizers.")  # fmt: skip
        bad = torch.isnan(logits).any(1) | torch.isposinf(logits).any(1)
        self.bad, self.n = self.bad + int(bad.sum()), self.n + len(bad)
        return logits.log_softmax(-1).numpy()

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """The next ``n`` tokens, each the likeliest."""
        for _ in range(n):
            ids = [*ids, int(self(ids, len(ids) - 1)[-1].argmax())]
        return ids[-n:]

    def continuation(self, prompt: list[int], reference: list[int]) -> tuple[float, np.ndarray]:
        """Mean log-probability of the reference, nats per token, and those of all first tokens (vocab,)."""
        logp = self([*prompt, *reference][:-1], len(prompt) - 1)
        return float(logp[np.arange(len(reference)), reference].mean()), logp[0]

    def text(self, tokens, ctx: int) -> tuple[np.ndarray, float]:
        """Log-probabilities (n, vocab) on a text in windows of ``ctx``, and its negative log-likelihood a token."""
        targets = evaluate.targets_of(tokens, ctx)
        logp = np.concatenate([self(window)[:-1] for window in evaluate.windows(tokens, ctx)])
        if min(tokens) < 0 or max(tokens) >= logp.shape[1]:
            raise QtutorError("The tokens lie outside the model's vocabulary: use the model's own tokenizer.")
        return logp, -float(logp[np.arange(len(targets)), targets].mean())


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of the ``n``-token sequences in ``ids`` that occurred before: 0 where nothing repeats, near 1 in a loop."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _kld_of_top(base_logp: np.ndarray, logp: np.ndarray) -> np.ndarray:
    """KL divergence per token of the partition {each top token, all others}; both arguments (n, top), nats."""
    p, q = np.exp(base_logp), np.exp(logp)
    rest_p, rest_q = (np.maximum(1 - x.sum(1), 1e-12) for x in (p, q))
    return (p * (base_logp - logp)).sum(1) + rest_p * (np.log(rest_p) - np.log(rest_q))


_short = partial(textwrap.shorten, width=40, placeholder="…")


class Prompt(Recorded):
    """What the base makes of a prompt: its log-probability of a continuation, its first tokens, how much it repeats."""

    prompt: str
    ids: list[int] = Field(min_length=1)
    reference: list[int] = Field(min_length=1)  # what the base itself writes, greedily
    reference_text: str
    logprob: float
    repetition: float
    first: list[tuple[int, float, str]] = Field(min_length=1)  # the likeliest first tokens: id, log-probability, text

    @classmethod
    def record(cls, read: Reader, tokenizer, prompt: str) -> Prompt:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else []
        if not ids:
            raise QtutorError(f"A prompt is a text with at least one token, not {prompt!r}.")
        greedy = read.greedy(ids, WRITTEN)
        reference = greedy[:REFERENCE]
        value, first = read.continuation(ids, reference)
        if read.bad:
            raise QtutorError("The base model's logits hold NaN or infinity: a gate needs a sound base.")
        likely = np.argsort(-first, kind="stable")[:TOP].tolist()
        return cls(prompt=prompt, ids=ids, reference=reference, reference_text=tokenizer.decode(reference),
                   logprob=value, repetition=repetition(greedy),
                   first=[(i, first[i], repr(tokenizer.decode([i]))) for i in likely])  # fmt: skip

    def check(self, read: Reader, limits: Limits) -> list[dict]:
        where = _short(self.prompt)
        value, first = read.continuation(self.ids, self.reference)
        top, likeliest = int(first.argmax()), max(logp for _, logp, _ in self.first)
        plausible = {i: text for i, p, text in self.first if math.exp(p - likeliest) >= limits.plausible}
        wrote = {i: text for i, _, text in self.first}.get(top, f"token {top}")
        looped, most = repetition(read.greedy(self.ids, WRITTEN)), min(1.0, self.repetition + limits.repetition)
        return [
            row("log-probability", where, value, self.logprob - limits.logprob, self.logprob + limits.logprob,
                "nats/token", f"of {_short(self.reference_text)!r}"),
            row("first token", where, float(top in plausible), 1, 1, "(1: plausible)",
                f"{wrote}, the base finds plausible: {', '.join(plausible.values())}"),
            row("repetition", where, looped, -math.inf, most, "of 4-grams"),
        ]  # fmt: skip


class Question(Recorded):
    """A multiple-choice item as token ids, and whether the base got it right."""

    choices: list[tuple[list[int], int, int]] = Field(min_length=2)  # passage and ending, the passage's, characters
    answer: int = Field(ge=0)
    base_hit: bool = False

    @classmethod
    def record(cls, base, tokenizer, items) -> list[Question]:
        accuracy.check_items(items)
        asked = [cls(choices=[(*accuracy.encode(tokenizer, item.context, choice), len(choice))
                              for choice in item.choices], answer=item.answer) for item in items]  # fmt: skip
        hits = cls.hits(base, asked)
        return [q.model_copy(update={"base_hit": bool(hit)}) for q, hit in zip(asked, hits, strict=True)]

    @staticmethod
    def hits(source, questions: Sequence[Question]) -> np.ndarray:
        """Which questions the model gets right, by log-likelihood per character: bool (n,)."""
        loglik = accuracy.loglikelihoods(source, [(ids, first) for q in questions for ids, first, _ in q.choices])
        scores = loglik.reshape(len(questions), -1) / [[length for *_, length in q.choices] for q in questions]
        return scores.argmax(1) == [q.answer for q in questions]


class Gate(Recorded):
    """What a base model makes of some prompts, a text and some questions, and the limits for others."""

    version: Literal[1] = 1
    base: str
    n_vocab: int
    ctx: int
    prompts: list[Prompt] = Field(min_length=1)
    tokens: list[int]
    nll: float
    top_ids: list[list[int]]
    top_logp: list[list[float]]
    items: list[Question]
    limits: Limits

    @model_validator(mode="after")
    def _fits_together(self):
        ids, scored = np.array(self.top_ids), len(self.tokens) // self.ctx * (self.ctx - 1)
        used = [ids, self.tokens, *(p.ids + p.reference + [first[0] for first in p.first] for p in self.prompts)]
        if ids.ndim != 2 or ids.shape != np.shape(self.top_logp) or len(ids) != scored:
            raise ValueError("the text and its top tokens do not fit together")
        if any(np.max(x) >= self.n_vocab or np.min(x) < 0 for x in used):
            raise ValueError("token ids outside the vocabulary")
        return self

    @classmethod
    def build(cls, base, prompts=DEFAULT_PROMPTS, tokenizer=None, tokens=None, items=(), limits: Limits | None = None,
              ctx: int = 128, name: str = "the base model") -> Gate:  # fmt: skip
        """Record what ``base`` does: the model before quantization, any source of :mod:`qtutor.evaluate`.

        ``tokens`` (n,) are of a text to compare on, in windows of ``ctx``, by default 1,024 of the evaluation text;
        ``items`` are questions of :func:`qtutor.decide.accuracy.build_items`.
        """
        if isinstance(prompts, str) or not prompts:
            raise QtutorError("Give the prompts as a list of texts, at least one.")
        tokenizer = tokenizer or course_model.load_tokenizer()
        tokens = np.asarray(corpus.tokens("eval", tokenizer)[:1024] if tokens is None else tokens)
        if tokens.min() < 0 or tokens.max() >= len(tokenizer):
            raise QtutorError("The tokens lie outside the tokenizer's vocabulary: use the model's own tokenizer.")
        read = Reader(base)
        recorded = [Prompt.record(read, tokenizer, prompt) for prompt in prompts]
        logp, nll = read.text(tokens, ctx)
        likely = np.argsort(-logp, axis=1, kind="stable")[:, :TOP]
        top_logp = [[float(f"{x:.7g}") for x in each] for each in np.take_along_axis(logp, likely, 1)]
        questions = Question.record(base, tokenizer, items) if items else []
        return cls(base=name, n_vocab=logp.shape[1], ctx=ctx, prompts=recorded, tokens=tokens, nll=nll, top_ids=likely,
                   top_logp=top_logp, items=questions, limits=limits or Limits())  # fmt: skip

    def check(self, model, name: str = "model") -> Report:
        """Run all checks on a model and report; raises only for a model that does not fit the gate."""
        read, limits = Reader(model, self.n_vocab), self.limits
        rows = [one for prompt in self.prompts for one in prompt.check(read, limits)]
        logp, nll = read.text(self.tokens, self.ctx)
        ids, base, n = np.array(self.top_ids), math.exp(self.nll), f"{len(logp):,} tokens"
        kld = _kld_of_top(np.array(self.top_logp), np.take_along_axis(logp, ids, 1))
        same = float((logp.argmax(1) == ids[:, 0]).mean())
        rows += [
            row("perplexity", n, np.exp(nll), -math.inf, base * (1 + limits.perplexity), "", f"the base: {base:.4g}"),
            row("KLD, mean", n, float(kld.mean()), -math.inf, limits.kld_mean, "nats"),
            row("KLD, 99th percentile", n, float(np.percentile(kld, 99)), -math.inf, limits.kld_p99, "nats"),
            row("same top token", n, same, limits.same_top, math.inf, "of tokens"),
        ]  # fmt: skip
        if self.items and not read.bad:
            before, hits = [q.base_hit for q in self.items], Question.hits(model, self.items)
            found = paired.mcnemar(before, hits, alternative="greater")
            rows.append(row("accuracy", f"{found.n} items", found.p, limits.accuracy_alpha, math.inf, "= p of no loss",
                            f"{np.mean(hits):.1%} right, the base {np.mean(before):.1%}; {found.lost} lost, "
                            f"{found.gained} gained"))  # fmt: skip
        rows.insert(0, row("finite", "logits", read.bad, 0, 0, "positions", f"of {read.n:,} hold NaN or infinity"))
        return Report(name, self.base, pandas.DataFrame(rows))

    def save(self, path) -> Path:
        """Write the gate as JSON; return the path."""
        return files.write_text(path, self.model_dump_json())

    @classmethod
    def load(cls, path) -> Gate:
        """Read a gate that :meth:`save` wrote."""
        data = files.read_json(path, "gate")
        try:
            return cls.model_validate(data)
        except ValidationError:
            raise QtutorError(f"{Path(path).name} is a damaged gate, or one of another version: build and save it "
                              "again.") from None  # fmt: skip
