"""Checks of the exercises: start here."""

from __future__ import annotations

from ..lesson import exercise


@exercise("start_here.bits_per_weight", solution=4.5, wrong=[4, 20, 4 + 32 / 16, 36, 4.05, "4.5"])
def _start_bits_per_weight(answer):
    assert isinstance(answer, (int, float)), "Give a number of bits."
    assert answer == 4.5, "32 weights take 32 x 4 bits, and 16 more bits for their scale: divide the sum by 32."


def _nats_for_bits(perplexity, bytes_per_token):
    import math

    return math.log(perplexity) / bytes_per_token


def _right_bits_per_byte(perplexity, bytes_per_token):
    import math

    return math.log2(perplexity) / bytes_per_token


@exercise(
    "start_here.bits_per_byte",
    solution=_right_bits_per_byte,
    wrong=[_nats_for_bits, lambda p, b: p / b, lambda p, b: _right_bits_per_byte(p, 1) * b, 1.3, lambda p: p],
)
def _start_bits_per_byte(answer):
    assert callable(answer), "Give a function of perplexity and bytes_per_token."
    assert abs(answer(256.0, 1.0) - 8) < 1e-6, (
        "A perplexity of 256 over single bytes is 8 bits per byte: which logarithm gives that?")
    assert abs(answer(256.0, 4.0) - 2) < 1e-6, "Eight bits for a token of four bytes are two bits for each byte."
