"""The benchmarks run and print their ratios; what the ratios are is for a quiet machine to say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qtutor import QtutorError, llamacpp

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def test_bench_te_prints_both_ratios():
    command = [sys.executable, "-W", "ignore", "bench/bench_te.py", "--steps", "1", "--batch", "1", "--context", "32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if " x FP32" in line and " x torchao" in line]
    assert [line.split("  ")[0] for line in lines] == ["FP32", "emulated FP8, delayed", "emulated FP8, current",
                                                       "torchao Float8, emulated"]  # fmt: skip


def test_bench_fake_quant_returns_ratios_and_writes_rows(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("bench_fake_quant", ROOT / "bench" / "bench_fake_quant.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    small = "--device cpu --rows 32 --columns 64 --rounds 2 --dtypes float32 --no-compile --json".split()
    ratios = bench.main([*small, str(tmp_path / "rows.json")])
    for what in ("int4, per channel", "int4, groups of 32", "int8, per token, affine", "E4M3, per row"):
        assert ratios[f"float32: {what}"]["torchao"] > 0
    for what in ("int4, per channel, scale given", "int4, groups of 32, scale given"):
        assert ratios[f"float32: {what}"]["torchao"] > 0 and ratios[f"float32: {what}"]["torch"] > 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(ratios) and all(row["ours_ms"] > 0 and row["gb_per_s"] > 0 for row in rows)
    assert {"device", "shape", "dtype", "what", "ours_ms", "torchao_ms", "torch_ms", "compiled_ms",
            "gb_per_s", "share_of_copy"} <= set(rows[0])  # fmt: skip
    printed = capsys.readouterr().out  # the outputs of all are equal, so that the times compare
    assert "of the values differ" not in printed and printed.count("of the gradients differ") == 1  # torchao's E4M3


def test_bench_evaluate_prints_the_ratio_to_llama_perplexity(tmp_path, capsys):
    try:
        llamacpp.tool("llama-perplexity")
    except QtutorError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("bench_evaluate", ROOT / "bench" / "bench_evaluate.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    small = "--ctx 128 --few 2 --windows 6 --rounds 1 --threads 1 --json".split()
    ratios = bench.main([*small, str(tmp_path / "rows.json")])
    assert set(ratios) == {"perplexity", "KL divergence"} and all(ratio > 0 for ratio in ratios.values())
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:  # both programs measured the same thing
        assert row["python_value"] == pytest.approx(row["tool_value"], rel=2e-3)
    assert capsys.readouterr().out.count("ratio") == 2
