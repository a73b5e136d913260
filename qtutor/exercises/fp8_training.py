"""Checks of the exercises: FP8 training."""

import statistics

import torch
from torch.nn.functional import pad

from ..lesson import exercise, expect
from .answers import function, number, tensor


@exercise("fp8_training.scale", solution=448 / 14 / 2, wrong=[448 / 14, 448 / 3.5 / 2, 57344 / 14 / 2, 14 / 448, "16"])
def _scale(answer):
    number(answer, 16, "scale = (largest value of the format) / (largest amax of the history) / 2**margin.", {
        448 / 14: "That leaves no margin: margin=1 divides the scale by 2**1.",
        57344 / 14 / 2: "HYBRID is E4M3 in the forward pass, where the input belongs: up to 448.",
        448 / 3.5 / 2: '"max" takes the largest amax of the history, not the last.'})
    return "With it the largest value lands at half of the range: an amax can double before anything saturates."


_WHERE = {"input of a layer": "E4M3", "weight in the product": "E4M3", "gradient of the output": "E5M2",
          "weight that the optimizer updates": "FP32", "RMSNorm": "BF16"}  # fmt: skip


@exercise("fp8_training.which_format", solution=dict(_WHERE), wrong=[
    {**_WHERE, "gradient of the output": "E4M3"}, {**_WHERE, "weight that the optimizer updates": "E4M3"},
    {**_WHERE, "RMSNorm": "E4M3"}, {**_WHERE, "input of a layer": "E5M2"}, "E4M3", {}])  # fmt: skip
def _which_format(answer):
    complete = isinstance(answer, dict) and set(answer) == set(_WHERE)
    expect(complete, f"Give a dict with the keys {', '.join(_WHERE)}.")
    hints = {
        "input of a layer": "The forward pass needs digits more than range.",
        "weight in the product": "Both operands of the forward product have the same format.",
        "gradient of the output": "Gradients spread over many orders of magnitude: they need range more than digits.",
        "weight that the optimizer updates": "An update is often smaller than the step between two 8-bit numbers, and "
                                             "would be rounded away.",
        "RMSNorm": "Only matrix products run in FP8; the rest keeps the dtype of the activations."}  # fmt: skip
    for key, right in _WHERE.items():
        expect(str(answer[key]).upper() == right, f"{key}: {hints[key]}")
    return "Three operands in 8 bits, everything that accumulates in more."


@exercise("fp8_training.pad_rows", solution=lambda x: pad(x, (0, 0, 0, -x.shape[0] % 16)), wrong=[
    lambda x: x,
    lambda x: pad(x, (0, -x.shape[0] % 16)),                     # columns
    lambda x: pad(x, (0, 0, 0, 16 - x.shape[0] % 16)),           # 16 more where nothing is missing
    lambda x: x[: x.shape[0] // 16 * 16]])  # fmt: skip
def _pad_rows(answer):
    answer = function(answer, "pad_rows")
    for rows in (37, 16, 5, 48, 1):
        x = torch.arange(rows * 32, dtype=torch.float32).reshape(rows, 32) + 1
        got = answer(x.clone())
        got = tensor(got, (len(got), 32))
        expect(len(got) % 16 == 0, f"{rows} rows became {len(got)}: no multiple of 16.")
        expect(len(got) >= rows, "No row may be lost: add rows, do not cut.")
        expect(len(got) < rows + 16, f"{rows} rows became {len(got)}: a smaller multiple of 16 is enough.")
        expect(torch.equal(got[:rows], x), "The first rows must stay what they were.")
        expect(not got[rows:].any(), "Fill with zeros: they change neither the amax nor the gradient of the weight.")
    return "Rows of zeros change neither the amax nor the gradient of the weight; drop their outputs afterwards."


_FP8_COST = (0.005, 0.003, 0.006, 0.004)  # FP8 minus BF16 in the exercise: four seeds, nats per token
_T, _SD = 3.182446, statistics.stdev(_FP8_COST)


@exercise("fp8_training.half_width", solution=_T * _SD / 2,
          wrong=[1.959964 * _SD / 2, _T * _SD, _T * _SD * 0.75**0.5 / 2, 0.0045, 0.0337, "0.002"])  # fmt: skip
def _half_width(answer):
    unpaired = hasattr(answer, "__float__") and answer >= 0.01
    expect(not unpaired, "Subtract seed by seed before anything else: that removes the spread between seeds.")
    number(answer, _T * _SD / 2, "t.ppf(0.975, n - 1) x standard deviation of the differences (ddof=1) / sqrt(n).", {
        1.959964 * _SD / 2: "1.96 is for very many seeds: four need Student's t.",
        _T * _SD: "That is without the square root of n: the mean of four is surer than one of them.",
        _T * _SD * 0.75**0.5 / 2: "The sample's standard deviation divides by n - 1: ddof=1.",
        statistics.mean(_FP8_COST): "That is the mean difference; what is its uncertainty?"}, within=8e-6)
    return ("The mean difference, 0.0045, is more than twice that: FP8 costs a little. Without pairing, the spread "
            "between seeds would have hidden it: it is more than ten times that of the differences.")  # fmt: skip
