"""Recipe cells are what people copy: each runs alone in a fresh process, from the imports it shows, without qtutor.

One that uses Transformer Engine imports it by its own name; where there is none, the emulation takes its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys

import nbformat
import pytest

from qtutor import files
from tools import notebooks

# what a rented machine with a GPU may lack; `make install-test` installs all of it, so that nothing is skipped there
OPTIONAL = ("bitsandbytes", "optimum", "lm_eval", "codecarbon")
ALONE = "import sys; sys.modules['qtutor'] = None  # whoever imports it gets an ImportError\n"
EMULATION = "from qtutor import te_switch; te_switch.activate()\n"
RUN = "import runpy; runpy.run_path('recipe.py', run_name='__main__')\n"


def recipes():
    """One parameter for each recipe cell: its source, and the name of its notebook with its place among the recipes."""
    for name in notebooks.names():
        cells = nbformat.read(notebooks.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
        sources = [cell.source for cell in cells if "recipe" in notebooks.tags(cell)]
        for number, source in enumerate(sources, 1):
            yield pytest.param(source, id=f"{name}-{number}")


def run(source, folder):
    """Run a recipe in ``folder`` by a process that knows neither this project's folder nor this process's settings.

    The emulation needs the project, which may not be installed on a machine with a GPU.
    """
    (folder / "recipe.py").write_text(source, "utf-8")
    emulation = "transformer_engine" in source
    script = (EMULATION if emulation else ALONE) + RUN
    env = {key: value for key, value in os.environ.items() if not key.startswith(("QTUTOR", "PYTEST"))}
    env |= {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    if emulation:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(files.ROOT), env.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-P", "-c", script], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=560)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("source", list(recipes()))
def test_recipe_runs_alone(source, tmp_path):
    assert "qtutor" not in source
    for name in OPTIONAL:
        if re.search(rf"^\s*(?:from|import) {name}\b", source, re.M) and not importlib.util.find_spec(name):
            pytest.skip(f"{name} is not installed")
    done = run(source, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    loud = [line for line in done.stderr.splitlines() if "Warning:" in line]
    if importlib.import_module("torch").cuda.is_available():  # versions of somebody else's choice: their warnings, too
        loud = [line for line in loud if line.startswith("recipe.py")]
    assert not loud, done.stderr


def test_every_notebook_has_a_recipe():
    named = {parameter.id.rsplit("-", 1)[0] for parameter in recipes()}
    assert named == set(notebooks.names())


@pytest.mark.slow
def test_a_recipe_that_leans_on_the_course_fails(tmp_path):
    """The test itself: what is missing outside the notebook is missed here, too."""
    for number, source in enumerate(["import qtutor", "from qtutor import formats", "import os\nprint(model)"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert run(source, folder).returncode != 0, source
    assert run("import math\nprint(math.pi)", tmp_path).stdout == "3.141592653589793\n"


@pytest.mark.slow
def test_transformer_engine_is_found_by_its_own_name(tmp_path):
    source = "import transformer_engine.pytorch as te\nfrom transformer_engine.common import recipe\nprint(te.Linear)"
    done = run(source, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Linear" in done.stdout
