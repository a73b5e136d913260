"""Scores of single tensors, mixtures by them, and quantized KV caches: recorded in small, and as recorded."""

import pytest

from qtutor import llamacpp, results
from tools import record_bits

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason="llama.cpp is needed")


@pytest.mark.slow
def test_sensitivity_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(record_bits, "KINDS", ("Q3_K", "Q6_K"))
    monkeypatch.setattr(record_bits, "RIVALS", ("Q4_K_S",))
    path = record_bits.record_sensitivity(False, directory=tmp_path)
    rows = results.Results.model_validate_json(path.read_text()).rows
    single = {(row["tensor"], row["type"]): row["kld_mean"] for row in rows if "tensor" in row}
    mixed = {row["mixture"]: row for row in rows if "mixture" in row}
    assert single["token_embd.weight", "Q3_K"] > 1e-3  # a tied embedding is the head, too: it must count
    assert all(single[name, "Q3_K"] > single[name, "Q6_K"] for name, _ in single)
    total = sum(value for (_, kind), value in single.items() if kind == "Q6_K")
    assert mixed["all Q6_K"]["kld_predicted"] == pytest.approx(total, rel=1e-5)  # six digits are kept
    assert mixed["by scores, size of Q4_K_S"]["file_bytes"] <= mixed["Q4_K_S, imatrix"]["file_bytes"]


@pytest.mark.slow
def test_a_search_lowers_kld(tmp_path):
    path = record_bits.record_search(False, directory=tmp_path)
    rows = {(row["type"], row["arm"]): row for row in results.Results.model_validate_json(path.read_text()).rows}
    assert all(rows[kind, "ones"]["kld_mean"] < rows[kind, "without"]["kld_mean"] for kind, _ in rows)
    assert all(rows[kind, "without"]["nll_less_rival"] == 0 for kind, _ in rows)


@pytest.mark.slow
def test_fewer_bits_in_the_cache_cost_more(tmp_path):
    path = record_bits.record_kv(False, directory=tmp_path)
    rows = results.Results.model_validate_json(path.read_text()).rows
    for ctx in (512, 1024):
        kld = {row["kv_type"]: row["kld_mean"] for row in rows if row["ctx"] == ctx and not row["rotation"]}
        assert kld["F16"] < 1e-5 < kld["Q8_0"] < kld["Q5_1"] < kld["Q4_0"]
        rotated = {row["kv_type"]: row["kld_mean"] for row in rows if row["ctx"] == ctx and row["rotation"]}
        assert all(rotated[kind] != kld[kind] for kind in rotated)  # the switch reaches llama.cpp


def test_what_the_recording_says():
    """The conclusions of the notebook."""
    rows = results.load("tensor_sensitivity", "cpu").rows
    chosen = [row for row in rows if "kld_less_rival" in row]
    assert len(chosen) == 4 and all(row["kld_less_rival_high"] < 0 for row in chosen)
