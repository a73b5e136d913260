"""What a GGUF model takes on this machine: memory, speed and energy, in a process that loads the file once.

- GPU memory in use (NVML's figure, before and after), and llama.cpp's own account: weights, KV cache, buffers
- prefill and decoding: tokens/s and joules a token, each over at least ``least_s`` seconds, loading excluded
- decoding with a nearly full context, and with several sequences at once
- the *ceiling*: tokens/s if memory did nothing but deliver, bandwidth / bytes read for a token

The measuring runs in a child process: where native code dies (a GPU out of memory can end a process), the notebook
goes on and a row says ``"fits": false``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np

from .. import QtutorError, energy, files, llamacpp
from ..measure import GIB

ENERGY_WITHIN = 0.1  # joules that the counter's steps leave less certain than this are no joules
KV_TYPE = "F16"
# What measure() runs.  "least_s": repeat until the measured part has taken so long, for the energy counter's sake.
FULL = {"prompt": 512, "generate": 128, "repeats": 3, "least_s": 3.0, "ctx": 4096, "depth": 3840, "depth_generate": 64,
        "batches": (1, 2, 4, 8, 16, 32), "batch_prompt": 128, "batch_generate": 64}  # fmt: skip
QUICK = FULL | {"prompt": 128, "generate": 24, "least_s": 0.0, "ctx": 256, "depth": 0, "batches": (1, 4),
                "batch_prompt": 8, "batch_generate": 4}  # fmt: skip


def measure(path, type: str, limit_s: float = 300.0, device_bandwidth: dict | None = None, **settings) -> list[dict]:
    """Measure a GGUF model of a ``type`` in a child process, which is ended after ``limit_s``, and return rows.

    Their ``kind`` is ``model`` (one; ``fits`` is False, with ``not_run``, where memory did not suffice), ``depth`` or
    ``batch``.  ``settings`` override :data:`FULL`.  With ``device_bandwidth``, the result of
    :func:`qtutor.measure.bandwidth`, they have ``ceiling_tokens_per_s`` and the ``ceiling_share`` that was reached.
    """
    file = llamacpp.check_gguf(path)
    if unknown := set(settings) - set(FULL):
        raise QtutorError(f"measure() has no setting {sorted(unknown)[0]!r}: choose from {', '.join(FULL)}.")
    job = FULL | settings
    if max(job["depth"] + job["depth_generate"], job["prompt"], job["generate"]) > job["ctx"]:
        raise QtutorError(f"The settings need more than ctx={job['ctx']} tokens of context: make ctx larger.")
    rows, why = _child([os.path.abspath(path), type, json.dumps(job)], limit_s)
    for row in rows if device_bandwidth else ():
        if row.get("decode_tokens_per_s"):
            row |= _ceiling(file, row, rows[0]["read_bytes_per_token"], device_bandwidth["bandwidth_gb_per_s"])
    if why:
        rows.append({"kind": "note" if rows else "model", "type": type, "fits": False, "not_run": why,
                     "file_bytes": file.file_bytes, "weights_gib": _weights(file) / GIB})  # fmt: skip
    return rows


def _weights(file) -> int:
    return sum(tensor.nbytes for tensor in file.tensors)


def _ceiling(file, row: dict, read: int, gb_per_s: float) -> dict:
    """Tokens/s when memory did nothing but deliver: weights once a step, each sequence's keys and values besides."""
    batch, kind = row.get("batch", 1), llamacpp.GGML[KV_TYPE]
    past = row.get("depth") or (row["prefill_tokens"] if row["kind"] == "batch" else 0)
    mean = past + row["decode_tokens"] / 2  # the cache grows while we write
    cached = mean * llamacpp.kv_bytes(file.metadata, kind.nbytes / kind.weights)
    ceiling = batch * gb_per_s * 1e9 / (read + batch * cached)
    return {"ceiling_tokens_per_s": ceiling, "ceiling_share": row["decode_tokens_per_s"] / ceiling}


def _child(argv, limit_s: float) -> tuple[list[dict], str | None]:
    """Run this module in a fresh process: its rows, and why it stopped early or None."""
    try:
        done = subprocess.run([sys.executable, "-m", "qtutor.rigs.llama_speed", *argv], capture_output=True,
                              timeout=limit_s, cwd=files.ROOT, check=False)  # fmt: skip
        out, last = done.stdout, done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        why = f"The measuring process ended with code {done.returncode} ({last[:200] or 'out of memory'})."
        why = why if done.returncode else None
    except subprocess.TimeoutExpired as late:
        out, why = late.stdout or b"", f"The measuring process took longer than {limit_s:g} s."
    # a row is a line in braces; all else is a library's chatter
    rows = [json.loads(line) for line in out.splitlines() if line[:1] + line[-1:] == b"{}"]
    if rows and "error" in rows[-1]:
        why = rows.pop()["error"]
    return rows, why


class Run:
    """A model that reads and writes random tokens, in every sequence others."""

    def __init__(self, model: llamacpp.Model):
        self.model = model
        self.ids = np.random.default_rng(0).integers(0, model.n_vocab, (model.sequences, model.ctx), dtype=np.int32)

    def prefill(self, tokens: int) -> None:
        self.logits = self.model.step(self.ids[:, :tokens], 0)

    def decode(self, tokens: int, past: int = 0) -> None:
        """``tokens`` steps, in each one token for every sequence; each waits for the one before, as it must."""
        for at in range(past, past + tokens):
            self.logits = self.model.step(self.ids[:, at : at + 1], at)


def _phase(name: str, run, tokens: int, gpu, before=None, repeats: int = 1, seconds: float = 0.0) -> dict:
    """Columns of "prefill" or "decode": ``run()`` handles ``tokens`` tokens; ``before()`` runs ahead of it, untimed."""
    timing, used = energy.timed(run, 0, repeats, seconds, "cuda" if gpu else "cpu", clock="cpu", before=before)
    known = (lambda amount: used.per(amount, ENERGY_WITHIN)) if gpu else (lambda amount: None)
    speed, error = timing.mean_per_second(tokens)
    return {f"{name}_tokens_per_s": speed, f"{name}_tokens_per_s_se": error,
            f"joules_per_{name}_token": known(tokens * timing.n), f"{name}_watts": known(used.seconds)}  # fmt: skip


def _phases(run: Run, prompt: int, n: int, past: int, gpu, **often) -> dict:
    """Columns of both: a prompt for every sequence, then ``n`` tokens each after ``past``."""
    sequences = run.model.sequences
    return (_phase("prefill", lambda: run.prefill(prompt), prompt * sequences, gpu, **often)
            | _phase("decode", lambda: run.decode(n, past), n * sequences, gpu, **often))  # fmt: skip


def _loaded(path, ctx: int, gpu) -> llamacpp.Model:
    """The model on the GPU, or one sentence of why it cannot be there."""
    weights = _weights(llamacpp.check_gguf(path))
    if gpu and weights > (free := gpu.memory()[1] - gpu.memory()[0]):
        raise QtutorError(f"The weights ({weights / GIB:.1f} GiB) are larger than the free GPU memory "
                          f"({free / GIB:.1f} GiB): use a smaller type.")  # fmt: skip
    if not gpu and weights > 16 * GIB:
        raise QtutorError("This build of llama.cpp computes on the CPU only, which takes hours at this size: "
                          "install llama-cpp-python with CMAKE_ARGS=-DGGML_CUDA=ON.")  # fmt: skip
    return llamacpp.Model(path, ctx, exact=False, kv_type=KV_TYPE)


def _measure_here(path, type: str, job: dict, say) -> None:
    """Load the file once and hand each row to ``say`` as soon as it is there."""
    gpu = energy.board() if llamacpp.native().llama_supports_gpu_offload() else None
    before, idle = (gpu.memory()[0], gpu.watts()) if gpu else (0, None)
    start = time.perf_counter()
    with _loaded(path, job["ctx"], gpu) as model:
        load_s, tensors, weights = time.perf_counter() - start, model.gguf.tensors, _weights(model.gguf)
        untied = any(t.name == "output.weight" for t in tensors)
        embedding = next(t.nbytes for t in tensors if t.name == "token_embd.weight")

        def used():
            return (gpu.memory()[0] - before) / GIB if gpu else None

        def tell(kind: str, **row):
            say({"kind": kind, "type": type, "kv_type": KV_TYPE, **row, "gpu_used_gib": used()})

        row = {"fits": True, "file_bytes": model.gguf.file_bytes, "weights_gib": weights / GIB,
               "read_bytes_per_token": weights - (embedding if untied else 0), "load_s": load_s,
               "gpu_used_loaded_gib": used(), "idle_watts": idle, "ctx": job["ctx"],
               "energy_source": energy.source_of("cuda").name if gpu else None, **model.memory()}  # fmt: skip
        run, prompt, n = Run(model), job["prompt"], job["generate"]
        run.prefill(prompt)
        model.clear()
        run.decode(4)  # kernels chosen, clocks up, graphs captured: not measured
        row |= _phases(run, prompt, n, 0, gpu, before=model.clear, repeats=job["repeats"], seconds=job["least_s"])
        tell("model", prefill_tokens=prompt, decode_tokens=n, **row)
        if depth := job["depth"]:
            model.clear()
            n = job["depth_generate"]
            tell("depth", depth=depth, decode_tokens=n, **_phases(run, depth, n, depth, gpu))
        prompt, n = job["batch_prompt"], job["batch_generate"]
        for batch in job["batches"]:
            row = {"batch": batch, "prefill_tokens": prompt, "decode_tokens": n}
            try:
                model.resize(prompt + n, batch)
            except QtutorError as err:
                tell("batch", fits=False, not_run=str(err), **row)
                continue
            run = Run(model)
            run.prefill(8)
            run.decode(4, 8)
            model.clear()
            row |= _phases(run, prompt, n, prompt, gpu)
            tell("batch", fits=True, ms_per_step=1000 * batch / row["decode_tokens_per_s"], **row)


if __name__ == "__main__":  # the child: path, type and settings; a row a line on the standard output
    try:
        llamacpp.trust(sys.argv[1])  # measure() has checked it
        _measure_here(*sys.argv[1:3], json.loads(sys.argv[3]), lambda row: print(json.dumps(row), flush=True))
    except QtutorError as err:
        print(json.dumps({"error": str(err)}), flush=True)
