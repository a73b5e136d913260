"""Record ``llama70b``: a model of Llama-2-70B's shape in several llama.cpp types on one GPU.

    python -m tools.record_llama70b --folder /dev/shm --types Q6_K,Q4_K_M     # -> data/results/<machine>/llama70b.json
    python -m tools.record_llama70b --tiny --out /tmp/somewhere               # the same code in seconds on any CPU
    python -m tools.record_llama70b --served vLLM --types FP8,W4A16 --vllm "env PYTHONPATH=/site python3 -m vllm..."
    python -m tools.record_llama70b --served llama.cpp --types F16 --cards 2 --split layer,tensor --out /tmp/part

Each type is written with random weights (:mod:`qtutor.rigs.random_gguf`), measured (:mod:`qtutor.rigs.llama_speed`),
checked with llama.cpp's own programs and deleted; the rows are saved after each.

``--served``: the same shape in a server under load, rows of kind ``served``, by engine, type, type of the cache and
number of cards.  A closed loop: so many users send prompts of 128 tokens and get 64, or of 4,096; the model is given a
context of 4,352 tokens instead of its own 4,096, as such a prompt and its answer need.  ``users_fit``: so many users
with 4,352 tokens each fit beside the weights, and that many (fewer where the time ends) send long prompts at last.
BF16 in vLLM has weights that vLLM invents (no file of 138 GB); all others are random codes with real scales.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qtutor import QtutorError, energy, files, llamacpp, measure, results
from qtutor.decide import capacity
from qtutor.rigs import llama_speed, random_gguf, serving

from . import engines

MODEL = "Llama-2-70B"
TYPES = ("Q6_K", "Q4_K_M", "Q8_0", "Q5_K_M")  # an interrupted recording has the notebook's type
CTX = 4352  # tokens of a served user: 4,096 of a prompt, an answer, and llama.cpp's steps of 256
SHORT, LONG, USERS = (128, 64), (4096, 64), (1, 8, 32)  # prompt and answer; users who send short ones
TINY = {"config": random_gguf.TINY | {"vocab_size": 8192, "max_position_embeddings": 512}, "ctx": 512,
        "short": (32, 8), "long": (256, 8), "users": (1, 3), "most": 3}  # fmt: skip
MEMORY = "/dev/shm"  # memory-backed: a file of 57 GB is read in seconds


def check_machine(folder, type: str, config=MODEL) -> None:
    """Raise QtutorError, one sentence, where ``config`` in ``type`` cannot be recorded with its file in ``folder``."""
    size, gpu = capacity.size(config, type), energy.board()
    if not Path(folder).is_dir() or shutil.disk_usage(folder).free < size.file_bytes:
        raise QtutorError(f"'{folder}' has no room for a file of {size.gb:.0f} GB: give another folder.")
    if config != MODEL:
        return  # a small shape runs on a CPU
    if gpu is None:
        raise QtutorError("There is no NVIDIA GPU here: record this on a machine with one of 80 GB.")
    if not llamacpp.native().llama_supports_gpu_offload():
        raise QtutorError("This llama.cpp was built without CUDA: install llama-cpp-python with "
                          "CMAKE_ARGS=-DGGML_CUDA=ON.")  # fmt: skip
    need, there = capacity.fits(config, type, llama_speed.FULL["ctx"]).total_gib, gpu.memory()[1] / measure.GIB
    if there < need:
        raise QtutorError(f"The GPU has {there:.0f} GiB, and {type} needs {need:.0f}: choose a smaller type.")


def record(folder=MEMORY, types=TYPES, config=MODEL, budget_s: float = 420.0, tools: str = "first",
           directory=None, profile: str | None = None, say=print, **settings) -> Path:  # fmt: skip
    """Write, measure and delete a file of each type in ``folder``; save the rows after each; return the path.

    Rows that this device recorded before, of types that are not measured now, stay.

    Args:
        budget_s: no type is begun that is not likely to end within it.
        tools: "first", "all" or "none" of the types are also run through llama.cpp's programs.
        directory: where results go instead of the course's data/results.
        settings: as for ``llama_speed.measure``.

    Raises QtutorError as :func:`check_machine` does.
    """
    began, longest, rows, path = time.perf_counter(), 0.0, [], None
    types = [capacity.size(config, type).type for type in types]
    check_machine(folder, types[0], config)
    found = _bandwidth()
    say(f"memory bandwidth: copy {found['copy_gb_per_s']:.0f} GB/s, read {found['read_gb_per_s']:.0f} GB/s")
    for type in types:
        start = time.perf_counter()
        if path and start - began + longest > budget_s:
            say(f"{type}: left out, {start - began:.0f} of {budget_s:.0f} s are used")
            continue
        model = Path(folder) / f"qtutor-{os.getpid()}-{type}.gguf"
        try:
            random_gguf.write(model, config, type)
            write_s = time.perf_counter() - start
            say(f"{type}: {model.stat().st_size:,} bytes written in {write_s:.0f} s")
            measured = llama_speed.measure(model, type, device_bandwidth=found, **settings)
            measured[0]["write_s"] = write_s
            if measured[0]["fits"] and (tools == "all" or (tools == "first" and type == types[0])):
                measured += run_tools(model, type, llama_speed.FULL | settings)
        finally:
            model.unlink(missing_ok=True)
        for row in measured:
            say(engines.brief(row))
        rows += measured
        longest = max(longest, time.perf_counter() - start)
        kept = _on_file({row["type"] for row in rows}, directory)
        path = results.save("llama70b", [{"kind": "bandwidth", **found}, *kept, *rows], directory=directory,
                            profile=profile)  # fmt: skip
        say(f"{type}: {time.perf_counter() - start:.0f} s; saved {path.name}")
    return path


def _bandwidth() -> dict:
    """:func:`measure.bandwidth` in a process of its own, whose memory on the GPU ends with it."""
    code = "import json; from qtutor import measure; print(json.dumps(measure.bandwidth()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QtutorError("The memory bandwidth could not be measured: does 'python -m qtutor doctor' find the GPU?")
    return json.loads(done.stdout.splitlines()[-1])


def _on_file(types, directory) -> list[dict]:
    """Rows of this very device that are on file, but for the bandwidth and those of ``types``, measured now."""
    about = measure.machine()
    where = results.machine_folder(about)
    if not results.exists("llama70b", where, directory):
        return []
    old = results.load("llama70b", where, directory)
    rows = old.rows if old.device == about["device"] else []
    return [row for row in rows if row["kind"] != "bandwidth" and row["type"] not in types]


def run_tools(path, type: str, job: dict) -> list[dict]:
    """The same tests by llama.cpp's own programs: rows of kind ``tool``, with ``not_run`` for one that fails."""
    many = sorted({job["batches"][0], job["batches"][-1]}) if job["batches"] else [1]
    context = (job["batch_prompt"] + job["batch_generate"]) * many[-1]
    same = f"-ngl 99 -fa on -sm none -t {llamacpp.n_threads()}"
    runs = {
        "llama-bench": f"-p {job['prompt']} -n {job['generate']} -r 2 {same} -o jsonl",
        "llama-batched-bench": f"-npp {job['batch_prompt']} -ntg {job['batch_generate']} -npl "
                               f"{','.join(map(str, many))} -c {context} {same} --output-format jsonl",
    }  # fmt: skip
    rows = []
    for name, options in runs.items():
        try:  # both may end before their log thread has printed the last lines: then they are asked again
            llamacpp.tool(name)
        except QtutorError:
            continue
        try:
            said, _ = llamacpp.run_tool(name, "-m", os.fspath(path), *options.split(), until=r"(?m)^\{.*\}$")
            found = [_tool_columns(json.loads(line)) for line in said.splitlines() if line.startswith("{")]
        except QtutorError as error:
            found = [{"not_run": str(error)}]
        rows += [{"kind": "tool", "tool": name, "type": type} | columns for columns in found]
    return rows


def _tool_columns(found: dict) -> dict:
    if "avg_ts" in found:  # llama-bench: a line for each test
        column = f"tool_{'decode' if found['n_gen'] else 'prefill'}_tokens_per_s"
        return {column: found["avg_ts"], f"{column}_sd": found["stddev_ts"], "build": found.get("build_commit"),
                "backends": found.get("backends")}  # fmt: skip
    return {"batch": found["pl"], "tool_prefill_tokens_per_s": found["speed_pp"],
            "tool_decode_tokens_per_s": found["speed_tg"]}  # fmt: skip


def record_served(runtime: str, types, program: str = engines.VLLM, folder=MEMORY, directory=None,
                  budget_s: float = 560.0, cards: int = 1, splits=(None,), kv_types=None, config=None, ctx: int = CTX,
                  short=SHORT, long=LONG, users=USERS, most: int = 128, options: str = "",
                  say=print) -> Path | None:  # fmt: skip
    """Serve the shape in each type and cache type, and measure; rows are saved as they come; return the path.

    ``budget_s``: nothing is begun that would end later.  ``splits``: of llama.cpp over ``cards``, layer and
    tensor.  ``options``: more words of the server's command line.
    """
    end, rows, path, base = time.monotonic() + budget_s, [], None, config or capacity.MODELS[MODEL]
    starts = 0.0  # seconds that the last start took: the next takes as long
    config = base | {"max_position_embeddings": max(ctx, base["max_position_embeddings"])}
    vllm = runtime == "vLLM"

    def left() -> float:
        return end - time.monotonic()

    def tell(**row) -> None:
        nonlocal path
        rows.append({"kind": "served", "runtime": runtime, "shape": MODEL, "options": options or None, **row})
        path = results.save("llama70b", rows, directory=directory)
        say(runtime, engines.brief(row))

    def measured(server, model, meter, about, tokens, streams, requests) -> dict | None:
        if left() < 25:
            say(f"{about['type']}: no time for {streams} users with {tokens[0]} tokens")
            return None
        (row,) = engines.loads(server, model.home, serving.fixed(*tokens), meter, (1e9, 1e9), streams=(streams,),
                               requests=requests, warmup=streams if requests >= 2 * streams else 0,
                               seconds=left() - 15, timeout=left())  # fmt: skip
        row |= {"prefill_tokens": tokens[0], "decode_tokens": tokens[1], "time_to_first_token_ms": row["ttft_p50_ms"]}
        tell(**about, **row)
        return row

    for type in types:
        dummy = vllm and type == "BF16"
        with engines.Model(runtime, type, config, folder, cards=cards, dummy=dummy) as model, \
             engines.Meter(cards) as meter:  # fmt: skip
            say(f"{type}: {model.file_bytes:,} bytes, written in {model.write_s:.0f} s")
            plans = list(itertools.product(splits, kv_types or (("BF16", "FP8") if vllm else ("F16", "Q8_0"))))
            for done, (split, kv_type) in enumerate(plans):
                about = model.about(kv_type=kv_type, split="tensor" if vllm and cards > 1 else split)
                fit = most if vllm or not meter.boards else min(most, llama_users(model, meter, kv_type, ctx))
                # llama-server divides its cache among its slots when it starts; vLLM when it has to
                small = -(-(sum(short) + 16) // 256) * 256
                stages = [(max(users), small, users, False), (fit, ctx, (), True)]
                stages = [(most, ctx, users, True)] if vllm else stages
                for slots, cells, many, last in stages:
                    here = about | {"slots": slots, "ctx": cells}
                    if left() < 40 + starts:
                        say(f"{type}, cache {kv_type}: no time for a server of {slots} slots")
                        continue
                    try:
                        server = model.server(program, slots, cells, *shlex.split(options), kv_type=kv_type,
                                              split=split, timeout=left() - 20)  # fmt: skip
                        with engines.running(server, meter) as facts:
                            starts = facts["start_s"]
                            facts.setdefault("kv_tokens", slots * cells)
                            fit = min(most, facts["kv_tokens"] // ctx)
                            tell(**here, **facts, **({"users_fit": fit} if last else {}), file_bytes=model.file_bytes,
                                 write_s=model.write_s, model="dummy weights" if dummy else "random codes")  # fmt: skip
                            engines.warm(server)
                            for n in many:
                                measured(server, model, meter, here, short, n, max(4, 2 * n))
                            one = measured(server, model, meter, here, long, 1, 3) if last else None
                            if one and fit > 1:  # all of them, or as many as the time allows
                                share = (left() - 40) / (len(plans) - done)
                                n = min(fit, int(share / (1.2e-3 * one["ttft_p50_ms"])))
                                if n > 1:
                                    measured(server, model, meter, here | {"users_fit": fit}, long, n, n)
                    except QtutorError as error:
                        tell(**here, not_run=str(error))
    return path


def llama_users(model, meter, kv_type: str, ctx: int) -> int:
    """So many users with ``ctx`` tokens each fit into the GPUs beside the weights and two GiB a card (eight, where
    there are several: llama.cpp puts work of several batches on each; a cache in Q8_0, copied to F16, takes four)."""
    spare = (2 if len(meter.boards) == 1 else 8) * measure.GIB + (0 if kv_type == "F16" else 4 * measure.GIB)
    room = sum(board.memory()[1] - spare for board in meter.boards) - model.file_bytes
    return max(1, int(room // capacity.kv_bytes(model.config, ctx, kv_type)))


def record_llama70b(full: bool) -> Path:
    """What ``make results`` calls: the real shape, or (``full=False``) a model of two layers."""
    if full:
        return record(profile="full")
    with tempfile.TemporaryDirectory() as folder:
        return record(folder, ["Q6_K"], random_gguf.TINY, tools="none", profile="quick", **llama_speed.QUICK)


RECORDS = {"llama70b": record_llama70b}


def main(argv=None) -> int:
    """The command line; returns 0, or 1 after one sentence of what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.record_llama70b", description="Measure a 70B-shaped model.")
    parser.add_argument("--folder", default=MEMORY, help="where the files go, one at a time: memory-backed")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp types, by commas")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further type is begun")
    parser.add_argument("--tools", choices=("first", "all", "none"), default="first", help="llama.cpp's programs")
    parser.add_argument("--tiny", action="store_true", help="two layers and short runs, to try the code anywhere")
    parser.add_argument("--out", help="folder for the results instead of data/results; needed by --tiny")
    served = parser.add_argument_group("served")
    served.add_argument("--served", choices=("vLLM", "llama.cpp"), help="measure a server of this engine under load")
    served.add_argument("--vllm", default=engines.VLLM, help="the command that starts vLLM")
    served.add_argument("--cards", type=int, default=1, help="GPUs that hold the model")
    served.add_argument("--split", default="", help="llama.cpp over several cards: layer,tensor")
    served.add_argument("--kv", default="", help="types of the cache: BF16,FP8 (vLLM), F16,Q8_0 (llama.cpp)")
    served.add_argument("--options", default="", help="more words of the server's command: \"--ubatch-size 2048\"")
    served.add_argument("--join", nargs="+", metavar="PART", help="join parts: the JSON files that --out wrote")
    args = parser.parse_args(argv)
    if args.tiny and not args.out:
        parser.error("--tiny needs --out: data/results is for the real shape")
    small = dict(config=random_gguf.TINY, profile="quick", **llama_speed.QUICK) if args.tiny else {}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if args.join:
                key = ("kind", "runtime", "type", "kv_type", "cards", "split")
                print(engines.join("llama70b", args.join, key, args.out))
            elif args.served:
                record_served(args.served, args.types.split(","), args.vllm, temporary if args.tiny else args.folder,
                              args.out, args.budget, args.cards, args.split.split(",") if args.split else (None,),
                              args.kv.split(",") if args.kv else None, options=args.options,
                              **(TINY if args.tiny else {}))  # fmt: skip
            else:
                record(temporary if args.tiny else args.folder, args.types.split(","), budget_s=args.budget,
                       tools=args.tools, directory=args.out, say=lambda text: print(text, flush=True),
                       **small)  # fmt: skip
        except QtutorError as err:
            print(err, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
