"""Random checkpoints: sizes to the byte, what transformers reads, a tokenizer that fills the vocabulary."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from qtutor import QtutorError
from qtutor.decide import capacity
from qtutor.rigs import random_checkpoint, random_gguf

CONFIG = random_gguf.TINY | {"vocab_size": 5000}
CODECS = importlib.util.find_spec("compressed_tensors") is not None


def read(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values())
    return {name: value for path in files for name, value in load_file(path).items()}


def weights(stored, key):
    """Codes times scales of one matrix, worked out by hand."""
    if key in stored:
        scale = stored.get(f"{key}_scale")
        return stored[key].float() * (scale.float() if scale is not None else 1)
    packed, scale, shape = (stored[f"{key}_{part}"] for part in ("packed", "scale", "shape"))
    codes = (packed[..., None] >> (4 * torch.arange(8, dtype=torch.int32)) & 15) - 8
    assert shape.tolist() == [packed.shape[0], packed.shape[1] * 8]
    return (codes.reshape(len(packed), -1, 128) * scale.float()[..., None]).reshape(shape.tolist())


@pytest.mark.parametrize("scheme", random_checkpoint.SCHEMES)
def test_codes_scales_and_bytes(scheme, tmp_path, monkeypatch):
    monkeypatch.setattr(random_checkpoint, "SHARD", 3_000_000)  # several files also at this size
    folder = random_checkpoint.write(tmp_path / "model", CONFIG, scheme)
    stored = read(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    declared = random_checkpoint.tensors(CONFIG, scheme)
    assert {name: tuple(value.shape) for name, value in stored.items()} == {n: s for n, (_, s) in declared.items()}
    assert sum(value.nbytes for value in stored.values()) == random_checkpoint.nbytes(CONFIG, scheme)
    for key in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        found = weights(stored, key)
        assert found.std() == pytest.approx(0.02, rel=0.08) and found.unique().numel() > 14
        assert torch.equal(stored["model.norm.weight"], torch.ones(256, dtype=torch.bfloat16))
    again = random_checkpoint.write(tmp_path / "again", CONFIG, scheme)
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_as_many_bytes_as_gguf_in_bf16():
    planned = capacity.size("Llama-2-70B", "BF16").types
    norms = 2 * (2 * 80 + 1) * 8192
    assert random_checkpoint.nbytes("Llama-2-70B", "BF16") - norms == planned["BF16"]
    eight = random_checkpoint.nbytes("Llama-2-7B", "FP8")
    assert eight == 2 * 2 * 32000 * 4096 + 6_476_005_376 + 2 * (65 * 4096) + 2 * 32 * (4 * 4096 + 2 * 11008 + 4096)


@pytest.mark.skipif(not CODECS, reason="compressed-tensors is not here: make llmc-env")
@pytest.mark.parametrize("scheme", random_checkpoint.SCHEMES)
def test_transformers_reads_the_same_weights(scheme, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = random_checkpoint.write(tmp_path / "model", CONFIG, scheme)
    stored = read(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.arange(64)[None]).logits
        assert logits.isfinite().all() and logits.std() > 0.1  # the first call also unpacks what is packed
    for layer, module in enumerate(model.model.layers):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            expected = weights(stored, f"model.layers.{layer}.{name}.weight")
            linear = module.get_submodule(name)
            with torch.no_grad():  # rows of the identity give the columns, whatever the module keeps inside
                given = linear.weight.float()
                given = given * linear.weight_scale.float() if given.abs().max() > 1 else given
            assert torch.allclose(given, expected, rtol=0.005, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 5000 and tokenizer.decode([4999]) == "w4999"
    ids = tokenizer.encode("for number in range(10): w4999")
    assert max(ids) < 4096 and tokenizer.decode(ids) == "for number in range(10): w4999"


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(QtutorError, match="no scheme 'INT3'"):
        random_checkpoint.nbytes(CONFIG, "INT3")
    with pytest.raises(QtutorError, match="multiple of 128"):
        random_checkpoint.write(tmp_path, capacity.llama(192, 512, 1, 4, 4, 5000, 256), "W4A16")
