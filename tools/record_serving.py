"""Record ``serving``: latency, throughput and goodput against the rate of requests.

    python -m tools.record_serving                       # the course model in three types, on this machine
    python -m tools.record_serving --repeats 1 --requests 12 --rates 4     # a quick look
    python -m tools.record_serving --gpu vLLM:FP8 --vllm "env PYTHONPATH=/site python3 -m vllm.entrypoints.cli.main"
    python -m tools.record_serving --gpu llama.cpp:Q8_0 --out /tmp/part     # a part; then --join /tmp/part/*/*.json

Runs of the course model's types alternate, so that they share what the machine does meanwhile.  Each rate is repeated
with other prompts and arrivals: intervals are Student's t over the repeats; p95 is over all requests of a rate.

On a GPU, models have Llama-2-7B's shape and random weights, and there is a row of kind ``server`` for each engine and
type, one of kind ``fixed`` for each of FIXED (all requests of one length, a closed loop), one of kind ``rate`` for each
rate (an open loop), and ``best``: the highest rate whose p95 kept both limits.  Rates double
until one breaks a limit; then the gap between the last that kept them and the first that did not is halved.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from qtutor import QtutorError, course_model, energy, llamacpp, results, serve
from qtutor.checkpoints import convert
from qtutor.decide import capacity
from qtutor.rigs import random_gguf, serving

from . import command, engines, keep
from .engines import FRESH

TYPES = ("F16", "Q8_0", "Q4_K_M")
RATES, STREAMS, SLOTS, REPEATS, REQUESTS = (2.0, 5.0, 10.0, 20.0, 40.0), (4,), 4, 3, 40
TTFT_MS, ITL_MS = 500.0, 50.0  # the limits of goodput

# On a GPU.  Prompts and answers as in a chat; llama-server divides its cache among its slots, vLLM does not.
SHAPE, GPU_CTX, GPU_SLOTS = "Llama-2-7B", 1280, {"vLLM": 256, "llama.cpp": 64}
GPU_LENGTHS = serving.Lengths(512, 200, 64, 1024, 128, 48, 16, 256)
GPU_RATES, RATE_S, LEAST = (6.0, 12.0, 24.0, 48.0, 96.0, 192.0), 12.0, 100  # seconds and requests of each, at least
GPU_LIMITS = (200.0, 50.0)  # milliseconds to the first token, and for each further one; at p95
BEST = {"rate_per_s", "requests_per_s", "output_tokens_per_s", "goodput_per_s", "ttft_p95_ms", "itl_p95_ms",
        "joules_per_decode_token"}  # fmt: skip
FIXED = ((32, 128, 1, 8), (32, 128, 32, 96), (1024, 2, 1, 12))  # prompt, answer, streams, requests
TINY = {"rates": (3.0, 6.0), "rate_s": 1.0, "least": 4, "fixed": ((32, 8, 1, 2), (64, 2, 2, 4)),
        "lengths": serving.Lengths(32, 8, 16, 64, 8, 4, 4, 16), "slots": 4, "ctx": 128,
        "config": random_gguf.TINY | {"vocab_size": 8192}}  # fmt: skip


def with_intervals(repeats: list[pd.DataFrame], pooled: pd.DataFrame) -> list[dict]:
    """One row for each load: means of the repeats' summaries with 95 % intervals; p95 of all requests together.

    Of latencies the geometric mean, and the interval of their logarithms: a queue makes them differ by factors.
    """
    rows, together = [], pd.concat(repeats)
    for one in pooled.to_dict("records"):
        same = together[(together["loop"] == one["loop"]) & (together["load"] == one["load"])]
        for column in ("requests_per_s", "output_tokens_per_s", "goodput_per_s", "within", "ttft_p50_ms", "itl_p50_ms"):
            to, back = (np.log, np.exp) if column.endswith("ms") else (np.asarray, float)
            values = to(same[column].to_numpy(float))
            one[column] = float(back(values.mean()))
            if len(values) > 1:
                half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
                ends = float(back(values.mean() - half)), float(back(values.mean() + half))
                one |= dict(zip((f"{column}_low", f"{column}_high"), ends, strict=True))
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


def kept(row: dict) -> bool:
    """Whether 95 of 100 requests of this row had an answer, and p95 is within both limits."""
    if row["failed"] > 0.05 * row["requests"] or row["ttft_p95_ms"] is None:
        return False
    return row["ttft_p95_ms"] <= row["ttft_limit_ms"] and (row["itl_p95_ms"] or 0) <= row["itl_limit_ms"]


def best(rows: list[dict]) -> dict:
    """Of rows of kind ``rate``: the highest that kept both limits, and the lowest rate above it that did not."""
    rates = [row for row in rows if row["kind"] == "rate"]
    found = max(filter(kept, rates), key=lambda row: row["rate_per_s"], default={"rate_per_s": 0.0,
                                                                                 "goodput_per_s": 0.0})  # fmt: skip
    lost = [row["rate_per_s"] for row in rates if not kept(row) and row["rate_per_s"] > found["rate_per_s"]]
    return {name: found[name] for name in found if name in BEST} | {"rate_lost_per_s": min(lost, default=None)}


def next_rate(rows: list[dict], rates) -> float | None:
    """The next rate to try: of ``rates``, until one breaks a limit; then between it and the last that kept them.  None:
    all are tried, or the two are within a tenth."""
    found = best(rows)
    low, lost = found["rate_per_s"], found["rate_lost_per_s"]
    if lost is None:
        return min((rate for rate in rates if rate > low), default=None)
    return np.sqrt(max(low, lost / 4) * lost) if lost > 1.1 * low else None


def record_gpu(which: str, program: str = engines.VLLM, folder="/dev/shm", directory=None, budget_s: float = 400.0,
               rates=GPU_RATES, rate_s: float = RATE_S, least: int = LEAST, fixed=FIXED, lengths=GPU_LENGTHS,
               slots: int | None = None, ctx: int = GPU_CTX, config=None, options: str = "",
               say=print) -> Path:  # fmt: skip
    """Measure one engine and type, such as ``vLLM:FP8``, on one GPU; rows are saved as they come; return the path.

    ``budget_s``: nothing is begun that would end later; what was left out then has no row.  ``options``: more words of
    the server's command line.
    """
    end, rows, path = time.monotonic() + budget_s, [], None
    (runtime, _, type), limits = which.partition(":"), GPU_LIMITS
    slots = GPU_SLOTS.get(runtime) if slots is None else slots
    if not (type and slots and slots > 0 and min(rates, default=1) > 0):
        raise QtutorError("Give an engine and a type such as vLLM:FP8 or llama.cpp:Q8_0, and slots and rates above 0.")
    kv_type = "BF16" if runtime == "vLLM" else "F16"

    def left() -> float:
        return end - time.monotonic()

    def tell(kind: str, **row) -> None:
        nonlocal path
        rows.append({"kind": kind, "runtime": runtime, "type": type, "shape": SHAPE if config is None else "tiny",
                     "cards": 1, "kv_type": kv_type, "slots": slots, "ctx": ctx, "ttft_limit_ms": limits[0],
                     "itl_limit_ms": limits[1], "options": options or None, **row})  # fmt: skip
        path = results.save("serving", rows, directory=directory)
        say(which, kind, engines.brief(row))

    with engines.Model(runtime, type, config or capacity.MODELS[SHAPE], folder) as model, engines.Meter() as meter:
        server = model.server(program, slots, ctx, *shlex.split(options), kv_type=kv_type,
                              timeout=max(1.0, left() - 30))  # fmt: skip
        try:
            with engines.running(server, meter) as facts:
                tell("server", file_bytes=model.file_bytes, write_s=model.write_s, **facts)
                engines.warm(server)
                for prompt, new, streams, requests in fixed:
                    if left() > 25 and streams <= slots:
                        (row,) = engines.loads(server, model.home, serving.fixed(prompt, new), meter, (np.inf, np.inf),
                                               min(streams, requests // 3), left(), streams=(streams,),
                                               requests=requests, seconds=30)  # fmt: skip
                        tell("fixed", prefill_tokens=prompt, decode_tokens=new, **row)
                while rate := next_rate(rows, rates):
                    n = max(least, round(rate_s * rate))
                    if left() < n / rate + 25:
                        break
                    (row,) = engines.loads(server, model.home, lengths, meter, limits, timeout=left(), rates=(rate,),
                                           requests=n, seconds=1.25 * n / rate + 3)  # fmt: skip
                    tell("rate", **row)
                    engines.warm(server)  # answered when what was given up has left the engine's queue
        except QtutorError as error:
            tell("server", not_run=str(error))
    if any(row["kind"] == "rate" for row in rows):
        tell("best", **best(rows))
    return path


RECORDS = {"serving": lambda full: record()}


def main(arguments: list[str]) -> int:
    """The command line; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", type=float, nargs="*", help="requests a second")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--out", dest="directory", help="folder for the results instead of data/results")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--gpu", metavar="ENGINE:TYPE", help="vLLM:BF16, FP8 or W4A16; llama.cpp: and one of its types")
    gpu.add_argument("--vllm", default=engines.VLLM, help="the command that starts vLLM")
    gpu.add_argument("--slots", type=int, help="users at once")
    gpu.add_argument("--options", default="", help="more words of the server's command: \"--kv-unified\"")
    gpu.add_argument("--folder", default="/dev/shm", help="where the model goes: memory-backed")
    gpu.add_argument("--budget", type=float, default=400.0, help="seconds after which nothing more is begun")
    gpu.add_argument("--tiny", action="store_true", help="a tiny shape and a few requests, to try the code anywhere")
    gpu.add_argument("--join", nargs="+", metavar="PART", help="join parts: the JSON files that --out wrote")
    found = parser.parse_args(arguments)
    if found.repeats < 1 or found.requests < 1:
        raise QtutorError("At least one repeat and one request are needed.")
    if found.join:
        print(engines.join("serving", found.join, ("runtime", "type", "kv_type", "slots", "options"), found.directory))
    elif found.gpu:
        given = {name: value for name in ("rates", "slots") if (value := getattr(found, name)) is not None}
        how = (TINY if found.tiny else {}) | given
        print(keep(record_gpu(found.gpu, found.vllm, found.folder, found.directory, found.budget,
                              options=found.options, **how)))  # fmt: skip
    else:
        rates = RATES if found.rates is None else found.rates
        print(record(rates, STREAMS, found.repeats, found.requests, found.directory))
    return 0


if __name__ == "__main__":
    command(main)
