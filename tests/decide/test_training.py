"""Which precision to train in: the advice follows the rows, and pretraining is the model of sharding."""

from __future__ import annotations

import json
import shutil

import pytest

from qtutor import QtutorError, results
from qtutor.decide import cost, hardware, sharding, training


def edited(tmp_path, name, change):
    """A copy of the results in which ``change`` was applied to the rows of ``name``; None removes the file."""
    directory = tmp_path / "results"
    shutil.copytree(results.RESULTS, directory, dirs_exist_ok=True)
    for path in directory.glob(f"*/{name}.json"):
        if change is None:
            path.unlink()
        else:
            data = json.loads(path.read_text("utf-8"))
            data["rows"] = [change(row) for row in data["rows"]]
            path.write_text(results.dumps(data), "utf-8")
    return directory


def test_fine_tuning_follows_the_measured_steps():
    table, run = training.finetuning("H200"), results.on_gpu("fp8_finetune")
    assert set(table.index) == {row["rung"] for row in run.rows}
    for row in run.rows:
        low, high = (float(x) for x in table.loc[row["rung"], "USD / 1M"].split(" to "))
        usd = cost.cost_per_million_tokens(row["train_tokens_per_s"], hardware.device("H200").usd_per_hour)
        assert low * 0.98 <= usd <= high * 1.02 and table.loc[row["rung"], "peak, GiB"] == f"{row['peak_gib']:.1f}"


def test_the_advice_is_the_cheapest_whose_loss_is_known_to_be_within_the_limit():
    table, rows = training.finetuning("H200"), {row["rung"]: row for row in results.on_gpu("fp8_finetune").rows}
    known = {}
    for rung, row in rows.items():
        kind = next((kind for kind in ("FP8 delayed", "FP8 current") if kind in rung), None)
        gap = training.loss_gap(kind) if kind else None
        if "LoRA" not in rung and (gap is None or gap.high <= training.MAX_LOSS_NATS):
            known[rung] = row["ms_per_step"]
    assert table.index[0] == min(known, key=known.get)
    for rung in known:  # what the course model loses says nothing of 8B: no pass, and it says so
        assert table.loc[rung, "will do"] == ("yes" if "BF16" in rung else "speed only")
        assert ("not tested at this size" in table.loc[rung, "why"]) == ("FP8" in rung)
    assert table.loc["QLoRA NF4", "will do"] == "unknown"


def test_little_memory_leaves_the_adapters():
    table = training.finetuning("H200", free_gib=24)
    assert set(table.index[table["will do"] != "no"]) == {"LoRA BF16", "QLoRA NF4"}
    assert "GiB" in table.loc["full BF16, TE", "why"]


def test_a_recipe_whose_loss_drifts_is_out(tmp_path):
    directory = edited(tmp_path, "fp8_loss", lambda row: row | {
        "held_out_nats": row["held_out_nats"] + 0.1 * (row["recipe"] == "FP8 current")})  # fmt: skip
    table = training.finetuning("H200", directory=directory)
    assert table.loc["full FP8 current, TE", "will do"] == "no" and "nats" in table.loc["full FP8 current, TE", "why"]
    unknown = training.finetuning("H200", directory=edited(tmp_path, "fp8_loss", None))
    assert unknown.loc["full FP8 current, TE", "will do"] == "unknown"


def test_a_faster_recipe_takes_the_place(tmp_path):
    directory = edited(tmp_path, "fp8_finetune", lambda row: row | (
        {key: row[key] / 3 for key in ("ms_per_step", "ms_p10", "ms_p90")} if row["rung"] == "full BF16, TE" else {}))
    assert training.finetuning("H200", directory=directory).index[0] == "full BF16, TE"


def test_pretraining_is_the_model_and_says_so():
    table, run = training.pretraining(64), results.load("fp8_scaling", "h200x4")
    (row,) = (r for r in run.rows if (r["ranks"], r["shape"], r["rung"]) == (1, "Llama-2-70B", "BF16"))
    more, weights = 80 / row["layers"], row["trained_weights"]
    step = sharding.step(64, more * (row["ms_per_step"] - sharding.adam_ms(weights)), sharding.adam_ms(more * weights),
                         layers=80, weights=more * weights)  # fmt: skip
    low, high = (float(x.replace(",", "")) for x in table.loc["BF16", "tokens/s"].split(" to "))
    assert low < 64 * 8192 * 1000 / step.total_ms < high
    assert table.source.str.startswith("modelled").all()
    assert list(table.index[table["will do"] == "yes"]) == ["BF16"] and "speed only" in set(table["will do"])


def test_a_faster_network_brings_plain_fp8_back():
    slow, fast = (training.pretraining(64, between_hosts_gb_per_s=speed) for speed in (50, 400))
    before, after = (int(table.loc["FP8 current", "efficiency"].rstrip("%")) for table in (slow, fast))
    assert before < after


@pytest.mark.parametrize("call", [
    lambda: training.finetuning("L4"), lambda: training.pretraining(64, "Llama-3-8B"), lambda: training.pretraining(0),
])  # fmt: skip
def test_what_cannot_be_said_is_one_sentence(call):
    with pytest.raises(QtutorError) as error:
        call()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_without_recordings_it_says_how_to_make_them(tmp_path):
    for call in (training.finetuning, training.pretraining):
        with pytest.raises(QtutorError, match="record"):
            call(directory=tmp_path)
