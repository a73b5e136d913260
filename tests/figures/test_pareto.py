"""The trade-off's pictures draw every axis, and the explorer says what is left."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from tradeoff_rows import row, some_rows

from qtutor.decide import quality
from qtutor.decide.pareto import AXES, relative, with_cost
from qtutor.figures import pareto


@pytest.mark.parametrize("x", AXES)
def test_pictures(x):
    more = {"perplexity": 20.0, "perplexity_se": 0.1, "same_top": 0.9, "same_top_se": 0.01, "accuracy": 0.5,
            "accuracy_se": 0.02, "peak_gib": 1.0, "bits_per_weight": 4.0, "prefill_tokens_per_s": 9.0,
            "joules_per_prefill_token": 2.0, "time_to_first_token_ms": 30.0}  # fmt: skip
    rows = with_cost([r | more for r in some_rows()], 1, 400)
    fig = pareto.picture(rows, x, "decode speed" if x != "decode speed" else "kld", "title")
    fig.canvas.draw()
    assert fig.axes[0].get_xlabel() and fig.axes[0].get_ylabel() and fig.axes[0].texts
    plt.close(fig)


def test_relative_picture():
    made = relative([*some_rows(), row("GGUF F16", "gguf", 14, 1e-5, 300)], "decode_tokens_per_s")
    fig = pareto.relative_picture({"decode": made, "again": made}, "speed / speed of 16 bits", "title")
    fig.canvas.draw()
    assert {t.get_text() for t in fig.axes[0].get_yticklabels()} >= {"GGUF Q8_0", "GGUF Q4_0"}
    plt.close(fig)


def test_a_label_keeps_clear_of_error_bars():
    """A wide bar ran through the name of the point beside it."""
    wide = {"decode_tokens_per_s_low": 100, "decode_tokens_per_s_high": 900}
    fig = pareto.picture([row("GGUF Q8_0", "gguf", 8, 1e-3, 400) | wide, row("GGUF Q2_K", "gguf", 4, 0.9, 500)],
                         "decode speed", "kld")  # fmt: skip
    fig.canvas.draw()
    ax = fig.axes[0]
    (label,) = [text for text in ax.texts if text.get_text() == "Q8_0"]
    box, line = label.get_window_extent(), ax.transData.transform((400, 1e-3))[1]
    assert not box.y0 <= line <= box.y1
    plt.close(fig)


def test_losses_picture_joins_what_is_of_one_family():
    known = {kind: quality.Known(low, high, "") for kind, low, high in (("Q8_0", -0.001, 0.003), ("Q2_K", 0.1, 0.2))}
    losses = [(model, size, kind, known[kind], model == "course model") for kind in known
              for model, size in (("Llama-2-70B", 69e9), ("course model", 7e6), ("Llama-2-7B", 6.7e9))]  # fmt: skip
    fig = pareto.losses_picture(losses, "title")
    fig.canvas.draw()
    ax = fig.axes[0]
    assert [label.get_text().split("\n") for label in ax.get_xticklabels()] == [
        ["course model", "7 M"], ["Llama-2-7B", "6.7 B"], ["Llama-2-70B", "69 B"]]  # fmt: skip
    joined = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert len(joined) == 2 and all(round(b - a) == 1 for a, b in joined)  # a line for each type, 7B to 70B
    assert fig.legends[0].get_texts()[1].get_text() == "Q2_K" and ax.get_ylim()[0] > 0
    plt.close(fig)


@pytest.mark.slow
def test_explorer():
    box = pareto.explorer(some_rows() + [row("BF16", "float", 14, 1e-5, 800, batch=8)], "a CPU")
    ((x, y, batch), limits), words, image = [b.children for b in box.children[0].children], *box.children[1:]
    first = bytes(image.value)
    assert first.startswith(b"\x89PNG") and "on the front" in words.value
    x.value = "decode speed"
    assert bytes(image.value) != first
    batch.value = 8
    assert "<b>1</b> techniques" in words.value
    batch.value, x.value, y.value = 1, "size", "size"
    assert "different" in words.value
    y.value = "kld"
    limits[0].value = limits[0].options[1][1]
    limits[1].value = limits[1].options[1][1]
    limits[2].value = limits[2].options[-1][1]
    assert "Nothing meets" in words.value
