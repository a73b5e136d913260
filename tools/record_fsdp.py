"""Records of training on several GPUs: the script of the notebook, timed and counted.

One torchrun measures a list of arms on a number of ranks; torchruns of fewer ranks than there are GPUs run side by
side, so that all GPUs are as busy and as warm as when they train together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from qtutor import corpus, course_model, energy, measure, results, te_switch
from qtutor.rigs import fp8_layers as rig

from . import keep

NOTEBOOK = "fp8_on_several_gpus"
TOKENS = 8192  # of a GPU, in a step
PRECISIONS = {
    "BF16": {"precision": "bf16"},
    "FP8 delayed": {"precision": "delayed"},
    "FP8 current": {"precision": "current"},
    "FP8 delayed + FP8 weights": {"precision": "delayed", "fp8_weights": True},
    "FP8 current + FP8 weights": {"precision": "current", "fp8_weights": True},
    "BF16, gathered once": {"precision": "bf16", "keep_gathered": True},
    "FP8 delayed + FP8 weights, gathered once": {"precision": "delayed", "fp8_weights": True, "keep_gathered": True},
}
FAST = {name + ", fast accumulation": PRECISIONS[name] | {"fast_accumulation": True} for name in
        ("FP8 delayed + FP8 weights", "FP8 delayed + FP8 weights, gathered once")}  # fmt: skip
TORCHAO = {"torch.compile BF16": {"torchao": None}, "torch.compile torchao FP8, BF16 all-gather": {"torchao": False},
           "torch.compile torchao FP8, FP8 all-gather": {"torchao": True}}  # fmt: skip
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node"]
LAYERS = {"Llama-2-7B": 8, "Llama-2-70B": 4}  # fit one GPU of 80 GB with optimizer and activations
WHOLE = ("BF16", "FP8 delayed + FP8 weights", "FP8 current + FP8 weights")


def script() -> str:
    """The training script, as the cells of the notebook write it."""
    (path,) = Path(__file__).parent.parent.glob(f"notebooks/*_{NOTEBOOK}.ipynb")
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    parts = [cell.partition("\n")[2] for cell in cells if re.match(r"%%writefile (-a )?train_fsdp\.py\n", cell)]
    return "".join(part.rstrip("\n") + "\n" for part in parts)


def options(shape: str, layers: int, vocab: int, batch: int, sequence: int, **arm) -> dict:
    """The script's arguments for a shape of fp8_layers."""
    s = rig.SHAPES[shape]
    return {"hidden": s.hidden, "ffn": s.intermediate, "heads": s.heads, "kv_heads": s.kv_heads, "layers": layers,
            "vocab": vocab, "batch": batch, "sequence": sequence, "rate": 1e-5, "seed": 0, "data": "", "out": "",
            "precision": "bf16", "fp8_weights": False, "keep_gathered": False, "fast_accumulation": False} | arm


def arms(full: bool) -> list[dict]:
    """Rows to be measured on every number of ranks, without their numbers."""
    if not full:
        tiny = {"hidden": 128, "ffn": 256, "heads": 2, "kv_heads": 2}
        return [{"shape": "tiny", "rung": name, "options": options("Llama-2-7B", 1, 256, 1, 64, **arm) | tiny}
                for name, arm in (PRECISIONS | TORCHAO).items()]  # fmt: skip
    rows = []
    for shape, layers in LAYERS.items():
        sequence = rig.SHAPES[shape].sequence
        sizes = layers, 1024, TOKENS // sequence, sequence
        rows += [{"shape": shape, "rung": name, "options": options(shape, *sizes, **arm)}
                 for name, arm in (PRECISIONS | FAST).items()]  # fmt: skip
    return rows


def arms_of_all(layers: int, vocab: int, chosen: dict[str, dict]) -> list[dict]:
    """Rows of Llama-2-7B's shape, to be measured on all GPUs."""
    return [{"shape": "Llama-2-7B", "rung": name, "options": options("Llama-2-7B", layers, vocab, 4, 2048, **arm)}
            for name, arm in chosen.items()]  # fmt: skip


def torchao_arm(args, device):
    """Hugging Face's Llama under FSDP2 as torchtitan trains it: FP32 shards, BF16 or FP8 products, compiled layers.
    ``args.torchao``: None for BF16, else whether the all-gather is FP8."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training, precompute_float8_dynamic_scale_for_fsdp
    from transformers import LlamaConfig, LlamaForCausalLM

    with device:
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=args.hidden, intermediate_size=args.ffn, num_attention_heads=args.heads, vocab_size=args.vocab,
            num_key_value_heads=args.kv_heads, num_hidden_layers=args.layers, attn_implementation="sdpa"))  # fmt: skip
    if args.torchao is not None:
        convert_to_float8_training(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=args.torchao,
                                                                    emulate=device.type == "cpu"),
                                   module_filter_fn=lambda module, name: "lm_head" not in name)  # fmt: skip
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for number, layer in enumerate(model.model.layers):  # hooks of fully_shard stay outside of what is compiled
        model.model.layers[number] = fully_shard(torch.compile(layer), mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, fused=device.type == "cuda")

    def step(rows):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.torchao:
            precompute_float8_dynamic_scale_for_fsdp(model)

    return model, step


def exposed_share(step) -> float:
    """Share of two steps' time in which the GPU did nothing but communicate (kernels of NCCL, and no other)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(), step()
        torch.cuda.synchronize()
    kernels = [(e.time_range.start, e.time_range.end, e.name.startswith("nccl")) for e in profiler.events()
               if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.lower().startswith("mem")]  # fmt: skip

    def covered(spans) -> float:
        total, end = 0.0, -math.inf
        for first, last in sorted(spans):
            total += max(0.0, last - max(first, end))
            end = max(end, last)
        return total

    every = covered([k[:2] for k in kernels])
    span = max(k[1] for k in kernels) - min(k[0] for k in kernels)
    return (every - covered([k[:2] for k in kernels if not k[2]])) / span


def agreed(value: float, device, op=dist.ReduceOp.MAX) -> float:
    """The largest (or, by ``op``, the sum) of a number over all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.item()


def measured(code: dict, args, device, seconds: float) -> dict:
    """The numbers of one arm on all ranks together: throughput, memory, energy, bytes and exposed communication."""
    gpu, world = device.type == "cuda", dist.get_world_size()
    torch.manual_seed(0)
    rig.free()
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    if hasattr(args, "torchao"):
        model, train = torchao_arm(args, device)
    else:
        if gpu and args.precision != "bf16":
            code["RECIPES"][args.precision] = rig.recipe_of(args.precision, fast_accumulation=args.fast_accumulation)
        model, optimizer = code["build"](args, device)
        train = lambda rows: code["train_step"](model, optimizer, rows)  # noqa: E731
    rows = torch.randint(0, args.vocab, (args.batch, args.sequence + 1), device=device)
    weights = sum(p.numel() for p in model.parameters())
    for _ in range(4):
        train(rows)
    measure.synchronize(device)
    began = time.perf_counter()
    train(rows), train(rows), measure.synchronize(device)
    count = int(agreed(max(3, seconds / ((time.perf_counter() - began) / 2)), device))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)] if gpu else []
    dist.barrier()
    with energy.track_energy(device) as used:
        times = [time.perf_counter()]
        for i in range(count):
            if gpu:
                marks[i].record()
            train(rows)
            times.append(time.perf_counter())
        if gpu:
            marks[-1].record()
    each = ([a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)] if gpu
            else [1000 * (b - a) for a, b in zip(times, times[1:], strict=False)])  # fmt: skip
    ms, tokens = agreed(statistics.median(each), device), args.batch * args.sequence
    cut = statistics.quantiles(each, n=10)
    row = {"ms_per_step": ms, "ms_p10": cut[0], "ms_p90": cut[-1], "repeats": count,
           "train_tokens_per_s": tokens / ms * 1000, "trained_weights": weights}  # fmt: skip
    joules = agreed(used.joules if math.isfinite(used.joules) else 0.0, device, dist.ReduceOp.SUM)
    if gpu and joules:
        row |= {"joules_per_train_token": joules / (count * tokens * world), "watts": joules / used.seconds / world}
        error = used.relative_error
        row |= {f"joules_per_train_token_{end}": row["joules_per_train_token"] * (1 + sign * error)
                for end, sign in (("low", -1), ("high", 1))}  # fmt: skip
    if gpu:
        row["peak_gib"] = agreed(torch.cuda.max_memory_allocated() - before, device) / measure.GIB
    if gpu and world > 1:
        row["exposed_share"] = agreed(exposed_share(lambda: train(rows)), device, dist.ReduceOp.SUM) / world
    code["Wire"].moved.clear()
    with code["Wire"]() as wire:  # last of all: a dispatch mode makes Dynamo give up compiled layers for good
        train(rows)
    for way, name in (("gathered", "_allgather_base_"), ("scattered", "_reduce_scatter_base_")):
        row[f"{way}_bytes_per_weight"] = wire.moved[name] / weights
    return row


def worker(source: str, out: str, seconds: float) -> None:
    """What each rank runs: all arms of the list beside ``out``, one row a line into ``out``."""
    te_switch.activate()
    code = runpy.run_path(source, run_name="train_fsdp")
    _, _, device, _ = code["start"](timedelta(minutes=10))
    for row in json.loads(Path(out).with_suffix(".todo").read_text()):
        args = argparse.Namespace(**row.pop("options"))
        row |= {"layers": args.layers, "batch": args.batch, "sequence": args.sequence,
                "tokens": args.batch * args.sequence, "ranks": dist.get_world_size()}  # fmt: skip
        try:
            row |= measured(code, args, device, seconds)
        except Exception as error:  # noqa: BLE001 - an arm that does not fit must not cost the rest
            row["not_run"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        failed = agreed("not_run" in row, device)
        if failed and "not_run" not in row:
            row = {key: row[key] for key in ("shape", "rung", "layers", "batch", "sequence", "tokens", "ranks")}
            row["not_run"] = "another rank failed"
        torch._dynamo.reset(), rig.free()
        if dist.get_rank() == 0:
            with open(out, "a") as file:
                print(json.dumps(row), file=file, flush=True)
    dist.destroy_process_group()


def side_by_side(source: Path, world: int, gpus: int, rows: list[dict], seconds: float, folder: Path) -> list[dict]:
    """Measure ``rows`` on ``world`` ranks, in as many torchruns at once as there are GPUs for."""
    lanes, runs = max(1, gpus // world), []
    for lane in range(lanes):
        out = folder / f"{world}-{lane}.jsonl"
        out.unlink(missing_ok=True)
        out.with_suffix(".todo").write_text(json.dumps(rows[lane::lanes]))
        visible = ",".join(str(i) for i in range(lane * world, (lane + 1) * world))
        runs.append((out, subprocess.Popen(
            [*TORCHRUN, str(world), "--master-port", str(29500 + 10 * world + lane), "-m", "tools.record_fsdp",
             str(source), str(out), str(seconds)],
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": visible} if torch.cuda.is_available() else {}))))  # fmt: skip
    for _, process in runs:
        process.wait()
    return [json.loads(line) for out, _ in runs if out.exists() for line in out.read_text().splitlines()]


def record(full: bool) -> Path:
    """``fp8_scaling``: every arm on 4, 2 and 1 GPUs; a whole 7B on all of them."""
    gpus = torch.cuda.device_count() or 2
    whole = arms_of_all(32, 32000, {name: PRECISIONS[name] for name in WHOLE})
    return saved("fp8_scaling", [(n, arms(full)) for n in (4, 2, 1) if n <= gpus] + [(gpus, whole)] * full, full)


def record_torchao(full: bool) -> Path:
    """``fp8_scaling_torchao``: torchao under torch.compile, and Transformer Engine beside it, on all GPUs."""
    both = {name: PRECISIONS[name] for name in WHOLE} | TORCHAO
    rows = arms_of_all(LAYERS["Llama-2-7B"], 1024, both) if full else arms(False)
    return saved("fp8_scaling_torchao", [(torch.cuda.device_count() or 2, rows)], full)


def saved(name: str, todo: list, full: bool) -> Path:
    """Measure (ranks, rows) after (ranks, rows); keep the result after each."""
    if full:
        rig.require_fp8()
    gpus, rows = torch.cuda.device_count() or 2, []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "train_fsdp.py")
        source.write_text(script())
        for world, part in todo:
            rows += side_by_side(source, world, gpus, part, 10 if full else 0.2, Path(folder))
            path = keep(results.save(name, rows, profile="full" if full else "quick", devices=gpus))
    return path


def losses(source: Path, data: Path, ranks: int, seed: int, name: str, steps: int, **sizes) -> subprocess.Popen:
    """Start the script on ``ranks`` ranks; its output has the loss of every step."""
    arm = PRECISIONS[name]
    flags = ["--precision", arm["precision"], "--fp8-weights", str(int(arm.get("fp8_weights", 0)))]
    port, out = 29600 + 40 * ranks + 4 * seed + list(PRECISIONS).index(name), source.with_name(f"{ranks}-{seed}-{name}")
    for key, value in {"data": data, "steps": steps, "seed": seed, "save-every": 10**6, "out": out, **sizes}.items():
        flags += [f"--{key}", str(value)]
    lane = {"CUDA_VISIBLE_DEVICES": ",".join(str((ranks * seed + i) % 4) for i in range(ranks))} if ranks < 4 else {}
    emulated = [] if te_switch.activate().real else ["-m", "qtutor.emulation"]
    return subprocess.Popen([*TORCHRUN, str(ranks), "--master-port", str(port), *emulated, str(source), *flags],
                            env=os.environ | lane, stdout=subprocess.PIPE, text=True)  # fmt: skip


def record_losses(full: bool, seeds=range(4)) -> Path:
    """``fp8_scaling_loss``: the same global batches on 1, 2 and 4 ranks, in BF16 and with FP8 weights, by seed."""
    gpus, rows, steps = torch.cuda.device_count() or 2, [], 400 if full else 4
    sizes = {"layers": 4, "batch": 16, "sequence": 512} if full else {"hidden": 64, "ffn": 128, "sequence": 64}
    with tempfile.TemporaryDirectory() as folder:
        source, data = Path(folder, "train_fsdp.py"), Path(folder, "tokens.npy")
        source.write_text(script())
        np.save(data, corpus.tokens("train", course_model.load_tokenizer()))
        names = [name for name in PRECISIONS if name in WHOLE]
        for seed in seeds if full else [0]:
            runs = {(n, name): losses(source, data, n, seed, name, steps, **sizes)
                    for n in (1, 2, 4) if n <= gpus for name in names}  # fmt: skip
            for (ranks, name), run in runs.items():
                found = [float(nats) for nats in re.findall(r"loss ([\d.]+)", run.communicate()[0])]
                for step in range(0, len(found), max(1, steps // 16)):
                    part = found[step : step + max(1, steps // 16)]
                    rows.append({"ranks": ranks, "recipe": name, "seed": seed, "step": step + len(part), "steps": steps,
                                 "tokens_per_step": sizes.get("batch", 8) * sizes["sequence"],
                                 "train_nats": round(statistics.fmean(part), 5)})  # fmt: skip
            path = keep(results.save("fp8_scaling_loss", rows, profile="full" if full else "quick", devices=gpus))
    return path


RECORDS = {"fp8_scaling": record, "fp8_scaling_torchao": record_torchao, "fp8_scaling_loss": record_losses}

if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], float(sys.argv[3]))
