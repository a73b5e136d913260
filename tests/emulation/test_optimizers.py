"""FusedAdam: torch's AdamW where the moments are FP32, and moments as ml_dtypes rounds them where they are not."""

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from qtutor import emulation
from qtutor.emulation import FusedAdam

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def trained(make, steps=5):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(64, 16)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_fp32_moments_give_adamw():
    ours, _ = trained(lambda p: FusedAdam(p, **SETTINGS))
    want, _ = trained(lambda p: torch.optim.AdamW(p, **SETTINGS))
    for a, b in zip(ours.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype, oracle, top", [
    (torch.uint8, ml_dtypes.float8_e4m3fn, 448.0), (torch.float16, np.float16, 65504 / 2),
    (torch.bfloat16, ml_dtypes.bfloat16, None)])  # fmt: skip
def test_moments_are_those_of_the_format(dtype, oracle, top):
    _, exact = trained(lambda p: FusedAdam(p, **SETTINGS), steps=1)
    _, low = trained(lambda p: FusedAdam(p, **SETTINGS, exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype), steps=1)
    for a, b in zip(exact.state.values(), low.state.values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            value = a[name].double().numpy()
            scale = np.abs(value).max() / top if top else 1.0
            want = (value / scale).astype(np.float32).astype(oracle).astype(np.float64) * scale
            close = np.isclose(b[name].double().numpy(), want, rtol=1e-6, atol=0)
            assert close.mean() > 0.99  # a value between two codes may fall on either side of an FP32 rounding


def test_a_resumed_run_goes_on():
    low = dict(exp_avg_dtype=torch.uint8, exp_avg_sq_dtype=torch.float16)
    whole, _ = trained(lambda p: FusedAdam(p, **SETTINGS, **low), steps=6)
    model, optimizer = trained(lambda p: FusedAdam(p, **SETTINGS, **low), steps=5)
    saved, again = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    resumed = FusedAdam(again.parameters(), **SETTINGS, **low)
    resumed.load_state_dict(saved)
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))  # draws what came before x
    x = torch.randn(64, 16)
    again.zero_grad()
    (again(x) - x[:, :8]).square().mean().backward()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_what_is_refused():
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="fp32/fp16/bf16/fp8"):
        FusedAdam([weight], exp_avg_dtype=torch.int8)
    with pytest.raises(NotImplementedError, match="master_weights=True"):
        FusedAdam([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))])


def test_master_weights_keep_what_bf16_cannot():
    """A BF16 or FP8 parameter follows its FP32 copy; small steps are not lost; a saved state comes back in FP32."""
    exact = nn.Parameter(torch.ones(4))
    rounded = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    quantizer = emulation.Float8CurrentScalingQuantizer(emulation.DType.kFloat8E4M3)
    codes = nn.Parameter(quantizer(torch.ones(4, dtype=torch.bfloat16)))
    arms = {p: FusedAdam([p], lr=1e-4, master_weights=p is not exact) for p in (exact, rounded, codes)}
    for _ in range(50):
        for p, adam in arms.items():
            p.grad = torch.ones(4, dtype=p.dtype)
            adam.step()
    for p in (rounded, codes):
        master = arms[p].state[p]["master_param"]
        assert torch.allclose(master, exact) and not torch.equal(master, torch.ones(4))
    assert torch.equal(rounded, arms[rounded].state[rounded]["master_param"].bfloat16())
    assert torch.allclose(codes.dequantize().float(), arms[codes].state[codes]["master_param"], rtol=0.04)
    again = FusedAdam([rounded], lr=1e-4, master_weights=True)
    again.load_state_dict(copy.deepcopy(arms[rounded].state_dict()))
    for name, value in arms[rounded].state[rounded].items():
        assert torch.equal(again.state[rounded][name], value) and value.dtype == torch.float32
    assert again.param_groups[0]["step"] == 50
