"""Each recipe cell by itself, in a fresh process, offline, in an empty folder: what a reader copies must run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from qtutor import notebooks

# Where Transformer Engine cannot run, its emulation takes its place; the recipe itself does not know of it.
PRELUDE = "from qtutor import te; te.activate(); del te\n"
RECIPES = {
    f"{name[:2]}-{number}": cell.source
    for name in notebooks.names()
    for number, cell in enumerate(notebooks._read(notebooks.NOTEBOOKS / f"{name}.ipynb").cells)
    if "recipe" in notebooks.tags(cell)
}


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("which", RECIPES)
def test_recipe_runs_alone(which, tmp_path):
    source = RECIPES[which]
    assert "qtutor" not in source, "a recipe is copied into projects that do not have qtutor"
    assert source.count("\n") < 30, "a recipe is short"
    if re.search(r"^\s*(import|from) transformer_engine", source, re.M):
        source = PRELUDE + source
    script = tmp_path / "recipe.py"
    script.write_text(source, "utf-8")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "HF_HOME": str(tmp_path / "hub"),
           "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    env.setdefault("OMP_NUM_THREADS", "2")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=180)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
