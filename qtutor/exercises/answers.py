"""How answers are read."""

from __future__ import annotations


def letters(answer) -> set:
    """The letters of an answer such as "AC", "a, c" or ["A", "C"], from A to F."""
    assert isinstance(answer, (str, list, tuple, set)), 'Give the letters as text, such as "AC".'
    letters = {letter for part in answer for letter in str(part).upper() if letter.isalpha()}
    assert letters and letters <= set("ABCDEF"), 'Give letters from A to F, such as "AC".'
    return letters
