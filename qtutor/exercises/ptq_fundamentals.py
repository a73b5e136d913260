"""Checks of the exercises: quantization after training, the ideas."""

import torch

from ..lesson import exercise, expect
from .answers import function, number, several, tensor


def _random(*shape):
    """Normal float64 values, the same in each run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _best_ratio_solution(w, bits, ratios, clamp=True):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def loss(ratio):
        scale = ratio * w.abs().max() / ((high - low) / 2)
        codes = (w / scale).round()
        return ((codes.clamp(low, high) if clamp else codes) * scale - w).square().sum().item()

    return min(ratios, key=loss)


@exercise("ptq_fundamentals.best_ratio", solution=_best_ratio_solution, wrong=[
    lambda w, bits, ratios: _best_ratio_solution(w, bits, ratios, clamp=False),   # nothing clips: the smallest wins
    lambda w, bits, ratios: max(ratios),
    lambda w, bits, ratios: -_best_ratio_solution(w, bits, ratios),     # the loss, or its sign
    lambda w, bits, ratios: ratios.index(_best_ratio_solution(w, bits, ratios))])  # fmt: skip
def _best_ratio(answer):
    answer, ratios = function(answer, "best_ratio"), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    for bits, w in zip((2, 3, 4, 8), _random(4, 256).float(), strict=True):
        given, right = answer(w.clone(), bits, list(ratios)), _best_ratio_solution(w, bits, ratios)
        expect(any(given == r for r in ratios), "Return one of the ratios themselves, not its place or its error.")
        expect(given == right or given > min(ratios),
               f"At {bits} bits {given} is too small: do codes beyond the grid get clamped?")  # fmt: skip
        expect(given == right, f"At {bits} bits there is a ratio with a smaller squared error than {given}.")
    return "The fewer the bits, the more it pays to clip: with eight bits the best ratio is 1."


def _factors(x, w, alpha):
    return x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)


def _smoothed_by(s_of):
    """A way to do the exercise: divide by the factors that ``s_of`` gives, and multiply by them."""
    return lambda x, w, alpha: (x / s_of(x, w, alpha), w * s_of(x, w, alpha))


@exercise("ptq_fundamentals.smoothed", solution=_smoothed_by(_factors), wrong=[
    lambda x, w, alpha: (x, w),
    _smoothed_by(lambda x, w, a: 1 / _factors(x, w, a)),                                   # times and over exchanged
    _smoothed_by(lambda x, w, a: _factors(x, w, 1 - a)),                                   # alpha the wrong way round
    _smoothed_by(lambda x, w, a: x.abs().amax() ** a / w.abs().amax() ** (1 - a)),         # one factor for all
    lambda x, w, a: (x / _factors(x, w, a), w)])  # fmt: skip - forgets the weight
def _smoothed(answer):
    answer = function(answer, "smoothed")
    x, w = _random(64, 16) * torch.logspace(-1, 1, 16).double(), _random(8, 16)
    for alpha in (0.5, 0.8):
        new_x, new_w = several(answer(x.clone(), w.clone(), alpha), 2, "two tensors, the new x and the new w,")
        expect(torch.allclose(tensor(new_x, x.shape) @ tensor(new_w, w.shape).T, x @ w.T),
               "The product changed: what divides a channel of x must multiply that column of w.")  # fmt: skip
        expect(torch.allclose(new_x, x / _factors(x, w, alpha)),
               "The product is unchanged, but the factors are not SmoothQuant's: one for each channel, "
               "amax(x) to the alpha over amax(w) to the 1 - alpha.")  # fmt: skip
    return "At alpha 0.5 each channel of x and of w ends with the same amax, the geometric mean of the two."


def _gptq_step_solution(w, q0, H_inv):
    error = (w[:, 0] - q0) / H_inv[0, 0]
    return w[:, 1:] - error[:, None] * H_inv[0, 1:]


@exercise("ptq_fundamentals.gptq_step", solution=_gptq_step_solution, wrong=[
    lambda w, q0, H_inv: w[:, 1:],                                                         # round to nearest
    lambda w, q0, H_inv: _gptq_step_solution(w, 2 * w[:, 0] - q0, H_inv),                  # the wrong sign
    lambda w, q0, H_inv: w[:, 1:] - (w[:, 0] - q0)[:, None] * H_inv[0, 1:],                # forgets the diagonal
    lambda w, q0, H_inv: w - ((w[:, 0] - q0) / H_inv[0, 0])[:, None] * H_inv[0]])  # fmt: skip - returns column 0, too
def _gptq_step(answer):
    answer = function(answer, "step")
    x = _random(200, 6) @ (torch.eye(6).double() + 0.3 * _random(6, 6))
    w, H = _random(4, 6), x.T @ x
    q0 = w[:, 0].round()
    given = tensor(answer(w.clone(), q0.clone(), torch.linalg.inv(H)), (4, 5))  # the other columns only

    def loss(rest):
        return (((torch.cat([q0[:, None], rest], 1) - w) @ x.T) ** 2).sum().item()

    # the best that the others can do: least squares of the error that column 0 left
    best = w[:, 1:] + torch.linalg.lstsq(x[:, 1:], x[:, :1] @ (w[:, 0] - q0)[None]).solution.T
    expect(loss(given) < loss(w[:, 1:]), "The output error is no smaller than without an update: check the sign.")
    expect(torch.allclose(given, best), f"The output error is {loss(given) / loss(best):.2f} times the least possible "
           "one: mind what the error of column 0 is divided by.")  # fmt: skip
    return "No other values of the remaining columns bring the output nearer: it is the least squares solution."


@exercise("ptq_fundamentals.stored_bits", solution=8 + (32 + 8) / 64,
          wrong=[4, 4.625, 8, 8.5, 4 + 32 / 64, 64, 8.75, "8.625"])  # fmt: skip
def _stored_bits(answer):
    codes = "4 bits is what a value needs: how many does it *take* in an int8 tensor?"
    number(answer, 8.625, "Add all the bits of the three tensors, and divide by 1024 x 512.", {
        4: codes, 4.5: codes, 4.625: codes,
        8: "The scales and the zero points are stored, too: one of each for 512 / 8 weights."})  # fmt: skip
    return "More than plain int8, and at the quality of int4: the worst of both, until something packs it."
