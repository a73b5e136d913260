"""qtutor: the helper package of the LLM quantization course.

What lies directly in this folder is what a reader of the notebooks reads, one idea a module.  Five folders hold the
rest (see tests/test_structure.py for who may import whom):

    emulation/    Transformer Engine's names and semantics on any device
    decide/       from requirements to a decision: memory, cost, accuracy, fronts
    rigs/         what a notebook measures with, and a recorder of data/results records with
    figures/      pictures and widgets, one module a topic
    exercises/    one module a topic, in the order of the course

``import qtutor`` is cheap: a module is loaded when it is first used, so that ``qtutor.formats`` does not pull in
transformers and ``python -m qtutor doctor`` works when half of the installation is broken.

    import qtutor
    qtutor.setup()                      # the first cell of every notebook
    qtutor.formats.E4M3.max             # 448.0
    steps = qtutor.pick(quick=60, full=2000)
"""

from __future__ import annotations

import importlib
import os

__version__ = "0.1.0"

_MODULES = (
    "alt_text checkpoints corpus course_model decide emulation energy evaluate exercises fake_quant figures files "
    "formats gguf_blocks gguf_export gguf_file kernels lesson llamacpp measure observers packed paired plots ptq qat "
    "results rigs serve ste te_switch"
).split()


class QtutorError(RuntimeError):
    """Something the reader can put right: the message is one sentence that says what to do."""


def profile() -> str:
    """Return ``"quick"`` or ``"full"``: the size at which the notebooks run.  ``QTUTOR_PROFILE`` decides where it is
    set; otherwise a CUDA GPU gets the full size and everything else the quick one."""
    chosen = os.environ.get("QTUTOR_PROFILE", "").strip().lower()
    if chosen in ("quick", "full"):
        return chosen
    if chosen:
        raise QtutorError(f"QTUTOR_PROFILE is {chosen!r}: set it to 'quick' or 'full', or unset it.")
    import torch

    return "full" if torch.cuda.is_available() else "quick"


def pick(*, quick, full):
    """Return ``quick`` on a laptop and in CI, ``full`` on a GPU (see :func:`profile`)."""
    return full if profile() == "full" else quick


def setup() -> None:
    """The first cell of every notebook: see :func:`qtutor.lesson.setup`."""
    from . import lesson

    lesson.setup()


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'qtutor' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_MODULES])
