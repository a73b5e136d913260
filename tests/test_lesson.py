"""setup() and check(), in this process and in a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from jupyter_client.manager import KernelManager

from qtutor import QtutorError, lesson


@pytest.fixture
def demo():
    @lesson.exercise("99.demo", solution=4, wrong=[5])
    def _demo(answer):
        if answer < 4:  # raised by hand: pytest would put its own words into an assert in this file
            raise AssertionError("It is more.")
        if answer > 4:
            raise AssertionError
        return "Two and two."

    @lesson.exercise("99.function", solution=lambda x: 2 * x, wrong=[lambda x: x])
    def _function(answer):
        if answer(3) != 6:
            raise AssertionError("Twice, please.")

    yield
    del lesson.REGISTRY["99.demo"], lesson.REGISTRY["99.function"]


def stub_pass(x):
    pass


def stub_docstring(x):
    """Return twice x."""


def stub_ellipsis(x):
    return ...


@pytest.mark.parametrize("name, answer, said", [
    ("99.demo", ..., "99.demo: not attempted yet"), ("99.demo", [1, ...], "99.demo: not attempted yet"),
    ("99.demo", {"a": ...}, "99.demo: not attempted yet"), ("99.demo", 4, "✔ 99.demo: Two and two."),
    ("99.demo", 3, "✘ 99.demo: It is more."), ("99.demo", 5, "✘ 99.demo: Not yet."),
    ("99.demo", "4", "✘ 99.demo: The check cannot use this answer (TypeError: "),
    ("99.demo", None, "✘ 99.demo: The check cannot use this answer (TypeError: "),
    ("99.function", lambda x: x + x, "✔ 99.function: Right."), ("99.function", lambda x: 1 / 0, "✘ 99.function: "),
    ("99.function", stub_pass, "99.function: not attempted"), ("99.function", stub_ellipsis, "99.function: not att"),
    ("99.function", stub_docstring, "99.function: not attempted"), ("99.function", 6, "✘ 99.function: The check"),
])  # fmt: skip
def test_check(demo, capsys, name, answer, said):
    assert lesson.check(name, answer) is None
    printed = capsys.readouterr().out
    assert printed.startswith(said) and printed.count("\n") == 1


def test_mistakes_of_an_author_are_errors(demo):
    with pytest.raises(QtutorError, match="99.demo, 99.function"):
        lesson.check("99.dmeo", 4)
    with pytest.raises(QtutorError, match="two exercises"):
        lesson.exercise("99.demo", solution=1, wrong=[2])(lambda answer: None)
    with pytest.raises(QtutorError, match="number"):
        lesson.exercise("demo", solution=1, wrong=[2])(lambda answer: None)


def python(code, **env):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("QTUTOR_", "OMP_", "HF_", "TOKENIZERS_"))}
    return subprocess.run([sys.executable, "-c", code], env=environ | env, capture_output=True, text=True, timeout=120)


def test_setup_says_what_is_here_and_nothing_else():
    done = python("import qtutor; qtutor.setup('Hello'); qtutor.setup(); import transformer_engine.pytorch as te, os\n"
                  "print(bool(te.Linear), os.environ['HF_HUB_OFFLINE'], os.environ['TOKENIZERS_PARALLELISM'])",
                  QTUTOR_PROFILE="quick")  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Hello" and lines[-1] == "True 1 false" and lines[1:5] == lines[5:9] and len(lines) == 10
    for line, pattern in zip(lines[1:5], (r"qtutor .*Python .*torch ", "device ", "FP8 +(emulated: |Trans)",
                                          r"profile +quick"), strict=True):  # fmt: skip
        assert re.match(pattern, line)
    assert not re.search(r"(^|\s)/\w+/", done.stdout), "no paths of this machine"


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
        assert run("qtutor.lesson.check('fake_quantization.ste_gradient', [0, 1, 1, 1, '<b>'])")["status"] == "ok"
        (shown,) = [message["content"]["data"] for message in heard if message["msg_type"] == "display_data"]
        assert shown["text/plain"].startswith("✘ 05.ste_gradient: ") and "<div" in shown["text/html"]
        with_markup = "qtutor.lesson.check('fake_quantization.ternary', ...)"
        assert run(with_markup)["status"] == "ok" and "not attempted yet" in str(heard)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
