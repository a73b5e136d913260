"""Checks of the exercises: FP8 scaling."""

from __future__ import annotations

from ..lesson import exercise


def _next_scale_solution(history, scale, margin=0):
    import math

    amax = max(history)
    if amax == 0 or not math.isfinite(amax):
        return scale
    return 448 / amax / 2**margin


@exercise("fp8_scaling.next_scale", solution=_next_scale_solution, wrong=[
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


@exercise("fp8_scaling.shadow", solution=117, wrong=[116, 101, 115, 118, 16, "117"])
def _shadow(answer):
    assert isinstance(answer, (int, float)), "Give the number of a step."
    assert answer != 101, "Step 101 is the first one whose scale knows the outlier: that is where the shadow begins."
    assert answer != 16, "That is how many steps the shadow lasts; the question is which step comes after it."
    assert answer not in (115, 116), "Step 116's scale was made at the end of step 115, from steps 100 to 115."
    assert answer == 117, "The scale of step t + 1 comes from the amaxes of the 16 steps t - 15 to t."
    return "Sixteen steps in the shadow, 101 to 116. With the default history it would have been 1024."


@exercise("fp8_scaling.mx_scale", solution=2.0**-5, wrong=[2.0**-6, 2.0**5, 7.5 / 448, 448 / 7.5, 2.0**-4, "2**-5"])
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


@exercise("fp8_scaling.stochastic_round", solution=_stochastic_round_solution,
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
