"""Record ``serving``: latency, throughput and goodput of llama-server against the rate of requests.

    python -m tools.record_serving                       # the course model in three types, on this machine
    python -m tools.record_serving --repeats 1 --requests 12 --rates 4     # a quick look

Runs of the types alternate, so that they share what the machine does meanwhile.  Each rate is repeated with other
prompts and arrivals: intervals are Student's t over the repeats; p95 is over all requests of a rate.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from qtutor import QtutorError, course_model, energy, llamacpp, results, serve
from qtutor.checkpoints import convert
from qtutor.rigs import serving

from . import command, keep

TYPES = ("F16", "Q8_0", "Q4_K_M")
RATES, STREAMS, SLOTS, REPEATS, REQUESTS = (2.0, 4.0, 8.0, 16.0), (4,), 4, 3, 40
TTFT_MS, ITL_MS = 500.0, 50.0  # the limits of goodput
FRESH = ("--no-cache-prompt", "--cache-ram", 0)  # repeated prompts would measure the cache


def with_intervals(repeats: list[pd.DataFrame], pooled: pd.DataFrame) -> list[dict]:
    """One row for each load: means of the repeats' summaries with 95 % intervals; p95 of all requests together."""
    rows, together = [], pd.concat(repeats)
    for one in pooled.to_dict("records"):
        same = together[(together["loop"] == one["loop"]) & (together["load"] == one["load"])]
        for column in ("requests_per_s", "output_tokens_per_s", "goodput_per_s", "within", "ttft_p50_ms", "itl_p50_ms"):
            values = same[column].to_numpy(float)
            one[column] = float(values.mean())
            if len(values) > 1:
                half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
                one |= {f"{column}_low": float(values.mean() - half), f"{column}_high": float(values.mean() + half)}
        load = one.pop("load")
        rows.append(one | {"rate_per_s" if one["loop"] == "open" else "streams": load, "repeats": len(same)})
    return rows


def measured(path, tokenizer, loops: dict, requests: int, seed: int, threads: int) -> tuple[pd.DataFrame, float | None]:
    """All requests to one server, and joules an output token where this machine has a meter."""
    with serve.llama_server(path, 512, SLOTS, threads, *FRESH) as server, energy.track_energy("cpu") as used:
        tables = [serving.load(server.url, tokenizer, requests=requests, seed=seed, **{kind: values})
                  for kind, values in loops.items() if values]  # fmt: skip
    table = pd.concat(tables)
    metered = "estimate" not in used.source  # which would count this process alone, and not the server
    return table, used.per(table["output_tokens"].sum()) if metered else None


def record(rates=RATES, streams=STREAMS, repeats: int = REPEATS, requests: int = REQUESTS, directory=None) -> Path:
    """Measure the three types and save ``serving``; return the path."""
    threads = max(1, llamacpp.n_threads() - 1)  # the load needs a core, too
    found, joules = {name: [] for name in TYPES}, {name: [] for name in TYPES}
    with tempfile.TemporaryDirectory(prefix="qtutor-serving-", ignore_cleanup_errors=True) as folder:
        files = {"F16": Path(folder) / "F16.gguf"}
        convert.to_gguf(course_model.load(), files["F16"], "f16", course_model.load_tokenizer())
        files |= {name: llamacpp.quantize(files["F16"], Path(folder) / f"{name}.gguf", name) for name in TYPES[1:]}
        for seed in range(repeats):
            for name in TYPES:
                print(f"serving: repeat {seed + 1} of {repeats}, {name}", flush=True)
                loops = {"rates": rates, "streams": streams}
                table, used = measured(files[name], course_model.model_dir(), loops, requests, seed, threads)
                found[name].append(table)
                joules[name] += [used] if used else []
        rows = []
        for name in TYPES:
            about = {"type": name, "model": course_model.name(), "slots": SLOTS, "threads": threads,
                     "file_bytes": files[name].stat().st_size, "ttft_limit_ms": TTFT_MS, "itl_limit_ms": ITL_MS,
                     "joules_per_decode_token": float(np.mean(joules[name])) if joules[name] else None}  # fmt: skip
            parts = [serving.summary(table, TTFT_MS, ITL_MS) for table in found[name]]
            pooled = serving.summary(pd.concat(found[name]), TTFT_MS, ITL_MS)
            rows += [about | row for row in with_intervals(parts, pooled)]
    return keep(results.save("serving", rows, directory=directory))


RECORDS = {"serving": record}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--streams", type=int, nargs="*", default=STREAMS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    if (found := parser.parse_args(arguments)).repeats < 1 or found.requests < 1:
        raise QtutorError("At least one repeat and one request are needed.")
    print(record(**vars(found)))
    return 0


if __name__ == "__main__":
    command(main)
