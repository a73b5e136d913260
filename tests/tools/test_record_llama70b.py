"""Recording the 70B shape: what is saved and kept, and what is said where a machine cannot, at a tiny size."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from qtutor import QtutorError, llamacpp, results
from qtutor.decide import capacity
from qtutor.rigs import llama_speed, random_gguf
from tools import record_llama70b

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_record_saves_after_each_type_and_keeps_others(tmp_path, monkeypatch):
    folder, out, said = tmp_path / "models", tmp_path / "out", []
    folder.mkdir()
    bandwidth = {"copy_gb_per_s": 50.0, "read_gb_per_s": 40.0, "bandwidth_gb_per_s": 50.0}
    monkeypatch.setattr(record_llama70b, "_bandwidth", lambda: bandwidth)
    common = {"folder": folder, "config": random_gguf.TINY, "directory": out, "say": said.append, "tools": "none",
              **llama_speed.QUICK, "batches": (2,)}  # fmt: skip
    path = record_llama70b.record(types=["Q6_K", "Q8_0"], **common)
    assert list(folder.iterdir()) == [] and path.name == "llama70b.json"
    machine = results.machine_folder()
    first = results.load("llama70b", machine, out)
    assert [row.get("type") for row in first.rows] == [None, "Q6_K", "Q6_K", "Q8_0", "Q8_0"]
    record_llama70b.record(types=["Q8_0", "Q4_0"], **common)
    second = results.load("llama70b", machine, out)
    assert sorted({row["type"] for row in second.rows if "type" in row}) == ["Q4_0", "Q6_K", "Q8_0"]
    assert [row["kind"] for row in second.rows].count("bandwidth") == 1
    assert [row for row in second.rows if row.get("type") == "Q6_K"] == first.rows[1:3]
    record_llama70b.record(types=["Q6_K", "Q8_0"], budget_s=0.0, **common)
    assert any("Q8_0: left out" in line for line in said)
    kept = results.load("llama70b", machine, out).rows  # what the time did not suffice for stays as it was
    before = [row for row in second.rows if row.get("type") == "Q8_0"]
    assert [row for row in kept if row.get("type") == "Q8_0"] == before


def test_tools_measure_the_same(tmp_path):
    tiny = random_gguf.write(tmp_path / "tiny.gguf", random_gguf.TINY, "Q4_K_M")
    rows = record_llama70b.run_tools(tiny, "Q4_K_M", llama_speed.QUICK)
    if dead := [row["not_run"] for row in rows if "code -" in row.get("not_run", "")]:
        pytest.skip(dead[0])  # ended by a signal: this build does not run on this processor
    found = {row["tool"] for row in rows}
    for name in ("llama-bench", "llama-batched-bench"):
        try:
            llamacpp.tool(name)
        except QtutorError:
            continue
        assert name in found
    for row in rows:
        assert set(results.vocabulary_of(row)) == set(row)
        assert all(value > 0 for key, value in row.items() if key.endswith("tokens_per_s"))


@pytest.mark.slow
def test_command_line(tmp_path):
    command = [sys.executable, "-m", "tools.record_llama70b", "--tiny", "--out", str(tmp_path), "--tools", "none"]
    done = subprocess.run([*command, "--types", "Q4_0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("*/llama70b.json")
    results.validate(json.loads(found.read_text()))
    wrong = subprocess.run([*command, "--types", "Q9"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1 and wrong.stderr.strip().startswith("There is no quantization type 'Q9'")


def test_it_says_what_is_missing(tmp_path, monkeypatch):
    def why(folder=tmp_path):
        with pytest.raises(QtutorError) as error:
            record_llama70b.check_machine(folder, "Q6_K")
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
        return str(error.value)

    assert "has no room" in why(tmp_path / "none")
    free = types.SimpleNamespace(free=10**9)
    monkeypatch.setattr(record_llama70b.shutil, "disk_usage", lambda path: free)
    assert "has no room for a file of 57 GB" in why()
    free.free = 10**11
    monkeypatch.setattr(record_llama70b.energy, "board", lambda: None)
    assert "There is no NVIDIA GPU here" in why()
    card = types.SimpleNamespace(memory=lambda: (0, 24 * 2**30))
    monkeypatch.setattr(record_llama70b.energy, "board", lambda: card)
    assert "built without CUDA" in why() or llamacpp.native().llama_supports_gpu_offload()
    capacity.fits("Llama-2-70B", "Q6_K", 4096)  # planned before the library is exchanged
    lib = types.SimpleNamespace(llama_supports_gpu_offload=lambda: True)
    monkeypatch.setattr(llamacpp, "native", lambda: lib)
    assert why().startswith("The GPU has 24 GiB, and Q6_K needs 55")
    card.memory = lambda: (0, 80 * 2**30)
    record_llama70b.check_machine(tmp_path, "Q6_K")
