"""Checks of the exercises: FP8 training."""

from __future__ import annotations

from ..lesson import exercise


@exercise("fp8_training.scale", solution=448 / 14 / 2, wrong=[448 / 14, 448 / 3.5 / 2, 57344 / 14 / 2, 14 / 448, "16"])
def _scale(answer):
    assert isinstance(answer, (int, float)), "Give a number."
    assert answer != 448 / 14, "That leaves no margin: margin=1 divides the scale by 2**1."
    assert abs(answer - 57344 / 14 / 2) > 1, "HYBRID is E4M3 in the forward pass, where the input belongs: up to 448."
    assert abs(answer - 448 / 3.5 / 2) > 1, '"max" takes the largest amax of the history, not the last.'
    assert abs(answer - 16) < 1e-6, "scale = (largest value of the format) / (largest amax of the history) / 2**margin."
    return "With it the largest value lands at half of the range: an amax can double before anything saturates."


_WHERE = {"input of a layer": "E4M3", "weight in the product": "E4M3", "gradient of the output": "E5M2",
          "weight that the optimizer updates": "FP32", "RMSNorm": "BF16"}  # fmt: skip


@exercise("fp8_training.which_format", solution=dict(_WHERE), wrong=[
    {**_WHERE, "gradient of the output": "E4M3"}, {**_WHERE, "weight that the optimizer updates": "E4M3"},
    {**_WHERE, "RMSNorm": "E4M3"}, {**_WHERE, "input of a layer": "E5M2"}, "E4M3", {},
])  # fmt: skip
def _which_format(answer):
    assert isinstance(answer, dict) and set(answer) == set(_WHERE), f"Give a dict with the keys {', '.join(_WHERE)}."
    hints = {
        "input of a layer": "The forward pass needs digits more than range.",
        "weight in the product": "Both operands of the forward product have the same format.",
        "gradient of the output": "Gradients spread over many orders of magnitude: they need range more than digits.",
        "weight that the optimizer updates": "An update is often smaller than the step between two 8-bit numbers, and "
                                             "would be rounded away.",
        "RMSNorm": "Only matrix products run in FP8; the rest keeps the dtype of the activations.",
    }  # fmt: skip
    for key, right in _WHERE.items():
        assert str(answer[key]).upper() == right, f"{key}: {hints[key]}"
    return "Three operands in 8 bits, everything that accumulates in more."


def _pad_rows_solution(x):
    import torch

    missing = -x.shape[0] % 16
    return torch.nn.functional.pad(x, (0, 0, 0, missing))


def _pad_columns(x):
    import torch

    return torch.nn.functional.pad(x, (0, -x.shape[0] % 16))


def _pad_always(x):
    import torch

    return torch.nn.functional.pad(x, (0, 0, 0, 16 - x.shape[0] % 16))


@exercise("fp8_training.pad_rows", solution=_pad_rows_solution,
          wrong=[lambda x: x, _pad_columns, _pad_always, lambda x: x[: x.shape[0] // 16 * 16]])
def _pad_rows(answer):
    import torch

    assert callable(answer), "Give the function itself: pad_rows, without brackets."
    for rows in (37, 16, 5, 48, 1):
        x = torch.arange(rows * 32, dtype=torch.float32).reshape(rows, 32) + 1
        got = answer(x.clone())
        assert isinstance(got, torch.Tensor), "The function returns no tensor: is there a return?"
        assert got.shape[-1] == 32, "The features are fine as they are: the rows are what is missing."
        assert got.shape[0] % 16 == 0, f"{rows} rows became {got.shape[0]}: no multiple of 16."
        assert got.shape[0] >= rows, "No row may be lost: add rows, do not cut."
        assert got.shape[0] < rows + 16, f"{rows} rows became {got.shape[0]}: a smaller multiple of 16 is enough."
        assert torch.equal(got[:rows], x), "The first rows must stay what they were."
        assert not got[rows:].any(), "Fill with zeros: they change neither the amax nor the gradient of the weight."
    return "Rows of zeros change neither the amax nor the gradient of the weight; drop their outputs afterwards."


_FP8_COST = (0.005, 0.003, 0.006, 0.004)  # FP8 minus BF16 in the exercise: four seeds, nats per token


@exercise("fp8_training.half_width", solution=3.182446 * 0.0012909944 / 2,
          wrong=[1.959964 * 0.0012909944 / 2, 3.182446 * 0.0012909944, 3.182446 * 0.0011180340 / 2, 0.0045, 0.0337,
                 3.182446 * 0.0012909944, "0.002"])  # fmt: skip
def _half_width(answer):
    import statistics

    assert not isinstance(answer, str) and hasattr(answer, "__float__"), "Give one number, in nats per token."
    answer, t, n = float(answer), 3.182446, len(_FP8_COST)
    sd = statistics.stdev(_FP8_COST)

    def near(value):
        return abs(answer - value) < 0.004 * value

    assert not near(1.959964 * sd / n**0.5), "1.96 is for very many seeds: four need Student's t."
    assert not near(t * sd), "That is without the square root of n: the mean of four is surer than one of them."
    assert not near(t * sd * ((n - 1) / n) ** 0.5 / n**0.5), "The sample's standard deviation divides by n - 1: ddof=1."
    assert not near(statistics.mean(_FP8_COST)), "That is the mean difference; what is its uncertainty?"
    assert answer < 0.01, "Subtract seed by seed before anything else: that is what removes the spread between seeds."
    assert near(t * sd / n**0.5), "t.ppf(0.975, n - 1) x standard deviation of the differences (ddof=1) / sqrt(n)."
    return ("The mean difference, 0.0045, is more than twice that: FP8 costs a little. Without pairing, the spread "
            "between seeds would have hidden it: it is more than ten times that of the differences.")  # fmt: skip
