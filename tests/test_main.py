"""python -m qtutor, in a process of its own, in a sound and in a broken installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def qtutor(*argv, env=None, cwd=ROOT, timeout=300):
    return subprocess.run([sys.executable, "-m", "qtutor", *argv], cwd=cwd, env={**os.environ, **(env or {})},
                          capture_output=True, text=True, timeout=timeout)


def copy_of_package(folder: Path) -> Path:
    """A project folder with the package, its metadata and one notebook, but no data."""
    shutil.copytree(ROOT / "qtutor", folder / "qtutor", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "notebooks").mkdir()
    return folder


@pytest.mark.slow
def test_doctor_passes_here():
    done = qtutor("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("Python", "torch", "GPU", "FP8 training", "llama.cpp", "disk", "course model", "notebooks"):
        assert what in done.stdout
    assert "FAIL" not in done.stdout
    assert "DelayedScaling" in done.stdout and "MXFP8" in done.stdout
    assert done.stderr == ""


def test_doctor_survives_a_broken_installation(tmp_path):
    """torch does not load, llama_cpp and JupyterLab are gone, the model is missing: a list, not a traceback."""
    project = copy_of_package(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    for name in ("llama_cpp", "jupyter_client"):
        (broken / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")")
    done = qtutor("doctor", cwd=project, env={"PYTHONPATH": str(broken)})
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.strip().startswith("FAIL")]
    assert {"torch", "llama.cpp", "JupyterLab", "course", "notebooks"} <= set(failed)
    lines = done.stdout.splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith("FAIL"):  # each with a remedy: an arrow below, or a sentence that says it
            assert "->" in lines[number + 1] or ":" in line, line


@pytest.mark.slow
def test_doctor_finds_a_damaged_model(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data" / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = qtutor("doctor", env={"QTUTOR_MODEL": str(model), "QTUTOR_PROFILE": "fast"})
    assert done.returncode == 1 and "QTUTOR_PROFILE is 'fast'" in done.stdout
    assert "FAIL" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_recipes_prints_what_is_tagged(tmp_path):
    project = copy_of_package(tmp_path)
    cells = [{"cell_type": "markdown", "metadata": {}, "source": ["## Recipes\n\n", "Recipe: *add* two\n", "numbers."]},
             {"cell_type": "code", "metadata": {"tags": ["recipe"]}, "source": ["a = 1\n", "a + 2"]},
             {"cell_type": "code", "metadata": {}, "source": ["not_a_recipe = 1"]}]
    (project / "notebooks" / "07_demo.ipynb").write_text(json.dumps({"cells": cells}))
    for name in ("7", "07", "demo"):
        done = qtutor("recipes", name, cwd=project)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "# ---- 07 · Recipe: add two numbers.\n\na = 1\na + 2\n\n"
    done = qtutor("recipes", "99", cwd=project)
    assert (done.returncode, done.stderr) == (1, "qtutor: There is no notebook 99: choose from 07, demo.\n")


def test_every_notebook_with_recipes_prints_code_that_compiles():
    done = qtutor("recipes")
    assert done.returncode == 0
    assert "# ---- " in done.stdout
    compile(done.stdout, "recipes", "exec")
    assert "qtutor" not in done.stdout


def test_model_fetch_without_a_network_says_what_it_wanted_and_why_not(tmp_path):
    alone = {"QTUTOR_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = qtutor("model", "fetch", "smollm2", env=alone)
    assert done.returncode == 1 and "93 MB" in done.stdout and "licence Apache-2.0" in done.stdout
    assert "could not be downloaded" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = qtutor("model", "fetch", "llama-405b", env=alone)
    assert done.returncode == 2 and "invalid choice" in done.stderr and "smollm2" in done.stderr


@pytest.mark.parametrize("argv, status, said", [
    ([], 2, "usage:"), (["--help"], 0, "doctor"), (["--version"], 0, "qtutor 0."),
    (["frobnicate"], 2, "invalid choice"),
])
def test_usage(argv, status, said):
    done = qtutor(*argv)
    assert done.returncode == status
    assert said in done.stdout + done.stderr


def test_lab_without_start_page_is_one_sentence(tmp_path):
    done = qtutor("lab", cwd=copy_of_package(tmp_path))
    assert done.returncode == 1
    assert done.stderr == ("qtutor: notebooks/00_start_here.ipynb is missing: "
                           "restore it with 'git checkout notebooks'.\n")


def closed_home(tmp_path):
    """A home that may not be written, not even by root, and what has to stand before a command for that."""
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"] if os.geteuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("needs setpriv")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER_", "IPYTHON", "MPLCONFIG", "XDG_"))}
    return drop, kept | {"HOME": str(home), "QTUTOR_CACHE": str(tmp_path / "cache")}


def test_jupyter_writes_to_the_cache_where_the_home_is_closed(tmp_path):
    drop, env = closed_home(tmp_path)
    code = "from qtutor import __main__ as m; import json; print(json.dumps(m.jupyter_folders()))"
    for cache, expected in ((tmp_path / "cache", 0), (tmp_path / "home" / "cache", 1)):
        done = subprocess.run([*drop, sys.executable, "-c", code], cwd=ROOT, env=env | {"QTUTOR_CACHE": str(cache)},
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == expected, done.stderr
        if expected:
            assert "set QTUTOR_CACHE to a folder that can" in done.stderr
        else:
            found = json.loads(done.stdout)
            assert "JUPYTER_RUNTIME_DIR" in found and all(str(cache) in folder for folder in found.values())
    (tmp_path / "home").chmod(0o755)
    done = subprocess.run([*drop, sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert json.loads(done.stdout) == {}


@pytest.mark.slow
def test_lab_and_a_kernel_start_where_the_home_is_closed(tmp_path):
    drop, env = closed_home(tmp_path)
    log = tmp_path / "log"
    with open(log, "wb") as out:
        command = [*drop, sys.executable, "-m", "qtutor", "lab", "--no-browser", "--IdentityProvider.token=letmein"]
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
    try:
        found = None
        for _ in range(300):
            found = next((tmp_path / "cache").glob("*runtime*/jpserver-*.json"), None)
            if found:
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.3)
        url = json.loads(found.read_text())["url"]
        ask = urllib.request.Request(f"{url}api/kernels?token=letmein", data=b'{"name": "python3"}', method="POST")
        with urllib.request.urlopen(ask, timeout=120) as answer:
            assert json.load(answer)["name"] == "python3"
        urllib.request.urlopen(urllib.request.Request(f"{url}api/shutdown?token=letmein", method="POST"), timeout=120)
        assert server.wait(120) == 0
    finally:
        server.kill()
    assert "Permission" not in log.read_text()


@pytest.mark.slow
def test_lab_opens_on_the_start_page(tmp_path):
    """The server answers, its first page is the start page, and options are passed on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    log = tmp_path / "log"
    private = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "qtutor", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
             "--IdentityProvider.token=letmein"], cwd=tmp_path, env={**os.environ, **private}, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/api", timeout=30)
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.3)
        with urllib.request.urlopen(f"{url}/?token=letmein", timeout=120) as page:
            assert page.url.split("?")[0].endswith("/lab/tree/notebooks/00_start_here.ipynb")
        request = f"{url}/api/contents/notebooks/00_start_here.ipynb?token=letmein&content=0"
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["type"] == "notebook"
        shutdown = urllib.request.Request(f"{url}/api/shutdown?token=letmein", method="POST")
        urllib.request.urlopen(shutdown, timeout=120)
        assert server.wait(120) == 0
    finally:
        server.kill()


def test_progress_is_shown_and_forgotten(tmp_path):
    """On a file of the test's own: what was passed, what is open, and a reset that says what it removes."""
    kept = tmp_path / "progress.json"
    env = {"QTUTOR_PROGRESS": str(kept)}
    done = qtutor("progress", env=env)
    assert re.search(r"^00_start_here +0 of 2 +bits_that_fit, bits_per_byte$", done.stdout, re.M) and not done.stderr
    assert re.search(r"^together +0 of \d\d$", done.stdout, re.M) and str(kept) in done.stdout
    kept.write_text('{"start_here.bits_per_byte": "2026-11-27", "gone.exercise": "2026-11-27"}')
    done = qtutor("progress", env=env)
    assert re.search(r"^00_start_here +1 of 2 +bits_that_fit$", done.stdout, re.M), done.stdout
    assert re.search(r"^together +1 of \d\d$", done.stdout, re.M)
    for _ in range(2):
        done = qtutor("progress", "--reset", env=env)
        assert done.returncode == 0 and str(kept) in done.stdout and not kept.exists()
    kept.write_text("{")
    for file, *argv in ((kept, "progress"), ("", "progress"), (tmp_path, "progress", "--reset")):
        done = qtutor(*argv, env={"QTUTOR_PROGRESS": str(file)})
        assert done.returncode == 1 and done.stderr.startswith("qtutor: ") and done.stderr.count("\n") == 1, done.stderr
