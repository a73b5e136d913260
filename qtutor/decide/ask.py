"""``python -m qtutor choose``: the decision guide on the command line.

    python -m qtutor choose --memory 80GiB --model llama-2-70b --users 8 --tokens-per-s 10 --max-loss 0.5%
    python -m qtutor choose --device cpu --memory 12GiB --bandwidth 60 --watts 30 --model llama-3-8b

Every field of :class:`choosing.Need` is an option.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from dataclasses import fields, replace

from .. import QtutorError
from . import capacity, hardware, speed
from .choosing import CHOICES, Need, decide

HELP = {"model": "a name (any case), or a folder with a config.json", "max_loss": "perplexity that may be lost: 0.5%",
        "device": "a name in hardware.DEVICES, or cpu", "can_train": "there is a budget for QAT"}  # fmt: skip


def gib(text: str) -> float:
    """GiB of "80GiB", "16GB" (10^9 bytes) or "80" (GiB)."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*(GiB|GB|)", text.strip(), re.I)
    if not found:
        raise QtutorError(f"A memory of {text!r} cannot be read: write it as 80GiB or 16GB.")
    return float(found[1]) * (1e9 / 2**30 if found[2].lower() == "gb" else 1)


def share(text: str) -> float:
    """0.005 of "0.005" or "0.5%"."""
    found = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= found < 0.5:
        raise QtutorError(f"A loss of {text} is {100 * found:g} % of perplexity: write half a percent as 0.5%.")
    return found


def known(name: str, names) -> str:
    """The name among ``names`` that is this one in another case, else itself."""
    return next((one for one in names if one.lower() == name.lower()), name)


def device(name: str, memory: str | None, bandwidth: float | None, watts: float | None) -> hardware.Device:
    """A device of the table with the memory that is given; "cpu": one without a GPU."""
    if name.lower() == "cpu":
        if not (memory and bandwidth):
            raise QtutorError("A machine without a GPU needs --memory (what is free) and --bandwidth (GB/s): two "
                              "channels of DDR5 have about 60 to 90.")  # fmt: skip
        return hardware.Device("CPU", gib(memory), bandwidth, watts)
    if bandwidth or watts:
        raise QtutorError("--bandwidth and --watts describe a machine without a GPU: add --device cpu.")
    found = hardware.device(known(name, hardware.DEVICES))
    return replace(found, memory_gib=gib(memory)) if memory else found


def main(argv: list[str]) -> int:
    """Print the advice, what would change it, every option, and where each number comes from; return 0."""
    parser = argparse.ArgumentParser(prog="qtutor choose", description=main.__doc__)
    for one in fields(Need):
        kind = share if one.name == "max_loss" else float if one.default is None else type(one.default)
        how = {"action": "store_true"} if kind is bool else {"type": kind, "choices": CHOICES.get(one.name)}
        parser.add_argument("--" + one.name.replace("_", "-"), default=one.default, help=HELP.get(one.name), **how)
    parser.add_argument("--memory", help="of the device, such as 80GiB: less than it has, where others use it")
    parser.add_argument("--bandwidth", type=float, help="GB/s of a machine without a GPU")
    parser.add_argument("--watts", type=float, help="of a machine without a GPU, while it writes")
    parser.add_argument("--rows", type=int, default=8, help="options to show")
    given = vars(parser.parse_args(argv))
    machine = device(given["device"], *(given.pop(key) for key in ("memory", "bandwidth", "watts")))
    rows, model = given.pop("rows"), known(given["model"], [*capacity.MODELS, *speed.MIXTURES])
    decision = decide(Need(**given | {"device": machine, "model": model}))
    print(f"{model} on {machine.name}, {machine.memory_gib:.1f} GiB\n")
    print("\n".join(textwrap.wrap(decision.sentence, 110)))
    print("\nWhat would change it:", *(textwrap.fill(f"- {text}", 108, subsequent_indent="    ")
                                       for text in decision.changes()), sep="\n  ")  # fmt: skip
    table = decision.frame().head(rows)
    print(f"\n{table.drop(columns=['why', 'first token, s']).rename_axis(None).to_string()}\n")
    for name, why in table["why"].items():
        print(textwrap.fill(f"{name}: {why}", 110, subsequent_indent="    "))
    print("\nWhere the numbers of the first one come from:")
    for name, row in decision.sources().iterrows():
        print(textwrap.fill(f"  {name:<12} {row.value:<19} {row.source}", 110, subsequent_indent=" " * 35,
                            break_on_hyphens=False))  # fmt: skip
    return 0
