"""Checks of the exercises: quantization after training, the ideas."""

from __future__ import annotations

from ..lesson import exercise


def _best_ratio_solution(w, bits, ratios):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def loss(ratio):
        scale = ratio * w.abs().max() / ((high - low) / 2)
        return ((w / scale).round().clamp(low, high) * scale - w).square().sum().item()

    return min(ratios, key=loss)


def _best_ratio_without_clamp(w, bits, ratios):
    scales = {r: r * w.abs().max() / (2 ** (bits - 1) - 0.5) for r in ratios}
    return min(ratios, key=lambda r: ((w / scales[r]).round() * scales[r] - w).square().sum().item())


@exercise("ptq_fundamentals.best_ratio", solution=_best_ratio_solution, wrong=[
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


@exercise("ptq_fundamentals.smoothed", solution=_smoothed_solution, wrong=[
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


@exercise("ptq_fundamentals.gptq_step", solution=_gptq_step_solution, wrong=[
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


@exercise("ptq_fundamentals.stored_bits", solution=8 + (32 + 8) / 64, wrong=[4, 4.625, 8, 8.5, 4 + 32 / 64, 64, 8.75, "8.625"])
def _stored_bits(answer):
    assert isinstance(answer, (int, float)) and not isinstance(answer, bool), "Give a number of bits."
    assert answer not in (4, 4.625, 4.5), "4 bits is what a value needs: how many does it *take* in an int8 tensor?"
    assert answer != 8, "The scales and the zero points are stored, too: one of each for 512 / 8 weights."
    assert abs(answer - 8.625) < 1e-9, "Add all the bits of the three tensors, and divide by 1024 x 512."
    return "More than plain int8, and at the quality of int4: the worst of both, until something packs it."
