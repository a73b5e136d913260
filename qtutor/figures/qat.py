"""Pictures of the QAT notebook: what training recovers."""


from __future__ import annotations

from .live import live_picture

# ------------------------------------------------------------- notebook 06: QAT of a language model

ARM_STYLE = {"PTQ": ("#666666", "s"), "control": ("#949494", "D"), "QAT": ("#de8f05", "o"),
             "QAT, distilled": ("#0173b2", "^")}  # fmt: skip
NOTHING_LOST = 0.005  # less than half a percent of perplexity: dividing by it says nothing


def ptq_picture(table):
    """Figure: what rounding alone costs, a line for each scheme, sorted by the stored bits of a weight.

    ``table``: DataFrame with one row a scheme: ``scheme, bits_per_weight, ratio, ratio_se, kld_mean, kld_mean_se``.
    """
    from .. import plots

    table = table.sort_values(["bits_per_weight", "ratio"], ascending=[True, False])
    y = list(range(len(table)))
    fig, (left, right) = plots.figure(8.5, 3.9, ncols=2, sharey=True)
    left.errorbar(100 * (table["ratio"] - 1), y, xerr=200 * table["ratio_se"], fmt="o", ms=6, capsize=3, lw=1.2)
    left.axvline(0, color="black", lw=0.8)
    left.set_xscale("symlog", linthresh=1)
    left.set_xticks([0, 1, 10, 100, 1000, 10_000], ["0", "1", "10", "100", "1,000", "10,000"])
    left.set(title="Perplexity lost by rounding", xlabel="more perplexity than float (%)", xlim=(-1.3, 30_000))
    right.errorbar(table["kld_mean"], y, xerr=2 * table["kld_mean_se"], fmt="s", ms=6, capsize=3, lw=1.2,
                   color=plots.PALETTE[1])  # fmt: skip
    right.set(title="Distance from the float model", xlabel="mean KL divergence (nats)", xscale="log")
    names = [f"{name}: {bits:.2f}" for name, bits in zip(table["scheme"], table["bits_per_weight"], strict=True)]
    left.set_yticks(y, names)
    left.set(ylabel="scheme: stored bits of a weight", ylim=(len(y) - 0.5, -0.5))
    return fig


def losses_picture(losses, title: str, smooth: int = 5):
    """Figure: loss by step, a panel for each kind of loss.

    ``losses``: {arm: list of losses in nats per token}; the arm "QAT, distilled" has an axis of its own.
    """
    import numpy as np

    from .. import plots

    fig, (left, right) = plots.figure(8.5, 3.1, ncols=2, width_ratios=(1.3, 1))
    for name, values in losses.items():
        axis = right if "distilled" in name else left
        color = "0.45" if name == "control" else ARM_STYLE[name][0]
        mean = np.convolve(values, np.ones(smooth) / smooth, "valid")
        axis.plot(range(1, len(values) + 1), values, color=color, lw=0.8, alpha=0.45)
        axis.plot(np.arange(len(mean)) + (smooth + 1) / 2, mean, color=color, lw=2, label=name,
                  ls="--" if name == "control" else "-")  # fmt: skip
    left.set(title=f"{title}: next token", xlabel="step", ylabel="cross-entropy (nats/token)")
    right.set(title="distilled", xlabel="step", ylabel="KL from the float model (nats/token)", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=8)
    return fig


def recovery_table(rows, measure: str = "perplexity", against: str = "PTQ"):
    """Recovered share by scheme and arm, from the rows of ``qat_recovery`` (a DataFrame).

    Args:
        measure: ``"perplexity"`` or ``"kld_mean"``.
        against: ``"PTQ"``, or ``"control"`` (of the same seed).

    Returns a DataFrame: scheme, arm, mean and spread (standard deviation over seeds) of the share, seeds, and
    ``measurable``: False where PTQ's perplexity is within two standard errors, or half a percent, of the float model's.
    """
    import pandas as pd

    from ..qat import recovered

    found = []
    for scheme, part in rows[rows["scheme"] != "float"].groupby("scheme", sort=False):
        ptq = part[part["arm"] == "PTQ"].iloc[0]
        measurable = ptq["ratio"] - 1 > max(2 * ptq["ratio_se"], NOTHING_LOST)
        original = ptq["base_perplexity"] if measure == "perplexity" else 0.0
        control = part[part["arm"] == "control"].set_index("seed")[measure]
        for arm in ("control", "QAT", "QAT, distilled"):
            if arm == against:
                continue
            shares = [recovered(ptq[measure] if against == "PTQ" else control[row["seed"]], row[measure], original)
                      for _, row in part[part["arm"] == arm].iterrows()
                      if against == "PTQ" or row["seed"] in control.index]  # fmt: skip
            if shares:
                shares = pd.Series(shares)
                found.append(dict(scheme=scheme, arm=arm, mean=shares.mean(), spread=shares.std(), seeds=len(shares),
                                  measurable=bool(measurable)))  # fmt: skip
    return pd.DataFrame(found)


def recovery_means(rows, measure: str = "perplexity"):
    """Table (scheme x arm) of "mean over seeds ± standard error over tokens" from the rows of ``qat_recovery``."""
    error, digits = measure.removesuffix("_mean") + "_se", 2 if measure == "perplexity" else 4
    mean = rows[rows["scheme"] != "float"].groupby(["scheme", "arm"], sort=False)[[measure, error]].mean()
    cells = mean.apply(lambda row: f"{row[measure]:.{digits}f} ± {row[error]:.{digits}f}", axis=1).unstack("arm")
    arms = [arm for arm in ARM_STYLE if arm in cells]
    title = "perplexity" if measure == "perplexity" else "KL divergence, nats"
    return cells.reindex(mean.index.unique("scheme"))[arms].rename_axis(columns=title).fillna("")


def recovery_picture(rows, measure: str = "perplexity", against: str = "PTQ"):
    """Figure: the recovered share of each scheme; bars reach over one standard deviation between seeds."""
    from .. import plots

    table = recovery_table(rows, measure, against)
    schemes = list(dict.fromkeys(table["scheme"]))
    arms = [arm for arm in ARM_STYLE if arm in set(table["arm"])]
    fig, axis = plots.figure(8.5, 3.9)
    for place, arm in enumerate(arms):
        part = table[(table["arm"] == arm) & table["measurable"]].set_index("scheme")
        color, marker = ARM_STYLE[arm]
        x = [schemes.index(s) + 0.22 * (place - (len(arms) - 1) / 2) for s in part.index]
        shown = (100 * part["mean"]).clip(-60, 160)
        axis.errorbar(x, shown, yerr=100 * part["spread"].fillna(0), fmt=marker, ms=7, capsize=3, lw=1.3, color=color,
                      label={"control": "control (float steps, then rounded)"}.get(arm, arm))  # fmt: skip
        for at, value, mean in zip(x, shown, 100 * part["mean"], strict=True):
            if value != mean:  # off the picture: the number instead
                axis.annotate(f"{mean:.0f} %", (at, value), xytext=(0, 9 if mean < 0 else -14), color=color,
                              textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    for number, scheme in enumerate(schemes):
        if not table[table["scheme"] == scheme]["measurable"].any():
            axis.axvspan(number - 0.45, number + 0.45, color="0.5", alpha=0.12, lw=0)
            axis.text(number, 50, "nothing\nto recover", rotation=90, ha="center", va="center", fontsize=9,
                      color="0.35")  # fmt: skip
    for level, style in ((0, "-"), (100, "--")):
        axis.axhline(level, color="black", lw=1, ls=style)
    axis.set_xticks(range(len(schemes)), schemes)
    axis.grid(False, axis="x")
    axis.set_ylim(-65, 165 if (100 * table[table["measurable"]]["mean"]).max() > 105 else 125)
    what = "perplexity" if measure == "perplexity" else "KL divergence"
    axis.set(title=f"Share of the lost {what} that training recovers, against {against}",
             ylabel="recovered (%): 100 is the float model", xlabel="scheme")  # fmt: skip
    fig.legend(ncols=3, fontsize=8, loc="outside lower center", frameon=False)
    return fig


def recovery_explorer(machine: str = "h200"):
    """Recorded recovered shares: of perplexity or KL divergence, against PTQ or against the control (notebook 06)."""
    import ipywidgets

    from .. import results

    rows = results.load("qat_recovery", machine).frame()
    return live_picture(
        lambda **how: recovery_picture(rows, **how),
        measure=ipywidgets.Dropdown(options=[("perplexity", "perplexity"), ("KL divergence", "kld_mean")],
                                    description="measure"),
        against=ipywidgets.Dropdown(options=["PTQ", "control"], description="against"),
    )  # fmt: skip


def gguf_picture(rows):
    """Figure: size of the file against its perplexity and its KL divergence from the float model.

    ``rows``: DataFrame of ``qat_gguf``: model, type, file_mb, ratio, ratio_se, kld_mean, kld_mean_se, seed.
    """
    from .. import plots

    fig, (left, right) = plots.figure(8.5, 3.9, ncols=2)
    looks = {"PTQ": ("0.35", "s"), "PTQ, head in Q8_0": (plots.PALETTE[3], "D"), "QAT": (plots.PALETTE[0], "^")}
    for axis, column, factor, offset in ((left, "ratio", 100, 1), (right, "kld_mean", 1, 0)):
        points, labels = [], []
        for name, part in rows.groupby("model", sort=False):
            color, marker = looks.get(name, (plots.PALETTE[2], "o"))
            values = factor * (part[column] - offset)
            error = 2 * factor * part["ratio_se" if column == "ratio" else "kld_mean_se"]
            axis.errorbar(part["file_mb"], values, yerr=error, fmt=marker, ms=7, capsize=3, lw=1.2, color=color,
                          label=name)  # fmt: skip
            if name == "PTQ":
                points += list(zip(part["file_mb"], values, strict=True))
                labels += list(part["type"])
            else:  # no label, but the labels must keep clear of it
                points += [(part["file_mb"].mean(), values.mean())]
                labels += [""]
        axis.set(xlabel="size of the file (MB)")
        axis.margins(x=0.12, y=0.12)
        plots.annotate(axis, [p[0] for p in points], [p[1] for p in points], labels)
    left.axhline(0, color="black", lw=0.8)
    left.set(title="Perplexity", ylabel="more than the float model (%)")
    right.set(title="KL divergence", ylabel="mean KL from the float model (nats)", ylim=(0, None))
    left.legend(fontsize=8)
    return fig
