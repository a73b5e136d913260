"""The exercises: each check passes its solution and refuses typical mistakes; each notebook's solution is right."""

from __future__ import annotations

import ast
import inspect
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import qtutor
import qtutor.exercises  # noqa: F401  (fills the registry)
from qtutor import lesson
from tools import notebooks

REGISTRY = lesson.REGISTRY
WRONG = [(name, number) for name, exercise in REGISTRY.items() for number in range(len(exercise.wrong))]
ASKED = [(path, asked) for path in sorted(notebooks.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
         for asked in notebooks.exercises(path)]  # fmt: skip


def test_no_two_exercises_share_a_name():
    modules = (notebooks.NOTEBOOKS.parent / "qtutor/exercises").glob("*.py")
    assert sum(module.read_text("utf-8").count("\n@exercise(") for module in modules) == len(REGISTRY)


def test_every_exercise_is_in_one_notebook():
    assert sorted(asked.name for _, asked in ASKED) == sorted(REGISTRY)
    assert not [(asked.name, path.stem) for path, asked in ASKED if asked.name.split(".")[0] != path.stem[3:]]


@pytest.mark.parametrize("name", REGISTRY)
def test_solution_passes(name):
    state, sentence = lesson.verdict(name, REGISTRY[name].solution)
    assert state == "right", sentence


@pytest.mark.parametrize("name, number", WRONG)
def test_mistake_is_refused(name, number):
    state, sentence = lesson.verdict(name, REGISTRY[name].wrong[number])
    assert state != "right"
    assert len(sentence) < 300 and "\n" not in sentence


@pytest.mark.parametrize("name", REGISTRY)
def test_check_survives_anything(name):
    assert REGISTRY[name].wrong, "list typical mistakes"
    assert lesson.verdict(name, ...) == ("open", "not attempted yet")
    for answer in (None, "", "?", -1, math.nan, [], {}, object(), torch.zeros(0), np.ones((2, 2)), lambda *a, **k: "?",
                   REGISTRY, str):  # fmt: skip
        state, sentence = lesson.verdict(name, answer)
        assert state != "right", f"{answer!r} passed as right: what is wrong must be a WrongAnswer ({sentence})"


@pytest.mark.parametrize("asked", [asked for _, asked in ASKED], ids=lambda asked: asked.name)
def test_folded_solution_is_right(asked):
    """The code under "Solution", run after the exercise cell, answers what the cell checks."""
    assert asked.solution, "the solution needs a fenced python block"
    namespace = {"np": np, "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math, "qtutor": qtutor}
    given = ast.parse(asked.source)
    given.body = [line for line in given.body if "lesson.check" not in ast.unparse(line)]
    exec(compile(given, "exercise", "exec"), namespace)
    state, _ = lesson.verdict(asked.name, eval(asked.answer, namespace))
    assert state == "open", "the reader's cell must come unanswered"
    exec(compile(asked.solution, "solution", "exec"), namespace)
    state, sentence = lesson.verdict(asked.name, eval(asked.answer, namespace))
    assert state == "right", sentence


def stub(x):
    """All that it has."""


@pytest.mark.slow
@pytest.mark.parametrize("option", ["-O", "-OO"])
def test_checks_hold_where_python_drops_assertions(option):
    """``python -O`` (PYTHONOPTIMIZE=1, set in some images) removes asserts, ``-OO`` docstrings, too: no check may need
    either."""
    code = ("from qtutor import lesson; import qtutor.exercises\n"
            "print([f'{name} {wrong!r}' for name, exercise in lesson.REGISTRY.items() for wrong in exercise.wrong\n"
            "       if lesson.verdict(name, wrong)[0] == 'right'], len(lesson.REGISTRY),\n"
            "      [name for name, exercise in lesson.REGISTRY.items()\n"
            "       if lesson.verdict(name, exercise.solution)[0] != 'right'],\n"
            "      {lesson.verdict(name, stub)[0] for name in lesson.REGISTRY})")  # fmt: skip
    code = inspect.getsource(stub) + code
    done = subprocess.run([sys.executable, option, "-c", code], env={**os.environ, "PYTHONIOENCODING": "utf-8"},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.stdout.strip() == f"[] {len(REGISTRY)} [] {{'open'}}", done.stdout + done.stderr
