"""What converts a model to a technique: the sizes that come out, and that what cannot run here says so."""

from __future__ import annotations

import pytest
import torch

from qtutor import QtutorError, course_model, measure
from qtutor.decide import capacity
from qtutor.rigs import techniques


def test_int8_stores_what_it_says():
    plain = course_model.load()
    size, weights = measure.stored_bytes(techniques.build("torchao INT8 weight-only", where="cpu"))
    linears = [m for m in plain.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    linear, rows = sum(m.weight.numel() for m in linears), sum(m.out_features for m in linears)
    # in the layers one byte a weight, and for each output row a float32 scale and a zero point; else two bytes
    count = plain.num_parameters()
    assert weights == count and size == linear + 5 * rows + 2 * (count - linear)


def test_only_the_body_changes():
    model = techniques.build("torchao INT4 group 32", where="cpu")
    assert type(model.model.embed_tokens.weight.data) is torch.Tensor
    assert len(list(techniques.body_linears(model))) == 7 * len(model.model.layers)
    assert all(type(layer.weight.data) is not torch.Tensor for _, _, layer in techniques.body_linears(model))


def test_dtypes_and_the_emulation():
    ids = torch.arange(16)[None]
    with torch.no_grad():
        base = techniques.build("FP32", where="cpu")(ids).logits
        fp8 = techniques.build("FP8 emulated", where="cpu")(ids).logits
    assert base.dtype == torch.float32 and techniques.build("BF16", where="cpu").dtype == torch.bfloat16
    assert 1e-3 < ((fp8 - base).norm() / base.norm()).item() < 0.3


def test_random_weights_of_a_shape(monkeypatch):
    small = capacity.config_of("Llama-2-7B") | {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}
    monkeypatch.setitem(capacity.MODELS, "small", small | {"num_attention_heads": 4, "num_key_value_heads": 2})
    model = techniques.float_model("small", "cpu")
    assert model.dtype == torch.bfloat16 and model.config.num_key_value_heads == 2 and not model.training
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_transformer_engine_needs_its_gpu():
    with pytest.raises(QtutorError, match="FP8 units"):
        techniques.convert(course_model.load(), "FP8 (Transformer Engine)")
