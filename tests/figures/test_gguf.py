"""Pictures of GGUF: they draw what is in the block, the formats, the mixtures and the recorded table."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_llama

from qtutor import QtutorError, gguf_blocks, gguf_export, llamacpp, results
from qtutor.figures import gguf as pictures

needs_llamacpp = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


@pytest.mark.slow
@needs_llamacpp
def test_pictures(tmp_path):
    f32 = gguf_export.export(tiny_llama.model(layers=2), tmp_path / "m.gguf", tokenizer=tiny_llama.tokenizer())
    block = np.arange(210, dtype=np.uint8)
    mixtures = {name: gguf_blocks.mixture(f32, name) for name in ("Q4_K_M", "IQ2_XS", "Q2_K")}
    for fig in (pictures.byte_map("Q6_K", block), pictures.bits_picture(), pictures.mixture_picture(mixtures)):
        ax = fig.axes[0]
        assert (ax.get_title() or ax.get_title("left")) and ax.get_ylabel() + ax.get_yticklabels()[0].get_text()
        fig.canvas.draw()
        plt.close(fig)
    with pytest.raises(QtutorError, match="10"):
        pictures.byte_map("Q4_K", np.zeros(10, np.uint8))


def test_table_and_picture_of_quality():
    data = results.load("gguf_quality", "cpu").frame()
    table = pictures.quality_table(data)
    assert list(table.index)[0] in ("F16", "BF16") and "Q4_0 + imatrix" in table.index
    assert all("±" in value for value in table["KLD mean"])
    assert table.loc["Q6_K", "KLD mean"] == "0.0062 ± 0.0001"  # the error over windows, not that of single tokens
    fig = pictures.quality_picture(data, "a title")
    assert fig.axes[0].get_yscale() == "log" and fig.axes[0].get_xlabel() == "bits per weight of the file"
    plt.close(fig)
    assert {pictures.family(name) for name in llamacpp.TYPES if name != "F32"} == set(pictures.FAMILIES)
    assert pictures.family("Q1_0") == pictures.family("TQ2_0") != pictures.family("Q8_0")
