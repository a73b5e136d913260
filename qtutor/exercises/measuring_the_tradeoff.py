"""Checks of the exercises: measuring the trade-off."""

from __future__ import annotations

from ..lesson import exercise
from .answers import letters


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
    assert callable(answer), "Give the function itself: on_front, without brackets."
    cases = {
        "a plain case": [(8.0, 0.001), (5.0, 0.05), (6.0, 0.06), (3.0, 0.7)],
        "two techniques of the same size": [(5.0, 0.05), (5.0, 0.04), (3.0, 0.7)],
        "two techniques that are equal": [(5.0, 0.05), (5.0, 0.05), (6.0, 0.05)],
        "a single technique": [(5.0, 0.05)],
    }
    for what, points in cases.items():
        given, right = answer(list(points)), _front_solution(points)
        assert given is not None, "The function returns nothing: is there a return?"
        given = list(given)
        assert len(given) == len(points) and all(str(g) in ("True", "False") for g in given), (
            f"Return one True or False for each point: for {what} you gave {given}.")  # fmt: skip
        for point, mine, other in zip(points, given, right, strict=True):
            assert bool(mine) == other, (
                f"In {what}, {points}, the point {point} {'is' if other else 'is not'} on the front.")  # fmt: skip
    return "At least as good everywhere and better somewhere: ties make the definition, and break most short versions."


def _cost_solution(tokens_per_s, usd_per_hour, busy):
    return 1e6 / (tokens_per_s * busy) / 3600 * usd_per_hour


@exercise("measuring_the_tradeoff.cost", solution=_cost_solution, wrong=[
    lambda tokens_per_s, usd_per_hour, busy: 1e6 / tokens_per_s / 3600 * usd_per_hour,          # idle time is free
    lambda tokens_per_s, usd_per_hour, busy: 1e6 / tokens_per_s / 3600 * usd_per_hour * busy,   # idle time pays back
    lambda tokens_per_s, usd_per_hour, busy: 1e6 / (tokens_per_s * busy) * usd_per_hour,        # seconds as hours
    lambda tokens_per_s, usd_per_hour, busy: 1e3 / (tokens_per_s * busy) / 3600 * usd_per_hour,  # a thousand tokens
    0.5,
])  # fmt: skip
def _cost(answer):
    assert callable(answer), "Give the function itself: usd_per_million, without brackets."
    for case in ((1000.0, 3.6, 1.0), (1000.0, 3.6, 0.25), (37.5, 2.0, 0.5)):
        given, right = answer(*case), _cost_solution(*case)
        assert given is not None, "The function returns nothing: is there a return?"
        speed, price, busy = case
        assert abs(float(given) - right) < 1e-9 * right, (
            f"At {speed:g} tokens a second, {price:g} dollars an hour and {busy:.0%} of the time busy yours says "
            f"{float(given):.4g} dollars: the machine is paid for whether it works or not, and an hour has 3600 s."
        )
    return "An idle GPU is the most expensive format there is."


def _errors_solution(a, b):
    import numpy as np

    n = len(a)
    unpaired = np.sqrt(a.var(ddof=1) / n + b.var(ddof=1) / n)
    return (a - b).std(ddof=1) / np.sqrt(n), unpaired


def _errors_wrong(change):
    def wrong(a, b):
        import numpy as np

        n, paired = len(a), (a - b).std(ddof=1) / np.sqrt(len(a))
        apart = np.sqrt(a.var(ddof=1) / n + b.var(ddof=1) / n)
        return {"swapped": (apart, paired), "added": (paired, a.std(ddof=1) / np.sqrt(n) + b.std(ddof=1) / np.sqrt(n)),
                "spread": ((a - b).std(ddof=1), np.sqrt(a.var(ddof=1) + b.var(ddof=1))),
                "twice": (paired, paired)}[change]  # fmt: skip

    return wrong


@exercise("measuring_the_tradeoff.two_errors", solution=_errors_solution, wrong=[
    _errors_wrong("swapped"), _errors_wrong("added"), _errors_wrong("spread"), _errors_wrong("twice")])
def _two_errors(answer):
    import numpy as np

    assert callable(answer), "Give the function itself: two_errors, without brackets."
    rng = np.random.default_rng(0)
    for n in (50, 400):
        a = rng.exponential(3, n)
        b = a + rng.normal(0.05, 0.2, n)
        made = answer(a, b)
        assert made is not None, "The function returns nothing: is there a return?"
        assert isinstance(made, (tuple, list)) and len(made) == 2, "Return two numbers: the paired error, the unpaired."
        paired, unpaired = (float(value) for value in made)
        right = _errors_solution(a, b)
        assert abs(paired - right[0]) < 1e-6 * right[0], (
            f"The paired error is that of the mean of the differences, {right[0]:.4f} here; yours is {paired:.4f}.")
        assert abs(unpaired - right[1]) < 1e-6 * right[1], (
            f"Errors of independent means add as squares: {right[1]:.4f} here; yours is {unpaired:.4f}.")
    return "Same tokens, same difference, and the error depends on whether you remembered that they were the same."


@exercise("measuring_the_tradeoff.wrong_report", solution="ABDF", wrong=["ABCDEF", "ABDEF", "ABD", "CE", "A", "ABCD", ""])
def _wrong_report(answer):
    given = letters(answer)
    why = {
        "A": "A mixes two conventions: all tokens of a window against its second half.",
        "B": "B reads the clock while the GPU is still working: only the launches are timed.",
        "C": "C is sound: files are compared with files, embedding and scales included.",
        "D": "D multiplies a design limit with time: what was drawn is on the counter, and may be a third of it.",
        "E": "E is sound: the same tokens, against the original model, with an error.",
        "F": "F compares the intervals of two scores on the same questions: a paired test decides that.",
    }
    off = sorted(given ^ set("ABDF"))
    assert not off, f"Look at {off[0]} again. {why[off[0]] if off[0] in 'CE' else 'What was held equal there?'}"
    return " ".join(why[letter] for letter in "ABDF")
