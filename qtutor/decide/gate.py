"""A validation gate: what a quantized model has to show before it ships.

A table of averages does not stop a bad file.  A gate does: a small set of prompts and a stretch of text, what the base
model makes of them, and how far a quantized model may be from that.  It runs in seconds, needs only a JSON file at
check time (not the base model, not its tokenizer), and says *what* fell out of range and by how much.

    gate = Gate.build(base_model, DEFAULT_PROMPTS, items=accuracy.build_items(50))
    gate.save("gate.json")
    ...
    report = Gate.load("gate.json").check(quantized_model, name="Q4_K_M")
    print(report)
    report.raise_for_failure()              # in a release script or in CI

What is checked, from the crude to the fine:

- *finite*: no NaN or infinity in any logits
- *size*, *speed*: optional limits on bytes and tokens per second
- for each prompt, *log-probability*: of a reference continuation, per token, within a range around the base's;
  *first token*: one that the base finds plausible; *repetition*: the greedy continuation does not loop more than the
  base's does (a damaged model babbles long before its averages look alarming)
- on the text, *perplexity*, *KLD* (mean, and 99th percentile: rare large errors hide in a mean), and *same top token*
- *accuracy*: not significantly below the base's on multiple-choice items (McNemar's exact test, one-sided)

The limits are yours to set: :class:`Limits` has defaults that Q8_0 and Q6_K pass with room to spare.  They are looser
than run-to-run noise and tighter than what a reader of the output would notice.

KLD here compares the base's :data:`TOP` likeliest tokens and "all others" taken together, so that the file stays small.
Merging outcomes never increases a KL divergence (the data-processing inequality): the figure is a little below the full
KLD, never above it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .. import QtutorError, corpus, course_model, evaluate, files, paired
from . import accuracy

DEFAULT_PROMPTS = (
    "Return a new array with the same",
    "If the sequence is empty, a",
    "The default value of this parameter",
    "Raises\n------\nValueError\n    If",
    "Examples\n--------\n>>> import numpy as np\n>>>",
    "This function is used to",
)
TOP = 16  # the likeliest tokens that are kept of each position


class Recorded(BaseModel):
    """What is written to the file: no field too many, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(Recorded):
    """How far a model may be from its base.

    - ``logprob``: change of a reference continuation's log-probability, nats per token, either way
    - ``plausible``: a first token is plausible where the base gives it this share of its top token's probability
    - ``repetition``: added share of repeated four-token sequences in the greedy continuation of 32 tokens (a sound
      small model repeats a phrase now and then; a loop repeats nearly everything)
    - ``perplexity``: added share of the base's perplexity on the text (0.02: 2 %)
    - ``kld_mean``, ``kld_p99``: KL divergence from the base, nats per token
    - ``same_top``: least share of tokens where both put the same token first
    - ``accuracy_alpha``: level at which a loss of accuracy counts as shown
    - ``max_bytes``, ``min_tokens_per_s``: optional
    """

    logprob: float = Field(0.25, ge=0)
    plausible: float = Field(0.5, ge=0)
    repetition: float = Field(0.5, ge=0)
    perplexity: float = Field(0.02, ge=0)
    kld_mean: float = Field(0.05, ge=0)
    kld_p99: float = Field(0.5, ge=0)
    same_top: float = Field(0.9, ge=0)
    accuracy_alpha: float = Field(0.05, ge=0)
    max_bytes: int | None = Field(None, ge=0)
    min_tokens_per_s: float | None = Field(None, ge=0)

    def __init__(self, **limits):
        try:
            super().__init__(**limits)
        except ValidationError as error:
            first = error.errors()[0]
            raise QtutorError(f"The limit {first['loc'][0]} cannot be {first['input']!r}: {first['msg']}.") from None


def row(check: str, where: str, value: float, low: float, high: float, unit: str = "", note: str = "") -> dict:
    """One check: ``value`` is expected from ``low`` to ``high``; ``margin`` to the nearer one, negative outside."""
    words = [f"{x:,.4g}" for x in (low, high)]
    expected = words[0] if low == high else f"{words[0]} to {words[1]}"
    expected = f"at most {words[1]}" if math.isinf(low) else f"at least {words[0]}" if math.isinf(high) else expected
    return {"check": check, "where": where, "value": value, "unit": unit, "expected": expected,
            "margin": min(value - low, high - value), "passed": low <= value <= high, "note": note}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """All checks of one model, ``table`` with one :func:`row` each; prints as text, shows as a table in a notebook."""

    name: str
    base: str
    table: pandas.DataFrame

    @property
    def passed(self) -> bool:
        return bool(self.table["passed"].all())

    @property
    def failures(self) -> pandas.DataFrame:
        return self.table[~self.table["passed"]]

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

    def _repr_html_(self) -> str:
        table = self.table.sort_values("passed", kind="stable").replace({"passed": {True: "pass", False: "FAIL"}})
        colors = {"pass": "color: #0072B2", "FAIL": "color: #D55E00; font-weight: bold"}
        return (table.style.hide(axis="index").map(colors.get, subset=["passed"])
                .format({"value": "{:,.4g}", "margin": "{:+,.3g}"}, escape="html")
                .set_caption(html.escape(self.headline)).to_html())  # fmt: skip


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


def _short(text: str, n: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n - 1] + "…"


class Prompt(Recorded):
    """What the base makes of a prompt: its log-probability of a continuation, its first tokens, how much it repeats."""

    prompt: str
    ids: list[int] = Field(min_length=1)
    reference: list[int] = Field(min_length=1)
    reference_text: str
    logprob: float
    repetition: float
    written: int = Field(ge=1)
    first_ids: list[int] = Field(min_length=1)
    first_logp: list[float]
    first_text: list[str]

    @classmethod
    def record(cls, read: Reader, tokenizer, prompt, n: int, written: int = 32) -> Prompt:
        def encode(text):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else []
            if not ids:
                raise QtutorError(f"A prompt, and a reference, is a text with at least one token, not {text!r}.")
            return ids

        text, reference = prompt if isinstance(prompt, (tuple, list)) else (prompt, None)
        ids = encode(text)
        greedy = read.greedy(ids, max(n, written))
        reference = greedy[:n] if reference is None else encode(reference)
        value, first = read.continuation(ids, reference)
        if read.bad:
            raise QtutorError("The base model's logits hold NaN or infinity: a gate needs a sound base.")
        likely = np.argsort(-first, kind="stable")[:TOP].tolist()
        return cls(prompt=text, ids=ids, reference=reference, reference_text=tokenizer.decode(reference), logprob=value,
                   repetition=repetition(greedy[:written]), written=written, first_ids=likely, first_logp=first[likely],
                   first_text=[repr(tokenizer.decode([i])) for i in likely])  # fmt: skip

    def check(self, read: Reader, limits: Limits) -> list[dict]:
        where = _short(self.prompt)
        value, first = read.continuation(self.ids, self.reference)
        top, names = int(first.argmax()), dict(zip(self.first_ids, self.first_text, strict=True))
        share = np.exp(np.array(self.first_logp) - max(self.first_logp))
        plausible = [token for token, one in zip(self.first_ids, share, strict=True) if one >= limits.plausible]
        note = f"{names.get(top, f'token {top}')}, the base finds plausible: {', '.join(names[t] for t in plausible)}"
        looped, most = repetition(read.greedy(self.ids, self.written)), min(1.0, self.repetition + limits.repetition)
        return [
            row("log-probability", where, value, self.logprob - limits.logprob, self.logprob + limits.logprob,
                "nats/token", f"of {_short(self.reference_text)!r}"),
            row("first token", where, float(top in plausible), 1, 1, "(1: plausible)", note),
            row("repetition", where, looped, -math.inf, most, "of 4-grams"),
        ]  # fmt: skip


class Question(Recorded):
    """A multiple-choice item as token ids, and whether the base got it right."""

    requests: list[tuple[list[int], int]] = Field(min_length=2)  # (passage and ending, tokens of the passage)
    lengths: list[int]
    answer: int = Field(ge=0)
    base_hit: bool = False

    @classmethod
    def record(cls, base, tokenizer, items) -> list[Question]:
        accuracy.check_items(items)
        asked = [cls(requests=[accuracy.encode(tokenizer, item.context, choice) for choice in item.choices],
                     lengths=map(len, item.choices), answer=item.answer) for item in items]  # fmt: skip
        return [
            q.model_copy(update={"base_hit": bool(hit)}) for q, hit in zip(asked, cls.hits(base, asked), strict=True)
        ]

    @staticmethod
    def hits(source, questions: Sequence[Question]) -> np.ndarray:
        """Which questions the model gets right, by log-likelihood per character: bool (n,)."""
        loglik = accuracy.loglikelihoods(source, [request for q in questions for request in q.requests])
        scores = loglik.reshape(len(questions), -1) / [q.lengths for q in questions]
        return scores.argmax(1) == [q.answer for q in questions]


class Gate(Recorded):
    """What a base model makes of some prompts, a text and some questions, and the limits for others.

    Make one with :meth:`build` or :meth:`load`; the fields are what :meth:`save` writes.
    """

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
        ids, logp = np.array(self.top_ids), np.array(self.top_logp)
        scored = len(self.tokens) // self.ctx * (self.ctx - 1)
        used = [ids, self.tokens, *(p.ids + p.reference + p.first_ids for p in self.prompts)]
        if ids.ndim != 2 or ids.shape != logp.shape or len(ids) != scored:
            raise ValueError("the text and its top tokens do not fit together")
        if any(np.max(x) >= self.n_vocab or np.min(x) < 0 for x in used):
            raise ValueError("token ids outside the vocabulary")
        if any(not len(p.first_ids) == len(p.first_logp) == len(p.first_text) for p in self.prompts):
            raise ValueError("a prompt's first tokens are not complete")
        if any(not len(q.requests) == len(q.lengths) > q.answer for q in self.items):
            raise ValueError("a question is not complete")
        return self

    @classmethod
    def build(cls, base, prompts=DEFAULT_PROMPTS, tokenizer=None, tokens=None, items=(), limits: Limits | None = None,
              reference_tokens: int = 16, ctx: int = 128, name: str = "the base model") -> Gate:  # fmt: skip
        """Record what ``base`` does: the model before quantization, any source of :mod:`qtutor.evaluate`.

        Args:
            prompts: texts, or pairs (text, reference continuation); by default the reference is what the base itself
                writes, greedily: ``reference_tokens``.
            tokenizer: the model's, a Hugging Face tokenizer; the course model's by default.
            tokens: token ids (n,) of a text to compare on, in windows of ``ctx``; by default 1,024 of the evaluation
                text.
            items: multiple choice (:func:`qtutor.decide.accuracy.build_items`); none by default.

        Raises QtutorError for no prompts, an empty prompt or reference, too little text, and a base whose logits are
        not finite.
        """
        if isinstance(prompts, str) or not prompts:
            raise QtutorError("Give the prompts as a list of texts, at least one.")
        tokenizer = tokenizer or course_model.load_tokenizer()
        tokens = np.asarray(corpus.tokens("eval", tokenizer)[:1024] if tokens is None else tokens)
        if tokens.min() < 0 or tokens.max() >= len(tokenizer):
            raise QtutorError("The tokens lie outside the tokenizer's vocabulary: use the model's own tokenizer.")
        read = Reader(base)
        recorded = [Prompt.record(read, tokenizer, prompt, reference_tokens) for prompt in prompts]
        logp, nll = read.text(tokens, ctx)
        likely = np.argsort(-logp, axis=1, kind="stable")[:, :TOP]
        top_logp = [[float(f"{x:.7g}") for x in each] for each in np.take_along_axis(logp, likely, 1)]
        questions = Question.record(base, tokenizer, items) if items else []
        return cls(base=name, n_vocab=logp.shape[1], ctx=ctx, prompts=recorded, tokens=tokens, nll=nll, top_ids=likely,
                   top_logp=top_logp, items=questions, limits=limits or Limits())  # fmt: skip

    def check(self, model, bytes: int | None = None, tokens_per_s: float | None = None, name: str = "model") -> Report:
        """Run all checks on a model and report; raises only for a model that does not fit the gate.

        ``bytes`` and ``tokens_per_s`` are its size and measured speed, for the limits on them; the size of a
        llamacpp.Model is known.
        """
        read, limits = Reader(model, self.n_vocab), self.limits
        rows = [one for prompt in self.prompts for one in prompt.check(read, limits)]
        logp, nll = read.text(self.tokens, self.ctx)
        ids, base, n = np.array(self.top_ids), math.exp(self.nll), f"{len(logp):,} tokens"
        kld = _kld_of_top(np.array(self.top_logp), np.take_along_axis(logp, ids, 1))
        same = float((logp.argmax(1) == ids[:, 0]).mean())
        rows += [
            row("perplexity", n, math.exp(nll) if nll < 700 else math.nan, -math.inf, base * (1 + limits.perplexity),
                "", f"the base's is {base:.4g}"),
            row("KLD, mean", n, float(kld.mean()), -math.inf, limits.kld_mean, "nats"),
            row("KLD, 99th percentile", n, float(np.percentile(kld, 99)), -math.inf, limits.kld_p99, "nats"),
            row("same top token", n, same, limits.same_top, math.inf, "of tokens"),
        ]  # fmt: skip
        if self.items and not read.bad:
            before, hits = [q.base_hit for q in self.items], Question.hits(model, self.items)
            found = paired.mcnemar(before, hits, alternative="greater")
            note = (
                f"{np.mean(hits):.1%} right, the base {np.mean(before):.1%}; {found.lost} lost, {found.gained} gained"
            )
            rows.append(row("accuracy", f"{found.n} items", found.p, limits.accuracy_alpha, math.inf, "= p of no loss",
                            note))  # fmt: skip
        bytes = bytes if bytes is not None else getattr(getattr(model, "gguf", None), "file_bytes", None)
        first = [row("finite", "logits", read.bad, 0, 0, "positions", f"of {read.n:,} hold NaN or infinity")]
        limited = (("size", bytes, -math.inf, limits.max_bytes, "bytes"),
                   ("speed", tokens_per_s, limits.min_tokens_per_s, math.inf, "tokens/s"))  # fmt: skip
        for check, value, low, high, unit in limited:
            if None not in (low, high):
                note = "there is a limit, but no measurement was given" if value is None else ""
                first.append(row(check, "", math.nan if value is None else value, low, high, unit, note))
        return Report(name, self.base, pandas.DataFrame(first + rows))

    def save(self, path) -> Path:
        """Write the gate as JSON; return the path."""
        return files.write_text(path, self.model_dump_json())

    @classmethod
    def load(cls, path) -> Gate:
        """Read a gate; raises QtutorError for a file that is missing, damaged or of another version."""
        data = files.read_json(path, "gate")
        try:
            return cls.model_validate(data)
        except (ValidationError, QtutorError):
            raise QtutorError(f"{Path(path).name} is a damaged gate, or one of another version: build and save it "
                              "again.") from None  # fmt: skip
