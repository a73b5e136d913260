"""The pictures of the QAT notebook, on invented rows: what they compute, and that every state can be drawn."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from qtutor.figures import qat as figures


@pytest.fixture
def rows():
    def row(scheme, arm, seed, ratio, kld):
        return dict(scheme=scheme, arm=arm, seed=seed, perplexity=20 * ratio, perplexity_se=0.2, base_perplexity=20.0,
                    perplexity_ratio=ratio, perplexity_ratio_se=0.002, kld_mean=kld, kld_mean_se=0.001)  # fmt: skip

    found = []
    for scheme, lost in (("W8A8", 0.001), ("W3", 0.4)):
        found.append(row(scheme, "PTQ", -1, 1 + lost, lost))
        for seed in (0, 1):
            found.append(row("float", "fine-tuned", seed, 1.0, 0.0))
            found.append(row(scheme, "control", seed, 1 + 0.75 * lost, 0.8 * lost))
            found.append(row(scheme, "QAT", seed, 1 + (0.3 - 0.1 * seed) * lost, 0.5 * lost))
            found.append(row(scheme, "QAT, distilled", seed, 1 + 0.1 * lost, 0.1 * lost))
    return pd.DataFrame(found)


def title(axis):
    return axis.get_title() or axis.get_title(loc="left")


@pytest.mark.parametrize("lengths", [(700,), (100, 700)])
def test_recorded_arms(rows, lengths):
    rows = rows[rows["scheme"] != "float"]
    rows = pd.concat([rows.assign(steps=(rows["seed"] >= 0) * n) for n in lengths], ignore_index=True)
    by_scheme, by_steps = figures.recovery_picture(rows), figures.steps_picture(rows)
    assert {text.get_text() for text in by_scheme.legends[0].get_texts()} == set(rows["arm"])
    assert (by_steps is None) == (len(lengths) == 1)
    for fig in filter(None, (by_scheme, by_steps)):
        fig.canvas.draw()
        assert all(title(axis) and axis.get_xlabel() for axis in fig.axes)
        plt.close(fig)


def test_other_pictures(rows):
    ptq = rows[rows["arm"] == "PTQ"].assign(bits_per_weight=[8.1, 4.0])
    same = dict(seed=0, perplexity_ratio=1.02, perplexity_ratio_se_windows=0.002, kld_mean=0.02,
                kld_mean_se_windows=0.001)  # fmt: skip
    sizes = {"PTQ": 4.0, "PTQ, imatrix": 4.0, "QAT": 4.1}
    files = pd.DataFrame([dict(model=model, type="Q4_0", file_mb=size, **same) for model, size in sizes.items()])
    losses = {"control": [3.0] * 9, "QAT": [4.0] * 9, "QAT, distilled": [1.0] * 9}
    for fig in (figures.ptq_picture(ptq), figures.gguf_picture(files), figures.losses_picture(losses, "9 steps")):
        fig.canvas.draw()
        assert all(title(axis) and axis.get_xlabel() for axis in fig.axes)
        plt.close(fig)
