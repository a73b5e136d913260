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

For work in earnest there is `lm-evaluation-harness <https://github.com/EleutherAI/lm-evaluation-harness>`_, with
hundreds of published tasks; :func:`write_task` makes this one a task of it and :func:`run_harness` runs it, offline.
Both ways give the same answers, item by item.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import QtutorError

TASK = "pydoc_continuation"
CONTEXT_WORDS = 40  # the end of a longer passage is kept
ENDING_WORDS = range(12, 36)
FAR = 20  # paragraphs between an item and the place that a wrong ending comes from


# --------------------------------------------------------------------------------------------------------- items


@dataclass(frozen=True)
class Item:
    """A passage, the endings to choose from, and the index of the real one."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def __str__(self) -> str:
        marks = ("*" if i == self.answer else " " for i in range(len(self.choices)))
        return "\n".join([f"... {self.context}", *(f" {m} {c}" for m, c in zip(marks, self.choices, strict=True))])


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


def build_items(n: int = 200, seed: int = 0, text: str | None = None, choices: int = 4) -> list[Item]:
    """Multiple choice from a text: ``n`` items, the same for the same text and ``seed`` on every machine.

    The real ending is the sentence that follows the passage.  The others are drawn from the sentences nearest to it in
    length among those at least ``FAR`` paragraphs away; none repeats half of the words of another choice, and none
    occurs in the passage.  ``text`` defaults to the evaluation text, which yields more than 700 items (it
    differs a little between Python versions).

    Raises QtutorError for fewer than two items or choices, and for a text that does not yield ``n``.
    """
    from .. import corpus

    if not all(isinstance(x, (int, np.integer)) and x > 1 for x in (n, choices)):
        raise QtutorError(f"Multiple choice needs at least two items and two choices, not {n!r} and {choices!r}.")
    if not isinstance(text, (str, type(None))) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise QtutorError("build_items() takes a text, and a seed that is a whole number from 0 on.")
    found = _candidates(corpus.eval_text() if text is None else text)
    if len(found) < n:
        raise QtutorError(f"This text yields {len(found)} items, not {n}: ask for fewer, or use more text.")
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
            if len(options) < choices and wrong not in passage and not any(_alike(wrong, o) for o in options):
                options.append(wrong)
        if len(options) < choices:
            continue
        answer = len(items) % choices  # each place as often as any other: "always the first" scores what chance does
        items.append(Item(passage, (*options[1 : answer + 1], ending, *options[answer + 1 :]), answer))
    if len(items) < n:
        raise QtutorError(f"This text yields {len(items)} items, not {n}: ask for fewer, or use more text.")
    return items


# ------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Accuracy:
    """``acc`` and ``acc_norm`` with their binomial standard errors; per item (n,) whether the answer was right.

    ``loglik`` (n, choices): sums of the endings' log-probabilities, in nats.
    """

    acc: float
    acc_se: float
    acc_norm: float
    acc_norm_se: float
    n: int
    chance: float
    hits: np.ndarray = field(repr=False, compare=False)
    hits_norm: np.ndarray = field(repr=False, compare=False)
    loglik: np.ndarray = field(repr=False, compare=False)
    picks: np.ndarray = field(repr=False, compare=False)
    picks_norm: np.ndarray = field(repr=False, compare=False)

    def row(self) -> dict:
        """Flat dict for a table or a results file."""
        return {"acc": self.acc, "acc_se": self.acc_se, "acc_norm": self.acc_norm, "acc_norm_se": self.acc_norm_se,
                "items": self.n}  # fmt: skip

    def __str__(self) -> str:
        return (f"acc {self.acc:.3f} ± {self.acc_se:.3f}, acc_norm {self.acc_norm:.3f} ± {self.acc_norm_se:.3f} "
                f"(n = {self.n}, chance {self.chance:.2f})")  # fmt: skip


def summarize(items: Sequence[Item], loglik) -> Accuracy:
    """Accuracy of log-likelihoods (n, choices), nats."""
    from ..evaluate import _share

    _check_items(items)
    loglik = np.asarray(loglik, dtype=np.float64)
    if loglik.shape != (len(items), len(items[0].choices)):
        raise QtutorError(f"Log-likelihoods of shape {loglik.shape} do not fit {len(items)} items.")
    if not np.isfinite(loglik).all():
        raise QtutorError("The log-likelihoods hold NaN or infinity: load a model that is not damaged.")
    answers = np.array([item.answer for item in items])
    lengths = np.array([[len(choice) for choice in item.choices] for item in items])
    picks, picks_norm = loglik.argmax(1), (loglik / lengths).argmax(1)
    hits, hits_norm = picks == answers, picks_norm == answers
    (acc, acc_se), (norm, norm_se) = _share(hits), _share(hits_norm)
    return Accuracy(acc, acc_se, norm, norm_se, len(items), 1 / loglik.shape[1], hits, hits_norm, loglik, picks,
                    picks_norm)  # fmt: skip


def encode(tokenizer, context: str, ending: str) -> tuple[list[int], int]:
    """Token ids of passage and ending together, and how many of them are the passage's.

    As the harness does it: the two are tokenized as one text, for the ending's first token includes the space.
    """
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole, first = ids(f"{context} {ending}"), len(ids(context))
    if not 0 < first < len(whole):
        raise QtutorError("A passage and its ending must have at least one token each: check the items.")
    return whole, first


def _check_items(items) -> None:
    whole = isinstance(items, (list, tuple)) and all(isinstance(item, Item) for item in items)
    if not whole or len(items) < 2 or len({len(item.choices) for item in items}) != 1:
        raise QtutorError("Give at least two items, all with the same number of choices.")


def loglikelihoods(source, requests, batch_size: int = 32, progress: bool = False) -> np.ndarray:
    """Log-likelihoods (n,), nats, of ``requests``: pairs (token ids, how many of them are context).

    A Hugging Face model reads ``batch_size`` sequences of similar length at a time, filled up on the right, where a
    causal model does not see the filling.  Other sources read one by one.
    """
    import torch
    from tqdm.auto import tqdm

    from ..evaluate import _logits_function

    def total(logits, ids, first):  # logits that predict the ending
        logp = logits.double().log_softmax(-1)
        true = torch.as_tensor(ids[first:], device=logp.device)
        if true.max() >= logp.shape[1]:
            raise QtutorError("The tokens lie outside the model's vocabulary: use the model's own tokenizer.")
        return logp.gather(1, true[:, None]).sum().item()

    found = np.empty(len(requests))
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    bar = tqdm(total=len(requests), desc="endings", leave=False, disable=not progress)
    if not isinstance(source, torch.nn.Module):
        for i in order:
            ids, first = requests[i]
            found[i] = total(_logits_function(source, first - 1)(np.asarray(ids[:-1], dtype=np.int64)), ids, first)
            bar.update()
        return found
    device, training = next(source.parameters()).device, source.training
    source.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = torch.zeros(len(rows), len(requests[rows[0]][0]) - 1, dtype=torch.long)
            for row, i in zip(batch, rows, strict=True):
                row[: len(requests[i][0]) - 1] = torch.as_tensor(requests[i][0][:-1])
            with torch.inference_mode():
                logits = source(input_ids=batch.to(device), use_cache=False).logits
            for row, i in zip(logits, rows, strict=True):
                ids, first = requests[i]
                found[i] = total(row[first - 1 : len(ids) - 1], ids, first)
            bar.update(len(rows))
    finally:
        source.train(training)
        bar.close()
    return found


def _tokenizer(tokenizer):
    from .. import course_model

    return course_model.load_tokenizer() if tokenizer is None else tokenizer


def score_items(source, items: Sequence[Item], tokenizer=None, batch_size: int = 32,
                progress: bool = False) -> Accuracy:
    """Let a model answer.

    Args:
        source: a Hugging Face model, a llamacpp.Model or a function from token ids to logits, as everywhere in
            :mod:`qtutor.evaluate`.
        items: of :func:`build_items`.
        tokenizer: the model's, a Hugging Face tokenizer; the course model's by default.
        batch_size: sequences a Hugging Face model reads at once.

    Raises QtutorError for items that do not fit together, tokens outside the vocabulary and logits that are not finite.
    """
    _check_items(items)
    tokenizer = _tokenizer(tokenizer)
    requests = [encode(tokenizer, item.context, choice) for item in items for choice in item.choices]
    return summarize(items, loglikelihoods(source, requests, batch_size, progress).reshape(len(items), -1))


# ----------------------------------------------------------------------------------------- lm-evaluation-harness

_YAML = """\
# A task of lm-evaluation-harness: which continuation of a passage of the Python language reference is the real one?
# lm_eval --model hf --model_args pretrained=MODEL --include_path FOLDER --tasks {name}
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def harness_available() -> tuple[bool, str]:
    """``(True, version)`` where lm-evaluation-harness can be imported, else ``(False, what to do in one sentence)``."""
    try:
        import lm_eval.tasks  # noqa: F401
        from lm_eval import __version__
    except Exception as error:  # not installed, or a package of it does not load
        return False, (f"lm-evaluation-harness is not usable here ({type(error).__name__}): "
                       "install it with pip install lm_eval.")  # fmt: skip
    return True, f"lm_eval {__version__}"


def write_task(folder, items: Sequence[Item], name: str = TASK) -> Path:
    """Write the items as a task of lm-evaluation-harness, ``<name>.yaml`` and ``<name>.jsonl``; return the yaml's path.

    The command line finds it with ``--include_path folder --tasks name``.  Raises QtutorError for a name that is not
    letters, digits and underscores, and where the folder cannot be written.
    """
    _check_items(items)
    if not re.fullmatch(r"\w+", name):
        raise QtutorError(f"{name!r} cannot name a task: use letters, digits and underscores.")
    folder = Path(folder).resolve()
    lines = [json.dumps({"context": i.context, "choices": list(i.choices), "answer": i.answer}) for i in items]
    # json.dumps: a quoted string of YAML, whatever is in the path
    data = json.dumps(str(folder / f"{name}.jsonl"))
    files = {f"{name}.jsonl": "\n".join(lines) + "\n", f"{name}.yaml": _YAML.format(name=name, data=data)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            partial = folder / f"{file}.partial"
            partial.write_text(content, "utf-8")
            os.replace(partial, folder / file)
    except OSError as error:
        raise QtutorError(f"The task cannot be written to '{folder}' ({error.strerror or error}): choose another "
                          "folder.") from None  # fmt: skip
    return folder / f"{name}.yaml"


def harness_model(source, tokenizer=None, batch_size: int = 32):
    """The model as lm-evaluation-harness wants it: its own HFLM around a Hugging Face model, else a small adapter."""
    import torch
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM

    tokenizer = _tokenizer(tokenizer)
    if isinstance(source, torch.nn.Module):
        return HFLM(pretrained=source, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)

    class SourceLM(TemplateLM):
        """Log-likelihoods of anything that gives logits; it does not generate."""

        backend = "causal"
        eot_token_id = tokenizer.eos_token_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            return tokenizer(string, add_special_tokens=False)["input_ids"]

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(list(context) + list(ending), len(context)) for _, context, ending in requests]
            return [(value, False) for value in loglikelihoods(source, pairs)]

        def loglikelihood_rolling(self, requests, **_):
            raise NotImplementedError("this adapter scores endings only")

        def generate_until(self, requests, **_):
            raise NotImplementedError("this adapter scores endings only")

    return SourceLM()


@contextlib.contextmanager
def _quietly_offline():
    """No network, no log lines and no bars from the harness and the libraries beneath it."""
    switches = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before = {key: os.environ.get(key) for key in switches}
    os.environ.update(switches)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "evaluate", "fsspec")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        import datasets

        shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            if shown:
                datasets.enable_progress_bars()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def run_harness(source, items: Sequence[Item], tokenizer=None, batch_size: int = 32) -> Accuracy:
    """The same questions through lm-evaluation-harness, offline, from a task file in a temporary folder.

    ``acc`` and ``acc_norm``, their errors, and which items were right, are the harness's own.  Raises QtutorError
    where it is not installed.
    """
    usable, why = harness_available()
    if not usable:
        raise QtutorError(why)
    import dataclasses

    with tempfile.TemporaryDirectory() as folder, _quietly_offline():
        import lm_eval
        from lm_eval.tasks import TaskManager

        write_task(folder, items)
        text = Path(folder, f"{TASK}.yaml").read_text("utf-8")
        cache = f"dataset_kwargs:\n  cache_dir: {json.dumps(folder)}"  # leave nothing behind
        Path(folder, f"{TASK}.yaml").write_text(text.replace("dataset_kwargs:", cache), "utf-8")
        manager = TaskManager(include_path=folder, include_defaults=False)  # reading all tasks takes seconds
        # the errors of means have a formula: the one bootstrap iteration only says that errors are wanted
        found = lm_eval.simple_evaluate(harness_model(source, tokenizer, batch_size), tasks=[TASK],
                                        task_manager=manager, bootstrap_iters=1, batch_size=batch_size)  # fmt: skip
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    scores = found["results"][TASK]
    loglik = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
    hits, norm = (np.array([sample[key] for sample in samples], dtype=bool) for key in ("acc", "acc_norm"))
    return dataclasses.replace(
        summarize(items, loglik), hits=hits, hits_norm=norm, acc=scores["acc,none"], acc_norm=scores["acc_norm,none"],
        acc_se=scores["acc_stderr,none"], acc_norm_se=scores["acc_norm_stderr,none"])  # fmt: skip
