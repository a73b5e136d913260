"""Rename the columns of recorded results to the vocabulary of qtutor.results: run once, on 2026-11-26.

    python -m tools.migrate_results          # idempotent: a file that is in the vocabulary stays as it is

Values, device, versions, commit and date stay what they were; each file says in "migrated" what was done to it.  Two
files change their form: a row of fp8_inference held batch 1 and batch 32 side by side and becomes one row a batch
(tokens per second and joules per token computed from the recorded milliseconds and joules), and a row that names a
measurement on the evaluation text carries no fingerprint of the text that was in use before it was pinned by content:
"text" then says "before pinning".
"""

from __future__ import annotations

from qtutor import files, results

RENAMED = {
    "ppl_ratio_se": "perplexity_ratio_se",
    "ppl_ratio": "perplexity_ratio",
    "ppl_diff_se": "perplexity_diff_se",
    "ppl_diff": "perplexity_diff",
    "ppl_correlation": "perplexity_correlation",
    "base_ppl_se": "base_perplexity_se",
    "base_ppl": "base_perplexity",
    "ppl_se": "perplexity_se",
    "ppl": "perplexity",
    "dp_mean": "delta_p_mean",
    "dp_se": "delta_p_mean_se",
    "rms_dp_se": "delta_p_rms_se",
    "rms_dp": "delta_p_rms",
    "float_perplexity": "base_perplexity",
    "size_mb": "weights_mb",
    "memory_mb": "weights_mb",
    "prompt_tokens_per_s": "prefill_tokens_per_s",
    "generate_tokens_per_s": "decode_tokens_per_s",
    "tool_prompt_tokens_per_s": "tool_prefill_tokens_per_s",
    "tool_generate_tokens_per_s": "tool_decode_tokens_per_s",
    "tool_prompt_stdev": "tool_prefill_tokens_per_s_sd",
    "tool_generate_stdev": "tool_decode_tokens_per_s_sd",
    "joules_per_prompt_token": "joules_per_prefill_token",
    "joules_per_generated_token": "joules_per_decode_token",
    "prompt_watts": "prefill_watts",
    "generate_watts": "decode_watts",
    "prompt_se": "prefill_tokens_per_s_se",
    "generate_se": "decode_tokens_per_s_se",
    "prompt_speedup": "prefill_speedup",
    "token_speedup": "decode_speedup",
    "kld_se_windows": "kld_mean_se_windows",
    "kld_se": "kld_mean_se"
}
BY_FILE = {
    "qat_recovery": {"ratio": "perplexity_ratio", "ratio_se": "perplexity_ratio_se"},
    "qat_gguf": {"ratio": "perplexity_ratio", "ratio_se": "perplexity_ratio_se"},
    "gguf_quality": {"n": "scored_tokens"},
    "ptq_methods": {"n": "scored_tokens"},
    "ptq_backends": {"n": "scored_tokens"},
    "fp8_layers": {"n": "repeats"},
    "fp8_gemm": {"ms": "ms_per_step"},
    "llama70b": {"prompt_tokens": "prefill_tokens", "generate_tokens": "decode_tokens"},
}  # fmt: skip
SCORED = ("perplexity", "kld_mean", "accuracy", "held_out_nats")  # columns that were measured on the evaluation text
UNPINNED = "before pinning"


def renamed(name: str, row: dict) -> dict:
    """A row of results ``name`` with the names of the vocabulary."""
    names = RENAMED | BY_FILE.get(name, {})
    row = {names.get(key, key): value for key, value in row.items()}
    if "text" not in row and any(row.get(key) is not None for key in SCORED):
        row["text"] = UNPINNED
    return row


def by_batch(row: dict) -> list[dict]:
    """A row of fp8_inference as it was, as one row a batch."""
    wide = {"prefill_ms", "prefill_joules", "decode_ms_batch1", "decode_joules_batch1", "decode_ms_batch32",
            "decode_joules_batch32"}  # fmt: skip
    kept = {key: value for key, value in row.items() if key not in wide}
    rows = []
    for batch in (1, 32):
        ms, joules = row.get(f"decode_ms_batch{batch}"), row.get(f"decode_joules_batch{batch}")
        if ms is None and batch > 1:
            continue
        new = kept | {"batch": batch}
        if ms is not None:
            new |= {"ms_per_step": ms, "decode_tokens_per_s": 1000 * batch / ms}
            new |= {"joules_per_decode_token": joules / batch} if joules is not None else {}
        if batch == 1 and row.get("prefill_ms") is not None:
            new |= {"time_to_first_token_ms": row["prefill_ms"],
                    "prefill_tokens_per_s": 1000 * row["prefill_tokens"] / row["prefill_ms"]}  # fmt: skip
            if row.get("prefill_joules") is not None:
                new["joules_per_prefill_token"] = row["prefill_joules"] / row["prefill_tokens"]
        rows.append(new)
    return rows


def main() -> int:
    """Bring every file of data/results into the vocabulary."""
    for path in sorted(results.RESULTS.glob("*/*.json")):
        data = files.read_json(path)
        name = data["name"]
        rows = [row for old in data["rows"] for row in (by_batch(old) if name == "fp8_inference" else [old])]
        rows = [renamed(name, row) for row in rows]
        if "migrated" in data or rows == data["rows"]:
            continue
        data["rows"] = rows
        data["migrated"] = "2026-11-26: columns renamed by tools/migrate_results.py; values as recorded"
        order = ["name", "created", "commit", "profile", "migrated", "machine", "versions", "rows"]
        results.validate(data)
        files.write_text(path, results.dumps({key: data[key] for key in order}))
        print(f"{path.parent.name}/{path.name}: {len(data['rows'])} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
