"""gguf_blocks against the gguf package (sizes) and llama.cpp's own rules for mixtures."""

import gguf
import numpy as np
import pytest
import tiny_llama

from qtutor import QtutorError, gguf_blocks, gguf_export, gguf_file, llamacpp

needs_llamacpp = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


@pytest.fixture(scope="module")
def f32(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return gguf_export.export(tiny_llama.model(layers=9), path, tokenizer=tiny_llama.tokenizer())


def test_fields_fill_their_blocks():
    for kind, layout in gguf_blocks.LAYOUT.items():
        assert sum(field[1] for field in layout) == gguf_file.GGML[kind].nbytes, kind
        assert {field[2] for field in layout} <= set(gguf_blocks.ROLES)
        if kind != "Q2_0":  # newer than the gguf package
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == gguf_file.GGML[kind][1:]


def test_every_quantized_type_that_llama_cpp_stores_has_a_layout():
    assert set(gguf_file.STORED) - {"F32", "F16", "BF16"} == set(gguf_blocks.LAYOUT)


def test_bits_add_up():
    found = gguf_blocks.bits()
    assert list(found)[0] == "Q8_0" and found["Q4_K"]["codes"] == 4 and found["Q6_K"]["high"] == 2
    for name, quant in llamacpp.TYPES.items():
        if quant.base in found:
            assert sum(found[quant.base].values()) == pytest.approx(quant.bpw), name
    assert found["Q4_K"]["scales"] == 12 * 8 / 256 and found["Q4_K"]["d"] == 4 * 8 / 256


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



@pytest.mark.parametrize("call", [
    lambda: gguf_blocks.fields("Q4_K", np.zeros(143, np.uint8)),
    lambda: gguf_blocks.fields("Q9_K", np.zeros(144, np.uint8)),
])  # fmt: skip
def test_bad_input_is_one_sentence(call):
    with pytest.raises(QtutorError) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
