"""Installs llama.cpp's own converter, of the very version that is installed, beside its programs.

    python -m tools.llamacpp_source                   # the converter: 2 MB
    python -m tools.llamacpp_source --vocabularies    # and the vocabulary files that the tests compare with: 34 MB

The source distribution that llama-cpp-python is compiled from holds llama.cpp's ``convert_hf_to_gguf.py`` with its
package; a wheel does not, and so pip leaves them out.  pip, as it is configured here, gets the source distribution
again (76 MB, from its cache where that still has it), and what is needed goes to ``bin/llama.cpp`` in site-packages,
with its licence.  Done once for each version; :func:`qtutor.checkpoints.convert.to_gguf` looks there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from qtutor import QtutorError
from qtutor.checkpoints import convert

from . import command

PARTS = r"LICENSE|convert_hf_to_gguf\.py|conversion/\w+\.py|gguf-py/LICENSE|gguf-py/gguf/(\w+\.py|py\.typed)"
FAMILIES = "gpt-2|llama-bpe|llama-spm|phi-3|qwen2|gemma-4"
VOCABULARIES = rf"models/ggml-vocab-({FAMILIES})\.gguf(\.inp|\.out)?"


def unpack(archive: Path, target: Path, version: str, vocabularies: bool) -> int:
    """Put the converter's files of a source distribution into the folder ``target``, whole or not at all; their
    bytes."""
    wanted = re.compile(rf"[^/]+/vendor/llama\.cpp/({PARTS}{'|' + VOCABULARIES if vocabularies else ''})")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, tarfile.open(archive) as tar:
        new, size = Path(folder) / "new", 0
        for member in tar:
            if member.isfile() and (match := wanted.fullmatch(member.name)):
                path = new / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as file, open(path, "wb") as copy:
                    shutil.copyfileobj(file, copy)
                size += member.size
        if not (new / convert.SCRIPT).is_file():
            raise QtutorError(f"{archive.name} holds no {convert.SCRIPT}: this version of llama-cpp-python cannot be "
                              "used with the course's converter.")  # fmt: skip
        (new / "VERSION").write_text(version, "utf-8")
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    return size


def download(version: str, folder: Path) -> Path:
    """Let pip get llama-cpp-python's source distribution; return the archive."""
    package = "llama-cpp-python"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--retries", "1", "--timeout", "15", "--no-binary", package, "--dest", str(folder), f"{package}=={version}"],
        capture_output=True, text=True, check=False)  # fmt: skip
    if found := sorted(folder.glob("*.tar.gz")):
        return found[0]
    why = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["it gave no reason"]
    raise QtutorError(f"pip could not download the source of {package} {version} ({why[-1].strip().rstrip('.')}): run "
                      "this again with a network; only the conversion of other model families needs it.")  # fmt: skip


def main(arguments: list[str]) -> int:
    """Install what is missing; 0. Raises QtutorError where that is not possible."""
    vocabularies = "--vocabularies" in arguments
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise QtutorError("llama-cpp-python is not installed: install the course first (make install).") from None
    target = convert.folder()
    stamp = target / "VERSION"
    if stamp.is_file() and stamp.read_text("utf-8") == version and (not vocabularies or (target / "models").is_dir()):
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            size = unpack(download(version, Path(folder)), target, version, vocabularies)
    except (OSError, tarfile.TarError) as err:
        raise QtutorError(f"The converter could not be unpacked into {target} ({err}): run this again.") from None
    print(f"llama.cpp's converter of llama-cpp-python {version}: {size / 1e6:.0f} MB in {target}")
    return 0


if __name__ == "__main__":
    command(main)
