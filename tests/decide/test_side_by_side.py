"""The table of engines: which rows meet in it, under which name, and that a recording may be missing."""

from __future__ import annotations

import json

import pytest

from qtutor import QtutorError
from qtutor.decide import pareto, side_by_side

SERVED = {"shape": "Llama-2-7B", "cards": 1, "kv_type": "BF16", "slots": 256, "ctx": 1280}


def save(folder, name, rows):
    data = {"name": name, "created": "2026-11-27T12:00:00+00:00", "commit": "x", "profile": "full",
            "machine": {"device": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"},
            "versions": {"torch": "2.11.0"}, "rows": rows}  # fmt: skip
    (folder / "h100").mkdir(exist_ok=True)
    (folder / "h100" / f"{name}.json").write_text(json.dumps(data))


def tradeoff(technique, runtime, shape="llama2_7b", **more):
    return {"technique": technique, "runtime": runtime, "shape": shape, "batch": 1, "not_run": None,
            "prefill_tokens": 256, "decode_context": 512, "prefill_tokens_per_s": 2560.0,
            "decode_tokens_per_s": 100.0, "decode_tokens_per_s_low": 99.0, "decode_tokens_per_s_high": 101.0,
            } | more  # fmt: skip


def served(runtime, type, speed, ttft, kv_type="BF16"):
    head = SERVED | {"runtime": runtime, "type": type, "kv_type": kv_type}
    fixed = head | {"kind": "fixed", "loop": "closed", "requests": 12, "failed": 0}
    decoding = {"prefill_tokens": 32, "decode_tokens": 128, "joules_per_decode_token": 1.5, "ttft_p50_ms": 9.0}
    return [head | {"kind": "server", "file_bytes": 7_000_000_000},
            *[fixed | decoding | {"streams": n, "decode_tokens_per_s": n * speed,
                                  "decode_tokens_per_s_low": n * speed - 1, "decode_tokens_per_s_high": n * speed + 1}
              for n in (1, 32)],
            fixed | {"streams": 1, "prefill_tokens": 1024, "decode_tokens": 2, "ttft_p50_ms": ttft,
                     "ttft_p50_ms_low": ttft - 1, "ttft_p50_ms_high": ttft + 1, "decode_tokens_per_s": 3.0},
            head | {"kind": "rate", "loop": "open", "rate_per_s": 6.0},
            head | {"kind": "best", "goodput_per_s": 5.0}]  # fmt: skip


def test_two_recordings_of_one_card(tmp_path):
    save(tmp_path, "tradeoff", [
        tradeoff("BF16", "pytorch"), tradeoff("torchao INT8 dynamic", "pytorch"), tradeoff("GGUF F16", "llama.cpp"),
        tradeoff("BF16, compiled", "pytorch"), tradeoff("torchao FP8 dynamic, compiled", "pytorch", weights_mb=1074.0),
        tradeoff("BF16", "pytorch", "course"),
        tradeoff("GGUF Q2_K", "llama.cpp") | {"not_run": "no time"}])  # fmt: skip
    save(tmp_path, "serving", [*served("vLLM", "BF16", 200, 20.0), *served("vLLM", "FP8", 300, 16.0),
                               *served("vLLM", "FP8", 300, 16.0, "FP8"), *served("llama.cpp", "Q8_0", 150, 90.0, "F16"),
                               SERVED | {"runtime": "vLLM", "type": "W4A16", "kind": "server", "not_run": "no kernel"},
                               SERVED | {"runtime": "vLLM", "type": "BF16", "cards": 2, "kind": "fixed"}])  # fmt: skip
    rows = side_by_side.rows("h100", tmp_path)
    assert [row["technique"] for row in rows if row["batch"] == 1] == [
        "BF16", "GGUF F16", "BF16, compiled", "torchao FP8 dynamic, compiled", "vLLM BF16", "vLLM FP8",
        "vLLM FP8, FP8 cache", "llama-server Q8_0"]  # fmt: skip
    by_name = {(row["technique"], row["batch"]): row for row in rows}
    one, many = by_name["vLLM FP8", 1], by_name["vLLM FP8", 32]
    assert (one["prefill_tokens"], one["decode_context"]) == (1024, 96) and one["weights_mb"] == 7000
    assert one["time_to_first_token_ms"] == 16 and one["prefill_tokens_per_s"] == 64_000
    assert one["prefill_tokens_per_s_low"] == pytest.approx(1024 / 0.017)
    assert (one["decode_tokens_per_s"], many["decode_tokens_per_s_high"]) == (300, 9601)
    assert "prefill_tokens_per_s" not in many and many["joules_per_decode_token"] == 1.5
    ratios = {row["technique"]: row for row in pareto.relative(rows, "decode_tokens_per_s") if row["batch"] == 1}
    assert ratios["vLLM FP8"]["ratio"] == 1.5 and ratios["vLLM FP8"]["differs"] == 1
    assert "torchao FP8 dynamic, compiled" in ratios and "llama-server Q8_0" not in ratios  # its F16 is not there
    table = pareto.table(rows)
    assert table.loc["vLLM FP8", "prompt / cache"] == "1024 / 96"
    alone = [row for row in rows if row["batch"] == 1]
    with pytest.raises(QtutorError, match="decode_context"):
        pareto.judge(alone, "decode speed")
    with pytest.raises(QtutorError, match="prefill_tokens"):
        pareto.judge(alone, "first token")
    assert pareto.leaders(alone, "size") == ["torchao FP8 dynamic, compiled"]  # which no length changes


def test_what_is_not_recorded_is_left_out(tmp_path):
    with pytest.raises(QtutorError):
        side_by_side.rows("h100", tmp_path)
    save(tmp_path, "tradeoff", [tradeoff("GGUF F16", "llama.cpp")])
    assert [row["technique"] for row in side_by_side.rows("h100", tmp_path)] == ["GGUF F16"]
