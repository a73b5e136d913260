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
FP8 = ["--precision", "delayed", "--fp8-weights", "1"]
DUMP = """
head, tail = open({source!r}).read().split('if __name__ == "__main__":')
exec(head)

def main(args):
    rank, world, device, _ = start(timedelta(seconds=60))
    model, optimizer = build(args, device)
    step = load(args, model, optimizer)
    state = {{name: x.full_tensor().cpu() if hasattr(x, "full_tensor") else x.cpu()
             for name, x in state_of(model, optimizer, step).items()}}
    for name, p in model.named_parameters():  # codes of FP8 weights, or BF16
        mine = getattr(p.to_local(), "_data", p.to_local())
        parts = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(parts, mine.contiguous())
        state[name] = torch.cat(parts).cpu()
        if hasattr(p.to_local(), "_scale_inv"):
            state[name + ".scale_inv"] = p.to_local()._scale_inv.cpu()
    for name, x in state.items():  # the newest amax is each rank's own until the next pass
        if name.endswith("amax_history"):
            x = x.to(device)
            dist.all_reduce(x, dist.ReduceOp.MAX)
            state[name] = x.cpu()
    if rank == 0:
        torch.save(state, {target!r})
    dist.destroy_process_group()

exec("if True:" + tail)
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
             "--max-restarts", str(restarts), *emulated, str(program or source), *options, *map(str, flags)],
            env=os.environ | hide | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)  # fmt: skip
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
        found = re.findall(r"step +(\d+), loss ([\d.]+)", "\n".join(self.lines))
        return [(int(step), nats) for step, nats in found]

    @property
    def moved(self):
        """Bytes that the collectives of the last step moved, by operation."""
        last = [line for line in self.lines if line.startswith("step ")][-1]
        return {name: int(count) for name, count in re.findall(r"'(\w+)': (\d+)", last)}

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
        losses[ranks] = [float(nats) for _, nats in run.losses]
    assert losses[1] == pytest.approx(losses[2], abs=2e-3) and len(set(losses[1])) == 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", [FP8, FP8[:2], ["--precision", "current", *FP8[2:]]])
def test_a_checkpoint_goes_on_with_any_number_of_ranks(source, where, tmp_path, precision):
    """Saved on the most ranks, loaded on fewer: FP32 weights, moments, scales, amax histories, FP8 codes to the bit."""
    most = 4 if where == "gpu" and torch.cuda.device_count() >= 4 else 2
    whole = finished(Run(source, where, most, *precision, "--out", tmp_path / "run", **{"steps": 6, "save-every": 3}))
    (tmp_path / "run" / "step-000006").rename(tmp_path / "later")
    states = {}
    for ranks in [n for n in (4, 2, 1) if n <= most]:
        program, target = tmp_path / f"dump{ranks}.py", tmp_path / f"{ranks}.pt"
        program.write_text(DUMP.format(source=str(source), target=str(target)), "utf-8")
        finished(Run(source, where, ranks, *precision, "--out", tmp_path / "run", program=program))
        states[ranks] = torch.load(target, weights_only=True)
    first = states.pop(most)
    assert any(name.endswith("exp_avg_sq") and x.any() for name, x in first.items())
    if "delayed" in precision:
        assert any(name.endswith("amax_history") and x.any() for name, x in first.items())
    for ranks, state in states.items():
        assert state.keys() == first.keys()
        wrong = [name for name in first if not torch.equal(first[name], state[name])]
        assert not wrong, f"{ranks} ranks: {wrong}"
    resumed = finished(Run(source, where, most, *precision, "--out", tmp_path / "run", steps=6))
    assert [step for step, _ in resumed.losses] == [4, 5, 6]
    if where == "cpu":  # some GPU kernels add up in another order each time
        assert resumed.losses == whole.losses[3:]
    else:
        assert [float(n) for _, n in resumed.losses] == pytest.approx([float(n) for _, n in whole.losses[3:]], abs=1e-3)


@pytest.mark.slow
def test_a_rank_that_dies_costs_the_steps_since_the_last_checkpoint(source, where, tmp_path):
    def kill(run, line):
        if line.startswith("step    5") and not any(x.startswith("step    5") for x in run.lines[:-1]):
            run.worker(1).kill()

    flags = {"steps": 8, "save-every": 3, "timeout": 20}
    run = finished(Run(source, where, 2, *FP8, "--out", tmp_path / "run", restarts=1, at=kill, **flags))
    steps = [step for step, _ in run.losses]
    assert steps[:5] == [1, 2, 3, 4, 5] and steps[-5:] == [4, 5, 6, 7, 8]  # step 4 twice: it goes on from step 3
    if where == "cpu":
        assert run.losses[3] == run.losses[-5]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-000003", "step-000006", "step-000008"]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_with_one_sentence(source, where, tmp_path):
    def stop(run, line):
        if line.startswith("step    2"):
            run.worker(1).send_signal(signal.SIGSTOP)
        if "rank 0 stops" in line:
            run.worker(1).kill()  # torchrun would wait half a minute for it

    run = Run(source, where, 2, *FP8, "--out", tmp_path / "run", at=stop, **{"steps": 10**6, "timeout": 6})
    assert run.status
    (sentence,) = [line for line in run.lines if line.startswith("rank 0 stops; ")]
    assert "another one died or hangs? " in sentence
    assert not any(line.startswith("Traceback") for line in run.lines[: run.lines.index(sentence)])
