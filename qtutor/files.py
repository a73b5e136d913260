"""Where the course lies, and how it writes a file: whole, or not at all.

A file that is half written looks like a result.  So everything here is written beside its place, to a ``.partial``
file, and moved into place when it is complete: whoever reads the name finds the old file or the new one, never a half.

    with files.whole("model.gguf") as partial:
        write_to(partial)
    files.write_text("results.json", text)
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import QtutorError

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


@contextmanager
def whole(path, remedy: str = "choose another folder, or free some space") -> Iterator[Path]:
    """Yield the path to write to; on success move what was written to ``path``, otherwise remove it.

    The folder is made where it is missing.  Every other exception comes through, after the partial file is gone.

    Raises QtutorError, which ends with ``remedy``, where the file system refuses.
    """
    path = Path(path)
    if path.is_dir():
        raise QtutorError(f"'{path}' is a folder: give the name of the file to write.")
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # of this writer alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise QtutorError(f"'{path}' cannot be written ({error.strerror or error}): {remedy}.") from None
    finally:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass  # where a file stands in for the folder there is nothing to remove


def write_text(path, text: str, remedy: str = "choose another folder, or free some space") -> Path:
    """Write ``text`` as UTF-8, whole or not at all; return the path.  Raises QtutorError as :func:`whole` does."""
    with whole(path, remedy) as partial:
        partial.write_text(text, "utf-8")
    return Path(path)


def read_json(path, what: str = "file"):
    """Return the object in a JSON file; raises QtutorError where it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError:
        raise QtutorError(f"There is no {what} '{path}': check the path.") from None
    except ValueError:
        raise QtutorError(f"The {what} '{path}' is damaged (not JSON): restore it or make it again.") from None
