"""gguf_blocks against the gguf package (sizes, dequantizers) and llama.cpp's own rules for mixtures."""

import gguf
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_llama

from qtutor import QtutorError, gguf_blocks, gguf_export, llamacpp

needs_llamacpp = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


@pytest.fixture(scope="module")
def f32(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return gguf_export.export(tiny_llama.model(layers=9), path, tokenizer=tiny_llama.tokenizer())


def test_fields_fill_their_blocks():
    for kind, layout in gguf_blocks.LAYOUT.items():
        weights, nbytes = gguf_blocks.size(kind)
        assert sum(field[1] for field in layout) == nbytes, kind
        assert {field[2] for field in layout} <= set(gguf_blocks.ROLES)
        if kind != "Q2_0":  # newer than the gguf package
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (weights, nbytes)


def test_every_quantized_type_that_llama_cpp_stores_has_a_layout():
    quantized = set(llamacpp._quantizable()) - {"F32", "F16", "BF16"}
    assert quantized == set(gguf_blocks.LAYOUT)


def test_bits_add_up():
    found = gguf_blocks.bits()
    assert list(found)[0] == "Q8_0" and found["Q4_K"]["codes"] == 4 and found["Q6_K"]["high"] == 2
    for name, quant in llamacpp.TYPES.items():
        if quant.base in found:
            assert sum(found[quant.base].values()) == pytest.approx(quant.bpw), name
    assert found["Q4_K"]["scales"] == 12 * 8 / 256 and found["Q4_K"]["d"] == 4 * 8 / 256


@needs_llamacpp
@pytest.mark.parametrize("kind, type", [("Q4_0", "Q4_0"), ("Q8_0", "Q8_0"), ("Q4_K", "Q4_K_S"), ("Q6_K", "Q6_K")])
def test_dismantled_blocks_are_gguf_s_weights(f32, tmp_path, kind, type):
    seen = 0
    for tensor in gguf.GGUFReader(llamacpp.quantize(f32, tmp_path / "m.gguf", type)).tensors:
        if tensor.tensor_type.name == kind:
            parts = gguf_blocks.dismantle(kind, tensor.data.reshape(-1, gguf_blocks.size(kind)[1]))
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(parts["weights"].reshape(expected.shape), expected), tensor.name
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_any_bytes_are_read_as_gguf_reads_them(kind):
    """Every code, every packed scale, negative scales: 2,000 blocks of random bytes, with finite float16s."""
    blocks = np.random.default_rng(0).integers(0, 256, (2000, gguf_blocks.size(kind)[1]), dtype=np.uint8)
    at = {"Q6_K": [209]}.get(kind, [1, 3] if kind == "Q4_K" else [1])
    blocks[:, at] &= 0xBF  # the exponent's top bit off: no infinity, no NaN
    with np.errstate(over="ignore"):
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    parts = gguf_blocks.dismantle(kind, blocks)
    assert np.array_equal(parts["weights"], expected)
    if kind == "Q4_K":
        assert parts["scales"].max() == parts["mins"].max() == 63 and parts["codes"].max() == 15


def test_fields_of_one_block():
    block = np.arange(144, dtype=np.uint8)
    rows = gguf_blocks.fields("Q4_K", block)
    assert [row["bytes"] for row in rows] == ["0-1", "2-3", "4-15", "16-143"]
    assert rows[0]["here"] == "00 01" and rows[3]["here"].endswith("...")


def use_more_bits(i, n):
    """llama-quant.cpp, use_more_bits."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@needs_llamacpp
@pytest.mark.parametrize("type, base", [("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")])
def test_mixture_follows_use_more_bits(f32, type, base):
    layers, others = gguf_blocks.mixture(f32, type)
    expected = ["Q6_K" if use_more_bits(i, 9) else base for i in range(9)]
    assert layers["attn_v"] == layers["ffn_down"] == expected
    assert set(layers["attn_q"] + layers["ffn_up"]) == {base} and others == {"token_embd": "Q6_K"}


@needs_llamacpp
def test_mixture_is_what_quantize_writes(f32, tmp_path):
    layers, others = gguf_blocks.mixture(f32, "Q2_K")
    done = {t.name: t.type for t in llamacpp.check_gguf(llamacpp.quantize(f32, tmp_path / "m.gguf", "Q2_K")).tensors}
    for kind, formats in layers.items():
        assert formats == [done[f"blk.{i}.{kind}.weight"] for i in range(9)]
    assert others["token_embd"] == done["token_embd.weight"]


def test_in_words():
    assert gguf_blocks.in_words(["Q4_K"] * 4) == "Q4_K" and gguf_blocks.in_words(["F16"]) == "F16"
    assert gguf_blocks.in_words(["Q6_K", "Q4_K", "Q4_K", "Q6_K"]) == "Q4_K; Q6_K in 0, 3"
    assert gguf_blocks.in_words(["Q6_K", "Q4_K", "Q4_K", "Q4_K", "Q6_K"]) == "Q4_K; Q6_K in 0, 4"


@needs_llamacpp
def test_pictures(f32):
    block = np.arange(210, dtype=np.uint8)
    for fig in (gguf_blocks.byte_map("Q6_K", block), gguf_blocks.bits_picture(),
                gguf_blocks.mixture_picture(f32, ["Q4_K_M", "IQ2_XS", "Q2_K"])):  # fmt: skip
        ax = fig.axes[0]
        assert ax.get_title() and ax.get_ylabel() + ax.get_yticklabels()[0].get_text()
        fig.canvas.draw()
        plt.close(fig)


@pytest.mark.parametrize("call", [
    lambda: gguf_blocks.size("Q9_K"),
    lambda: gguf_blocks.dismantle("IQ1_S", np.zeros((1, 50), np.uint8)),
    lambda: gguf_blocks.dismantle("Q4_K", np.zeros((1, 143), np.uint8)),
    lambda: gguf_blocks.dismantle("Q4_K", np.zeros(144, np.uint8)),
    lambda: gguf_blocks.dismantle("Q4_K", np.zeros((1, 144), np.int8)),
    lambda: gguf_blocks.byte_map("Q4_K", np.zeros(10, np.uint8)),
    lambda: gguf_blocks.fields("Q4_K", np.zeros(143, np.uint8)),
    lambda: gguf_blocks.fields("Q9_K", np.zeros(144, np.uint8)),
])  # fmt: skip
def test_bad_input_is_one_sentence(call):
    with pytest.raises(QtutorError) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
