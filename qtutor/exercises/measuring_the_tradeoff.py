"""Checks of the exercises: measuring the trade-off."""

import numpy as np

from ..lesson import exercise, expect
from .answers import function, letters, number, several


def _front_solution(points):
    return [not any(a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1]) for a in points) for b in points]


@exercise("measuring_the_tradeoff.pareto_front", solution=_front_solution, wrong=[
    lambda points: [not any(a[0] < b[0] and a[1] < b[1] for a in points) for b in points],      # strictly on both axes
    lambda points: [not any(a[0] <= b[0] and a[1] <= b[1] for a in points) for b in points],    # beaten by itself
    lambda points: [not any(a != b and (a[0] <= b[0] or a[1] <= b[1]) for a in points) for b in points],  # or for and
    lambda points: [b[1] == min(a[1] for a in points) for b in points],                         # the best on one axis
    lambda points: [p for p, keep in zip(points, _front_solution(points), strict=True) if keep],  # points, not answers
])  # fmt: skip
def _pareto_front(answer):
    answer = function(answer, "on_front")
    cases = {
        "a plain case": [(8.0, 0.001), (5.0, 0.05), (6.0, 0.06), (3.0, 0.7)],
        "two techniques of the same size": [(5.0, 0.05), (5.0, 0.04), (3.0, 0.7)],
        "two techniques that are equal": [(5.0, 0.05), (5.0, 0.05), (6.0, 0.05)],
        "a single technique": [(5.0, 0.05)]}
    for what, points in cases.items():
        given = list(answer(list(points)))
        booleans = len(given) == len(points) and all(str(g) in ("True", "False") for g in given)
        expect(booleans, f"Return one True or False for each point: for {what} you gave {given}.")
        for point, mine, right in zip(points, given, _front_solution(points), strict=True):
            expect(bool(mine) == right,
                   f"In {what}, {points}, the point {point} {'is' if right else 'is not'} on the front.")  # fmt: skip
    return "At least as good everywhere and better somewhere: ties make the definition, and break most short versions."


def _cost_solution(tokens_per_s, usd_per_hour, busy):
    return 1e6 / (tokens_per_s * busy) / 3600 * usd_per_hour


@exercise("measuring_the_tradeoff.cost", solution=_cost_solution, wrong=[
    lambda tokens_per_s, usd_per_hour, busy: 1e6 / tokens_per_s / 3600 * usd_per_hour,          # idle time is free
    lambda tokens_per_s, usd_per_hour, busy: 1e6 / tokens_per_s / 3600 * usd_per_hour * busy,   # idle time pays back
    lambda tokens_per_s, usd_per_hour, busy: 1e6 / (tokens_per_s * busy) * usd_per_hour,        # seconds as hours
    lambda tokens_per_s, usd_per_hour, busy: 1e3 / (tokens_per_s * busy) / 3600 * usd_per_hour,  # a thousand tokens
    0.5])  # fmt: skip
def _cost(answer):
    answer = function(answer, "usd_per_million")
    for speed, price, busy in ((1000.0, 3.6, 1.0), (1000.0, 3.6, 0.25), (37.5, 2.0, 0.5)):
        right = _cost_solution(speed, price, busy)
        number(answer(speed, price, busy), right, within=1e-9 * right, otherwise=(
            f"At {speed:g} tokens a second, {price:g} dollars an hour and {busy:.0%} of the time busy yours is wrong: "
            "the machine is paid for whether it works or not, and an hour has 3600 s."))
    return "An idle GPU costs most per token."


def _paired(a, b):
    return (a - b).std(ddof=1) / np.sqrt(len(a))


def _unpaired(a, b):
    return np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))


@exercise("measuring_the_tradeoff.two_errors", solution=lambda a, b: (_paired(a, b), _unpaired(a, b)), wrong=[
    lambda a, b: (_unpaired(a, b), _paired(a, b)),
    lambda a, b: (_paired(a, b), (a.std(ddof=1) + b.std(ddof=1)) / np.sqrt(len(a))),            # errors added
    lambda a, b: (_paired(a, b) * np.sqrt(len(a)), _unpaired(a, b) * np.sqrt(len(a))),          # of single values
    lambda a, b: (_paired(a, b), _paired(a, b))])  # fmt: skip
def _two_errors(answer):
    answer = function(answer, "two_errors")
    rng = np.random.default_rng(0)
    for n in (50, 400):
        a = rng.exponential(3, n)
        b = a + rng.normal(0.05, 0.2, n)
        mine = several(answer(a, b), 2, "two numbers, the paired error and the unpaired,")
        paired, unpaired = _paired(a, b), _unpaired(a, b)
        number(mine[0], paired, f"The paired error is that of the mean of the differences, {paired:.4f} here.",
               within=1e-6 * paired)  # fmt: skip
        number(mine[1], unpaired, f"Errors of independent means add as squares: {unpaired:.4f} here.",
               within=1e-6 * unpaired)  # fmt: skip
    return "Same tokens, same difference, and the error depends on whether you remembered that they were the same."


@exercise("measuring_the_tradeoff.wrong_report", solution="ABDF",
          wrong=["ABCDEF", "ABDEF", "ABD", "CE", "A", "ABCD", ""])  # fmt: skip
def _wrong_report(answer):
    why = {
        "A": "A mixes two conventions: all tokens of a window against its second half.",
        "B": "B reads the clock while the GPU is still working: only the launches are timed.",
        "C": "C is sound: files are compared with files, embedding and scales included.",
        "D": "D multiplies a design limit with time: what was drawn is on the counter, and may be a third of it.",
        "E": "E is sound: the same tokens, against the original model, with an error.",
        "F": "F compares the intervals of two scores on the same questions: a paired test decides that."}
    hints = why | dict.fromkeys("ABDF", "What was held equal there?")
    letters(answer, "ABDF", {letter: f"Look at {letter} again. {hint}" for letter, hint in hints.items()})
    return " ".join(why[letter] for letter in "ABDF")
