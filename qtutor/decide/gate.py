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

KLD here compares the base's ``top`` likeliest tokens and "all others" taken together, so that the file stays small.
Merging outcomes never increases a KL divergence (the data-processing inequality): the figure is a little below the full
KLD, never above it.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from .. import QtutorError

VERSION = 1
DEFAULT_PROMPTS = (
    "Return a new array with the same",
    "If the sequence is empty, a",
    "The default value of this parameter",
    "Raises\n------\nValueError\n    If",
    "Examples\n--------\n>>> import numpy as np\n>>>",
    "This function is used to",
)


@dataclass(frozen=True)
class Limits:
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

    logprob: float = 0.25
    plausible: float = 0.5
    repetition: float = 0.5
    perplexity: float = 0.02
    kld_mean: float = 0.05
    kld_p99: float = 0.5
    same_top: float = 0.9
    accuracy_alpha: float = 0.05
    max_bytes: int | None = None
    min_tokens_per_s: float | None = None

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise QtutorError(f"The limit {f.name} is a number that is not negative, not {value!r}.")


# -------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Row:
    """One check: ``value`` is expected between ``low`` and ``high``; ``margin`` is the distance to the nearer limit,
    in the same unit, negative outside."""

    check: str
    where: str
    value: float
    low: float
    high: float
    unit: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high  # False for NaN

    @property
    def margin(self) -> float:
        return min(self.value - self.low, self.high - self.value)

    @property
    def expected(self) -> str:
        """The range in words."""
        low, high = (None if math.isinf(x) else f"{x:,.4g}" for x in (self.low, self.high))
        if low is None or high is None:
            return f"at most {high}" if low is None else f"at least {low}"
        return low if low == high else f"{low} to {high}"

    def __str__(self) -> str:
        where = f" [{self.where}]" if self.where else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.check}{where}: {self.value:,.4g} {self.unit}".rstrip() + f", expected {self.expected}{note}"


@dataclass(frozen=True)
class Report:
    """All checks of one model; prints as text, shows as a table in a notebook."""

    name: str
    base: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    @property
    def headline(self) -> str:
        """One sentence."""
        failed, n = len(self.failures), len(self.rows)
        return f"{self.name} PASSES all {n} checks" if not failed else f"{self.name} FAILS {failed} of {n} checks"

    def frame(self):
        """The rows as a pandas DataFrame, with ``passed`` and ``margin``."""
        import pandas

        return pandas.DataFrame([asdict(r) | {"passed": r.passed, "margin": r.margin} for r in self.rows])

    def raise_for_failure(self) -> None:
        """Raise QtutorError, naming what fell out of range, unless everything passed."""
        if not self.passed:
            first = "; ".join(str(row) for row in self.failures[:3])
            more = f"; and {len(self.failures) - 3} more" if len(self.failures) > 3 else ""
            raise QtutorError(f"{self.headline} against {self.base}: {first}{more}. Do not ship it.")

    def __str__(self) -> str:
        lines = [f"{self.headline} against {self.base}."]
        lines += [f"  FAIL  {row}" for row in self.failures]
        tightest = sorted((r for r in self.rows if r.passed and 0 < r.margin < math.inf), key=_tightness)[:3]
        if tightest:
            lines.append("  closest to a limit of those that pass:")
            lines += [f"  pass  {row}" for row in tightest]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = []
        for r in sorted(self.rows, key=lambda row: row.passed):
            mark, color = ("pass", "#0072B2") if r.passed else ("FAIL", "#D55E00")
            texts = (r.check, r.where, f"{r.value:,.4g} {r.unit}", r.expected, f"{r.margin:+,.3g}", r.note)
            row = "".join(f"<td style='text-align:left'>{html.escape(t)}</td>" for t in texts)
            cells.append(f"<tr><td style='text-align:left;color:{color}'><b>{mark}</b></td>{row}</tr>")
        head = "".join(f"<th style='text-align:left'>{h}</th>"
                       for h in ("", "check", "where", "value", "expected", "margin", "note"))  # fmt: skip
        title = html.escape(f"{self.headline} against {self.base}.")
        return f"<p><b>{title}</b></p><table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>"


def _tightness(row: Row) -> float:
    """Margin as a share of what the limit leaves."""
    limits = [x for x in (row.low, row.high) if math.isfinite(x)]
    span = limits[1] - limits[0] if len(limits) == 2 else abs(limits[0])
    return row.margin / span if span else 0.0


# ------------------------------------------------------------------------------------------------------- measuring


class _Watched:
    """A source's logits, float64, that counts positions where they are not numbers.  In a ``with`` block, a module is
    in eval mode."""

    def __init__(self, source, n_vocab: int | None = None):
        self.source, self.n_vocab, self.bad, self.n = source, n_vocab, 0, 0

    def __enter__(self):
        self.training = getattr(self.source, "training", False)
        if self.training:
            self.source.eval()
        return self

    def __exit__(self, *_):
        if self.training:
            self.source.train()

    def __call__(self, ids, first: int = 0):
        """Log-probabilities after positions first, first + 1, ... of ``ids``: (n - first, vocab), on the CPU."""
        import torch

        from ..evaluate import _logits_function

        with torch.inference_mode():
            logits = _logits_function(self.source, first)(np.asarray(ids, dtype=np.int64)).detach().cpu().double()
        if logits.shape[1] != (self.n_vocab or logits.shape[1]):
            raise QtutorError(f"This model has {logits.shape[1]} tokens and the gate was built for {self.n_vocab}: "
                              "they have different tokenizers.")  # fmt: skip
        bad = torch.isnan(logits).any(1) | torch.isposinf(logits).any(1)
        self.bad, self.n = self.bad + int(bad.sum()), self.n + len(bad)
        return logits.log_softmax(-1)


def _greedy(run: _Watched, ids: Sequence[int], n: int) -> list[int]:
    ids = list(ids)
    for _ in range(n):
        ids.append(int(run(ids, len(ids) - 1)[-1].argmax()))
    return ids[-n:]


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of the ``n``-token sequences in ``ids`` that occurred before: 0 where nothing repeats, near 1 in a loop."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _logprob(run: _Watched, prompt: Sequence[int], reference: Sequence[int]) -> tuple[float, np.ndarray]:
    """Mean log-probability of the reference, nats per token, and those of all first tokens (vocab,)."""
    ids = [*prompt, *reference]
    logp = run(ids[:-1], len(prompt) - 1)
    return float(np.mean([float(logp[i, t]) for i, t in enumerate(reference)])), logp[0].numpy()


def _text_windows(run: _Watched, tokens, ctx: int):
    """For each window: log-probabilities (ctx - 1, vocab) and the true tokens."""
    from ..evaluate import windows

    for window in windows(tokens, ctx):
        yield run(window)[:-1].numpy(), window[1:]


def _kld_of_top(base_logp: np.ndarray, logp: np.ndarray) -> np.ndarray:
    """KL divergence per token of the partition {each top token, all others}; both arguments (n, top), nats."""
    p, q = np.exp(base_logp), np.exp(logp)
    rest_p, rest_q = (np.maximum(1 - x.sum(1), 1e-12) for x in (p, q))
    return (p * (base_logp - logp)).sum(1) + rest_p * (np.log(rest_p) - np.log(rest_q))


# ------------------------------------------------------------------------------------------------------------ gate


@dataclass(frozen=True)
class Gate:
    """What a base model makes of some prompts, a text and some questions, and the limits for others.

    Make one with :meth:`build` or :meth:`load`; the fields are what :meth:`save` writes.
    """

    base: str
    n_vocab: int
    ctx: int
    prompts: list
    text: dict
    items: list
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def build(cls, base, prompts=DEFAULT_PROMPTS, tokenizer=None, tokens=None, items=None, limits: Limits | None = None,
              reference_tokens: int = 16, ctx: int = 128, top: int = 16, name: str = "the base model") -> Gate:
        """Record what ``base`` does.

        Args:
            base: the model before quantization: a Hugging Face model, a llamacpp.Model or a function from token ids to
                logits.
            prompts: texts, or pairs (text, reference continuation); by default the reference is what the base itself
                writes, greedily.
            tokenizer: the model's, a Hugging Face tokenizer; the course model's by default.
            tokens: token ids (n,) of a text to compare on; by default 1,024 of the evaluation text.
            items: multiple choice (:func:`qtutor.decide.accuracy.build_items`); none by default.
            limits: see :class:`Limits`.
            reference_tokens: length of a reference that the base writes.
            ctx: window on the text.
            top: how many of the base's likeliest tokens to keep for each position of the text.

        Raises QtutorError for no prompts, an empty prompt or reference, too little text, and a base whose logits are
        not finite.
        """
        from .. import corpus
        from . import accuracy

        tokenizer = accuracy._tokenizer(tokenizer)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise QtutorError("Give the prompts as a list of texts.")
        if limits is not None and not isinstance(limits, Limits):
            raise QtutorError("Give the limits as gate.Limits(perplexity=0.02, ...).")
        if items:
            accuracy._check_items(items)
        prompts = list(prompts)
        if not prompts or reference_tokens < 1 or top < 1:
            raise QtutorError("A gate needs at least one prompt, one reference token and one top token.")
        tokens = np.asarray(corpus.tokens("eval", tokenizer)[:1024] if tokens is None else tokens)
        whole = tokens.size and np.issubdtype(tokens.dtype, np.integer)  # windows() refuses the others
        if whole and not 0 <= tokens.min() <= tokens.max() < len(tokenizer):
            raise QtutorError("The tokens lie outside the tokenizer's vocabulary: use the model's own tokenizer.")
        with _Watched(base) as run:
            recorded = [_record_prompt(run, tokenizer, prompt, reference_tokens) for prompt in prompts]
            text = _record_text(run, tokens, ctx, top)
        asked = _record_items(base, items, tokenizer) if items else []
        if run.bad:
            raise QtutorError("The base model's logits hold NaN or infinity: a gate needs a sound base.")
        return cls(name, text.pop("n_vocab"), ctx, recorded, text, asked, limits or Limits())

    def check(self, model, tokenizer=None, bytes: int | None = None, tokens_per_s: float | None = None,
              name: str = "model") -> Report:  # fmt: skip
        """Run all checks on a model and report; raises only for a model that does not fit the gate.

        Args:
            model: as ``base`` in :meth:`build`.
            tokenizer: only to print tokens as text in the notes.
            bytes: the model's size, for the limit on it; of a llamacpp.Model it is known.
            tokens_per_s: its measured speed, for the limit on that (:func:`qtutor.measure.generation_speed`).
            name: for the report.
        """
        rows = []
        with _Watched(model, self.n_vocab) as run:
            for entry in self.prompts:
                rows += self._check_prompt(run, entry, tokenizer)
            rows += self._check_text(run)
        if self.items and not run.bad:
            rows += self._check_items(model)
        bytes = bytes if bytes is not None else getattr(getattr(model, "gguf", None), "file_bytes", None)
        first = [Row("finite", "", run.bad, 0, 0, "positions", f"of {run.n:,} with NaN or infinity in their logits")]
        for check, value, low, high, unit in (
            ("size", bytes, -math.inf, self.limits.max_bytes, "bytes"),
            ("speed", tokens_per_s, self.limits.min_tokens_per_s, math.inf, "tokens/s"),
        ):
            if low is not None and high is not None:
                note = "" if value is not None else "there is a limit, but no measurement was given"
                first.append(Row(check, "", math.nan if value is None else float(value), low, high, unit, note))
        return Report(name, self.base, tuple(first + rows))

    def _check_prompt(self, run: _Watched, entry: dict, tokenizer) -> list[Row]:
        where, limits = _short(entry["prompt"]), self.limits
        value, first = _logprob(run, entry["ids"], entry["reference"])
        ratio = np.exp(np.array(entry["first_logp"]) - max(entry["first_logp"]))
        plausible = [t for t, r in zip(entry["first_ids"], ratio, strict=True) if r >= limits.plausible]
        top = int(first.argmax())
        text = repr(tokenizer.decode([top])) if tokenizer else f"token {top}"
        names = dict(zip(entry["first_ids"], entry["first_text"], strict=True))
        note = f"{names.get(top, text)}, the base finds plausible: {', '.join(names[t] for t in plausible)}"
        looped = repetition(_greedy(run, entry["ids"], entry["written"]))
        expected, most = entry["logprob"], min(1.0, entry["repetition"] + limits.repetition)
        return [
            Row("log-probability", where, value, expected - limits.logprob, expected + limits.logprob, "nats/token",
                f"of {_short(entry['reference_text'])!r}"),
            Row("first token", where, float(top in plausible), 1, 1, "(1: plausible)", note),
            Row("repetition", where, looped, -math.inf, most, "of 4-grams"),
        ]  # fmt: skip

    def _check_text(self, run: _Watched) -> list[Row]:
        ids, base_logp = np.array(self.text["top_ids"]), np.array(self.text["top_logp"])
        at, nll, kld, same = 0, [], [], []
        for logp, true in _text_windows(run, self.text["tokens"], self.ctx):
            rows = slice(at, at + len(true))
            nll.append(-logp[np.arange(len(true)), true])
            kld.append(_kld_of_top(base_logp[rows], np.take_along_axis(logp, ids[rows], 1)))
            same.append(logp.argmax(1) == ids[rows, 0])
            at += len(true)
        nll, kld, same = np.concatenate(nll), np.concatenate(kld), np.concatenate(same)
        base, limits, n = math.exp(self.text["nll"]), self.limits, f"{len(nll):,} tokens"
        mean = float(nll.mean())
        return [
            Row("perplexity", n, math.exp(mean) if mean < 700 else math.nan, -math.inf, base * (1 + limits.perplexity),
                "", f"the base's is {base:.4g}"),
            Row("KLD, mean", n, float(kld.mean()), -math.inf, limits.kld_mean, "nats"),
            Row("KLD, 99th percentile", n, float(np.percentile(kld, 99)), -math.inf, limits.kld_p99, "nats"),
            Row("same top token", n, float(same.mean()), limits.same_top, math.inf, "of tokens"),
        ]  # fmt: skip

    def _check_items(self, model) -> list[Row]:
        from scipy import stats

        hits = _hits(model, self.items)
        base = np.array([item["base_hit"] for item in self.items])
        lost, gained = int((base & ~hits).sum()), int((~base & hits).sum())
        p = stats.binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue if lost + gained else 1.0
        note = f"{100 * hits.mean():.1f} % right, the base {100 * base.mean():.1f} %; {lost} lost, {gained} gained"
        return [Row("accuracy", f"{len(hits)} items", float(p), self.limits.accuracy_alpha, math.inf,
                    "= p of no loss", note)]  # fmt: skip

    def save(self, path) -> Path:
        """Write the gate as JSON; appears under ``path`` only when complete.  Raises QtutorError where it cannot."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"gate": VERSION, **asdict(self)}, ensure_ascii=False), "utf-8")
            os.replace(partial, path)
        except OSError as error:
            try:
                partial.unlink(missing_ok=True)
            except OSError:
                pass
            raise QtutorError(f"The gate cannot be written to '{path}' ({error.strerror or error}): choose another "
                              "place.") from None  # fmt: skip
        return path

    @classmethod
    def load(cls, path) -> Gate:
        """Read a gate; raises QtutorError for a file that is missing, damaged or of another version."""
        path = Path(path)
        try:
            data = json.loads(path.read_text("utf-8"))
        except OSError:
            raise QtutorError(f"There is no gate '{path}': build one with Gate.build(...).save(path).") from None
        except ValueError:
            data = None
        if not isinstance(data, dict) or "gate" not in data:
            raise QtutorError(f"{path.name} is not a gate, or a damaged one: build and save it again.")
        if data.pop("gate") != VERSION:
            raise QtutorError(f"{path.name} was written by another version of qtutor: build and save it again.")
        try:
            gate = cls(**{**data, "limits": Limits(**data["limits"])})
            gate._validate()
        except (KeyError, TypeError, ValueError, AttributeError):
            raise QtutorError(f"{path.name} is a damaged gate: build and save it again.") from None
        return gate

    def _validate(self) -> None:
        ids, logp = np.array(self.text["top_ids"], dtype=np.int64), np.array(self.text["top_logp"], dtype=np.float64)
        scored = len(self.text["tokens"]) // self.ctx * (self.ctx - 1)
        if ids.ndim != 2 or ids.shape != logp.shape or len(ids) != scored or not math.isfinite(self.text["nll"]):
            raise ValueError
        used = [ids, self.text["tokens"], *(i["reference"] for i in self.prompts), *(i["ids"] for i in self.prompts)]
        if any(np.max(x) >= self.n_vocab or np.min(x) < 0 for x in used) or not self.prompts:
            raise ValueError
        for entry in self.prompts:
            if not (len(entry["first_ids"]) == len(entry["first_logp"]) == len(entry["first_text"]) > 0):
                raise ValueError
            if not math.isfinite(entry["logprob"] + entry["repetition"]) or entry["written"] < 1:
                raise ValueError
        for item in self.items:
            if not (len(item["requests"]) == len(item["lengths"]) > item["answer"] >= 0):
                raise ValueError


def _short(text: str, n: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n - 1] + "…"


def _record_prompt(run: _Watched, tokenizer, prompt, n: int, written: int = 32) -> dict:
    def encode(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else []
        if not ids:
            raise QtutorError(f"A prompt, and a reference continuation, is a text with at least one token: {text!r}.")
        return ids

    text, reference = prompt if isinstance(prompt, (tuple, list)) and len(prompt) == 2 else (prompt, None)
    ids = encode(text)
    greedy = _greedy(run, ids, max(n, written))
    continuation = encode(reference) if reference is not None else greedy[:n]
    value, first = _logprob(run, ids, continuation)
    if not math.isfinite(value):
        raise QtutorError("The base model's logits hold NaN or infinity: a gate needs a sound base.")
    likely = np.argsort(-first, kind="stable")[:16]
    return {
        "prompt": text, "ids": [int(i) for i in ids], "reference": [int(i) for i in continuation],
        "reference_text": tokenizer.decode(continuation), "logprob": value, "repetition": repetition(greedy[:written]),
        "written": written, "first_ids": likely.tolist(), "first_logp": [float(first[i]) for i in likely],
        "first_text": [repr(tokenizer.decode([int(i)])) for i in likely],
    }  # fmt: skip


def _record_text(run: _Watched, tokens: np.ndarray, ctx: int, top: int) -> dict:
    nll, ids, kept = [], [], []
    for logp, true in _text_windows(run, tokens, ctx):
        n_vocab = logp.shape[1]
        if true.max() >= n_vocab:
            raise QtutorError("The tokens lie outside the model's vocabulary: use the model's own tokenizer.")
        order = np.argsort(-logp, axis=1, kind="stable")[:, :top]
        nll.append(-logp[np.arange(len(true)), true])
        ids.append(order)
        kept.append(np.take_along_axis(logp, order, 1))
    logp = [[float(f"{x:.7g}") for x in row] for row in np.concatenate(kept)]
    return {"n_vocab": n_vocab, "tokens": [int(t) for t in tokens], "nll": float(np.concatenate(nll).mean()),
            "top_ids": np.concatenate(ids).tolist(), "top_logp": logp}  # fmt: skip


def _record_items(base, items, tokenizer) -> list:
    from . import accuracy

    found = []
    for item in items:
        requests = [accuracy.encode(tokenizer, item.context, choice) for choice in item.choices]
        found.append({"requests": [[list(ids), first] for ids, first in requests], "answer": item.answer,
                      "lengths": [len(choice) for choice in item.choices]})  # fmt: skip
    for entry, hit in zip(found, _hits(base, found), strict=True):
        entry["base_hit"] = bool(hit)
    return found


def _hits(source, items: list) -> np.ndarray:
    """Which items the model gets right, by log-likelihood per character: bool (n,)."""
    from . import accuracy

    requests = [tuple(request) for item in items for request in item["requests"]]
    loglik = accuracy.loglikelihoods(source, requests).reshape(len(items), -1)
    return (loglik / np.array([item["lengths"] for item in items])).argmax(1) == [item["answer"] for item in items]
