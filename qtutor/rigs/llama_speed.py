"""What a GGUF model takes on this machine: memory, speed and energy, in a process that loads the file once.

- GPU memory in use (NVML's figure, before and after), and llama.cpp's own account: weights, KV cache, buffers
- prefill and decoding: tokens/s and joules a token, each over at least ``least_s`` seconds, loading excluded
- decoding with a nearly full context, and with several sequences at once
- the *ceiling*: tokens/s if memory did nothing but deliver, bandwidth / bytes read for a token

    path = random_gguf.write("small.gguf", random_gguf.SMALL, "Q6_K")
    rows = llama_speed.measure(path, "Q6_K", device_bandwidth=qtutor.measure.bandwidth(), **llama_speed.QUICK)

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

# What measure() runs.  "least_s": repeat until the measured part has taken so long, for the energy counter's sake.
FULL = {"prompt": 512, "generate": 128, "repeats": 3, "least_s": 3.0, "ctx": 4096, "depth": 3840, "depth_generate": 64,
        "batches": (1, 2, 4, 8, 16, 32), "batch_prompt": 128, "batch_generate": 64, "kv_type": "F16"}  # fmt: skip
QUICK = FULL | {"prompt": 128, "generate": 24, "repeats": 3, "least_s": 0.0, "ctx": 256, "depth": 0,
                "batches": (1, 4), "batch_prompt": 8, "batch_generate": 4}  # fmt: skip


def measure(path, type: str | None = None, limit_s: float = 300.0, threads: int | None = None,
            device_bandwidth: dict | None = None, **settings) -> list[dict]:  # fmt: skip
    """Measure a GGUF model in a child process, which is ended after ``limit_s``, and return rows.

    ``type`` names the rows (by default read off the file).  ``settings`` override :data:`FULL`, e.g.
    ``batches=(1, 8)``.  With ``device_bandwidth``, the result of :func:`qtutor.measure.bandwidth`, rows get
    ``ceiling_tokens_per_s`` and the ``ceiling_share`` that was reached.

    Rows have a ``kind``: ``model`` (one; ``fits`` is False, with ``not_run``, where memory did not suffice), ``depth``
    and ``batch``; their columns are those of ``results.VOCABULARY``, None where this machine cannot measure it.  Raises
    QtutorError for a file that is not sound and for settings that do not exist.
    """
    file = llamacpp.check_gguf(path)
    if unknown := set(settings) - set(FULL):
        raise QtutorError(f"measure() has no setting {sorted(unknown)[0]!r}: choose from {', '.join(FULL)}.")
    weights_type = max(file.tensors, key=lambda t: t.nbytes).type
    job = FULL | settings | {"type": type or weights_type, "threads": threads}
    job["kv_type"] = str(job["kv_type"]).upper()
    if job["kv_type"] not in llamacpp.KV_TYPES:
        raise QtutorError(f"There is no cache type {job['kv_type']!r}: choose one of {', '.join(llamacpp.KV_TYPES)}.")
    if job["depth"] + job["depth_generate"] > job["ctx"] or max(job["prompt"], job["generate"]) > job["ctx"]:
        raise QtutorError(f"The settings need more than ctx={job['ctx']} tokens of context: make ctx larger.")
    rows, why = _child([os.fspath(path), json.dumps(job)], limit_s)
    for row in rows if device_bandwidth else ():
        if row.get("decode_tokens_per_s"):
            row |= _ceiling(file, row, rows[0]["read_bytes_per_token"], device_bandwidth["bandwidth_gb_per_s"])
    if why:
        note = {"kind": "note" if rows else "model", "type": job["type"], "fits": False, "not_run": why}
        weights = sum(t.nbytes for t in file.tensors)
        rows.append(note | {"file_bytes": file.file_bytes, "weights_gib": weights / GIB})
    return rows


def _ceiling(file, row: dict, read: int, gb_per_s: float) -> dict:
    """Tokens/s when memory did nothing but deliver: weights once a step, each sequence's keys and values besides.

    The cache grows while we write, so its mean length counts.
    """
    batch = row.get("batch", 1)
    past = row.get("depth") or (row["prefill_tokens"] if row["kind"] == "batch" else 0)
    kind = llamacpp.GGML[row["kv_type"]]
    cached = (past + row["decode_tokens"] / 2) * llamacpp.kv_bytes(file.metadata, kind.nbytes / kind.weights)
    ceiling = batch * gb_per_s * 1e9 / (read + batch * cached)
    return {"ceiling_tokens_per_s": ceiling, "ceiling_share": row["decode_tokens_per_s"] / ceiling}


def _child(argv, limit_s: float) -> tuple[list[dict], str | None]:
    """Run this module in a fresh process: its rows, and why it stopped early or None."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(files.ROOT), os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run([sys.executable, "-m", "qtutor.rigs.llama_speed", *argv], capture_output=True,
                              timeout=limit_s, env=env, check=False)  # fmt: skip
        out, last = done.stdout, done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        why = f"The measuring process ended with code {done.returncode} ({last[:200] or 'out of memory'})."
        why = why if done.returncode else None
    except subprocess.TimeoutExpired as late:
        out, why = late.stdout or b"", f"The measuring process took longer than {limit_s:g} s."
    lines = [line for line in out.splitlines() if line[:1] + line[-1:] == b"{}"]  # all else is a library's chatter
    rows = [json.loads(line) for line in lines]
    if rows and "error" in rows[-1]:
        why = rows.pop()["error"]
    return rows, why


# ------------------------------------------------------------------------------------------------ in the child process


class Run:
    """A model that reads and writes random tokens, each sequence its own; ``sequences`` side by side."""

    def __init__(self, model: llamacpp.Model):
        self.model = model
        self.ids = np.random.default_rng(0).integers(0, model.n_vocab, (model.sequences, model.ctx), dtype=np.int32)

    def prefill(self, tokens: int, past: int = 0) -> None:
        """Read ``tokens`` tokens in every sequence."""
        self.logits = self.model.step(self.ids[:, past : past + tokens], past)

    def decode(self, tokens: int, past: int = 0) -> None:
        """``tokens`` steps, in each one token for every sequence; each step waits for the one before, as it must."""
        for at in range(past, past + tokens):
            self.logits = self.model.step(self.ids[:, at : at + 1], at)


def _phase(name: str, run, tokens: int, gpu, before=None, repeats: int = 1, seconds: float = 0.0) -> dict:
    """Columns of "prefill" or "decode": ``run()`` handles ``tokens`` tokens; ``before()`` runs ahead of it, untimed."""
    timing, used = energy.timed(run, 0, repeats, seconds, "cuda" if gpu else "cpu", clock="cpu", before=before)
    known = (lambda amount: used.per(amount, ENERGY_WITHIN)) if gpu else (lambda amount: None)
    speed, error = timing.mean_per_second(tokens)
    return {f"{name}_tokens_per_s": speed, f"{name}_tokens_per_s_se": error,
            f"joules_per_{name}_token": known(tokens * timing.n), f"{name}_watts": known(used.seconds)}  # fmt: skip


def _loaded(path, job: dict, gpu) -> llamacpp.Model:
    """The model on the GPU, or one sentence of why it cannot be there."""
    weights = sum(t.nbytes for t in llamacpp.check_gguf(path).tensors)
    if gpu and weights > (free := gpu.memory()[1] - gpu.memory()[0]):
        raise QtutorError(f"The weights ({weights / GIB:.1f} GiB) are larger than the free GPU memory "
                          f"({free / GIB:.1f} GiB): use a smaller type.")  # fmt: skip
    if not gpu and weights > 16 * GIB:
        raise QtutorError("This build of llama.cpp computes on the CPU only, which takes hours at this size: "
                          "install llama-cpp-python with CMAKE_ARGS=-DGGML_CUDA=ON.")  # fmt: skip
    return llamacpp.Model(path, job["ctx"], job["threads"], exact=False, kv_type=job["kv_type"])


def _measure_here(path, job: dict, say) -> None:
    """Load the file once and hand each row to ``say`` as soon as it is there."""
    gpu = energy.board() if llamacpp.native().llama_supports_gpu_offload() else None
    before, idle = (gpu.memory()[0], gpu.watts()) if gpu else (0, None)
    start = time.perf_counter()
    with _loaded(path, job, gpu) as model:
        load_s, tensors, kv = time.perf_counter() - start, model.gguf.tensors, {"kv_type": job["kv_type"]}
        weights = sum(t.nbytes for t in tensors)
        untied = any(t.name == "output.weight" for t in tensors)
        embedding = next(t.nbytes for t in tensors if t.name == "token_embd.weight")

        def used():
            return (gpu.memory()[0] - before) / GIB if gpu else None

        row = {"kind": "model", "type": job["type"], "fits": True, "file_bytes": model.gguf.file_bytes,
               "weights_gib": weights / GIB, "read_bytes_per_token": weights - (embedding if untied else 0),
               "load_s": load_s, "gpu_used_loaded_gib": used(), "idle_watts": idle,
               "energy_source": energy.source_of("cuda").name if gpu else None, **model.memory()}  # fmt: skip
        run, prompt, n = Run(model), job["prompt"], job["generate"]
        run.prefill(prompt)
        model.clear()
        run.decode(4)  # kernels chosen, clocks up, graphs captured: not measured
        often = {"before": model.clear, "repeats": job["repeats"], "seconds": job["least_s"]}
        row |= {"prefill_tokens": prompt, "decode_tokens": n, "ctx": job["ctx"]} | kv
        row |= _phase("prefill", lambda: run.prefill(prompt), prompt, gpu, **often)
        row |= _phase("decode", lambda: run.decode(n), n, gpu, **often)
        if not np.isfinite(run.logits).all():
            raise QtutorError("The logits of this model are not finite: make random_gguf.STD smaller.")
        say(row | {"gpu_used_gib": used()})
        if depth := job["depth"]:
            model.clear()
            n = job["depth_generate"]
            row = {"kind": "depth", "type": job["type"], "depth": depth, "decode_tokens": n} | kv
            row |= _phase("prefill", lambda: run.prefill(depth), depth, gpu)
            row |= _phase("decode", lambda: run.decode(n, depth), n, gpu)
            say(row | {"gpu_used_gib": used()})
        prompt, n = job["batch_prompt"], job["batch_generate"]
        for batch in job["batches"]:
            row = {"kind": "batch", "type": job["type"], "batch": batch, "prefill_tokens": prompt,
                   "decode_tokens": n} | kv  # fmt: skip
            try:
                model.resize(prompt + n, batch)
            except QtutorError as err:
                say(row | {"fits": False, "not_run": str(err)})
                continue
            run = Run(model)
            run.prefill(8)
            run.decode(4, 8)
            model.clear()
            row |= {"fits": True} | _phase("prefill", lambda: run.prefill(prompt), prompt * batch, gpu)  # noqa: B023
            row |= _phase("decode", lambda: run.decode(n, prompt), n * batch, gpu)  # noqa: B023
            say(row | {"ms_per_step": 1000 * batch / row["decode_tokens_per_s"], "gpu_used_gib": used()})


if __name__ == "__main__":  # the child: a path and the settings; a row a line on the standard output
    try:
        llamacpp.trust(sys.argv[1])  # measure() has checked it
        _measure_here(sys.argv[1], json.loads(sys.argv[2]), lambda row: print(json.dumps(row), flush=True))
    except QtutorError as err:
        print(json.dumps({"error": str(err)}), flush=True)
