"""QAT of the course model: torchao's run beside ours, and the way into a GGUF file that loses nothing."""

import copy
import logging

import numpy as np
import pytest
import torch

import qtutor
from qtutor import corpus, course_model, evaluate, fake_quant, gguf_export, llamacpp, packed, qat
from tools import record_qat

for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


@pytest.mark.slow
def test_training_with_torchao_gives_the_same_losses_gradients_and_codes(base, text):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    config = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))
    mine, theirs = copy.deepcopy(base), copy.deepcopy(base)
    fake_quant.prepare(mine, **qat.SCHEMES["W4A8"])
    body = theirs.model.layers  # torchao would take the head, too
    quantize_(body, QATConfig(config, step="prepare"))
    # Left alone, the two drift apart: their gradients differ in the last bits, and a scale of amax / 7.5 puts each
    # group's largest weight on the tie between -7 and -8. So they are compared at every step, from the same weights.
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01)
    stream = corpus.batches(text[0], 2, 64, seed=0)
    losses = []
    for _ in range(4):
        mine.load_state_dict(theirs.state_dict(), strict=False)
        batch = next(stream)
        losses.append([])
        for model in (mine, theirs):
            model.zero_grad()
            loss = record_qat.loss_of(model, batch)
            loss.backward()
            losses[-1].append(loss.item())
        pairs = zip(mine.named_parameters(), theirs.named_parameters(), strict=True)
        for (name, a), (other, b) in pairs:
            assert name == other and torch.equal(a, b)
            assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm(), name
        optimizer.step()
    assert all(ours == reference for ours, reference in losses)  # equal in every bit, at every step
    assert losses[0] != losses[-1]
    mine.load_state_dict(theirs.state_dict(), strict=False)
    quantize_(body, QATConfig(config, step="convert"))
    packed.convert(mine)
    ids = torch.from_numpy(text[1][:128].astype(np.int64))[None]
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (mine, theirs))
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-6
    for ours, theirs in zip(mine.model.layers, body, strict=True):
        stored, other = ours.mlp.up_proj.stored, theirs.mlp.up_proj.weight
        codes = packed.unpack_codes(stored.codes, 4, stored.shape[1]).to(torch.int8) - 8
        assert torch.equal(codes, other.qdata) and torch.equal(stored.dequantize(), other.dequantize())


# ---------------------------------------------------------------------------------------------- llama.cpp's grid


@pytest.fixture(scope="module")
def trained(base, text):
    model = fake_quant.prepare(copy.deepcopy(base), **qat.SCHEMES["Q4_0"])
    record_qat.train(model, text[0], steps=3, rate=3e-4, batch_size=4, context=64, teacher=base)
    return model


def test_q4_0_file_round_trip(trained, tmp_path):
    path = tmp_path / "q.safetensors"
    record_qat.save_q4_0(trained, path)
    weights = sum(p.numel() for p in trained.parameters())
    assert path.stat().st_size < 0.66 * weights  # 4.5 bits, 8.5 for a seventh of them
    loaded = qat.load_q4_0(path)
    expected = packed.bake(copy.deepcopy(trained))
    for (name, a), (_, b) in zip(loaded.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    path.write_bytes(path.read_bytes()[:100_000])
    for bad in (path, tmp_path / "missing.safetensors"):
        with pytest.raises(qtutor.QtutorError, match="restore"):
            qat.load_q4_0(bad)


@pytest.mark.slow
@pytest.mark.skipif(not llamacpp.available()[0], reason="llama.cpp is not here")
def test_the_gguf_file_holds_exactly_what_training_saw(base, trained, text, tmp_path):
    import gguf

    baked = packed.bake(copy.deepcopy(trained)).eval()
    source = gguf_export.export(baked, tmp_path / "f32.gguf", tokenizer=course_model.load_tokenizer())
    file = llamacpp.quantize(source, tmp_path / "q4_0.gguf", "Q4_0", tensor_types=qat.Q4_0_TENSORS)
    heads = {"attn_q": base.config.num_attention_heads, "attn_k": base.config.num_key_value_heads}
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    checked = 0
    for name, weight in baked.named_parameters():
        tensor = stored[gguf_export.gguf_name(name)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = weight.detach()
        for part, n in heads.items():
            if f".{part}." in tensor.name:
                weight = gguf_export.permute(weight, n)
        assert np.array_equal(values.reshape(weight.shape), weight.numpy()), name
        kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.Q4_0
        assert weight.ndim == 1 or tensor.tensor_type == kind
        checked += weight.ndim > 1
    assert checked == 7 * base.config.num_hidden_layers + 1

    # The same weights in float32: the same perplexity.  In Q4_0 llama.cpp also rounds what it multiplies with them to
    # 8 bits, which moves the perplexity by less than its standard error.
    tokens, targets = text[1], evaluate.targets_of(text[1])
    expected = evaluate.logits_of(baked, tokens, 512)
    found = {}
    for path in (source, file):
        with llamacpp.Model(path) as model:
            found[path] = evaluate.compare(expected, evaluate.logits_of(model, tokens, 512), targets)
    assert found[source].perplexity_ratio == pytest.approx(1, abs=1e-5) and found[source].kld_mean < 1e-8
    assert found[file].perplexity_ratio == pytest.approx(1, abs=5e-3) and found[file].kld_mean < 2e-3
