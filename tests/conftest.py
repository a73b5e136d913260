"""What all tests share: threads, profile, the markers, and ``--notebook-runs=2``, which runs each notebook twice."""

from __future__ import annotations

import os

import pytest
from nbmake.pytest_items import NotebookItem

# Two workers on two cores: one thread each, decided before torch is imported.
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("QTUTOR_PROFILE", "quick")
os.environ["QTUTOR_PROGRESS"] = ""  # what a test answers is not the reader's progress


class RepeatedNotebook(NotebookItem):
    """One more run of a notebook, which meets whatever the run before it left behind."""

    def __init__(self, parent, filename, number):
        pytest.Item.__init__(self, f"{parent.name}, run {number}", parent)
        self.filename = filename


def pytest_addoption(parser):
    parser.addoption("--notebook-runs", type=int, default=1, help="run each notebook so many times in a row")


def pytest_collection_modifyitems(config, items):
    """Repeat the notebooks, and put them first: they are the longest, and no worker should end on one alone.

    ``--dist loadfile`` keeps the runs of one notebook on one worker, in order.
    """
    notebooks, others = [], []
    for item in items:
        if not isinstance(item, NotebookItem):
            others.append(item)
            continue
        notebooks.append(item)
        for number in range(2, config.getoption("--notebook-runs") + 1):
            again = RepeatedNotebook.from_parent(item.parent, filename=item.filename, number=number)
            notebooks.append(again)
    items[:] = notebooks + others


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA GPU here")


@pytest.fixture(scope="module")
def base():
    """The course model."""
    from qtutor import course_model

    return course_model.load()


@pytest.fixture(scope="module")
def text():
    """Token ids of the evaluation text: some to train on, others to evaluate on."""
    from qtutor import corpus, course_model

    ids = corpus.tokens("eval", course_model.load_tokenizer())
    return ids[:20_000], ids[20_000:22_052]
