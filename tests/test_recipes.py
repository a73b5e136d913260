"""Recipe cells are what people copy: each runs alone in a fresh process, from the imports it shows, without qtutor.

One that uses Transformer Engine imports it by its own name; where there is none, the emulation takes its place.
"""

from __future__ import annotations

import os
import subprocess
import sys

import nbformat
import pytest

from tools import notebooks

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
    """Run a recipe in ``folder`` by a process that knows neither this project's folder nor this process's settings."""
    (folder / "recipe.py").write_text(source, "utf-8")
    emulation = "transformer_engine" in source
    script = (EMULATION if emulation else ALONE) + RUN
    env = {key: value for key, value in os.environ.items() if not key.startswith(("QTUTOR", "PYTEST"))}
    env |= {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "-P", "-c", script], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=240)  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("source", list(recipes()))
def test_recipe_runs_alone(source, tmp_path):
    assert "qtutor" not in source
    assert "import " in source, "a recipe shows the imports that it needs"
    done = run(source, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning:" not in done.stderr, done.stderr


def test_every_notebook_has_a_recipe():
    named = {parameter.id.rsplit("-", 1)[0] for parameter in recipes()}
    assert named == set(notebooks.names())


def test_a_recipe_that_leans_on_the_course_fails(tmp_path):
    """The test itself: what is missing outside the notebook is missed here, too."""
    for number, source in enumerate(["import qtutor", "from qtutor import formats", "import os\nprint(model)"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert run(source, folder).returncode != 0, source
    assert run("import math\nprint(math.pi)", tmp_path).stdout == "3.141592653589793\n"


def test_transformer_engine_is_found_by_its_own_name(tmp_path):
    source = "import transformer_engine.pytorch as te\nfrom transformer_engine.common import recipe\nprint(te.Linear)"
    done = run(source, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Linear" in done.stdout
