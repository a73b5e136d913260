"""Load on a server, from guidellm, and its report as a table of requests.

guidellm sends the requests, in a process of its own, and times every token.  It was chosen because it has open loops
(Poisson arrivals at a rate) and closed ones (a number of streams), lengths from a distribution, a service level
objective with its goodput, and one record a request; it speaks to anything with OpenAI's protocol, needs no network,
and its requirements fit beside the course's.  (aiperf 0.13 needs an older huggingface-hub than transformers 5;
``vllm bench serve`` needs vLLM.)

    table = serving.load(server.url, model_dir(), serving.Lengths(), rates=(2, 4), requests=30)
    serving.summary(table, ttft_ms=200)
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .. import QtutorError

# Workers are forked: by default ten are started anew for each rate, and each imports everything again.  And guidellm
# 0.8.1 wakes its workers before it has set the time from which Poisson arrivals count: a worker that is quick sends all
# requests of a rate at once (the lag is 10^12 ms then).  Here the time is set first; and workers draw different gaps.
_RUN = """
import random
from guidellm.settings import settings
settings.mp_context_type, settings.max_worker_processes = {context}, {workers}
from guidellm.cli import cli
from guidellm.scheduler import strategies
def start(self, start_time):
    with self._offset.get_lock():
        self._offset.value = start_time
    strategies.ThroughputStrategy.init_processes_start(self, start_time)
async def next_time(self, worker_index, then=strategies.AsyncPoissonStrategy.next_request_time):
    self._random = self._random or random.Random(1000 * self.random_seed + worker_index)
    return await then(self, worker_index)
strategies.AsyncPoissonStrategy.init_processes_start = start
strategies.AsyncPoissonStrategy.next_request_time = next_time
cli()
"""


STATES = ("successful", "errored", "incomplete")


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers: normal distributions, cut off at both ends; None where all have one length."""

    prompt_tokens: int = 192
    prompt_tokens_stdev: int | None = 80
    prompt_tokens_min: int | None = 32
    prompt_tokens_max: int | None = 384
    output_tokens: int = 48
    output_tokens_stdev: int | None = 16
    output_tokens_min: int | None = 8
    output_tokens_max: int | None = 96


def fixed(prompt_tokens: int, output_tokens: int) -> Lengths:
    """The same lengths for all requests."""
    return Lengths(prompt_tokens, None, None, None, output_tokens, None, None, None)


def load(url: str, tokenizer, lengths: Lengths = Lengths(), *, rates: Sequence[float] = (), streams: Sequence[int] = (),
         requests: int | Sequence[int] = 30, seed: int = 0, key: str | None = None, timeout: float = 600,
         seconds: float | Sequence[float] | None = None, body: dict | None = None,
         workers: int = 1) -> pd.DataFrame:  # fmt: skip
    """Send requests to a server and return one row a request (see :func:`read`).

    ``rates``: open loop, requests a second with random gaps (Poisson); ``streams``: closed loop, so many users who each
    wait for an answer before they ask again.  ``requests`` for each.  ``tokenizer``: folder that counts the tokens.
    ``seconds``: each load ends then, and what has no answer yet is incomplete; ``body``: more fields of each request;
    ``workers``: processes that send (one is enough for some thousand tokens a second).
    """
    if bool(rates) == bool(streams):
        raise QtutorError("Give either rates (an open loop) or streams (a closed loop).")
    if importlib.util.find_spec("guidellm") is None:
        raise QtutorError("guidellm is not installed: run 'make install', or 'pip install guidellm'.")
    backend = {"kind": "openai_http", "target": url, "request_format": "/v1/completions", "model": "model",
               "http2": False} | ({"api_key": key} if key else {})  # fmt: skip
    if body:
        backend["extras"] = {"body": body}
    profile, field = ({"kind": "poisson"}, "rate") if rates else ({"kind": "concurrent"}, "streams")
    values = list(rates or streams)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        report = Path(folder) / "report.json"
        data = {name: value for name, value in asdict(lengths).items() if value is not None}
        words = {"--backend": backend, "--profile": profile | {field: values[0]},
                 "--constraint": {"kind": "max_requests", "count": requests},
                 "--data": {"kind": "synthetic_text"} | data, "--seed": {"kind": "static", "value": seed},
                 "--tokenizer": {"kind": "huggingface_auto", "model": str(tokenizer)},
                 "--output": {"kind": "json", "path": str(report)}}  # fmt: skip
        arguments = [part for word, value in words.items() for part in (word, json.dumps(value))]
        if seconds:
            arguments += ["--constraint", json.dumps({"kind": "max_duration", "seconds": seconds})]
        if len(values) > 1:
            arguments += ["--override", f"profile.{field}", ",".join(map(str, values))]
        code = _RUN.format(context="None" if sys.platform == "linux" else "'spawn'", workers=workers)
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_PROXY": "127.0.0.1"}
        try:
            done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, "run", "--disable-console", *arguments],
                                  env=env, capture_output=True, text=True, timeout=timeout, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise QtutorError(f"The load did not end within {timeout:g} s: ask for fewer requests.") from None
        if done.returncode or not report.is_file():
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            why = " ".join((said or ["it gave no reason"])[-1].split())[:200].rstrip(".")
            raise QtutorError(f"guidellm could not load {url} ({why}): does the server run?")
        return read(report)


def read(report) -> pd.DataFrame:
    """The requests of guidellm's JSON report, in the order in which they were sent.

    ``loop`` (open or closed), ``load`` (requests a second, or streams), ``state`` (successful, errored, incomplete),
    ``start``, ``first``, ``last`` (seconds from the run's first request to sending, first and last token), ``began``
    (time of the run's first request),
    ``prompt_tokens``, ``output_tokens``, ``ttft_ms``, ``itl_ms`` (mean of the request), ``lag_ms`` (sent later than
    planned, an open loop only).
    """
    try:
        benchmarks = json.loads(Path(report).read_text("utf-8"))["benchmarks"]
        rows = [_request(one, state, run["config"]["strategy"])
                for run in benchmarks for state in STATES for one in run["requests"][state] or []]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QtutorError(f"'{report}' is no report of guidellm 0.8 ({type(error).__name__}): install the version in "
                          "constraints.txt.") from None  # fmt: skip
    if not rows:
        raise QtutorError(f"'{report}' holds no request: run the load again.")
    table = pd.DataFrame(rows).sort_values(["loop", "load", "start"], ignore_index=True)
    zero = table.groupby(["loop", "load"])["start"].transform("min")
    table["began"] = zero
    table[["start", "first", "last"]] = table[["start", "first", "last"]].sub(zero, axis=0)
    return table


def _request(one: dict, state: str, strategy: dict) -> dict:
    timings, is_open = one["info"]["timings"], "rate" in strategy
    return {"loop": "open" if is_open else "closed", "load": strategy["rate" if is_open else "streams"],
            "state": state, "start": timings["request_start"], "first": timings["first_token_iteration"],
            "last": timings["last_token_iteration"], "prompt_tokens": one["prompt_tokens"],
            "output_tokens": one["output_tokens"], "ttft_ms": one["time_to_first_token_ms"],
            "itl_ms": one["inter_token_latency_ms"],
            "lag_ms": 1000 * one["request_dispatch_delay"] if is_open and one["request_dispatch_delay"] else None,
            }  # fmt: skip


def summary(table: pd.DataFrame, ttft_ms: float = np.inf, itl_ms: float = np.inf, warmup: int = 0) -> pd.DataFrame:
    """One row for each run in a table of :func:`load`: percentiles, throughput, goodput.

    ``goodput_per_s`` counts the requests that kept both limits; a request without an answer never does.  ``warmup``: so
    many first requests do not count.  The 99th percentile is None below 1,000 requests: it would rest on a handful.
    """
    rows = []
    for (loop, load), runs in table.groupby(["loop", "load"], sort=True):
        kept = runs.iloc[warmup:]
        good = kept[kept["state"] == "successful"]
        ends = kept[["start", "last"]].max().max()  # of those without an answer, too
        seconds = max(1e-9, ends - kept["start"].min())
        within = int(((good["ttft_ms"] <= ttft_ms) & (good["itl_ms"].fillna(0) <= itl_ms)).sum())
        found = {"loop": loop, "load": load, "requests": len(kept), "failed": len(kept) - len(good),
                 "requests_per_s": len(good) / seconds, "output_tokens_per_s": good["output_tokens"].sum() / seconds,
                 "goodput_per_s": within / seconds, "within": within / len(kept)}  # fmt: skip
        for name in ("ttft_ms", "itl_ms"):
            for share in (50, 95, 99):
                known = good[name].dropna().to_numpy(float)
                enough = len(good) >= 1000 if share == 99 else len(known)
                found[f"{name[:-3]}_p{share}_ms"] = np.percentile(known, share) if enough else None
        rows.append(found)
    return pd.DataFrame(rows)
