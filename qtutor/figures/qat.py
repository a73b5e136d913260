"""Pictures of the QAT notebook: what rounding costs, and what training brings back."""

from __future__ import annotations

from .live import live_picture

ARM_STYLE = {"PTQ": ("#666666", "s"), "control": ("#949494", "D"), "QAT": ("#de8f05", "o"),
             "QAT, distilled": ("#0173b2", "^")}  # fmt: skip
NOTHING_LOST = 0.005  # less than half a percent of perplexity: dividing by it says nothing


def ptq_picture(table):
    """Figure: what rounding alone costs, a line for each scheme, sorted by the stored bits of a weight.  ``table``: a
    row a scheme: ``scheme, bits_per_weight, perplexity_ratio, kld_mean`` and the errors (``_se``) of both."""
    from .. import plots

    table = table.sort_values(["bits_per_weight", "perplexity_ratio"], ascending=[True, False])
    y, lost, how = list(range(len(table))), 100 * (table["perplexity_ratio"] - 1), dict(ms=6, capsize=3, lw=1.2)
    fig, (left, right) = plots.figure(8.5, 3.9, ncols=2, sharey=True)
    left.errorbar(lost, y, xerr=200 * table["perplexity_ratio_se"], fmt="o", **how)
    left.axvline(0, color="black", lw=0.8)
    left.set_xscale("symlog", linthresh=1)
    left.set_xticks([0, 1, 10, 100, 1000, 10_000], ["0", "1", "10", "100", "1,000", "10,000"])
    left.set(title="Perplexity lost by rounding", xlabel="more perplexity than float (%)", xlim=(-1.3, 30_000))
    right.errorbar(table["kld_mean"], y, xerr=2 * table["kld_mean_se"], fmt="s", color=plots.PALETTE[1], **how)
    right.set(title="Distance from the float model", xlabel="mean KL divergence (nats)", xscale="log")
    left.set_yticks(y, [f"{row.scheme}: {row.bits_per_weight:.2f}" for row in table.itertuples()])
    left.set(ylabel="scheme: stored bits of a weight", ylim=(len(y) - 0.5, -0.5))
    return fig


def losses_picture(losses, title: str, smooth: int = 5):
    """Figure: ``losses``, {arm: nats per token of each step}, thin, and thick their running mean; distilled apart."""
    import numpy as np

    from .. import plots

    fig, (left, right) = plots.figure(8.5, 3.1, ncols=2, width_ratios=(1.3, 1))
    for name, values in losses.items():
        axis, style = right if "distilled" in name else left, "--" if name == "control" else "-"
        mean = np.convolve(values, np.ones(smooth) / smooth, "valid")
        axis.plot(range(1, len(values) + 1), values, color=ARM_STYLE[name][0], lw=0.8, alpha=0.25)
        axis.plot(np.arange(len(mean)) + (smooth + 1) / 2, mean, color=ARM_STYLE[name][0], lw=2, label=name, ls=style)
        axis.legend(fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.set(title=f"{title}: next token", xlabel="step", ylabel="cross-entropy (nats/token)")
    right.set(title="distilled", xlabel="step", ylabel="KL from the float model (nats/token)", ylim=(0, None))
    return fig


def recovery_table(rows, measure: str = "perplexity", against: str = "PTQ"):
    """Return a DataFrame: scheme, arm, mean and spread (standard deviation over seeds) of the recovered share, and
    ``measurable``: False where PTQ's perplexity is within two standard errors, or half a percent, of the float model's.

    ``rows``: of ``qat_recovery``.  ``measure``: perplexity or kld_mean.  ``against``: PTQ, or control (same seed).
    """
    from ..qat import recovered

    ptq, keys = rows[rows["arm"] == "PTQ"].set_index("scheme"), ["scheme"] if against == "PTQ" else ["scheme", "seed"]
    before = rows.loc[rows["arm"] == against, [*keys, measure]]
    trained = rows[rows["arm"].isin(set(ARM_STYLE) - {"PTQ", against})].merge(before, on=keys, suffixes=("", "_before"))
    original = trained["base_perplexity"] * (measure == "perplexity")  # the KL divergence of the float model is 0
    values = zip(trained[f"{measure}_before"], trained[measure], original, strict=True)
    trained["share"] = [recovered(*three) for three in values]
    table = trained.groupby(["scheme", "arm"], sort=False)["share"].agg(mean="mean", spread="std").reset_index()
    lost = ptq["perplexity_ratio"] - 1 > (2 * ptq["perplexity_ratio_se"]).clip(lower=NOTHING_LOST)
    return table.assign(measurable=table["scheme"].map(lost))


def recovery_means(rows, measure: str = "perplexity"):
    """Table (scheme x arm) of "mean over seeds ± standard error over tokens" from the rows of ``qat_recovery``, with
    the peak learning rate of the trained arms where the rows have it."""
    digits = 2 if measure == "perplexity" else 4
    mean = rows[rows["scheme"] != "float"].groupby(["scheme", "arm"], sort=False)[[measure, measure + "_se"]].mean()
    cells = mean.apply(lambda row: f"{row.iloc[0]:.{digits}f} ± {row.iloc[1]:.{digits}f}", axis=1).unstack("arm")
    cells = cells.reindex(mean.index.unique("scheme"))[[arm for arm in ARM_STYLE if arm in cells]].fillna("")
    if "rate" in rows:
        cells.insert(0, "rate", rows.groupby("scheme")["rate"].max().map("{:g}".format))
    names = {"perplexity": "perplexity", "perplexity_ratio": "perplexity / float"}
    return cells.rename_axis(columns=names.get(measure, "KL divergence, nats"))


def recovery_picture(rows, measure: str = "perplexity", against: str = "PTQ"):
    """Figure: the recovered share of each scheme; bars reach over one standard deviation between seeds."""
    from .. import plots

    table = recovery_table(rows, measure, against)
    schemes, arms = list(table["scheme"].unique()), [arm for arm in ARM_STYLE if arm in set(table["arm"])]
    low, high = -60, 160 if 100 * table["mean"][table["measurable"]].max() > 105 else 120
    fig, axis = plots.figure(8.5, 3.9)
    for place, arm in enumerate(arms):
        part, (color, marker) = table[(table["arm"] == arm) & table["measurable"]], ARM_STYLE[arm]
        x = [schemes.index(scheme) + 0.22 * (place - (len(arms) - 1) / 2) for scheme in part["scheme"]]
        shown = (100 * part["mean"]).clip(low, high)
        axis.errorbar(x, shown, yerr=100 * part["spread"].fillna(0), fmt=marker, ms=7, capsize=3, lw=1.3, color=color,
                      label="control (float steps, then rounded)" if arm == "control" else arm)  # fmt: skip
        for at, value, mean in zip(x, shown, 100 * part["mean"], strict=True):
            if value != mean:  # off the picture: the number instead
                axis.annotate(f"{mean:.0f} %", (at, value), xytext=(0, 9 if mean < 0 else -14), color=color,
                              textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    for at in {schemes.index(scheme) for scheme in table["scheme"][~table["measurable"]]}:
        axis.axvspan(at - 0.45, at + 0.45, color="0.5", alpha=0.12, lw=0)
        axis.text(at, 50, "nothing\nto recover", rotation=90, ha="center", va="center", fontsize=9, color="0.35")
    axis.hlines([0, 100], -0.5, len(schemes) - 0.5, color="black", lw=1, ls=["-", "--"])
    axis.set_xticks(range(len(schemes)), schemes)
    what = "perplexity" if measure == "perplexity" else "KL divergence"
    axis.set(title=f"Share of the lost {what} that training recovers, against {against}", ylim=(low - 5, high + 5),
             ylabel="recovered (%): 100 is the float model", xlabel="scheme")  # fmt: skip
    fig.legend(ncols=3, fontsize=8, loc="outside lower center", frameon=False)
    return fig


def recovery_explorer(rows):
    """Recovered shares of ``rows``: of perplexity or KL divergence, against PTQ or against the control."""
    from ipywidgets import Dropdown

    measure = Dropdown(options=[("perplexity", "perplexity"), ("KL divergence", "kld_mean")], description="measure")
    against = Dropdown(options=["PTQ", "control"], description="against")
    return live_picture(lambda **how: recovery_picture(rows, **how), measure=measure, against=against)


def gguf_picture(rows):
    """Figure: size of the file against its perplexity and its KL divergence from the float model (``qat_gguf``)."""
    from .. import plots

    fig, axes = plots.figure(8.5, 3.9, ncols=2)
    looks = {"PTQ": ("0.35", "s"), "PTQ, head in Q8_0": (plots.PALETTE[3], "D"), "QAT": (plots.PALETTE[0], "^")}
    for axis, column, factor, offset in zip(axes, ("perplexity_ratio", "kld_mean"), (100, 1), (1, 0), strict=True):
        y = factor * (rows[column] - offset)
        for name, (color, marker) in looks.items():
            one = rows["model"] == name
            axis.errorbar(rows["file_mb"][one], y[one], yerr=2 * factor * rows[f"{column}_se"][one], fmt=marker, ms=7,
                          capsize=3, lw=1.2, color=color, label=name)  # fmt: skip
        line = rows["file_mb"][rows["model"] == "PTQ"].sort_values()
        axis.plot(line, y[line.index], color="0.35", lw=1, ls=":", zorder=0)
        axis.set(xlabel="size of the file (MB)")
        axis.margins(x=0.12, y=0.12)
        plots.annotate(axis, rows["file_mb"], y, rows["type"].where(rows["model"] == "PTQ", ""))
    axes[0].axhline(0, color="black", lw=0.8)
    axes[0].set(title="Perplexity", ylabel="more than the float model (%)")
    axes[1].set(title="KL divergence", ylabel="mean KL from the float model (nats)", ylim=(0, None))
    axes[0].legend(fontsize=8)
    return fig
