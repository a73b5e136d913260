"""Pictures of quantization after training: what they compute, that they are labelled, that the widget redraws."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from qtutor import plots
from qtutor.figures import ptq


@pytest.fixture
def w():
    return torch.randn(24, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("group", [32, None])
def test_clip_curve_is_the_error_of_torch_fake_quantization(w, group):
    ratios = [0.4, 0.7, 1.0]
    rounding, clipping = ptq.clip_curve(w, 3, group, ratios)
    blocks = w.reshape(-1, group or 96)
    whole = []
    for ratio in ratios:
        scale = ratio * blocks.abs().amax(1) / 3.5
        q = torch.fake_quantize_per_channel_affine(blocks, scale, torch.zeros(len(scale), dtype=torch.int32), 0, -4, 3)
        whole.append(((q - blocks).square().sum() / blocks.square().sum()).item())
    np.testing.assert_allclose(rounding + clipping, whole, rtol=1e-4)
    assert rounding[0] < rounding[2] and clipping[0] > clipping[2]


@pytest.mark.slow
def test_every_picture_has_titles_and_units(w):
    amax = {f"model.layers.{i}.{n}": w.abs().amax(0) * (i + 1) for i in range(3)
            for n in ("self_attn.q_proj", "mlp.down_proj")}  # fmt: skip
    table = pd.DataFrame({"bits": [4, 4, 3, 3], "method": ["a", "b"] * 2, "kld_mean": [0.2, 0.1, 0.5, 0.4],
                          "kld_mean_se": 0.01})  # fmt: skip
    x = w.abs().amax(0)
    figures = [ptq.clip_picture(w, 3, 32, 0.8),
               ptq.outlier_picture(amax, "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"),
               ptq.smooth_picture([0, 0.5, 1], {"one": [0.3, 0.1, 0.2]}, {"one": 0.3}, (x, x), (x / 2, x)),
               ptq.methods_picture(table)]  # fmt: skip
    for fig in figures:
        fig.canvas.draw()
        assert all((ax.get_title() or ax.get_title(loc="left")) and ax.get_xlabel() for ax in fig.axes)
        plots.png(fig)


def test_clip_explorer_redraws(w):
    box = ptq.clip_explorer(w)
    controls, image = box.children[0].children, box.children[1]
    seen = {bytes(image.value)}
    for control, value in zip(controls, (8, 32, 1.1), strict=True):
        control.value = value
        seen.add(bytes(image.value))
    assert len(seen) == 4 and math.isclose(controls[2].value, 1.1)
