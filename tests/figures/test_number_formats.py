"""Bits and grids, drawn: what the widget and the pictures say is what other people's formats say."""

import math

import ipywidgets
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
import pytest
import torch

from qtutor import QtutorError
from qtutor.figures import number_formats

DTYPES = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2, "E3M2": ml_dtypes.float6_e3m2fn,
          "E2M3": ml_dtypes.float6_e2m3fn, "E2M1": ml_dtypes.float4_e2m1fn, "FP16": np.float16,
          "BF16": ml_dtypes.bfloat16, "INT4": ml_dtypes.int4, "INT8": np.int8}  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_every_code_means_what_ml_dtypes_says(name):
    fmt = number_formats.FORMATS[name]
    codes = np.arange(2**fmt.bits, dtype=np.uint8 if fmt.bits <= 8 else np.uint16)
    codes = codes[:: 1 if fmt.bits <= 8 else 7]
    with np.errstate(invalid="ignore"):  # signalling NaN among the codes
        values = codes.view(DTYPES[name]).astype(np.float64).tolist()
    for code, value in zip(codes.tolist(), values, strict=True):
        ours = number_formats.explain(fmt, code)[0]
        assert ours == value or (math.isnan(ours) and math.isnan(value))
        if math.isfinite(value) and value:
            assert number_formats.code_of(fmt, value) == code


def test_wide_values_have_the_bits_that_torch_stores():
    values = torch.tensor([0.0, 1.0, -2.7, 3.4e38, 1e-45, -1e-40, 65504.0])
    for value, code in zip(values.tolist(), values.view(torch.int32).tolist(), strict=True):
        assert number_formats.code_of(number_formats.FORMATS["FP32"], value) == code % 2**32


def test_the_formula_gives_the_value():
    for name, value in (("E4M3", -2.7), ("E2M1", 0.6), ("TF32", 1e-39), ("INT4", -3)):
        fmt = number_formats.FORMATS[name]
        stored, formula = number_formats.explain(fmt, number_formats.code_of(fmt, value))
        formula = formula.replace("−", "-").replace("×", "*").replace("^", "**").removeprefix("code ")
        assert eval(formula) == stored


def test_the_picture_shows_every_bit():
    figure = number_formats.bits_picture(2.7, ("E4M3", "INT4"))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "".join(text for text in texts if len(text) == 1) == "01000011" + "0011"
    assert any(text.endswith("= 2.75") for text in texts)
    plt.close(figure)


def test_the_grid_marks_what_torch_rounds_to():
    for log in (False, True):
        figure = number_formats.format_picture(("E4M3", "E5M2"), value=2.7, log=log)
        dots = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
        assert dots == [torch.tensor(2.7).to(dtype).item() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
        plt.close(figure)


def test_bits_codes_and_numbers_move_together():
    (chosen, number), code, bits, words, image = (
        child.children if isinstance(child, ipywidgets.HBox) else child
        for child in number_formats.bit_explorer().children)  # fmt: skip
    assert code.value == 0b0_1000_011 and "<b>2.75</b>" in words.value and len(bits) == 8
    bits[0].click()
    assert code.value == 0b1_1000_011 and "<b>-2.75</b>" in words.value and bits[0].description == "1"
    before = bytes(image.value)
    code.value = 1
    assert f"<b>{2.0**-9}</b>" in words.value and bytes(image.value) != before
    code.value = 127
    assert "<b>nan</b>" in words.value and image.layout.display == "none"
    number.value = 1e6
    assert "<b>448</b>" in words.value


@pytest.mark.parametrize("name", number_formats.FORMATS)
def test_the_widget_shows_every_format(name):
    explorer = number_formats.bit_explorer()
    explorer.children[0].children[0].value = name
    bits = explorer.children[2].children
    assert len(bits) == number_formats.FORMATS[name].bits == len([bit for bit in bits if bit.description in "01"])
    assert all("press to flip" in bit.tooltip for bit in bits)


def test_nan_has_no_code():
    with pytest.raises(QtutorError, match="NaN"):
        number_formats.code_of(number_formats.FORMATS["E4M3"], math.nan)
