"""What every notebook uses: :func:`setup` in its first cell, :func:`check` under exercises, :func:`quiz` at the end.

An exercise is a check function, registered in :mod:`qtutor.exercises` with its solution and with typical wrong
answers.  The tests try them all:

    @exercise("number_formats.largest_e4m3", solution=448.0, wrong=[480.0, 240.0, "448"])
    def _largest_e4m3(answer):
        expect(answer != 480, "One code at the top is NaN: E4M3 gives up infinities, but not NaN.")
        expect(answer == 448, "The largest mantissa is 1.75, the largest exponent 8.")
        return "One code more than IEEE rules would leave: E4M3 spends no codes on infinity."   # praise, or None

In the notebook the reader replaces the ``...`` of ``answer = ...`` and ``qtutor.lesson.check(name, answer)`` replies at
once.  Whatever the answer is, the notebook goes on.  What was passed is kept on the reader's machine
(:func:`progress_file`) and goes nowhere else.
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import logging
import os
import platform
import random
import re
import sys
import warnings
import zlib
from collections import namedtuple
from collections.abc import Callable
from datetime import date
from pathlib import Path

from . import QtutorError, __version__, files, profile


class WrongAnswer(Exception):
    """Raised by a check; the message is one sentence that helps the reader on."""


class NotAttempted(Exception):
    """Raised inside a check when the reader's function is still a stub."""


def expect(condition, sentence: str) -> None:
    """Raise WrongAnswer with ``sentence`` unless ``condition`` holds.  (``python -O`` would remove an assert.)"""
    if not condition:
        raise WrongAnswer(sentence)


Exercise = namedtuple("Exercise", "check solution wrong")
REGISTRY: dict[str, Exercise] = {}


def exercise(name: str, *, solution, wrong) -> Callable:
    """Register the decorated function as the check of exercise ``name``: a topic, a dot, and a name.

    The check gets the reader's answer; it raises WrongAnswer (see :func:`expect`), or returns None or a sentence of
    praise.  ``solution`` and ``wrong`` are functions where the answer is one.
    """

    def register(function: Callable) -> Callable:
        REGISTRY[name] = Exercise(function, solution, tuple(wrong))
        return function

    return register


def _described():
    """A function without a body: its docstring is all that it has."""


def _is_open(answer) -> bool:
    """True for ``...``, for a list, tuple or dict with ``...`` in it, and for a function without a body."""
    if inspect.isfunction(answer):
        return answer.__code__.co_code in ((lambda: None).__code__.co_code, _described.__code__.co_code)
    parts = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (list, tuple)) else [answer]
    return any(part is ... for part in parts)


def _watched(answer):
    """The reader's function, which raises NotAttempted when it returns ``...``: then it is a stub, too."""

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
        near = sorted(known for known in REGISTRY if known.split(".")[0] == str(name).split(".")[0])
        raise QtutorError(f"There is no exercise {name!r}: choose from {', '.join(near) or 'those in the notebooks'}.")
    if _is_open(answer):
        return "open", "not attempted yet"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            praise = REGISTRY[name].check(_watched(answer) if inspect.isfunction(answer) else answer)
    except NotAttempted:
        return "open", "not attempted yet"
    except WrongAnswer as error:
        return "wrong", str(error)
    except Exception as error:  # the answer is the reader's: whatever it breaks is its mistake, not the notebook's
        said = " ".join(str(error).split())[:200]
        return "wrong", f"The check cannot use this answer ({type(error).__name__}: {said})."
    return "right", praise or "Right."


def check(name: str, answer) -> None:
    """Say whether ``answer`` solves exercise ``name``: "✔ ...", "✘ ..." or "not attempted yet"; keep what is passed."""
    state, sentence = verdict(name, answer)
    mark, color = {"open": ("", "#949494"), "right": ("✔ ", "#029e73"), "wrong": ("✘ ", "#d55e00")}[state]
    if state == "right":
        _keep(name)
    _show(f"{mark}{name}: {sentence}",
          f'<div style="border-left: 4px solid {color}; padding: 0.3em 0.8em; margin: 0.3em 0">'
          f"{mark}<b>{html.escape(name)}</b>: {html.escape(sentence)}</div>")  # fmt: skip


def _show(text: str, page: str) -> None:
    """Display HTML in a notebook, print the text elsewhere."""
    if _shell() is None:
        print(text)
        return
    from IPython.display import display

    display({"text/html": page, "text/plain": text}, raw=True)


def progress_file() -> Path | None:
    """Where passed exercises are kept: QTUTOR_PROGRESS, else in the user's data folder.  None, and nothing is kept,
    where QTUTOR_PROGRESS is set and empty, as in tests."""
    folder = os.environ.get("APPDATA") or os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    chosen = os.environ.get("QTUTOR_PROGRESS", f"{folder}/qtutor/progress.json")
    return Path(chosen).expanduser() if chosen else None


def passed() -> dict[str, str]:
    """Name of each exercise that was passed on this machine -> the day, as 2026-11-27.

    Raises QtutorError where the file is damaged.
    """
    path = progress_file()
    return files.read_json(path, "progress file") if path and path.exists() else {}


def _keep(name: str) -> None:
    """Note that an exercise was passed; where that cannot be written (or read) the notebook goes on without."""
    try:
        if (path := progress_file()) and name not in (kept := passed()):
            files.write_text(path, json.dumps(kept | {name: str(date.today())}, indent=1) + "\n")
    except Exception:  # no home folder, a full disk, a damaged file: nothing that the exercise depends on
        pass


def quiz_forms(topic: str) -> dict[str, str]:
    """The quiz ``data/quiz/<topic>.json`` as {"text/plain": questions and key, "text/html": with the replies, folded}.

    The file is a list of ``{"ask": question, "right": [option, reply], "wrong": [[option, reply], ...]}``.  The order
    of the options depends on their words alone.  Raises QtutorError where there is no such quiz.
    """
    there = {path.stem: path for path in sorted((files.DATA / "quiz").glob("*.json"))}
    if topic not in there:
        raise QtutorError(f"There is no quiz {topic!r}: choose from {', '.join(there) or 'none'}.")

    def marked(text):
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))

    lines, key, page = [], [], []
    for number, question in enumerate(files.read_json(there[topic], "quiz"), 1):
        options = [("Right", *question["right"]), *(("No", *wrong) for wrong in question["wrong"])]
        options.sort(key=lambda option: zlib.crc32(f"{question['ask']}{option[1]}".encode()))
        folded = "\n".join(f"<details><summary>{marked(option)}</summary>{says}. {marked(reply)}</details>"
                           for says, option, reply in options)  # fmt: skip
        page.append(f"<div><b>{number}.</b> {marked(question['ask'])}</div>\n"
                    f'<div style="margin: 0.2em 0 1em 1.5em">\n{folded}\n</div>')  # fmt: skip
        lines += [f"{number}. {question['ask']}", *(f"   {'abcdef'[i]}) {one[1]}" for i, one in enumerate(options))]
        key += [f"{number}{'abcdef'[i]}" for i, one in enumerate(options) if one[0] == "Right"]
    return {"text/plain": "\n".join([*lines, f"Right: {', '.join(key)}."]), "text/html": "\n".join(page)}


def quiz(topic: str) -> None:
    """Show the recall quiz of a notebook: each option unfolds into the reply to it, without a script."""
    forms = quiz_forms(topic)
    _show(forms["text/plain"], forms["text/html"])


def _shell():
    """The running IPython shell, or None in a plain Python process."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def quiet() -> None:
    """Silence the messages of libraries that a reader can do nothing about."""
    for name in ("torchao", "torch.utils._pytree", "transformers", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    noisy = (r"(torch|torchao|transformers|accelerate|huggingface_hub|matplotlib|seaborn|traitlets|jupyter_client|"
             r"ipykernel|zmq|transformer_engine|tqdm)(\.|$)")  # fmt: skip
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=noisy)
    warnings.filterwarnings("ignore", message=".*IProgress not found.*")
    # said once, where a library is compiled at its first import; the "module" is then the path of its file
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\]torchao[/\\]")


def _environment() -> bool:
    """Set what libraries read when they are imported; return False where QTUTOR_MODEL names a model of the hub."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning about forks, same speed at our size
    model = os.environ.get("QTUTOR_MODEL", "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).expanduser().exists():
        return False
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this machine: never wait for a network
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return True


def threads() -> int:
    """How many threads to compute with: OMP_NUM_THREADS where set, else the cores this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = os.environ.get("OMP_NUM_THREADS", "")  # a model of this size gains nothing from more than 16
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else min(cores, 16)


def _show_as_sentence(shell, kind, error, traceback, tb_offset=None):
    """Show a QtutorError as one red sentence; to nbclient and to pytest it is an error like any other."""
    shell._showtraceback(kind, error, [f"\x1b[31m{error}\x1b[0m"])


def setup() -> None:
    """Prepare a notebook: quiet libraries, seeds, threads, plots, Transformer Engine; print what this machine has."""
    offline = _environment()
    quiet()
    import numpy as np
    import torch

    from . import alt_text, plots, te_switch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(threads())
    plots.theme()
    status = te_switch.activate()
    quiet()  # some libraries put filters and levels of their own in front when they load
    if offline and "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    if shell := _shell():
        shell.set_custom_exc((QtutorError,), _show_as_sentence)
        alt_text.attach(shell)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    else:
        device = f"CPU, {threads()} thread{'s' if threads() > 1 else ''}"
    size = {"full": "full (the sizes for a GPU)", "quick": "quick (small sizes, for a CPU)"}[profile()]
    print(f"qtutor {__version__} · Python {platform.python_version()} · torch {torch.__version__.split('+')[0]}\n"
          f"device   {device}\nFP8      {status}\nprofile  {size}")  # fmt: skip
