"""Pictures and a widget for planning hardware, and pictures of what was measured (notebook 09).

Every picture here draws numbers that :mod:`qtutor.decide.capacity` computes or :mod:`qtutor.rigs.llama70b` measures; there are none
of its own.  :func:`planner` is the widget, :func:`plan_picture` the same picture without one.

    planner.memory_picture("Llama-2-70B", ("Q8_0", "Q6_K", "Q4_K_M"), 4096, ["H100 SXM"])
    planner.planner()
"""

from __future__ import annotations

import html

from .. import QtutorError, plots
from ..decide import capacity

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS")
CONTEXTS = (512, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
USERS = (1, 2, 4, 8, 16, 32, 64)
PARTS = ("weights", "KV cache", "compute buffers", "driver and libraries")
_COLORS = (plots.PALETTE[0], plots.PALETTE[1], plots.PALETTE[2], plots.PALETTE[7])
_HATCHES = ("", "//", "..", "")
_MARKERS = "osD^vP"


def _parts(fit: capacity.Fit) -> tuple[float, ...]:
    return fit.weights_gib, fit.kv_gib, fit.buffers_gib, fit.overhead_gib


def _pale(color: str) -> tuple:
    from matplotlib.colors import to_rgb

    return tuple(0.42 * part + 0.58 for part in to_rgb(color))


def _stacked(ax, fits, chosen: str | None = None) -> None:
    """Horizontal stacked bars, one for each Fit; with ``chosen``, the others are pale."""
    for row, fit in enumerate(fits):
        left, pale = 0.0, chosen not in (None, fit.type)
        for part, color, hatch in zip(_parts(fit), _COLORS, _HATCHES, strict=True):
            ax.barh(row, part, left=left, color=_pale(color) if pale else color, hatch=hatch, edgecolor="white", lw=0.4,
                    height=0.7, zorder=2)  # fmt: skip
            left += part
        ax.annotate(f"{left:.1f}", (left, row), (4, 0), textcoords="offset points", va="center", ha="left",
                    fontsize=8.5, color="0.25", zorder=4, bbox={"fc": "white", "ec": "none", "pad": 0.8})  # fmt: skip
    names = [fit.type for fit in fits]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("device memory (GiB)")
    ax.grid(False, axis="y")


def _legend(fig, lines=()) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=p)
               for p, c, h in zip(PARTS, _COLORS, _HATCHES, strict=True)]  # fmt: skip
    columns = 5 if len(lines) < 2 else 3
    fig.legend(handles=[*handles, *lines], loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)


def memory_picture(model="Llama-2-70B", types=TYPES, context: int = 4096, gpus=("H100 SXM",), kv_type: str = "F16",
                   users: int = 1, title: str | None = None):
    """Figure: what each type needs, as stacked bars in GiB, against the memory of each of ``gpus``."""
    cards = [capacity.gpu_of(gpu) for gpu in gpus]
    fits = [capacity.fits(model, t, context, cards[0], kv_type, users) for t in types]
    fig, ax = plots.figure(8.5, 1.6 + 0.36 * len(fits))
    _stacked(ax, fits)
    styles = ("-", "--", ":", "-.")
    lines = [ax.axvline(card.memory_gib, color="black", lw=1.5, ls=styles[i % 4],
                        label=f"{card.name}: {card.memory_gib:.1f} GiB") for i, card in enumerate(cards)]  # fmt: skip
    widest = max(*(fit.total_gib for fit in fits), *(card.memory_gib for card in cards))
    ax.set_xlim(0, 1.1 * widest)
    people = "" if users == 1 else f" for each of {users} users"
    ax.set_title(title or f"{fits[0].model}, {context:,} tokens of context{people}, {fits[0].kv_type} cache")
    _legend(fig, lines)
    return fig


def plan_picture(model: str = "Llama-2-70B", type: str = "Q6_K", context: int = 4096, kv_type: str = "F16",
                 users: int = 1, gpu: str = "H100 SXM"):
    """Figure: left, what the types around ``type`` need, against ``gpu``; right, the ceiling of tokens/s by users."""
    card = capacity.gpu_of(gpu)
    names = list(TYPES) if type in TYPES else [*TYPES, type]
    fits = [capacity.fits(model, t, context, card, kv_type, users) for t in names]
    fits.sort(key=lambda fit: -fit.weights_gib)
    fig, (left, right) = plots.figure(9, 3.9, ncols=2, width_ratios=(1.25, 1))
    _stacked(left, fits, type)
    left.set_xlim(0, 1.15 * max(fits[0].total_gib, card.memory_gib))
    line = left.axvline(card.memory_gib, color="black", lw=1.5, label=f"{card.name}: {card.memory_gib:.1f} GiB")
    left.set_title("Memory: what each type needs")
    many = [n for n in USERS if n >= 1]
    rows = [capacity.fits(model, type, context, card, kv_type, n) for n in many]
    right.plot(many, [fit.ceiling_tokens_per_s for fit in rows], color="0.6", ls=":", lw=1.4)
    inside = [(n, fit.ceiling_tokens_per_s) for n, fit in zip(many, rows, strict=True) if fit.fits]
    outside = [(n, fit.ceiling_tokens_per_s) for n, fit in zip(many, rows, strict=True) if not fit.fits]
    if inside:
        right.plot(*zip(*inside, strict=True), "o-", color=plots.PALETTE[0], label="fits")
    if outside:
        right.plot(*zip(*outside, strict=True), "x", color=plots.PALETTE[3], ms=7, mew=2, label="does not fit")
    right.axvline(users, color="black", ls="--", lw=1, label="your choice")
    right.set_xscale("log", base=2)
    right.set_xticks(many, [str(n) for n in many])
    right.set_ylim(0, None)
    right.set(title=f"Speed: the ceiling of {type}", xlabel="users at once", ylabel="tokens/s, all users together")
    right.legend(loc="upper left")
    _legend(fig, [line])
    return fig


def summary(fit: capacity.Fit, usd_per_hour: float | None = None) -> str:
    """One or two plain sentences about a Fit: does it fit, with how much to spare, how fast at best, at what price."""
    verdict = (f"fits, with {fit.free_gib:.1f} GiB to spare" if fit.fits
               else f"does not fit: {-fit.free_gib:.1f} GiB too many")  # fmt: skip
    people = "one user" if fit.users == 1 else f"{fit.users} users"
    text = (f"{fit.model} in {fit.type} for {people} with {fit.context:,} tokens ({fit.kv_type} cache) needs "
            f"{fit.total_gib:.1f} of {fit.gpu.memory_gib:.1f} GiB on one {fit.gpu.name}: it {verdict}.")  # fmt: skip
    if fit.fits:
        each = "" if fit.users == 1 else f", {fit.ceiling_tokens_per_s / fit.users:.0f} for each"
        text += f" Its memory allows at most {fit.ceiling_tokens_per_s:.0f} tokens/s{each}."
        if usd_per_hour:
            text += f" The GPU costs {usd_per_hour:.2f} USD an hour."
    return text


def planner(model: str = "Llama-2-70B", type: str = "Q6_K", gpu: str = "H100 SXM"):
    """Widget: model, type, context, cache type, users and GPU against memory, ceiling and price.

    The price starts at the example of the GPU chosen and is yours to change.
    """
    import ipywidgets

    from .. import llamacpp
    from .live import image_widget

    kinds = [name for name in llamacpp.TYPES if name not in ("F32", "MXFP4", "NVFP4", "Q1_0", "Q2_0")]
    wide = {"layout": ipywidgets.Layout(width="260px"), "style": {"description_width": "70px"}}
    models = ipywidgets.Dropdown(options=list(capacity.MODELS), value=model, description="model", **wide)
    types = ipywidgets.Dropdown(options=kinds, value=type, description="type", **wide)
    contexts = ipywidgets.Dropdown(options=[(f"{n:,} tokens", n) for n in CONTEXTS], value=4096,
                                   description="context", **wide)  # fmt: skip
    caches = ipywidgets.Dropdown(options=["F16", "Q8_0", "Q4_0"], value="F16", description="cache", **wide)
    users = ipywidgets.Dropdown(options=list(USERS), value=1, description="users", **wide)
    gpus = ipywidgets.Dropdown(options=list(capacity.GPUS), value=gpu, description="GPU", **wide)
    price = ipywidgets.BoundedFloatText(value=capacity.GPUS[gpu].usd_per_hour or 0, min=0, max=1000, step=0.1,
                                        description="USD/hour", **wide)  # fmt: skip
    image, text = image_widget(), ipywidgets.HTML()

    def redraw(_=None):
        choice = (models.value, types.value, contexts.value, caches.value, users.value, gpus.value)
        try:
            image.value = plots.png(plan_picture(*choice))
            fit = capacity.fits(choice[0], choice[1], choice[2], choice[5], choice[3], choice[4])
            words = summary(fit, price.value)
            own = capacity.config_of(choice[0])["max_position_embeddings"]
            if choice[2] > own:
                words += f" (The model was trained for {own:,} tokens only.)"
        except QtutorError as error:
            words = str(error)
        text.value = f"<p style='max-width: 820px'>{html.escape(words)}</p>"

    def new_gpu(_):
        price.value = capacity.GPUS[gpus.value].usd_per_hour or 0
        redraw()

    for control in (models, types, contexts, caches, users, price):
        control.observe(redraw, names="value")
    gpus.observe(new_gpu, names="value")
    redraw()
    first, second = ipywidgets.VBox([models, types, gpus, price]), ipywidgets.VBox([contexts, caches, users])
    box = ipywidgets.VBox([ipywidgets.HBox([first, second]), text, image])
    box.add_class("qtutor-planner")
    return box


# ------------------------------------------------------------------------------------------------- what was measured


def _of_kind(rows, kind: str) -> list[dict]:
    return [row for row in rows if row.get("kind") == kind and row.get("fits", True)]


def _plain_log(axis) -> None:
    """Ticks at 1, 2, 5, 10, 20 ... as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def speed_picture(rows, device: str = ""):
    """Figure: generation speed of each type under its ceiling, prompt speed, and joules a token where measured.

    ``rows`` as :func:`qtutor.rigs.llama70b.measure` returns them, of several types.
    """
    models = sorted(_of_kind(rows, "model"), key=lambda row: -row["weights_gib"])
    if not models:
        raise QtutorError("There are no rows of a measured model: record them with llama70b.record first.")
    energy = all(row.get("joules_per_decode_token") for row in models)
    fig, axes = plots.figure(9, 3.5, ncols=3 if energy else 2)
    places, names = range(len(models)), [row["type"] for row in models]
    left, middle = axes[0], axes[1]
    left.bar(places, [row["decode_tokens_per_s"] for row in models], color=plots.PALETTE[0], width=0.6,
             yerr=[row.get("decode_tokens_per_s_se") or 0 for row in models], capsize=3, label="measured")  # fmt: skip
    if all(row.get("ceiling_tokens_per_s") for row in models):
        for place, row in zip(places, models, strict=True):
            left.hlines(row["ceiling_tokens_per_s"], place - 0.4, place + 0.4, color="black", lw=2,
                        label="memory bandwidth allows" if place == 0 else None)  # fmt: skip
    left.set(title="Generation, one sequence", ylabel="tokens/s", ylim=(0, None))
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    middle.bar(places, [row["prefill_tokens_per_s"] for row in models], color=plots.PALETTE[2], width=0.6,
               yerr=[row.get("prefill_tokens_per_s_se") or 0 for row in models], capsize=3)  # fmt: skip
    middle.set(title=f"Prompt, {models[0]['prompt_tokens']} tokens", ylabel="tokens/s", ylim=(0, None))
    if energy:
        axes[2].bar(places, [row["joules_per_decode_token"] for row in models], color=plots.PALETTE[1], width=0.6)
        axes[2].set(title="Energy of generation", ylabel="joules a token (whole GPU)", ylim=(0, None))
    for ax in axes:
        ax.set_xticks(places, names)
        ax.grid(False, axis="x")
    if device:
        fig.suptitle(device, fontsize=10, x=0.01, ha="left", color="0.35")
    return fig


def batch_picture(rows, device: str = ""):
    """Figure: tokens/s of all sequences together against their number, for each type; joules a token where measured."""
    batches = _of_kind(rows, "batch")
    if not batches:
        raise QtutorError("There are no rows of measured batches: record them with llama70b.record first.")
    energy = any(row.get("joules_per_decode_token") for row in batches)
    fig, axes = plots.figure(9 if energy else 6.5, 3.6, ncols=2 if energy else 1, squeeze=False)
    speed = axes[0][0]
    counts = sorted({row["batch"] for row in batches})
    size = {row["type"]: row["weights_gib"] for row in _of_kind(rows, "model")}
    names = sorted(dict.fromkeys(row["type"] for row in batches), key=lambda name: -size.get(name, 0))
    for number, name in enumerate(names):
        mine = sorted((row for row in batches if row["type"] == name), key=lambda row: row["batch"])
        look = {"marker": _MARKERS[number % 6], "color": plots.PALETTE[number % 8], "label": name}
        speed.plot([row["batch"] for row in mine], [row["decode_tokens_per_s"] for row in mine], **look)
        if energy:
            paid = [row for row in mine if row.get("joules_per_decode_token")]
            axes[0][1].plot([r["batch"] for r in paid], [r["joules_per_decode_token"] for r in paid], **look)
    speed.set(title="Generation, all sequences together", ylabel="tokens/s", yscale="log")
    if energy:
        axes[0][1].set(title="Energy", ylabel="joules a generated token", yscale="log")
    for ax in axes[0]:
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [str(n) for n in counts])
        ax.set_xlabel("sequences at once")
        _plain_log(ax.yaxis)
        ax.legend(fontsize=8.5)
    if device:
        fig.suptitle(device, fontsize=10, x=0.01, ha="left", color="0.35")
    return fig
