"""What makes the course and is no part of it: recordings, the notebooks' form, README's tables."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from qtutor import QtutorError


def command(main) -> None:
    """Run ``main(arguments)`` as a program: its status ends the process, a QtutorError is one line on stderr."""
    try:
        sys.exit(main(sys.argv[1:]))
    except QtutorError as error:
        sys.exit(str(error))


def topic(name) -> str:
    """What a notebook is about, from the name of its file: ``"04_fp8_scaling"`` -> ``"fp8_scaling"``."""
    return Path(name).name.removesuffix(".ipynb").partition("_")[2]


def keep(path: Path) -> Path:
    """Copy ``<machine>/<name>.json`` into the folder that $OUT names, if any (a rented machine's way home)."""
    if os.environ.get("OUT"):
        target = Path(os.environ["OUT"]) / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return path
