"""The emulation against ml_dtypes (rounding), a hand-written delayed-scaling loop (state), fp32 (gradients) and,
where data/reference/ has them, vectors recorded from the real Transformer Engine on a GPU."""

import copy
import json
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from qtutor import emulation as te
from qtutor.emulation import DelayedScaling, DType, Float8CurrentScaling, Format, modules, regions

REFERENCE = Path(__file__).resolve().parents[2] / "data" / "reference"
NUMPY = {DType.kFloat8E4M3: ml_dtypes.float8_e4m3fn, DType.kFloat8E5M2: ml_dtypes.float8_e5m2}
ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)


# ---------------------------------------------------------------------------------- delayed scaling's state
def layer_of(**options):
    torch.manual_seed(0)
    return te.Linear(32, 48, bias=True, **options)


@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("length", [1, 4])
def test_history_and_scales_follow_a_hand_written_loop(algo, margin, length):
    layer, recipe = layer_of(), DelayedScaling(margin=margin, amax_history_len=length, amax_compute_algo=algo)
    past = {"x": [0.0] * length, "w": [0.0] * length, "dy": [0.0] * length}
    scales = dict(x=1.0, w=1.0, dy=1.0)
    maxima = dict(x=448, w=448, dy=57344)
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        x = torch.randn(16, 32, generator=generator) * (0 if step == 5 else 10.0 ** (step % 4 - 2))
        dy = torch.randn(16, 48, generator=generator) * (float("inf") if step == 8 else 1e-3)
        with te.autocast(recipe=recipe):
            y = layer(x)
        y.backward(dy)
        for name, tensor in dict(x=x, w=layer.weight, dy=dy).items():
            amax = tensor.detach()[~tensor.isnan()].abs().max().item()
            window = past[name][1:] + [amax]  # oldest first
            past[name] = window if amax > 0 else past[name]  # a zero tensor does not roll its history
            chosen = max(window) if algo == "max" else amax
            if 0 < chosen < float("inf"):
                scales[name] = (np.float32(maxima[name]) / np.float32(chosen)) / np.float32(2**margin)
        forward, backward = layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"]
        for state, column, name in ((forward, 0, "x"), (forward, 1, "w"), (backward, 0, "dy")):
            assert state.scale[column].item() == scales[name], (step, name)
            # Row 0 is the step under way; after it come the remembered ones, oldest first.
            want = [0.0, *past[name][1:]] if length > 1 else [0.0]
            assert state.amax_history[:, column].tolist() == pytest.approx(want, rel=0, abs=0), (step, name)
        assert forward.scale[2] == 1 and backward.scale[1] == 1  # outputs are not quantized


def test_a_vanishing_amax_gives_the_largest_scale():
    amax = torch.tensor([1e-40, 0.0, float("inf"), float("nan")])
    new = regions.next_scale(amax, torch.full((4,), 7.0), 448, margin=0)
    assert new.tolist() == [torch.finfo(torch.float32).max, 7, 7, 7]


def test_only_training_moves_scales_and_only_the_outermost_exit():
    layer, recipe = layer_of(), DelayedScaling(amax_history_len=4)
    with torch.no_grad(), te.autocast(recipe=recipe):
        layer(torch.ones(16, 32))
    assert layer.fp8_meta["scaling_fwd"].scale[0] == 1
    assert layer.fp8_meta["scaling_fwd"].amax_history[0, 0] == 1  # noted all the same
    with te.autocast(recipe=recipe):
        with te.autocast(recipe=recipe):
            layer(torch.full((16, 32), 2.0))
        assert layer.fp8_meta["scaling_fwd"].scale[0] == 1
    assert layer.fp8_meta["scaling_fwd"].scale[0] == 224


def test_gradient_scales_move_after_the_first_module():
    recipe = DelayedScaling(amax_history_len=4)
    layers = nn.Sequential(te.Linear(32, 32), te.Linear(32, 32))
    seen = []
    layers[1].register_full_backward_hook(lambda *_: seen.append(layers[1].fp8_meta["scaling_bwd"].scale[0].item()))
    with te.autocast(recipe=recipe):
        y = layers(torch.randn(16, 32, requires_grad=True))
    y.sum().backward()
    assert seen == [1.0]  # not yet when its own backward was done
    assert all(layer.fp8_meta["scaling_bwd"].scale[0] != 1 for layer in layers)


def test_history_length_can_change_and_recipes_too():
    layer, x = layer_of(), torch.ones(16, 32)
    for length in (4, 2, 8):
        with te.autocast(recipe=DelayedScaling(amax_history_len=length)):
            layer(x)
        assert layer.fp8_meta["scaling_fwd"].amax_history.shape == (length, 3)
    with pytest.warns(UserWarning, match="Recipe type changed"), te.autocast(recipe=Float8CurrentScaling()):
        layer(x)


# ------------------------------------------------------------------------------------- products and gradients
@pytest.mark.parametrize("recipe", [DelayedScaling(amax_history_len=2), Float8CurrentScaling(),
                                    DelayedScaling(fp8_format=Format.E4M3)])  # fmt: skip
def test_outputs_and_gradients_stay_within_fp8_of_fp32(recipe):
    torch.manual_seed(0)
    layer, x = te.Linear(64, 96), torch.randn(4, 32, 64, requires_grad=True)
    plain = nn.Linear(64, 96)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "extra" not in k})
    dy = torch.randn(4, 32, 96)
    for _ in range(2):  # delayed scaling has its scales in the second step
        layer.zero_grad(), setattr(x, "grad", None)
        with te.autocast(recipe=recipe):
            y = layer(x)
        y.backward(dy)
    mine = y, x.grad, layer.weight.grad
    x.grad = None
    z = plain(x)
    z.backward(dy)
    # Relative rounding errors: E4M3 at most 2^-4, E5M2 2^-3, uniform in size, so about 0.4 of that in the root
    # mean square; two operands add in quadrature.
    for got, want, bound in zip(mine, (z, x.grad, plain.weight.grad), (0.05, 0.09, 0.09), strict=True):
        error = ((got - want).norm() / want.norm()).item()
        assert 0.001 < error < bound
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)  # a sum: not in FP8


def test_product_is_exactly_that_of_the_dequantized_operands():
    layer, x = layer_of(), torch.randn(16, 32)
    with te.autocast(recipe=Float8CurrentScaling()):
        y = layer(x)
    quantize = te.Float8CurrentScalingQuantizer(DType.kFloat8E4M3)
    a, b = (quantize(t).dequantize().double() for t in (x, layer.weight.detach()))
    torch.testing.assert_close(y.double(), a @ b.t(), rtol=1e-5, atol=1e-6)


def test_without_autocast_it_is_a_linear_layer():
    layer, x = layer_of(), torch.randn(3, 5, 32)
    for context in (te.autocast(enabled=False), warnings.catch_warnings()):
        with context:
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.get_extra_state().numel() == 0


def test_bf16_autocast_keeps_fp32_weights_and_gradients():
    layer, x = layer_of(), torch.randn(16, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), te.autocast(recipe=Float8CurrentScaling()):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.dtype == layer.weight.grad.dtype == x.grad.dtype == torch.float32


def test_what_is_saved_for_backward_is_eight_bits():
    saved, layer = [], layer_of()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with te.autocast(recipe=Float8CurrentScaling()):
            layer(torch.randn(16, 32, requires_grad=True))
    assert sum(t.nbytes for t in saved) == 16 * 32 + 2 * 48 * 32  # the weight by rows and by columns: Hopper


def test_microbatches_reuse_the_weight():
    layer, x = layer_of(), torch.randn(16, 32)
    with te.autocast(recipe=Float8CurrentScaling()):
        first = layer(x, is_first_microbatch=True)
        with torch.no_grad():
            layer.weight.zero_()
        assert torch.equal(layer(x, is_first_microbatch=False), first)
        assert torch.equal(layer(x, is_first_microbatch=True), layer.bias.expand(16, -1))


def test_return_bias_and_no_bias():
    layer = te.Linear(32, 16, bias=False, return_bias=False)
    assert layer.bias.numel() == 0 and list(dict(layer.named_parameters())) == ["weight"]
    out, bias = te.Linear(32, 16, return_bias=True)(torch.ones(16, 32))
    assert out.shape == (16, 16) and bias.shape == (16,)


# ------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("shape, sizes", [((7, 32), (32, 32)), ((16, 24), (24, 32)), ((3, 5, 32), (32, 32)),
                                          ((16, 32), (32, 20))])  # fmt: skip
def test_bad_sizes_are_refused(shape, sizes):
    layer = te.Linear(*sizes)
    layer(torch.ones(shape))  # high precision takes any size
    with te.autocast(), pytest.raises(ValueError, match="divisible by 8 and the last dimension to be divisible by 16"):
        layer(torch.ones(shape))
    assert not regions.Region.enabled and regions.Region.depth == 0


def test_bad_sizes_of_the_backward_pass():
    layer = te.Linear(32, 32)
    with te.autocast():
        y = layer(torch.ones(8, 32))
    with pytest.raises(RuntimeError, match="divisible by 16"):
        y.sum().backward()


def test_other_errors():
    region = te.autocast()
    with region, pytest.raises(RuntimeError, match="more than once"), region:
        pass
    with pytest.raises(AssertionError, match="E5M2"):
        DelayedScaling(fp8_format=Format.E5M2)
    with pytest.raises(ValueError, match="most_recent"):
        DelayedScaling(amax_compute_algo="mean")
    with pytest.raises(TypeError, match="must match"):
        te.Linear(32, 32)(torch.ones(16, 32, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match="GEMM not possible"):
        te.Linear(32, 32)(torch.ones(16, 48))
    with pytest.warns(DeprecationWarning), te.fp8_autocast(fp8_recipe=Float8CurrentScaling()):
        assert regions.Region.enabled


# ------------------------------------------------------------------------------------------- state, copies
def trained():
    layer, recipe = layer_of(), DelayedScaling(amax_history_len=4)
    for step in range(3):
        with te.autocast(recipe=recipe):
            y = layer(torch.full((16, 32), float(step + 1)))
        y.sum().backward()
    return layer, recipe


def test_state_round_trip_goes_on_bit_for_bit(monkeypatch, tmp_path):
    layer, recipe = trained()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    resumed = te.Linear(32, 48)
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    monkeypatch.delenv(modules.UNSAFE_STATE, raising=False)
    with pytest.raises(RuntimeError, match="NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1"):
        resumed.load_state_dict(state)
    monkeypatch.setenv(modules.UNSAFE_STATE, "1")
    resumed.load_state_dict(state)
    x, outputs = torch.randn(16, 32) * 5, []
    for module in (layer, resumed, copy.deepcopy(layer)):
        with te.autocast(recipe=recipe):
            outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    for direction in ("fwd", "bwd"):
        mine, theirs = (m.fp8_meta[f"scaling_{direction}"] for m in (layer, resumed))
        assert torch.equal(mine.amax_history.roll(0), mine.amax_history) and mine.scale.shape == theirs.scale.shape
    with pytest.raises(RuntimeError, match="not written by the emulation"):
        resumed.set_extra_state(torch.ones(9, dtype=torch.uint8))


def test_stateless_recipes_save_nothing():
    layer = layer_of()
    with te.autocast(recipe=Float8CurrentScaling()):
        layer(torch.ones(16, 32))
    assert layer.state_dict()["_extra_state"].numel() == 0


def test_state_follows_the_module():
    layer, recipe = trained()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.fp8_meta["scaling_fwd"].scale.dtype == torch.float32
    with te.autocast(recipe=recipe):
        assert layer(torch.ones(16, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------ the real Transformer Engine
RECORDED = {
    "delayed": lambda: DelayedScaling(amax_history_len=8),
    "delayed_recent": lambda: DelayedScaling(amax_history_len=8, amax_compute_algo="most_recent", margin=1),
    "delayed_e4m3": lambda: DelayedScaling(amax_history_len=1, fp8_format=Format.E4M3),
    "current": Float8CurrentScaling,
}


def load_reference(name):
    """(tensors, metadata) of a recording, or None where it has not been made."""
    from safetensors import safe_open

    path = REFERENCE / f"{name}.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def close(got, want, dtype, context, bound=2.0**-7):
    """Of one dtype and shape, equal within ``bound`` (two roundings of BF16) of the largest value."""
    assert got.dtype == want.dtype == dtype and got.shape == want.shape, context
    got, want = got.float(), want.float()
    assert torch.equal(want.isnan(), got.isnan()) and torch.equal(want.isinf(), got.isinf()), context
    got, want = got[want.isfinite()], want[want.isfinite()]
    if len(want):
        error, size = (got - want).abs().max().item(), want.abs().max().item()
        assert error <= bound * size, (context, error, size)


@pytest.mark.parametrize("tag", ["delayed_bf16", "delayed_fp32", "delayed_recent_bf16", "delayed_e4m3_bf16",
                                 "current_bf16", "current_fp32"])  # fmt: skip
def test_linear_reproduces_the_recorded_steps(tag):
    """Bytes, scales and histories bit for bit; outputs and gradients within BF16."""
    reference = load_reference("te_linear")
    if reference is None:
        return
    data, metadata = reference
    name, short = tag.rsplit("_", 1)
    recipe, dtype = RECORDED[name](), dict(bf16=torch.bfloat16, fp32=torch.float32)[short]
    inputs = {key.removeprefix("inputs."): value for key, value in data.items() if key.startswith("inputs.")}
    mine = {key.removeprefix(f"{tag}."): value for key, value in data.items() if key.startswith(f"{tag}.")}
    evaluation, kept = json.loads(metadata["special_steps"])["evaluation"], json.loads(metadata["kept"])
    layer = te.Linear(inputs["x"].shape[-1], inputs["dy"].shape[-1], params_dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(inputs["weight"]), layer.bias.copy_(inputs["bias"])
    for step in range(int(metadata["steps"])):
        x, dy = inputs["x"][step].to(dtype).requires_grad_(), inputs["dy"][step].to(dtype)
        layer.weight.grad = layer.bias.grad = None
        if step == 0:
            with te.autocast(enabled=False, calibrating=True, recipe=recipe):
                layer(x)  # allocates the state; the amax that it notes is this step's own
        for operand, tensor, quantizer in (("x", x, layer.quantizers["scaling_fwd"][0]),
                                           ("w", layer.weight, layer.quantizers["scaling_fwd"][1]),
                                           ("dy", dy, layer.quantizers["scaling_bwd"][0])):  # fmt: skip
            result = copy.deepcopy(quantizer)(tensor)
            if f"{operand}_codes" in mine:
                assert torch.equal(result._data, mine[f"{operand}_codes"][step]), (step, operand)
            assert torch.equal(result._scale_inv, mine[f"{operand}_scale_inv"][step].reshape(-1)), (step, operand)
        if step == evaluation:
            with torch.no_grad(), te.autocast(recipe=recipe):
                y = layer(x)
            got = dict(y=y)
        else:
            with te.autocast(recipe=recipe):
                y = layer(x)
            y.backward(dy)
            got = dict(y=y.detach(), dx=x.grad, dw=layer.weight.grad, db=layer.bias.grad)
        for key, value in got.items():
            if key in mine and step in kept:
                close(value, mine[key][kept.index(step)], dtype, (step, key))
        for direction in ("fwd", "bwd"):
            if f"scale_{direction}" in mine:
                state = layer.fp8_meta[f"scaling_{direction}"]
                assert torch.equal(state.scale, mine[f"scale_{direction}"][step]), (step, direction)
                assert torch.equal(state.amax_history, mine[f"amax_history_{direction}"][step]), (step, direction)
        with torch.no_grad():
            layer.weight.mul_(inputs["factor"][step].item())


def test_cast_reproduces_the_recorded_bytes():
    reference = load_reference("te_cast")
    if reference is None:
        return
    data, numbers = reference[0], ~ALL_BF16.isnan()
    for name in DType.__members__:
        quantizer = te.Float8Quantizer(torch.tensor([0.3]), torch.zeros(1), DType[name])
        got, want = quantizer(ALL_BF16)._data, data[f"{name}_0.3_codes"]
        assert torch.equal(got[numbers], want[numbers])
        values = te.Float8Tensor(want, torch.ones(1), DType[name], torch.float32).dequantize()
        assert torch.equal(values.isnan(), ~numbers)
        assert torch.equal(quantizer.amax, data[f"{name}_0.3_amax"])
        result = te.Float8CurrentScalingQuantizer(DType[name])(data[f"{name}_current_x"])
        assert torch.equal(result._data, data[f"{name}_current_codes"])
        assert torch.equal(result._scale_inv, data[f"{name}_current_scale_inv"].reshape(-1))


def test_two_layers_under_autocast_reproduce_the_recorded_steps():
    reference = load_reference("te_autocast")
    if reference is None:
        return
    data = reference[0]
    n = data["weight"].shape[-1]
    layers = nn.Sequential(*(te.Linear(n, n, bias=False) for _ in range(2)))
    with torch.no_grad():
        for layer, weight in zip(layers, data["weight"], strict=True):
            layer.weight.copy_(weight)
    recipe = DelayedScaling(amax_history_len=4)
    for step in range(len(data["x"])):
        x = data["x"][step].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), te.autocast(recipe=recipe):
            y = layers[0](x) if step == 3 else layers(x)
        layers.zero_grad()
        y.float().square().mean().backward()
        # A last bit of the first layer's output can tip the second onto a neighbouring FP8 number: compare as a whole.
        for name, got in (("y", y.detach()), ("dx", x.grad), ("dw", layers[0].weight.grad)):
            error = (got.float() - data[name][step].float()).norm() / data[name][step].float().norm()
            assert error <= 2.0**-6, (step, name, error)
        for i, layer in enumerate(layers):
            state = layer.fp8_meta["scaling_fwd"]
            # The first layer sees the recorded input: exact.  The second sees an output, equal within BF16.
            check = torch.equal if i == 0 else lambda a, b: torch.allclose(a, b, rtol=2**-6)
            assert check(state.scale, data[f"scale_fwd{i}"][step]), (step, i)
            assert check(state.amax_history, data[f"amax_history_fwd{i}"][step]), (step, i)
            state = layer.fp8_meta["scaling_bwd"]
            assert torch.allclose(state.scale, data[f"scale_bwd{i}"][step], rtol=2**-5), (step, i)
            assert torch.equal(state.amax_history > 0, data[f"amax_history_bwd{i}"][step] > 0), (step, i)


def test_errors_are_of_the_recorded_kinds():
    path = REFERENCE / "te_errors.json"
    if not path.exists():
        return
    found = json.loads(path.read_text())["found"]

    def attempt(tokens, n_in, n_out, backward=False):
        try:
            layer = te.Linear(n_in, n_out)
            with te.autocast():
                y = layer(torch.ones(tokens, n_in, requires_grad=True))
            if backward:
                y.sum().backward()
        except (ValueError, RuntimeError) as error:
            return type(error).__name__
        return "no error"

    for key, sizes in dict(tokens_7=(7, 64, 64), tokens_8=(8, 64, 64), tokens_8_backward=(8, 64, 64, True),
                           in_24=(32, 24, 64), out_20=(32, 64, 20), out_24=(32, 64, 24),
                           out_24_backward=(32, 64, 24, True)).items():  # fmt: skip
        assert attempt(*sizes) == found[key].split(":")[0], key
