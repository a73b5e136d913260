"""Recordings made up for tests: files of results as the recorders write them."""

from __future__ import annotations

import json
from pathlib import Path

from qtutor import results

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def saved(directory, name: str, device: str, rows: list[dict]) -> Path:
    """Add rows to ``name`` of a GPU in ``directory``, beside what is there."""
    about = {"device": device, "compute_capability": "9.0"}
    folder = results.machine_folder(about)
    old = list(results.load(name, folder, directory).rows) if results.exists(name, folder, directory) else []
    data = {"name": name, "created": "2026-11-27T12:00:00+00:00", "commit": "test", "profile": "quick",
            "machine": about, "versions": {"python": "3.12"}, "rows": [*old, *rows]}  # fmt: skip
    path = Path(directory) / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.dumps(json.loads(json.dumps(data))), "utf-8")
    return path


def served(type: str, users: int = 8, step_ms: float = 25.0, *, runtime: str = "vLLM", kv_type: str | None = None,
           cards: int = 1, split: str | None = None, ttft_ms: float = 100.0, joules: float = 6.0,
           **more) -> dict:  # fmt: skip
    """A row of kind ``served``, with the columns of tools.record_llama70b."""
    kv_type = kv_type or ("BF16" if runtime == "vLLM" else "F16")
    return {"kind": "served", "runtime": runtime, "shape": "Llama-2-70B", "type": type, "cards": cards,
            "kv_type": kv_type, "split": split, "slots": 128, "ctx": 4352, "loop": "closed", "streams": users,
            "itl_p50_ms": step_ms, "ttft_p50_ms": ttft_ms, "time_to_first_token_ms": ttft_ms, "prefill_tokens": 128,
            "decode_tokens": 64, "decode_tokens_per_s": 1000 * users / step_ms, "joules_per_decode_token": joules,
            "output_tokens_per_s": 900 * users / step_ms} | more  # fmt: skip
