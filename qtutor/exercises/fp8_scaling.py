"""Checks of the exercises: FP8 scaling."""

import torch

from .. import plots
from ..lesson import exercise, expect
from .answers import function, number, tensor


@exercise("fp8_scaling.mx_scale", solution=2.0**-5, wrong=[2.0**-6, 2.0**5, 7.5 / 448, 448 / 7.5, 2.0**-4, "2**-5"])
def _mx_scale(answer):
    number(answer, 2.0**-5, "scale_inv is the smallest power of two with which 7.5 / scale_inv is still at most 448.", {
        7.5 / 448: "An E8M0 scale_inv is a power of two.",
        448 / 7.5: "scale_inv multiplies the codes, which go up to 448, and the block only goes to 7.5: it is below 1.",
        2.0**-6: "7.5 / 2**-6 is 480, and E4M3 ends at 448.",
        2.0**-4: "With half of that everything still fits, and more of the range is used."})
    return "7.5 becomes the code 240. Rounding scale_inv up costs up to half of the range and saturates nothing."


@exercise("fp8_scaling.stochastic_round", solution={
    "whole": 1e6, "round": lambda x: x.floor() + (torch.rand_like(x) < x - x.floor())}, wrong=[
    {"whole": 1, "round": torch.floor}, {"whole": 0.5, "round": torch.floor}, {"whole": 1e6}, 1e6,
    *({"whole": 1e6, "round": rounding} for rounding in (
        lambda x: x.round(), lambda x: torch.floor(x + torch.rand_like(x)),      # FP32 rounds the sum
        lambda x: torch.floor(x) + (torch.rand_like(x) < 0.5),                   # a fair coin
        lambda x: torch.floor(x) + (torch.rand_like(x) > x - torch.floor(x)),    # up and down exchanged
        lambda x: torch.trunc(x + torch.rand_like(x)),                           # negative numbers towards zero
        lambda x: x + torch.rand_like(x) - 0.5))])  # fmt: skip - not rounded
def _stochastic_round(answer):
    usable = isinstance(answer, dict) and {"whole", "round"} <= set(answer)
    expect(usable, 'A dict is wanted: {"whole": a number, "round": your function}.')
    whole, answer = float(answer["whole"]), function(answer["round"], "stochastic_round")
    expect(whole.is_integer(), "The first part asks for a whole number.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        many = torch.full((300_000,), whole)
        expect((torch.floor(many + torch.rand_like(many)) != whole).any(), f"floor(x + rand) left {whole:,.0f} alone "
               "in 300,000 draws. How many bits after the point does FP32 keep of x + rand?")  # fmt: skip
        for value in (2.3, -1.75, 0.1):
            got = tensor(answer(torch.full((20_000,), value)), (20_000,))
            expect(torch.equal(got, got.round()), "The results must be whole numbers.")
            mean = got.float().mean().item()
            expect(abs(mean - value) < 0.02, f"The mean of 20,000 roundings of {value} is {mean:.3f}.")
        for value in (-2.0, 0.0, 3.0, 1e6):
            moved = (answer(torch.full((20_000,), value)) != value).float().mean().item()
            expect(not moved, f"A whole number must stay what it is, but {value:,.0f} moved in {moved:.1%} of 20,000 "
                              "draws: FP32 rounds x + rand to its own 24 bits, before floor sees the sum.")  # fmt: skip
    return "Each rounding is wrong, and their mean is right."


#: What differs from a healthy run.
PATIENTS = {"A": {"scale": "amax / top"}, "B": {"checkpoint": "weights"}, "C": {"margin": -3}, "D": {"history_len": 1}}


def fp8_run(scale: str = "top / amax", margin: int = 0, history_len: int = 16, checkpoint: str = "weights, FP8 state"):
    """Train two layers in FP8 with delayed scaling; the job restarts from its checkpoint every 4 of its 40 steps.

    Every sixth batch is 12 times larger.  ``scale``: "top / amax" or "amax / top", then divided by ``2**margin``; amax:
    the largest of ``history_len`` steps.  Returns the losses (MSE, relative to the batch's size) and the shares of
    the values that saturate and underflow, a row for each step and tensor.
    """
    g = torch.Generator().manual_seed(0)
    sizes = ((128, 32, 1), (32, 64, 0.25), (64, 16, 0.2), (32, 64, 0.25), (64, 16, 0.2))
    x0, w1, w2, t1, t2 = (torch.randn(n, m, generator=g) * size for n, m, size in sizes)
    scales, history, losses, rows = {}, {}, [], []
    tiny = 2.0**-18  # makes the gradients as small as a language model's; the learning rate takes it back

    def fp8(name, values, top=448.0, dtype=torch.float8_e4m3fn):
        used, amax = scales.get(name, 1.0), values.abs().max().item()
        got = (values * used).clamp(-top, top).to(dtype).float() / used
        history[name] = [*history.get(name, []), amax][-history_len:]
        if amax:
            largest = max(history[name])
            scales[name] = (largest / top if scale == "amax / top" else top / largest) / 2**margin
            lost = {"saturates": values.abs() > top / used * 1.0001, "underflows": (got == 0) & (values != 0)}
            rows.append({"step": step, "tensor": name} | {key: v.float().mean().item() for key, v in lost.items()})
        return got

    for step in range(40):
        if step % 4 == 0 and "FP8 state" not in checkpoint:
            scales.clear(), history.clear()
        size = 12 if step % 6 == 5 else 1
        x = x0 * size
        a, b, c = fp8("input", x), fp8("weight 1", w1), fp8("weight 2", w2)
        hidden = (a @ b).relu()
        d = fp8("hidden", hidden)
        error = (d @ c - (x @ t1).relu() @ t2) / size
        losses.append(error.square().mean().item())
        grad = fp8("gradient 2", error / error.numel() / size * tiny, 57344.0, torch.float8_e5m2)
        grad_hidden = fp8("gradient 1", (grad @ c.T) * (hidden > 0), 57344.0, torch.float8_e5m2)
        w1, w2 = w1 - a.T @ grad_hidden / tiny, w2 - d.T @ grad / tiny
    return losses, rows


def symptoms(**runs):
    """Figure: loss of each run (settings of :func:`fp8_run`) beside a healthy one, and what FP8 loses by step."""
    healthy, _ = fp8_run()
    fig, axes = plots.figure(10, 4.6, ncols=len(runs), nrows=2, sharey="row", sharex=True, squeeze=False)
    for (curve, share), (name, changed) in zip(axes.T, runs.items(), strict=True):
        losses, rows = fp8_run(**changed)
        curve.plot(losses, ".-", ms=4, label="this run")
        curve.plot(healthy, "--", label="healthy")
        curve.set(title=f"Run {name}", yscale="log")
        for i, seen, what in ((2, "input", "saturates"), (3, "weight 1", "saturates"), (4, "gradient 2", "underflows")):
            percent = [100 * row[what] for row in rows if row["tensor"] == seen]
            share.plot(percent, ".-", lw=0.8, color=plots.PALETTE[i], label=f"{seen} {what}")
        share.set(xlabel="step")
    plots.plain_ticks(axes[0, 0].yaxis, 20)
    axes[0, 0].set_ylabel("loss (MSE)"), axes[1, 0].set_ylabel("share of values (%)")
    fig.legend(handles=[*axes[0, 0].lines, *axes[1, 0].lines], loc="outside upper center", ncols=5)


_REPAIRED = {"A": {"scale": "top / amax"}, "B": {"checkpoint": "weights, FP8 state"}, "C": {"margin": 0},
             "D": {"history_len": 16}}  # fmt: skip


@exercise("fp8_scaling.repair", solution=_REPAIRED, wrong=[
    _REPAIRED | {"A": {"margin": -16}}, _REPAIRED | {"B": {"history_len": 1}}, _REPAIRED | {"B": {"margin": 4}},
    _REPAIRED | {"C": {"margin": -1}}, _REPAIRED | {"C": {"history_len": 1}}, _REPAIRED | {"A": {}},
    _REPAIRED | {"D": {"history_len": 4}}, {"C": {"margin": 0}}, "A"])  # fmt: skip
def _repair(answer):
    usable = isinstance(answer, dict) and all(isinstance(answer.get(run), dict) for run in PATIENTS)
    expect(usable, 'A dict of four dicts is wanted: {"A": {setting: value}, "B": ..., "C": ..., "D": ...}.')
    look = {"A": "from the first update on everything underflows",
            "B": "the gradient underflows at certain steps only: find the rule",
            "C": "the weights saturate at every step",
            "D": "only the input saturates, at certain steps: what is different there"}  # fmt: skip
    healthy, _ = fp8_run()
    for run, ill in PATIENTS.items():
        losses, _ = fp8_run(**ill | answer[run])
        expect(losses[-1] <= 1.05 * healthy[-1], f"Run {run} ends at a loss of {losses[-1]:.2f}, a healthy run at "
               f"{healthy[-1]:.2f}. Look again: {look[run]}.")  # fmt: skip
    return "All four train like the healthy run."
