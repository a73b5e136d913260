"""Newer versions for constraints.txt: ``python -m tools.pins``, which `make update` calls.

pip says what it would install within pyproject.toml's bounds; the pins take those versions.  Nothing is installed:
`git diff constraints.txt` shows the proposal, `make test` decides, `git checkout constraints.txt` refuses.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

from qtutor import QtutorError, files

from . import command

CONSTRAINTS = files.ROOT / "constraints.txt"


def canonical(name: str) -> str:
    """A package's name as indexes compare it: ``"Sphinx_X"`` -> ``"sphinx-x"``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def proposed(text: str, versions: dict[str, str]) -> tuple[str, list[str]]:
    """``text`` of constraints.txt with other versions ({name: version}), in order, and what changed, a line each.

    What is not pinned yet is added, as a new dependency.  A local version (+cpu) exists on one index only: it goes.
    """
    head = [line for line in text.splitlines() if line.startswith("#")]
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line)
    known, changed = {canonical(name): name for name in pins}, []
    for name, version in sorted(versions.items(), key=lambda pair: canonical(pair[0])):
        name, version = known.get(canonical(name), name), version.split("+")[0]
        if pins.get(name) != version:
            changed.append(f"{name} {pins.get(name, 'new')} -> {version}")
            pins[name] = version
    lines = [f"{name}=={pins[name]}" for name in sorted(pins, key=canonical)]
    return "\n".join([*head, *lines]) + "\n", changed


def within_bounds() -> dict[str, str]:
    """{name: version} of what pip would install now for ``.[test]``, beyond what is here; asks the package index."""
    call = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--upgrade", "--upgrade-strategy", "eager",
            "--report", "-", "-e", ".[test]"]  # fmt: skip
    done = subprocess.run(call, cwd=files.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise QtutorError(f"pip cannot resolve the dependencies: {done.stderr.strip().splitlines()[-1]}")
    found = {one["metadata"]["name"]: one["metadata"]["version"] for one in json.loads(done.stdout)["install"]}
    found.pop("qtutor", None)
    return found


def main(argv: list[str]) -> int:
    """Write the proposal to constraints.txt and print what changed."""
    text, changed = proposed(CONSTRAINTS.read_text("utf-8"), within_bounds())
    files.write_text(CONSTRAINTS, text)
    print("\n".join(changed) or "nothing newer within pyproject.toml's bounds")
    if changed:
        print("constraints.txt has them: 'make test' decides, 'git checkout constraints.txt' takes them back")
    return 0


if __name__ == "__main__":
    command(main)
