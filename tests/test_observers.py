"""Observers against torch's own, and against the definitions of a percentile and of the least squared error."""

import torch
from probes import randn

from qtutor import fake_quant as fq
from qtutor import formats, observers, ste


def test_minmax_and_moving_average_equal_torch():
    from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

    batches = [randn(64, 8, seed=s) * (s + 1) for s in range(6)]
    for mine, theirs in [
        (observers.MinMaxObserver(), MinMaxObserver()),
        (observers.MovingAverageObserver(), MovingAverageMinMaxObserver(averaging_constant=0.01)),
    ]:
        for batch in batches:
            mine.observe(formats.to_blocks(batch, "tensor"))
            theirs(batch)
        assert mine.lo.item() == theirs.min_val.item() and mine.hi.item() == theirs.max_val.item()


def test_percentile_and_mse_ignore_an_outlier():
    x = randn(1, 20001, seed=4).clamp(-3, 3)
    x[0, 0] = 60.0  # mean squared error if clipped to 3: 57**2 / 20001 = 0.16
    errors = {}
    for observer in (observers.MinMaxObserver(), observers.PercentileObserver(99.9),
                     observers.MSEObserver(smallest=0.02, steps=100)):  # fmt: skip
        observer.observe(x)
        scale, zero_point = observer.qparams("int4")
        error = (ste.fake_quantize(x, scale, zero_point, -8, 7) - x)[:, 1:].square().mean().item()
        errors[type(observer).__name__] = error
    assert errors["PercentileObserver"] < errors["MinMaxObserver"] / 10
    assert errors["MSEObserver"] < errors["MinMaxObserver"] / 5


def test_percentile_is_the_order_statistic():
    observer = observers.PercentileObserver(90)
    observer.observe(torch.arange(101.0).flip(0).reshape(1, -1))
    lo, hi = observer.range("int8", True, False)
    assert (lo.item(), hi.item()) == (10.0, 90.0)


def test_mse_is_the_best_of_its_candidates():
    x = randn(6, 256)
    observer = observers.MSEObserver()
    observer.observe(x)
    scale, _ = observer.qparams("int3")
    best = (ste.fake_quantize(x, scale, None, -4, 3) - x).square().mean(1)
    full = fq.FakeQuantizer("int3").qparams(x)[0]
    for factor in torch.linspace(0.2, 1, 80).tolist():
        assert (best <= (ste.fake_quantize(x, full * factor, None, -4, 3) - x).square().mean(1) * (1 + 1e-5)).all()
