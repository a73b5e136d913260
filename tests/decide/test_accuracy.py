"""accuracy: items without leaks, scores by hand, and lm-evaluation-harness as the oracle, item by item."""

from __future__ import annotations

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from qtutor import QtutorError, corpus, course_model
from qtutor.decide import accuracy


@pytest.fixture(scope="module")
def model():
    return course_model.load()


@pytest.fixture(scope="module")
def tokenizer():
    return course_model.load_tokenizer()


@pytest.fixture(scope="module")
def items():
    return accuracy.build_items(80)


@pytest.fixture(scope="module")
def scored(model, items):
    return accuracy.score_items(model, items)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    from qtutor import gguf_export

    return gguf_export.export(course_model.model_dir(), tmp_path_factory.mktemp("accuracy") / "model.gguf")


# ----------------------------------------------------------------------------------------------------------- items


def test_the_real_ending_follows_and_the_others_come_from_elsewhere(items):
    text = " ".join(corpus.eval_text().split())
    for item in items:
        real = item.choices[item.answer]
        assert f"{item.context} {real}" in text  # word for word
        for i, choice in enumerate(item.choices):
            assert choice not in item.context and choice in text
            assert i == item.answer or f"{item.context} {choice}" not in text


def test_nothing_but_the_content_tells_the_real_ending(items):
    for item in items:
        assert len(item.choices) == 4 == len(set(item.choices))
        # matched length: no longer or shorter than a few words
        lengths = [len(choice) for choice in item.choices]
        assert max(lengths) - min(lengths) < 0.5 * max(lengths)
        assert all(c[0].isupper() and c[-1] in ".!?" for c in item.choices if c[0].isalpha())
    assert set(Counter(item.answer for item in items).values()) == {20}  # each place as often
    longest = np.mean([np.argmax([len(c) for c in item.choices]) == item.answer for item in items])
    assert 0.1 < longest < 0.4


def test_the_same_seed_gives_the_same_items():
    first, again, other = (accuracy.build_items(20, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert len({item.choices[item.answer] for item in first}) == 20  # no question twice


def test_build_items_bad_input():
    for bad in (dict(n=10**6), dict(text="Too short."), dict(n=5, text="A b.\n\n" * 50)):
        with pytest.raises(QtutorError):
            accuracy.build_items(**bad)


# --------------------------------------------------------------------------------------------------------- by hand


def test_scores_of_a_unigram_by_hand(items, tokenizer):
    """A source that ignores the context: the log-likelihood is the sum over the ending's tokens."""
    logits = torch.linspace(0, 5, len(tokenizer))
    logp = logits.double().log_softmax(0)
    found = accuracy.score_items(lambda ids: logits.expand(len(ids), -1), items[:6], tokenizer)
    for row, item in zip(found.loglik, items, strict=False):
        for value, choice in zip(row, item.choices, strict=True):
            whole = tokenizer(f"{item.context} {choice}")["input_ids"]
            ending = whole[len(tokenizer(item.context)["input_ids"]) :]
            assert tokenizer.decode(ending) == f" {choice}"
            assert value == pytest.approx(logp[ending].sum().item())


def test_summary_by_hand():
    items = [accuracy.Item("x", ("a" * 10, "b" * 30), 1), accuracy.Item("y", ("c" * 10, "d" * 10), 0),
             accuracy.Item("z", ("e" * 10, "f" * 10), 0)]  # fmt: skip
    found = accuracy.summarize(items, [[-5.0, -9.0], [-1.0, -2.0], [-3.0, -2.0]])
    # by sum: 0, 0, 1; by character: 1 (-0.3 against -0.5), 0, 1
    assert list(found.hits) == [False, True, False]
    assert found.acc == pytest.approx(1 / 3) and found.acc_norm == pytest.approx(2 / 3)
    assert found.acc_se == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2)) == pytest.approx(stats.sem(found.hits))
    assert found.chance == 0.5 and list(found.hits_norm) == [True, True, False]


# -------------------------------------------------------------------------------------------------- sources, oracle


@pytest.mark.slow
def test_batches_single_windows_and_llama_cpp_agree(model, items, scored, gguf):
    from qtutor import llamacpp

    def one(ids):
        with torch.no_grad():
            return model(input_ids=torch.as_tensor(ids)[None]).logits[0]

    few = items[:8]
    assert np.allclose(accuracy.score_items(one, few).loglik, scored.loglik[:8], atol=1e-3)
    assert np.allclose(accuracy.score_items(model, few, batch_size=3).loglik, scored.loglik[:8], atol=1e-3)
    with llamacpp.Model(gguf, ctx=256) as native:
        found = accuracy.score_items(native, few)
    assert np.allclose(found.loglik, scored.loglik[:8], atol=1e-2)
    assert np.array_equal(found.hits, scored.hits[:8])


def test_the_course_model_is_above_chance(scored):
    right = int(scored.hits_norm.sum())
    assert stats.binomtest(right, scored.n, 0.25, alternative="greater").pvalue < 0.01
    assert "chance 0.25" in str(scored) and scored.row()["accuracy_n"] == 80


@pytest.mark.slow
def test_harness_gives_the_same_answers(model, items, scored):
    """lm-evaluation-harness with its own model class around the course model: equal item by item."""
    pytest.importorskip("lm_eval")
    found = accuracy.run_harness(model, items)
    assert np.allclose(found.loglik, scored.loglik, atol=1e-3)
    assert np.array_equal(found.hits, scored.hits) and np.array_equal(found.hits_norm, scored.hits_norm)
    assert (found.acc, found.acc_norm) == pytest.approx((scored.acc, scored.acc_norm))
    assert (found.acc_se, found.acc_norm_se) == pytest.approx((scored.acc_se, scored.acc_norm_se))


def test_without_the_harness_one_sentence(monkeypatch, items, model):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(QtutorError, match="pip install lm_eval"):
        accuracy.run_harness(model, items)


# -------------------------------------------------------------------------------------------------------- bad input


def test_scoring_bad_input(items, tokenizer):
    ragged = [items[0], accuracy.Item("a b", ("c", "d"), 0)]
    small = lambda ids: torch.zeros(len(ids), 7)  # noqa: E731 - a vocabulary of seven
    broken = lambda ids: torch.full((len(ids), len(tokenizer)), math.nan)  # noqa: E731
    for source, given in ((small, items[:2]), (broken, items[:2]), (small, items[:1]), (small, ragged), (7, items[:2]),
                          (small, [1, 2])):  # fmt: skip
        with pytest.raises(QtutorError) as error:
            accuracy.score_items(source, given, tokenizer)
        assert str(error.value).endswith(".")
    with pytest.raises(QtutorError):
        accuracy.encode(tokenizer, "", "x")
