"""Pictures of the QAT notebook: what rounding costs, and what training brings back."""

from __future__ import annotations

COLOR = {"control": "#949494", "control, GPTQ": "#949494", "QAT": "#de8f05", "QAT, LSQ": "#d55e00",
         "QAT, distilled": "#0173b2", "QAT, distilled, LSQ": "#56b4e9"}  # of arms that train; the others are dark


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
        axis.plot(range(1, len(values) + 1), values, color=COLOR[name], lw=0.8, alpha=0.25)
        axis.plot(np.arange(len(mean)) + (smooth + 1) / 2, mean, color=COLOR[name], lw=2, label=name, ls=style)
        axis.legend(fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    fig.suptitle(title, x=0.01, ha="left")
    left.set(title="next token", xlabel="step", ylabel="cross-entropy (nats/token)")
    right.set(title="distilled: KL from float", xlabel="step", ylabel="nats/token", ylim=(0, None))
    return fig


def _arms(axis, rows, x: str, order, places=None):
    """A line of marks for each arm of ``rows``: mean KL divergence, and bars of two standard deviations over seeds."""
    for i, arm in enumerate(order):
        if len(part := rows[rows["arm"] == arm]):
            found = part.groupby(x, sort=False)["kld_mean"].agg(["mean", "std"])
            at = [places[key] + 0.8 * ((i + 0.5) / len(order) - 0.5) for key in found.index] if places else found.index
            axis.errorbar(at, found["mean"], yerr=2 * found["std"].fillna(0), fmt="so^Dv<>P*X"[i % 10], ms=6, capsize=3,
                          lw=1.2, ls="none" if places else "-", color=COLOR.get(arm, "0.2"), label=arm)  # fmt: skip
    axis.set(yscale="log", ylabel="KL from the float model (nats/token)")


def recovery_picture(rows):
    """Figure: the KL divergence from the float model that each arm leaves, a group of marks for each scheme."""
    from .. import plots

    schemes, order = list(rows["scheme"].unique()), list(rows["arm"].unique())
    fig, axis = plots.figure(8.5, 3.9)
    _arms(axis, rows, "scheme", order, {scheme: i for i, scheme in enumerate(schemes)})
    for at in range(1, len(schemes)):
        axis.axvline(at - 0.5, color="0.85", lw=0.8, zorder=0)
    axis.set_xticks(range(len(schemes)), schemes)
    plots.plain_ticks(axis.yaxis, span=50)
    axis.set(title="KLD from the float model, by scheme and arm", xlabel="scheme", xlim=(-0.5, len(schemes) - 0.5))
    fig.legend(ncols=4, fontsize=8, loc="outside lower center", frameon=False)
    return fig


def steps_picture(rows):
    """Figure: the KL divergence against the steps of training, a panel for each scheme that was trained for several
    lengths; dashed: the smallest one without training.  None where there is no such scheme."""
    from matplotlib.ticker import MaxNLocator

    from .. import plots

    trained = rows[rows["seed"] >= 0]
    order = list(trained["arm"].unique())
    schemes = [scheme for scheme, part in trained.groupby("scheme", sort=False) if part["steps"].nunique() > 1]
    if not schemes:
        return None
    fig, axes = plots.figure(8.5, 3.5, ncols=len(schemes), squeeze=False)
    for axis, scheme in zip(axes[0], schemes, strict=True):
        _arms(axis, trained[trained["scheme"] == scheme].sort_values("steps"), "steps", order)
        untrained = rows[(rows["scheme"] == scheme) & (rows["seed"] < 0)]
        if len(untrained):
            best = untrained.loc[untrained["kld_mean"].idxmin()]
            axis.axhline(best["kld_mean"], color="black", lw=1, ls="--")
            axis.set_title(f"{scheme} (dashed: {best['arm']})", fontsize=9)
        axis.set(xscale="log", xlabel="steps", ylabel="KL from float (nats/token)")
        plots.plain_ticks(axis.yaxis)
        axis.yaxis.set_major_locator(MaxNLocator(6))
        axis.set_xticks(sorted(set(trained["steps"])), [f"{n:,}" for n in sorted(set(trained["steps"]))])
        axis.minorticks_off()
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles, ncols=4, fontsize=8, loc="outside lower center", frameon=False)
    return fig


def gguf_picture(rows):
    """Figure: size of the file against its perplexity and its KL divergence from the float model (``qat_gguf``)."""
    from .. import plots

    fig, axes = plots.figure(8.5, 3.9, ncols=2)
    looks = {"PTQ": ("0.35", "s"), "PTQ, imatrix": (plots.PALETTE[2], "v"),
             "PTQ, head in Q8_0": (plots.PALETTE[3], "D"), "QAT": (plots.PALETTE[0], "^")}  # fmt: skip
    for axis, column, factor, offset in zip(axes, ("perplexity_ratio", "kld_mean"), (100, 1), (1, 0), strict=True):
        y = factor * (rows[column] - offset)
        for name, (color, marker) in looks.items():
            one = rows["model"] == name
            axis.errorbar(rows["file_mb"][one], y[one], yerr=2 * factor * rows[f"{column}_se_windows"][one],
                          fmt=marker, ms=7, capsize=3, lw=1.2, color=color, label=name)  # fmt: skip
        line = rows[rows["model"] == "PTQ"].sort_values("file_mb")
        axis.plot(line["file_mb"], y[line.index], color="0.35", lw=1, ls=":", zorder=0)
        axis.set(xlabel="size of the file (MB)")
        axis.margins(x=0.16, y=0.12)
        for row, height in zip(line.itertuples(), y[line.index], strict=True):  # clear of the bars and of the line
            at, side = ((-5, 7), "right") if row.file_mb < 4.6 else ((6, 7), "left")
            axis.annotate(row.type, (row.file_mb, height), xytext=at, ha=side, textcoords="offset points", fontsize=8.5)
    axes[0].axhline(0, color="black", lw=0.8)
    axes[0].set(title="Perplexity", ylabel="perplexity above the float model (%)")
    axes[1].set(title="KL divergence", ylabel="mean KL from the float model (nats)", ylim=(0, None))
    axes[0].legend(fontsize=8)
    return fig
