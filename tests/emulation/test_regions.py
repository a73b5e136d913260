"""Regions of the emulation: calibration, nesting, regions left open, what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from qtutor import emulation as te
from qtutor.emulation import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    regions,
)

ALL = [DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling]
name_of = "{0.__name__}".format

pytestmark = pytest.mark.filterwarnings("ignore:Recipe type changed")


def state_of(layer, direction="fwd"):
    return layer.fp8_meta[f"scaling_{direction}"]


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_a_tensor_of_zeros_leaves_history_and_scale_alone(algorithm):
    """By the library's kernel: amax 0 rolls nothing and sets nothing, even where the row that set the scale is gone."""
    recipe, layer = DelayedScaling(amax_history_len=3, amax_compute_algo=algorithm), te.Linear(16, 16)
    for amax in (8.0, 2.0, 1.0, 0.0):
        with te.autocast(recipe=recipe):
            layer(torch.full((16, 16), amax))
    assert state_of(layer).amax_history[:, 0].tolist() == [0, 2, 1]  # 8 is gone
    assert state_of(layer).scale[0] == 448 / (8 if algorithm == "max" else 1)


def test_calibration_notes_amax_in_high_precision_and_the_next_region_uses_it():
    recipe, layer = DelayedScaling(amax_history_len=4), te.Linear(32, 48)
    x = torch.randn(16, 32)
    with torch.no_grad():
        plain = layer(x)
        with te.autocast(enabled=False, calibrating=True, recipe=recipe):
            assert torch.equal(layer(x), plain)
            layer(x / 2)  # sets, as the real one does, and does not keep the larger
    state = state_of(layer)
    assert state.amax_history[0].tolist() == [x.abs().max() / 2, layer.weight.abs().max(), 0]
    assert state.scale.tolist() == [1, 1, 1] and not state_of(layer, "bwd").amax_history.any()
    with torch.no_grad(), te.autocast(recipe=recipe):
        layer(x)
    assert state.scale.tolist() == [1, 1, 1]  # evaluation moves no scale, not even calibrated ones
    with te.autocast(recipe=recipe):
        layer(x / 4)
    assert state.scale[0] == np.float32(448) / np.float32(x.abs().max().item())


def test_calibration_takes_any_size_and_its_state_reaches_a_checkpoint():
    layer = te.Linear(20, 12)
    with te.autocast(enabled=False, calibrating=True, recipe=DelayedScaling(amax_history_len=2)):
        layer(torch.ones(7, 20))
    assert layer.state_dict()["_extra_state"].numel() > 0
    assert state_of(layer).amax_history[0, 0] == 1


@pytest.mark.parametrize("recipe", ALL[1:], ids=name_of)
def test_calibration_of_the_other_recipes_notes_nothing(recipe):
    layer, x = te.Linear(32, 32), torch.randn(32, 32)
    with te.autocast(enabled=False, calibrating=True, recipe=recipe()):
        y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.state_dict()["_extra_state"].numel() == 0


def test_regions_nest_and_restore_what_was_outside():
    layer, x = te.Linear(32, 32), torch.randn(32, 32)
    high = layer(x)
    with te.autocast(recipe=Float8CurrentScaling()):
        low = layer(x)
        with te.autocast(enabled=False):
            assert torch.equal(layer(x), high)
        assert torch.equal(layer(x), low) and not torch.equal(low, high)
        with te.autocast(recipe=MXFP8BlockScaling()):
            assert not torch.equal(layer(x), low)
        assert isinstance(regions.Region.recipe, Float8CurrentScaling) and regions.Region.depth == 1
    assert torch.equal(layer(x), high) and not regions.Region.enabled and regions.Region.depth == 0


def test_an_exception_closes_every_region_and_still_updates():
    layer, recipe = te.Linear(32, 32), DelayedScaling(amax_history_len=4)
    with pytest.raises(KeyError), te.autocast(recipe=recipe), te.autocast(recipe=recipe):
        layer(torch.full((16, 32), 2.0))
        raise KeyError
    assert not regions.Region.enabled and regions.Region.depth == 0
    assert state_of(layer).scale[0] == 224


def test_a_region_may_be_used_again_but_not_twice_at_once():
    region = te.autocast(recipe=Float8CurrentScaling())
    for _ in range(2):
        with region:
            assert regions.Region.enabled
    with region, pytest.raises(RuntimeError, match="more than once concurrently"):
        region.__enter__()
    assert regions.Region.depth == 0  # the refused one did not count
    with pytest.raises(TypeError):
        region.__exit__(None, None, None)
    assert regions.Region.depth == 0


def test_a_region_left_open_keeps_fp8_on_and_stops_the_scales():
    layer, recipe, x = te.Linear(32, 32), DelayedScaling(amax_history_len=4), torch.full((16, 32), 2.0)
    forgotten = te.autocast(recipe=recipe)
    forgotten.__enter__()
    assert not torch.equal(layer(x / 3), nn.functional.linear(x / 3, layer.weight, layer.bias))
    for _ in range(3):
        with te.autocast(recipe=recipe):
            layer(x)
    assert regions.Region.enabled and state_of(layer).scale[0] == 1 and state_of(layer).amax_history[0, 0] == 2
    forgotten.__exit__(None, None, None)
    assert not regions.Region.enabled and state_of(layer).scale[0] == 224


@pytest.mark.parametrize("recipe", ["delayed", "DelayedScaling()", 3, {"margin": 0}])
def test_something_that_is_no_recipe_is_refused_and_opens_nothing(recipe):
    with pytest.raises(AttributeError, match="pass a recipe, for example DelayedScaling"), te.autocast(recipe=recipe):
        pass
    assert regions.Region.depth == 0 and not regions.Region.enabled


def test_everything_is_available_in_the_emulation():
    for name in dir(te):
        if name.startswith("is_") and name.endswith("_available"):
            check = getattr(te, name)
            assert check() is True and check(return_reason=True) == (True, "") and "capability" in check.__doc__, name


@pytest.mark.parametrize("recipe, rows, sizes", [
    (DelayedScaling, 24, (24, 64)), (Float8CurrentScaling, 7, (64, 64)), (Float8BlockScaling, 12, (128, 128)),
    (MXFP8BlockScaling, 32, (48, 64)), (MXFP8BlockScaling, 48, (64, 64)), (NVFP4BlockScaling, 32, (24, 64)),
])  # fmt: skip
def test_sizes_that_a_recipe_cannot_multiply_are_refused_in_one_sentence(recipe, rows, sizes):
    layer, x = te.Linear(*sizes), torch.ones(rows, sizes[0])
    layer(x)  # high precision takes any size
    with pytest.raises(ValueError, match="divisible by") as error, te.autocast(recipe=recipe()):
        layer(x)
    message = str(error.value)
    assert any(f"dims={list(t.shape)}" in message for t in (x, layer.weight)) and len(message.splitlines()) == 1
    assert regions.Region.depth == 0
