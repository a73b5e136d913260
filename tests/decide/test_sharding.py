"""The model of sharded steps: its limits, a case by hand, and the recorded rows that it has to predict."""

import itertools
import math

import pytest

from qtutor import QtutorError, results
from qtutor.decide import sharding

PLAN = {"layers": 8, "weights": 1.6e9}


def test_one_gpu_is_one_gpu():
    one = sharding.step(1, 150, 10, **PLAN)
    assert (one.total_ms, one.efficiency, one.exposed_ms, one.bottleneck) == (160, 1, 0, "compute")


def test_a_ring_moves_n_minus_1_of_n_parts():
    assert sharding.ring_ms(4, 2, 100, 0) == pytest.approx(20)  # half of 4 GB at 100 GB/s
    assert sharding.ring_ms(4, 4, 100, 0) == pytest.approx(30)
    assert sharding.ring_ms(2, 4, 100, 0) == pytest.approx(sharding.ring_ms(4, 4, 100, 0) / 2)
    assert sharding.ring_ms(0, 9, 100, 5) == pytest.approx(0.04)  # eight hops


@pytest.mark.parametrize("overlap_cost, computed, exposed", [(0, 30, 35), (1, 36, 33)])
def test_two_layers_by_hand(overlap_cost, computed, exposed):
    """Each collective takes 10 ms, a forward layer 5, a backward layer 10: exposed are the first gather, 5 ms of the
    second, the gather of the last layer again, the last scatter.  With a cost of 1 ms a GB, 2 GB take 2 ms more."""
    step = sharding.step(2, 30, 4, layers=2, weights=2e9, gb_per_s=100, hop_us=0, overlap_cost=overlap_cost)
    assert (step.compute_ms, step.exposed_ms, step.optimizer_ms) == pytest.approx((computed, exposed, 2))
    assert step.total_ms == pytest.approx(computed + exposed + 2)
    assert (step.gathered_ms, step.scattered_ms, step.bottleneck) == (40, 20, "all-gather")
    assert step.efficiency == pytest.approx(34 / step.total_ms)
    once = sharding.step(2, 30, 4, layers=2, weights=2e9, gb_per_s=100, hop_us=0, overlap_cost=overlap_cost,
                         reshard=False, gather_bytes=1)  # fmt: skip
    assert (once.gathered_ms, once.scattered_ms, once.bottleneck) == (10, 20, "compute")


def test_infinite_bandwidth_exposes_latency_alone():
    fast = {"gb_per_s": math.inf, "between_hosts_gb_per_s": math.inf}
    assert sharding.step(64, 150, 10, hop_us=0, **fast, **PLAN).exposed_ms == 0
    assert sharding.step(64, 150, 10, hop_us=5, **fast, **PLAN).exposed_ms == pytest.approx(3 * 63 * 0.005)


def test_hosts_talk_at_the_slower_bandwidth():
    near, far = (sharding.step(n, 150, 10, hop_us=0, **PLAN) for n in (8, 16))
    assert far.scattered_ms / near.scattered_ms == pytest.approx(9 * (15 / 16) / (7 / 8))
    assert near.efficiency > 0.99 > 0.95 > far.efficiency  # 400 Gb/s hide too little


def test_hidden_until():
    def last(**plan):
        return sharding.hidden_until(600, 40, layers=32, weights=6.5e9, **plan)

    steps = {n: sharding.step(n, 600, 40, layers=32, weights=6.5e9) for n in (8, 16, 32)}
    assert last() == 8 and steps[8].efficiency > 0.9 > steps[16].efficiency
    assert last(between_hosts_gb_per_s=100) == 512
    assert last(limit=2) == 1 and last(limit=0) == 512
    assert last(ranks=(4, 2)) == 4


def test_the_recorded_rows_are_predicted_within_7_per_cent():
    rows = results.load("fp8_scaling", "h200x4").rows
    found = sharding.checked(rows)
    assert len(found) == 36 and {row["ranks"] for row in found} == {2, 4}
    assert all(abs(row["error"]) < 0.07 for row in found)
    usual = [row["error"] for row in found if row["rung"] != "FP8 current + FP8 weights"]
    assert len(usual) == 32 and all(abs(error) < 0.025 for error in usual)


def test_the_cost_of_overlap_is_the_fitted_one():
    rows = results.load("fp8_scaling", "h200x4").rows

    def squares(cost):
        return sum(row["error"] ** 2 for row in sharding.checked(rows, overlap_cost=cost))

    costs = [0.4, 0.6, 0.76, 0.77, 0.78, 0.9, 1.1]
    assert min(costs, key=squares) == 0.77
    falling, rising = [squares(cost) for cost in costs[:4]], [squares(cost) for cost in costs[3:]]
    assert all(a > b for a, b in itertools.pairwise(falling)) and all(a < b for a, b in itertools.pairwise(rising))


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"ranks": 2.5}, {"layers": 1.5}, {"weights": -1},
                                   {"gb_per_s": math.nan}, {"hop_us": -1}, {"compute_ms": 0}])  # fmt: skip
def test_bad_input_is_one_sentence(wrong):
    with pytest.raises(QtutorError, match=r"^No step has .* give whole ranks and layers, sizes and bandwidths above 0"):
        sharding.step(**{"ranks": 2, "compute_ms": 10, "optimizer_ms": 1} | PLAN | wrong)
