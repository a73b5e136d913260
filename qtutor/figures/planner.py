"""Pictures and a widget for planning hardware, and pictures of what was measured.

:func:`planner` is the widget, :func:`plan_picture` the same picture without one.

    planner.memory_picture("Llama-2-70B", ("Q8_0", "Q6_K", "Q4_K_M"), 4096, ["H100 SXM"])
    planner.planner()
"""

from __future__ import annotations

import html

from .. import QtutorError, plots
from ..decide import capacity, hardware

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS")
CONTEXTS = (512, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
USERS = (1, 2, 4, 8, 16, 32, 64)
_PARTS = (("weights", plots.PALETTE[0], ""), ("KV cache", plots.PALETTE[1], "//"),
          ("compute buffers", plots.PALETTE[2], ".."), ("driver and libraries", plots.PALETTE[7], ""))  # fmt: skip
_MARKERS = "osD^vP"


def _stacked(ax, fits, chosen: str | None = None) -> None:
    """Horizontal stacked bars, one for each Fit; with ``chosen``, the others are pale."""
    for row, fit in enumerate(fits):
        left, alpha = 0.0, 1.0 if chosen in (None, fit.type) else 0.42
        sizes = fit.weights_gib, fit.kv_gib, fit.buffers_gib, fit.overhead_gib
        for part, (_, color, hatch) in zip(sizes, _PARTS, strict=True):
            ax.barh(row, part, left=left, color=color, alpha=alpha, hatch=hatch, edgecolor="white",
                    lw=0.4, height=0.7, zorder=2)  # fmt: skip
            left += part
        ax.annotate(f"{left:.1f}", (left, row), (4, 0), textcoords="offset points", va="center", ha="left",
                    fontsize=8.5, color="0.25", zorder=4, bbox={"fc": "white", "ec": "none", "pad": 0.8})  # fmt: skip
    ax.set_yticks(range(len(fits)), [fit.type for fit in fits])
    ax.set_ylim(len(fits) - 0.4, -0.6)
    ax.set_xlabel("device memory (GiB)")
    ax.grid(False, axis="y")


def _legend(fig, lines=()) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=p) for p, c, h in _PARTS]
    columns = 5 if len(lines) < 2 else 3
    fig.legend(handles=[*handles, *lines], loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)


def memory_picture(model="Llama-2-70B", types=TYPES, context: int = 4096, devices=("H100 SXM",), kv_type: str = "F16",
                   users: int = 1):  # fmt: skip
    """Figure: what each type needs, as stacked bars in GiB, against the memory of each of ``devices``."""
    cards = [hardware.device(one) for one in devices]
    fits = [capacity.fits(model, t, context, cards[0], kv_type, users) for t in types]
    fig, ax = plots.figure(8.5, 1.6 + 0.36 * len(fits))
    _stacked(ax, fits)
    styles = ("-", "--", ":", "-.")
    lines = [ax.axvline(card.memory_gib, color="black", lw=1.5, ls=styles[i % 4],
                        label=f"{card.name}: {card.memory_gib:.1f} GiB") for i, card in enumerate(cards)]  # fmt: skip
    widest = max(*(fit.total_gib for fit in fits), *(card.memory_gib for card in cards))
    ax.set_xlim(0, 1.1 * widest)
    people = "" if users == 1 else f" for each of {users} users"
    ax.set_title(f"{fits[0].model}, {context:,} tokens of context{people}, {fits[0].kv_type} cache")
    _legend(fig, lines)
    return fig


def plan_picture(model: str = "Llama-2-70B", type: str = "Q6_K", context: int = 4096, kv_type: str = "F16",
                 users: int = 1, device="H100 SXM"):  # fmt: skip
    """Figure: left, what the types around ``type`` need; right, the ceiling of tokens/s by users."""
    card = hardware.device(device)
    names = list(TYPES) if type in TYPES else [*TYPES, type]
    fits = [capacity.fits(model, t, context, card, kv_type, users) for t in names]
    fits.sort(key=lambda fit: -fit.weights_gib)
    fig, (left, right) = plots.figure(9, 3.9, ncols=2, width_ratios=(1.25, 1))
    _stacked(left, fits, type)
    left.set_xlim(0, 1.15 * max(fits[0].total_gib, card.memory_gib))
    line = left.axvline(card.memory_gib, color="black", lw=1.5, label=f"{card.name}: {card.memory_gib:.1f} GiB")
    left.set_title("Memory: what each type needs")
    rows = [capacity.fits(model, type, context, card, kv_type, n) for n in USERS]
    right.plot(USERS, [fit.ceiling_tokens_per_s for fit in rows], color="0.6", ls=":", lw=1.4)
    for fitting, look, name in ((True, {"marker": "o", "color": plots.PALETTE[0]}, "fits"),
                                (False, {"marker": "x", "color": plots.PALETTE[3], "ls": ""}, "does not fit")):
        part = [fit for fit in rows if fit.fits == fitting]
        if part:
            right.plot([fit.users for fit in part], [fit.ceiling_tokens_per_s for fit in part], **look, label=name)
    right.axvline(users, color="black", ls="--", lw=1, label="your choice")
    right.set_xscale("log", base=2)
    right.set_xticks(USERS, [str(n) for n in USERS])
    right.set_ylim(0, None)
    right.set(title=f"Speed: the ceiling of {type}", xlabel="users at once", ylabel="tokens/s, all users together")
    right.legend(loc="upper left")
    _legend(fig, [line])
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
    import ipywidgets

    from .. import llamacpp
    from .live import image_widget

    def dropdown(label, options, value):
        look = {"layout": ipywidgets.Layout(width="260px"), "style": {"description_width": "70px"}}
        return ipywidgets.Dropdown(options=options, value=value, description=label, **look)

    kinds = [name for name in llamacpp.TYPES if name not in ("F32", "MXFP4", "NVFP4", "Q1_0", "Q2_0")]
    models, types = dropdown("model", list(capacity.MODELS), model), dropdown("type", kinds, type)
    contexts = dropdown("context", [(f"{n:,} tokens", n) for n in CONTEXTS], 4096)
    caches, users = dropdown("cache", ["F16", "Q8_0", "Q4_0"], "F16"), dropdown("users", USERS, 1)
    devices = dropdown("device", list(hardware.DEVICES), device)
    price = ipywidgets.BoundedFloatText(value=hardware.DEVICES[device].usd_per_hour or 0, min=0, max=1000, step=0.1,
                                        description="USD/hour", layout=devices.layout, style=devices.style)  # fmt: skip
    image, text = image_widget(), ipywidgets.HTML()

    def redraw(_=None):
        choice = (models.value, types.value, contexts.value, caches.value, users.value, devices.value)
        try:
            image.value = plots.png(plan_picture(*choice))
            fit = capacity.fits(*choice[:3], choice[5], *choice[3:5])
            words = summary(fit, price.value)
            own = capacity.config_of(choice[0])["max_position_embeddings"]
            if choice[2] > own:
                words += f" (The model was trained for {own:,} tokens only.)"
        except QtutorError as error:
            words = str(error)
        text.value = f"<p style='max-width: 820px'>{html.escape(words)}</p>"

    def new_device(_):
        price.value = hardware.DEVICES[devices.value].usd_per_hour or 0
        redraw()

    for control in (models, types, contexts, caches, users, price):
        control.observe(redraw, names="value")
    devices.observe(new_device, names="value")
    redraw()
    first, second = ipywidgets.VBox([models, types, devices, price]), ipywidgets.VBox([contexts, caches, users])
    box = ipywidgets.VBox([ipywidgets.HBox([first, second]), text, image])
    box.add_class("qtutor-planner")
    return box


# ------------------------------------------------------------------------------------------------- what was measured


def _of_kind(rows, kind: str) -> list[dict]:
    found = [row for row in rows if row.get("kind") == kind and row.get("fits", True)]
    if not found:
        raise QtutorError(f"There are no rows of kind {kind!r}: record them with make results ONLY=llama70b.")
    return found


def speed_picture(rows, device: str = ""):
    """Figure: generation speed of each type under its ceiling, prompt speed, and joules a token where measured.

    ``rows``: of kind "model", as the recording ``llama70b`` has them.
    """
    models = sorted(_of_kind(rows, "model"), key=lambda row: -row["weights_gib"])
    panels = [("decode_tokens_per_s", "Generation, one sequence", "tokens/s", plots.PALETTE[0]),
              ("prefill_tokens_per_s", f"Prompt, {models[0]['prefill_tokens']} tokens", "tokens/s", plots.PALETTE[2]),
              ("joules_per_decode_token", "Energy of generation", "joules a token (whole GPU)", plots.PALETTE[1])]
    energy = all(row.get("joules_per_decode_token") for row in models)
    panels = panels if energy else panels[:2]
    fig, axes = plots.figure(9, 3.5, ncols=len(panels))
    places = range(len(models))
    for ax, (column, title, unit, color) in zip(axes, panels, strict=True):
        errors = [row.get(f"{column}_se") or 0 for row in models]
        ax.bar(places, [row[column] for row in models], color=color, width=0.6, capsize=3,
               yerr=errors if any(errors) else None, label="measured" if ax is axes[0] else None)  # fmt: skip
        ax.set(title=title, ylabel=unit, ylim=(0, None))
        ax.set_xticks(places, [row["type"] for row in models])
        ax.grid(False, axis="x")
    for place, row in zip(places, models, strict=True):
        if row.get("ceiling_tokens_per_s"):
            axes[0].hlines(row["ceiling_tokens_per_s"], place - 0.4, place + 0.4, color="black", lw=2,
                           label="memory bandwidth allows" if place == 0 else None)  # fmt: skip
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    fig.suptitle(device, fontsize=10, x=0.01, ha="left", color="0.35")
    return fig


def batch_picture(rows, device: str = ""):
    """Figure: tokens/s of all sequences together against their number, for each type; joules a token where measured."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    batches = _of_kind(rows, "batch")
    panels = [("decode_tokens_per_s", "Generation, all sequences together", "tokens/s"),
              ("joules_per_decode_token", "Energy", "joules a generated token")]  # fmt: skip
    panels = [panel for panel in panels if any(row.get(panel[0]) for row in batches)]
    fig, axes = plots.figure(9 if len(panels) > 1 else 6.5, 3.6, ncols=len(panels), squeeze=False)
    counts = sorted({row["batch"] for row in batches})
    for ax, (column, title, unit) in zip(axes[0], panels, strict=True):
        for number, name in enumerate(dict.fromkeys(row["type"] for row in batches)):
            mine = [row for row in batches if row["type"] == name and row.get(column)]
            ax.plot([row["batch"] for row in mine], [row[column] for row in mine], marker=_MARKERS[number % 6],
                    color=plots.PALETTE[number % 8], label=name)  # fmt: skip
        ax.set(title=title, ylabel=unit, xlabel="sequences at once", yscale="log")
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [str(n) for n in counts])
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend(fontsize=8.5)
    fig.suptitle(device, fontsize=10, x=0.01, ha="left", color="0.35")
    return fig
