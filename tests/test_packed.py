"""Low-bit storage: what is stored is what training saw, in as many bytes as the format says."""

import copy

import gguf
import pytest
import torch
from probes import ODD, Tiny, assert_same, odd_values, randn
from torch import nn

import qtutor
from qtutor import fake_quant as fq
from qtutor import observers, packed, ste


@pytest.mark.parametrize("weight, activation, group_size", [
    ("int2", None, 32), ("int3", None, None), ("int4", "int8", 32), ("int5", "int8", 16), ("int6", None, None),
    ("int7", None, 32), ("int8", None, None), ("int8", "int8", None), ("E4M3", "E4M3", None), ("E2M1", None, 16),
    ("E3M2", None, None), (fq.FakeQuantizer("int4", "group", 32, symmetric=False), None, None),
    (fq.FakeQuantizer("int8", "tensor"), None, None), (fq.FakeQuantizer("int2", no_clipping=True), None, None),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_keeps_the_trained_numbers(weight, activation, group_size, dtype):
    model = fq.prepare(Tiny().to(dtype), weight, activation, group_size)
    x = randn(6, 64).to(dtype)
    with torch.no_grad():
        before = model(x)
        stored = packed.convert(copy.deepcopy(model))
        assert_same(stored(x), before)
    assert not any(isinstance(m, fq.FakeQuantLinear) for m in stored.modules())
    bits = ste.Target.of(weight).bits if isinstance(weight, str) else weight.target.bits
    rows = {row["layer"]: row for row in packed.weight_bytes(stored)}
    layer = stored.body[0]
    assert layer.codes.numel() == 96 * 64 * bits // 8
    assert rows["body.0"]["bytes"] == layer.nbytes < 96 * 64 * (bits + 4) / 8
    assert rows["lm_head"]["kind"] == str(dtype).removeprefix("torch.")
    fresh = packed.convert(fq.prepare(Tiny().to(dtype), weight, activation, group_size))
    fresh.load_state_dict(stored.state_dict())


def test_convert_never_silently_does_nothing():
    with pytest.raises(qtutor.QtutorError, match="nothing was converted"):
        packed.convert(Tiny())
    with pytest.raises(qtutor.QtutorError, match="nothing was converted"):
        packed.convert(packed.convert(fq.prepare(Tiny(), "int4")))


def test_what_codes_cannot_hold_is_refused():
    for codes in ([[-3, 5, 7, -8]], [[20, 3]]):
        with pytest.raises(qtutor.QtutorError, match="Codes of 4 bits lie in 0..15: add 8"):
            packed.pack_codes(torch.tensor(codes), 4)
    for change in (packed.convert, packed.bake):
        table = nn.Sequential(nn.Embedding(10, 32, max_norm=1.0), nn.Linear(32, 4))
        with pytest.raises(qtutor.QtutorError, match="'0' has max_norm"):
            change(fq.prepare(table, "int8", overrides={"0": "int8"}))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 8, 61])
def test_packing_round_trip(bits, n):
    codes = torch.randint(0, 2**bits, (5, n), dtype=torch.uint8)
    stored = packed.pack_codes(codes, bits)
    assert stored.dtype == torch.uint8 and stored.shape == (5, -(-n // 8) * bits)
    assert_same(packed.unpack_codes(stored, bits, n), codes)


def test_convert_of_a_single_linear_returns_the_new_module():
    linear = fq.prepare(nn.Linear(32, 8), "int4")
    assert isinstance(linear, fq.FakeQuantLinear)
    assert isinstance(packed.convert(linear), packed.QuantizedLinear)


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q4_0", "TQ2_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_blocks_are_stored_in_llama_cpps_bytes(name, dtype):
    layer = nn.Linear(512, 32, dtype=dtype)
    model = fq.prepare(nn.Sequential(layer), name)
    seen = model[0].weight_fake_quant(model[0].weight).detach()
    stored = packed.convert(copy.deepcopy(model))[0]
    assert torch.equal(stored.dequantize(), seen)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert stored.nbytes == 512 * 32 // block * size
    baked = packed.bake(model)
    assert type(baked[0]) is nn.Linear and torch.equal(baked[0].weight, seen)


def test_static_activation_that_saw_no_data_is_not_converted():
    activation = fq.FakeQuantizer("int8", "tensor", observer=observers.MinMaxObserver())
    model = fq.prepare(nn.Sequential(nn.Linear(16, 8)), "int8", activation)
    with pytest.raises(qtutor.QtutorError, match="calibrate"):
        packed.convert(model)


@pytest.mark.parametrize("target", ["int4", "MXFP4", "NVFP4", "Q8_0"])
def test_half_of_a_stored_model_computes_in_half_and_stores_the_same(target):
    model = packed.convert(fq.prepare(nn.Sequential(nn.Linear(64, 64)), target))
    weight = model[0].dequantize()
    before = {name: buffer.clone() for name, buffer in model[0].stored.named_buffers()}
    assert model.half()(torch.randn(2, 64).half()).dtype == torch.float16
    assert_same(model[0].dequantize(), weight.half())
    for name, buffer in model[0].stored.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer.float(), before[name].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", sorted(ste.TARGETS))
def test_odd_weights_are_stored_as_they_were_seen_or_refused(target, dtype):
    for kind in ODD:
        model = fq.prepare(nn.Sequential(nn.Linear(256, 2, bias=False, dtype=dtype)), target)
        model[0].weight.data.copy_(torch.cat([randn(1, 256), odd_values(kind)]))
        seen = model[0].weight_fake_quant(model[0].weight).detach()
        if seen.isfinite().all():
            for way in (packed.convert, packed.bake):
                made = way(copy.deepcopy(model))[0]
                assert_same(made.dequantize() if way is packed.convert else made.weight.detach(), seen)
        else:
            for way in (packed.convert, packed.bake):
                with pytest.raises(qtutor.QtutorError, match="'0' is NaN, infinite or too large"):
                    way(model)
            assert isinstance(model[0], fq.FakeQuantLinear)


def test_hooks_survive_every_swap_and_can_be_removed():
    heard, model = [], nn.Sequential(nn.Linear(32, 32))
    handles = [model[0].register_forward_hook(lambda *_: heard.append("after")),
               model[0].register_forward_pre_hook(lambda *_: heard.append("before")),
               model[0].register_full_backward_hook(lambda *_: heard.append("backward"))]  # fmt: skip
    x = torch.randn(2, 32, requires_grad=True)
    for step in (lambda: fq.prepare(model, "int4"), lambda: packed.convert(model), lambda: packed.bake(model)):
        step()
        heard.clear()
        model(x).sum().backward()
        assert heard == ["before", "after", "backward"]
    heard.clear()
    for handle in handles:
        handle.remove()
    model(x)
    assert not heard
