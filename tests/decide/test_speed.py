"""Speeds: sizes to the byte, steps as all fits allow them, checked on measurements that a fit has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from recorded_rows import H100, H200, saved, served

from qtutor import llamacpp, results
from qtutor.decide import capacity, hardware, speed
from qtutor.decide.techniques import TECHNIQUES
from qtutor.rigs import random_checkpoint

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])
Q6 = TECHNIQUES["GGUF Q6_K"]


@pytest.mark.parametrize("model", ["Llama-2-7B", "Llama-3-8B"])
@pytest.mark.parametrize("scheme", random_checkpoint.SCHEMES)
def test_checkpoints_to_the_byte(model, scheme):
    total, read = speed.weights(speed.VLLM[f"vLLM {scheme}"], model)
    assert total == random_checkpoint.nbytes(model, scheme)
    assert total - read == 2 * np.prod(capacity.shapes(model)["token_embd.weight"])


def test_files_to_the_byte():
    size = capacity.size("Llama-2-70B", "Q6_K")
    assert speed.weights(Q6, "Llama-2-70B") == (size.tensor_bytes, size.read_bytes)


def test_a_mixture_stores_all_experts_and_reads_few_for_one_user():
    total, one = speed.weights(speed.VLLM["vLLM BF16"], "Mixtral-8x7B", 1)
    many = speed.weights(speed.VLLM["vLLM BF16"], "Mixtral-8x7B", 64)[1]
    assert total / 2 == pytest.approx(46.7e9, rel=0.01) and one / 2 == pytest.approx(12.9e9, rel=0.02)
    assert one < many < total and many == pytest.approx(total - 2 * 32000 * 4096, rel=1e-3)


def test_sizes_of_pytorch_formats_are_the_measured_ones_at_the_measured_shape():
    for row in results.on_gpu("tradeoff").rows:
        technique = TECHNIQUES.get(row["technique"])
        if row["shape"] == "llama2_7b" and row.get("weights_mb") and technique and technique.runtime == "pytorch":
            assert speed.weights(technique, "Llama-2-7B")[0] == pytest.approx(1e6 * row["weights_mb"], rel=1e-4)


def point(model, device, read, step_s, users=1, **more):
    return speed.Point(**{"model": model, "device": device, "cards": 1, "split": None, "kv_type": "F16", "users": users,
                          "read": read, "cached": 0, "step_s": step_s, "watts": None, "first_s": None,
                          "prompt": None} | more)  # fmt: skip


def test_a_known_law_is_found():
    """Steps made of 1.25 x bytes / bandwidth and 1 ms: what other sizes and cards take is recovered."""
    h100, h200 = hardware.device("H100 SXM"), hardware.device("H200")

    def law(read, device):
        return 1.25 * read / (device.gb_per_s * 1e9) + 1e-3

    known = [point("a", device.name, read, law(read, device)) for device in (h100, h200) for read in (5e9, 60e9)]
    for read, device in ((30e9, h100), (30e9, h200), (15e9, hardware.device("A100 80 GB SXM"))):
        low, high = speed.step(known, read, device)
        assert low <= law(read, device) <= high and high < 1.35 * low


def test_no_step_is_shorter_than_bytes_over_bandwidth():
    low, _ = speed.step([point("a", "H100 SXM", 50e9, 0.030)], 50e9, hardware.device("L4"))
    assert low >= 50e9 / 300e9


def test_one_measurement_says_little_elsewhere_and_much_at_its_place():
    h100 = [point("a", "H100 SXM", 56e9, 0.035)]
    here, there = (speed.step(h100, 56e9, hardware.device(name)) for name in ("H100 SXM", "H200"))
    assert here[1] / here[0] == pytest.approx((1 + speed.NOISE) / (1 - speed.NOISE))
    assert there[1] / there[0] > 1.4 and there[0] < 0.035 <= there[1]  # memory decides, or it does not matter at all


@pytest.mark.parametrize("users", [1, 8])
def test_the_measured_speed_lies_in_its_own_interval(users):
    for name, points in speed.points().items():
        for p in points:
            if p.step_s and p.users == users:
                groups = speed.choose_points(points, p.model, hardware.device(p.device).name, users, p.kv_type, p.cards,
                                             p.split)  # fmt: skip
                low, high = speed.predict(groups, p.read, hardware.device(p.device), users, p.cards, p.split)
                assert low * 0.999 <= p.step_s <= high * 1.001, (name, p)


def without_one_card(points: dict, card: str):
    """(technique, measured point of the card, interval from all other cards) of all points that others can predict."""
    for name, known in points.items():
        for p in known:
            others = [q for q in known if hardware.device(q.device).name != card and q.served == p.served]
            if p.step_s and hardware.device(p.device).name == card and (groups := speed.choose_points(
                    others, p.model, card, p.users, p.kv_type, p.cards, p.split)):  # fmt: skip
                yield name, p, speed.predict(groups, p.read, hardware.device(card), p.users, p.cards, p.split)


def test_leaving_one_card_out():
    """H100 against H200: each recorded row lies in the interval that the other cards give, as machines differ."""
    for card in ("H100 SXM", "H200"):
        for name, p, (low, high) in without_one_card(speed.points(), card):
            said = f"{name} on {card}, {p.users} users: {p.step_s:.4f} s, {low:.4f} to {high:.4f} s expected"
            assert low * (1 - speed.NOISE) <= p.step_s <= high * (1 + speed.NOISE), said


def test_an_h200_from_measurements_on_an_h100():
    """llama-bench wrote 30.5 tokens/s on an H200 with Q6_K at 70B's shape; by memory alone it would be 40."""
    points = [p for p in speed.points()["GGUF Q6_K"] if hardware.device(p.device).name == "H100 SXM"]
    groups = speed.choose_points(points, "Llama-2-70B", "H200", 1, "F16", 1, None)
    low, high = speed.predict(groups, speed.weights(Q6, "Llama-2-70B")[1], hardware.device("H200"), 1)
    assert low <= 1 / 30.5 <= high and high / low < 1.7


def test_leaving_one_card_out_catches_a_law_that_does_not_hold(tmp_path):
    """The check can fail: a card that is three times slower than its bandwidth says lies outside."""
    saved(tmp_path, "llama70b", H100, [served("FP8", users=1, step_ms=25)])
    saved(tmp_path, "llama70b", H200, [served("FP8", users=1, step_ms=75)])
    found = list(without_one_card(speed.points(tmp_path), "H200"))
    assert len(found) == 1 and not found[0][2][0] <= found[0][1].step_s <= found[0][2][1]


def test_rows_of_servers_are_points(tmp_path):
    rows = [served("FP8", users=8, step_ms=24), served("BF16", users=8, step_ms=26, cards=2, split="tensor"),
            served("Q8_0", users=8, step_ms=60, runtime="llama.cpp", kv_type="Q8_0"), served("FP8", not_run="no time"),
            served("FP8", users=8, step_ms=700, prefill_tokens=4096)]  # whose steps wait for prompts
    saved(tmp_path, "llama70b", H100, rows)
    found = speed.points(tmp_path)
    steps = {name: sum(p.step_s is not None for p in points) for name, points in found.items()}
    assert steps == {"vLLM FP8": 1, "vLLM BF16": 1, "GGUF Q8_0": 1}
    (bf16,) = found["vLLM BF16"]
    assert (bf16.cards, bf16.split, bf16.step_s) == (2, "tensor", pytest.approx(0.026, rel=1e-5))
    assert bf16.bandwidth == 2 * 3350e9


def test_numbers_of_users_between_two_measurements(tmp_path):
    saved(tmp_path, "llama70b", H100, [served("FP8", users=8, step_ms=24), served("FP8", users=32, step_ms=36)])
    points = speed.points(tmp_path)["vLLM FP8"]
    device = hardware.device("H100 SXM")
    chosen = {n: speed.choose_points(points, "Llama-2-70B", device.name, n, "BF16", 1, None) for n in (4, 8, 20, 64)}
    assert chosen[4] == [] == chosen[64] and [n for n, _ in chosen[20]] == [8, 32]
    low, high = speed.predict(chosen[20], points[0].read, device, 20)
    assert low < 0.030 < high


def test_a_first_token_takes_time_in_proportion_to_tokens_and_weights():
    points = speed.points()["GGUF Q6_K"]
    h100 = hardware.device("H100 SXM")
    low, high = speed.first_token(points, "Llama-2-70B", 4096, h100, 1, None)
    rows = results.on_gpu("llama70b", kind="model").rows
    (row,) = (r for r in rows if (r["kind"], r.get("type")) == ("model", "Q6_K"))
    assert low < 4096 / row["prefill_tokens_per_s"] < high
    assert speed.first_token(points, "Llama-2-70B", 8192, h100, 1, None)[0] == pytest.approx(2 * low)
    assert speed.first_token(points, "Llama-2-70B", 4096, hardware.device("L4"), 1, None) is None
