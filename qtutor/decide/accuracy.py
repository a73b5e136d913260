"""Task accuracy: which continuation is the real one?  By hand, and through lm-evaluation-harness.

Perplexity says how surprised a model is; an accuracy says what the surprise costs.  The task here is built like
HellaSwag (https://arxiv.org/abs/1905.07830): a passage, and four ways to go on, of which the text itself contains one.
Nothing is generated.  The model scores each ending by its log-likelihood given the passage, and the likeliest one is
its answer:

- ``acc``: the largest sum of log-probabilities.  Long endings lose, since every token costs something.
- ``acc_norm``: the sum divided by the ending's length in characters, so that length does not decide.

The passages come from the evaluation text (:func:`qtutor.corpus.eval_text`), which the course model never saw.  The
wrong endings are real sentences too, from far away in the same text and of much the same length: grammar and style give
nothing away.  Guessing scores 25 %.

    items = build_items(200)
    result = score_items(model, items)
    print(result)                                   # acc 0.435 ± 0.035, acc_norm 0.450 ± 0.035 (n = 200, chance 0.25)

`lm-evaluation-harness <https://github.com/EleutherAI/lm-evaluation-harness>`_ has hundreds of published tasks;
:func:`run_harness` makes this one a task of it and runs it.  Both ways give the same answers, item by item.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import QtutorError, corpus, course_model, evaluate, files

CHOICES = 4
TASK = "pydoc_continuation"
CONTEXT_WORDS = 40  # the end of a longer passage is kept
ENDING_WORDS = range(12, 36)
FAR = 20  # paragraphs between an item and the place that a wrong ending comes from


@dataclass(frozen=True)
class Item:
    """A passage, the endings to choose from, and the index of the real one."""

    context: str
    choices: tuple[str, ...]
    answer: int


def _is_prose(paragraph: str) -> bool:
    """Sentences, not code, grammar, tables or headings."""
    if re.search(r"::=|>>>|===|---|\|", paragraph) or not re.match(r"\s*[A-Z]", paragraph):
        return False
    return paragraph.rstrip().endswith(".") and sum(c.isalpha() or c == " " for c in paragraph) > 0.8 * len(paragraph)


def _candidates(text: str) -> list[tuple[int, str, str]]:
    """(number of the paragraph, passage, real ending), in the order of the text; each ending once."""
    found, seen, before = [], set(), ""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
        if not _is_prose(paragraph):
            before = ""
            continue
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split()))
        for i, ending in enumerate(sentences):
            passage = " ".join([before, *sentences[:i]]).split()[-CONTEXT_WORDS:]
            fits = len(ending.split()) in ENDING_WORDS and len(passage) >= 6
            if fits and ending not in seen and ending not in " ".join(passage):
                seen.add(ending)
                found.append((number, " ".join(passage), ending))
        before = " ".join(sentences)
    return found


def _alike(a: str, b: str) -> bool:
    """Two sentences with more than half of their words in common: one would be nearly right in the other's place."""
    first, second = set(a.lower().split()), set(b.lower().split())
    return len(first & second) > 0.5 * min(len(first), len(second))


def build_items(n: int = 200, seed: int = 0, text: str | None = None) -> list[Item]:
    """Multiple choice from a text, by default the evaluation text: the same ``n`` items on every machine.

    The real ending is the sentence that follows the passage.  The others are drawn from the sentences nearest to it in
    length among those far away; none repeats half of the words of another choice, and none occurs in the passage.
    """
    found = _candidates(corpus.eval_text() if text is None else text)
    lengths = np.array([len(ending) for *_, ending in found])
    places = np.array([number for number, *_ in found])
    rng, items = np.random.default_rng(seed), []
    for index in rng.permutation(len(found)):
        if len(items) == n:
            break
        number, passage, ending = found[index]
        order = np.argsort(np.abs(lengths - len(ending)), kind="stable")
        order = order[np.abs(places[order] - number) >= FAR][:40]
        options = [ending]
        for other in rng.permutation(order):
            wrong = found[other][2]
            if len(options) < CHOICES and wrong not in passage and not any(_alike(wrong, o) for o in options):
                options.append(wrong)
        if len(options) < CHOICES:
            continue
        answer = len(items) % CHOICES  # each place as often as any other: "always the first" scores what chance does
        items.append(Item(passage, (*options[1 : answer + 1], ending, *options[answer + 1 :]), answer))
    if len(items) < n:
        raise QtutorError(f"This text yields {len(items)} items, not {n}: ask for fewer, or use more text.")
    return items


@dataclass(frozen=True)
class Accuracy:
    """``acc`` and ``acc_norm`` with their binomial standard errors, and what they are made of."""

    acc: float
    acc_se: float
    acc_norm: float
    acc_norm_se: float
    n: int
    chance: float
    hits: np.ndarray = field(repr=False, compare=False)  # (n,): was the answer right?
    hits_norm: np.ndarray = field(repr=False, compare=False)
    loglik: np.ndarray = field(repr=False, compare=False)  # (n, choices): of the endings, in nats

    def row(self) -> dict:
        """The columns of results.VOCABULARY; the accuracy is ``acc_norm``."""
        return {"accuracy": self.acc_norm, "accuracy_se": self.acc_norm_se, "accuracy_n": self.n}

    def __str__(self) -> str:
        return (f"acc {self.acc:.3f} ± {self.acc_se:.3f}, acc_norm {self.acc_norm:.3f} ± {self.acc_norm_se:.3f} "
                f"(n = {self.n}, chance {self.chance:.2f})")  # fmt: skip


def summarize(items: Sequence[Item], loglik) -> Accuracy:
    """Accuracy of log-likelihoods (n, choices), nats."""
    loglik = np.asarray(loglik, dtype=np.float64)
    if not np.isfinite(loglik).all():
        raise QtutorError("The log-likelihoods hold NaN or infinity: load a model that is not damaged.")
    answers = np.array([item.answer for item in items])
    lengths = np.array([[len(choice) for choice in item.choices] for item in items])
    hits, hits_norm = loglik.argmax(1) == answers, (loglik / lengths).argmax(1) == answers
    return Accuracy(*evaluate.share(hits), *evaluate.share(hits_norm), len(items), 1 / loglik.shape[1],
                    hits, hits_norm, loglik)  # fmt: skip


def encode(tokenizer, context: str, ending: str) -> tuple[list[int], int]:
    """Token ids of passage and ending together, and how many of them are the passage's.  As the harness does it: the
    two are tokenized as one text, for the ending's first token includes the space."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole, first = ids(f"{context} {ending}"), len(ids(context))
    if not 0 < first < len(whole):
        raise QtutorError("A passage and its ending must have at least one token each: check the items.")
    return whole, first


def check_items(items) -> None:
    """Raise QtutorError unless these are items that make one test: at least two, with equally many choices."""
    whole = all(isinstance(item, Item) for item in items)
    if not whole or len(items) < 2 or len({len(item.choices) for item in items}) != 1:
        raise QtutorError("Give at least two items, all with the same number of choices.")


def loglikelihoods(source, requests, batch_size: int = 32) -> np.ndarray:
    """Log-likelihoods (n,), nats, of ``requests``: pairs (token ids, how many of them are context).

    A Hugging Face model reads ``batch_size`` sequences of similar length at a time, filled up on the right, where a
    causal model does not see the filling.  Other sources read one by one.
    """
    import torch

    def read(rows):  # -> for each row the logits that predict its ending
        if not isinstance(source, torch.nn.Module):
            for ids, first in rows:
                yield evaluate.logits_function(source, first - 1)(np.asarray(ids[:-1], dtype=np.int64))
            return
        batch = torch.zeros(len(rows), max(len(ids) for ids, _ in rows) - 1, dtype=torch.long)
        for filled, (ids, _) in zip(batch, rows, strict=True):
            filled[: len(ids) - 1] = torch.as_tensor(ids[:-1])
        evaluate.check_ids(source, batch)
        with torch.inference_mode():
            logits = source(input_ids=batch.to(next(source.parameters()).device), use_cache=False).logits
        yield from (part[first - 1 : len(ids) - 1] for part, (ids, first) in zip(logits, rows, strict=True))

    found = np.empty(len(requests))
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    with evaluate.eval_mode(source):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [requests[i] for i in chosen]
            for i, (ids, first), logits in zip(chosen, rows, read(rows), strict=True):
                found[i] = -evaluate.token_nll(logits, torch.as_tensor(ids[first:])).sum().item()
    return found


def score_items(source, items: Sequence[Item], tokenizer=None, batch_size: int = 32) -> Accuracy:
    """Let a model answer: any source of :mod:`qtutor.evaluate`, with its tokenizer (by default the course model's)."""
    check_items(items)
    tokenizer = tokenizer or course_model.load_tokenizer()
    requests = [encode(tokenizer, item.context, choice) for item in items for choice in item.choices]
    return summarize(items, loglikelihoods(source, requests, batch_size).reshape(len(items), -1))


def run_harness(model, items: Sequence[Item], tokenizer=None, batch_size: int = 32) -> Accuracy:
    """Ask a Hugging Face model the same through lm-evaluation-harness; accuracies and errors are the harness's own."""
    try:
        import datasets
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except Exception as error:  # not installed, or a package of it does not load
        raise QtutorError(f"lm-evaluation-harness is not usable here ({type(error).__name__}): install it with "
                          "pip install lm_eval.") from None  # fmt: skip
    datasets.disable_progress_bars()
    with (tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"),
          contextlib.redirect_stderr(io.StringIO()), contextlib.ExitStack() as after):  # fmt: skip
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        lines = "\n".join(json.dumps(dataclasses.asdict(item)) for item in items)
        data = files.write_text(Path(folder, "items.jsonl"), lines)
        task = {"task": TASK, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
                "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": folder},
                "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
        tokenizer = tokenizer or course_model.load_tokenizer()
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)
        # the errors of means have a formula: the one bootstrap iteration only says that errors are wanted
        found = lm_eval.simple_evaluate(wrapped, tasks=[task], batch_size=batch_size, bootstrap_iters=1,
                                        task_manager=TaskManager(include_defaults=False))  # fmt: skip
    samples, scores = sorted(found["samples"][TASK], key=lambda one: one["doc_id"]), found["results"][TASK]
    ours = summarize(items, [[response[0] for response in sample["filtered_resps"]] for sample in samples])
    hits, norm = (np.array([sample[key] for sample in samples], dtype=bool) for key in ("acc", "acc_norm"))
    return dataclasses.replace(
        ours, hits=hits, hits_norm=norm, acc=scores["acc,none"], acc_norm=scores["acc_norm,none"],
        acc_se=scores["acc_stderr,none"], acc_norm_se=scores["acc_norm_stderr,none"])  # fmt: skip
