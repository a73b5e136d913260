"""Checks of the exercises: choosing."""

import math

from ..lesson import exercise, expect
from .answers import function, letters, number


def _best_type_solution(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    fitting = {name: gib for name, gib in weights_gib.items() if gib + cache_gib + reserve_gib <= memory_gib}
    return max(fitting, key=fitting.get) if fitting else None


@exercise("choosing.best_type", solution=_best_type_solution, wrong=[
    lambda sizes, cache, memory, reserve=1.5: _best_type_solution(sizes, 0, memory, 0),        # weights alone
    lambda sizes, cache, memory, reserve=1.5: _best_type_solution(sizes, cache, memory, 0),    # no reserve
    lambda sizes, cache, memory, reserve=1.5: min(sizes, key=sizes.get),                       # the smallest
    lambda sizes, cache, memory, reserve=1.5: (                                                # never None
        _best_type_solution(sizes, cache, memory, reserve) or min(sizes, key=sizes.get)), "Q4_K_M"])  # fmt: skip
def _best_type(answer):
    sizes = {"Q4_K_M": 38.4, "Q8_0": 68.3, "Q6_K": 52.7, "Q5_K_M": 45.4}
    cases = [(2.5, 48 * 1e9 / 2**30), (1.25, 79.6), (10.0, 79.6), (20.0, 79.6), (1.0, 48.0), (1.25, 24.0), (45.0, 40.0)]
    for cache, memory in cases:
        right = _best_type_solution(sizes, cache, memory)
        made = answer(dict(sizes), cache, memory)
        why = "weights, cache and reserve have to fit together" if right else "nothing fits: return None"
        expect(made == right, f"With {cache} GiB of cache and {memory:.1f} GiB of memory: {right}, not {made}; {why}.")
    expect(answer({"A": 10.0}, 1.0, 12.5) == "A", "What fills the memory exactly still fits.")
    return "48 GB are 44.7 GiB: for 70B with a cache, Q4_K_M. Q5_K_M has more weights than that card has memory."


def _break_even_solution(training_usd, usd_before, usd_after):
    return training_usd / (usd_before - usd_after) if usd_after < usd_before else math.inf


@exercise("choosing.break_even", solution=_break_even_solution, wrong=[
    lambda training, before, after: training / abs(before - after),                            # never infinite
    lambda training, before, after: training / after,                                          # without before
    lambda training, before, after: training / (before - after),                               # divides by zero
    lambda training, before, after: training / (before - after) if after < before else 0.0,    # zero for never
    400.0])  # fmt: skip
def _break_even(answer):
    answer = function(answer, "break_even")
    for training, before, after in ((1200.0, 7.0, 4.0), (50.0, 0.9, 0.6), (0.0, 2.0, 1.0)):
        right = _break_even_solution(training, before, after)
        number(answer(training, before, after), right, within=1e-9 * max(1.0, right), otherwise=(
            f"Each million tokens saves {before - after:.2f} USD, so {training:.0f} USD take {right:.1f} million."))
    for before, after in ((3.0, 3.0), (3.0, 5.4)):
        try:
            never = answer(100.0, before, after) == math.inf
        except ZeroDivisionError:
            never = False
        expect(never, "Where inference does not get cheaper the training never pays: return float('inf').")
    return "Divide what is paid once by what is saved each time; and look whether anything is saved at all."


@exercise("choosing.evidence", solution="BEF",
          wrong=["ABCDEF", "B", "E", "F", "BE", "EF", "BF", "BCEF", "ABEF", "CD", ""])  # fmt: skip
def _evidence(answer):
    letters(answer, "BEF", {
        "A": "Was Q5_K_M out for its loss? What was missing is something else.",
        "B": "Q5_K_M is smaller than Q6_K: what did it lack, and does B give it that?",
        "C": "Was Q4_K_M left out because it was slow?",
        "D": "Does the price of the GPU separate the types that are left?",
        "E": "Is Q6_K still allowed after E?", "F": "Add up weights and four times the cache."})  # fmt: skip
    return ("Evidence changes a decision where it moves something across a limit: B lets a smaller type in, E and F "
            "put the chosen one out. The rest is true, and changes nothing.")  # fmt: skip
