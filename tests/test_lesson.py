"""setup(), check() and quiz(), in this process and in a kernel; and what is kept of the answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import date

import pytest
from jupyter_client.manager import KernelManager

from qtutor import QtutorError, files, lesson


@pytest.fixture
def demo():
    @lesson.exercise("demo.sum", solution=4, wrong=[5])
    def _sum(answer):
        lesson.expect(answer >= 4, "It is more.")
        lesson.expect(answer <= 4, "It is less.")
        return "Two and two."

    @lesson.exercise("demo.twice", solution=lambda x: 2 * x, wrong=[lambda x: x])
    def _function(answer):
        lesson.expect(answer(3) == 6, "Twice, please.")

    yield
    del lesson.REGISTRY["demo.sum"], lesson.REGISTRY["demo.twice"]


def stub_pass(x):
    pass


def stub_docstring(x):
    """Return twice x."""


def stub_ellipsis(x):
    return ...


@pytest.mark.parametrize("name, answer, said", [
    ("demo.sum", ..., "demo.sum: not attempted yet"), ("demo.sum", [1, ...], "demo.sum: not attempted yet"),
    ("demo.sum", {"a": ...}, "demo.sum: not attempted yet"), ("demo.sum", 4, "✔ demo.sum: Two and two."),
    ("demo.sum", 3, "✘ demo.sum: It is more."), ("demo.sum", 5, "✘ demo.sum: It is less."),
    ("demo.sum", "4", "✘ demo.sum: The check cannot use this answer (TypeError: "),
    ("demo.sum", None, "✘ demo.sum: The check cannot use this answer (TypeError: "),
    ("demo.twice", lambda x: x + x, "✔ demo.twice: Right."), ("demo.twice", lambda x: 1 / 0, "✘ demo.twice: "),
    ("demo.twice", stub_pass, "demo.twice: not attempted"), ("demo.twice", stub_ellipsis, "demo.twice: not att"),
    ("demo.twice", stub_docstring, "demo.twice: not attempted"), ("demo.twice", 6, "✘ demo.twice: The check"),
])  # fmt: skip
def test_check(demo, capsys, name, answer, said):
    assert lesson.check(name, answer) is None
    printed = capsys.readouterr().out
    assert printed.startswith(said) and printed.count("\n") == 1


def test_an_unknown_name_is_an_error(demo):
    with pytest.raises(QtutorError, match="demo.sum, demo.twice"):
        lesson.check("demo.smu", 4)


# ---------------------------------------------------------------------------------------------------- what was passed


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A progress file of this test's own."""
    monkeypatch.setenv("QTUTOR_PROGRESS", str(tmp_path / "reader/progress.json"))
    return tmp_path / "reader/progress.json"


def test_tests_keep_no_progress(demo):
    assert lesson.progress_file() is None and lesson.passed() == {}
    lesson.check("demo.sum", 4)
    assert lesson.passed() == {}


def test_what_is_passed_is_kept_with_its_first_day(demo, kept):
    for answer in (..., 3, "4"):
        lesson.check("demo.sum", answer)
    assert lesson.passed() == {} and not kept.exists()
    lesson.check("demo.sum", 4)
    assert lesson.passed() == {"demo.sum": str(date.today())}
    kept.write_text('{"demo.sum": "2026-01-02"}')
    lesson.check("demo.sum", 4)
    lesson.check("demo.twice", lambda x: x + x)
    assert lesson.passed() == {"demo.sum": "2026-01-02", "demo.twice": str(date.today())}


@pytest.mark.parametrize("spoil", ["a file for the folder", "damaged", "a folder for the file"])
def test_a_file_that_cannot_be_kept_breaks_nothing(demo, kept, capsys, spoil):
    if spoil == "a file for the folder":
        kept.parent.write_text("")
    elif spoil == "damaged":
        kept.parent.mkdir()
        kept.write_text('{"demo.')
    else:
        kept.mkdir(parents=True)
    lesson.check("demo.sum", 4)
    assert capsys.readouterr().out == "✔ demo.sum: Two and two.\n"
    if spoil == "damaged":
        assert kept.read_text() == '{"demo.', "what is there is not overwritten"
        with pytest.raises(QtutorError, match="damaged"):
            lesson.passed()


def test_where_progress_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("QTUTOR_PROGRESS")
    monkeypatch.delenv("APPDATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert lesson.progress_file() == tmp_path / "qtutor/progress.json"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lesson.progress_file() == tmp_path / ".local/share/qtutor/progress.json"


# -------------------------------------------------------------------------------------------------------- the quizzes

NOTEBOOKS = {path.stem[3:]: path for path in sorted((files.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def test_every_notebook_has_a_quiz_and_no_other_has():
    assert {path.stem for path in (files.DATA / "quiz").glob("*")} == set(NOTEBOOKS)


@pytest.mark.parametrize("topic", NOTEBOOKS)
def test_a_quiz_replies_to_every_option(topic):
    questions = files.read_json(files.DATA / "quiz" / f"{topic}.json")
    assert 3 <= len(questions) <= 5
    page = lesson.quiz_forms(topic)["text/html"]
    assert page.count("<details><summary>") == sum(1 + len(question["wrong"]) for question in questions)
    assert page.count("</summary>Right. ") == len(questions)
    cells = files.read_json(NOTEBOOKS[topic])["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for question in questions:
        options = [question["right"], *question["wrong"]]
        assert len(question["wrong"]) >= 2 and len({reply for _, reply in options}) == len(options)
        assert question["ask"].endswith("?") and all(reply[-1] in ".)" for _, reply in options)
    for said in re.findall(r"[Ss]ections? (\d+)", json.dumps(questions)):  # where the reply sends the reader
        assert re.search(rf"^## {said}\b", text, re.M), f"there is no section {said}"
    for said in re.findall(r'\\"([A-Z][^"\\]+)\\"\)', json.dumps(questions)):
        assert re.search(rf"^#+ {re.escape(said)}", text, re.M), f"there is no heading {said!r}"


def test_the_right_option_is_not_always_at_the_same_place():
    keys = [lesson.quiz_forms(topic)["text/plain"].splitlines()[-1] for topic in NOTEBOOKS]
    places = re.findall(r"\d([a-z])", " ".join(keys))
    assert all(places.count(place) > len(places) / 6 for place in "abc")


def test_a_quiz_in_a_plain_process(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "DATA", tmp_path)
    asked = [{"ask": "Is `a < b`?", "right": ["Yes", "a & b."], "wrong": [["<b>", "No tag."], ["Maybe", "Look."]]}]
    files.write_text(tmp_path / "quiz/demo.json", json.dumps(asked))
    lesson.quiz("demo")
    printed = capsys.readouterr().out
    assert printed == lesson.quiz_forms("demo")["text/plain"] + "\n" and printed.startswith("1. Is `a < b`?\n   a) ")
    right = next(line.split()[0][0] for line in printed.splitlines() if line.endswith(") Yes"))
    assert printed.endswith(f"Right: 1{right}.\n")
    page = lesson.quiz_forms("demo")["text/html"]
    assert "<code>a &lt; b</code>" in page and "<summary>&lt;b&gt;</summary>No. No tag." in page
    assert "<script" not in page and "Right. a &amp; b." in page
    with pytest.raises(QtutorError, match="no quiz 'dmeo': choose from demo"):
        lesson.quiz("dmeo")


def python(code, **env):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("QTUTOR_", "OMP_", "HF_", "TOKENIZERS_"))}
    return subprocess.run([sys.executable, "-c", code], env=environ | env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_setup_says_what_is_here_and_nothing_else():
    done = python("import qtutor; qtutor.setup(); qtutor.setup(); import transformer_engine.pytorch as te, os\n"
                  "print(bool(te.Linear), os.environ['HF_HUB_OFFLINE'], os.environ['TOKENIZERS_PARALLELISM'])",
                  QTUTOR_PROFILE="quick")  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "True 1 false" and lines[:4] == lines[4:8] and len(lines) == 9
    for line, pattern in zip(lines[:4], (r"qtutor .*Python .*torch ", "device ", "FP8 +(emulated: |Trans)",
                                          r"profile +quick"), strict=True):  # fmt: skip
        assert re.match(pattern, line)
    assert not re.search(r"(^|\s)/\w+/", done.stdout), "no paths of this machine"


@pytest.mark.slow
def test_setup_makes_runs_repeatable_and_respects_threads():
    code = ("import qtutor; qtutor.setup(); import torch, numpy, random\n"
            "print('#', torch.get_num_threads(), torch.rand(1).item(), numpy.random.rand(), random.random())")
    first, second = (python(code, OMP_NUM_THREADS="1").stdout.split("#")[1] for _ in range(2))
    assert first == second and first.split()[0] == "1"


@pytest.mark.parametrize("model, offline", [("org/model", None), ("/no/such/folder", "1"), ("", "1")])
def test_the_hub_is_left_alone_unless_asked_for(model, offline, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("QTUTOR_MODEL", model)
    lesson._environment()
    assert os.environ.get("HF_HUB_OFFLINE") == offline


@pytest.mark.slow
def test_in_a_kernel_an_error_is_one_sentence_and_still_an_error():
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "QTUTOR_PROFILE": "quick"})
    client = manager.client()
    client.start_channels()
    heard = []

    def run(code):
        heard.clear()
        return client.execute_interactive(code, timeout=120, output_hook=heard.append)["content"]

    try:
        client.wait_for_ready(timeout=90)
        assert run("import qtutor; qtutor.setup()")["status"] == "ok"
        assert [message["content"]["name"] for message in heard if message["msg_type"] == "stream"] == ["stdout"]
        reply = run("raise qtutor.QtutorError('There is no cake: bake one.')")
        assert (reply["status"], reply["ename"]) == ("error", "QtutorError")
        (error,) = [message["content"] for message in heard if message["msg_type"] == "error"]
        assert error["traceback"] == ["\x1b[31mThere is no cake: bake one.\x1b[0m"]
        reply = run("1 / 0")
        assert reply["ename"] == "ZeroDivisionError" and len(reply["traceback"]) > 1, "other errors are shown as ever"
        assert run("qtutor.lesson.check('fake_quantization.smallest_scale', '<b>')")["status"] == "ok"
        (shown,) = [message["content"]["data"] for message in heard if message["msg_type"] == "display_data"]
        assert shown["text/plain"].startswith("✘ fake_quantization.smallest_scale: ") and "<div" in shown["text/html"]
        assert run("qtutor.lesson.quiz('fake_quantization')")["status"] == "ok"
        shown = [message["content"]["data"] for message in heard if message["msg_type"] == "display_data"]
        assert shown == [lesson.quiz_forms("fake_quantization")]
        with_markup = "qtutor.lesson.check('fake_quantization.integer_sums', ...)"
        assert run(with_markup)["status"] == "ok" and "not attempted yet" in str(heard)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
