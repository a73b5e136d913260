"""The notebooks are in the form that the course promises; and the tool that says so finds what it should find."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from qtutor import QtutorError, files
from tools import notebooks

PATHS = [notebooks.NOTEBOOKS / f"{name}.ipynb" for name in notebooks.names()]


def test_there_are_notebooks_from_the_start_page_on():
    assert PATHS and PATHS[0].stem == notebooks.CONTENTS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_in_form(path):
    assert notebooks.check(path) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_restore_changes_nothing(path):
    nb = nbformat.read(path, as_version=4)
    once = notebooks.canonical(nb, path)
    assert notebooks.dumps(once) == path.read_text("utf-8")
    assert notebooks.dumps(notebooks.canonical(once, path)) == notebooks.dumps(once)


# -------------------------------------------------------------------------------- the tool, on a notebook made here

OPENING = "\n\n".join(("# 01 · Demo", "**You will be able to** see.", "**You need** nothing.",
                       "**Time**: 1 minute to do; a second to run."))  # fmt: skip


def exercise(name):
    return [new_markdown_cell("### Exercise (2 minutes, easy)"),
            new_code_cell(f'answer = ...\nqtutor.lesson.check("{name}", answer)', metadata={"tags": ["exercise"]},
                          outputs=[new_output("stream", name="stdout", text=f"{name}: not attempted yet\n")]),
            new_markdown_cell("".join(f"<details><summary>{what}</summary>\n\n{text}\n</details>\n" for what, text in (
                ("Hint 1", "Count."), ("Hint 2", "`answer = ...`"), ("Solution", "```python\nanswer = 1\n```"))))]


QUIZ = [{"ask": "What is so?", "right": ["This", "Yes."], "wrong": [["That", "Never."], ["Both", "One."]]}]


def good():
    """A small notebook without fault, as an author would hand it in, except that restore has not seen it yet."""
    cells = [new_markdown_cell(OPENING), new_code_cell(notebooks.SETUP, metadata={"tags": ["setup"]}),
             *exercise("demo.one"), *exercise("demo.two"),
             new_markdown_cell("Recipe: add two numbers."),
             new_code_cell("import math\nmath.pi + 1", metadata={"tags": ["recipe"]}),
             new_markdown_cell("## Recall\n\nOpen an option."), new_code_cell('qtutor.lesson.quiz("demo")'),
             new_markdown_cell("## Recap\n\n- so\n\n## Where to go next\n\n- [there](https://example.org)")]
    for count, cell in enumerate([cell for cell in cells if cell.cell_type == "code"], 1):
        cell.execution_count = count
    return new_notebook(cells=cells)


@pytest.fixture
def quizzes(tmp_path, monkeypatch):
    """The quizzes of the notebooks made here."""
    monkeypatch.setattr(files, "DATA", tmp_path)
    for name in ("demo", "other"):
        files.write_text(tmp_path / f"quiz/{name}.json", json.dumps(QUIZ))


@pytest.fixture
def problems(tmp_path, quizzes):
    """Save a notebook as 01_demo.ipynb, restored or as it is, and return what check says."""
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 00 · Start")]), tmp_path / "00_start_here.ipynb")

    def check(nb, restored=True):
        path = tmp_path / "01_demo.ipynb"
        nbformat.write(nb, path)
        if restored:
            notebooks.restore(path)
        return notebooks.check(path)

    return check


def test_a_good_notebook_has_no_problems(problems):
    assert problems(good()) == []
    assert [line for line in problems(good(), restored=False) if "canonical" in line]


def change(find, **changes):
    def apply(nb):
        cell = next(cell for cell in nb.cells if find in cell.source or find in notebooks.tags(cell))
        cell.update(changes)
    return apply


def shows(**output):
    """The recipe cell shows this output."""
    return change("recipe", outputs=[new_output(**output)])


def says(text):
    return shows(output_type="stream", name="stdout", text=text)


def prose(text):
    return change("Recipe:", source="Recipe: add. " + text)


def drop(find, offset=0):
    def apply(nb):
        del nb.cells[next(i for i, cell in enumerate(nb.cells) if find in cell.source) + offset]
    return apply


BIG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(300_000)).decode()
FAULTS = {
    "title": (change("# 01", source=OPENING.replace("# 01 ·", "# Demo")), "title"),
    "opening": (change("# 01", source=OPENING.replace("**Time**", "Time")), "Time"),
    "setup differs": (change("setup", source="import qtutor\nqtutor.setup('hello')"), "setup"),
    "setup comes late": (lambda nb: nb.cells.insert(1, new_code_cell("1", execution_count=1)), "setup"),
    "unknown tag": (change("recipe", metadata={"tags": ["recipes"]}), "recipes"),
    "long cell": (change("setup", source="\n".join("x" * 50)), "lines"),
    "one exercise": (drop('"demo.two"'), "1 exercises"),
    "exercise of another notebook": (lambda nb: nb.cells.extend(exercise("other.one")), "demo.name"),
    "answered exercise": (change("exercise", outputs=[]), "answered"),
    "no minutes": (change("### Exercise", source="### Exercise"), "minutes"),
    "no difficulty": (change("### Exercise", source="### Exercise (5 minutes)"), "easy"),
    "one hint": (change("Hint 2", source="<details><summary>Hint 1</summary>\n\n</details>\n<details><summary>Solution"
                        "</summary>\n\n```python\nanswer = 1\n```\n</details>"), "Hint 2"),
    "no quiz": (drop("lesson.quiz"), "quiz"),
    "another notebook's quiz": (change("lesson.quiz", source='qtutor.lesson.quiz("other")'), 'quiz("demo")'),
    "quiz without heading": (change("## Recall", source="Recall"), "## Recall"),
    "quiz far from the recap": (lambda nb: nb.cells.insert(-1, new_markdown_cell("More.")), "recap"),
    "no solution": (drop('"demo.one"', 1), "solution"),
    "no recipe": (change("recipe", metadata={}), "recipe"),
    "recipe with qtutor": (change("recipe", source="import qtutor"), "qtutor"),
    "long recipe": (change("recipe", source="\n".join("x" * 31)), "31 lines"),
    "recipe without title": (change("Recipe:", source="Another way:"), "Recipe: ..."),
    "no recap": (drop("## Recap"), "Recap"),
    "pictures without words": (shows(output_type="display_data", data={"image/png": "AAAA"}), "What you should see"),
    "large picture": (shows(output_type="display_data", data={"image/png": BIG}), "PNG"),
    "error": (shows(output_type="error", ename="ValueError", evalue="no", traceback=[]), "ValueError"),
    "path": (says("saved in /home/me/model.gguf\n"), "path"),
    "path in a cell": (change("recipe", source="open('/home/me/model.gguf')"), "path"),
    "warning": (says("x.py:3: UserWarning: deprecated\n"), "warning"),
    "measured": (prose("It takes 12 ms."), "12 ms"),
    "measured in a list": (prose("Speed:\n\n- 3 x faster\n"), "3 x faster"),
    "a number without a link": (prose("As in notebook 00."), "notebook 00"),
    "a number in code": (change("recipe", source="import math  # as in notebook 00"), "notebook 00"),
    "dead link": (prose("See [that](99_nothing.ipynb)."), "99_nothing"),
    "executed out of order": (change("recipe", execution_count=2), "execution count"),
    "not executed": (change("recipe", execution_count=None), "executed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault, problems):
    nb = good()
    apply, expected = FAULTS[fault]
    apply(nb)
    found = problems(nb)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("text", [
    "[The paper](https://arxiv.org/abs/1) measured 12 ms.",
    "As in <https://example.org>:\n\n| step | time |\n|---|---|\n| one | 12 ms |",
    "```\n12 ms\n```",
    "Numbers such as 448, 0.5 and 16 bits, E4M3 and 7 nm.",
])  # fmt: skip
def test_published_figures_with_their_source_are_welcome(text, problems):
    nb = good()
    prose(text)(nb)
    assert problems(nb) == []


def test_the_quiz_of_a_notebook_is_that_of_its_file(problems, tmp_path):
    """Who edits a question needs no run: check sees the old one, restore puts the new one in."""
    assert problems(good()) == []
    path = tmp_path / "01_demo.ipynb"
    assert "<summary>That</summary>No. Never.</details>" in json.dumps(nbformat.read(path, 4)).replace('\\"', '"')
    files.write_text(tmp_path / "quiz/demo.json", json.dumps(QUIZ).replace("That", "Something else"))
    assert [line for line in notebooks.check(path) if "canonical" in line]
    assert notebooks.restore(path) and notebooks.check(path) == []
    assert "Something else" in path.read_text("utf-8")


def test_stderr_and_counts_in_a_file_that_was_not_restored(problems):
    nb = good()
    nb.cells[-4].outputs = [new_output("stream", name="stderr", text="hm\n")]
    nb.cells[-4].execution_count = 17
    found = problems(nb, restored=False)
    assert any("stderr" in line for line in found) and any("17" in line for line in found)


def test_restore_removes_what_differs_from_run_to_run(tmp_path, quizzes):
    nb = good()
    nb.metadata = nbformat.from_dict({"widgets": {"state": 1}, "kernelspec": {"name": "my-env", "display_name": "x"}})
    cell = nb.cells[-4]
    cell.metadata["execution"] = {"iopub.status.busy": "2020-01-01"}
    widget = "application/vnd.jupyter.widget-view+json"
    cell.outputs = [
        new_output("stream", name="stdout", text="one "),
        new_output("stream", name="stderr", text=" 50%|#####     | 1/2\r100%|##########| 2/2\n"),
        new_output("stream", name="stdout", text="two\n 50%\r100%\n"),
        new_output("display_data", data={widget: {"model_id": "a"}, "text/plain": "VBox()"}),
        new_output("display_data", data={"text/plain": "  0%|          | 0/10 [00:00<?, ?it/s]"}),
        new_output("execute_result", data={"text/plain": "<Thing at 0x7f1234567890>"}, execution_count=5),
        new_output("display_data", data={"text/html": '<style>#T_3fa2b_row0 {}</style><table id="T_3fa2b">'}),
        new_output("display_data", data={"text/html": '<table id="T_3fa2b">'},
                   metadata={"needs_background": "light", "image/png": {"alt": "What it shows.", "width": 3}}),
    ]
    path = tmp_path / "01_demo.ipynb"
    nbformat.write(nb, path)
    assert notebooks.restore(path) is True
    assert notebooks.restore(path) is False
    nb = nbformat.read(path, as_version=4)
    assert nb.metadata == notebooks.METADATA
    cell = next(cell for cell in nb.cells if "recipe" in notebooks.tags(cell))
    assert cell.metadata == {"tags": ["recipe"]}
    assert [output.get("text") or dict(output.data) for output in cell.outputs] == [
        "one two\n100%\n", {"text/plain": "<Thing>"},
        {"text/html": '<style>#T_00000_row0 {}</style><table id="T_00000">'}, {"text/html": '<table id="T_00001">'}]
    assert cell.outputs[2].metadata == {} and cell.outputs[3].metadata == {"image/png": {"alt": "What it shows."}}
    assert cell.outputs[1].execution_count == cell.execution_count
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)


def test_a_picture_loses_its_alpha_channel_and_no_pixel(tmp_path):
    def png(mode, color):
        Image.new(mode, (40, 30), color).save(data := io.BytesIO(), "PNG")
        return base64.b64encode(data.getvalue()).decode()

    pictures = [png("RGBA", (9, 8, 7, 255)), png("RGBA", (9, 8, 7, 100)), png("RGB", (1, 2, 3))]
    cell = new_code_cell("1", execution_count=1, outputs=[new_output("display_data", {"image/png": one})
                                                          for one in pictures])  # fmt: skip
    path = tmp_path / "01_demo.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 01 · Demo"), cell]), path)
    assert notebooks.restore(path) is True and notebooks.restore(path) is False
    outputs = next(cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code").outputs
    kept = [output.data["image/png"].strip() for output in outputs]
    assert kept[1:] == pictures[1:] and len(kept[0]) < len(pictures[0])
    image = Image.open(io.BytesIO(base64.b64decode(kept[0])))
    assert image.mode == "RGB" and image.getcolors() == [(1200, (9, 8, 7))]


def test_navigation_links_the_files_that_are_there(tmp_path):
    for name in ("00_start_here", "01_demo", "05_more"):
        nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {name[:2]} · About {name[3:]}")]),
                       tmp_path / f"{name}.ipynb")  # fmt: skip
        notebooks.restore(tmp_path / f"{name}.ipynb")
    for name in ("00_start_here", "01_demo", "05_more"):
        notebooks.restore(tmp_path / f"{name}.ipynb")
    start, demo, more = (nbformat.read(path, as_version=4).cells for path in sorted(tmp_path.glob("*.ipynb")))
    assert demo[0].source == demo[-1].source
    assert "(00_start_here.ipynb)" in demo[0].source and "(05_more.ipynb)" in demo[0].source
    assert "About more" in demo[0].source
    assert "(01_demo.ipynb)" in start[0].source and "Contents" not in start[0].source
    assert "(01_demo.ipynb)" in more[0].source and "→" not in more[0].source


def test_the_exercises_of_a_notebook(tmp_path):
    path = tmp_path / "01_demo.ipynb"
    nbformat.write(good(), path)
    one, two = notebooks.exercises(path)
    assert (one.name, one.answer, one.solution, two.name) == ("demo.one", "answer", "answer = 1\n", "demo.two")


@pytest.mark.slow
def test_execute_runs_in_a_fresh_kernel_and_keeps_the_file_when_a_cell_fails(tmp_path):
    path = tmp_path / "01_demo.ipynb"
    nb = new_notebook(cells=[new_markdown_cell("# 01 · Demo"), new_code_cell("import os\nprint(os.listdir())"),
                             new_code_cell("import sys; print('noise', file=sys.stderr)\n6 * 7")])
    nbformat.write(nb, path)
    assert notebooks.execute(path) > 0
    first, second = (cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert first.outputs[0].text == "['01_demo.ipynb']\n"
    assert [output.get("data") for output in second.outputs] == [{"text/plain": "42"}]
    nb.cells[2].source = "import qtutor\nraise qtutor.QtutorError('Bring more memory.')"
    nbformat.write(nb, path)
    before = path.read_bytes()
    with pytest.raises(QtutorError, match="cell 2: QtutorError: Bring more memory"):
        notebooks.execute(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [None, "", "{", '{"cells": 3}'])
def test_what_is_no_notebook_is_one_sentence(content, tmp_path):
    path = tmp_path / "01_demo.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(QtutorError, match="01_demo"):
        notebooks.check(path)


def test_the_command(capsys):
    assert notebooks.main(["list", "0"]) == 0
    assert capsys.readouterr().out.startswith("00_start_here")
    with pytest.raises(QtutorError, match="no notebook '77'"):
        notebooks.main(["check", "77"])
    assert notebooks.find("start_here") == notebooks.find("00") == notebooks.find("notebooks/00_start_here.ipynb")


# ------------------------------------------------------------------------------------------------ topics and numbers

ORDER = ["00_start_here", "01_other", "02_demo", "03_demo_two"]


@pytest.mark.parametrize("before, after", [
    ("[notebook 01](01_demo.ipynb), [01](notebooks/01_demo.ipynb#part)",
     "[notebook 02](02_demo.ipynb), [02](notebooks/02_demo.ipynb#part)"),
    ("[← 07 · Demo](07_demo.ipynb) · [16 bits](07_demo.ipynb)",
     "[← 02 · Demo](02_demo.ipynb) · [16 bits](02_demo.ipynb)"),
    ("run notebooks/07_demo.ipynb, 07_demo_two", "run notebooks/02_demo.ipynb, 03_demo_two"),
    ("[01](99_unknown.ipynb), 2024_demo, v01_demo, 12 · 13", "[01](99_unknown.ipynb), 2024_demo, v01_demo, 12 · 13"),
])  # fmt: skip
def test_numbers_come_from_the_files(before, after):
    assert notebooks.in_step(before, ORDER) == after == notebooks.in_step(after, ORDER)


def test_a_map_has_a_row_for_each_notebook(tmp_path):
    for name in ("00_start_here", "01_new", "02_demo"):
        nb = new_notebook(cells=[new_markdown_cell(f"# {name[:2]} · About {name[3:]}")])
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
    rows = ("| | | |\n|---|---|---|\n| 01 | [Old](notebooks/01_demo.ipynb) | why? |\n"
            "| 02 | [Gone](notebooks/02_gone.ipynb) | - |\n")  # fmt: skip
    found = notebooks.with_map(rows, tmp_path, without="00_start_here")
    assert found == ("| | | |\n|---|---|---|\n| 01 | [About new](notebooks/01_new.ipynb) |  |\n"
                     "| 02 | [About demo](notebooks/02_demo.ipynb) | why? |\n")  # fmt: skip
    assert notebooks.with_map(found, tmp_path, without="00_start_here") == found


def masked(text: str) -> str:
    """Text without what a renumbering changes: the numbers of notebooks, navigation cells, the rows of maps."""
    text = re.sub(r"(?<!\w)\d\d_(?=[a-z])", "NN_", text)
    text = re.sub(r"^# \d\d ·", "# NN ·", text, flags=re.M)
    text = re.sub(r"^\| \d\d \| .*\n?", "", text, flags=re.M)
    return re.sub(r"(\[(?:← )?(?:[Nn]otebook )?)\d\d(?=[\]·]| ·)", r"\1NN", text)


@pytest.mark.slow
def test_a_notebook_put_in_the_middle_moves_all_numbers_and_nothing_else(tmp_path):
    """As an author does it: a file 04b_....ipynb appears, and one command brings everything in step."""
    shutil.copytree(notebooks.NOTEBOOKS, tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for page in notebooks.pages(files.ROOT):
        target = tmp_path / page.relative_to(files.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
    shutil.copytree(files.DATA / "reference", tmp_path / "data" / "reference")  # a notebook links to a file there
    folder = tmp_path / "notebooks"
    before = {path.stem[3:]: nbformat.read(path, 4).cells for path in folder.glob("*.ipynb")}
    pages = {page: page.read_text("utf-8") for page in notebooks.pages(tmp_path)}
    old = notebooks.names(folder)
    said = ("# 04 · A new notebook", f"As in [notebook 01]({old[1]}.ipynb).")
    new = new_notebook(cells=[new_markdown_cell(source) for source in said])
    nbformat.write(new, folder / "04b_a_new_one.ipynb")

    renamed = notebooks.renumber(folder)
    moved = {name: f"{int(name[:2]) + 1:02d}{name[2:]}" for name in old[5:]}
    assert renamed == {"04b_a_new_one": "05_a_new_one"} | moved
    names = notebooks.names(folder)
    assert names == [*old[:5], "05_a_new_one", *moved.values()]
    assert notebooks.title(folder / "05_a_new_one.ipynb") == "A new notebook"
    assert notebooks.renumber(folder) == {}

    for name in names:
        cells = nbformat.read(folder / f"{name}.ipynb", 4).cells
        text = json.dumps(cells, ensure_ascii=False) + "".join(cell.source for cell in cells)
        for number, topic in re.findall(r"(?<!\w)(\d\d)_(\w+)\.ipynb", text):
            assert f"{number}_{topic}" in names
        for number, target in re.findall(r"\[(?:← )?(?:[Nn]otebook )?(\d\d)(?:\]| ·[^\]]*\])\((\d\d)_", text):
            assert number == target
        was = before.get(name[3:])
        if was is not None:
            assert [masked(cell.source) for cell in cells if "nav" not in notebooks.tags(cell)] == [
                masked(cell.source) for cell in was if "nav" not in notebooks.tags(cell)]
            assert [cell.get("outputs") for cell in cells] == [cell.get("outputs") for cell in was]
        assert not [line for line in notebooks.check(folder / f"{name}.ipynb") if "link" in line or "canonical" in line]
    for page, text in pages.items():
        found = page.read_text("utf-8")
        assert masked(found) == masked(text)
        for target in re.findall(r"\]\(([^)#]+\.ipynb)", re.sub(r"`[^`\n]*`", "", found)):
            assert (page.parent / target).is_file(), target
    assert "| 05 | [A new notebook](notebooks/05_a_new_one.ipynb) |" in (tmp_path / "README.md").read_text("utf-8")


def test_two_notebooks_about_one_topic_are_one_sentence(tmp_path):
    for name in ("00_start_here", "01_demo", "01b_demo"):
        nbformat.write(new_notebook(), tmp_path / f"{name}.ipynb")
    with pytest.raises(QtutorError, match="Two notebooks are about demo"):
        notebooks.renumber(tmp_path)


@pytest.mark.slow
def test_one_command_makes_a_whole_notebook(tmp_path):
    """In a copy of the project: notebook, exercises, quiz, maps; in form, with solutions that pass."""
    for name in ("qtutor", "tools", "tests/exercises"):
        shutil.copytree(files.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in notebooks.names()[:2]:
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        shutil.copy(notebooks.NOTEBOOKS / f"{name}.ipynb", tmp_path / "notebooks")
    shutil.copy(files.ROOT / "README.md", tmp_path)
    shutil.copytree(files.DATA / "quiz", tmp_path / "data/quiz")
    shutil.copytree(files.DATA / "results", tmp_path / "data/results")

    def run(*argv):
        return subprocess.run([sys.executable, "-m", *argv], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip

    done = run("tools.notebooks", "new", "00b_my_topic", "My title")
    assert done.returncode == 0 and "notebooks/01_my_topic.ipynb" in done.stdout, done.stdout + done.stderr
    done = run("tools.notebooks", "check", "my_topic")
    assert (done.returncode, done.stdout) == (0, "01_my_topic: ok\n"), done.stdout + done.stderr
    assert (tmp_path / "notebooks/02_number_formats.ipynb").is_file()
    assert "| 01 | [My title](notebooks/01_my_topic.ipynb) |" in (tmp_path / "README.md").read_text("utf-8")
    done = run("pytest", "-q", "-p", "no:cacheprovider", "tests/exercises", "-k", "my_topic")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    for argv, said in ((["00b_my_topic", "Again"], "already"), (["topic", "A title"], "04b_my_topic"),
                       (["04b_one"], "a title"), (["04b_one", " "], "a title")):  # fmt: skip
        done = run("tools.notebooks", "new", *argv)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
