"""Published losses: a loss that its model's own rows contradict, or that has no source, is a typing error."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest

from qtutor import llamacpp
from qtutor.decide import published
from qtutor.decide.published import PUBLISHED


def test_every_row_has_a_source_and_appears_once():
    assert len({(row.model, row.type) for row in PUBLISHED}) == len(PUBLISHED)
    for row in PUBLISHED:
        assert row.source.startswith("https://github.com/") and row.base > 1 and 1 < row.billions < 100, row


def test_fewer_bits_cost_more_within_a_model():
    """An odd digit would break the order of the K-quants, which all these models keep."""
    models = defaultdict(list)
    for row in PUBLISHED:
        if row.type in llamacpp.TYPES and row.type.endswith(("_K", "_K_M")):
            models[row.model].append((llamacpp.TYPES[row.type].bpw, row.loss, row.kld))
    assert len(models) == 5
    for rows in models.values():
        losses = [loss for _, loss, _ in sorted(rows, key=lambda one: one[0], reverse=True)]
        assert losses == sorted(losses) and losses[0] > 0
        klds = [kld for *_, kld in sorted(rows, key=lambda one: one[0], reverse=True) if kld]
        assert klds == sorted(klds)


def test_the_base_is_what_the_source_subtracts():
    """llama.cpp's README prints perplexity, difference and ratio: three ways to the same base."""
    for kind, difference, ratio in (("Q2_K", 3.519934, 1.564849), ("Q4_K_M", 0.175482, 1.028160),
                                    ("Q6_K", 0.021748, 1.003490), ("Q8_0", 0.002650, 1.000425)):  # fmt: skip
        row = published.loss("Llama-3-8B", kind)
        assert row.perplexity - row.base == pytest.approx(difference, abs=2e-6)
        assert 1 + row.loss == pytest.approx(ratio, abs=2e-6)
    for kind, difference in (("Q2_K", 0.625552), ("Q4_K_M", 0.082526), ("Q6_K", 0.013941), ("Q8_0", 0.003990)):
        row = published.loss("Llama-2-7B", kind)
        assert row.perplexity - row.base == pytest.approx(difference, abs=2e-6)
    for kind, percent in (("Q6_K", 0.16), ("Q4_K_M", 1.20), ("Q4_0", 3.61), ("Q3_K_M", 4.72), ("Q2_K", 8.82)):
        assert 100 * published.loss("Llama-2-70B", kind).loss == pytest.approx(percent, abs=0.006)


def test_what_nobody_published_is_none():
    assert published.loss("Llama-2-70B", "Q8_0") is None
    assert math.isclose(published.loss("Llama-3.1-8B", "FP8 dynamic").hellaswag, 0.7857)
