"""python -m qtutor.emulation: a script that imports Transformer Engine by its own name runs without it."""

import os
import subprocess
import sys

import pytest


def ran(tmp_path, *arguments):
    (tmp_path / "script.py").write_text(
        "import sys, transformer_engine.pytorch as te\nfrom transformer_engine.common.recipe import DelayedScaling\n"
        "print(te.Linear.__name__, sys.argv[1:], __name__)\n")  # fmt: skip
    return subprocess.run([sys.executable, "-m", "qtutor.emulation", *arguments], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip


@pytest.mark.slow
def test_a_script_gets_the_emulation_and_its_arguments(tmp_path):
    done = ran(tmp_path, str(tmp_path / "script.py"), "--steps", "3")
    assert done.returncode == 0 and done.stdout == "Linear ['--steps', '3'] __main__\n", done.stderr


@pytest.mark.slow
def test_without_a_script_it_says_how_to_call_it(tmp_path):
    done = ran(tmp_path)
    assert done.returncode == 1 and done.stderr == "usage: python -m qtutor.emulation script.py [its arguments]\n"
