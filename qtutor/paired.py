"""Is the difference real, and is it small enough?  Tests of a model against the model that it came from.

Both models read the same tokens and answer the same questions, so each token is its own control: what makes a text easy
or hard is common to both and drops out of the difference.  That is what *paired* means, and it is worth a factor of ten
and more in tokens (:func:`sample_needed` says how many).

Two questions that sound alike are not.  "The difference is not significant" may only mean that too little was
measured: with five tokens nothing is ever significant.  What somebody who ships a model wants to say is "the loss is
smaller than what I am prepared to lose", and that takes a *margin*, chosen before looking, and a test that can fail
for want of data: :func:`non_inferior`.

    lost = paired_nll(evaluate.compare_models(base, model, tokens, ctx=256), block=255)
    print(lost)                                          # the interval
    print(non_inferior(lost, margin=math.log(1.01)))     # perplexity grows by less than 1 %?

Neighbouring tokens are not independent draws.  ``block`` averages a window's worth first (batch means), after which
they nearly are.  A text has few windows, so the interval is Student's t: a bootstrap of five means covers 85 %, not 95.

References: McNemar 1947 with exact binomial probabilities; Tango 1998, Statistics in Medicine 17:891 (the score test of
a difference of paired proportions, and its interval).
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from . import QtutorError

LEVEL = 0.05  # of all tests; the intervals are its complement, 95 %
POWER = 0.8  # of a sample that is large enough


@dataclass(frozen=True)
class Paired:
    """Model minus base: ``difference`` with its standard error, and the 95 % interval from ``low`` to ``high``.

    ``p`` is of the hypothesis that there is no difference; ``n`` tokens or items were compared, in ``blocks`` means;
    ``lost`` and ``gained`` are the items that only the base, or only the model, got right (None for tokens).
    """

    difference: float
    se: float
    low: float
    high: float
    p: float
    n: int
    blocks: int
    unit: str
    lost: int | None = None
    gained: int | None = None

    def __str__(self) -> str:
        return (f"{self.difference:+.3g} {self.unit} (95 % interval {self.low:+.3g} to {self.high:+.3g}, "
                f"p = {self.p:.2g}, n = {self.n:,})")  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """``passed``: the loss is smaller than ``margin``, at LEVEL; ``p`` is of the opposite hypothesis.  ``bound`` is the
    largest loss that the data leave possible: a one-sided bound at ``1 - LEVEL``."""

    passed: bool
    p: float
    bound: float
    margin: float
    unit: str

    def __str__(self) -> str:
        verdict = "shown" if self.passed else "NOT shown"
        return (f"The loss is {verdict} to be below the margin: at most {self.bound:.3g} against {self.margin:.3g} "
                f"{self.unit} (with 95 % confidence, p = {self.p:.2g})")  # fmt: skip


def paired_nll(change, block: int = 1) -> Paired:
    """How much worse does the model predict the same text, in nats per token?  Positive: worse.

    ``change`` is a Comparison (:func:`qtutor.evaluate.compare_models`), or the model's negative log-likelihood less the
    base's, token by token (n,).  ``block`` consecutive tokens are averaged before testing; one window has ``ctx - 1``.
    The ratio of the perplexities is ``exp(difference)``, and its interval ``exp(low)`` to ``exp(high)``.
    """
    values = np.asarray(getattr(change, "token_dnll", change), dtype=np.float64)
    means = values[: len(values) // block * block].reshape(-1, block).mean(1)
    if len(means) < 2 or not np.isfinite(means).all():
        raise QtutorError(f"A paired test needs two blocks of {block} tokens, with finite log-likelihoods of both "
                          f"models, and there are {len(values)} tokens: use more text or a smaller block.")  # fmt: skip
    mean, se = float(means.mean()), float(stats.sem(means))
    if se <= 1e-12 * abs(mean):  # the same model twice, or a constant beside it: no spread but rounding
        low = high = mean
        p = 1.0 if mean == 0 else 0.0
    else:
        test = stats.ttest_1samp(means, 0.0)
        (low, high), p = test.confidence_interval(1 - LEVEL), float(test.pvalue)
    return Paired(mean, se, float(low), float(high), p, means.size * block, means.size, "nats per token")


def loss_gaps(rows: list[dict], recipe: str) -> list[float]:
    """Held-out loss at the end of training less BF16's, nats per token, for each seed that ran in both (rows of
    ``fp8_loss``); :func:`paired_nll` takes them."""
    base, this = ({row["seed"]: row["held_out_nats"] for row in rows if row["recipe"] == name
                   and row["step"] == row["steps"]} for name in ("BF16", recipe))  # fmt: skip
    return [nats - base[seed] for seed, nats in this.items() if seed in base]


def mcnemar(base_hits, hits, alternative: str = "two-sided") -> Paired:
    """Did the model lose answers that its base got right?  ``difference`` is the change of accuracy (a share of one).

    ``base_hits`` and ``hits`` (n,) are booleans: item answered rightly.  Items that both got right, or both wrong, say
    nothing; of the others, half would be losses if the models were equally good, and ``p`` is the exact binomial
    probability of a split as uneven as this one (McNemar's test); with ``alternative="greater"``, of so many losses.
    The interval is Tango's: the differences that his score test does not reject, also where few answers changed.
    """
    if not all(np.isin(x, (0, 1)).all() for x in (base_hits, hits)):
        raise QtutorError("mcnemar() takes right or wrong for each item: booleans, not scores.")
    first, second = (np.asarray(x, dtype=bool).ravel() for x in (base_hits, hits))
    if len(first) != len(second) or len(first) < 2:
        raise QtutorError(f"{len(first)} answers of the base and {len(second)} of the model do not pair up: ask both "
                          "the same questions, at least two.")  # fmt: skip
    n, lost, gained = len(first), int((first & ~second).sum()), int((~first & second).sum())
    changed, difference = lost + gained, gained - lost
    p = float(stats.binomtest(lost, changed, 0.5, alternative).pvalue) if changed else 1.0
    se = math.sqrt(changed - difference**2 / n) / n
    low, high = -score_bound(lost, gained, n, LEVEL / 2), score_bound(gained, lost, n, LEVEL / 2)
    return Paired(difference / n, se, low, high, p, n, n, "of all items", lost, gained)


def score_p(lost: int, gained: int, n: int, margin: float) -> float:
    """p-value of "the share lost minus the share gained is ``margin`` or more" (Tango's score test, -1 < margin < 1).

    The variance is that of the likeliest shares *at the margin*, not of those seen.  It makes the difference where
    little was lost: no loss in 100 items, say, has no spread to go by, and does not show that 2 % are impossible.
    """
    # the likeliest share gained, given that lost - gained = margin: the larger root of a q^2 + b q + c
    a, b = -2 * n, (lost + gained) * (1 - margin) - 2 * gained * margin - 2 * (n - lost - gained) * margin
    c = gained * margin * (1 - margin)
    q = (b + math.sqrt(max(0.0, b * b - 4 * a * c))) / (-2 * a)
    variance = n * (2 * q + margin - margin**2)
    if variance <= 0:  # a margin that only one outcome fits
        return 1.0 if lost - gained >= n * margin else 0.0
    return float(stats.norm.cdf((lost - gained - n * margin) / math.sqrt(variance)))


def score_bound(lost: int, gained: int, n: int, alpha: float) -> float:
    """The largest margin that the score test at ``alpha`` does not reject."""

    def over(margin):
        return score_p(lost, gained, n, margin) - alpha

    low, high = -1 + 1e-9, 1 - 1e-9
    return 1.0 if over(high) > 0 else -1.0 if over(low) < 0 else float(optimize.brentq(over, low, high))


def non_inferior(paired: Paired, margin: float) -> Verdict:
    """Is the loss smaller than ``margin``?  In the unit of ``paired``: nats per token, or a share of all items.

    A perplexity that grows by less than 1 % is ``margin=math.log(1.01)``; two answers in a hundred are 0.02.  The
    test is one-sided; too little data fails it, as it should.  Answers are tested by Tango's score test, which keeps
    its level where few or none were lost; tokens by Student's t.
    """
    if not margin > 0 or (paired.lost is not None and margin >= 1):
        raise QtutorError("The margin is the loss you are prepared to accept: a positive number, of accuracy a share "
                          f"such as 0.02 for two in a hundred, and not {margin!r}.")  # fmt: skip
    if paired.lost is not None:
        p = score_p(paired.lost, paired.gained, paired.n, margin)
        bound = score_bound(paired.lost, paired.gained, paired.n, LEVEL)
    elif paired.se == 0:
        p, bound = (0.0 if paired.difference < margin else 1.0), paired.difference
    else:
        law = stats.t(paired.blocks - 1)
        p = float(law.sf((margin - paired.difference) / paired.se))
        bound = float(paired.difference + law.ppf(1 - LEVEL) * paired.se)
    return Verdict(p < LEVEL, p, bound, margin, paired.unit)


def sample_needed(paired: Paired, loss: float) -> int:
    """Tokens (or items) that a paired test needs to find a loss of this size, with probability POWER.

    The pilot ``paired`` says how much the differences scatter: the more alike the two models, the fewer.  ``loss`` is
    in its unit; tokens come in blocks as long as the pilot's.  The power is that of the exact test, by search: for
    McNemar's the usual formula (Connor 1987) is a normal approximation and promises more than the test keeps.  It is
    averaged over what the pilot leaves possible: few blocks, or few changed answers, say little of the scatter.
    """
    if not loss > 0 or paired.se == 0:
        raise QtutorError("sample_needed() takes a positive loss and a pilot in which the two models differ.")

    likely = (np.arange(16) + 0.5) / 16  # quantiles: of the scatter, or of the share of changed answers
    precision = np.sqrt(stats.chi2.ppf(likely, paired.blocks - 1) / (paired.blocks - 1))

    def t_test(n):  # by the noncentral t distribution, of which scipy has NaN for 0 in the far tail
        shift = np.minimum(loss / (paired.se * math.sqrt(paired.blocks / n)) * precision, 30)
        critical = stats.t.ppf(1 - LEVEL / 2, n - 1)
        tails = stats.nct.sf(critical, n - 1, shift), stats.nct.cdf(-critical, n - 1, shift)
        return np.nan_to_num(tails).sum(0).mean()

    def mcnemar_test(n):
        both = paired.lost + paired.gained
        shares = stats.beta.ppf(likely, both + 0.5, paired.n - both + 0.5)
        return np.mean([mcnemar_power(n, max(share, loss)) for share in shares])

    def mcnemar_power(n, changed):  # over all numbers of changed answers that may come up
        low, high = stats.binom.interval(1 - 1e-9, n, changed)
        m = np.arange(low, high + 1)
        critical = stats.binom.ppf(LEVEL / 2, m, 0.5) - 1  # so few gains, or losses, are significant
        gains = (1 - loss / changed) / 2  # of the changed answers
        rejected = stats.binom.cdf(critical, m, gains) + stats.binom.cdf(critical, m, 1 - gains)
        return float(stats.binom.pmf(m, n, changed) @ rejected)

    found, top = t_test if paired.lost is None else mcnemar_test, 4
    while found(top) < POWER:
        top *= 2
    n = 2 + bisect.bisect_left(range(2, top), POWER, key=found)
    return n * (paired.n // paired.blocks)
