"""Pictures: their size, and labels that stay apart."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from qtutor import plots


def test_png_has_the_size_asked_for_and_closes_the_figure():
    plots.theme()
    fig, axes = plots.figure(6, 3, ncols=2, sharey=True)
    plots.histogram(axes[0], torch.randn(1000), label="weights")
    data = plots.png(fig)
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (540, 270)
    assert fig.number not in plots.plt.get_fignums()


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_do_not_overlap(scale):
    bits = np.array([2.06, 2.3, 2.6, 2.63, 3.4, 3.5, 3.9, 4.25, 4.5, 4.6, 4.8, 4.85, 5.5, 5.54, 5.7, 6.56, 8.5])
    fig, ax = plots.figure(8, 4)
    ax.set_yscale(scale)
    plots.quality_vs_bits(ax, bits, np.exp(-1.2 * bits), 0.1 * np.exp(-1.2 * bits), [f"IQ{b}_XS" for b in bits])
    fig.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == len(bits)
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    plots.png(fig)


def test_plain_ticks_are_numbers_as_people_write_them():
    fig, ax = plots.figure(4, 3)
    ax.plot([1, 2], [800, 3000])
    ax.set_yscale("log")
    plots.plain_ticks(ax.yaxis)
    fig.canvas.draw()
    assert {"1,000", "2,000"} <= {label.get_text() for label in ax.get_yticklabels()}
    assert not any(label.get_text() for label in ax.get_yticklabels(minor=True))
