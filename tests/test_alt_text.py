"""Alternative text: it has the figure's words and numbers and no others; each picture of the notebooks has one."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from qtutor import alt_text, files, plots

NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def numbers(text: str) -> set[float]:
    return {float(match.rstrip(",").replace(",", "")) for match in NUMBER.findall(text)}


def test_a_line_its_limit_and_its_unnamed_copies():
    fig, ax = plots.figure(5, 3)
    ax.plot([1, 2, 3, 4], [8.25, 0.5, np.nan, 2.125], label="loss")
    ax.plot([1, 2], [7, 7], label="flat")
    for start in (3, 4):
        ax.plot([1, 2], [start, 9.5])
    ax.axhline(6.0, label="limit")
    ax.set(title="Training", xlabel="step", ylabel="loss (nats)", yscale="log")
    assert alt_text.describe(fig) == (
        "Training. x axis: step; y axis: loss (nats), logarithmic. loss: from 8.25 to 2.12, within 0.5 to 8.25; "
        "flat: 7; limit: a line at 6; 2 series without a name, 3 to 9.5.")  # fmt: skip
    plots.plt.close(fig)


def test_bars_points_and_maps():
    fig, axes = plots.figure(9, 3, ncols=4)
    axes[0].barh(["BF16", "Q4_K"], [137.96, 38.8], label="weights")
    axes[1].bar([f"t{i}" for i in range(9)], [4, 5, 6, 7, 1.5, 9, 12_345, 2, 3])
    axes[2].scatter([1, 2, 3], [10, 30, 20], label="runs")
    axes[2].errorbar([1, 2], [5, 6], [1, 1], fmt="o", label="with errors")
    image = axes[3].imshow(np.arange(6).reshape(2, 3))
    fig.colorbar(image, ax=axes[3], label="not a diagram")
    fig.suptitle("Four kinds")
    assert alt_text.describe(fig) == (
        "Four kinds. weights: BF16 138, Q4_K 38.8. 9 bars, from t4 1.5 to t6 12,345. with errors: with error bars, "
        "from 5 to 6; runs: 3 points, 10 to 30. a map of 2 by 3 values, 0 to 5.")  # fmt: skip
    plots.plt.close(fig)


def test_series_along_x_and_single_bars():
    fig, axes = plots.figure(9, 3, ncols=2)
    axes[0].errorbar([1.5, 0.25], [0, 1], xerr=[[0.1, 0.1], [0.1, 0.1]], fmt="o", label="decode")
    axes[0].set_yticks([0, 1], ["GGUF Q4_0", "BF16"])
    for left, size in ((0, 3), (3, 0.5)):
        axes[1].barh(0, size, left=left)
    assert alt_text.describe(fig) == ("decode: with error bars, from 1.5 to 0.25. "
                                      "2 series without a name, 0.5 to 3.")  # fmt: skip
    plots.plt.close(fig)


def test_what_is_too_long_is_counted():
    fig, axes = plots.figure(9, 3, ncols=8)
    for i, ax in enumerate(axes):
        for j in range(8):
            ax.plot([0, 1], [i, j], label=f"run {j}")
    text = alt_text.describe(fig)
    assert text.count("run 5") == 6 and "run 6" not in text and text.endswith("2 more. 2 more diagrams.")
    plots.plt.close(fig)


def test_no_number_comes_from_elsewhere():
    values = np.random.default_rng(0).lognormal(0, 3, 50)
    fig, ax = plots.figure(5, 3)
    ax.plot(values, label="values")
    seen = numbers(alt_text.describe(fig))
    assert len(seen) == 4
    assert all(any(np.isclose(number, value, rtol=6e-3) for value in values) for number in seen)
    plots.plt.close(fig)


def test_words_stand_in_for_data_that_is_words():
    fig, ax = plots.figure(3, 2)
    ax.text(0, 0, "s eeee mmm")
    ax.set_title("One byte")
    assert alt_text.describe(fig) == "One byte. s eeee mmm."
    plots.plt.close(fig)
    assert alt_text.attach(None) is None


PICTURES = [(path.stem, number, output["data"], output["metadata"]) for path in sorted(
    (files.ROOT / "notebooks").glob("*.ipynb")) for number, cell in enumerate(json.loads(path.read_text())["cells"])
    for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]  # fmt: skip


def test_every_picture_of_the_notebooks_has_a_text_of_its_own():
    texts = {}
    assert len(PICTURES) > 70
    for name, number, _, metadata in PICTURES:
        text = metadata.get("image/png", {}).get("alt", "")
        where = f"{name}, cell {number}"
        assert len(text.split()) >= 5, f"{where}: run it again, its picture has no alternative text: {text!r}"
        assert text not in texts, f"{where} and {texts[text]} have the same text"
        texts[text] = where


def test_no_text_says_its_title_twice():
    for name, number, _, metadata in PICTURES:
        sentences = [part.strip() for part in metadata.get("image/png", {}).get("alt", "").rstrip(".").split(". ")]
        titles = [part for part in sentences if " " in part and not re.match(r"[xy] axis:", part)
                  and not NUMBER.search(part)]  # fmt: skip
        assert len(titles) == len(set(titles)), f"{name}, cell {number}: {titles}"


@pytest.mark.slow
def test_a_notebook_attaches_it(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    from tools import notebooks

    code = "from qtutor import plots\nfig, ax = plots.figure(3, 2)\nax.plot([1, 4], [2, 8], label='a')"
    code += "\nplots.plt.show()"
    cells = [new_markdown_cell("# 00 · Start here"), new_code_cell(notebooks.SETUP), new_code_cell(code)]
    path = tmp_path / "00_start_here.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    notebooks.execute(path)
    shown = [output for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" for output in cell.outputs]
    assert [o.metadata for o in shown if "data" in o] == [{"image/png": {"alt": "a: from 2 to 8."}}]
