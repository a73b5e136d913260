"""record_gguf: errors against simulation, a recording of a few types, and what is recorded in the project."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny_llama

from qtutor import QtutorError, files, gguf_export, llamacpp, results
from qtutor.checkpoints import fetch
from tools import record_gguf

needs_llamacpp = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


def test_published_table():
    """The notebook's reference: llama.cpp's scoreboard."""
    table = pd.read_csv(files.DATA / "reference" / "llama3_8b_types.csv", comment="#").set_index(["type", "imatrix"])
    assert len(table) == 34 and table.index.is_unique
    assert set(table.index.get_level_values(0)) <= set(llamacpp.TYPES)
    # llama-quantize --help gives the increase of perplexity over FP16 of the same table
    base = 6.233160 - 0.001524
    for name, increase in {"Q4_0": 0.4685, "Q5_K_M": 0.0569, "Q6_K": 0.0217, "Q3_K_S": 1.6321, "Q2_K": 3.5199}.items():
        assert table.loc[(name, False), "perplexity"] - base == pytest.approx(increase, abs=1e-4)
    assert table.loc[("Q4_K_M", False), "same_top"] == pytest.approx(0.91901)
    assert np.isnan(table.loc[("Q4_K_M", True), "same_top"])
    assert 4.8 < 8 * table.loc[("Q4_K_M", False), "gib"] * 2**30 / 8_030_261_248 < 5.0
    assert (table["kld_mean_se"] > 0).all() and (table["delta_p_rms"] < 1).all()


def test_error_of_a_percentile_is_of_the_right_size():
    rng, values, errors = np.random.default_rng(0), [], []
    for _ in range(300):
        sample = rng.exponential(size=4000)
        values.append(np.percentile(sample, 99))
        errors.append(record_gguf.percentile_se(sample, 99))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    # of an exponential: sqrt(q / (1 - q) / n)
    assert np.mean(errors) == pytest.approx(np.sqrt(0.99 / 0.01 / 4000), rel=0.15)


@pytest.mark.slow
@needs_llamacpp
def test_recording(tmp_path):
    names = ["Q8_0", "Q4_0", "IQ2_XS", "TQ1_0", "MXFP4"]
    path = record_gguf.record(False, windows=2, ctx=64, calibration=4, names=names, directory=tmp_path)
    data = json.loads(path.read_text("utf-8"))
    rows = {(row["type"], row["imatrix"]): row for row in data["rows"]}
    assert list(rows) == [("Q8_0", False), ("Q4_0", False), ("Q4_0", True), ("IQ2_XS", True), ("TQ1_0", False),
                          ("MXFP4", False)]  # fmt: skip
    assert [r["type"] for r in rows.values() if r["imatrix_ignored"]] == ["Q8_0", "TQ1_0", "MXFP4"]
    gain = rows["Q4_0", False]["kld_mean"] - rows["Q4_0", True]["kld_mean"]
    informed = rows["Q4_0", True]
    assert informed["imatrix_gain"] == pytest.approx(gain, rel=1e-3) and informed["scored_tokens"] == 126
    assert rows["IQ2_XS", True]["imatrix_gain"] is None and rows["Q8_0", False]["kld_mean"] < gain + 1
    for row in rows.values():
        assert row["windows"] == 2 and row["calibration_tokens"] == 256 and len(row["text"]) == 12
        for key in ("perplexity", "kld_mean", "kld_p999", "delta_p_rms", "same_top"):
            assert row[key + "_se"] >= 0
    assert results.validate(data).profile == "quick" and data["name"] == "gguf_quality"


@needs_llamacpp
def test_a_misspelt_type_is_found_before_the_work():
    with pytest.raises(QtutorError, match="Q9"):
        record_gguf.record(False, names=["Q9"])


@needs_llamacpp
def test_same_tensors(tmp_path):
    f32 = gguf_export.export(tiny_llama.model(layers=1), tmp_path / "f.gguf", tokenizer=tiny_llama.tokenizer())
    one = llamacpp.quantize(f32, tmp_path / "a.gguf", "Q4_0")
    other = llamacpp.quantize(f32, tmp_path / "b.gguf", "Q4_0")
    assert record_gguf.same_tensors(one, other) and not record_gguf.same_tensors(one, f32)
    data = bytearray(other.read_bytes())
    data[-40] ^= 1
    other.write_bytes(data)
    assert not record_gguf.same_tensors(one, other)


def test_what_is_recorded_in_the_project_is_complete():
    """Every type that llama.cpp offers, with its errors; the notebook shows this table."""
    data = results.load("gguf_quality", "cpu")
    assert {row["type"] for row in data.rows} == set(llamacpp.TYPES) - {"F32"}
    for row in data.rows:
        quant = llamacpp.TYPES[row["type"]]
        assert row["imatrix"] or not quant.needs_imatrix
        assert row["imatrix_ignored"] or quant.needs_imatrix or (row["type"], True) in {
            (r["type"], r["imatrix"]) for r in data.rows}  # fmt: skip


@needs_llamacpp
def test_recording_of_a_fetched_model(tmp_path, monkeypatch):
    """The parent, its float weights and what is made of them: a tiny model in the place of the real one."""
    home = tiny_llama.save(tmp_path / "home")
    f32 = gguf_export.export(home, tmp_path / "f32.gguf")
    llamacpp.quantize(f32, home / fetch.FILE, "Q4_1")
    monkeypatch.setattr(fetch, "folder", lambda: home)
    path = record_gguf.record_smollm2(
        False, windows=2, ctx=64, calibration=4, names=["Q8_0", "Q4_0", "IQ2_M"], directory=tmp_path)  # fmt: skip
    data = results.validate(json.loads(path.read_text("utf-8")))
    rows = {(row["type"], row["imatrix"], row["kind"]): row for row in data.rows}
    assert list(rows) == [("F16", False, "float"), ("Q4_1", False, "downloaded"), ("Q8_0", False, "float"),
                          ("Q8_0", False, "requantized"), ("Q4_0", False, "float"), ("Q4_0", True, "float"),
                          ("IQ2_M", True, "float")]  # fmt: skip
    base = rows["F16", False, "float"]
    assert base["kld_mean"] < 1e-9 and base["perplexity_ratio"] == pytest.approx(1)
    assert base["stored_as"] == "F16 100 %" and "Q4_1" in rows["Q4_1", False, "downloaded"]["stored_as"]
    for row in data.rows:
        assert row["perplexity_ratio_low"] <= row["perplexity_ratio"] <= row["perplexity_ratio_high"]
        assert row["kld_mean_low"] <= row["kld_mean"] <= row["kld_mean_high"] and row["kld_mean_se_windows"] >= 0
    monkeypatch.setattr(fetch, "folder", lambda: None)
    with pytest.raises(QtutorError, match="model fetch smollm2"):
        record_gguf.record_smollm2(False)


def test_what_is_recorded_of_smollm2_has_its_yardstick_and_its_errors():
    data = results.load("smollm2_quality", "cpu")
    assert len({row["type"] for row in data.rows}) >= 12
    kinds = {(row["type"], row["kind"]) for row in data.rows if not row["imatrix"]}
    assert {("F16", "float"), ("Q4_1", "downloaded"), ("Q4_K_M", "float"), ("Q4_K_M", "requantized")} <= kinds
    for row in data.rows:
        assert row["windows"] >= 8 and row["ctx"] == 512 and row["kld_mean_se_windows"] >= 0
        assert row["perplexity_ratio_low"] <= row["perplexity_ratio"] <= row["perplexity_ratio_high"]


@needs_llamacpp
def test_recording_of_answers(tmp_path, monkeypatch):
    """A tiny model in the place of the real one answers nonsense; every row has its answer and the gate's verdict."""
    home = tiny_llama.save(tmp_path / "home")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (home / "chat_template.jinja").write_text(template, "utf-8")
    monkeypatch.setattr(fetch, "folder", lambda: home)
    path = record_gguf.record_chat(False, arms=["F16", "Q4_0+"], directory=tmp_path)
    data = results.validate(json.loads(path.read_text("utf-8")))
    prompts = record_gguf.chat_prompts((300,))
    assert len(data.rows) == 2 * len(prompts) and {row["gate_checks"] for row in data.rows} == {14}
    assert all(row["gate_failed"] == 0 for row in data.rows if row["type"] == "F16")
    assert all(fact in text for form, text, fact in prompts if form.startswith("fact"))


def test_what_is_recorded_of_smollm2s_answers_is_complete():
    """Every file answers the same prompts, and the unquantized one passes its own gate; the notebook judges them."""
    rows = results.load("smollm2_chat", "cpu").rows
    asked = [[(r["form"], r["prompt"]) for r in rows if (r["type"], r["imatrix"]) == arm]
             for arm in dict.fromkeys((r["type"], r["imatrix"]) for r in rows)]  # fmt: skip
    assert len(asked) >= 5 and all(prompts == asked[0] for prompts in asked)
    assert all(r["gate_failed"] == 0 for r in rows if r["type"] == "F16") and rows[0]["type"] == "F16"
