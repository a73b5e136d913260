"""Record what the notebook on quantization after training measures: ``make results ONLY=ptq_methods``.

The methods stand in the cells of that notebook, where they are the lesson, and nowhere else.  So its own cells are run
here, without the exercises and recipes: what a reader reads is what was recorded.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import warnings
from pathlib import Path
from unittest import mock

import nbformat

from qtutor import corpus, files, results

SKIPPED = {"exercise", "recipe"}
METHODS, BACKENDS = "methods", "ran"  # names in the notebook: a table, one row a method; back end -> its row


def assigned(source: str) -> set:
    """The names that a cell binds at its top level."""
    targets = [target for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def lesson_cells(path: Path) -> list[str]:
    """The code cells of a notebook that are no exercise and no recipe, up to the last one that is needed here."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells
             if cell.cell_type == "code" and not SKIPPED & set(cell.metadata.get("tags", []))]  # fmt: skip
    last = max(number for number, source in enumerate(cells) if {METHODS, BACKENDS} & assigned(source))
    return cells[: last + 1]


def run(path: Path, full: bool) -> dict:
    """Run the lesson's cells in this process, without showing their tables and pictures; return all their names."""
    import matplotlib.pyplot as plt
    from tqdm.auto import tqdm

    names, quiet = {"__name__": "lesson"}, contextlib.redirect_stdout(io.StringIO())
    size = mock.patch.dict(os.environ, QTUTOR_PROFILE="full" if full else "quick")  # cells ask with qtutor.pick
    plt.switch_backend("agg")
    with size, quiet, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-interactive.*")  # plt.show() has nothing to show on
        for source in tqdm(lesson_cells(path), desc=path.stem, unit="cell"):
            exec(compile(source, path.name, "exec"), names)
            if "EVERY" in assigned(source):  # which a CPU's readers do not wait for, nor for so much text
                names |= {"EVERY": True, "WINDOWS": max(32, names.get("WINDOWS", 0))}
            plt.close("all")
    return names


def record(full: bool, directory=None) -> list[Path]:
    """Quantize the course model by hand and by the libraries that are here; save both tables."""
    (path,) = (files.ROOT / "notebooks").glob("*_ptq_fundamentals.ipynb")
    names, text = run(path, full), corpus.fingerprint(corpus.eval_text())
    rows = {"ptq_methods": names[METHODS].to_dict("records"),
            "ptq_backends": [{"backend": name, **row} for name, row in names[BACKENDS].items()]}  # fmt: skip
    return [results.save(name, [{**row, "text": text} for row in rows[name]], profile="full" if full else "quick",
                         directory=directory) for name in RECORDS]  # fmt: skip


RECORDS = {"ptq_methods": record, "ptq_backends": record}
