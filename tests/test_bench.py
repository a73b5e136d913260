"""The benchmarks run and print their ratios; what the ratios are is for a quiet machine to say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_bench_te_prints_both_ratios():
    command = [sys.executable, "-W", "ignore", "bench/bench_te.py", "--steps", "1", "--batch", "1", "--context", "32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if " x FP32" in line and " x torchao" in line]
    assert [line.split("  ")[0] for line in lines] == ["FP32", "emulated FP8, delayed", "emulated FP8, current",
                                                       "torchao Float8, emulated"]  # fmt: skip
