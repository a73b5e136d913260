"""The engines that people use at Llama-2-7B's shape on one kind of card, as rows for one table.

Two recordings of the same card meet here, and nothing else: ``tradeoff`` (Hugging Face, Transformer Engine, torchao
under torch.compile, llama.cpp) and ``serving`` (vLLM and llama-server, asked over HTTP).  The weights are random, so
there is no quality in it.  The recordings read prompts and caches of different lengths, and each row says which;
:func:`qtutor.decide.pareto.judge` compares rows of one length only.

    rows = side_by_side.rows("h100")
    pareto.table(pareto.with_cost(rows, usd_per_hour=3.99, grams_per_kwh=475))
"""

from __future__ import annotations

from .. import results
from . import pareto
from .techniques import TECHNIQUES

SHAPE, MODEL = "llama2_7b", "Llama-2-7B"
ENDS = (("", ""), ("_low", "_high"), ("_high", "_low"))


def rows(machine: str, directory=None) -> list[dict]:
    """Rows in the columns of ``tradeoff``, one for each technique and batch; ``against`` is 16 bits in that engine.
    torchao without torch.compile is left out.  Raises QtutorError where the machine has no ``tradeoff``."""
    found = [row for row in pareto.measured(results.load("tradeoff", machine, directory)) if row["shape"] == SHAPE
             and (TECHNIQUES[row["technique"]].compiled or not TECHNIQUES[row["technique"]].torchao)]  # fmt: skip
    if results.exists("serving", machine, directory):
        found += served(results.load("serving", machine, directory))
    return found


def served(data) -> list[dict]:
    """Rows of a ``serving`` recorded on one GPU (else none): decoding with 1 and 32 streams, and a prompt alone; joules
    are those of the whole requests."""
    found = {}
    for row in data.rows:
        if (row.get("shape"), row.get("cards")) != (MODEL, 1) or row.get("not_run") or row.get("options"):
            continue  # rows with options are trials of other settings
        engine = row["runtime"].replace("llama.cpp", "llama-server")
        cache = "" if row["kv_type"] in ("BF16", "F16") else f", {row['kv_type']} cache"
        name = f"{engine} {row['type']}{cache}"
        if row["kind"] == "server":
            size = row["file_bytes"] / 1e6
        elif row["kind"] == "fixed":
            line = found.setdefault((name, row["streams"]), {
                "technique": name, "shape": SHAPE, "batch": row["streams"], "runtime": engine, "weights_mb": size,
                "against": f"{engine} {'BF16' if engine == 'vLLM' else 'F16'}", "not_run": None})  # fmt: skip
            if row["decode_tokens"] > 2:  # a token in the middle of the answer sees half of it
                line["decode_context"] = row["prefill_tokens"] + row["decode_tokens"] // 2
                line |= {key: row[key] for key in row if key.startswith(("decode_tokens_per_s", "joules_per_decode"))}
            else:
                line["prefill_tokens"] = row["prefill_tokens"]
                for end, opposite in ENDS:
                    if ms := row.get(f"ttft_p50_ms{end}"):
                        line |= {f"time_to_first_token_ms{end}": ms,
                                 f"prefill_tokens_per_s{opposite}": 1000 * row["prefill_tokens"] / ms}  # fmt: skip
    return list(found.values())
