"""The decision guide: it rests on rows, what is unknown is no pass, and what cannot be done says so."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recorded_rows import H100, saved, served

from qtutor import QtutorError, llamacpp, results
from qtutor.decide import capacity, choosing, hardware, pareto, speed
from qtutor.decide.choosing import Need, Option, decide
from qtutor.decide.quality import Known
from qtutor.decide.techniques import TECHNIQUES

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])
CHAT = Need(model="Llama-2-70B", device="H100 SXM", users=8, tokens_per_s=10, max_loss=0.005, keep_free_gib=2)
LAPTOP = Need(model="Llama-3-8B", device=hardware.Device("laptop", 8, 60, 30), tokens_per_s=8, max_loss=0.05)
SEVEN = Need(model="Llama-2-7B", device="H100 SXM", context=512)


def options(need, directory=None):
    return {option.name: option for option in decide(need, directory).options}


def copy_of_results(folder: Path) -> Path:
    """A copy without rows of servers, so that a test may add its own."""
    shutil.copytree(results.RESULTS, folder / "results", ignore=shutil.ignore_patterns("serving.json"))
    for path in folder.glob("results/*/llama70b.json"):
        data = json.loads(path.read_text("utf-8"))
        data["rows"] = [row for row in data["rows"] if row["kind"] != "served"]
        path.write_text(results.dumps(data), "utf-8") if data["rows"] else path.unlink()
    return folder / "results"


# ------------------------------------------------------------------------------------------------------ constraints


def test_memory_is_the_plan_of_llama_cpp():
    for kv_type in ("F16", "Q8_0"):
        name = "GGUF Q6_K" + (", Q8_0 cache" if kv_type == "Q8_0" else "")
        fit = capacity.fits("Llama-2-70B", "Q6_K", 4096, "H100 SXM", kv_type, users=8)
        assert options(CHAT)[name].known["memory"].mid == pytest.approx(fit.total_gib, abs=0.01)


def test_a_smaller_cache_lets_a_larger_type_in():
    """Q8_0 with a Q8_0 cache fits where Q8_0 with F16 does not (its speed with that cache is another question)."""
    found = options(CHAT)
    assert "memory" in found["GGUF Q8_0"].missed and "memory" not in found["GGUF Q8_0, Q8_0 cache"].missed
    assert decide(replace(CHAT, users=1)).best.name == "GGUF Q8_0"


def test_memory_to_keep_free_counts_as_missing():
    q8 = options(replace(CHAT, keep_free_gib=0))["GGUF Q8_0"]
    assert q8.verdict == "yes" and 0 < hardware.device(CHAT.device).memory_gib - q8.known["memory"].mid < 2
    assert "stay free" in options(CHAT)["GGUF Q8_0"].missed["memory"]


def test_sixteen_bits_need_two_cards():
    found = options(replace(CHAT, cards=2))
    assert "memory" in found["vLLM BF16"].missed and "memory" not in found["vLLM BF16, 2 cards by tensor"].missed


@pytest.mark.slow
def test_a_laptop_reserves_no_memory_for_a_driver():
    """Weights, cache and half a GiB: Q6_K of an 8B model fits into 8 GiB."""
    option = options(LAPTOP)["GGUF Q6_K"]
    weights, cache = capacity.size("Llama-3-8B", "Q6_K").gib, capacity.kv_bytes("Llama-3-8B", 4096) / 2**30
    assert option.known["memory"].mid == pytest.approx(weights + cache + 0.5) and "memory" not in option.missed


@pytest.mark.parametrize("name", [name for name, one in (TECHNIQUES | speed.VLLM).items() if one.needs == "fp8"])
def test_fp8_needs_fp8_units(name):
    assert "FP8 units" in options(replace(SEVEN, device="A100 80 GB SXM"))[name].missed["hardware"]
    assert "hardware" not in options(SEVEN)[name].missed


def test_a_training_budget_brings_qat_in():
    assert "training" in options(SEVEN)["QAT Q4_0"].missed
    assert "training" not in options(replace(SEVEN, can_train=True))["QAT Q4_0"].missed


def test_licence_and_engine():
    assert "not open source" in options(replace(CHAT, licence="open source"))["GGUF Q6_K"].missed["licence"]
    mixtral = options(replace(CHAT, model="Mixtral-8x7B", licence="open source", engine="vLLM"))
    assert "licence" not in mixtral["vLLM FP8"].missed and "engine" in mixtral["GGUF Q6_K"].missed


def test_a_first_token_within_a_limit(tmp_path):
    """A prompt of 4,096 tokens waits four seconds in llama.cpp."""
    need = replace(CHAT, prompt=4096)
    assert 3 < options(need)["GGUF Q6_K"].known["first token"].low < 4.1
    assert "first token" in options(replace(need, ttft_ms=2000))["GGUF Q6_K"].missed
    assert "first token" not in options(replace(need, ttft_ms=8000))["GGUF Q6_K"].missed
    assert "first token" in options(replace(need, ttft_ms=8000), tmp_path)["GGUF Q6_K"].unknown


# -------------------------------------------------------------------------------------------------- what is unknown


def test_what_was_not_measured_is_the_ceiling_and_no_pass():
    option = options(CHAT)["GGUF Q4_0"]  # no row of it at 70B
    ceiling = capacity.ceiling("Llama-2-70B", "Q4_0", 4096, 3350, users=8) / 8
    assert (option.known["tokens/s"].low, option.known["tokens/s"].high) == (0, pytest.approx(ceiling))
    assert "tokens/s" in option.unknown and option.verdict != "yes"
    crowd = options(replace(CHAT, users=64, context=256))["GGUF Q6_K"]  # more users than anybody measured
    assert "tokens/s" in crowd.unknown and crowd.verdict != "yes"
    laptop = decide(LAPTOP)
    assert laptop.best is None and laptop.options[0].verdict == "unknown"
    assert laptop.sentence.startswith("No option is known to meet the requirements. ")
    assert "Measure it" in laptop.sentence


def test_an_interval_around_the_limit_is_unknown():
    option = Option(TECHNIQUES["BF16"])
    option.hold("tokens/s", Known(8, 12, ""), low=10)
    assert option.verdict == "unknown" and "8 to 12" in option.unknown["tokens/s"]
    option.hold("loss", Known(0.01, 0.02, ""), high=0.005)
    assert option.verdict == "no" and option.factor == pytest.approx(2)


def test_a_loss_known_for_other_models_only_says_so():
    option = options(replace(CHAT, users=1))["GGUF Q8_0"]
    assert option.known["loss"].source.startswith("interpolated") and option.verdict == "yes"
    fp8 = options(CHAT)["vLLM FP8"]
    assert fp8.known["loss"].low < CHAT.max_loss < fp8.known["loss"].high and "loss" in fp8.unknown


def test_a_yes_says_what_it_is_carried_over_from():
    """On a card that nobody measured, of a type whose loss is another model's."""
    found = decide(Need("Llama-3-8B", "L40S", users=4, context=8192, max_loss=0.02, prefer="money"))
    assert found.best.name == "vLLM FP8"
    assert found.sentence.endswith("Test it first: loss interpolated and tokens/s modelled.")
    assert found.frame().loc["vLLM FP8", "why"].endswith("front; loss interpolated; tokens/s modelled")
    assert not options(SEVEN)["GGUF Q6_K"].guesses  # published and measured


def test_without_recordings_nothing_passes(tmp_path):
    for need in (CHAT, SEVEN):
        decision = decide(need, tmp_path)
        assert decision.best is None and {option.verdict for option in decision.options} <= {"unknown", "no"}


# --------------------------------------------------------------------------------------------------- it follows rows


def test_the_chat_service_is_what_the_rows_say():
    """Case one, of whatever is recorded: what is advised passes every limit by its worse end, and nothing that passes
    is surely better."""
    for prefer in choosing.PREFER:
        decision = decide(replace(CHAT, cards=2, prefer=prefer))
        best, axis = decision.best, choosing.PREFER[prefer]
        assert best.known["tokens/s"].low >= 9.98 and best.known["loss"].high <= 0.005 * 1.001
        assert best.known["memory"].mid <= best.cards * hardware.device("H100 SXM").memory_gib - 2
        passed = [o for o in decision.options if o.verdict == "yes"]
        assert nearly_least(best, passed, axis)


def test_new_rows_change_the_advice(tmp_path):
    """FP8 in vLLM, served on one card and known to lose nothing, takes the place of Q6_K; two cards cost twice."""
    directory = copy_of_results(tmp_path)
    need = replace(CHAT, cards=2, prefer="money", max_loss=0.02, context=2048)
    before = decide(need, directory).best
    saved(directory, "llama70b", H100, [
        served("FP8", users=8, step_ms=26, kv_tokens=60_000),
        served("FP8", users=8, step_ms=16, cards=2, split="tensor", kv_tokens=300_000),
        served("BF16", users=8, step_ms=40, cards=2, split="tensor", kv_tokens=120_000)])  # fmt: skip
    found, after = options(need, directory), decide(need, directory).best
    assert after.name == "vLLM FP8" != before.name
    usd = {name: found[name].known["USD"].mid for name in (before.name, "vLLM FP8", "vLLM BF16, 2 cards by tensor")}
    assert usd["vLLM FP8"] < usd[before.name] < usd["vLLM BF16, 2 cards by tensor"]
    strict = decide(replace(need, max_loss=0.005), directory)
    assert "loss" in {o.name: o for o in strict.options}["vLLM FP8"].unknown  # what FP8 loses at 70B is not known
    bf16, best = found["vLLM BF16, 2 cards by tensor"], decide(replace(need, prefer="quality"), directory).best
    assert best is bf16 or best.known["loss"].high < 0.001 and better(best, bf16)  # nobody pays for 0.1 %


def test_the_cache_that_vllm_reports_decides_over_the_plan(tmp_path):
    saved(tmp_path, "llama70b", H100, [served("FP8", users=8, kv_tokens=10_000)])
    fp8 = options(CHAT, tmp_path)["vLLM FP8"]
    assert "memory" in fp8.missed and "10,000 tokens" in fp8.known["memory"].source
    assert "memory" not in options(replace(CHAT, context=1024, keep_free_gib=0), tmp_path)["vLLM FP8"].missed
    over = (8 * 4096 - 10_000) * 2 * 2 * 80 * 8 * 128 / 2**30  # keys and values of 80 layers, 8 heads, 16 bits
    over -= (1 - choosing.VLLM_SHARE) * hardware.device("H100 SXM").memory_gib  # which vLLM left alone in the recording
    for free in (0, 2):  # what is needed does not depend on what is to stay free; what must be found does
        found = options(replace(CHAT, keep_free_gib=free), tmp_path)["vLLM FP8"]
        assert found.known["memory"].mid == pytest.approx(hardware.device("H100 SXM").memory_gib + over)
        assert found.relax["memory"].startswith(f"find {over + free:.1f} GiB more")


def test_goodput_comes_from_rows_of_this_very_model(tmp_path):
    row = {"kind": "best", "runtime": "vLLM", "type": "FP8", "shape": "Llama-2-7B", "cards": 1, "kv_type": "BF16",
           "goodput_per_s": 20.0, "rate_lost_per_s": 28.0}  # fmt: skip
    saved(tmp_path, "serving", H100, [row])
    asked = replace(SEVEN, goodput_per_s=10)
    assert options(asked, tmp_path)["vLLM FP8"].known["goodput"].low == 20
    assert "20 to 28 requests/s" in options(replace(asked, goodput_per_s=25), tmp_path)["vLLM FP8"].unknown["goodput"]
    assert "goodput" in options(replace(asked, goodput_per_s=30), tmp_path)["vLLM FP8"].missed
    assert "goodput" in options(replace(asked, model="Llama-2-13B"), tmp_path)["vLLM FP8"].unknown


def test_a_worse_measurement_changes_the_decision(tmp_path):
    directory = copy_of_results(tmp_path)
    path = directory / "h100" / "llama70b.json"
    data = json.loads(path.read_text("utf-8"))
    data["rows"] = [row | ({"decode_tokens_per_s": 40.0} if row.get("batch") == 8 and row["kind"] == "batch" else {})
                    for row in data["rows"]]  # fmt: skip
    path.write_text(results.dumps(data), "utf-8")
    assert "tokens/s" in options(CHAT, directory)["GGUF Q6_K"].missed


# -------------------------------------------------------------------------------------------------- recommendations


def nearly_least(best: Option, passed: list[Option], axis: str) -> bool:
    """No option has less on an axis, but for what does not count as a difference."""
    least = min(o.known[axis].high for o in passed if axis in o.known)
    return best.known[axis].high <= 1.1 * least + 0.001 * (axis == "loss")


def better(one: Option, other: Option) -> bool:
    """By the course's one rule: larger on no axis, smaller on one."""
    found = []
    for axis in choosing.PREFER.values():
        a, b = (np.array([x.mid, x.low, x.high]) + (axis == "loss") if (x := o.known.get(axis)) else [np.nan] * 3
                for o in (one, other))  # fmt: skip
        found.append(float(pareto.difference(a, b, choosing.AXES[axis].tolerance)))
    return set(found) <= {0.0, -1.0} and -1.0 in found


def test_the_front_holds_what_nothing_surely_beats():
    decision = decide(SEVEN)
    passed = [option for option in decision.options if option.verdict == "yes"]
    for option in passed:
        beaten = any(better(other, option) for other in passed if other is not option)
        assert beaten == (option not in decision.front), option.name
    assert 1 < len(decision.front) < len(passed)


def test_intervals_keep_what_values_alone_would_drop():
    made = [Option(TECHNIQUES["BF16"], known={"USD": Known(*usd, ""), "loss": Known(*loss, "")})
            for usd, loss in (((1, 2), (0, 0.01)), ((1.5, 3), (0, 0.02)), ((4, 5), (0.02, 0.03)))]  # fmt: skip
    assert [o.place for o in made if choosing.place(made)] == ["open", "open", "dominated"]


def test_preferences_order_the_front():
    for prefer, axis in choosing.PREFER.items():
        passed = [o for o in decide(replace(SEVEN, prefer=prefer)).options if o.verdict == "yes"]
        assert nearly_least(decide(replace(SEVEN, prefer=prefer)).best, passed, axis)


def test_money_and_energy_follow_time():
    option = options(replace(SEVEN, usd_per_hour=3.6))["GGUF Q6_K"]
    speeds, usd, kwh = (option.known[key] for key in ("tokens/s", "USD", "kWh"))
    assert usd.low == pytest.approx(1000 / speeds.high) and usd.high == pytest.approx(1000 / speeds.low)
    (row,) = (r for run in results.on_all("tradeoff") for r in run.rows if r.get("joules_per_decode_token")
              and (r["shape"], r["technique"], r["batch"]) == ("llama2_7b", "GGUF Q6_K", 1))  # fmt: skip
    assert kwh.low <= row["joules_per_decode_token"] / 3.6 <= kwh.high


def test_what_would_change_it_is_true():
    """More users than it says do not fit, as many do; a measurement that it asks for is of an unknown option."""
    decision = decide(replace(CHAT, users=1))
    said = next(text for text in decision.changes() if text.startswith("More than"))
    most, best = int(said.split()[2]), decision.best
    kept = hardware.device(CHAT.device).memory_gib - CHAT.keep_free_gib
    for users, fits in ((most, True), (most + 1, False)):
        plan = capacity.fits("Llama-2-70B", best.technique.gguf, 4096, CHAT.device, best.kv_type, users)
        assert (plan.total_gib <= kept + 0.15) == fits  # buffers grow a little with users
    unknown = {o.name for o in decision.options if o.verdict == "unknown"}
    asked = [text for text in decision.changes() if text.startswith("A measurement of")]
    assert asked and all(any(name in text for name in unknown) for text in asked)


def test_every_number_has_a_source():
    decision = decide(replace(CHAT, users=1))
    table = decision.sources()
    assert {"memory", "tokens/s", "loss", "USD", "kWh", "g CO2e", "first token"} <= set(table.index)
    assert (table["source"] != "").all() and (table["value"] != "").all()


@pytest.mark.parametrize("change, said", [
    ({"device": "A100 40 GB"}, "GiB more"),
    ({"users": 64}, "keep all users' contexts within"),
    ({"tokens_per_s": 500.0}, "accept"),
    ({"max_loss": 0.0001, "engine": "llama.cpp", "users": 32, "context": 512}, "%"),
    ({"usd_per_hour": 4.0, "max_usd_per_million": 0.01}, "USD"),
])  # fmt: skip
def test_what_is_impossible_says_what_to_relax_with_numbers(change, said):
    decision = decide(replace(CHAT, **change))
    assert decision.best is None
    words = " ".join(relax for option in decision.options for relax in option.relax.values())
    assert said in words
    assert decision.options[0].name in decision.sentence and "\n" not in decision.sentence


def test_what_does_not_fit_stops_there():
    """Nobody accepts a speed of what has no room; the price of one user is no price of a service."""
    said = decide(replace(CHAT, device="RTX 4090", tokens_per_s=300, max_loss=0.02)).sentence
    assert "does not fit" in said and "as well" in said and "ccept" not in said
    said = decide(replace(SEVEN, max_usd_per_million=0.01)).sentence
    assert "for one user, or let more users share the card" in said
    assert "one user" not in decide(replace(SEVEN, max_usd_per_million=0.01, users=8)).sentence


def test_relaxing_as_told_makes_it_possible():
    closest = decide(replace(CHAT, device="RTX 4090", max_loss=0.1, tokens_per_s=0, engine="llama.cpp")).options[0]
    room = hardware.Device("more", closest.known["memory"].mid + CHAT.keep_free_gib + 0.01, 1008, 450, 8.9)
    assert "memory" not in options(replace(CHAT, device=room))[closest.name].missed


def test_a_mixture_reads_more_with_more_users():
    need = Need(model="Mixtral-8x7B", device="H100 SXM", context=1024)
    found = [options(replace(need, users=users))["GGUF Q4_K_M"] for users in (1, 8)]
    assert all("tokens/s" in option.unknown for option in found)  # rows of dense models only
    one, eight = (option.known["tokens/s"].high for option in found)
    assert 2 < one / eight < 8  # a dense model's steps for one and eight users read nearly the same


@pytest.mark.parametrize("change, said", [
    ({"users": 0}, "users"), ({"context": 1.5}, "context"), ({"tokens_per_s": -1}, "negative"), ({"cards": 0}, "cards"),
    ({"max_loss": math.nan}, "max_loss"), ({"prefer": "luck"}, "prefer"), ({"engine": "vim"}, "engine"),
    ({"keep_free_gib": -1}, "keep_free_gib"), ({"kv_type": "Q1"}, "kv_type"),
])  # fmt: skip
def test_bad_needs_are_one_sentence(change, said):
    with pytest.raises(QtutorError, match=said):
        decide(replace(CHAT, **change))


def test_unknown_devices_and_models_are_one_sentence():
    for change in ({"device": "Abacus"}, {"model": "Nobody"}):
        with pytest.raises(QtutorError):
            decide(replace(CHAT, **change))


def test_the_frame_has_every_technique():
    decision = decide(replace(CHAT, cards=2))
    frame = decision.frame()
    shown = {o.technique.name for o in decision.options}
    assert shown == {n for n, t in TECHNIQUES.items() if not t.emulated and n != "FP32"} | set(speed.VLLM)
    assert (frame.why != "").all() and not frame.isin(["nan"]).any(axis=None) and frame.index.is_unique
