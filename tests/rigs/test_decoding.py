"""decoding: the Llama without its wrapping is the same Llama, also in a CUDA graph."""

import pytest
import torch

from qtutor import course_model
from qtutor.rigs import decoding


def test_the_llama_without_its_wrapping_is_the_same_llama():
    model = course_model.load()
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(decoding.llama_logits(model, ids), expected)
        assert torch.allclose(decoding.llama_logits(model, ids, last_only=True)[:, 0], expected[:, -1], atol=1e-5)
        cache = decoding.FixedCache(model.config, 2, 40, "cpu", torch.float32)
        past = model(input_ids=ids[:, :39], use_cache=True).past_key_values
        for i, layer in enumerate(past.layers):
            cache.layers[i].keys[:, :, :39], cache.layers[i].values[:, :, :39] = layer.keys, layer.values
        step = decoding.llama_logits(model, ids[:, 39:], cache)
    assert torch.allclose(step[:, 0], expected[:, -1], atol=1e-4)


def test_compiled_layers_are_all_layers_and_look_alike(monkeypatch):
    """Without the compiler: each layer is compiled for fixed shapes, under one number, and computes what it did."""
    compiled, model = [], course_model.load()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(self.self_attn.layer_idx))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = decoding.llama_logits(model, ids)
        decoding.compile_layers(model)
        assert torch.equal(decoding.llama_logits(model, ids), expected)
    assert compiled == [0] * len(model.model.layers)


@pytest.mark.gpu
def test_a_cuda_graph_holds_its_calls():
    from qtutor import measure

    model = course_model.load(dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(0, 4096, (2, 40), device="cuda")
    with torch.no_grad():
        replay, logits = measure.captured(lambda: decoding.llama_logits(model, ids))
        ids.copy_(torch.randint(0, 4096, (2, 40), device="cuda"))
        replay()
        torch.testing.assert_close(logits, decoding.llama_logits(model, ids), rtol=0.02, atol=0.1)
        cache, token = decoding.FixedCache(model.config, 2, 64, "cuda", torch.bfloat16), ids[:, :1].clone()
        replay, logits = measure.captured(lambda: decoding.llama_logits(model, token, cache))
        token.copy_(ids[:, 1:2])
        replay()
        torch.testing.assert_close(logits, decoding.llama_logits(model, token, cache), rtol=0.02, atol=0.1)
