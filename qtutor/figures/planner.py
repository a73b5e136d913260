"""Pictures of planned hardware and of what was measured; :func:`planner` is :func:`plan_picture` as a widget."""

from __future__ import annotations

import ipywidgets
import pandas as pd
from matplotlib.patches import Patch

from .. import llamacpp, plots
from ..decide import capacity, hardware
from .live import dropdown, live_picture

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS")
CONTEXTS = (512, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
USERS = (1, 2, 4, 8, 16, 32, 64)
PARTS = {"weights": (plots.PALETTE[0], ""), "KV cache": (plots.PALETTE[1], "//"),
         "compute buffers": (plots.PALETTE[2], ".."), "driver and libraries": (plots.PALETTE[7], "")}  # fmt: skip


def _stacked(ax, fits, chosen: str | None = None) -> None:
    """Horizontal stacked bars, one for each Fit; with ``chosen``, the others are pale."""
    for row, fit in enumerate(fits):
        left, alpha = 0.0, 1.0 if chosen in (None, fit.type) else 0.42
        sizes = fit.weights_gib, fit.kv_gib, fit.buffers_gib, fit.overhead_gib
        for size, (color, hatch) in zip(sizes, PARTS.values(), strict=True):
            ax.barh(row, size, left=left, color=color, alpha=alpha, hatch=hatch, edgecolor="white", lw=0.4, height=0.7,
                    zorder=2)  # fmt: skip
            left += size
        ax.annotate(f"{left:.1f}", (left, row), (4, 0), textcoords="offset points", va="center", ha="left",
                    fontsize=8.5, color="0.25", zorder=4, bbox={"fc": "white", "ec": "none", "pad": 0.8})  # fmt: skip
    ax.set_yticks(range(len(fits)), [fit.type for fit in fits])
    ax.set_ylim(len(fits) - 0.4, -0.6)
    ax.set_xlabel("device memory (GiB)")
    ax.grid(False, axis="y")


def _legend(fig, lines) -> None:
    handles = [Patch(fc=color, hatch=hatch, ec="white", label=part) for part, (color, hatch) in PARTS.items()]
    fig.legend(handles=[*handles, *lines], loc="outside lower center", ncols=5 if len(lines) < 2 else 3, frameon=False,
               fontsize=8.5)  # fmt: skip


def _limit(ax, card, style: str = "-"):
    """A line where the memory of a device ends."""
    return ax.axvline(card.memory_gib, color="black", lw=1.5, ls=style, label=f"{card.name}: {card.memory_gib:.1f} GiB")


def memory_picture(model="Llama-2-70B", types=TYPES, context: int = 4096, devices=("H100 SXM",)):
    """Figure: what each type needs, as stacked bars in GiB, against the memory of each of ``devices``."""
    cards = [hardware.device(one) for one in devices]
    fits = [capacity.fits(model, t, context, cards[0]) for t in types]
    fig, ax = plots.figure(8.5, 1.6 + 0.36 * len(fits))
    _stacked(ax, fits)
    lines = [_limit(ax, card, style) for card, style in zip(cards, ("-", "--", ":", "-.") * len(cards), strict=False)]
    ax.set_xlim(0, 1.1 * max(*(fit.total_gib for fit in fits), *(card.memory_gib for card in cards)))
    ax.set_title(f"{fits[0].model}, {context:,} tokens of context, {fits[0].kv_type} cache")
    _legend(fig, lines)
    return fig


def plan_picture(model: str = "Llama-2-70B", type: str = "Q6_K", context: int = 4096, kv_type: str = "F16",
                 users: int = 1, device="H100 SXM"):  # fmt: skip
    """Figure: left, what the types around ``type`` need; right, the ceiling of tokens/s by users."""
    card = hardware.device(device)
    fits = [capacity.fits(model, t, context, card, kv_type, users) for t in dict.fromkeys((*TYPES, type))]
    fits.sort(key=lambda fit: -fit.weights_gib)
    fig, (left, right) = plots.figure(9, 3.9, ncols=2, width_ratios=(1.25, 1))
    _stacked(left, fits, type)
    left.set_xlim(0, 1.15 * max(fits[0].total_gib, card.memory_gib))
    left.set_title("Memory: what each type needs")
    rows = [capacity.fits(model, type, context, card, kv_type, n) for n in USERS]
    right.plot(USERS, [fit.ceiling_tokens_per_s for fit in rows], color="0.6", ls=":", lw=1.4)
    for fitting, style, color, name in ((True, "o-", plots.PALETTE[0], "fits"),
                                        (False, "x", plots.PALETTE[3], "does not fit")):  # fmt: skip
        if part := [(fit.users, fit.ceiling_tokens_per_s) for fit in rows if fit.fits == fitting]:
            right.plot(*zip(*part, strict=True), style, color=color, label=name)
    right.axvline(users, color="black", ls="--", lw=1, label="your choice")
    right.set_xscale("log", base=2)
    right.set_xticks(USERS, map(str, USERS))
    right.set(title=f"Speed: the ceiling of {type}", xlabel="users at once", ylabel="tokens/s, all users together",
              ylim=(0, None))  # fmt: skip
    right.legend(loc="upper left")
    _legend(fig, [_limit(left, card)])
    return fig


def summary(fit: capacity.Fit, usd_per_hour: float | None = None) -> str:
    """A Fit in plain sentences: does it fit, with how much to spare, how fast at best, at what price."""
    verdict = (f"fits, with {fit.free_gib:.1f} GiB to spare" if fit.fits
               else f"does not fit: {-fit.free_gib:.1f} GiB too many")  # fmt: skip
    people = "one user" if fit.users == 1 else f"{fit.users} users"
    text = (f"{fit.model} in {fit.type} for {people} with {fit.context:,} tokens ({fit.kv_type} cache) needs "
            f"{fit.total_gib:.1f} of {fit.device.memory_gib:.1f} GiB on one {fit.device.name}: it {verdict}.")
    if fit.fits:
        each = "" if fit.users == 1 else f", {fit.ceiling_tokens_per_s / fit.users:.0f} for each"
        text += f" Its memory allows at most {fit.ceiling_tokens_per_s:.0f} tokens/s{each}."
        if usd_per_hour:
            text += f" The GPU costs {usd_per_hour:.2f} USD an hour."
    return text


def planner(model: str = "Llama-2-70B", type: str = "Q6_K", device: str = "H100 SXM"):
    """Widget: model, type, context, cache type, users and device against memory, ceiling and price."""

    def choice(label, options, value):
        return dropdown(label, options, value, 260, 70)

    types = [name for name in llamacpp.TYPES if name not in ("F32", "MXFP4", "NVFP4", "Q1_0", "Q2_0")]
    controls = {
        "model": choice("model", list(capacity.MODELS), model), "type": choice("type", types, type),
        "device": choice("device", list(hardware.DEVICES), device),
        "context": choice("context", [(f"{n:,} tokens", n) for n in CONTEXTS], 4096),
        "kv_type": choice("cache", ["F16", "Q8_0", "Q4_0"], "F16"), "users": choice("users", USERS, 1),
    }  # fmt: skip

    def draw(**chosen):
        words = summary(capacity.fits(**chosen), hardware.DEVICES[chosen["device"]].usd_per_hour)
        own = capacity.config_of(chosen["model"])["max_position_embeddings"]
        if chosen["context"] > own:
            words += f" (The model was trained for {own:,} tokens only.)"
        return f"<p style='max-width: 820px'>{words}</p>", plan_picture(**chosen)

    six = list(controls.values())
    return live_picture(draw, ipywidgets.HBox([ipywidgets.VBox(six[:3]), ipywidgets.VBox(six[3:])]), **controls)


def _rows_of(rows, kind: str) -> list[dict]:
    return [row for row in rows if row.get("kind") == kind and row.get("fits", True)]


def speed_picture(rows, device: str):
    """Figure: generation speed of each type under its ceiling, prompt speed, and joules a token where measured.
    ``rows``: of kind "model", as the recording ``llama70b`` has them."""
    models = sorted(_rows_of(rows, "model"), key=lambda row: -row["weights_gib"])
    panels = [("decode_tokens_per_s", "Generation, one sequence", "tokens/s", plots.PALETTE[0]),
              ("prefill_tokens_per_s", f"Prompt, {models[0]['prefill_tokens']} tokens", "tokens/s", plots.PALETTE[2]),
              ("joules_per_decode_token", "Energy of generation", "joules a token (whole GPU)", plots.PALETTE[1])]
    panels = panels if all(row.get("joules_per_decode_token") for row in models) else panels[:2]
    fig, axes = plots.figure(9, 3.5, ncols=len(panels))
    for ax, (column, title, unit, color) in zip(axes, panels, strict=True):
        errors = [row.get(f"{column}_se") or 0 for row in models]
        ax.bar(range(len(models)), [row[column] for row in models], color=color, width=0.6, capsize=3,
               yerr=errors if any(errors) else None, label="measured" if ax is axes[0] else None)  # fmt: skip
        ax.set(title=title, ylabel=unit, ylim=(0, None))
        ax.set_xticks(range(len(models)), [row["type"] for row in models])
        ax.grid(False, axis="x")
    for place, row in enumerate(models):
        if row.get("ceiling_tokens_per_s"):
            axes[0].hlines(row["ceiling_tokens_per_s"], place - 0.4, place + 0.4, color="black", lw=2,
                           label="memory bandwidth allows" if place == 0 else None)  # fmt: skip
    axes[0].autoscale(axis="y")  # the lines are above the bars
    axes[0].set_ylim(bottom=0)
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    fig.suptitle(device, fontsize=10, x=0.01, ha="left", color="0.35")
    return fig


def batch_picture(rows, device: str):
    """Figure: tokens/s of all sequences together against their number, for each type; joules a token where measured."""
    batches = pd.DataFrame(_rows_of(rows, "batch")).dropna(axis="columns", how="all")
    panels = [("decode_tokens_per_s", "Generation, all sequences together", "tokens/s"),
              ("joules_per_decode_token", "Energy", "joules a generated token")]  # fmt: skip
    panels = [panel for panel in panels if panel[0] in batches]
    fig, axes = plots.figure(9 if len(panels) > 1 else 6.5, 3.6, ncols=len(panels), squeeze=False)
    counts = sorted(batches["batch"].unique())
    for ax, (column, title, unit) in zip(axes[0], panels, strict=True):
        for number, (name, mine) in enumerate(batches.dropna(subset=column).groupby("type", sort=False)):
            ax.plot(mine["batch"], mine[column], marker=plots.MARKERS[number % 6], color=plots.PALETTE[number % 8],
                    label=name)  # fmt: skip
        ax.set(title=title, ylabel=unit, xlabel="sequences at once", yscale="log")
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, map(str, counts))
        plots.plain_ticks(ax.yaxis)
        ax.legend(fontsize=8.5)
    fig.suptitle(device, fontsize=10, x=0.01, ha="left", color="0.35")
    return fig
