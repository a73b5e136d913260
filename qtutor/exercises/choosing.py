"""Checks of the exercises: choosing."""

from __future__ import annotations

from ..lesson import exercise
from .answers import letters


def _best_type_solution(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    fitting = {name: gib for name, gib in weights_gib.items() if gib + cache_gib + reserve_gib <= memory_gib}
    return max(fitting, key=fitting.get) if fitting else None


def _weights_alone(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    return _best_type_solution(weights_gib, 0, memory_gib, 0)


def _without_reserve(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    return _best_type_solution(weights_gib, cache_gib, memory_gib, 0)


def _smallest_type(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    return min(weights_gib, key=weights_gib.get)


def _always_one(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    return _best_type_solution(weights_gib, cache_gib, memory_gib, reserve_gib) or min(weights_gib, key=weights_gib.get)


@exercise("choosing.best_type", solution=_best_type_solution,
          wrong=[_weights_alone, _without_reserve, _smallest_type, _always_one, "Q4_K_M"])  # fmt: skip
def _best_type(answer):
    sizes = {"Q4_K_M": 38.4, "Q8_0": 68.3, "Q6_K": 52.7, "Q5_K_M": 45.4}
    cases = [(2.5, 48 * 1e9 / 2**30), (1.25, 79.6), (10.0, 79.6), (20.0, 79.6), (1.0, 48.0), (1.25, 24.0), (45.0, 40.0)]
    for cache, memory in cases:
        right = _best_type_solution(sizes, cache, memory)
        made = answer(dict(sizes), cache, memory)
        why = "weights, cache and reserve have to fit together" if right else "nothing fits: return None"
        assert made == right, f"With {cache} GiB of cache and {memory:.1f} GiB of memory: {right}, not {made}; {why}."
    exact = answer({"A": 10.0}, 1.0, 12.5)
    assert exact == "A", "What fills the memory exactly still fits."
    return "48 GB are 44.7 GiB: for 70B with a cache, Q4_K_M. Q5_K_M has more weights than that card has memory."


def _break_even_solution(training_usd, usd_before, usd_after):
    return training_usd / (usd_before - usd_after) if usd_after < usd_before else float("inf")


def _never_infinite(training_usd, usd_before, usd_after):
    return training_usd / abs(usd_before - usd_after)


def _without_before(training_usd, usd_before, usd_after):
    return training_usd / usd_after


def _divides_by_zero(training_usd, usd_before, usd_after):
    return training_usd / (usd_before - usd_after)


def _zero_for_never(training_usd, usd_before, usd_after):
    return training_usd / (usd_before - usd_after) if usd_after < usd_before else 0.0


@exercise("choosing.break_even", solution=_break_even_solution,
          wrong=[_never_infinite, _without_before, _divides_by_zero, _zero_for_never, 400.0])  # fmt: skip
def _break_even(answer):
    for training, before, after in ((1200.0, 7.0, 4.0), (50.0, 0.9, 0.6), (0.0, 2.0, 1.0)):
        made, right = answer(training, before, after), _break_even_solution(training, before, after)
        assert made is not None, "The function returns nothing: is there a return?"
        assert abs(made - right) < 1e-9 * max(1.0, right), (
            f"Each million tokens saves {before - after:.2f} USD, so {training:.0f} USD take {right:.1f} million; "
            f"yours gives {made:.1f}.")
    for before, after in ((3.0, 3.0), (3.0, 5.4)):
        try:
            made = answer(100.0, before, after)
        except ZeroDivisionError:
            raise AssertionError("Where nothing is saved there is no break-even: return float('inf').") from None
        assert made == float("inf"), "Where inference does not get cheaper the training never pays: float('inf')."
    return "Divide what is paid once by what is saved each time; and look whether anything is saved at all."


@exercise("choosing.evidence", solution="BEF", wrong=["ABCDEF", "B", "E", "F", "BE", "EF", "BF", "BCEF", "ABEF", "CD", ""])
def _evidence(answer):
    given = letters(answer)
    hints = {
        "A": "Does A bring Q5_K_M below the limit, or only make its error smaller?",
        "B": "Q5_K_M is smaller than Q6_K: what did it lack, and does B give it that?",
        "C": "Was Q4_K_M left out because it was slow?",
        "D": "Does the price of the GPU separate the types that are left?",
        "E": "Is Q6_K still allowed after E?",
        "F": "Add up weights and four times the cache.",
    }
    off = sorted(given ^ set("BEF"))
    assert not off, hints[off[0]]
    return ("Evidence changes a decision where it moves something across a limit: B lets a smaller type in, E and F "
            "put the chosen one out. The rest is true, and changes nothing.")  # fmt: skip
