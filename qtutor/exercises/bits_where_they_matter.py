"""Checks of the exercises: bits where they matter."""

from itertools import product

import numpy as np

from ..lesson import exercise, expect
from .answers import function, number


def _best_solution(scores, sizes, budget, rank=min):
    rows = range(len(scores))
    fits = [c for c in product(range(scores.shape[1]), repeat=len(scores)) if sizes[rows, c].sum() <= budget]
    return rank(fits, key=lambda c: scores[rows, c].sum())


@exercise("bits_where_they_matter.best", solution=_best_solution, wrong=[
    lambda scores, sizes, budget: scores.argmin(1),                                    # whatever it takes
    lambda scores, sizes, budget: sizes.argmin(1),
    lambda scores, sizes, budget: _best_solution(scores, sizes, budget, max),
    lambda scores, sizes, budget: scores[0]])  # fmt: skip
def _best(answer):
    rng, answer = np.random.default_rng(14), function(answer, "best")
    sizes = np.sort(rng.integers(10, 100, (5, 4)), axis=1)
    scores = -np.sort(-rng.random((5, 4)), axis=1)
    budget, rows = int(sizes.mean(1).sum()), range(5)
    given = np.asarray(answer(scores.copy(), sizes.copy(), budget))
    expect(given.shape == (5,) and set(given.tolist()) <= {0, 1, 2, 3}, "Return one column for each tensor.")
    given, right = given.astype(int), _best_solution(scores, sizes, budget)
    taken, lost = sizes[rows, given].sum(), scores[rows, given].sum()
    expect(taken <= budget, f"Your choice takes {taken} bytes, and the budget is {budget}.")
    expect(np.isclose(lost, scores[rows, right].sum()), f"Yours sums to {lost:.3f}; a choice that fits has less.")
    return f"The best of {4**5:,} ways, within {budget} bytes."


@exercise("bits_where_they_matter.tokens_in_cache", solution=30_840,
          wrong=[16_384, 61_680, 32_768, 30_841, 30_840.5, 1_927, "30840"])  # fmt: skip
def _tokens_in_cache(answer):
    number(answer, 30_840, "A token: 2 x 32 layers x 8 heads x 128 values, each 34 / 32 bytes. Round down.", {
        16_384: "That is an F16 cache.", 61_680: "Keys and values are kept: twice as much.",
        32_768: "A block has a scale, too: 34 bytes for 32 values."})  # fmt: skip
    return "With an F16 cache it would be 16,384."
