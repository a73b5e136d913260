"""The package as a whole: cheap to import, bounded, documented, small; and the network really off in tests."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qtutor

ROOT = Path(__file__).resolve().parent.parent
MODULES = [path for folder in ("qtutor", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def python(*argv, **env):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env={**os.environ, **env}, capture_output=True,
                          text=True, timeout=300)


def tracked_files() -> list[Path]:
    listed = python_git("ls-files", "-z")
    if listed is None:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def python_git(*argv):
    try:
        done = subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def test_modules_load_when_first_used():
    assert qtutor.formats.E4M3.max == 448
    assert "formats" in dir(qtutor)
    with pytest.raises(AttributeError, match="no_such_module"):
        _ = qtutor.no_such_module


def test_every_listed_module_exists():
    """What __init__ promises is there, and it promises all that is there."""
    listed = set(dir(qtutor)) & {path.stem if path.stem != "__init__" else path.parent.name for path in MODULES}
    there = {path.stem for path in (ROOT / "qtutor").glob("[a-z]*.py")}
    there |= {path.parent.name for path in (ROOT / "qtutor").glob("*/__init__.py")}
    assert there <= listed and all(getattr(qtutor, name) for name in ("files", "results", "decide", "exercises"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_has_a_docstring_and_so_do_public_names(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), f"{path.name} has no module docstring"
    kinds = (ast.FunctionDef, ast.ClassDef)
    bare = [node.name for node in tree.body
            if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not bare, f"public names without a docstring in {path.name}: {bare}"


def test_profile(monkeypatch):
    for value in ("quick", "full"):
        monkeypatch.setenv("QTUTOR_PROFILE", value)
        assert qtutor.pick(quick="quick", full="full") == value
    monkeypatch.setenv("QTUTOR_PROFILE", "huge")
    with pytest.raises(qtutor.QtutorError, match="'quick' or 'full'"):
        qtutor.profile()


def requirements() -> list[Requirement]:
    groups = [PYPROJECT["dependencies"], *PYPROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_dependency_has_a_lower_and_an_upper_bound(requirement):
    operators = {clause.operator for clause in requirement.specifier}
    assert ">=" in operators and "<" in operators


def test_constraints_pin_the_tested_set_within_bounds():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not [version for version in pins.values() if "+" in version], "a local version exists on one index only"
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    gpu = {Requirement(text).name for text in PYPROJECT["optional-dependencies"]["gpu"]}
    for requirement in requirements():
        if requirement.name not in gpu:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_install_page_and_makefile_compile_llama_cpp_alike():
    flag = re.compile(r"-DL[A-Z_]+=\w+|-DCMAKE_INSTALL_RPATH")
    makefile = set(flag.findall((ROOT / "Makefile").read_text("utf-8")))
    lines = re.findall(r"(?:export|ENV) CMAKE_ARGS=.*", (ROOT / "docs/install.md").read_text("utf-8"))
    assert len(lines) == 2
    for line in lines:
        assert set(flag.findall(line)) == makefile


def test_links_between_our_files_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("data/*/README.md")]:
        text = re.sub(r"`[^`\n]*`", "", path.read_text("utf-8"))  # an example is no link
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not target.startswith(("http", "mailto")):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_repository_is_small_and_has_no_pickle():
    files = tracked_files()
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin")]
    assert (ROOT / "data/model/model.safetensors").stat().st_size <= 16e6


NETWORK = """
import socket
for host in ("192.0.2.1", "127.0.0.1"):
    try:
        socket.create_connection((host, 9), timeout=5)
    except ConnectionRefusedError:
        print("reached", host)
    except OSError:
        print("not reached", host)
"""


@pytest.mark.parametrize("how", ["", "guard"])
def test_offline_launcher_leaves_only_the_loopback(how):
    done = python("tests/offline.py", "-c", NETWORK, QTUTOR_OFFLINE=how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["not reached 192.0.2.1", "reached 127.0.0.1"]
    assert done.stdout.startswith("network off: ")
    if how == "guard":
        assert "sockets" in done.stdout.splitlines()[0]


def test_make_says_in_one_sentence_what_is_missing(tmp_path):
    """A Python that is not there, and one that is too old."""
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    missing = ("no-such-python", "was not found: install Python 3.11")
    for name, said in (missing, (str(old), "Python 3.9.2 cannot run")):
        command = ["make", "--no-print-directory", "install", f"PYTHON={name}", f"VENV={tmp_path / 'venv'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode != 0
        sentences = [line for line in done.stdout.splitlines() if line.strip()]
        assert len(sentences) == 1 and said in sentences[0], done.stdout
        assert not (tmp_path / "venv").exists()
