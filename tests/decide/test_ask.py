"""``python -m qtutor choose``: it says what decide() says, and what it cannot read is one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qtutor import QtutorError, llamacpp
from qtutor.decide import ask, capacity, cost, hardware
from qtutor.decide.choosing import Need, decide

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


def test_the_command_line_says_what_decide_says(capsys):
    assert ask.main("--memory 79.6GiB --model llama-2-70b --users 8 --tokens-per-s 10 --max-loss 0.5% --prefer money"
                    " --rows 3".split()) == 0  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    device = replace(hardware.device("H100 SXM"), memory_gib=79.6)
    need = Need("Llama-2-70B", device, users=8, tokens_per_s=10, max_loss=0.005, prefer="money")
    assert decide(need).sentence in said
    assert "What would change it" in said and cost.price("H100").date in said


def test_the_command_line_on_a_machine_without_a_gpu(capsys):
    ask.main("--device cpu --memory 8GiB --bandwidth 60 --watts 30 --model llama-3-8b --tokens-per-s 8".split())
    assert "No option is known to meet the requirements" in capsys.readouterr().out


@pytest.mark.parametrize("text, gib", [("80GiB", 80), ("80", 80), ("16GB", 16e9 / 2**30), ("1.5 gib", 1.5)])
def test_memory_is_read(text, gib):
    assert ask.gib(text) == pytest.approx(gib)


@pytest.mark.parametrize("argv", ["--memory 80XB", "--device cpu", "--device abacus", "--model nobody",
                                  "--memory 1.2.3GiB", "--max-loss 0.5", "--bandwidth 60 --model llama-3-8b"])
def test_a_command_that_cannot_be_answered_is_one_sentence(argv):
    with pytest.raises(QtutorError):
        ask.main(argv.split())


def test_the_command_is_one_of_qtutors(capsys):
    from qtutor.__main__ import main

    assert main(["choose", "--model", "nobody"]) == 1
    assert capsys.readouterr().err.startswith("qtutor: There is no model 'nobody'")


def test_shares_and_names():
    assert ask.share("0.5%") == ask.share("0.005") == 0.005
    assert ask.known("llama-2-70B", capacity.MODELS) == "Llama-2-70B" and ask.known("x", ()) == "x"
