"""A recording is saved after each technique, goes on where it stopped, and keeps to its time."""

from __future__ import annotations

import pytest

from qtutor import results
from qtutor.decide.pareto import left_out, measured
from qtutor.decide.techniques import TECHNIQUES
from qtutor.rigs import techniques, tradeoff
from tools import record_tradeoff


def test_record_saves_each_technique_and_resumes(tmp_path, monkeypatch):
    calls = []

    def fake(names, shape, batches, *_):
        calls.append(names[0])
        if names[0] == "BF16" and len(calls) < 3:
            raise KeyboardInterrupt
        return [dict.fromkeys(tradeoff.COLUMNS) | {"shape": shape, "technique": names[0], "weights_mb": 1.0, "batch": b}
                for b in batches]  # fmt: skip

    def record(full=False, **how):
        return record_tradeoff.record(full, ("course",), directory=tmp_path, measured=fake, **how)

    def saved():
        return results.load("tradeoff", results.machine_folder(), tmp_path)

    monkeypatch.setattr(record_tradeoff, "TECHNIQUES", {n: TECHNIQUES[n] for n in ("FP32", "BF16", "GGUF F16")})
    each = len(record_tradeoff.BATCHES[techniques.device()])
    with pytest.raises(KeyboardInterrupt):
        record()
    assert len(saved().rows) == each  # FP32 is safe
    path = record()
    assert calls == ["FP32", "BF16", "BF16", "GGUF F16"] and len(saved().rows) == 3 * each
    assert record() == path and len(calls) == 4  # nothing left to do
    record(names=["FP32"])
    assert len(calls) == 5 and len(saved().rows) == 3 * each
    record(resume=False, budget_s=-1)
    assert len(calls) == 5  # no time: nothing was begun, and nothing was lost
    record(resume=False)
    assert len(calls) == 8
    record(full=True)  # quick rows are not part of a full recording
    assert len(calls) == 11 and saved().profile == "full" and len(measured(saved())) == 3 * each


def test_what_cannot_run_is_recorded_with_its_reason(tmp_path):
    name = "FP8 emulated" if techniques.device() == "cuda" else "FP8 (Transformer Engine)"
    record_tradeoff.record(False, ("course",), [name], directory=tmp_path)
    assert list(left_out(results.load("tradeoff", results.machine_folder(), tmp_path))) == [f"{name} (course)"]


@pytest.mark.slow
def test_peak_memory_comes_from_a_fresh_process():
    rows = [{"technique": "BF16", "batch": 1}, {"technique": "BF16", "batch": 4}]
    made = tradeoff.Files()
    try:
        small, large = record_tradeoff.with_peaks(rows, tradeoff.Sizes(tokens=64), made)
    finally:
        made.close()
    assert 0.01 < small["peak_gib"] <= large["peak_gib"] < 0.5


def test_the_command_line_says_what_came_out(tmp_path, capsys):
    assert record_tradeoff.main(["--quick", "--techniques", "torchao FP8 dynamic, compiled", "--shapes", "course",
                                 "--directory", str(tmp_path)]) == 0  # fmt: skip
    assert "0 rows" in capsys.readouterr().out
