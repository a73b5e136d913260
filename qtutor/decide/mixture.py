"""Which tensor gets how many bits: one type for each tensor, chosen by measured scores within a size."""

from __future__ import annotations

import numpy as np
from scipy import optimize, sparse

from .. import QtutorError


def choose(scores, sizes, budget: float) -> np.ndarray:
    """For each tensor the column of its type: the least sum of ``scores`` with a sum of ``sizes`` up to ``budget``.

    ``scores``, ``sizes``: (tensors, types), what a tensor costs in quality (KLD in nats a token, alone in its type) and
    in bytes.  Returns int (tensors,).  A knapsack with groups, solved exactly (scipy.optimize.milp, HiGHS).  That the
    scores of single tensors add up is an assumption: measure the mixture.

    Raises:
        QtutorError: shapes differ, or even the smallest types take more than ``budget``.
    """
    scores, sizes = np.asarray(scores, float), np.asarray(sizes, float)
    if scores.shape != sizes.shape or scores.ndim != 2:
        raise QtutorError(f"Scores {scores.shape} and sizes {sizes.shape} must be two tables, with one row a tensor.")
    if (least := sizes.min(1).sum()) > budget:
        raise QtutorError(f"The smallest types take {least:,.0f} bytes, the budget is {budget:,.0f}: allow more bytes.")
    n, kinds = scores.shape
    each = sparse.kron(sparse.eye(n), np.ones((1, kinds)))  # one type for each tensor
    found = optimize.milp(scores.ravel(), integrality=np.ones(n * kinds), bounds=optimize.Bounds(0, 1), constraints=[
        optimize.LinearConstraint(each, 1, 1), optimize.LinearConstraint(sizes.reshape(1, -1), 0, budget)])  # fmt: skip
    return found.x.reshape(n, kinds).argmax(1)
