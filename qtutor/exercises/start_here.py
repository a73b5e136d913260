"""Checks of the exercises: start here."""

import math

from ..lesson import exercise
from .answers import function, number

ROOM = (24564 - 2048) * 2**20 - 16 * 8192 * 131_072  # bytes for weights, beside 2 GiB of buffers and 16 caches


@exercise("start_here.bits_that_fit", solution=8 * ROOM / 8.03e9, wrong=[22.45, 23.52, ROOM / 8.03e9, 8.545, 16, "6.4"])
def _bits_that_fit(answer):
    number(answer, 8 * ROOM / 8.03e9, "Bits for each of 8.03e9 weights, of what 2 GiB and 16 caches leave.", {
        22.45: "That has room for one conversation: 16 are open.", 23.52: "The KV cache needs memory, too.",
        0.80: "That is bytes a weight.", 8.55: "Leave 2 GiB for buffers."}, within=0.02)  # fmt: skip
    return "Q5_K (5.5 bits) fits, Q6_K (6.56 bits) does not."


def _right_bits_per_byte(perplexity, bytes_per_token):
    return math.log2(perplexity) / bytes_per_token


@exercise("start_here.bits_per_byte", solution=_right_bits_per_byte, wrong=[
    lambda p, b: math.log(p) / b,                                           # nats
    lambda p, b: p / b, lambda p, b: _right_bits_per_byte(p, 1) * b, lambda p: p, 1.3])  # fmt: skip
def _bits_per_byte(answer):
    answer = function(answer, "bits_per_byte")
    number(answer(256.0, 1.0), 8, "A perplexity of 256 over single bytes is 8 bits per byte: which logarithm?")
    number(answer(256.0, 4.0), 2, "Eight bits for a token of four bytes are two bits for each byte.")
