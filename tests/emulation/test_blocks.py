"""Block scaling of the emulation: its numbers against the definition, and against vectors recorded on a GPU."""

from pathlib import Path

import pytest
import torch

from qtutor import emulation as te
from qtutor.emulation import DType, Float8BlockScaling, Format, MXFP8BlockScaling, NVFP4BlockScaling
from qtutor.emulation.blocks import round_e2m1

REFERENCE = Path(__file__).resolve().parents[2] / "data" / "reference"


pytestmark = pytest.mark.filterwarnings("ignore:Recipe type changed")


def recorded():
    from safetensors.torch import load_file

    path = REFERENCE / "te_block.safetensors"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    return load_file(path)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("dtype", list(DType))
def test_each_block_has_the_scale_of_its_largest_value(dim, pow2, dtype):
    x = torch.randn(200, 300) * 10.0 ** torch.randint(-6, 6, (200, 300))
    x[:130, 128:256] = 0
    quantizer = te.Float8BlockQuantizer(dtype, block_scaling_dim=dim, force_pow_2_scales=pow2)
    result = quantizer(x)
    for data, scale_inv, source in ((result._rowwise_data, result._rowwise_scale_inv, x),
                                    (result._columnwise_data, result._columnwise_scale_inv, x.t())):  # fmt: skip
        assert data.shape == source.shape
        for i in (0, 100, source.shape[0] - 1):
            for j in range(0, source.shape[1], 128):
                rows = slice(i // 128 * 128, i // 128 * 128 + 128) if dim == 2 else slice(i, i + 1)
                amax = source[rows, j : j + 128].abs().max()
                scale = torch.tensor(dtype.max) / amax if amax > 0 else torch.tensor(1.0)
                if pow2:
                    scale = torch.exp2(torch.floor(torch.log2(scale)))
                found = scale_inv[i // 128, j // 128] if dim == 2 else scale_inv[j // 128, i]
                assert found == 1 / scale
                codes = (source[i, j : j + 128] * scale).clamp(-dtype.max, dtype.max).to(dtype.torch)
                assert torch.equal(data[i, j : j + 128], codes.view(torch.uint8))
    error = (result.dequantize() - x).abs()
    assert error.max() > 0 and result.dequantize().shape == x.shape
    assert result._rowwise_scale_inv.shape[1] % 4 == 0  # padded as the matrix units want it


@pytest.mark.parametrize("dtype", list(DType))
def test_decoding_is_torchs_cast(dtype):
    from qtutor.emulation.quantizers import decode

    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(dtype.torch)
    for x in (codes, codes.t(), codes[:0], codes[:, ::2]):
        assert torch.equal(decode(x).nan_to_num(7e6), x.float().nan_to_num(7e6))


def test_special_blocks():
    quantizer = te.Float8BlockQuantizer(DType.kFloat8E4M3, block_scaling_dim=1)
    x = torch.zeros(5, 128)
    x[1, 0], x[2, 0], x[3, 0], x[3, 1], x[4, 0] = float("inf"), 1e-38, float("nan"), 2.0, 1e-45
    result = quantizer(x)
    assert result._rowwise_scale_inv[0, :5].tolist() == [1, 1, 2.0**-127, 2.0**-7, 2.0**-127]
    back = result.dequantize()
    assert back[1, 0] == 448 and back[3, 0].isnan() and back[3, 1] == 2 and not back[0].any()
    with pytest.raises(RuntimeError, match="1D or 2D"):
        te.Float8BlockQuantizer(DType.kFloat8E4M3, block_scaling_dim=3)


def test_one_outlier_spoils_its_block_only():
    x = torch.randn(16, 512)
    x[:, 0] = 1e6
    block = te.Float8BlockQuantizer(DType.kFloat8E4M3, block_scaling_dim=1)(x).dequantize()
    tensor = te.Float8CurrentScalingQuantizer(DType.kFloat8E4M3)(x).dequantize()
    assert ((block - x)[:, 128:].norm() / x[:, 128:].norm()) < 0.03
    assert ((tensor - x)[:, 128:].norm() / x[:, 128:].norm()) > 0.9


@pytest.mark.parametrize("recipe", [Float8BlockScaling(), Float8BlockScaling(fp8_format=Format.HYBRID),
                                    MXFP8BlockScaling(), NVFP4BlockScaling(disable_stochastic_rounding=True)],
                         ids=lambda r: type(r).__name__)  # fmt: skip
def test_products_are_those_of_the_dequantized_operands(recipe):
    # Powers of two lose nothing but what underflows: unlike sizes make the direction of the blocks matter.
    layer, x, dy = te.Linear(160, 192), *(torch.randn(2, 80, n) * 10.0 ** torch.randint(-7, 1, (2, 80, n))
                                          for n in (160, 192))  # fmt: skip
    with torch.no_grad():
        layer.weight.mul_(10.0 ** torch.randint(-7, 2, (192, 160)))
    x.requires_grad_()
    with te.autocast(recipe=recipe):
        y = layer(x)
    y.backward(dy)
    of_x, of_w = layer.quantizers["scaling_fwd"][:2]
    of_dy = layer.quantizers["scaling_bwd"][0]
    if not recipe.nvfp4():
        assert of_dy.dtype is (DType.kFloat8E5M2 if recipe.fp8_format is Format.HYBRID else DType.kFloat8E4M3)

    def both(quantizer, t):
        t = t.detach().reshape(-1, t.shape[-1])
        return [quantizer.decode(*part).double() for part in (quantizer.rows(t), quantizer.columns(t))]

    (x_r, x_c), (w_r, w_c), (d_r, d_c) = both(of_x, x), both(of_w, layer.weight), both(of_dy, dy)
    assert torch.equal(w_r.t(), w_c) != recipe.mxfp8() and not torch.equal(x_r.t(), x_c)
    for got, want in ((y.detach() - layer.bias.detach(), x_r @ w_r.t()), (x.grad, d_r @ w_c.t()),
                      (layer.weight.grad, d_c @ x_c.t()), (layer.bias.grad, dy.double().sum((0, 1)))):  # fmt: skip
        torch.testing.assert_close(got.double().reshape(want.shape), want, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [Float8BlockScaling(), MXFP8BlockScaling(), NVFP4BlockScaling()],
                         ids=lambda r: type(r).__name__)  # fmt: skip
def test_a_transformer_layer_runs_and_learns(recipe):
    layer = te.TransformerLayer(64, 96, 4, 2, hidden_dropout=0.0, attention_dropout=0.0, bias=False,
                                activation="swiglu", normalization="RMSNorm")  # fmt: skip
    optimizer, x, loss = torch.optim.AdamW(layer.parameters(), lr=3e-3), torch.randn(32, 2, 64), []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), te.autocast(recipe=recipe):
            y = layer(x)
        value = (y.float() - x.roll(1, 0)).square().mean()
        value.backward()
        optimizer.step()
        loss.append(value.item())
    assert loss[-1] < 0.9 * loss[0]
    assert {type(q) for m in layer.modules() for q in getattr(m, "quantizers", {}).get("scaling_bwd", [])} == {
        type(layer.layernorm_mlp.quantizers["scaling_fwd"][0])}  # fmt: skip
    assert layer.layernorm_mlp.get_extra_state().numel() == 0  # nothing to remember


@pytest.mark.slow
def test_nvfp4_rounds_gradients_at_random_and_in_the_mean_right():
    layer, x = te.Linear(32, 32, bias=False), torch.randn(64, 32, requires_grad=True)
    dy, found = torch.randn(64, 32), []
    for _ in range(200):
        with te.autocast(recipe=NVFP4BlockScaling()):
            y = layer(x)
        found.append(torch.autograd.grad(y, x, dy)[0])
    want = dy @ layer.quantizers["scaling_fwd"][1](layer.weight).dequantize()
    mean, single = torch.stack(found).mean(0), found[0]
    assert not torch.equal(found[0], found[1])
    assert (mean - want).norm() < 0.2 * (single - want).norm()


def test_stochastic_rounding_never_moves_a_number_of_the_grid(monkeypatch):
    """Not even for the largest number that ``rand`` can give, beside which FP32 rounds 3 + rand to 4."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1 - 2.0**-24))
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([grid, -grid])
    assert (3 + torch.rand_like(grid)).floor().eq(4).all()
    assert torch.equal(round_e2m1(grid, stochastic=True), grid)
    assert torch.equal(round_e2m1(torch.tensor([2.5, -0.25, 9.0]), stochastic=True), torch.tensor([2.0, -0.0, 6.0]))


def test_changing_between_recipes_of_blocks_makes_new_quantizers():
    layer, x = te.Linear(128, 128), torch.randn(32, 128)
    for recipe, kind in (
        (MXFP8BlockScaling(), te.MXFP8Quantizer),
        (Float8BlockScaling(), te.Float8BlockQuantizer),
        (te.DelayedScaling(), te.Float8Quantizer),
        (NVFP4BlockScaling(), te.NVFP4Quantizer),
    ):
        with te.autocast(recipe=recipe):
            layer(x).sum().backward()
        assert all(type(q) is kind for qs in layer.quantizers.values() for q in qs)


def test_weights_are_quantized_once_a_step_when_told():
    layer, x = te.Linear(128, 128), torch.randn(32, 128)
    with torch.no_grad(), te.autocast(recipe=Float8BlockScaling()):
        first = layer(x, is_first_microbatch=True)
        layer.weight.mul_(3)
        assert torch.equal(layer(x, is_first_microbatch=False), first)


def test_bad_recipes_and_sizes():
    with pytest.raises(ValueError, match="divisible by 32"), te.autocast(recipe=MXFP8BlockScaling()):
        te.Linear(48, 64)(torch.ones(32, 48))
    with pytest.raises(AssertionError, match="E4M3"):
        NVFP4BlockScaling(fp8_format=Format.E5M2)
    with pytest.raises(AssertionError):
        Float8BlockScaling(fp8_format=Format.E5M2)
    for shape in ((12, 128, 128), (32, 24, 64)):
        with pytest.raises(ValueError, match="divisible"), te.autocast(recipe=Float8BlockScaling()):
            te.Linear(*shape[1:])(torch.ones(shape[:2]))


@pytest.mark.slow
def test_bytes_scales_and_products_are_the_recorded_ones():
    data = recorded()
    sizes = sorted({key.split(".")[0] for key in data})
    assert len(sizes) >= 2
    for size in sizes:
        n_in, n_out = (int(n) for n in size.split("x")[1:])
        layer = te.Linear(n_in, n_out, params_dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(data[f"{size}.plain.weight"]), layer.bias.copy_(data[f"{size}.plain.bias"])
        for kind in ("plain", "outlier", "zero", "tiny"):
            tag = f"{size}.{kind}"
            x, dy = data[f"{tag}.x"].requires_grad_(), data[f"{tag}.dy"]
            layer.zero_grad()
            with te.autocast(recipe=Float8BlockScaling()):
                y = layer(x)
            y.backward(dy)
            for name, tensor, quantizer in (("x", x, layer.quantizers["scaling_fwd"][0]),
                                            ("w", layer.weight, layer.quantizers["scaling_fwd"][1]),
                                            ("dy", dy, layer.quantizers["scaling_bwd"][0])):  # fmt: skip
                if f"{tag}.{name}_codes" not in data:
                    continue
                result = quantizer(tensor)
                assert torch.equal(result._rowwise_data, data[f"{tag}.{name}_codes"]), (tag, name)
                assert torch.equal(result._columnwise_data, data[f"{tag}.{name}_codes_t"]), (tag, name)
                for mine, real, length in (
                    (result._rowwise_scale_inv, data[f"{tag}.{name}_scale_inv"], result.rows[1].shape),
                    (result._columnwise_scale_inv, data[f"{tag}.{name}_scale_inv_t"], None),
                ):
                    assert mine.shape == real.shape, (tag, name)
                    used = -(-tensor.shape[0 if length is None else 1] // 128) if name == "w" else mine.shape[1]
                    assert torch.equal(mine[:, :used], real[:, :used]), (tag, name)  # the rest is padding
            for name, got in (("y", y), ("dx", x.grad), ("dw", layer.weight.grad), ("db", layer.bias.grad)):
                want = data[f"{tag}.{name}"].float()
                assert (got.float() - want).norm() <= 2**-8 * want.norm() + 1e-37, (tag, name)
