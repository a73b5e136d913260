"""Losses: published with a source, else a range over other models, else unknown."""

from __future__ import annotations

import pytest

from qtutor import results
from qtutor.decide import quality


def test_every_published_loss_has_a_source():
    found = quality.published()
    assert len(found) > 15
    for (model, kind), loss in found.items():
        assert "https://" in loss.source and loss.low <= loss.high, (model, kind)


@pytest.mark.parametrize("model, kind, perplexity, base", [
    ("Llama-2-70B", "Q6_K", 3.4367, 3.4313), ("Llama-2-70B", "Q5_K_M", 3.4451, 3.4313),
    ("Llama-2-70B", "Q4_K_M", 3.4725, 3.4313), ("Llama-2-70B", "Q2_K", 3.7339, 3.4313),
    ("Llama-2-70B", "W4A16", 3.41, 3.32), ("Llama-2-7B", "W4A16", 5.60, 5.47), ("Llama-2-13B", "W4A16", 4.97, 4.88),
    ("Llama-3.1-8B", "FP8", 7.4197, 7.3315),
])  # fmt: skip
def test_published_losses_are_ratios_of_the_published_perplexities(model, kind, perplexity, base):
    assert quality.published()[model, kind].mid == pytest.approx(perplexity / base - 1, abs=6e-5)


def test_the_loss_of_llama_3_8b_agrees_with_the_reference_file():
    """The other file of the same source: perplexities over F16's."""
    import pandas as pd

    from qtutor import files

    table = pd.read_csv(files.DATA / "reference/llama3_8b_types.csv", comment="#").query("not imatrix")
    perplexity = table.set_index("type")["perplexity"]
    for (model, kind), loss in quality.published().items():
        if model == "Llama-3-8B":
            assert loss.mid == pytest.approx(perplexity[kind] / 6.231633 - 1, abs=2e-5)  # its base: README's PPL(base)


def test_what_is_not_published_is_a_range_over_other_models_and_says_so():
    loss = quality.loss("Q8_0", "Llama-2-70B")
    others = [quality.published()[model, "Q8_0"] for model in ("Llama-2-7B", "Llama-3-8B")]
    assert loss.source.startswith("interpolated") and quality.COURSE in loss.source
    assert loss.low <= min(x.low for x in others) and loss.high >= max(x.high for x in others)
    assert quality.loss("Q6_K", "Llama-2-70B") == quality.published()["Llama-2-70B", "Q6_K"]


def test_one_model_bounds_no_other(tmp_path):
    """Without the recordings FP8 is known for one model only: unknown for all others."""
    assert quality.loss("FP8", "Llama-2-70B") is not None
    assert quality.loss("FP8", "Llama-2-70B", tmp_path) is None
    assert quality.loss("FP8", "Llama-3.1-8B", tmp_path) is not None


def test_unknown_types_are_none():
    assert quality.loss("NF4", "Llama-2-70B") is None and quality.cache_loss("FP8") is None


def test_sixteen_bits_lose_nothing():
    assert quality.loss("BF16", "Llama-2-70B").high == 0 == quality.cache_loss("F16").high


def test_the_cache_costs_what_was_measured():
    loss = quality.cache_loss("Q8_0")
    rows = [row for row in results.load("kv_cache_quality", "cpu").rows if row["kv_type"] == "Q8_0" and row["rotation"]]
    assert all(loss.low <= row["kld_mean"] <= loss.high for row in rows)
