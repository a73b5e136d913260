"""vLLM and llama-server on GPUs under one load, for the recorders of serving and of the 70B.

Both get the same text from the same tokenizer (:mod:`qtutor.rigs.random_checkpoint` writes it), the same lengths and
greedy sampling, and are asked over HTTP by guidellm.  Prompts are not kept between requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import threading
import time
from pathlib import Path

import numpy as np

from qtutor import QtutorError, energy, files, llamacpp, measure, results, serve
from qtutor.decide.choosing import VLLM_SHARE
from qtutor.rigs import random_checkpoint, random_gguf, serving

VLLM = "vllm"  # the program; where it has an environment of its own: "env PYTHONPATH=/site python3 -m vllm..."
FRESH = ("--no-cache-prompt", "--cache-ram", 0)  # repeated prompts would measure the cache
GREEDY = {"temperature": 0}
CAPTURE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)  # tokens of a step with a CUDA graph; few
CLOCKS = {"server_ttft_ms": "vllm:time_to_first_token_seconds",  # from a request's arrival, by vLLM's own clock
          "engine_prefill_ms": "vllm:request_prefill_time_seconds"}  # from its first step on
WORKERS = min(4, max(1, (os.cpu_count() or 2) // 4))  # processes that send requests


class Meter:
    """Joules of ``cards`` GPUs together between two moments, from readings ten times a second; None without a GPU."""

    def __init__(self, cards: int = 1):
        self.boards = [board for i in range(cards) if (board := energy.board(f"cuda:{i}"))]
        self.points, self._end = [], threading.Event()

    def __enter__(self) -> Meter:
        if self.boards:
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()

    def _read(self) -> None:
        while not self._end.wait(0.1):
            joules = [board.joules() for board in self.boards]
            if None not in joules:
                self.points.append((time.time(), sum(joules)))

    def joules(self, start: float, end: float, within: float = 0.1) -> float | None:
        """None where the readings are too coarse for ``within`` of the figure, or do not reach that far."""
        if end - start < energy.NVML_STEP_S / within or not self.points:
            return None
        times, values = np.array(self.points).T
        inside = times[0] <= start and end <= times[-1] + 2 * energy.NVML_STEP_S
        return float(np.interp(end, times, values) - np.interp(start, times, values)) if inside else None

    def gib(self) -> float | None:
        """Memory in use on all of them, by everybody."""
        return sum(board.memory()[0] for board in self.boards) / measure.GIB if self.boards else None


def vllm(program: str, folder, slots: int, ctx: int, *options, cards: int = 1, kv_type: str = "BF16",
         dummy: bool = False, timeout: float = 300) -> serve.Server:  # fmt: skip
    """``vllm serve`` for one checkpoint on ``cards`` GPUs.  ``dummy``: weights invented by vLLM, for BF16 only."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_WORKER_MULTIPROC_METHOD="spawn",
                      VLLM_ALLREDUCE_USE_SYMM_MEM="0")  # fmt: skip
    words = [*shlex.split(program), "serve", folder, "--served-model-name", "model", "--host", "127.0.0.1", "--port",
             "{port}", "--dtype", "bfloat16", "--max-model-len", ctx, "--max-num-seqs", slots, "--tensor-parallel-size",
             cards, "--gpu-memory-utilization", VLLM_SHARE, "--no-enable-prefix-caching", "--cudagraph-capture-sizes",
             *[n for n in CAPTURE if n <= slots or n > 256], "--kv-cache-dtype", "auto" if kv_type == "BF16" else "fp8",
             "--generation-config", "vllm", "--disable-uvicorn-access-log", *options]  # fmt: skip
    if cards > 1:  # FlashInfer's fused all-reduce would be compiled at the start, for minutes
        words += ["--compilation-config", json.dumps({"pass_config": {"fuse_allreduce_rms": False}})]
    return serve.Server(words + (["--load-format", "dummy"] if dummy else []), timeout=timeout)


def llama(path, slots: int, ctx: int, *options, cards: int = 1, kv_type: str = "F16", split: str | None = None,
          timeout: float = 300) -> serve.Server:  # fmt: skip
    """llama-server for one GGUF file, all layers on the GPU where there is one; ``split``: layer or row."""
    gpu = ("--n-gpu-layers", "all", "--fit", "off", "--split-mode", split or "none") if energy.board("cuda:0") else ()
    threads = min(8, llamacpp.n_threads())
    return serve.llama_server(path, ctx, slots, threads, *gpu, "--flash-attn", "on", "--cache-type-k", kv_type.lower(),
                              "--cache-type-v", kv_type.lower(), *FRESH, *options, timeout=timeout)  # fmt: skip


class Model:
    """One model in one type on disk, for one engine, until the ``with`` block ends."""

    def __init__(self, runtime: str, type: str, config: dict, folder, *, cards: int = 1, dummy: bool = False):
        self.runtime, self.type, self.config, self.cards, self.dummy = runtime, type, config, cards, dummy
        self.home = Path(folder) / f"qtutor-{os.getpid()}-{type}"

    def _write(self) -> Model:
        start = time.perf_counter()
        if self.runtime == "vLLM":
            make = random_checkpoint.write_head if self.dummy else random_checkpoint.write
            make(self.home, self.config, self.type)
            self.path, self.file_bytes = self.home, random_checkpoint.nbytes(self.config, self.type)
        else:  # the header's vocabulary is that of the folder
            random_checkpoint.write_head(self.home, self.config, "BF16")
            self.path = random_gguf.write(self.home / "model.gguf", self.home, self.type)
            self.file_bytes = self.path.stat().st_size
        self.write_s = time.perf_counter() - start
        return self

    def __enter__(self) -> Model:
        try:
            return self._write()
        except BaseException:  # what is written lies in memory
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def server(self, program: str, slots: int, ctx: int, *options, kv_type: str, split=None, timeout: float = 300):
        if self.runtime == "vLLM":
            return vllm(program, self.path, slots, ctx, *options, cards=self.cards, kv_type=kv_type, dummy=self.dummy,
                        timeout=timeout)  # fmt: skip
        return llama(self.path, slots, ctx, *options, cards=self.cards, kv_type=kv_type, split=split, timeout=timeout)

    def about(self, **more) -> dict:
        return {"runtime": self.runtime, "type": self.type, "cards": self.cards, **more}


@contextlib.contextmanager
def running(server: serve.Server, meter: Meter):
    """Start a server, and hand over what it says of itself; at the end, wait until the GPU's memory is free again."""
    before, began = meter.gib(), time.perf_counter()
    with server:
        facts = {"start_s": time.perf_counter() - began, "gpu_used_gib": meter.gib()} | said_by(server)
        yield facts
    end = time.monotonic() + 30
    while before is not None and meter.gib() > before + 2 and time.monotonic() < end:
        time.sleep(0.5)


def said_by(server: serve.Server) -> dict:
    """What the engine says: its version; and in its log: the weights on the GPU, how many tokens its cache holds."""
    import httpx

    found, text = {}, server.log()
    for path, key in (("/version", "version"), ("/props", "build_info")):  # vLLM's, llama-server's
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError), server.client(10) as client:
            found["build"] = str(client.get(path).json()[key])
            break
    if match := re.search(r"Model loading took ([\d.]+) GiB", text):
        found["weights_gib"] = float(match[1])
    elif sizes := re.findall(r"CUDA\d+ model buffer size *= *([\d.]+) MiB", text):
        found["weights_gib"] = sum(map(float, sizes)) / 1024
    if match := re.search(r"GPU KV cache size: ([\d,]+) tokens", text):
        found["kv_tokens"] = int(match[1].replace(",", ""))
    return found


def warm(server: serve.Server) -> None:
    """One request, which is answered when all before it are done."""
    import httpx

    body = {"model": "model", "prompt": "one more " * 50, "max_tokens": 8} | GREEDY
    try:
        with server.client(120) as client:
            client.post("/v1/completions", json=body).raise_for_status()
    except httpx.HTTPError as error:
        raise QtutorError(f"The server does not answer ({type(error).__name__}): read its log.") from None


def clocks(server: serve.Server) -> dict[str, np.ndarray]:
    """(Milliseconds, requests) since vLLM started, by the names of CLOCKS; {} of another engine."""
    import httpx

    found = {}
    with contextlib.suppress(httpx.HTTPError), server.client(10) as client:
        text = client.get("/metrics").text
        for name, metric in CLOCKS.items():
            ends = [re.search(rf"^{metric}_{end}\{{.*\}} (\S+)$", text, re.MULTILINE) for end in ("sum", "count")]
            if all(ends):
                found[name] = np.array([1000 * float(ends[0][1]), float(ends[1][1])])
    return found


def loads(server: serve.Server, tokenizer, lengths: serving.Lengths, meter: Meter, limits: tuple[float, float],
          warmup: int = 0, timeout: float = 300, **how) -> list[dict]:  # fmt: skip
    """Rows of :func:`serving.summary` with joules and means of CLOCKS, one for each rate or number of streams."""
    before = clocks(server)
    table = serving.load(server.url, tokenizer, lengths, body=GREEDY, workers=WORKERS, timeout=timeout, **how)
    passed = {name: now - before[name] for name, now in clocks(server).items() if name in before}
    own = {name: ms / n for name, (ms, n) in passed.items() if n}
    rows = []
    for row in serving.summary(table, *limits, warmup=warmup).to_dict("records"):
        load, loop = row.pop("load"), row["loop"]
        kept = table[(table["loop"] == loop) & (table["load"] == load)].iloc[warmup:]
        began = kept["began"].iloc[0]
        used = meter.joules(began + kept["start"].min(), began + kept["last"].max())
        tokens = kept["output_tokens"].sum()
        step = energy.NVML_STEP_S / (kept["last"].max() - kept["start"].min())  # so much of the joules is in doubt
        good = kept[kept["state"] == "successful"]
        row |= {"rate_per_s" if loop == "open" else "streams": load} | own
        for end, share, part in (("", 50, 1), ("_low", 90, 1 - step), ("_high", 10, 1 + step)):
            row[f"joules_per_decode_token{end}"] = part * used / tokens if used and tokens else None
            itl, ttft = (good[name].dropna() for name in ("itl_ms", "ttft_ms"))
            if loop == "closed":  # the median of the requests, and their 10th to 90th percentile
                row[f"decode_tokens_per_s{end}"] = load * 1000 / np.percentile(itl, share) if len(itl) else None
                row[f"ttft_p50_ms{end}"] = np.percentile(ttft, 100 - share) if len(ttft) else None
        rows.append({key: None if isinstance(value, float) and not np.isfinite(value) else value
                     for key, value in row.items()})  # fmt: skip
    return rows


def brief(row: dict) -> str:
    """A row for the terminal: what is known, to four digits."""
    return " ".join(f"{k}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in row.items() if v is not None)


def join(name: str, parts, key, directory=None) -> Path:
    """Join recordings of one kind of machine, made side by side, with what is on file of it; return the path.

    ``key``: columns; rows of a part take the place of all older rows that agree in them.  Each row says in ``recorded``
    when and at which commit it was measured; the file's own provenance is that of the last part.
    """
    checked = [results.validate(files.read_json(Path(part))) for part in parts]
    machines = {results.machine_folder({k: v for k, v in one.machine.items() if k != "devices"}) for one in checked}
    if {one.name for one in checked} != {name} or len(machines) != 1:
        raise QtutorError(f"Only parts of '{name}' from one kind of machine can be joined.")
    machine, rows, versions = machines.pop(), [], {}
    on_file = [results.load(name, machine, directory)] if results.exists(name, machine, directory) else []
    for one in on_file + checked:
        new = {tuple(row.get(column) for column in key) for row in one.rows}
        rows = [row for row in rows if tuple(row.get(column) for column in key) not in new]
        rows += [{"recorded": f"{one.created[:10]} {one.commit}"} | row for row in one.rows]
        versions |= one.versions
    path = Path(directory or results.RESULTS) / machine / f"{name}.json"
    data = checked[-1].model_dump(exclude_none=True) | {"rows": rows, "versions": versions}
    return files.write_text(path, results.dumps(json.loads(json.dumps(data))), "choose another directory")
