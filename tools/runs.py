"""What a run of each notebook takes on this machine: ``data/results/<machine>/notebook_runs.json``.

Every notebook runs as a reader runs it, in a fresh kernel of its own, from a copy.  A row says how long that took and
how much memory it needed at most; a notebook that failed or took too long has a row, too: ``not_run`` says why.  The
lines "to run" in notebooks and README are written from these rows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import psutil
import pynvml

from qtutor import files, profile, results

from . import keep, topic

NAME, NOTEBOOKS = "notebook_runs", "notebooks/[0-9][0-9]_*.ipynb"


def _gpus() -> list:
    """NVML's handles of the GPUs; none where there is no GPU or nobody to ask."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # no driver, no GPU
        return []


def _gpu_bytes(gpus, processes=None) -> int:
    """Bytes in use on the GPUs, by all or by some processes: 0 for these where a container hides their ids."""
    if processes is None:
        return sum(pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in gpus)
    ids = {process.pid for process in processes}
    return sum(one.usedGpuMemory or 0 for gpu in gpus for one in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
               if one.pid in ids)  # fmt: skip


def _resident_bytes(processes) -> int:
    """Bytes that processes hold in memory; pages that two of them share count twice."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            total += process.memory_info().rss
    return total


def timed(path: Path, limit_s: float, jobs: int = 1) -> dict:
    """Run one notebook, in place, while ``jobs`` share the machine; return its row."""
    row, gpus = {"notebook": topic(path)}, _gpus()
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    before, peak, start = _gpu_bytes(gpus) if gpus else 0, 0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "tools.notebooks", "run", str(path), "--limit", str(limit_s)]
        process = psutil.Popen(command, cwd=files.ROOT, env=environment | os.environ, stdout=subprocess.DEVNULL,
                               stderr=said)  # fmt: skip
        while process.poll() is None:
            try:
                kernel = process.children(recursive=True)
            except psutil.Error:
                continue  # it has just ended
            on_gpus = gpus and (_gpu_bytes(gpus, kernel) or (_gpu_bytes(gpus) - before if jobs == 1 else 0))
            peak = max(peak, on_gpus if gpus else _resident_bytes(kernel))
            if time.perf_counter() - start > limit_s:
                for one in [*kernel, process]:
                    one.kill()
                process.wait()
                return row | {"not_run": f"it took longer than {limit_s:g} s"}
            time.sleep(0.1)
        seconds = time.perf_counter() - start
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    if process.returncode:
        reason = lines[-1] if lines else f"the run ended with status {process.returncode}"
        return row | {"not_run": reason.removeprefix(f"{path.stem}, ").partition(": open the notebook")[0][:300]}
    row |= {"seconds": round(seconds, 1), "peak_gib": round(peak / 2**30, 2) or None}
    return row | ({"jobs": jobs} if jobs > 1 else {})


def _earlier() -> dict[str, dict]:
    """The rows that are there, by notebook, where commit, versions and profile are the ones of now."""
    machine = results.machine_folder()
    if not results.exists(NAME, machine):
        return {}
    found = results.load(NAME, machine)
    same = (found.commit, found.versions, found.profile) == (results.commit(), results.versions(), profile())
    return {row["notebook"]: row for row in found.rows} if same else {}


def measure(paths=None, jobs: int = 1, limit_s: float = 1800) -> Path:
    """Run notebooks, all by default and ``jobs`` at a time, and record what each took; return the file.

    It is written after every notebook and has a row for each from the start: a run that is cut short leaves what it
    has.  Notebooks that share cores and GPU with others take longer: ``jobs`` says so in their rows.
    """
    there = sorted(files.ROOT.glob(NOTEBOOKS))
    paths = list(paths or there)
    rows = {topic(path): {"notebook": topic(path), "not_run": "it was not asked for"} for path in there}
    rows |= {name: row for name, row in _earlier().items() if name in rows}
    rows |= {topic(path): {"notebook": topic(path), "not_run": "the run was cut short"} for path in paths}
    with tempfile.TemporaryDirectory(prefix="qtutor-runs-") as folder, ThreadPoolExecutor(jobs) as pool:
        copies = Path(shutil.copytree(paths[0].parent, Path(folder) / "notebooks"))
        running = [pool.submit(timed, copies / path.name, limit_s, jobs) for path in paths]
        for done in as_completed(running):
            row = done.result()
            rows[row["notebook"]] = row
            print(f"{row['notebook']:<28} " + (f"NOT RUN: {row['not_run']}" if "not_run" in row else
                                               f"{row['seconds']:.1f} s, {row['peak_gib']} GiB"), flush=True)
            target = keep(results.save(NAME, list(rows.values())))
    return target


def record(full: bool) -> Path:
    """Record all notebooks, one after another; the profile in force decides their size."""
    return measure()


RECORDS = {NAME: record}


def spoken(seconds: float) -> str:
    """A time as it is said: "a few seconds", "about 35 seconds", "about 1.5 minutes"."""
    if seconds < 7.5:
        return "a few seconds"
    if seconds < 57.5:
        return f"about {5 * round(seconds / 5)} seconds"
    minutes = round(seconds / 30) / 2
    return f"about {minutes:g} minute{'s' if minutes > 1 else ''}"


def recorded(directory=None) -> list[tuple[str, dict[str, float]]]:
    """("on 2 CPU cores", {topic: seconds}) for the CPU, and the same for the first GPU, where they are recorded."""
    cpu = results.load(NAME, "cpu", directory) if results.exists(NAME, "cpu", directory) else None
    gpu, found = results.on_gpu(NAME, directory), []
    if cpu:
        found.append((f"on {cpu.machine.get('cores', 'all')} CPU cores", cpu))
    if gpu:
        found.append((f"{'at full size ' if gpu.profile == 'full' else ''}on an {gpu.device}", gpu))
    return [(where, {row["notebook"]: row.get("seconds") for row in data.rows}) for where, data in found]


def time_to_run(about: str, directory=None) -> str:
    """What the notebook on a topic takes, as words; "" where no machine has recorded it."""
    said = [(spoken(taken[about]), where) for where, taken in recorded(directory) if taken.get(about)]
    return ", ".join(f"{time} {'' if i else 'to run '}{where}" for i, (time, where) in enumerate(said))


def time_for_all(directory=None) -> str:
    """A sentence on all notebooks together; "" where no machine has run every one of them."""
    topics = [topic(path) for path in files.ROOT.glob(NOTEBOOKS)]
    said = [f"{spoken(sum(map(taken.get, topics)))} {where}" for where, taken in recorded(directory)
            if all(map(taken.get, topics))]  # fmt: skip
    return f"All of them, one after another, take {' and '.join(said)}." if said else ""
