"""Pictures of the serving notebook: who is computed when, and latency and goodput against the rate of requests."""

from __future__ import annotations

import numpy as np

from .. import plots

STYLE = dict(zip("F16 Q8_0 Q4_K_M BF16 FP8 W4A16".split(), [*zip(plots.PALETTE, "os^", strict=False)] * 2, strict=True))


def timeline(table, slots: int, most: int = 16):
    """Figure: the first requests of one run (:func:`qtutor.rigs.serving.load`), a line each: waiting and prefill up to
    the first token, then decoding; below, how many are decoded at once."""
    shown = table[table["state"] == "successful"].head(most)
    fig, (top, low) = plots.figure(8.5, 4.6, nrows=2, sharex=True, height_ratios=(3, 1))
    y = np.arange(len(shown))
    top.barh(y, shown["first"] - shown["start"], left=shown["start"], color="#c9c9c9", label="waiting and prefill")
    top.barh(y, shown["last"] - shown["first"], left=shown["first"], color=plots.PALETTE[0], label="decoding")
    top.set(title=f"The first {len(shown)} requests, {slots} slots", ylabel="request", ylim=(len(shown) - 0.4, -0.6))
    top.legend(loc="upper right")
    edges = np.sort(np.concatenate([shown["first"], shown["last"]]))
    at_once = [int(((shown["first"] <= t) & (t < shown["last"])).sum()) for t in edges]
    low.step(edges, at_once, where="post", color=plots.PALETTE[0])
    low.axhline(slots, color="0.4", lw=0.8, ls="--")
    low.set(xlabel="seconds since the first request", ylabel="decoded\nat once", ylim=(0, slots + 0.6))
    return fig


def curves(rows, ttft_ms: float, itl_ms: float):
    """Figure: TTFT, inter-token latency and goodput against the offered rate, a colour a type.  ``rows``: open loops
    of a recording: ``type, rate_per_s, ttft_p50_ms, ttft_p95_ms, ... goodput_per_s`` with ``_low`` and ``_high``."""
    fig, axes = plots.figure(9.5, 3.6, ncols=3)
    for name, part in rows.groupby("type", sort=False):
        part, (color, marker) = part.sort_values("rate_per_s"), STYLE[name]
        for ax, column in zip(axes, ("ttft_p50_ms", "itl_p50_ms", "goodput_per_s"), strict=True):
            ax.plot(part["rate_per_s"], part[column], color=color, marker=marker, ms=5, label=name)
            if f"{column}_low" in part:
                ax.fill_between(*(part[c] for c in ("rate_per_s", f"{column}_low", f"{column}_high")), color=color,
                                alpha=0.2)  # fmt: skip
            if column.endswith("ms"):
                ax.plot(part["rate_per_s"], part[column.replace("p50", "p95")], color=color, ls=":", lw=1.2)
    for ax, limit, what in zip(axes, (ttft_ms, itl_ms), ("Time to first token", "Inter-token latency"), strict=False):
        ax.axhline(limit, color="0.35", lw=0.9, ls="--")
        ax.set(title=what, yscale="log", ylabel="ms: p50, dotted p95")
        plots.plain_ticks(ax.yaxis, 500)
    top = rows["rate_per_s"].max()
    axes[2].plot([0, top], [0, top], color="0.35", lw=0.9, ls="--")
    axes[2].set(title="Goodput", ylabel="requests per second\nwithin both limits",
                ylim=(0, 1.25 * rows["goodput_per_s"].max()))  # fmt: skip
    for ax in axes:
        ax.set_xlabel("offered requests per second")
    axes[0].legend()
    return fig


def loops(tables: dict):
    """Figure: time to first token of each request in the order of sending, for runs by name."""
    fig, ax = plots.figure(8, 3.3)
    for (name, table), color, marker in zip(tables.items(), plots.PALETTE, "os^", strict=False):
        ax.plot(table["start"], table["ttft_ms"], marker=marker, ms=4, lw=1, color=color, label=name)
    ax.set(title="The same server, two ways to ask", xlabel="sent (seconds since the first request)",
           ylabel="time to first token (ms)", ylim=(0, None))  # fmt: skip
    ax.legend()
    return fig
