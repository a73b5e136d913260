"""What every notebook stands on: :func:`setup` in its first cell, and :func:`check` under its exercises.

An exercise is a check function, registered in :mod:`qtutor.exercises` with its solution and with typical wrong
answers, so that the tests can hold each check against both:

    @exercise("number_formats.largest_e4m3", solution=448.0, wrong=[480.0, 240.0, "448"])
    def _largest_e4m3(answer):
        assert answer != 480, "One code at the top is NaN: E4M3 gives up infinities, but not NaN."
        assert answer == 448, "The largest mantissa is 1.75, the largest exponent 8."
        return "One code more than IEEE rules would leave: E4M3 spends no codes on infinity."   # praise, or None

In the notebook the reader replaces ``...`` and hears at once; whatever the answer is, the notebook goes on:

    answer = ...
    qtutor.lesson.check("number_formats.largest_e4m3", answer)
"""

from __future__ import annotations

import functools
import html
import importlib
import inspect
import logging
import os
import platform
import random
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import QtutorError, __version__, profile

# -------------------------------------------------------------------------------------------------------- exercises


@dataclass(frozen=True)
class Exercise:
    """A registered exercise: its check function, its solution and the wrong answers that the check must refuse."""

    name: str
    check: Callable
    solution: object
    wrong: tuple


class NotAttempted(Exception):
    """Raised inside a check when the reader's function is still a stub."""


REGISTRY: dict[str, Exercise] = {}


def exercise(name: str, *, solution, wrong) -> Callable:
    """Register the decorated function as the check of exercise ``name``, such as ``"number_formats.largest_e4m3"``.

    The function gets the reader's answer.  It raises AssertionError with a sentence that helps on when the answer is
    wrong; when it is right it returns None or a sentence of praise.  ``solution`` passes the check; each of ``wrong``
    (at least one) fails it; both are callables where the answer is a function.
    """

    def register(function: Callable) -> Callable:
        if not re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", name):
            raise QtutorError(f"{name!r} is no exercise name: use the notebook's topic, a dot and a_name.")
        known = REGISTRY.get(name)
        if known and known.check.__qualname__ != function.__qualname__:  # the same function again: a reload
            raise QtutorError(f"There are two exercises {name!r}: name one of them differently.")
        REGISTRY[name] = Exercise(name, function, solution, tuple(wrong))
        return function

    return register


def _empty(): ...


def _empty_with_docstring():
    """Nothing."""


_STUBS = {f.__code__.co_code for f in (_empty, _empty_with_docstring)}


def _is_open(answer) -> bool:
    """True for ``...``, for a list, tuple or dict with ``...`` in it, and for a function without a body."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, (list, tuple)):
        return any(part is ... for part in answer)
    return answer is ... or (inspect.isfunction(answer) and answer.__code__.co_code in _STUBS)


def _watched(answer):
    """The reader's function; one that returns ``...`` is a stub, too."""

    @functools.wraps(answer)
    def function(*args, **kwargs):
        result = answer(*args, **kwargs)
        if result is ...:
            raise NotAttempted
        return result

    return function


def verdict(name: str, answer) -> tuple[str, str]:
    """Judge an answer: ``("open" | "right" | "wrong", sentence)``.  Raises QtutorError for an unknown exercise."""
    importlib.import_module(f"{__package__}.exercises")
    if name not in REGISTRY:
        near = ", ".join(sorted(n for n in REGISTRY if n.split(".")[0] == str(name).split(".")[0])) or "those in the notebooks"
        raise QtutorError(f"There is no exercise {name!r}: choose from {near}.")
    if _is_open(answer):
        return "open", "not attempted yet"
    if inspect.isfunction(answer):
        answer = _watched(answer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            praise = REGISTRY[name].check(answer)
    except NotAttempted:
        return "open", "not attempted yet"
    except AssertionError as error:
        return "wrong", str(error) or "Not yet."
    except Exception as error:  # the answer is the reader's: whatever it breaks is its mistake, not the notebook's
        shown = " ".join(str(error).split())[:200]
        return "wrong", f"The check cannot use this answer ({type(error).__name__}: {shown})."
    return "right", praise or "Right."


_LOOK = {"open": ("", "#949494"), "right": ("✔ ", "#029e73"), "wrong": ("✘ ", "#d55e00")}


def check(name: str, answer) -> None:
    """Say whether ``answer`` solves exercise ``name``: "✔ ...", "✘ ..." or "not attempted yet".

    Never raises for an answer, however wrong; raises QtutorError for an exercise that does not exist.
    """
    state, sentence = verdict(name, answer)
    mark, color = _LOOK[state]
    text = f"{mark}{name}: {sentence}"
    shell = _shell()
    if shell is None:
        print(text)
        return
    from IPython.display import display

    box = (f'<div style="border-left: 4px solid {color}; padding: 0.3em 0.8em; margin: 0.3em 0">'
           f"{html.escape(mark)}<b>{html.escape(name)}</b>: {html.escape(sentence)}</div>")  # fmt: skip
    display({"text/html": box, "text/plain": text}, raw=True)


# ------------------------------------------------------------------------------------------------------------ setup

_NOISY = ("torch", "torchao", "transformers", "accelerate", "huggingface_hub", "matplotlib", "seaborn", "traitlets",
          "jupyter_client", "ipykernel", "zmq", "transformer_engine", "tqdm")  # fmt: skip
MAX_THREADS = 16  # a model of this size gains nothing from more


def _shell():
    """The running IPython shell, or None in a plain Python process."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def _quiet() -> None:
    """Silence what libraries say while they load and what a reader can do nothing about."""
    for name in ("torchao", "torch.utils._pytree", "transformers", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    modules = r"(" + "|".join(_NOISY) + r")(\.|$)"
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=modules)
    warnings.filterwarnings("ignore", message=".*IProgress not found.*")
    # said once, where a library is compiled at its first import; the "module" is then the path of its file
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\]torchao[/\\]")


def _wants_hub() -> bool:
    """True when QTUTOR_MODEL names a model of the Hugging Face hub, not a folder."""
    name = os.environ.get("QTUTOR_MODEL", "")
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).expanduser().exists()


def _environment() -> None:
    """Settings that libraries read when they are imported: so they come first."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning about forks, same speed at our size
    if not _wants_hub():  # everything is on this machine: never wait for a network
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def threads() -> int:
    """How many threads to compute with: OMP_NUM_THREADS where set, else the cores this process may use, at most 16."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def _show_as_sentence(shell, kind, error, traceback, tb_offset=None):
    """Show a QtutorError as one red sentence; to nbclient and to pytest it is an error like any other."""
    shell._showtraceback(kind, error, [f"\x1b[31m{error}\x1b[0m"])


def setup(title: str | None = None) -> None:
    """Prepare a notebook: quiet libraries, seeds, threads, plot theme, Transformer Engine; say what is here.

    May be called again.  ``title`` is printed first where given.
    """
    _environment()
    _quiet()
    import numpy as np
    import torch

    from . import plots, te_switch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(threads())
    plots.theme()
    status = te_switch.activate()
    _quiet()  # some libraries put filters and levels of their own in front when they load
    if "transformers" in sys.modules and not _wants_hub():
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    shell = _shell()
    if shell is not None:
        shell.set_custom_exc((QtutorError,), _show_as_sentence)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    else:
        n = torch.get_num_threads()
        device = f"CPU, {n} thread{'s' if n > 1 else ''}"
    size = profile()
    lines = [title] if title else []
    lines += [
        f"qtutor {__version__} · Python {platform.python_version()} · torch {torch.__version__.split('+')[0]}",
        f"device   {device}",
        f"FP8      {status}",
        f"profile  {size} ({'the sizes for a GPU' if size == 'full' else 'small sizes, for a CPU'})",
    ]
    print("\n".join(lines))
