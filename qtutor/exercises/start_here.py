"""Checks of the exercises: start here."""

import math

from ..lesson import exercise
from .answers import function, number


@exercise("start_here.bits_per_weight", solution=4.5, wrong=[4, 20, 4 + 32 / 16, 36, 4.05, "4.5"])
def _bits_per_weight(answer):
    number(answer, 4.5, "32 weights take 32 x 4 bits, and 16 more bits for their scale: divide the sum by 32.")


def _right_bits_per_byte(perplexity, bytes_per_token):
    return math.log2(perplexity) / bytes_per_token


@exercise("start_here.bits_per_byte", solution=_right_bits_per_byte, wrong=[
    lambda p, b: math.log(p) / b,                                           # nats
    lambda p, b: p / b, lambda p, b: _right_bits_per_byte(p, 1) * b, lambda p: p, 1.3])  # fmt: skip
def _bits_per_byte(answer):
    answer = function(answer, "bits_per_byte")
    number(answer(256.0, 1.0), 8, "A perplexity of 256 over single bytes is 8 bits per byte: which logarithm?")
    number(answer(256.0, 4.0), 2, "Eight bits for a token of four bytes are two bits for each byte.")
