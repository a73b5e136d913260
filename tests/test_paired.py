"""paired against scipy, against values worked out by hand, and against simulations with a fixed seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from qtutor import QtutorError, evaluate, paired


@pytest.fixture(scope="module")
def tokens():
    """Per-token nll of a base and of a model that is worse by 0.02 nats, 4,000 tokens."""
    rng = np.random.default_rng(0)
    base = rng.exponential(3, 4000)
    return base, base + rng.normal(0.02, 0.2, 4000)


def test_t_is_scipys_paired_test(tokens):
    base, model = tokens
    found, test = paired.paired_nll(model - base), stats.ttest_rel(model, base)
    interval = test.confidence_interval(0.95)
    assert found.p == pytest.approx(test.pvalue) and found.difference == pytest.approx((model - base).mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.se == pytest.approx(stats.sem(model - base)) and found.n == 4000


def test_blocks_are_means_of_windows(tokens):
    base, model = tokens
    found = paired.paired_nll(model - base, block=300)  # 13 blocks, 100 tokens left over
    means = (model - base)[:3900].reshape(13, 300).mean(1)
    assert found.se == pytest.approx(stats.sem(means)) and found.n == 3900 and found.blocks == 13


def test_a_comparison_alone_is_enough():
    rng = np.random.default_rng(1)
    base, model = rng.normal(size=(2, 500, 30))
    targets = rng.integers(0, 30, 500)
    two = paired.paired_nll(evaluate.score(model, targets).token_nll - evaluate.score(base, targets).token_nll)
    one = paired.paired_nll(evaluate.compare(base, model, targets))
    assert one.difference == pytest.approx(two.difference) and one.se == pytest.approx(two.se)
    assert math.exp(one.difference) == pytest.approx(evaluate.compare(base, model, targets).perplexity_ratio)


def test_mcnemar_by_hand():
    base = np.array([1] * 8 + [0] + [1] * 50 + [0] * 41)
    hits = np.array([0] * 8 + [1] + [1] * 50 + [0] * 41)
    found = paired.mcnemar(base, hits)
    assert (found.lost, found.gained, found.n) == (8, 1, 100)
    assert found.p == pytest.approx(2 * (1 + 9) / 2**9)  # no more than one gain among nine, both tails
    assert found.difference == pytest.approx(-0.07)
    assert found.se == pytest.approx(math.sqrt(9 - 49 / 100) / 100)
    assert found.se == pytest.approx(np.std(hits - base, ddof=0) / 10)
    assert found.low < -0.07 < found.high < 0.01


def test_the_same_model_twice():
    nll, hits = np.linspace(0, 1, 50), np.arange(60) % 3 == 0
    found = paired.paired_nll(nll - nll)
    assert found.p == 1 and found.low == found.high == 0 and paired.non_inferior(found, 1e-6).passed
    same = paired.mcnemar(hits, hits)
    assert same.p == 1 and same.low < 0 < same.high  # 60 items do not prove that nothing was lost
    assert not paired.non_inferior(same, 0.01).passed and paired.non_inferior(same, 0.1).passed
    for result in (found, same):
        with pytest.raises(QtutorError):
            paired.sample_needed(result, 0.01)


# ---------------------------------------------------------------------------------------------------- simulations


def _correlated(rng, mean, windows=40, length=50):
    """Differences whose windows share a part, as neighbouring tokens do."""
    return (mean + rng.normal(0, 0.1, (windows, 1)) + rng.normal(0, 0.5, (windows, length))).ravel()


def _rate(trial, runs=600, seed=0):
    rng = np.random.default_rng(seed)
    return np.mean([trial(rng) for _ in range(runs)])


def test_intervals_of_blocks_cover_and_those_of_tokens_do_not():
    def covers(block):
        def trial(rng):
            values = _correlated(rng, 0.1)
            found = paired.paired_nll(values, block=block)
            return found.low <= 0.1 <= found.high

        return trial

    assert _rate(covers(50)) == pytest.approx(0.95, abs=0.025)
    assert _rate(covers(1)) < 0.85


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [5, 8, 20])
def test_interval_of_a_few_windows_covers(blocks):
    """A BCa bootstrap of so few means covers 85, 90 and 94 %, at a nominal 95."""

    def trial(rng):
        found = paired.paired_nll(rng.normal(0, 1, blocks * 4), block=4)
        return found.low <= 0 <= found.high, found.p < 0.05

    covered, significant = np.mean([trial(rng) for rng in [np.random.default_rng(9)] for _ in range(2000)], axis=0)
    assert covered == pytest.approx(0.95, abs=0.015) and significant == pytest.approx(0.05, abs=0.015)


def test_interval_of_a_difference_of_accuracies_covers():
    def trial(rng):  # 8 % lost, 3 % gained
        kind = rng.choice(4, 150, p=[0.08, 0.03, 0.5, 0.39])
        found = paired.mcnemar((kind == 0) | (kind == 2), (kind == 1) | (kind == 2))
        return found.low <= -0.05 <= found.high

    assert _rate(trial) == pytest.approx(0.95, abs=0.025)


@pytest.mark.slow
def test_a_loss_as_large_as_the_margin_passes_one_time_in_twenty():
    def trial(rng, loss):
        values = rng.normal(loss, 0.5, 400)
        return paired.non_inferior(paired.paired_nll(values), 0.1).passed

    assert _rate(lambda rng: trial(rng, 0.1)) == pytest.approx(0.05, abs=0.025)
    assert _rate(lambda rng: trial(rng, 0.0)) > 0.9  # and no loss passes nearly always
    assert _rate(lambda rng: trial(rng, -0.2)) > 0.9


@pytest.mark.slow
def test_non_inferior_for_accuracy_has_its_level():
    def trial(rng, lost, gained):
        kind = rng.choice(3, 400, p=[lost, gained, 1 - lost - gained])
        return paired.non_inferior(paired.mcnemar(kind != 1, kind != 0), 0.05).passed

    assert _rate(lambda rng: trial(rng, 0.08, 0.03), runs=300) < 0.08
    assert _rate(lambda rng: trial(rng, 0.02, 0.02), runs=100) > 0.9


def _passes(n, lost, gained, margin):
    """Probability that non_inferior() passes, exactly: over all outcomes with these true shares lost and gained."""
    total = 0.0
    for b in range(n + 1):
        for c in range(min(n - b, 12) + 1):
            share = stats.multinomial.pmf([b, c, n - b - c], n, [lost, gained, 1 - lost - gained])
            if share > 1e-8:
                total += share * (paired.score_p(b, c, n, margin) < 0.05)
    return total


@pytest.mark.parametrize("n, margin, gained", [(100, 0.02, 0.0), (100, 0.05, 0.0), (100, 0.05, 0.01), (200, 0.01, 0.0),
                                               (200, 0.02, 0.005)])  # fmt: skip
def test_a_margin_keeps_its_level_where_little_is_lost(n, margin, gained):
    """Wald's test with half an item added passes up to 13 % of such models, at a nominal 5 %."""
    assert _passes(n, margin + gained, gained, margin) < 0.055
    assert _passes(4 * n, 0.001, 0.001, 0.05) > 0.9


def test_tangos_published_interval():
    """7 and 1 of 21 pairs: -0.517 to -0.026 (Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850)."""
    assert paired.score_bound(7, 1, 21, 0.025) == pytest.approx(0.517, abs=5e-4)
    assert paired.score_bound(1, 7, 21, 0.025) == pytest.approx(-0.026, abs=5e-4)


@pytest.mark.parametrize("lost, gained, n", [(7, 1, 21), (0, 0, 200), (3, 0, 100), (0, 4, 50), (5, 9, 60)])
@pytest.mark.parametrize("margin", [0.01, 0.05, 0.2])
def test_score_test_against_a_numeric_likelihood(lost, gained, n, margin):
    from scipy import optimize

    def minus(q):  # log-likelihood at the margin, as a function of the share gained
        shares = np.array([q + margin, q, 1 - 2 * q - margin])
        return -np.array([lost, gained, n - lost - gained]) @ np.log(np.maximum(shares, 1e-300))

    q = optimize.minimize_scalar(minus, bounds=(1e-12, (1 - margin) / 2), method="bounded", options={"xatol": 1e-12}).x
    z = (lost - gained - n * margin) / math.sqrt(n * (2 * q + margin - margin**2))
    assert paired.score_p(lost, gained, n, margin) == pytest.approx(stats.norm.cdf(z), abs=1e-4)


def test_bound_and_p_of_a_margin_agree():
    for lost, gained, n in ((0, 0, 100), (3, 1, 80), (9, 2, 200), (10, 0, 10)):
        found = paired.mcnemar([1] * lost + [0] * gained + [1] * (n - lost - gained),
                               [0] * lost + [1] * gained + [1] * (n - lost - gained))  # fmt: skip
        for margin in (0.01, 0.05, 0.1, 0.3):
            verdict = paired.non_inferior(found, margin)
            assert verdict.passed == (verdict.bound < margin)
    nothing = paired.non_inferior(paired.mcnemar([1] * 200, [1] * 200), 0.02)
    assert nothing.passed and nothing.bound == pytest.approx(1 / (1 + 200 / 1.64485**2), rel=1e-3)  # by hand: q = 0


def test_sample_needed_gives_the_power_it_promises():
    rng = np.random.default_rng(3)
    pilot = paired.paired_nll(rng.normal(0, 0.4, 5000))
    n = paired.sample_needed(pilot, 0.05)
    assert n == pytest.approx((1.95996 + 0.84162) ** 2 * 0.4**2 / 0.05**2, rel=0.06)
    power = _rate(lambda rng: paired.paired_nll(rng.normal(0.05, 0.4, n)).p < 0.05)
    assert power == pytest.approx(0.8, abs=0.05)


def _power_of_mcnemar(n, lost, gained, runs=4000):
    """Share of simulated pairs of models with these true shares whose McNemar's test is significant."""
    counts = np.random.default_rng(5).multinomial(n, [lost, gained, 1 - lost - gained], runs)
    p = 2 * stats.binom.cdf(counts[:, :2].min(1), counts[:, :2].sum(1), 0.5)  # exact, for an even split is symmetric
    return np.mean(p < 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lost, gained, loss", [(30, 20, 0.03), (24, 16, 0.05), (6, 2, 0.01)])
def test_sample_needed_for_answers_gives_the_power_it_promises(lost, gained, loss):
    """McNemar's test is exact, hence cautious: a normal approximation gives a power of 0.73 to 0.78."""
    rest = 500 - lost - gained
    pilot = paired.mcnemar([1] * lost + [0] * gained + [1] * rest, [0] * lost + [1] * gained + [1] * rest)
    n, changed = paired.sample_needed(pilot, loss), (lost + gained) / 500
    power = _power_of_mcnemar(n, (changed + loss) / 2, (changed - loss) / 2)
    assert power > 0.78  # more where few changed answers leave their share unsure
    assert n > ((1.95996 + 0.84162) * pilot.se * math.sqrt(500) / loss) ** 2


def test_sample_needed_counts_whole_windows():
    values = np.random.default_rng(6).normal(0, 1, (8, 50)).ravel()
    pilot = paired.paired_nll(values, block=50)
    n = paired.sample_needed(pilot, 0.1)
    assert n % 50 == 0
    spread = pilot.se * math.sqrt(8)
    power = _rate(lambda rng: stats.ttest_1samp(rng.normal(0.1, spread, n // 50), 0).pvalue < 0.05, runs=2000)
    assert power >= 0.78


def test_pairing_saves_tokens(tokens):
    """The reason for all this: two separate error bars would need many times the text."""
    base, model = tokens
    pair = paired.sample_needed(paired.paired_nll(model - base), 0.02)
    apart = (2.8 * math.hypot(base.std(), model.std()) / 0.02) ** 2
    assert apart > 100 * pair


LAWS = {"normal": lambda rng, shape: rng.normal(0, 1, shape),
        "exponential": lambda rng, shape: rng.exponential(1, shape) - 1,
        "log-normal": lambda rng, shape: rng.lognormal(0, 1, shape) - math.exp(0.5)}  # fmt: skip


@pytest.mark.parametrize("windows", [4, 8, 30, 200])
@pytest.mark.parametrize("law", LAWS)
def test_intervals_of_skewed_tokens_cover(law, windows):
    """Tokens' losses are skewed; means of a window's worth of them hardly are."""
    rng = np.random.default_rng(11)
    values = LAWS[law](rng, (1000, windows, 100)).mean(2)
    covered = np.mean([(found := paired.paired_nll(row)).low <= 0 <= found.high for row in values])
    assert covered == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("lost, gained, n", [(0.02, 0.02, 50), (0.10, 0.02, 30), (0.01, 0.0, 200), (0.3, 0.1, 12)])
def test_intervals_of_few_answers_cover(lost, gained, n):
    """Exactly: over all outcomes.  Wald's interval with half an item added to each cell covers 0.86 at the third."""
    covered = 0.0
    for b in range(min(n, 25) + 1):
        for c in range(min(n - b, 12) + 1):
            share = stats.multinomial.pmf([b, c, n - b - c], n, [lost, gained, 1 - lost - gained])
            if share > 1e-5:
                rest = n - b - c
                found = paired.mcnemar([1] * b + [0] * c + [1] * rest, [0] * b + [1] * c + [1] * rest)
                covered += share * (found.low <= gained - lost <= found.high)
    assert covered > 0.93


@pytest.mark.parametrize("blocks", [4, 8, 30])
def test_power_is_reached_though_the_pilot_knows_its_scatter_badly(blocks):
    """The mean over pilots, each of which asks for a sample of its own: 0.8.  Taken at their word, pilots of 4 windows
    would give 0.66."""
    rng, reached = np.random.default_rng(12), []
    for _ in range(200):
        n = paired.sample_needed(paired.paired_nll(rng.normal(0, 1, blocks)), 0.3)
        reached.append(stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, min(0.3 * math.sqrt(n), 30)))
    assert np.mean(reached) == pytest.approx(0.8, abs=0.05)


@pytest.mark.slow
def test_power_for_answers_is_reached_on_average_over_pilots():
    rng, reached = np.random.default_rng(13), []
    for _ in range(20):
        b, c, rest = rng.multinomial(200, [0.06, 0.04, 0.9])
        pilot = paired.mcnemar([1] * b + [0] * c + [1] * rest, [0] * b + [1] * c + [1] * rest)
        reached.append(_power_of_mcnemar(paired.sample_needed(pilot, 0.04), 0.07, 0.03, runs=500))
    assert np.mean(reached) > 0.76


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("call", [
    lambda: paired.paired_nll([1.0]),
    lambda: paired.paired_nll([1.0, math.nan]),
    lambda: paired.paired_nll([1.0, 2.0], block=2),
    lambda: paired.mcnemar([True, False], [True]),
    lambda: paired.mcnemar([0.3, 0.7], [0.1, 0.9]),
    lambda: paired.non_inferior(paired.mcnemar([1, 0, 1], [1, 0, 0]), 0),
    lambda: paired.non_inferior(paired.mcnemar([1, 0, 1], [1, 0, 0]), 2),  # two points are 0.02
    lambda: paired.sample_needed(paired.mcnemar([1, 0, 1], [1, 0, 0]), -1),
])  # fmt: skip
def test_bad_input_is_one_sentence(call):
    with pytest.raises(QtutorError) as error:
        call()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_sentences(tokens):
    found = paired.paired_nll(tokens[1] - tokens[0])
    assert "nats per token" in str(found) and "95 % interval" in str(found)
    assert "NOT shown" in str(paired.non_inferior(found, 0.001)) and " shown" in str(paired.non_inferior(found, 0.1))
