"""The decision guide: it rests on measured rows, what is unknown is no pass, and what cannot be done says so."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qtutor import QtutorError, llamacpp, results
from qtutor.decide import capacity, choosing, hardware
from qtutor.decide.choosing import Need, decide
from qtutor.decide.techniques import TECHNIQUES

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])
CHAT = Need(model="Llama-2-70B", device="H100 SXM", users=8, tokens_per_s=10, max_loss=0.005, keep_free_gib=2)
LAPTOP = Need(model="Llama-3-8B", device=hardware.Device("laptop", 8, 60), tokens_per_s=8, max_loss=0.05)
SEVEN = Need(model="Llama-2-7B", device="H100 SXM", context=512)


def options(need, directory=None):
    return {option.technique.name: option for option in decide(need, directory).options}


def copy_of_results(folder: Path) -> Path:
    shutil.copytree(results.RESULTS, folder / "results")
    return folder / "results"


# ------------------------------------------------------------------------------------------------------ constraints


@pytest.mark.slow
def test_the_chat_service_gets_six_bits():
    decision = decide(CHAT)
    assert decision.best.technique.name == "GGUF Q6_K" and decision.best.verdict == "yes"
    fit = capacity.fits("Llama-2-70B", "Q6_K", 4096, "H100 SXM", users=8)
    assert decision.best.memory_gib == pytest.approx(fit.total_gib, abs=0.01)
    out = {option.technique.name: option.missed for option in decision.options}
    assert "memory" in out["BF16"] and "loss" in out["GGUF Q4_K_M"] and "training" in out["QAT Q4_0"]


def test_one_user_leaves_room_for_eight_bits():
    assert decide(replace(CHAT, users=1)).best.technique.name == "GGUF Q8_0"


def test_memory_to_keep_free_counts_as_missing():
    q8 = options(replace(CHAT, keep_free_gib=0))["GGUF Q8_0"]
    assert q8.verdict == "yes" and 0 < hardware.device(CHAT.device).memory_gib - q8.memory_gib < 2
    assert "stay free" in options(CHAT)["GGUF Q8_0"].missed["memory"]


@pytest.mark.slow
def test_a_laptop_reserves_no_memory_for_a_driver():
    """Weights, cache and half a GiB: Q6_K of an 8B model fits into 8 GiB."""
    option = options(LAPTOP)["GGUF Q6_K"]
    weights, cache = capacity.size("Llama-3-8B", "Q6_K").gib, capacity.kv_bytes("Llama-3-8B", 4096) / 2**30
    assert option.memory_gib == pytest.approx(weights + cache + 0.5) and "memory" not in option.missed


@pytest.mark.parametrize("name", [name for name, one in TECHNIQUES.items() if one.needs == "fp8"])
def test_fp8_needs_fp8_units(name):
    assert "FP8 units" in options(replace(SEVEN, device="A100 80 GB SXM"))[name].missed["hardware"]
    assert "hardware" not in options(SEVEN)[name].missed


def test_a_training_budget_brings_qat_in():
    need = replace(SEVEN, prefer="memory", runtime="pytorch", max_loss=0.01)
    assert decide(need).best.technique.name != choosing.AFTER_QAT.name
    best = decide(replace(need, can_train=True)).best
    assert best.technique is choosing.AFTER_QAT
    rows = results.load("qat_recovery", "h200").frame().query("scheme == 'W4A16' and arm == 'QAT, distilled'")
    assert best.loss == pytest.approx(rows.perplexity_ratio.mean() - 1)


# ----------------------------------------------------------------------------------------------- sizes and speeds


def test_sizes_of_pytorch_formats_are_the_measured_ones_at_the_measured_shape():
    recording = choosing.Recording()
    for row in results.on_gpu("tradeoff").rows:
        technique = TECHNIQUES[row["technique"]]
        if row["shape"] == "llama2_7b" and row.get("weights_mb") and not technique.gguf:
            total, read = choosing.weight_bytes(technique, "Llama-2-7B", recording)
            assert total == pytest.approx(1e6 * row["weights_mb"]) and read < total
    bf16 = choosing.weight_bytes(TECHNIQUES["BF16"], "Llama-2-70B", recording)[0]
    assert bf16 == pytest.approx(2 * capacity.parameters("Llama-2-70B"), rel=2e-3)


@pytest.mark.parametrize("users", [1, 8, 32])
def test_the_speed_at_the_measured_shape_is_the_measured_one(users):
    """What the guide says of that GPU, Llama-2-7B and 512 tokens is what was measured, for every technique."""
    run, checked = results.on_gpu("tradeoff"), 0
    found = options(replace(SEVEN, device=run.device, users=users))
    for row in run.rows:
        if (row["shape"], row["batch"]) == ("llama2_7b", users) and row.get("decode_tokens_per_s"):
            assert row["decode_context"] == 512
            low, high = found[row["technique"]].speed
            assert low == pytest.approx(high) and low * users == pytest.approx(row["decode_tokens_per_s"], rel=1e-6)
            assert row in found[row["technique"]].rows
            checked += 1
    assert checked >= 10


def test_the_speed_of_70b_is_the_measured_one():
    run = results.on_gpu("llama70b")
    row = next(row for row in run.rows if (row["kind"], row.get("type"), row.get("batch")) == ("batch", "Q6_K", 8))
    context = int(row["prefill_tokens"] + row["decode_tokens"] / 2)
    low, high = options(replace(CHAT, context=context))["GGUF Q6_K"].speed
    assert low == pytest.approx(high) and 8 * low == pytest.approx(row["decode_tokens_per_s"])


def test_elsewhere_a_speed_is_an_interval_below_the_ceiling():
    found = options(replace(SEVEN, device="L4"))["GGUF Q8_0"]
    low, high = found.speed
    assert 0 < low < high < capacity.ceiling("Llama-2-7B", "Q8_0", 512, 300)
    assert decide(replace(SEVEN, device="L4", tokens_per_s=(low + high) / 2)).options[0].verdict == "unknown"


def test_what_was_not_measured_is_the_ceiling_and_no_pass():
    option = options(CHAT)["GGUF Q4_0"]  # no row of it at 70B
    ceiling = capacity.ceiling("Llama-2-70B", "Q4_0", 4096, 3350, users=8) / 8
    assert option.speed == (0.0, pytest.approx(ceiling)) and "speed" in option.unknown
    assert option.verdict != "yes"
    crowd = options(replace(CHAT, users=64, context=256))["GGUF Q6_K"]  # more users than anybody measured
    assert "speed" in crowd.unknown and crowd.verdict != "yes"
    laptop = decide(LAPTOP)
    assert laptop.best is None and laptop.options[0].technique.name == "GGUF Q6_K"
    assert laptop.sentence.startswith("Nothing is known to do. GGUF Q6_K may") and "Measure it" in laptop.sentence


def test_all_types_of_a_recording_are_treated_alike():
    for kind in ("Q8_0", "Q6_K", "Q4_K_M"):
        assert options(replace(CHAT, max_loss=0.1, keep_free_gib=0))[f"GGUF {kind}"].verdict == "yes"
    fast = decide(replace(CHAT, users=1, max_loss=0.1, prefer="speed"))
    assert fast.best.technique.name == "GGUF Q4_K_M"


def test_without_recordings_nothing_passes(tmp_path):
    for need in (CHAT, SEVEN):
        decision = decide(need, tmp_path)
        assert decision.best is None and {option.verdict for option in decision.options} <= {"unknown", "no"}


def test_a_new_measurement_changes_the_decision(tmp_path):
    directory = copy_of_results(tmp_path)
    path = directory / "h100" / "tradeoff.json"
    data = json.loads(path.read_text("utf-8"))
    for row in data["rows"]:
        if row["technique"] == "GGUF Q6_K" and row["shape"] == "course":
            row["perplexity_ratio"] = 1.02
    path.write_text(results.dumps(data), "utf-8")
    assert decide(CHAT, directory).best is None and "loss" in options(CHAT, directory)["GGUF Q6_K"].missed


# -------------------------------------------------------------------------------------------------- recommendations


def test_the_front_holds_what_nothing_dominates():
    decision = decide(replace(SEVEN, can_train=True))
    passed = [option for option in decision.options if option.verdict == "yes"]
    for option in passed:
        beaten = any(choosing.dominates(other, option) for other in passed)
        assert beaten != (option in decision.front), option.technique.name
    assert len(decision.front) < len(passed)


def test_preferences_order_the_front():
    small, fast, good = (decide(replace(SEVEN, prefer=p)).best for p in ("memory", "speed", "quality"))
    passed = [o for o in decide(SEVEN).options if o.verdict == "yes"]
    assert small.memory_gib == min(o.memory_gib for o in passed)
    assert fast.speed[0] == max(o.speed[0] for o in passed)
    assert good.kld == min(o.kld for o in passed)


@pytest.mark.parametrize("change, said", [
    ({"device": "A100 40 GB"}, "GiB more"),
    ({"users": 64}, "keep all users' contexts within"),
    ({"tokens_per_s": 500.0}, "accept"),
    ({"max_loss": 0.0001, "runtime": "llama.cpp", "users": 32, "context": 512}, "more perplexity"),
    ({"usd_per_hour": 4.0, "max_usd_per_million": 0.01}, "USD"),
])  # fmt: skip
def test_what_is_impossible_says_what_to_relax_with_numbers(change, said):
    decision = decide(replace(CHAT, **change))
    assert decision.best is None
    words = " ".join(relax for option in decision.options for relax in option.relax.values())
    assert said in words
    assert decision.options[0].technique.name in decision.sentence and "\n" not in decision.sentence


def test_relaxing_as_told_makes_it_possible():
    closest = decide(replace(CHAT, device="RTX 4090", max_loss=0.1, tokens_per_s=0)).options[0]
    room = hardware.Device("more", closest.memory_gib + CHAT.keep_free_gib + 0.01, 1008, compute_capability=8.9)
    assert "memory" not in options(replace(CHAT, device=room))[closest.technique.name].missed


@pytest.mark.parametrize("change, said", [
    ({"users": 0}, "users"), ({"context": 1.5}, "context"), ({"tokens_per_s": -1}, "negative"),
    ({"max_loss": math.nan}, "max_loss"), ({"prefer": "luck"}, "prefer"), ({"runtime": "vim"}, "runtime"),
    ({"keep_free_gib": -1}, "keep_free_gib"),
])  # fmt: skip
def test_bad_needs_are_one_sentence(change, said):
    with pytest.raises(QtutorError, match=said):
        decide(replace(CHAT, **change))


def test_unknown_devices_and_models_are_one_sentence():
    for change in ({"device": "Abacus"}, {"model": "Nobody"}):
        with pytest.raises(QtutorError):
            decide(replace(CHAT, **change))


def test_the_frame_has_every_technique():
    frame = decide(CHAT).frame()
    assert set(frame.index) == {n for n, t in TECHNIQUES.items() if not t.emulated and n != "FP32"} | {
        choosing.AFTER_QAT.name}  # fmt: skip
    assert (frame.why != "").all() and not frame.isin(["nan"]).any(axis=None)


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("model, width", [("Llama-2-70B", 8192), ("Llama-2-7B", 4096), ("TinyLlama-1.1B", 2048)])
@pytest.mark.parametrize("tokens", [256, 512, 1024, 2048, 4096, 8192, 16384])
def test_fp8_training_is_recommended_where_it_was_measured_to_pay(model, width, tokens):
    """The recommendation against the recorded map of widths and tokens in a step, point by point."""
    map_ = results.load("fp8_breakeven", "h100").frame().query("graph").set_index(["hidden", "tokens"]).speedup
    chosen = choosing.training(model, "H100 SXM", tokens).index[0]
    assert chosen == ("BF16" if map_[width, tokens] < 1 else "FP8 delayed")


def test_training_says_why_not():
    ada, old = (choosing.training("TinyLlama-1.1B", device) for device in ("L4", "A100 80 GB SXM"))
    assert "9.0" in ada["why not"]["FP8 block"] and ada.index[0] == "FP8 delayed"
    assert old.index[0] == "BF16" and not old["will do"].drop("BF16").any()


def test_a_recipe_whose_loss_drifts_is_out(tmp_path):
    directory = copy_of_results(tmp_path)
    path = directory / "h100" / "fp8_loss.json"
    data = json.loads(path.read_text("utf-8"))
    for row in data["rows"]:
        row["held_out_nats"] += 0.1 * (row["recipe"] == "FP8 delayed")
    path.write_text(results.dumps(data), "utf-8")
    found = choosing.training("Llama-2-70B", "H200", directory=directory)
    assert found.index[0] == "FP8 current" and "loss" in found["why not"]["FP8 delayed"]
    path.unlink()
    assert choosing.training("Llama-2-70B", "H200", directory=directory)["why not"]["FP8 current"]
