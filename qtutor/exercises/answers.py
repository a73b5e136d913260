"""What the checks share: how an answer is read, and what it is compared with."""

from collections.abc import Callable

import torch

from ..lesson import expect


def number(answer, right: float, otherwise: str, hints: dict | None = None, within: float = 1e-6) -> None:
    """Expect one number within ``within`` of ``right``, else say ``otherwise``; ``hints`` has a sentence a mistake."""
    usable = hasattr(answer, "__float__") and not isinstance(answer, bool)
    expect(usable, f"One number is wanted here, not {type(answer).__name__}.")
    for mistake, hint in (hints or {}).items():
        expect(not abs(answer - mistake) <= within, hint)
    expect(abs(answer - right) <= within, otherwise)


def several(answer, n: int, what: str) -> list:
    """Expect a list (or tuple) of ``n`` things and return it as a list; ``what`` names them: "two shares"."""
    expect(isinstance(answer, (list, tuple)) and len(answer) == n, f"A list of {what} is wanted here.")
    return list(answer)


def function(answer, name: str) -> Callable:
    """Expect a function and return it, guarded: a call that returns None is a wrong answer of its own kind."""
    expect(callable(answer), f"Give the function itself: {name}, without brackets.")

    def guarded(*args, **kwargs):
        result = answer(*args, **kwargs)
        expect(result is not None, "The function returns nothing: is there a return?")
        return result

    return guarded


def tensor(result, shape) -> torch.Tensor:
    """Expect a tensor of ``shape`` and return it; () is one number."""
    fits = isinstance(result, torch.Tensor) and result.shape == tuple(shape)
    expect(fits, f"Return a tensor of shape {tuple(shape)}." if shape else "Return one number, as a tensor.")
    return result


def letters(answer, right: str, hints: dict) -> None:
    """Expect the letters ``right`` and no others, as "AC", "a, c" or ["A", "C"]; ``hints`` has a sentence a letter."""
    expect(isinstance(answer, (str, list, tuple, set)), 'Give the letters as text, such as "AC".')
    given = {letter for part in answer for letter in str(part).upper() if letter.isalpha()}
    expect(given and given <= set(hints), f'Give letters from {min(hints)} to {max(hints)}, such as "AC".')
    for letter in sorted(given ^ set(right)):
        expect(False, hints[letter])
