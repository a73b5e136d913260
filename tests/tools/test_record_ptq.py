"""What is recorded is what the notebook's cells compute: no exercise, no recipe, nothing behind the last table."""

import os

import nbformat
import pytest

from qtutor import files, results
from tools import record_ptq


def notebook(folder, *cells):
    """A notebook of (source, tag or None)."""
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag]} if tag else {}) for source, tag in cells]
    (folder / "notebooks").mkdir()
    nbformat.write(nb, folder / "notebooks" / "99_ptq_fundamentals.ipynb")


CELLS = [
    ("import qtutor, pandas as pd\nsize = qtutor.pick(quick=1, full=2)\nprint('not shown')", "parameters"),
    ("raise RuntimeError('an exercise')", "exercise"),
    ("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()", None),
    ("methods = pd.DataFrame([{'bits': size, 'method': 'GPTQ', 'kld_mean': 0.5}])", None),
    ("ran, refused = {'torchao': {'bits_per_weight': 8.125, 'file_mb': None}}, {}", None),
    ("raise RuntimeError('a recipe')", "recipe"),
    ("raise RuntimeError('too late to matter')", None),
]


@pytest.mark.parametrize("full", [False, True])
def test_the_cells_are_run_at_the_size_asked_for(tmp_path, monkeypatch, capsys, full):
    notebook(tmp_path, *CELLS)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    before = os.environ.get("QTUTOR_PROFILE")
    paths = record_ptq.record(full, tmp_path)
    assert [path.stem for path in paths] == list(record_ptq.RECORDS) and os.environ.get("QTUTOR_PROFILE") == before
    methods, backends = (results.validate(files.read_json(path)) for path in paths)
    text = "a22cf1ad9a10"
    assert methods.rows == [{"bits": 1 + full, "method": "GPTQ", "kld_mean": 0.5, "text": text}]
    assert backends.rows == [{"backend": "torchao", "bits_per_weight": 8.125, "file_mb": None, "text": text}]
    assert methods.profile == ("full" if full else "quick") and capsys.readouterr().out == ""


def test_the_notebook_has_what_is_recorded():
    (path,) = (files.ROOT / "notebooks").glob("*_ptq_fundamentals.ipynb")
    names = [record_ptq.assigned(source) for source in record_ptq.lesson_cells(path)]
    assert any("methods" in cell for cell in names) and any("ran" in cell for cell in names)
