"""The checks behind the exercises of the notebooks.

Each check looks at the reader's answer and raises AssertionError with one sentence that helps on when it is wrong;
when it is right it returns None or a sentence of praise (see :mod:`qtutor.lesson`).  The solution and typical wrong
answers are registered with it: the tests try them all.
"""

from __future__ import annotations

from ..lesson import exercise


def _letters(answer) -> set:
    """The letters of an answer such as "AC", "a, c" or ["A", "C"], from A to F."""
    assert isinstance(answer, (str, list, tuple, set)), 'Give the letters as text, such as "AC".'
    letters = {letter for part in answer for letter in str(part).upper() if letter.isalpha()}
    assert letters and letters <= set("ABCDEF"), 'Give letters from A to F, such as "AC".'
    return letters

# ------------------------------------------------------------- notebook 05: fake quantization


@exercise("05.ste_gradient", solution=[0, 1, 1, 1, 0],
          wrong=[[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1], 3])  # fmt: skip
def _ste_gradient(answer):
    assert isinstance(answer, (list, tuple)) and len(answer) == 5, "Give a list of five numbers, one for each input."
    for i, (code, right) in enumerate(zip([-3, -1, 1, 1, 2], [0, 1, 1, 1, 0], strict=True)):
        assert answer[i] == right, (
            f"Look at input {i} again: divided by the scale and rounded it is {code}; "
            "is there such a code among -2, -1, 0, 1?")  # fmt: skip
    return "The first and the last round to codes that do not exist: clipped, no gradient."


def _smallest_scale_solution(x, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return max(x.max().item() / high, x.min().item() / low)


@exercise("05.smallest_scale", solution=_smallest_scale_solution, wrong=[
    lambda x, bits: x.abs().max().item() / (2 ** (bits - 1) - 1),      # ignores the extra negative code
    lambda x, bits: x.abs().max().item() / (2 ** (bits - 1) - 0.5),    # clips the largest positive value
    lambda x, bits: x.abs().max().item() / 2 ** (bits - 1),
    lambda x, bits: x / 2 ** (bits - 1) if bits < 0 else None,         # forgets to return
])  # fmt: skip
def _smallest_scale(answer):
    import torch

    assert callable(answer), "Give the function itself: smallest_scale, without brackets."
    for bits in (2, 4, 8):
        for x in (torch.tensor([-1.0, 0.2, 0.9]), torch.tensor([-0.3, 0.1, 2.0]), torch.tensor([-5.0, 0.0, 0.1])):
            given, expected = answer(x.clone(), bits), _smallest_scale_solution(x, bits)
            assert given is not None, "The function returns nothing: is there a return?"
            shown = [round(v, 2) for v in x.tolist()]
            assert float(given) > expected * (1 - 1e-5), (
                f"With scale {float(given):.4f} a value of {shown} lies beyond the int{bits} grid.")  # fmt: skip
            assert float(given) < expected * (1 + 1e-5), (
                f"For {shown} at int{bits} a smaller scale than {float(given):.4f} still fits: "
                "the negative end has one code more than the positive end.")  # fmt: skip
    return "Each end asks for its own scale, and the larger one serves both."


def _ternary_solution(w):
    scale = w.abs().mean()
    y = (w / scale).round().clamp(-1, 1) * scale
    return w + (y - w).detach()


def _ternary_without_ste(w):
    scale = w.abs().mean()
    return (w / scale).round().clamp(-1, 1) * scale


@exercise("05.ternary", solution=_ternary_solution, wrong=[
    _ternary_without_ste, lambda w: w, lambda w: w.sign(),
    lambda w: w + (w.sign() * w.abs().max() - w).detach(),             # the scale of the largest weight
])  # fmt: skip
def _ternary(answer):
    import torch

    assert callable(answer), "Give the function itself: ternary, without brackets."
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = answer(w)
    assert isinstance(y, torch.Tensor) and y.shape == w.shape, "Return a tensor of the shape of w."
    assert torch.allclose(y, _ternary_solution(w.detach()), atol=1e-6), (
        f"The values differ: yours has {len(y.detach().unique())} different ones, "
        "it should have -1, 0 and +1 times the mean of |w|.")  # fmt: skip
    assert y.requires_grad, "No gradient can flow back: let w itself take part in what you return."
    y.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w)), (
        "The values are right, but the gradient must be 1 for each weight: detach everything but w.")  # fmt: skip
    return "Values from the grid, gradient straight through."


def _learned_scale_solution(w, scale, low, high):
    q = (w / scale).clamp(low, high)
    q = q + (q.round() - q).detach()
    return q * scale


def _straight_around_all(w, scale, low, high):
    y = (w / scale).round().clamp(low, high) * scale
    return w + (y - w).detach()


def _code_without_gradient(w, scale, low, high):
    return (w / scale).round().clamp(low, high).detach() * scale


def _rounding_unclipped(w, scale, low, high):
    q = w / scale
    return (q + (q.round() - q).detach()) * scale


def _straight_around_clamp(w, scale, low, high):
    q = w / scale
    return (q + (q.round().clamp(low, high) - q).detach()) * scale


@exercise("05.learned_scale", solution=_learned_scale_solution, wrong=[
    _straight_around_all, _code_without_gradient, _rounding_unclipped, _straight_around_clamp,
    lambda w, scale, low, high: (w / scale).round().clamp(low, high) * scale,      # no gradient for w
    lambda w, scale, low, high: w * scale,
])  # fmt: skip
def _learned_scale(answer):
    import torch

    assert callable(answer), "Give the function itself: lsq_quantize, without brackets."
    w = torch.tensor([-1.9, -0.66, -0.2, 0.1, 0.38, 0.9, 1.7]).requires_grad_()  # none just beyond an end
    scale = torch.tensor(0.5, requires_grad=True)
    y = answer(w, scale, -2, 1)
    q = (w.detach() / 0.5).round().clamp(-2, 1)
    assert isinstance(y, torch.Tensor) and y.shape == w.shape, "Return a tensor of the shape of w."
    assert torch.allclose(y.detach(), 0.5 * q, atol=1e-6), "The values are not on the grid: round, clamp, times scale."
    assert y.requires_grad, "No gradient can flow back: detach the rounding error, and nothing else."
    inside = torch.tensor([0.0, 1, 1, 1, 1, 0, 0])
    for_w, for_scale = torch.autograd.grad(y.sum(), (w, scale), allow_unused=True)
    assert for_scale is not None, "The scale gets no gradient: only the rounding goes into detach(), not the scale."
    assert for_w is not None and for_w.any(), "The weights get no gradient: go around the rounding with detach()."
    assert torch.allclose(for_w, inside), (
        "The gradient of w must be 1 inside the grid and 0 where it clips: clamp before the rounding.")  # fmt: skip
    expected = torch.where(inside > 0, q - w.detach() / 0.5, q).sum()
    assert torch.allclose(for_scale, expected, atol=1e-5), (
        f"The gradient of the scale is {for_scale.item():.2f}, it should be {expected.item():.2f}: "
        "round(w / scale) - w / scale inside, the last code where clipped.")  # fmt: skip
    return "One detach, around the rounding alone, and autograd derives LSQ."


# ------------------------------------------------------------- notebook 08: quantization after training, llama.cpp


@exercise("08.bits_q6_k", solution=8 * (128 + 64 + 16 + 2) / 256, wrong=[6, 6.5, 6.625, 210, 8 * 210, 0.82, "6.5625"])
def _bits_q6_k(answer):
    assert isinstance(answer, (int, float)), "Give a number of bits."
    assert answer not in (210, 8 * 210), "That is the whole super-block: it serves 256 weights."
    assert answer != 6, "The codes alone are 6 bits; the scales are stored, too."
    assert abs(answer - 6.5625) < 1e-3, "Add 4-bit parts, 2-bit parts, 16 scales of 8 bits, 16 bits; divide by 256."
    return "210 bytes for 256 weights: half a bit goes to the scales, a sixteenth to the float16."


def _dequantize_q8_0_solution(blocks):
    d = blocks[:, :2].copy().view("float16").astype("float32")
    return d * blocks[:, 2:].view("int8").astype("float32")


def _unsigned_q8_0(blocks):
    d = blocks[:, :2].copy().view("float16").astype("float32")
    return d * blocks[:, 2:].astype("float32")


@exercise("08.dequantize_q8_0", solution=_dequantize_q8_0_solution, wrong=[
    _unsigned_q8_0,
    lambda blocks: blocks[:, 2:].view("int8").astype("float32"),                           # no scale
    lambda blocks: _dequantize_q8_0_solution(blocks).ravel(),                              # no blocks
    lambda blocks: blocks[:, 32:].copy().view("float16").astype("float32") * blocks[:, :32].view("int8"),
    lambda blocks: blocks,
])  # fmt: skip
def _dequantize_q8_0(answer):
    import gguf
    import numpy as np

    assert callable(answer), "Give the function itself: dequantize_q8_0, without brackets."
    weights = np.random.default_rng(8).standard_normal((6, 32), dtype=np.float32)
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    given = answer(blocks.copy())
    assert isinstance(given, np.ndarray) and given.shape == (6, 32), "Return an array of shape (blocks, 32)."
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    assert not np.allclose(given, _unsigned_q8_0(blocks)), "The codes are signed: bytes above 127 are negative."
    share = np.isclose(given, expected, rtol=1e-3, atol=1e-6).mean()
    assert share == 1, f"{share:.0%} of the weights are right: which bytes are the scale, and is it multiplied in?"
    return "The same as gguf's own dequantizer."


def _paired_ratio_solution(nll, base_nll):
    import numpy as np

    difference = nll - base_nll
    ratio = np.exp(difference.mean())
    return ratio, ratio * difference.std(ddof=1) / np.sqrt(len(difference))


def _unpaired_ratio(nll, base_nll):
    import numpy as np

    ratio = np.exp(nll.mean() - base_nll.mean())
    return ratio, ratio * np.sqrt((nll.var(ddof=1) + base_nll.var(ddof=1)) / len(nll))


@exercise("08.paired_ratio", solution=_paired_ratio_solution, wrong=[
    _unpaired_ratio,
    lambda nll, base_nll: (nll.mean() / base_nll.mean(), 0.01),                                   # not perplexities
    lambda nll, base_nll: (_paired_ratio_solution(nll, base_nll)[0], (nll - base_nll).std()),     # no sqrt(n)
    lambda nll, base_nll: _paired_ratio_solution(base_nll, nll),                                  # upside down
    lambda nll, base_nll: _paired_ratio_solution(nll, base_nll)[0],
])  # fmt: skip
def _paired_ratio(answer):
    import numpy as np

    assert callable(answer), "Give the function itself: ratio_with_error, without brackets."
    rng = np.random.default_rng(8)
    base_nll = rng.gamma(1.0, 2.0, 500)
    nll = base_nll + 0.1 + 0.5 * rng.standard_normal(500)
    given = answer(nll.copy(), base_nll.copy())
    assert isinstance(given, tuple) and len(given) == 2, "Return two numbers: the ratio and its standard error."
    ratio, error = _paired_ratio_solution(nll, base_nll)
    assert abs(given[0] - ratio) < 1e-6, "The ratio of the perplexities exp(mean nll) is exp of the mean difference."
    assert abs(given[1] - _unpaired_ratio(nll, base_nll)[1]) > 1e-6, "That is the unpaired error: subtract first."
    assert abs(given[1] / error - 1) < 0.01, "se of the mean difference is std / sqrt(n); times the ratio."
    return f"Paired ± {error:.3f}; unpaired it would have been ± {_unpaired_ratio(nll, base_nll)[1]:.3f}."


def _more_bits_solution(layers=32):
    return sum(i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2 for i in range(layers))


@exercise("08.more_bits", solution=_more_bits_solution(), wrong=[8, 10, 32, 4, 18, 0.5, "16", _more_bits_solution(8)])
def _more_bits(answer):
    assert isinstance(answer, int) and not isinstance(answer, bool), "Give a whole number of layers."
    assert answer != 8, "Those are the first and the last eighth; every third layer between them counts as well."
    assert answer != 10, "Every third of all layers: the first and the last eighth get more bits without a gap."
    assert answer == _more_bits_solution(), "Count the layers i for which use_more_bits(i, 32) is true."
    return "Half of the layers: 0 to 3, then 6, 9, ... 27, then 28 to 31."


# ------------------------------------------------------------- notebook 00: start here


@exercise("00.bits_per_weight", solution=4.5, wrong=[4, 20, 4 + 32 / 16, 36, 4.05, "4.5"])
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
    "00.bits_per_byte",
    solution=_right_bits_per_byte,
    wrong=[_nats_for_bits, lambda p, b: p / b, lambda p, b: _right_bits_per_byte(p, 1) * b, 1.3, lambda p: p],
)
def _start_bits_per_byte(answer):
    assert callable(answer), "Give a function of perplexity and bytes_per_token."
    assert abs(answer(256.0, 1.0) - 8) < 1e-6, (
        "A perplexity of 256 over single bytes is 8 bits per byte: which logarithm gives that?")
    assert abs(answer(256.0, 4.0) - 2) < 1e-6, "Eight bits for a token of four bytes are two bits for each byte."


# ------------------------------------------------------------- notebook 02: FP8 training


@exercise("02.scale", solution=448 / 14 / 2, wrong=[448 / 14, 448 / 3.5 / 2, 57344 / 14 / 2, 14 / 448, "16"])
def _scale(answer):
    assert isinstance(answer, (int, float)), "Give a number."
    assert answer != 448 / 14, "That leaves no margin: margin=1 divides the scale by 2**1."
    assert abs(answer - 57344 / 14 / 2) > 1, "HYBRID is E4M3 in the forward pass, where the input belongs: up to 448."
    assert abs(answer - 448 / 3.5 / 2) > 1, '"max" takes the largest amax of the history, not the last.'
    assert abs(answer - 16) < 1e-6, "scale = (largest value of the format) / (largest amax of the history) / 2**margin."
    return "With it the largest value lands at half of the range: an amax can double before anything saturates."


_WHERE = {"input of a layer": "E4M3", "weight in the product": "E4M3", "gradient of the output": "E5M2",
          "weight that the optimizer updates": "FP32", "RMSNorm": "BF16"}  # fmt: skip


@exercise("02.which_format", solution=dict(_WHERE), wrong=[
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


@exercise("02.pad_rows", solution=_pad_rows_solution,
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


@exercise("02.half_width", solution=3.182446 * 0.0012909944 / 2,
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


# ------------------------------------------------------------- notebook 01: number formats


@exercise("01.largest", solution=28.0, wrong=[16, 31, 32, 14, 24, "28"])
def _largest(answer):
    assert isinstance(answer, (int, float)), "Give a number."
    assert answer != 14, "The top exponent field is an ordinary one here: nothing is kept for infinity."
    assert answer == 28, "Largest exponent: field 7 minus the bias 3. Largest mantissa: 1 + 1/2 + 1/4."
    return "1.75 * 2**4: that is the FP6 format E3M2."


@exercise("01.group_cost", solution=4 + 16 / 64, wrong=[4, 20, 4.5, 64, 4 + 64 / 16, "4.25"])
def _group_cost(answer):
    assert isinstance(answer, (int, float)), "Give a number."
    assert abs(answer - 4.25) < 1e-9, "The 16 bits of a scale are shared by 64 weights; add their share to the 4 bits."
    return "A quarter of a bit for the scale."


def _int_round_solution(x, bits):
    top = 2 ** (bits - 1) - 1
    scale = x.abs().max() / top
    return (x / scale).round().clamp(-top - 1, top) * scale


@exercise("01.int_round", solution=_int_round_solution, wrong=[
    lambda x, bits: x, lambda x, bits: x.round(), lambda x, bits: (x / x.abs().max()).round() * x.abs().max(),
    lambda x, bits: (x / (x.abs().max() / (2 ** (bits - 1) - 1))).round(),
])  # fmt: skip
def _int_round(answer):
    import torch

    assert callable(answer), "Give the function itself, without brackets."
    for bits in (3, 4, 8):
        x = torch.randn(200, generator=torch.Generator().manual_seed(bits))
        got = answer(x.clone(), bits)
        assert isinstance(got, torch.Tensor) and got.shape == x.shape, "Return a tensor of the shape of x."
        assert len(got.unique()) <= 2**bits, f"{bits} bits have {2**bits} codes; your result has more values."
        assert torch.allclose(got, _int_round_solution(x, bits), atol=1e-5), (
            "Divide by scale = amax / (2**(bits-1) - 1), round, and multiply by the scale again.")  # fmt: skip
    return "Divide, round, multiply: that is symmetric quantization."


# ------------------------------------------------------------- notebook 03: FP8 scaling


def _next_scale_solution(history, scale, margin=0):
    import math

    amax = max(history)
    if amax == 0 or not math.isfinite(amax):
        return scale
    return 448 / amax / 2**margin


@exercise("03.next_scale", solution=_next_scale_solution, wrong=[
    lambda history, scale, margin=0: 448 / max(history) / 2**margin,                        # divides by zero
    lambda history, scale, margin=0: 448 / history[-1] / 2**margin if history[-1] else scale,  # most_recent
    lambda history, scale, margin=0: _next_scale_solution(history, scale, 0),                # no margin
    lambda history, scale, margin=0: _next_scale_solution(history, scale, -margin),          # the wrong way round
    lambda history, scale, margin=0: max(history) / 448 * 2**margin if max(history) else scale,  # the reciprocal
    lambda history, scale, margin=0: 448 / max(max(history), 1e-12) / 2**margin,             # a huge scale for zeros
])  # fmt: skip
def _next_scale(answer):
    import math

    assert callable(answer), "Give the function itself: next_scale, without brackets."
    given = answer([2.0, 8.0, 4.0], 7.0)
    assert given is not None, "The function returns nothing: is there a return?"
    assert abs(given - 8 / 448) > 1e-9, "That is the reciprocal: the scale takes amax up to 448."
    assert abs(given - 112) > 1e-6, '"max" takes the largest amax of the history, not the last.'
    assert abs(given - 56) < 1e-6, "For the history [2, 8, 4] the scale is 448 / 8 = 56."
    assert abs(answer([2.0, 8.0, 4.0], 7.0, 1) - 28) < 1e-6, "margin=1 leaves room for a doubling: half the scale."
    assert answer([0.0, 0.0], 7.0) == 7.0, "A history of zeros says nothing about the tensor: keep the old scale."
    assert answer([1.0, math.inf], 7.0) == 7.0, "An infinite amax would give a scale of 0: keep the old one."
    return "That is the library's rule, the two guards included."


@exercise("03.shadow", solution=117, wrong=[116, 101, 115, 118, 16, "117"])
def _shadow(answer):
    assert isinstance(answer, (int, float)), "Give the number of a step."
    assert answer != 101, "Step 101 is the first one whose scale knows the outlier: that is where the shadow begins."
    assert answer != 16, "That is how many steps the shadow lasts; the question is which step comes after it."
    assert answer not in (115, 116), "Step 116's scale was made at the end of step 115, from steps 100 to 115."
    assert answer == 117, "The scale of step t + 1 comes from the amaxes of the 16 steps t - 15 to t."
    return "Sixteen steps in the shadow, 101 to 116. With the default history it would have been 1024."


@exercise("03.mx_scale", solution=2.0**-5, wrong=[2.0**-6, 2.0**5, 7.5 / 448, 448 / 7.5, 2.0**-4, "2**-5"])
def _mx_scale(answer):
    import math

    assert isinstance(answer, (int, float)), "Give a number."
    assert answer > 0, "A scale is positive."
    assert answer < 1, "Codes go up to 448 and the block only to 7.5: the scale that multiplies the codes is below 1."
    assert abs(2.0 ** round(math.log2(answer)) - answer) < 1e-12, "An E8M0 scale is a power of two."
    assert answer != 2.0**-6, "7.5 / 2**-6 is 480, and E4M3 ends at 448."
    assert answer == 2.0**-5, "With half that scale everything still fits, and more of the range is used."
    return "7.5 becomes the code 240. Rounding the scale up costs up to half of the range and saturates nothing."


def _stochastic_round_solution(x):
    import torch

    return torch.floor(x + torch.rand_like(x))


def _nearest(x):
    return x.round()


def _coin(x):
    import torch

    return torch.floor(x) + (torch.rand_like(x) < 0.5)


def _upside_down(x):
    import torch

    return torch.floor(x) + (torch.rand_like(x) > x - torch.floor(x))


def _toward_zero(x):
    import torch

    return torch.trunc(x + torch.rand_like(x))


def _not_whole(x):
    import torch

    return x + torch.rand_like(x) - 0.5


@exercise("03.stochastic_round", solution=_stochastic_round_solution,
          wrong=[_nearest, _coin, _upside_down, _toward_zero, _not_whole, lambda x: x])  # fmt: skip
def _stochastic_round(answer):
    import torch

    assert callable(answer), "Give the function itself: stochastic_round, without brackets."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for value in (2.3, -1.75, 0.1):
            got = answer(torch.full((20_000,), value))
            assert isinstance(got, torch.Tensor) and got.shape == (20_000,), "Return a tensor of the shape of x."
            assert torch.equal(got, got.round()), "The results must be whole numbers."
            low = torch.tensor(value).floor().item()
            assert set(got.unique().tolist()) <= {low, low + 1}, (
                f"{value} lies between {low:.0f} and {low + 1:.0f}: only these two may come out.")  # fmt: skip
            assert len(got.unique()) == 2, f"{value} always becomes {got[0].item():.0f}: sometimes it should go up."
            mean = got.float().mean().item()
            assert abs(mean - value) < 0.02, f"The mean of 20,000 roundings of {value} is {mean:.3f}."
        whole = torch.tensor([-2.0, 0.0, 3.0])
        assert torch.equal(answer(whole.clone()), whole), "A whole number must stay what it is."
    return "Wrong in each case and right on average: that is what gradients need."


# ------------------------------------------------------------- notebook 04: FP8 speed and memory


def _share(sequence: int, hidden: int = 4096, intermediate: int = 14336, kv: int = 1024) -> float:
    weights = hidden * (2 * hidden + 2 * kv + 3 * intermediate)
    return sequence * hidden / (sequence * hidden + weights)


@exercise("04.attention_share", solution=_share(8192),
          wrong=[_share(16384), _share(8192, kv=4096), _share(8192) / (1 - _share(8192)), "13 %", 13.3])  # fmt: skip
def _attention_share(answer):
    assert isinstance(answer, (int, float)), "Give a number between 0 and 1."
    assert 0 < answer < 1, "A share lies between 0 and 1."
    right = _share(8192)
    assert abs(answer - _share(16384)) > 1e-3, (
        "Without the mask, or with both sequences as one: causal attention computes half of the scores of 8192 tokens.")
    assert abs(answer - _share(8192, kv=4096)) > 1e-3, "Keys and values have 8 heads of 128, not 32: 1024 outputs each."
    assert abs(answer - right / (1 - right)) > 1e-3, "That is attention over the matrices; the layer is both together."
    assert abs(answer - right) < 1e-3, "6 * tokens * sequence * hidden, over that plus 6 * tokens * weights."
    return f"{right:.1%}: long sequences move work to where FP8 does not help."


def _amdahl_solution(share, faster, overhead):
    return 1 / (1 - share + share / faster + overhead)


@exercise("04.amdahl", solution=_amdahl_solution, wrong=[
    lambda share, faster, overhead: 1 / (1 - share + share / faster),                  # no overhead
    lambda share, faster, overhead: 1 - share + share / faster + overhead,             # the time, not the speedup
    lambda share, faster, overhead: 1 / (1 - share + share / faster - overhead),       # overhead as a gain
    lambda share, faster, overhead: 1 / (share + (1 - share) / faster + overhead),     # the shares exchanged
    lambda share, faster, overhead: share * faster + (1 - share) - overhead,           # averages the rates
    lambda share, faster, overhead: 1 / (1 - share + (share + overhead) / faster),     # overhead made faster, too
])  # fmt: skip
def _amdahl(answer):
    assert callable(answer), "Give the function itself: fp8_speedup, without brackets."
    assert answer(0.8, 2, 0.1) is not None, "The function returns nothing: is there a return?"
    assert abs(answer(0.0, 2, 0.0) - 1) < 1e-9, "Without matrix products and without overhead nothing changes: 1."
    assert abs(answer(1.0, 2, 0.0) - 2) < 1e-9, "If all is matrix products, twice as fast, the step is twice as fast."
    assert abs(answer(0.8, 2, 0.0) - 1 / 0.6) < 1e-9, "Add up times, not rates: 0.2 stays, 0.8 becomes 0.4."
    assert answer(0.8, 2, 0.1) < answer(0.8, 2, 0.0), "Overhead makes the step longer."
    assert abs(answer(0.8, 2, 0.1) - 1 / 0.7) < 1e-9, "0.2 stays, 0.8 becomes 0.4, and 0.1 comes on top: 0.7."
    assert answer(0.1, 2, 0.1) < 1, "With a tenth in products and a tenth of overhead FP8 must come out slower."
    return "The same three numbers, read off a profile, tell you beforehand what FP8 can give."


def _training_gib(*bytes_per_parameter):
    return [8e9 * b / 2**30 for b in bytes_per_parameter]


@exercise("04.training_gib", solution=_training_gib(16, 18, 16), wrong=[
    _training_gib(16, 8, 8), _training_gib(16, 17, 15), _training_gib(16, 18, 14), [128, 144, 128],
    _training_gib(4, 6, 4), _training_gib(2, 4, 2), 119.2, _training_gib(16, 18)])  # fmt: skip
def _training(answer):
    assert isinstance(answer, (list, tuple)) and len(answer) == 3, "Give a list of three numbers, in GiB."
    bf16, both, fp8 = answer
    assert abs(bf16 - 128) > 0.5, "That is in GB, of 10^9 bytes: a GiB has 2^30."
    assert abs(bf16 - _training_gib(16)[0]) < 0.5, (
        "(a) Weight 2, gradient 2, FP32 master weight 4, two moments of 4: 16 bytes for each of 8e9 parameters.")
    assert abs(both - _training_gib(17)[0]) > 0.5, "(b) There are two FP8 copies: by rows, and transposed."
    assert abs(both - _training_gib(18)[0]) < 0.5, "(b) Everything of (a) stays; two copies of one byte come on top."
    assert abs(fp8 - _training_gib(16)[0]) < 0.5, (
        "(c) The BF16 weight goes; two FP8 copies of one byte, gradient, master weight and moments stay.")
    return "FP8 weights are no larger than BF16 ones, and no smaller: they are stored twice, a byte each."


@exercise("04.slower", solution="c", wrong=["a", "b", "d", 1, "larger batches"])
def _slower(answer):
    answer = str(answer).strip().lower()
    assert answer in ("a", "b", "c", "d"), 'Answer "a", "b", "c" or "d".'
    assert answer != "a", "Block scaling adds passes: it is the dearest recipe, and this layer waits for launches."
    assert answer != "b", "Memory is half empty; and the time goes into launches, not into quantizing weights."
    assert answer != "d", "INT4 weights are unpacked to BF16 for the product: they train and compute nothing faster."
    return "The same tokens in fewer launches. Where memory is full, a CUDA graph is the next choice."


# ------------------------------------------------------------- notebook 06: QAT of a language model


@exercise("06.recovered", solution=[0.75, 2 / 3], wrong=[
    [0.25, 1 / 3], [2 / 3, 0.75], [75, 66.7], [0.75, 0.75], [0.75, 0.5], [1.0, 2 / 3], 0.75, "75 %"])  # fmt: skip
def _recovered(answer):
    assert isinstance(answer, (list, tuple)) and len(answer) == 2, "Give a list of two shares."
    assert all(isinstance(share, (int, float)) for share in answer), "Give numbers."
    assert all(share <= 1 for share in answer), "Give shares, 1 being all, and not percent."
    ptq, control = answer
    assert abs(ptq - 0.25) > 1e-3, "That is what is still lost; the question is what came back."
    assert abs(ptq - 0.75) < 0.01, "Against PTQ: 24 - 20 was lost and 24 - 21 came back."
    assert abs(control - 0.75) > 1e-3, "Of the control's loss, 23 - 20, not of PTQ's."
    assert abs(control - 2 / 3) < 0.01, "Against the control: 23 - 20 is still lost there, and QAT has 23 - 21 of it."
    return "A quarter of what PTQ lost came back by ordinary training alone: the control deserves the credit for it."


def _distillation_solution(student, teacher):
    import torch.nn.functional as F

    wanted = teacher.detach().log_softmax(-1).flatten(0, 1)
    return F.kl_div(student.log_softmax(-1).flatten(0, 1), wanted, log_target=True, reduction="batchmean")


def _kl_wrong(flat=True, swap=False, reduction="batchmean", detach=True):
    def distillation_loss(student, teacher):
        import torch.nn.functional as F

        p, q = teacher.log_softmax(-1), student.log_softmax(-1)
        if detach:
            p = p.detach()
        if flat:
            p, q = p.flatten(0, 1), q.flatten(0, 1)
        return F.kl_div(p, q, log_target=True, reduction=reduction) if swap else F.kl_div(
            q, p, log_target=True, reduction=reduction)  # fmt: skip

    return distillation_loss


def _hard_labels(student, teacher):
    import torch.nn.functional as F

    return F.cross_entropy(student.flatten(0, 1), teacher.argmax(-1).flatten())


def _soft_cross_entropy(student, teacher):
    return -(teacher.detach().softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


@exercise("06.distillation", solution=_distillation_solution, wrong=[
    _kl_wrong(flat=False), _kl_wrong(swap=True), _kl_wrong(reduction="mean"), _kl_wrong(detach=False), _hard_labels,
    _soft_cross_entropy, lambda student, teacher: (student - teacher.detach()).square().mean(),
    lambda student, teacher: None])  # fmt: skip
def _distillation(answer):
    import torch

    assert callable(answer), "Give the function itself: distillation_loss, without brackets."
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 5, 11, generator=g).requires_grad_()
    student = torch.randn(3, 5, 11, generator=g).requires_grad_()
    loss = answer(student, teacher)
    assert loss is not None, "The function returns nothing: is there a return?"
    assert isinstance(loss, torch.Tensor) and loss.ndim == 0, "Return one number, as a tensor."
    p, q = teacher.detach().log_softmax(-1), student.detach().log_softmax(-1)
    forward, backward = ((a.exp() * (a - b)).sum(-1).mean().item() for a, b in ((p, q), (q, p)))
    got = loss.item()
    assert abs(got - 5 * forward) > 1e-4, (
        "'batchmean' divides by the first dimension alone, here 3 sequences and not 15 tokens: flatten first.")
    assert abs(got - backward) > 1e-4, "That is KL(student || teacher): the teacher's probabilities are the weights."
    assert abs(got - forward / 11) > 1e-4, "'mean' divides by the vocabulary, too: a nat per token is a sum over it."
    same = answer(teacher.detach().clone(), teacher.detach()).item()
    assert abs(same) < 1e-4, f"For a student equal to its teacher the loss is {same:.3f}: it should be 0."
    assert abs(got - forward) < 1e-4, f"For the test's logits the loss is {got:.4f}, and {forward:.4f} is right."
    loss.backward()
    assert teacher.grad is None or not teacher.grad.any(), "The teacher gets a gradient: detach it (or no_grad)."
    return "A whole distribution a token, where the next token alone is one number."


def _still_float_solution(model):
    from torch import nn

    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not hasattr(module.weight, "qdata")]  # fmt: skip


def _plain_linears(model):
    from torch import nn

    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _any_linear(model):
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _by_dtype(model):
    import torch

    return [name for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dtype == torch.float32]


@exercise("06.still_float", solution=_still_float_solution, wrong=[
    _plain_linears, _any_linear, _by_dtype, lambda model: [],
    lambda model: len(_still_float_solution(model))])  # fmt: skip
def _still_float(answer):
    import logging

    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from .. import fake_quant

    assert callable(answer), "Give the function itself: still_float, without brackets."

    def model():
        return nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    made = answer(model())
    assert made is not None, "The function returns nothing: is there a return?"
    assert isinstance(made, (list, tuple)), "Return a list of names."
    assert list(made) == ["1", "3"], "In a plain model the two nn.Linear, '1' and '3', and nothing else, are listed."
    prepared = fake_quant.prepare(model(), "int4", group_size=32)
    assert list(answer(prepared)) == ["1", "3"], (
        "A prepared layer is fake-quantized: its weight is float. It is a *subclass* of nn.Linear.")
    packed = fake_quant.convert(prepared, backend="packed")
    assert list(answer(packed)) == [], "After our convert no nn.Linear is left, and so nothing is float."
    quantized = model()
    quantize_(quantized, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name == "3")
    assert list(answer(quantized)) == ["1"], (
        "torchao keeps the nn.Linear and puts a tensor with .qdata into it, whose dtype *says* float32.")
    return "Put those lines behind every convert: a model that stayed float works perfectly, and that is the trouble."


# ------------------------------------------------------------- notebook 09: Llama-2-70B on one GPU


def _cache_gib(tokens, kv_heads, values=2, layers=80, head_dim=128, width=2, unit=2**30):
    return values * layers * kv_heads * head_dim * width * tokens / unit


@exercise("09.kv_cache", solution=[_cache_gib(4096, 8), _cache_gib(4096, 64)], wrong=[
    [_cache_gib(4096, 64), _cache_gib(4096, 8)],
    [_cache_gib(4096, 8, values=1), _cache_gib(4096, 64, values=1)],     # keys without values
    [_cache_gib(4096, 8, width=1), _cache_gib(4096, 64, width=1)],       # a byte a value
    [_cache_gib(4096, 8, layers=1), _cache_gib(4096, 64, layers=1)],     # one layer
    [_cache_gib(4096, 8, unit=1e9), _cache_gib(4096, 64, unit=1e9)],     # GB
    [_cache_gib(4096, 8), _cache_gib(4096, 8)], 1.25, "1.25, 10"])  # fmt: skip
def _kv_cache(answer):
    assert isinstance(answer, (list, tuple)) and len(answer) == 2, "Give a list of two numbers, in GiB."
    assert all(isinstance(x, (int, float)) for x in answer), "Give numbers, in GiB."
    grouped, full = answer
    right, all_heads = _cache_gib(4096, 8), _cache_gib(4096, 64)
    assert abs(grouped - all_heads) > 1e-3, "The first number is with 8 heads of keys and values, the second with 64."
    assert abs(grouped - right / 2) > 1e-3, "Keys *and* values are kept, in F16: two bytes for each value."
    assert abs(grouped - right / 80) > 1e-3, "Every one of the 80 layers keeps keys and values of its own."
    assert abs(grouped - right * 2**30 / 1e9) > 1e-3, "That is in GB, of 10^9 bytes: a GiB has 2^30."
    assert abs(grouped - right) < 1e-3, "2 x 80 layers x 8 heads x 128 values x 2 bytes, for each of 4096 tokens."
    assert abs(full - all_heads) < 1e-3, "Without groups there are 64 heads of keys and values: eight times as many."
    return "Without grouped queries a few users would need more memory for their caches than for the weights."


def _largest_types():
    from ..decide import capacity

    found = []
    for cache in ("F16", "Q8_0"):
        found.append(capacity.largest_type("Llama-3-8B", 8192, "RTX 4090", types=("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"),
                                           kv_type=cache, users=16))  # fmt: skip
    return found


@exercise("09.largest_type", solution=["Q6_K", "Q8_0"], wrong=[
    ["Q8_0", "Q8_0"], ["Q6_K", "Q6_K"], ["Q5_K_M", "Q8_0"], ["Q4_K_M", "Q6_K"], ["Q8_0", "Q6_K"], "Q6_K",
    ["F16", "F16"]])  # fmt: skip
def _largest(answer):
    assert isinstance(answer, (list, tuple)) and len(answer) == 2, "Give a list of two types, as strings."
    given = [str(name).upper() for name in answer]
    choices = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
    assert all(name in choices for name in given), f"Choose from {', '.join(choices)}."
    right = _largest_types()
    assert given != ["Q8_0", "Q8_0"], "The first does not fit: have you asked for 16 users with 8192 tokens each?"
    for number, cache in enumerate(("F16", "Q8_0")):
        mine, best = choices.index(given[number]), choices.index(right[number])
        assert mine >= best, f"With a cache in {cache}, {given[number]} does not fit."
        assert mine <= best, f"With a cache in {cache}, there is room for a larger type than {given[number]}."
    return "With many users the cache decides: halving *its* bytes bought two bits for each weight."


def _ceiling_solution(read_bytes, kv_bytes_per_token, cached, users, gb_per_s):
    return users * gb_per_s * 1e9 / (read_bytes + users * cached * kv_bytes_per_token)


@exercise("09.ceiling", solution=_ceiling_solution, wrong=[
    lambda w, kv, cached, users, speed: speed * 1e9 / (w + users * cached * kv),            # steps, not tokens
    lambda w, kv, cached, users, speed: users * speed * 1e9 / (w + cached * kv),            # one user's cache
    lambda w, kv, cached, users, speed: users * speed * 1e9 / (users * w + users * cached * kv),  # weights for each
    lambda w, kv, cached, users, speed: users * speed * 1e9 / w,                            # no cache
    lambda w, kv, cached, users, speed: users * speed * 2**30 / (w + users * cached * kv),  # GiB/s
    lambda w, kv, cached, users, speed: (w + users * cached * kv) / (users * speed * 1e9),  # seconds a token
])  # fmt: skip
def _ceiling(answer):
    assert callable(answer), "Give the function itself: tokens_per_s, without brackets."
    assert answer(1e9, 0, 0, 1, 100) is not None, "The function returns nothing: is there a return?"
    one = answer(50e9, 0, 0, 1, 1000)
    assert abs(one - 1 / 20) > 1e-6, "That is seconds a token: turn it over."
    assert abs(one - 20) < 1e-6, "50 * 10^9 bytes at 1000 * 10^9 bytes a second: 20 steps a second, a token each."
    assert abs(answer(50e9, 0, 0, 4, 1000) - 20) > 1e-6, (
        "Four users get four tokens from one step: the weights are read once for all of them.")
    assert abs(answer(50e9, 0, 0, 4, 1000) - 80) < 1e-6, "One step reads the weights once and writes four tokens."
    assert abs(answer(50e9, 1e6, 2000, 1, 1000) - 1000 / 52) < 1e-6, "A step also reads the cache: cached * kv bytes."
    assert abs(answer(50e9, 1e6, 2000, 4, 1000) - 4000 / 58) < 1e-6, "Each user has a cache of their own."
    return "Three divisions before you rent: memory, speed, price."


# ------------------------------------------------------------- notebook 10: measuring the trade-off


def _front_solution(points):
    return [not any(a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1]) for a in points) for b in points]


@exercise("10.pareto_front", solution=_front_solution, wrong=[
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


@exercise("10.cost", solution=_cost_solution, wrong=[
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


@exercise("10.two_errors", solution=_errors_solution, wrong=[
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


@exercise("10.wrong_report", solution="ABDF", wrong=["ABCDEF", "ABDEF", "ABD", "CE", "A", "ABCD", ""])
def _wrong_report(answer):
    letters = _letters(answer)
    why = {
        "A": "A mixes two conventions: all tokens of a window against its second half.",
        "B": "B reads the clock while the GPU is still working: only the launches are timed.",
        "C": "C is sound: files are compared with files, embedding and scales included.",
        "D": "D multiplies a design limit with time: what was drawn is on the counter, and may be a third of it.",
        "E": "E is sound: the same tokens, against the original model, with an error.",
        "F": "F compares the intervals of two scores on the same questions: a paired test decides that.",
    }
    off = sorted(letters ^ set("ABDF"))
    assert not off, f"Look at {off[0]} again. {why[off[0]] if off[0] in 'CE' else 'What was held equal there?'}"
    return " ".join(why[letter] for letter in "ABDF")


# ------------------------------------------------------------- notebook 07: quantization after training, the ideas


def _best_ratio_solution(w, bits, ratios):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def loss(ratio):
        scale = ratio * w.abs().max() / ((high - low) / 2)
        return ((w / scale).round().clamp(low, high) * scale - w).square().sum().item()

    return min(ratios, key=loss)


def _best_ratio_without_clamp(w, bits, ratios):
    scales = {r: r * w.abs().max() / (2 ** (bits - 1) - 0.5) for r in ratios}
    return min(ratios, key=lambda r: ((w / scales[r]).round() * scales[r] - w).square().sum().item())


@exercise("07.best_ratio", solution=_best_ratio_solution, wrong=[
    _best_ratio_without_clamp,                                          # nothing clips: the smallest ratio wins
    lambda w, bits, ratios: max(ratios),
    lambda w, bits, ratios: -_best_ratio_solution(w, bits, ratios),     # the loss, or its sign
    lambda w, bits, ratios: ratios.index(_best_ratio_solution(w, bits, ratios)),
])  # fmt: skip
def _best_ratio(answer):
    import torch

    assert callable(answer), "Give the function itself: best_ratio, without brackets."
    generator, ratios = torch.Generator().manual_seed(7), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    for bits in (2, 3, 4, 8):
        w = torch.randn(256, generator=generator)
        given, expected = answer(w.clone(), bits, list(ratios)), _best_ratio_solution(w, bits, ratios)
        assert given is not None, "The function returns nothing: is there a return?"
        assert any(given == r for r in ratios), "Return one of the ratios themselves, not its place or its error."
        if given != expected and given == min(ratios):
            raise AssertionError(f"At {bits} bits {given} is too small: do codes beyond the grid get clamped?")
        assert given == expected, f"At {bits} bits there is a ratio with a smaller squared error than {given}."
    return "The fewer the bits, the more it pays to clip: with eight bits the best ratio is 1."


def _smoothed_solution(x, w, alpha):
    s = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
    return x / s, w * s


def _smoothed_by(s_of, swap=False):
    def smoothed(x, w, alpha):
        s = s_of(x, w, alpha)
        return (x * s, w / s) if swap else (x / s, w * s)

    return smoothed


@exercise("07.smoothed", solution=_smoothed_solution, wrong=[
    lambda x, w, alpha: (x, w),
    _smoothed_by(lambda x, w, a: x.abs().amax(0) ** a / w.abs().amax(0) ** (1 - a), swap=True),
    _smoothed_by(lambda x, w, a: x.abs().amax(0) ** (1 - a) / w.abs().amax(0) ** a),       # alpha the wrong way round
    _smoothed_by(lambda x, w, a: x.abs().amax() ** a / w.abs().amax() ** (1 - a)),         # one factor for all
    lambda x, w, a: (x / (x.abs().amax(0) ** a / w.abs().amax(0) ** (1 - a)), w),          # forgets the weight
])  # fmt: skip
def _smoothed(answer):
    import torch

    assert callable(answer), "Give the function itself: smoothed, without brackets."
    generator = torch.Generator().manual_seed(7)
    for alpha in (0.5, 0.8):
        x = torch.randn(64, 16, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 16).double()
        w = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        given = answer(x.clone(), w.clone(), alpha)
        assert given is not None, "The function returns nothing: is there a return?"
        assert isinstance(given, (tuple, list)) and len(given) == 2, "Return two tensors: the new x and the new w."
        new_x, new_w = given
        assert new_x.shape == x.shape and new_w.shape == w.shape, "Both keep their shapes."
        assert torch.allclose(new_x @ new_w.T, x @ w.T), (
            "The product changed: what divides a channel of x must multiply that column of w.")  # fmt: skip
        expected = _smoothed_solution(x, w, alpha)[0]
        assert torch.allclose(new_x, expected), (
            "The product is unchanged, but the factors are not SmoothQuant's: one for each channel, "
            "amax(x) to the alpha over amax(w) to the 1 - alpha.")  # fmt: skip
    return "At alpha 0.5 each channel of x and of w ends with the same amax, the geometric mean of the two."


def _gptq_step_solution(w, q0, H_inv):
    error = (w[:, 0] - q0) / H_inv[0, 0]
    return w[:, 1:] - error[:, None] * H_inv[0, 1:]


@exercise("07.gptq_step", solution=_gptq_step_solution, wrong=[
    lambda w, q0, H_inv: w[:, 1:],                                                         # round to nearest
    lambda w, q0, H_inv: w[:, 1:] + ((w[:, 0] - q0) / H_inv[0, 0])[:, None] * H_inv[0, 1:],
    lambda w, q0, H_inv: w[:, 1:] - (w[:, 0] - q0)[:, None] * H_inv[0, 1:],                # forgets the diagonal
    lambda w, q0, H_inv: w - ((w[:, 0] - q0) / H_inv[0, 0])[:, None] * H_inv[0],           # returns column 0, too
])  # fmt: skip
def _gptq_step(answer):
    import torch

    assert callable(answer), "Give the function itself: step, without brackets."
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64))
    w, H = torch.randn(4, 6, generator=generator, dtype=torch.float64), x.T @ x
    q0 = w[:, 0].round()
    given = answer(w.clone(), q0.clone(), torch.linalg.inv(H))
    assert given is not None, "The function returns nothing: is there a return?"
    assert tuple(given.shape) == (4, 5), "Return the other columns only: shape (rows, columns - 1)."

    def loss(rest):
        return (((torch.cat([q0[:, None], rest], 1) - w) @ x.T) ** 2).sum().item()

    # the best the others can do: least squares of what column 0 left to make up for
    best = w[:, 1:] + torch.linalg.lstsq(x[:, 1:], x[:, :1] @ (w[:, 0] - q0)[None]).solution.T
    assert loss(given) < loss(w[:, 1:]), "The output error is no smaller than without an update: check the sign."
    assert torch.allclose(given, best), (
        f"The output error is {loss(given) / loss(best):.2f} times the least possible one: "
        "mind what the error of column 0 is divided by.")  # fmt: skip
    return "No other values of the remaining columns bring the output nearer: it is the least squares solution."


@exercise("07.stored_bits", solution=8 + (32 + 8) / 64, wrong=[4, 4.625, 8, 8.5, 4 + 32 / 64, 64, 8.75, "8.625"])
def _stored_bits(answer):
    assert isinstance(answer, (int, float)) and not isinstance(answer, bool), "Give a number of bits."
    assert answer not in (4, 4.625, 4.5), "4 bits is what a value needs: how many does it *take* in an int8 tensor?"
    assert answer != 8, "The scales and the zero points are stored, too: one of each for 512 / 8 weights."
    assert abs(answer - 8.625) < 1e-9, "Add all the bits of the three tensors, and divide by 1024 x 512."
    return "More than plain int8, and at the quality of int4: the worst of both, until something packs it."


# ------------------------------------------------------------- notebook 11: choosing


def _best_type_solution(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    fitting = {name: gib for name, gib in weights_gib.items() if gib + cache_gib + reserve_gib <= memory_gib}
    return max(fitting, key=fitting.get) if fitting else None


def _weights_alone(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    return _best_type_solution(weights_gib, 0, memory_gib, 0)


def _without_reserve(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    return _best_type_solution(weights_gib, cache_gib, memory_gib, 0)


def _smallest_type(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    return min(weights_gib, key=weights_gib.get)


def _always_one(weights_gib, cache_gib, memory_gib, reserve_gib=1.5):
    return _best_type_solution(weights_gib, cache_gib, memory_gib, reserve_gib) or min(weights_gib, key=weights_gib.get)


@exercise("11.best_type", solution=_best_type_solution,
          wrong=[_weights_alone, _without_reserve, _smallest_type, _always_one, "Q4_K_M"])  # fmt: skip
def _best_type(answer):
    sizes = {"Q4_K_M": 38.4, "Q8_0": 68.3, "Q6_K": 52.7, "Q5_K_M": 45.4}
    cases = [(2.5, 48 * 1e9 / 2**30), (1.25, 79.6), (10.0, 79.6), (20.0, 79.6), (1.0, 48.0), (1.25, 24.0), (45.0, 40.0)]
    for cache, memory in cases:
        right = _best_type_solution(sizes, cache, memory)
        made = answer(dict(sizes), cache, memory)
        why = "weights, cache and reserve have to fit together" if right else "nothing fits: return None"
        assert made == right, f"With {cache} GiB of cache and {memory:.1f} GiB of memory: {right}, not {made}; {why}."
    exact = answer({"A": 10.0}, 1.0, 12.5)
    assert exact == "A", "What fills the memory exactly still fits."
    return "48 GB are 44.7 GiB: for 70B with a cache, Q4_K_M. Q5_K_M has more weights than that card has memory."


def _break_even_solution(training_usd, usd_before, usd_after):
    return training_usd / (usd_before - usd_after) if usd_after < usd_before else float("inf")


def _never_infinite(training_usd, usd_before, usd_after):
    return training_usd / abs(usd_before - usd_after)


def _without_before(training_usd, usd_before, usd_after):
    return training_usd / usd_after


def _divides_by_zero(training_usd, usd_before, usd_after):
    return training_usd / (usd_before - usd_after)


def _zero_for_never(training_usd, usd_before, usd_after):
    return training_usd / (usd_before - usd_after) if usd_after < usd_before else 0.0


@exercise("11.break_even", solution=_break_even_solution,
          wrong=[_never_infinite, _without_before, _divides_by_zero, _zero_for_never, 400.0])  # fmt: skip
def _break_even(answer):
    for training, before, after in ((1200.0, 7.0, 4.0), (50.0, 0.9, 0.6), (0.0, 2.0, 1.0)):
        made, right = answer(training, before, after), _break_even_solution(training, before, after)
        assert made is not None, "The function returns nothing: is there a return?"
        assert abs(made - right) < 1e-9 * max(1.0, right), (
            f"Each million tokens saves {before - after:.2f} USD, so {training:.0f} USD take {right:.1f} million; "
            f"yours gives {made:.1f}.")
    for before, after in ((3.0, 3.0), (3.0, 5.4)):
        try:
            made = answer(100.0, before, after)
        except ZeroDivisionError:
            raise AssertionError("Where nothing is saved there is no break-even: return float('inf').") from None
        assert made == float("inf"), "Where inference does not get cheaper the training never pays: float('inf')."
    return "Divide what is paid once by what is saved each time; and look whether anything is saved at all."


@exercise("11.evidence", solution="BEF", wrong=["ABCDEF", "B", "E", "F", "BE", "EF", "BF", "BCEF", "ABEF", "CD", ""])
def _evidence(answer):
    letters = _letters(answer)
    hints = {
        "A": "Does A bring Q5_K_M below the limit, or only make its error smaller?",
        "B": "Q5_K_M is smaller than Q6_K: what did it lack, and does B give it that?",
        "C": "Was Q4_K_M left out because it was slow?",
        "D": "Does the price of the GPU separate the types that are left?",
        "E": "Is Q6_K still allowed after E?",
        "F": "Add up weights and four times the cache.",
    }
    off = sorted(letters ^ set("BEF"))
    assert not off, hints[off[0]]
    return ("Evidence changes a decision where it moves something across a limit: B lets a smaller type in, E and F "
            "put the chosen one out. The rest is true, and changes nothing.")  # fmt: skip
