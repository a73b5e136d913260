"""Checks of the exercises: FP8 scaling."""

import math

import torch

from ..lesson import exercise, expect
from .answers import function, number, tensor


@exercise("fp8_scaling.shadow", solution=117, wrong=[116, 101, 115, 118, 16, "117"])
def _shadow(answer):
    late = "Step 116's scale was made at the end of step 115, from steps 100 to 115."
    number(answer, 117, "The scale of step t + 1 comes from the amaxes of the 16 steps t - 15 to t.", {
        101: "Step 101 is the first one whose scale knows the outlier: that is where the shadow begins.",
        16: "That is how many steps the shadow lasts; the question is which step comes after it.",
        115: late, 116: late})  # fmt: skip
    return "Sixteen steps lie in the shadow, 101 to 116. With the default history there would be 1024."


@exercise("fp8_scaling.mx_scale", solution=2.0**-5, wrong=[2.0**-6, 2.0**5, 7.5 / 448, 448 / 7.5, 2.0**-4, "2**-5"])
def _mx_scale(answer):
    number(answer, 2.0**-5, "scale_inv is the smallest power of two with which 7.5 / scale_inv is still at most 448.", {
        7.5 / 448: "An E8M0 scale_inv is a power of two.",
        448 / 7.5: "scale_inv multiplies the codes, which go up to 448, and the block only goes to 7.5: it is below 1.",
        2.0**-6: "7.5 / 2**-6 is 480, and E4M3 ends at 448.",
        2.0**-4: "With half of that everything still fits, and more of the range is used."})
    return "7.5 becomes the code 240. Rounding scale_inv up costs up to half of the range and saturates nothing."


@exercise("fp8_scaling.stochastic_round", solution=lambda x: x.floor() + (torch.rand_like(x) < x - x.floor()), wrong=[
    lambda x: x, lambda x: x.round(),
    lambda x: torch.floor(x + torch.rand_like(x)),                           # FP32 rounds the sum
    lambda x: torch.floor(x) + (torch.rand_like(x) < 0.5),                   # a fair coin
    lambda x: torch.floor(x) + (torch.rand_like(x) > x - torch.floor(x)),    # up and down exchanged
    lambda x: torch.trunc(x + torch.rand_like(x)),                           # negative numbers towards zero
    lambda x: x + torch.rand_like(x) - 0.5])  # fmt: skip - not rounded
def _stochastic_round(answer):
    answer = function(answer, "stochastic_round")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for value in (2.3, -1.75, 0.1):
            got = tensor(answer(torch.full((20_000,), value)), (20_000,))
            expect(torch.equal(got, got.round()), "The results must be whole numbers.")
            mean = got.float().mean().item()
            expect(abs(mean - value) < 0.02, f"The mean of 20,000 roundings of {value} is {mean:.3f}.")
        for whole in (-2.0, 0.0, 3.0, 1e6):
            moved = (answer(torch.full((20_000,), whole)) != whole).float().mean().item()
            expect(not moved, f"A whole number must stay what it is, but {whole:,.0f} moved in {moved:.1%} of 20,000 "
                              "draws: FP32 rounds x + rand to its own 24 bits, before floor sees the sum.")  # fmt: skip
    return "Each rounding is wrong, and their mean is right: that is what gradients need."


#: What differs from a healthy run.
PATIENTS = {"A": {"scale": "amax / top"}, "B": {"checkpoint": "weights"}, "C": {"margin": -3}}


def fp8_run(scale: str = "top / amax", margin: int = 0, history_len: int = 16, checkpoint: str = "weights, FP8 state"):
    """Train two layers in FP8 with delayed scaling; the job restarts from its checkpoint every 4 of its 40 steps.

    ``scale``: "top / amax" or "amax / top", then divided by ``2**margin``; amax: the largest of ``history_len`` steps.
    Returns the losses (mean squared error by step) and a row for each step and tensor: ``headroom`` (powers of two from
    amax to the largest value that the scale in use can hold), ``saturates`` and ``underflows`` (shares of its values).
    """
    g = torch.Generator().manual_seed(0)
    sizes = ((128, 32, 1), (32, 64, 0.25), (64, 16, 0.2), (32, 64, 0.25), (64, 16, 0.2))
    x, w1, w2, t1, t2 = (torch.randn(n, m, generator=g) * size for n, m, size in sizes)
    target, scales, history, losses, rows = (x @ t1).relu() @ t2, {}, {}, [], []
    tiny = 2.0**-18  # makes the gradients as small as a language model's; the learning rate takes it back

    def fp8(name, values, top=448.0, dtype=torch.float8_e4m3fn):
        used, amax = scales.get(name, 1.0), values.abs().max().item()
        got = (values * used).clamp(-top, top).to(dtype).float() / used
        history[name] = [*history.get(name, []), amax][-history_len:]
        if amax:
            largest = max(history[name])
            scales[name] = (largest / top if scale == "amax / top" else top / largest) / 2**margin
            lost = {"saturates": values.abs() > top / used * 1.0001, "underflows": (got == 0) & (values != 0)}
            rows.append({"step": step, "tensor": name, "headroom": math.log2(top / used / amax)}
                        | {key: share.float().mean().item() for key, share in lost.items()})  # fmt: skip
        return got

    for step in range(40):
        if step % 4 == 0 and "FP8 state" not in checkpoint:
            scales.clear(), history.clear()
        a, b, c = fp8("input", x), fp8("weight 1", w1), fp8("weight 2", w2)
        hidden = (a @ b).relu()
        d = fp8("hidden", hidden)
        error = d @ c - target
        losses.append(error.square().mean().item())
        grad = fp8("gradient 2", error / error.numel() * tiny, 57344.0, torch.float8_e5m2)
        grad_hidden = fp8("gradient 1", (grad @ c.T) * (hidden > 0), 57344.0, torch.float8_e5m2)
        w1, w2 = w1 - a.T @ grad_hidden / tiny, w2 - d.T @ grad / tiny
    return losses, rows


_REPAIRED = {"A": {"scale": "top / amax"}, "B": {"checkpoint": "weights, FP8 state"}, "C": {"margin": 0}}


@exercise("fp8_scaling.repair", solution=_REPAIRED, wrong=[
    _REPAIRED | {"A": {"margin": -16}}, _REPAIRED | {"B": {"history_len": 1}}, _REPAIRED | {"B": {"margin": 4}},
    _REPAIRED | {"C": {"margin": -1}}, _REPAIRED | {"C": {"history_len": 1}}, _REPAIRED | {"A": {}},
    {"C": {"margin": 0}}, "A"])  # fmt: skip
def _repair(answer):
    usable = isinstance(answer, dict) and all(isinstance(answer.get(run), dict) for run in PATIENTS)
    expect(usable, 'A dict of three dicts is wanted: {"A": {setting: value}, "B": ..., "C": ...}.')
    look = {"A": "headroom doubled at the first update, where it should have gone to 0",
            "B": "after each restart the gradients underflow, and one step is lost",
            "C": "the headroom of every tensor is the same negative number"}  # fmt: skip
    healthy, _ = fp8_run()

    def drawn(losses):
        return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * loss / healthy[0]))] for loss in losses[::4])

    for run, ill in PATIENTS.items():
        losses, _ = fp8_run(**ill | answer[run])
        expect(losses[-1] <= 1.05 * healthy[-1], f"Run {run} ends at a loss of {losses[-1]:.2f}, a healthy run at "
               f"{healthy[-1]:.2f} ({drawn(losses)} against {drawn(healthy)}). Look again: {look[run]}.")  # fmt: skip
    return "All three train like the healthy run."
