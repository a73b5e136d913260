"""record_fsdp, as far as no GPU is needed: the script, the arms on two processes, what has been recorded."""

import pytest

from qtutor import results
from tools import record_fsdp, report

GPUS = "h200x4"


def test_the_script_is_one_file_of_at_most_150_lines():
    source = record_fsdp.script()
    compile(source, "train_fsdp.py", "exec")
    assert source.count("def main(") == 1 and len(source.splitlines()) <= 150
    assert "qtutor" not in source  # people take it home


def test_recorded_steps_are_consistent():
    recorded = results.load("fp8_scaling", GPUS)
    frame = recorded.frame()
    ran = frame[frame["ms_per_step"].notna()]
    assert recorded.machine["devices"] == 4 and set(ran["ranks"]) == {1, 2, 4}
    layers = ran[ran["layers"] < 32]
    for (_, _), part in layers.groupby(["shape", "ranks"]):
        assert set(record_fsdp.PRECISIONS) <= set(part["rung"]) <= {*record_fsdp.PRECISIONS, *record_fsdp.FAST}
    assert ran["train_tokens_per_s"].to_numpy() == pytest.approx((1000 * ran["tokens"] / ran["ms_per_step"]).to_numpy(),
                                                                   rel=1e-4)  # fmt: skip
    assert (ran["ms_per_step"] * ran["repeats"] > 8500).all()  # energy windows of about ten seconds
    alone = ran[ran["ranks"] == 1]
    assert (alone["gathered_bytes_per_weight"] == 0).all() and alone["exposed_share"].isna().all()
    several = layers[layers["ranks"] > 1].set_index("rung")
    for rung, gathers in (("BF16", 4), ("FP8 delayed", 4), ("FP8 delayed + FP8 weights", 2), ("BF16, gathered once", 2),
                          ("FP8 delayed + FP8 weights, gathered once", 1)):  # fmt: skip
        assert several.loc[rung, "gathered_bytes_per_weight"].to_numpy() == pytest.approx(gathers, rel=0.03)
    assert several["scattered_bytes_per_weight"].to_numpy() == pytest.approx(2, rel=0.03)


def test_headline_against_pandas():
    answer = next(text for question, *_, text in report.headlines() if question == "And on several GPUs?")
    frame = results.load("fp8_scaling", GPUS).frame().query("ranks == 4")
    for part, shown in (("shape == 'Llama-2-70B'", "70B's shape **{:.2f} × ("),
                        ("shape == 'Llama-2-7B' and layers == 32", "7B's shape **{:.2f} × (")):  # fmt: skip
        rate = frame.query(part).set_index("rung")["train_tokens_per_s"]
        fp8 = rate[rate.index.str.startswith("FP8 delayed + FP8 weights")].max()
        assert shown.format(fp8 / rate[rate.index.str.startswith("BF16")].max()) in answer


@pytest.mark.slow
def test_arms_are_measured_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = tmp_path / "train_fsdp.py"
    source.write_text(record_fsdp.script(), "utf-8")
    names = ("BF16", "FP8 current + FP8 weights", "torch.compile torchao FP8, FP8 all-gather")
    todo = [row for row in record_fsdp.arms(False) if row["rung"] in names]
    rows = record_fsdp.side_by_side(source, 2, 2, todo, 0.1, tmp_path)
    assert [row["rung"] for row in rows] == list(names) and not any("not_run" in row for row in rows), rows
    bf16, fp8, torchao = (row["gathered_bytes_per_weight"] for row in rows)
    assert bf16 > 1.6 * fp8 and torchao == pytest.approx(fp8, rel=0.01)
    results.validate(results.load("fp8_scaling", GPUS).model_dump() | {"rows": rows})
