"""Record ``tradeoff``: every technique on this machine, saved after each one.

    python -m tools.record_tradeoff                                # everything that this machine runs
    python -m tools.record_tradeoff --shapes llama2_7b --budget 480 --folder /dev/shm

A recording that was interrupted goes on where it stopped, within two hours and at the same commit and size: minutes on
a CPU, half an hour on a GPU that is lent for ten minutes at a time.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qtutor import QtutorError, files, measure, results
from qtutor.decide import pareto
from qtutor.decide.techniques import TECHNIQUES
from qtutor.rigs import techniques, tradeoff

RESUME_HOURS = 2
BATCHES = {"cuda": (1, 8, 32), "cpu": (1, 8)}


def sizes_for(shape: str, full: bool) -> tradeoff.Sizes:
    """How much a recording runs; a GPU needs a second or so for each energy figure."""
    if shape != "course":
        return tradeoff.Sizes(seconds=1.0)
    if not full:
        return tradeoff.Sizes(tokens=64, seconds=0.1, windows=4, questions=24)
    return tradeoff.Sizes(seconds=0.7 if techniques.device() == "cuda" else 1.5)


def peaks(name: str, batches, sizes: tradeoff.Sizes, path: Path | None) -> dict[int, float]:
    """GiB that a technique adds to this process on the CPU, by batch: weights, cache and work space."""
    import torch  # noqa: F401 - the libraries are loaded first, so that they do not count
    from transformers import LlamaForCausalLM  # noqa: F401

    from qtutor import course_model, llamacpp

    course_model.config(), llamacpp.available()
    found = {}
    with measure.track_memory("cpu") as memory:
        model = None if path else techniques.build(name)
        for batch in batches:
            if path:
                tradeoff.llama_speed(path, batch, sizes)
            else:
                tradeoff.pytorch_speed(model, batch, sizes)
            found[batch] = memory.added
    return found


def with_peaks(rows: list[dict], sizes: tradeoff.Sizes, made: tradeoff.Files) -> list[dict]:
    """Rows of one technique with ``peak_gib``, measured in a fresh process: this one keeps what it has freed."""
    name, batches = rows[0]["technique"], [row["batch"] for row in rows]
    path = made.path(name) if TECHNIQUES[name].gguf else None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        found = child.submit(peaks, name, batches, tradeoff.Sizes(sizes.tokens, 0.0), path).result()
    return [row | {"peak_gib": found[row["batch"]]} for row in rows]


def resumable(directory, profile: str) -> list[dict]:
    """Rows of a recording on this machine that was interrupted within the last hours, at this commit and profile."""
    where = results.machine_folder()
    if not results.exists("tradeoff", where, directory):
        return []
    old = results.load("tradeoff", where, directory)
    fresh = datetime.now(UTC) - datetime.fromisoformat(old.created) < timedelta(hours=RESUME_HOURS)
    same = (old.commit, old.versions, old.profile) == (results.commit(), results.versions(), profile)
    return old.rows if fresh and same and old.device == measure.machine()["device"] else []


def record(full: bool = True, shapes=None, names=None, resume: bool = True, budget_s: float | None = None,
           directory=None, folder=None, measured=tradeoff.rows) -> Path:  # fmt: skip
    """Measure every technique on this machine and save ``tradeoff`` after each; return the path.

    Args:
        shapes: keys of tradeoff.SHAPES; by default the course model, on a GPU the 7B shape as well.
        names: of techniques; by default all that have no row yet.
        resume: keep the rows of an interrupted recording.
        budget_s: seconds for each shape after which no further technique is begun.
        directory, folder: of the results; of the GGUF files for the time being.
        measured: what measures one technique.
    """
    gpu, profile = techniques.device() == "cuda", "full" if full else "quick"
    kept = resumable(directory, profile) if resume else []
    path = Path(directory or results.RESULTS) / results.machine_folder() / "tradeoff.json"
    made = tradeoff.Files(folder)
    try:
        for shape in shapes or ("course", *(["llama2_7b"] if gpu else [])):
            sizes, began, reference = sizes_for(shape, full), time.perf_counter(), None
            done = {row["technique"] for row in pareto.measured(kept) if row["shape"] == shape}
            for name in names or [name for name in TECHNIQUES if name not in done]:
                runs = not tradeoff.why_not(TECHNIQUES[name], shape)
                if runs and budget_s is not None and time.perf_counter() - began > budget_s:
                    continue  # the next run goes on here
                if runs and shape == "course" and reference is None and measured is tradeoff.rows:
                    reference = tradeoff.Reference(sizes)
                part = measured([name], shape, BATCHES["cuda" if gpu else "cpu"], sizes, reference, made)
                if full and not gpu and all(row.get("decode_tokens_per_s") for row in part):
                    part = with_peaks(part, sizes, made)
                kept = [row for row in kept if (row["shape"], row["technique"]) != (shape, name)] + part
                path = results.save("tradeoff", kept, profile=profile, directory=directory)
                if shape != "course":
                    (made.folder / f"{shape} {name}.gguf").unlink(missing_ok=True)  # gigabytes each
    finally:
        made.close()
    return path


RECORDS = {"tradeoff": record}


def main(argv=None) -> int:
    """Record, and say what came out."""
    parser = argparse.ArgumentParser(prog="python -m tools.record_tradeoff", description="measure every technique here")
    parser.add_argument("--shapes", nargs="+", choices=tradeoff.SHAPES, help="by default all that this machine can run")
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, metavar="NAME", help="by default all")
    parser.add_argument("--quick", action="store_true", help="small sizes: a minute's worth")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an interrupted recording")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of each shape: begin nothing new after that")
    parser.add_argument("--directory", help="where the results go, by default data/results")
    parser.add_argument("--folder", help="for GGUF files, by default the system's temporary folder")
    options = parser.parse_args(argv)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        path = record(not options.quick, options.shapes, options.techniques, not options.fresh, options.budget,
                      options.directory, options.folder)  # fmt: skip
    except QtutorError as error:
        print(error)
        return 1
    rows = files.read_json(path)["rows"]
    print(f"{len(pareto.measured(rows))} rows: {path.parent.name}/{path.name}")
    for name, reason in pareto.left_out(rows).items():
        print(f"  without {name}: {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
