"""The runs of all notebooks: what is recorded of one that works, fails or takes too long; what is said of it."""

from __future__ import annotations

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from qtutor import files, results
from tools import notebooks, runs

CELLS = {
    "00_start_here": "import numpy\nhere = numpy.ones(30_000_000)",  # 240 MB
    "01_fails": "raise ValueError('first line\\nsecond line')",
    "02_slow": "import time\ntime.sleep(600)",
    "03_other": "1 + 1",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder of four notebooks, and results of its own."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "tools").symlink_to(files.ROOT / "tools")
    for name, source in CELLS.items():
        cells = [new_markdown_cell(f"# {name[:2]} · {name[3:]}"), new_code_cell(source)]
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path


def paths(project, *names):
    return [project / "notebooks" / f"{name}.ipynb" for name in names]


@pytest.mark.slow
def test_every_notebook_has_a_row(project, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(project / "out"))
    before = {path.name: path.read_bytes() for path in (project / "notebooks").iterdir()}
    written = runs.measure(paths(project, "00_start_here", "01_fails"), jobs=2)
    rows = {row["notebook"]: row for row in files.read_json(written)["rows"]}
    assert list(rows) == ["start_here", "fails", "slow", "other"]
    first = rows["start_here"]
    assert first["seconds"] > 0 and first["peak_gib"] > 0.1 and first["jobs"] == 2
    assert rows["fails"]["not_run"].startswith("cell 1: ValueError: first line") and "seconds" not in rows["fails"]
    assert rows["other"]["not_run"] == "it was not asked for"
    assert {path.name: path.read_bytes() for path in (project / "notebooks").iterdir()} == before
    assert (project / "out" / results.machine_folder() / "notebook_runs.json").is_file()
    said = capsys.readouterr().out
    assert "NOT RUN: cell 1: ValueError" in said

    again = runs.measure(paths(project, "02_slow", "03_other"), limit_s=8)
    rows = {row["notebook"]: row for row in files.read_json(again)["rows"]}
    assert rows["slow"]["not_run"] == "it took longer than 8 s"
    assert rows["start_here"]["jobs"] == 2, "what was run before, with this commit and these versions, stays"


def save(tmp_path, machine, device, seconds, profile):
    rows = [{"notebook": name, "seconds": taken} if taken else {"notebook": name, "not_run": "no"}
            for name, taken in seconds.items()]  # fmt: skip
    data = {"name": runs.NAME, "created": "2030-01-01T00:00:00+00:00", "commit": "abc", "profile": profile,
            "machine": {"device": device, "cores": 2}, "versions": {"python": "3.12"}, "rows": rows}  # fmt: skip
    (tmp_path / machine).mkdir(parents=True, exist_ok=True)
    (tmp_path / machine / f"{runs.NAME}.json").write_text(results.dumps(data), "utf-8")


def test_what_is_said_of_the_runs(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    for name in ("01_qat", "02_choosing"):
        (tmp_path / "notebooks" / f"{name}.ipynb").touch()
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert runs.time_to_run("qat", tmp_path) == "" and runs.time_for_all(tmp_path) == ""
    save(tmp_path, "cpu", "a CPU", {"qat": 33.0, "choosing": 4.0}, "quick")
    assert runs.time_to_run("qat", tmp_path) == "about 35 seconds to run on 2 CPU cores"
    save(tmp_path, "h200", "NVIDIA H200", {"qat": 92.0, "choosing": None}, "full")
    assert runs.time_to_run("qat", tmp_path) == (
        "about 35 seconds to run on 2 CPU cores, about 1.5 minutes at full size on an NVIDIA H200")
    assert runs.time_to_run("choosing", tmp_path) == "a few seconds to run on 2 CPU cores"
    assert runs.time_for_all(tmp_path) == "All of them, one after another, take about 35 seconds on 2 CPU cores."
    (tmp_path / "notebooks" / "03_new.ipynb").touch()
    assert runs.time_for_all(tmp_path) == "", "one has no time"

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    path = tmp_path / "99_qat.ipynb"
    for opening in ("**Time**: about 60 minutes to read and do; a minute to run. Bring tea.",
                    "**Time** about 60 minutes to read and do; 1.5 minutes,\non a CPU. Bring tea."):
        nbformat.write(new_notebook(cells=[new_markdown_cell(f"# 99 · Demo\n\n{opening}")]), path)
        notebooks.restore(path)
        source = nbformat.read(path, 4).cells[1].source
        assert source.endswith(" minutes to read and do; about 35 seconds to run on 2 CPU cores, about 1.5 minutes at "
                               "full size on an NVIDIA H200. Bring tea.")  # fmt: skip
        assert notebooks.restore(path) is False


def test_times_as_they_are_said():
    said = {1: "a few seconds", 12: "about 10 seconds", 56: "about 55 seconds", 58: "about 1 minute",
            80: "about 1.5 minutes", 600: "about 10 minutes"}  # fmt: skip
    assert {seconds: runs.spoken(seconds) for seconds in said} == said
