"""Random GGUF files: the types that llama.cpp's quantizer chooses, and valid blocks, at a tiny size."""

import os
import types

import gguf
import numpy as np
import pytest

from qtutor import QtutorError, llamacpp
from qtutor.decide import capacity
from qtutor.rigs import random_gguf

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return random_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_gguf.TINY, "Q4_K_M")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS",
                                  "IQ3_XXS", "IQ2_XS", "TQ2_0", "MXFP4", "NVFP4"])  # fmt: skip
def test_types_are_those_of_the_quantizer(name, tmp_path):
    """Quantize a full-precision file of the same shape for real: same types, same sizes, tensor by tensor."""
    f16 = random_gguf.write(tmp_path / "f16.gguf", random_gguf.TINY, "F16")
    kind = llamacpp.TYPES[name]
    imatrix = None
    if kind.needs_imatrix:
        imatrix = {t.name: np.ones(t.shape[-1], np.float32) for t in llamacpp.check_gguf(f16).tensors
                   if len(t.shape) == 2}  # fmt: skip
    real = llamacpp.check_gguf(llamacpp.quantize(f16, tmp_path / "real.gguf", name, imatrix)) if name != "F16" else None
    made = llamacpp.check_gguf(random_gguf.write(tmp_path / "made.gguf", random_gguf.TINY, name))
    assert made.file_bytes - made.data_offset == capacity.size(random_gguf.TINY, name).tensor_bytes
    if real:
        assert made.metadata["general.file_type"] == real.metadata["general.file_type"]
        ours, theirs = ({(t.name, t.type, t.shape, t.nbytes) for t in file.tensors} for file in (made, real))
        assert ours == theirs
    assert _loads(made.path)


def _loads(path) -> bool:
    """llama.cpp loads it, with its own check that every block is valid."""
    lib = llamacpp.native()
    params = lib.llama_model_default_params()
    params.check_tensors, params.n_gpu_layers = True, 0
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if model:
        lib.llama_model_free(model)
    return bool(model)


def test_a_broken_block_would_be_noticed(tiny, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    data = bytearray(tiny.read_bytes())
    tensor = next(t for t in llamacpp.check_gguf(tiny).tensors if t.type == "Q4_K")
    data[tensor.offset : tensor.offset + 2] = np.float16(np.inf).tobytes()
    damaged.write_bytes(data)
    assert not _loads(damaged)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "IQ4_XS", "IQ3_S", "IQ2_XXS"])
def test_blocks_decode_to_normal_weights(kind):
    """gguf's dequantizer reads what was drawn: mean 0, standard deviation STD, less what so few bits lose."""
    weights = gguf.dequantize(random_gguf.blocks(kind, 512, seed=3), gguf.GGMLQuantizationType[kind])
    assert abs(weights.mean()) < 0.05 * random_gguf.STD
    assert 0.8 * random_gguf.STD < weights.std() < 1.1 * random_gguf.STD
    # the same draw, before it was quantized
    per_block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    drawn = np.random.default_rng(3).standard_normal((512, per_block), dtype=np.float32) * random_gguf.STD
    assert np.corrcoef(weights.ravel(), drawn.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_float_blocks(kind):
    data = random_gguf.blocks(kind, 4096, seed=1)
    weights = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).ravel()
    drawn = np.random.default_rng(1).standard_normal((4096, 1), dtype=np.float32).ravel() * np.float32(random_gguf.STD)
    assert np.allclose(weights, drawn, rtol=2**-7, atol=1e-7)


def test_same_arguments_same_bytes(tiny, tmp_path):
    again = random_gguf.write(tmp_path / "again.gguf", random_gguf.TINY, "Q4_K_M")
    other = random_gguf.write(tmp_path / "other.gguf", random_gguf.TINY, "Q4_K_M", seed=1)
    assert again.read_bytes() == tiny.read_bytes() != other.read_bytes()


def test_pieces_cover_each_tensor_once():
    pieces = list(random_gguf.pieces(12345, 5000, 1000, 300 + 7 * 1000, 256))
    at = 5000
    for offset, start, n in pieces:
        assert offset == at and 0 < n <= 256 and start + n <= 1000
        assert start == (300 + offset - 5000) % 1000  # as if the pool were endless
        at += n
    assert at == 5000 + 12345


def test_rows_of_a_matrix_differ(tmp_path):
    config = dict(random_gguf.TINY, vocab_size=4096)
    path = random_gguf.write(tmp_path / "m.gguf", config, "Q6_K")
    rows = {t.name: t.data for t in gguf.GGUFReader(path).tensors}["output.weight"]
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_real_shape_is_the_real_size():
    size = capacity.size("Llama-2-70B", "Q6_K")
    assert size.weights == 68_976_648_192
    assert abs(size.file_bytes - 56.59e9) < 0.01e9  # TheBloke/Llama-2-70B-Chat-GGUF


@pytest.mark.parametrize("call, words", [
    (lambda folder: random_gguf.write(folder / "a.gguf", random_gguf.TINY, "Q9"), "no quantization type"),
    (lambda folder: random_gguf.write(folder, random_gguf.TINY, "Q8_0"), "is a folder"),
    (lambda folder: random_gguf.write(folder / "a.gguf", "Llama-9", "Q8_0"), "no model"),
    (lambda folder: random_gguf.quantize_blocks("Q8_1", np.zeros(32)), "no tensor type"),
    (lambda folder: random_gguf.quantize_blocks("Q6_K", np.zeros(255)), "255 weights are no whole number"),
])  # fmt: skip
def test_one_sentence(call, words, tmp_path):
    with pytest.raises(QtutorError, match=words) as error:
        call(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_before_writing(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=10**9)
    monkeypatch.setattr(random_gguf.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QtutorError, match=r"1\.0 GB free and the file needs 56\.6 GB"):
        random_gguf.write(tmp_path / "big.gguf", "Llama-2-70B", "Q6_K")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_gguf, "_fill", full)
    with pytest.raises(QtutorError, match="No space left"):
        random_gguf.write(tmp_path / "m.gguf", random_gguf.TINY, "Q8_0")
    assert list(tmp_path.iterdir()) == []
