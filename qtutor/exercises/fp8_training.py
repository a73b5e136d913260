"""Checks of the exercises: FP8 training."""

import torch

from ..lesson import exercise, expect
from .answers import function, number, tensor


@exercise("fp8_training.first_gradient", solution=5, wrong=[1, 2, 3, 4, 6, 8, "5"])
def _first_gradient(answer):
    number(answer, 5, "Follow the layers from the loss down: which ones see a gradient in this pass, and which have a "
           "scale?", {  # of whose amax
        1: "With a scale of 1, E4M3 rounds what is below 2**-10 to zero: in pass 1 no layer gets a weight gradient.",
        2: "In pass 2 layer 4 has a scale. Layer 3 sees its first gradient only now: its scale is still 1.",
        3: "Three passes did for the course model, whose residual connections pass gradients around the layers.",
        4: "In pass 4 layer 1 sees its first gradient and records the amax. Which scale does it round with?",
        8: "A layer records its amax when the layer above first has a good scale: one layer a pass."})  # fmt: skip
    return "One layer a pass, and one more for layer 1's own scale. E5M2 reaches 128 times lower."


@exercise("fp8_training.break_even_tokens", solution=28672, wrong=[14336, 4096, 8192, 57344, 117440512, "28672"])
def _break_even_tokens(answer):
    number(answer, 28672, "Solve 2 T x inputs = T x inputs + 2 x outputs x inputs for T. The inputs cancel.", {
        14336: "Hopper keeps the codes of the weight twice: by rows and by columns.",
        4096: "The number of inputs cancels: it is in every term.",
        8192: "The number of inputs cancels: it is in every term.",
        57344: "A code takes one byte, a BF16 number two.",
        117440512: "That is the size of the weight's codes in bytes. How many tokens save as much?"})  # fmt: skip
    return "With fewer tokens than twice the outputs FP8 keeps more than BF16. It saves where a step has many tokens."


def _fuse(query, key, value, groups, order=(0, 1, 2)):
    """The solution of fp8_training.fuse_qkv; another order makes a mistake."""
    parts = [weight.unflatten(0, (groups, -1)) for weight in (query, key, value)]
    return torch.cat([parts[i] for i in order], 1).flatten(0, 1)


@exercise("fp8_training.fuse_qkv", solution=_fuse, wrong=[
    lambda q, k, v, groups: torch.cat([q, k, v]), lambda q, k, v, groups: _fuse(q, k, v, groups, (1, 2, 0)),
    lambda q, k, v, groups: _fuse(q, k, v, 1), lambda q, k, v, groups: _fuse(q, k, v, len(k)),
    lambda q, k, v, groups: torch.cat([w.unflatten(0, (-1, groups)) for w in (q, k, v)]).flatten(0, 1),
    lambda q, k, v, groups: torch.cat([q, k, v], 1)])  # fmt: skip
def _fuse_qkv(answer):
    answer = function(answer, "fuse_qkv")
    for heads, groups, size in ((6, 2, 4), (4, 1, 2), (4, 4, 2)):
        rows = (heads * size, groups * size, groups * size)  # each row holds its own number; keys from 1000
        weights = [torch.arange(n).float()[:, None] + 1000 * i + torch.zeros(n, 3) for i, n in enumerate(rows)]
        want, case = _fuse(*weights, groups), f"{heads} query heads, {groups} groups, heads of {size} rows"
        got = tensor(answer(*(weight.clone() for weight in weights), groups), want.shape)
        for row in (got != want).any(1).nonzero().flatten().tolist():
            of, number_there = divmod(int(want[row, 0]), 1000)
            expect(False, f"{case}: row {row} must be row {number_there} of the {('query', 'key', 'value')[of]}.")
    return "Right. One group cannot tell this from torch.cat: test such a map with two groups, and compare the logits."
