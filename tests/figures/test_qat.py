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


def test_recovery_table(rows):
    table = figures.recovery_table(rows).set_index(["scheme", "arm"])
    assert table.loc[("W3", "QAT"), "mean"] == pytest.approx(0.75)
    assert table.loc[("W3", "QAT"), "spread"] == pytest.approx(0.1 / 2**0.5)  # of two values 0.1 apart
    assert table.loc[("W3", "control"), "mean"] == pytest.approx(0.25)
    assert table.loc["W3", "measurable"].all() and not table.loc["W8A8", "measurable"].any()
    against = figures.recovery_table(rows, against="control").set_index(["scheme", "arm"])
    assert against.loc[("W3", "QAT, distilled"), "mean"] == pytest.approx(0.65 / 0.75)
    assert "control" not in set(against.index.get_level_values("arm"))
    kld = figures.recovery_table(rows, "kld_mean").set_index(["scheme", "arm"])
    assert kld.loc[("W3", "QAT"), "mean"] == pytest.approx(0.5)


def test_recovery_means(rows):
    means = figures.recovery_means(rows)
    assert list(means.index) == ["W8A8", "W3"] and list(means.columns) == list(figures.ARM_STYLE)
    assert means.loc["W3", "PTQ"] == "28.00 ± 0.20"
    assert figures.recovery_means(rows, "kld_mean").loc["W3", "QAT"] == "0.2000 ± 0.0010"


@pytest.mark.parametrize("measure", ["perplexity", "kld_mean"])
@pytest.mark.parametrize("against", ["PTQ", "control"])
def test_recovery_picture(rows, measure, against):
    fig = figures.recovery_picture(rows, measure, against)
    assert title(fig.axes[0]) and any("nothing" in text.get_text() for text in fig.axes[0].texts)
    fig.canvas.draw()
    plt.close(fig)


def test_other_pictures(rows):
    ptq = rows[rows["arm"] == "PTQ"].assign(bits_per_weight=[8.1, 4.0])
    same = dict(seed=0, perplexity_ratio=1.02, perplexity_ratio_se=0.002, kld_mean=0.02, kld_mean_se=0.001)
    sizes = {"PTQ": 4.0, "QAT": 4.1}
    files = pd.DataFrame([dict(model=model, type="Q4_0", file_mb=size, **same) for model, size in sizes.items()])
    losses = {"control": [3.0] * 9, "QAT": [4.0] * 9, "QAT, distilled": [1.0] * 9}
    for fig in (figures.ptq_picture(ptq), figures.gguf_picture(files), figures.losses_picture(losses, "9 steps")):
        fig.canvas.draw()
        assert all(title(axis) and axis.get_xlabel() for axis in fig.axes)
        plt.close(fig)


def test_recovery_explorer(rows):
    box = figures.recovery_explorer(rows)
    before = bytes(box.children[1].value)
    box.children[0].children[1].value = "control"
    assert bytes(box.children[1].value) != before
