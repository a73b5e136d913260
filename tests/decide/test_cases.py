"""The four cases of the course as the recorded rows decide them today.

Each test fails when new rows change the advice: then read what the notebook says of that case, and change both.
"""

from __future__ import annotations

import pytest

from qtutor import llamacpp
from qtutor.decide import hardware, training
from qtutor.decide.choosing import Need, decide

CHAT = Need(model="Llama-2-70B", device="H100 SXM", cards=2, users=8, context=4096, tokens_per_s=10, max_loss=0.005,
            keep_free_gib=2)  # fmt: skip
native = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


def changed(case: str, advice: str) -> str:
    return f"the rows now advise {advice} in case {case}: change the notebook's words, then this test"


@native
@pytest.mark.parametrize("prefer", ["money", "energy", "quality"])
def test_case_one_70b_for_eight_users(prefer):
    """16 bits on two cards that work at once cost less a token than six bits on one in llama.cpp.  With one card, who
    prefers quality gets eight bits, for weights and cache."""
    decision = decide(Need(**vars(CHAT) | {"prefer": prefer}))
    assert decision.best and decision.best.name == "vLLM BF16, 2 cards by tensor", changed("one", decision.sentence)
    one = decide(Need(**vars(CHAT) | {"prefer": prefer, "cards": 1}))
    kind = "GGUF Q8_0, Q8_0 cache" if prefer == "quality" else "GGUF Q6_K"
    assert one.best and one.best.name == kind, changed("one, a single card", one.sentence)


@native
def test_case_one_what_is_not_known_yet():
    """FP8 on two cards: no rows, so no pass.  FP8 on one card would cost less than all that is known to do: what it
    loses at 70B decides, and with a cache in FP8 what that loses."""
    found = {option.name: option for option in decide(CHAT).options}
    two = "vLLM FP8, 2 cards by tensor"
    assert "tokens/s" in found[two].unknown, changed("one", f"something of {two}")
    both = found["vLLM BF16, 2 cards by tensor"].known["USD"]
    for name in ("vLLM FP8", "vLLM FP8, FP8 cache"):
        eight = found[name]
        assert not eight.missed and list(eight.unknown) == ["loss"], changed("one", name)
        assert eight.known["USD"].high < both.low, changed("one", f"the price of {name}")
    assert "twice those in BF16" in eight.known["memory"].source


@native
def test_case_one_with_shorter_contexts_and_more_loss():
    """FP8 in vLLM on one card, where 2,048 tokens of context and 1.5 % of perplexity will do."""
    decision = decide(Need(**vars(CHAT) | {"prefer": "money", "context": 2048, "max_loss": 0.015, "keep_free_gib": 0}))
    assert decision.best and decision.best.name == "vLLM FP8", changed("one", decision.sentence)


@native
def test_case_two_a_laptop():
    laptop = hardware.Device("laptop", 16e9 / 2**30, gb_per_s=60, watts=30)
    decision = decide(Need("Llama-3-8B", laptop, context=4096, keep_free_gib=4, tokens_per_s=5, max_loss=0.03))
    may = [option.technique.gguf for option in decision.options if option.verdict == "unknown" and
           option.kv_type == "F16"]  # fmt: skip
    assert decision.best is None and may == ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"], changed("two", decision.sentence)


def test_case_three_fine_tuning():
    table = training.finetuning("H200")
    fastest, passed = table.index[0], table.index[table["will do"] == "yes"]
    assert fastest == "full FP8 current, TE" and passed[0] == "full BF16, TE", changed("three", table.index[0])
    assert table.loc[fastest, "will do"] == "speed only", changed("three", "a tested FP8")
    assert table.loc["full FP8 delayed, TE", "will do"] == "unknown", changed("three", "FP8 delayed")


def test_case_four_pretraining():
    table = training.pretraining(64, "Llama-2-70B", tokens=8192)
    assert table.index[0] == "FP8 current + FP8 weights", changed("four", table.index[0])
    assert list(table.index[table["will do"] == "yes"]) == ["BF16"], changed("four", "a tested FP8")
    for change in ({"tokens": 16384}, {"tokens": 8192, "between_hosts_gb_per_s": 200}):  # the words beside the table
        assert training.pretraining(64, "Llama-2-70B", **change).index[0] == "FP8 current", changed("four", str(change))
