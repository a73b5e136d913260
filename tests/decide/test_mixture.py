"""A type for each tensor: the best of all choices within the budget."""

from itertools import product

import numpy as np
import pytest

from qtutor import QtutorError
from qtutor.decide import mixture


def test_no_other_choice_within_the_budget_is_better():
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores, sizes = rng.exponential(size=(5, 3)), rng.integers(1, 20, (5, 3))
        budget = sizes.min(1).sum() + rng.integers(0, 30)
        rows = np.arange(5)
        best = min(scores[rows, types].sum() for types in product(range(3), repeat=5)
                   if sizes[rows, types].sum() <= budget)  # fmt: skip
        found = mixture.choose(scores, sizes, budget)
        assert sizes[rows, found].sum() <= budget
        assert scores[rows, found].sum() == pytest.approx(best, rel=1e-4)


def test_impossible_budgets_and_unlike_tables_are_refused():
    with pytest.raises(QtutorError, match="allow more bytes"):
        mixture.choose([[1, 2]], [[5, 9]], 4)
    with pytest.raises(QtutorError, match="one row a tensor"):
        mixture.choose([[1, 2]], [[5]], 9)
