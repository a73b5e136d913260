"""Checks of the exercises: measuring the trade-off."""

from ..lesson import exercise, expect
from .answers import function, letters


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


def _rule(a, b, tolerance, apart=True, matters=True, overlap="undecided"):
    if (a[1] > b[2] or not apart) and a[0] > b[0] * (1 + tolerance * matters):
        return "larger"
    if (b[1] > a[2] or not apart) and b[0] > a[0] * (1 + tolerance * matters):
        return "smaller"
    return "same" if max(a[2], b[2]) <= min(a[1], b[1]) * (1 + tolerance) else overlap


@exercise("measuring_the_tradeoff.difference", solution=_rule, wrong=[
    lambda a, b, tolerance: _rule(a, b, tolerance, apart=False),                # the intervals are ignored
    lambda a, b, tolerance: _rule(a, b, tolerance, matters=False),              # a real but tiny difference counts
    lambda a, b, tolerance: _rule(a, b, tolerance, overlap="same"),             # not shown is taken for shown not
    lambda a, b, tolerance: _rule(a, b, tolerance).replace("same", "undecided"),
    "larger"])  # fmt: skip
def _difference(answer):
    answer = function(answer, "difference")
    for a, b in (((120, 118, 122), (100, 99, 101)), ((100, 99, 101), (120, 118, 122)),
                 ((103, 102, 104), (100, 100, 101)), ((120, 90, 150), (100, 80, 120)),
                 ((104, 104, 112), (100, 98, 102)), ((100, 99, 101), (100, 99, 101))):  # fmt: skip
        given, right = answer(a, b, 0.05), _rule(a, b, 0.05)
        expect(given == right, f"{a} and {b}, tolerance 5 %: you said {given!r}, and it is {right!r}.")
    return "Three ways not to be a difference, and 'undecided' is the one that asks for a better measurement."


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
