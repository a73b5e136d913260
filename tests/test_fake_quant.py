"""FakeQuantizer as a module, prepare and calibrate: against torchao's, and what they refuse."""

import copy
import pickle

import pytest
import torch
from probes import Tiny, assert_same, randn, with_grad
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import qtutor
from qtutor import fake_quant as fq
from qtutor import observers, packed, ste


def test_static_quantizer_needs_data_then_freezes():
    quantizer = fq.FakeQuantizer("int8", "tensor", symmetric=False, observer=observers.MinMaxObserver())
    with pytest.raises(qtutor.QtutorError, match="calibrate"):
        quantizer(randn(4, 4))
    model = nn.Sequential(nn.Linear(16, 16))
    fq.prepare(model, weight="int8", activation=quantizer)
    with pytest.raises(qtutor.QtutorError, match="calibrate"):
        model(randn(3, 16))
    with pytest.raises(qtutor.QtutorError, match="calibrate"), fq.calibrate(model):
        pass
    with fq.calibrate(model), torch.no_grad():
        seen = model(randn(8, 16))
        assert_same(seen, torch.nn.functional.linear(randn(8, 16), model[0].weight, model[0].bias))
    static = model[0].activation_fake_quant
    frozen = static.scale.clone()
    model(100 * randn(8, 16))
    assert_same(static.scale, frozen)
    fresh = fq.prepare(nn.Sequential(nn.Linear(16, 16)), weight="int8", activation=quantizer)
    fresh.load_state_dict(model.state_dict())
    assert_same(fresh(randn(5, 16)), model(randn(5, 16)))


def test_calibrating_with_nan_or_without_observers_is_refused():
    quantizer = fq.FakeQuantizer("int8", "tensor", observer=observers.MinMaxObserver())
    model = fq.prepare(nn.Sequential(nn.Linear(4, 4)), activation=quantizer)
    with pytest.raises(qtutor.QtutorError, match="NaN"), fq.calibrate(model):
        model(torch.full((2, 4), float("nan")))
    with pytest.raises(qtutor.QtutorError, match="observer"), fq.calibrate(fq.prepare(nn.Sequential(nn.Linear(4, 4)))):
        pass


def test_prepare_keeps_parameters_and_skips():
    model = Tiny()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert fq.prepare(model, "int4", "int8", group_size=32) is model
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.body[0], fq.FakeQuantLinear)
    assert list(model.state_dict()) == keys  # a float checkpoint still loads
    for name, parameter in model.named_parameters():
        assert parameter is before[name]


def test_whole_model_equals_torchao_qat():
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    theirs, mine = Tiny().body, Tiny().body
    quantize_(theirs, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    fq.prepare(mine, "int4", "int8", group_size=32)
    x = randn(5, 7, 64)
    a, b = with_grad(mine, x), with_grad(theirs, x)
    assert_same(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bad_input_is_one_sentence_and_changes_nothing():
    model = Tiny(width=60)
    for bad in (dict(group_size=32), dict(weight="int9"), dict(weight="banana"), dict(skip=("body", "lm_head"))):
        with pytest.raises(qtutor.QtutorError):
            fq.prepare(model, **bad)
        assert not any(isinstance(m, fq.FakeQuantLinear) for m in model.modules())
    model.body[2].weight.data[0, 0] = float("nan")
    with pytest.raises(qtutor.QtutorError, match="body.2"):
        fq.prepare(model)
    for bad in (lambda: ste.fake_quantize(randn(4, 6), torch.ones(4, 4), None, -8, 7),
                lambda: ste.fake_quantize(randn(4, 6), torch.ones(3, 1), None, -8, 7),
                lambda: ste.fake_quantize(randn(4, 6), torch.ones(5, 4, 6), None, -8, 7),
                lambda: ste.fake_quantize(randn(4, 6), 1.0, None, 7, 7),
                lambda: fq.FakeQuantizer("int4", "group"),
                lambda: fq.FakeQuantizer("int4", "token", observer=observers.MinMaxObserver()),
                lambda: fq.FakeQuantizer("int4", "row")(randn(4, 4)),
                lambda: fq.FakeQuantizer("E8M0"),
                lambda: observers.PercentileObserver(0)):  # fmt: skip
        with pytest.raises(qtutor.QtutorError):
            bad()
    assert fq.FakeQuantizer("int4", "token")(torch.empty(0, 8)).shape == (0, 8)


def test_training_through_the_quantizer_reduces_the_loss_and_float_can_not_see_it():
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    target = Tiny()(x).detach() + 0.5
    model = fq.prepare(Tiny(), "int2", skip=())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_learned_scales_train_save_and_convert():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(256, 32)
    y = model(x).detach()
    fq.prepare(model, "int2", group_size=16, learned=True)
    began = model[0].weight_fake_quant.scale.detach().clone()
    assert sum(p.numel() for p in model.parameters() if p.shape[-1] == 1) == (32 * 64 + 64 * 32) // 16
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and not torch.equal(began, model[0].weight_fake_quant.scale)
    model[0].weight_fake_quant.scale.data[0] = -0.1  # an optimizer can push one below zero
    fresh = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    fq.prepare(fresh, "int2", group_size=16, learned=True)
    known = torch.optim.SGD(fresh.parameters(), lr=1.0)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    loaded = fresh[0].weight_fake_quant.scale.detach().clone()
    fresh(x).square().mean().backward()
    known.step()  # made before the checkpoint was loaded, and it still trains the scales
    assert not torch.equal(fresh[0].weight_fake_quant.scale, loaded)
    expected = model(x)
    assert expected.isfinite().all() and torch.equal(packed.convert(model)(x), expected)


def test_learned_activation_scale_begins_at_the_observer():
    activation = fq.FakeQuantizer("int4", "tensor", observer=observers.MSEObserver(), learned=True)
    model = fq.prepare(nn.Sequential(nn.Linear(16, 8)), "int4", activation)
    x = torch.randn(64, 16)
    with pytest.raises(qtutor.QtutorError, match="calibrate"):
        model(x)
    with fq.calibrate(model), torch.no_grad():
        model(x)
    model(x).square().sum().backward()
    assert model[0].activation_fake_quant.scale.grad.abs() > 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.body, self.norm = nn.Embedding(40, 64), nn.Linear(64, 64), nn.RMSNorm(64)
        self.lm_head = nn.Linear(64, 40, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        return self.lm_head(self.norm(self.body(self.embed_tokens(ids))))


def test_overrides_reach_embeddings_head_and_norms():
    ids = torch.arange(40)[None]
    overrides = {"embed_tokens": "Q8_0", "lm_head": "Q8_0", "norm": "int8"}
    model = fq.prepare(Tied(), "int4", group_size=32, overrides=overrides)
    assert isinstance(model.embed_tokens, fq.FakeQuantEmbedding) and model.lm_head.weight is model.embed_tokens.weight
    expected = model(ids)
    expected.sum().backward()
    assert model.embed_tokens.weight.grad.abs().sum() > 0 and model.norm.weight.grad.abs().sum() > 0
    baked = packed.bake(copy.deepcopy(model))
    assert baked.lm_head.weight is baked.embed_tokens.weight and type(baked.embed_tokens) is nn.Embedding
    assert torch.equal(baked(ids), expected)
    stored = packed.convert(model)
    assert torch.equal(stored(ids), expected)
    assert stored.embed_tokens.stored is stored.lm_head.stored
    rows = {row["layer"]: row for row in packed.weight_bytes(stored)}
    assert set(rows) == {"embed_tokens", "body", "norm"}  # the tied table counts once
    assert rows["embed_tokens"]["bits_per_weight"] == 8.5
    assert not any(p.numel() > 64 for p in stored.parameters())


def test_overrides_that_cannot_be_are_refused():
    for bad, match in (
        (dict(overrides={"embed_tokens": "Q8_0"}), "share one weight"),
        (dict(overrides={"embed_tokens": "Q8_0", "lm_head": "int8"}), "share one weight"),
        (dict(overrides={"head": "int8"}), "No layer is called head"),
        (dict(overrides={"body": "int9"}), "int9"),
        (dict(weight="Q4_0", overrides={"body": None}), "nothing|no nn.Linear"),
        (dict(weight="TQ2_0"), "256"),
    ):
        model = Tied()
        with pytest.raises(qtutor.QtutorError, match=match):
            fq.prepare(model, **bad)
        assert not any(isinstance(m, fq.FakeQuantLinear) for m in model.modules())
    for bad in (lambda: fq.FakeQuantizer("Q4_0", group_size=64), lambda: fq.FakeQuantizer("NVFP4", "channel"),
                lambda: fq.FakeQuantizer("MXFP4", observer=observers.MinMaxObserver()),
                lambda: fq.FakeQuantizer("ternary", observer=observers.MinMaxObserver()),
                lambda: fq.FakeQuantizer("E4M3", learned=True),
                lambda: fq.FakeQuantizer("int4", symmetric=False, learned=True)):  # fmt: skip
        with pytest.raises(qtutor.QtutorError):
            bad()
    with pytest.raises(qtutor.QtutorError, match="prepare"):
        packed.bake(Tied())


def two_layers():
    layers = {"up_proj": nn.Linear(64, 64), "down_proj": nn.Linear(64, 64)}
    return nn.ModuleDict({"mlp": nn.ModuleDict(layers), "attn": nn.Linear(64, 64)})


def test_skip_is_a_name_or_several_and_means_what_it_says():
    for skip, left in (("mlp.down_proj", ["attn", "mlp.up_proj"]), ("mlp", ["attn"]),
                       (["down_proj", "attn"], ["mlp.up_proj"]),
                       ((), ["attn", "mlp.down_proj", "mlp.up_proj"])):  # fmt: skip
        model = fq.prepare(two_layers(), skip=skip)
        found = sorted(name for name, m in model.named_modules() if isinstance(m, fq.FakeQuantLinear))
        assert found == left, skip
    model = fq.prepare(two_layers(), "int4", overrides={"mlp.up_proj": "int8"})
    assert model["mlp"]["up_proj"].weight_fake_quant.target.bits == 8
    with pytest.warns(UserWarning, match="lm_heads"):
        fq.prepare(two_layers(), skip=("mlp.down_proj", "lm_heads"))
    for bad in (dict(skip=("attention", "lm_heads")), dict(skip="down"),
                *(dict(group_size=size) for size in (-32, 32.0, "32"))):  # fmt: skip
        model = two_layers()
        with pytest.raises(qtutor.QtutorError):
            fq.prepare(model, "int4", **bad)
        assert type(model["attn"]) is nn.Linear


def test_the_fast_path_of_a_transformer_layer_sees_the_quantized_weight():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
    prepared, x = fq.prepare(copy.deepcopy(layer), "int2").eval(), torch.randn(2, 5, 64)
    expected = prepared(x).detach()  # with gradients there is no fast path
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), expected)
        assert not torch.allclose(layer(x), expected)


def test_an_infinite_activation_is_not_a_small_number():
    x = randn(1, 32)
    x[0, 3] = torch.inf
    for target in ("MXFP8", "MXFP6", "MXFP4", "NVFP4", "int8"):
        assert not torch.isfinite(fq.FakeQuantizer(target)(x)).all(), target


def learned(group_size=16, seed=0):
    torch.manual_seed(seed)
    return fq.prepare(nn.Sequential(nn.Linear(64, 32)), "int4", group_size=group_size, learned=True)


@pytest.mark.parametrize("strict", [True, False])
def test_loading_fills_learned_scales_in_place_and_keeps_the_optimizers_state(strict):
    model, saved = learned(), learned(seed=1).state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(8, 64)
    model(x).square().mean().backward()
    optimizer.step()
    scale = model[0].weight_fake_quant.scale
    moments = optimizer.state[scale]["exp_avg"].clone()
    model.load_state_dict(saved, strict=strict)
    assert model[0].weight_fake_quant.scale is scale and torch.equal(scale, saved["0.weight_fake_quant.scale"])
    assert torch.equal(optimizer.state[scale]["exp_avg"], moments) and moments.abs().sum() > 0
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(scale, saved["0.weight_fake_quant.scale"])


def test_loading_works_after_copies_and_moves_and_by_assignment():
    saved = learned(seed=1).state_dict()
    for change in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to(torch.bfloat16).float()):
        model = change(learned())
        known = torch.optim.SGD(model.parameters(), lr=0.1)
        model.load_state_dict(saved)
        scale = model[0].weight_fake_quant.scale
        assert any(scale is p for p in known.param_groups[0]["params"])
        assert torch.equal(scale, saved["0.weight_fake_quant.scale"])
    model = learned()
    model.load_state_dict(saved, assign=True)
    assert isinstance(model[0].weight_fake_quant.scale, nn.Parameter)
    assert torch.equal(model[0].weight_fake_quant.scale, saved["0.weight_fake_quant.scale"])
    empty = learned().to("meta")
    empty.load_state_dict(saved, assign=True)
    assert torch.equal(empty(torch.ones(1, 64)), model(torch.ones(1, 64)))
    replica = model[0].weight_fake_quant._replicate_for_data_parallel()
    replica.scale = model[0].weight_fake_quant.scale * 1.0  # what DataParallel gives it: no leaf, no parameter
    assert torch.equal(replica(model[0].weight), model[0].weight_fake_quant(model[0].weight))


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_group_size_is_one_sentence(strict):
    with pytest.raises(qtutor.QtutorError, match="64 values in 0.weight_fake_quant.scale and this model 128: prepare"):
        learned().load_state_dict(learned(group_size=32).state_dict(), strict=strict)
    static = fq.FakeQuantizer("int8", "channel", observer=observers.MinMaxObserver())
    static.load_state_dict({"scale": torch.ones(3, 1)})  # a fresh one has nothing to compare with
    with pytest.raises(qtutor.QtutorError, match="3 scales for 4 blocks"):
        static(randn(4, 8))
    with pytest.raises(RuntimeError, match="Unexpected key"):  # a dynamic quantizer would not use it
        fq.FakeQuantizer("int8").load_state_dict({"scale": torch.ones(3, 1)})
    with pytest.raises(RuntimeError, match="Unexpected key"):  # nor a symmetric one a zero point
        static.load_state_dict({"scale": torch.ones(3, 1), "zero_point": torch.ones(3, 1)})


def test_statistics_go_where_the_model_goes():
    quantizer = fq.FakeQuantizer("int8", "tensor", observer=observers.MSEObserver())
    model = nn.Sequential(quantizer)
    with fq.calibrate(model):
        model(randn(8, 8))
        model.to(torch.bfloat16)
        assert quantizer.observer.lo.dtype == quantizer.observer.hi.dtype == torch.bfloat16
        model.float()
        model(2 * randn(8, 8))
    again = pickle.loads(pickle.dumps(model))
    assert_same(again(randn(8, 8)), model(randn(8, 8)))
    scale = quantizer.scale
    with fq.calibrate(copy.deepcopy(model)) as other:
        other(100 * randn(8, 8))
    assert quantizer.scale is scale and other[0].scale > scale


def test_a_learned_scale_of_zeros_comes_alive_and_may_change_its_sign():
    linear = nn.Linear(32, 4, bias=False)
    linear.weight.data[1] = 0.0  # a dead output, or a LoRA matrix before its first step
    model = fq.prepare(nn.Sequential(linear), "int4", learned=True)
    model[0].weight_fake_quant.scale.data[2] *= -1  # an optimizer's step that was too long
    x, wanted = torch.randn(64, 32), torch.randn(64, 32) @ torch.randn(32, 4)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    before = model[0].weight_fake_quant.scale.detach().clone()
    for _ in range(200):
        loss = (model(x) - wanted).square().mean(0)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.detach())
    assert (losses[-1] < losses[0]).all(), "no output is stuck"
    assert (model[0].weight_fake_quant.scale != before).all()


def test_calibrating_again_keeps_a_learned_scale_that_an_optimizer_knows():
    activation = fq.FakeQuantizer("int4", "tensor", observer=observers.MinMaxObserver(), learned=True)
    model = fq.prepare(nn.Sequential(nn.Linear(16, 8)), "int4", activation)
    with fq.calibrate(model):
        model(torch.randn(4, 16))
    scale = model[0].activation_fake_quant.scale
    began = scale.detach().clone()
    with fq.calibrate(model):
        model(torch.randn(4, 16) * 9)
    assert model[0].activation_fake_quant.scale is scale and scale > began
    with pytest.raises(qtutor.QtutorError, match="where an observer puts it"):
        fq.prepare(nn.Sequential(nn.Linear(16, 8)), "int4", fq.FakeQuantizer("int4", "tensor", learned=True))
