"""Is the difference real, and is it small enough?  Tests of a model against the model that it came from.

Both models read the same tokens and answer the same questions, so each token is its own control: what makes a text easy
or hard is common to both and drops out of the difference.  That is what *paired* means, and it is worth a factor of ten
and more in tokens (:func:`sample_needed` says how many).

Two questions that sound alike are not.  "The difference is not significant" may only mean that too little was
measured: with five tokens nothing is ever significant.  What somebody who ships a model wants to say is "the loss is
smaller than what I am prepared to lose", and that takes a *margin*, chosen before looking, and a test that can fail
for want of data: :func:`non_inferior`, or :func:`equivalent` for both directions.

    lost = paired_nll(evaluate.compare_models(base, model, tokens, ctx=256), block=255)
    print(lost)                                          # the interval
    print(non_inferior(lost, margin=math.log(1.01)))     # perplexity grows by less than 1 %?

Neighbouring tokens are not independent draws.  ``block`` averages a window's worth first (batch means), after which
they nearly are; without it the intervals come out somewhat too narrow.

References: McNemar 1947 with exact binomial probabilities; Agresti and Min 2005, Statistics in Medicine 24:729 (the
interval of a difference of paired proportions); Tango 1998, Statistics in Medicine 17:891 (the score test of a margin);
Schuirmann 1987 (two one-sided tests); scipy.stats does the arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import QtutorError


@dataclass(frozen=True)
class Paired:
    """Model minus base: ``difference`` with its standard error, and the interval from ``low`` to ``high``.

    - ``p``: two-sided, of the hypothesis that there is no difference
    - ``n``: how many tokens or items were compared
    - ``worse``: +1 where a larger value is worse (negative log-likelihood), -1 where a smaller one is (accuracy)
    - ``lost``, ``gained``: items that only the base, or only the model, got right (None for tokens)
    - ``sd``: standard deviation of a single token's or item's difference (with blocks: one that includes what
      neighbours share)
    """

    difference: float
    se: float
    low: float
    high: float
    p: float
    n: int
    unit: str
    worse: int
    confidence: float
    sd: float
    df: float = math.inf
    lost: int | None = None
    gained: int | None = None

    def row(self) -> dict:
        """Flat dict for a table or a results file."""
        found = {"difference": self.difference, "difference_se": self.se, "low": self.low, "high": self.high,
                 "p_value": self.p, "n": self.n, "unit": self.unit}  # fmt: skip
        return found if self.lost is None else found | {"lost": self.lost, "gained": self.gained}

    def __str__(self) -> str:
        share = f"{100 * self.confidence:.3g} %"
        return (f"{self.difference:+.3g} {self.unit} ({share} interval {self.low:+.3g} to {self.high:+.3g}, "
                f"p = {self.p:.2g}, n = {self.n:,})")  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """``passed``: the loss is smaller than ``margin``, at the level ``alpha``.

    ``bound`` is the largest loss that the data leave possible (a one-sided bound at ``1 - alpha``; for an equivalence
    test the largest change in either direction); ``p`` is that of the hypothesis that the margin is reached.
    """

    passed: bool
    p: float
    bound: float
    margin: float
    alpha: float
    unit: str
    what: str

    def __str__(self) -> str:
        verdict = "shown" if self.passed else "NOT shown"
        return (f"{self.what} is {verdict} to be below the margin: at most {self.bound:.3g} against {self.margin:.3g} "
                f"{self.unit} (with {100 * (1 - self.alpha):.3g} % confidence, p = {self.p:.2g})")  # fmt: skip


def _level(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise QtutorError(f"{name} lies between 0 and 1, and is {value!r}.")


def _differences(base, model) -> np.ndarray:
    """Per-token nll of the model minus that of its base, float64 (n,)."""
    if model is None:
        found = getattr(base, "token_dnll", None)
        if found is None:
            raise QtutorError("Give the base's and the model's Perplexity, or one Comparison of the two.")
        return np.asarray(found, dtype=np.float64)
    first, second = (np.asarray(getattr(x, "token_nll", x), dtype=np.float64).ravel() for x in (base, model))
    if len(first) != len(second):
        raise QtutorError(f"{len(first)} tokens of the base and {len(second)} of the model do not pair up: use the "
                          "same text and windows.")  # fmt: skip
    return second - first


def paired_nll(base, model=None, block: int | None = None, confidence: float = 0.95, method: str = "t",
               seed: int = 0) -> Paired:  # fmt: skip
    """How much worse does the model predict the same text, in nats per token?  Positive: worse.

    Args:
        base, model: results of :func:`qtutor.evaluate.perplexity` on the same tokens, or per-token values (n,); or a
            Comparison (:func:`qtutor.evaluate.compare_models`) alone.
        block: average so many consecutive tokens before testing; one window has ``ctx - 1`` scored tokens.
        confidence: of the interval.
        method: "t" (Student's, for a mean of many values), or "bootstrap" (BCa, 2,000 resamples drawn with ``seed``),
            which asks nothing of the values' distribution and takes a second.

    The ratio of the perplexities is ``exp(difference)``, and its interval ``exp(low)`` to ``exp(high)``.
    Raises QtutorError where the tokens do not pair up, are not finite, or are too few.
    """
    from scipy import stats

    _level("confidence", confidence)
    if method not in ("t", "bootstrap"):
        raise QtutorError(f"There is no method {method!r}: use 't' or 'bootstrap'.")
    try:
        values = _differences(base, model)
    except (TypeError, ValueError):
        raise QtutorError("paired_nll() takes log-likelihoods: numbers, one for each token.") from None
    if block is not None and not isinstance(block, (int, np.integer)):
        raise QtutorError(f"block is a whole number of tokens, not {block!r}.")
    if block is not None and (block < 1 or len(values) < 2 * block):
        raise QtutorError(f"{len(values)} tokens do not fill two blocks of {block}: use more text or a smaller block.")
    if len(values) < 2 or not np.isfinite(values).all():
        raise QtutorError("A paired test needs at least two tokens, with finite log-likelihoods.")
    means = values[: len(values) // block * block].reshape(-1, block).mean(1) if block else values
    n, mean, se = len(means) * (block or 1), float(means.mean()), float(stats.sem(means))
    if se <= 1e-12 * abs(mean):  # the same model twice, or a constant beside it: no spread but rounding
        low = high = mean
        p = 1.0 if mean == 0 else 0.0
    elif method == "t":
        test = stats.ttest_1samp(means, 0.0)
        (low, high), p = test.confidence_interval(confidence), float(test.pvalue)
    else:
        found = stats.bootstrap((means,), np.mean, n_resamples=2000, confidence_level=confidence, vectorized=True,
                                batch=200, rng=np.random.default_rng(seed))  # fmt: skip
        (low, high), se = found.confidence_interval, float(found.standard_error)
        drawn = found.bootstrap_distribution
        p = min(1.0, 2 * max(min((drawn <= 0).mean(), (drawn >= 0).mean()), 1 / len(drawn)))
    return Paired(mean, se, float(low), float(high), float(p), n, "nats per token", +1, confidence,
                  sd=se * math.sqrt(n), df=len(means) - 1)  # fmt: skip


def mcnemar(base_hits, hits, confidence: float = 0.95) -> Paired:
    """Did the model lose answers that its base got right?  ``difference`` is the change of accuracy (a share of one).

    ``base_hits`` and ``hits`` (n,) are booleans: item answered rightly.  Items that both got right, or both wrong, say
    nothing; of the others, half would be losses if the models were equally good, and ``p`` is the exact binomial
    probability of a split as uneven as this one (McNemar's test).  The interval is Agresti and Min's: Wald's, after
    half an item has been added to each of the four cells.  Works for any yes-or-no per item, such as same-top-token.
    """
    from scipy import stats

    _level("confidence", confidence)
    first, second = (np.asarray(x).ravel() for x in (base_hits, hits))
    if len(first) != len(second) or len(first) < 2:
        raise QtutorError(f"{len(first)} answers of the base and {len(second)} of the model do not pair up: ask both "
                          "the same questions, at least two.")  # fmt: skip
    if not all(np.isin(x, (0, 1)).all() for x in (first, second)):
        raise QtutorError("mcnemar() takes right or wrong for each item: booleans, not scores.")
    first, second = first.astype(bool), second.astype(bool)
    n, lost, gained = len(first), int((first & ~second).sum()), int((~first & second).sum())
    p = float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0

    def spread(lost, gained, n):
        return math.sqrt(lost + gained - (gained - lost) ** 2 / n) / n

    centre, width = (gained - lost) / (n + 2), spread(lost + 0.5, gained + 0.5, n + 2)
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    se = spread(lost, gained, n)
    return Paired((gained - lost) / n, se, max(-1.0, centre - z * width), min(1.0, centre + z * width), p, n,
                  "of all items", -1, confidence, sd=se * math.sqrt(n), lost=lost, gained=gained)  # fmt: skip


def _score_p(lost: int, gained: int, n: int, margin: float) -> float:
    """p-value of "the share lost minus the share gained is ``margin`` or more" (Tango's score test, -1 < margin < 1).

    The variance is that of the likeliest shares *at the margin*, not of those seen.  It makes the difference where
    little was lost: no loss in 100 items, say, has no spread to go by, and does not show that 2 % are impossible.
    """
    from scipy import stats

    # the likeliest share gained, given that lost - gained = margin: the larger root of a q^2 + b q + c
    a, b = -2 * n, (lost + gained) * (1 - margin) - 2 * gained * margin - 2 * (n - lost - gained) * margin
    c = gained * margin * (1 - margin)
    q = (b + math.sqrt(max(0.0, b * b - 4 * a * c))) / (-2 * a)
    variance = n * (2 * q + margin - margin**2)
    if variance <= 0:  # a margin that only one outcome fits
        return 1.0 if lost - gained >= n * margin else 0.0
    return float(stats.norm.cdf((lost - gained - n * margin) / math.sqrt(variance)))


def _score_bound(lost: int, gained: int, n: int, alpha: float) -> float:
    """The largest margin that the score test at ``alpha`` does not reject."""
    from scipy import optimize

    low, high = -1 + 1e-9, 1 - 1e-9
    if _score_p(lost, gained, n, high) > alpha:
        return 1.0
    if _score_p(lost, gained, n, low) < alpha:
        return -1.0
    return float(optimize.brentq(lambda margin: _score_p(lost, gained, n, margin) - alpha, low, high))


def _one_sided(paired: Paired, margin: float, alpha: float, sign: int) -> tuple[float, float]:
    """p-value and upper bound of ``sign * difference`` against ``margin``."""
    from scipy import stats

    if paired.lost is not None:
        lost, gained = (paired.lost, paired.gained)[:: -1 if sign > 0 else 1]
        return _score_p(lost, gained, paired.n, margin), _score_bound(lost, gained, paired.n, alpha)
    value, spread = sign * paired.difference, paired.se
    if spread == 0:
        return (0.0 if value < margin else 1.0), value
    law = stats.t(paired.df) if math.isfinite(paired.df) else stats.norm()
    return float(law.sf((margin - value) / spread)), float(value + law.ppf(1 - alpha) * spread)


def _check_margin(paired: Paired, margin: float, alpha: float) -> None:
    if not isinstance(paired, Paired):
        raise QtutorError("Give the result of paired_nll() or mcnemar().")
    _level("alpha", alpha)
    if not isinstance(margin, (int, float)) or not (math.isfinite(margin) and margin > 0):
        raise QtutorError(f"The margin is the loss you are prepared to accept: a positive number, not {margin!r}.")
    if paired.lost is not None and margin >= 1:
        raise QtutorError("The margin of an accuracy is a share of all items, such as 0.02 for two in a hundred, and "
                          f"not {margin!r}.")  # fmt: skip


def non_inferior(paired: Paired, margin: float, alpha: float = 0.05) -> Verdict:
    """Is the loss smaller than ``margin``?  In the unit of ``paired``: nats per token, or a share of all items.

    A perplexity that grows by less than 1 % is ``margin=math.log(1.01)``; two answers in a hundred are 0.02.  One-sided
    test at the level ``alpha``; too little data fails it, as it should.  Answers are tested by
    Tango's score test, which keeps its level where few or none were lost; tokens by Student's t, a bootstrap result
    with its standard error.
    """
    _check_margin(paired, margin, alpha)
    p, bound = _one_sided(paired, margin, alpha, paired.worse)
    return Verdict(p < alpha, p, bound, margin, alpha, paired.unit, "The loss")


def equivalent(paired: Paired, margin: float, alpha: float = 0.05) -> Verdict:
    """Is the change smaller than ``margin`` in both directions?  Two one-sided tests (TOST), each at ``alpha``."""
    _check_margin(paired, margin, alpha)
    sides = [_one_sided(paired, margin, alpha, sign) for sign in (+1, -1)]
    p = max(p for p, _ in sides)
    return Verdict(p < alpha, p, max(bound for _, bound in sides), margin, alpha, paired.unit, "The change")


def sample_needed(paired: Paired, loss: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Tokens (or items) that a paired test needs to find a loss of this size, with probability ``power``.

    ``((z_alpha/2 + z_power) * sd / loss) ** 2``, with the standard deviation seen in ``paired``: the more alike the two
    models, the fewer.  ``loss`` is in the unit of ``paired``.  Raises QtutorError where the two never differed.
    """
    from scipy import stats

    _check_margin(paired, loss, alpha)
    _level("power", power)
    if paired.sd == 0:
        raise QtutorError("The two models never differed here, so their differences have no size: measure more first.")
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return math.ceil((float(z) * paired.sd / loss) ** 2)
