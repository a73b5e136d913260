"""The notebook's training script on several processes: what travels, what a checkpoint holds, who dies, who hangs."""

import os
import re
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import torch

from tools import record_fsdp

SMALL = {"hidden": 64, "ffn": 128, "heads": 4, "kv-heads": 2, "layers": 2, "vocab": 128, "sequence": 32}
FP8 = ["--precision", "delayed", "--fp8-weights"]
DUMP = """
import argparse, runpy, sys, torch
import torch.distributed as dist
code = runpy.run_path(sys.argv[1], run_name="train_fsdp")

def dump(args):
    model, optimizer = code["build"](args, torch.device("cuda", int(sys.argv[-1])) if args.gpu else torch.device("cpu"))
"""


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request):
    return request.param


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("fsdp") / "train_fsdp.py"
    path.write_text(record_fsdp.script(), "utf-8")
    return path


class Run:
    """A torchrun of the script, its output read line by line; ``at(line)`` is called for each."""

    def __init__(self, source, where, ranks, *flags, restarts=0, at=None, program=None, **sizes):
        if where == "gpu" and torch.cuda.device_count() < ranks:
            pytest.skip(f"{ranks} GPUs are needed")
        options = [f"--{key}={value}" for key, value in (SMALL | sizes).items()]
        hide = {"CUDA_VISIBLE_DEVICES": ""} if where == "cpu" else {}
        emulated = ["-m", "qtutor.emulation"] if where == "cpu" else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
             "--max-restarts", str(restarts), *emulated, str(program or source), *options, *flags],
            env=os.environ | hide | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        watchdog = threading.Timer(240, self.process.kill)
        watchdog.start()
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if at is not None:
                at(self, line)
        self.status = self.process.wait()
        watchdog.cancel()

    @property
    def losses(self):
        return [(int(step), nats) for step, nats in re.findall(r"step +(\d+), loss (\S+)", "\n".join(self.lines))]

    @property
    def moved(self):
        (found,) = [line for line in self.lines if line.startswith("bytes moved")]
        return dict(eval(found.partition(": ")[2]))  # noqa: S307 - the script's own output

    def worker(self, rank):
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child


def finished(run):
    assert run.status == 0, "\n".join(run.lines[-30:])
    return run


def weights_of_layers():
    h, f, heads, kv = (SMALL[key] for key in ("hidden", "ffn", "heads", "kv-heads"))
    return SMALL["layers"] * (2 * h * h + 2 * h * h * kv // heads + 3 * h * f), SMALL["layers"] * 2 * h


def bytes_per_layer_weight(run):
    """What all-gathers moved for one weight of the layers' matrices, each time that it was gathered."""
    matrices, norms = weights_of_layers()
    root = 2 * (2 * SMALL["vocab"] * SMALL["hidden"] + SMALL["hidden"])  # BF16, once: the root stays gathered
    return (run.moved["_allgather_base_"] - root - 2 * 2 * norms) / (2 * matrices)


def check_wire(run, expected):
    found = bytes_per_layer_weight(run)
    assert found == pytest.approx(expected, rel=0.01), f"{found:.2f} bytes a weight travel, not {expected}"


def test_fp8_weights_travel_as_one_byte_each(source, where, tmp_path):
    fp8 = finished(Run(source, where, 2, *FP8, "--out", tmp_path / "fp8", steps=2))
    bf16 = finished(Run(source, where, 2, "--precision", "bf16", "--out", tmp_path / "bf16", steps=2))
    check_wire(fp8, 1)
    check_wire(bf16, 2)
    with pytest.raises(AssertionError, match="2.00 bytes a weight travel, not 1"):
        check_wire(bf16, 1)  # the check can fail
    assert fp8.moved["_reduce_scatter_base_"] == bf16.moved["_reduce_scatter_base_"]  # gradients stay BF16
    assert "allreduce_" in fp8.moved and "allreduce_" not in bf16.moved  # amax of all ranks


def test_without_fp8_weights_bf16_travels(source, where, tmp_path):
    check_wire(finished(Run(source, where, 2, "--precision", "delayed", "--out", tmp_path / "run", steps=2)), 2)


def test_one_and_two_ranks_train_alike(source, where, tmp_path):
    losses = {}
    for ranks in (1, 2):
        run = finished(Run(source, where, ranks, "--precision", "bf16", "--out", tmp_path / str(ranks), steps=4))
        losses[ranks] = torch.tensor([float(nats) for _, nats in run.losses])
    assert losses[1] == pytest.approx(losses[2], abs=2e-3) and losses[1][-1] < losses[1][0]
