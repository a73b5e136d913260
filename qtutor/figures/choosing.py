"""The decision guide as a table and a widget; what they show is decided in :mod:`qtutor.decide.choosing`.

    choosing.table(decide(need))           # one state, without widgets
    choosing.explorer(model="Llama-2-70B", users=8)
"""

from __future__ import annotations

import html
import math
import zlib
from dataclasses import replace

import ipywidgets

from .. import plots
from ..decide import capacity, hardware, speed
from ..decide.choosing import CHOICES, Decision, Need, decide
from .live import dropdown, live_picture

COLORS = {"yes": plots.PALETTE[2], "unknown": plots.PALETTE[1], "no": plots.PALETTE[3]}
DARK = {"yes": "#006644", "unknown": "#8a5a00", "no": "#a33c00"}  # the same, dark enough for words on white
LOSSES = (0.001, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1)


def left(frame):
    """A table of words with everything to the left (a pandas Styler)."""
    props = [("text-align", "left"), ("vertical-align", "top")]
    shown = frame.style.set_uuid(f"{zlib.crc32(frame.to_csv().encode()):x}")  # the same page for the same table
    return shown.set_table_styles([{"selector": part, "props": props} for part in ("th", "th.col_heading", "td")])


def table(decision: Decision, rows: int = 10):
    """The first ``rows`` options, the advice as caption, without columns that nobody asked for (a pandas Styler)."""
    hide = ["first token, s"] * (decision.need.ttft_ms == math.inf) + ["kWh / 1M"] * (decision.need.prefer != "energy")
    color = COLORS[decision.options[0].verdict]
    caption = [("caption-side", "top"), ("text-align", "left"), ("font-weight", "bold"), ("padding", "0.3em 0.8em"),
               ("border-left", f"4px solid {color}")]  # fmt: skip
    shown = left(decision.frame().head(rows).drop(columns=hide)).set_caption(html.escape(decision.sentence))
    shown = shown.map(lambda word: f"color: {DARK[word]}; font-weight: bold", subset=["will do"])
    return shown.set_table_styles([{"selector": "caption", "props": caption}], overwrite=False)


def _choice(label: str, options, value):
    """A dropdown of (name, value) pairs or plain values, in which ``value`` is one of the choices."""
    pairs = [one if isinstance(one, tuple) else (str(one), one) for one in options]
    if value not in [one for _, one in pairs]:
        pairs.append((getattr(value, "name", f"{value:g}" if isinstance(value, (int, float)) else str(value)), value))
    return dropdown(label, pairs, value, width=320)


def explorer(**start):
    """Requirements as controls, the decision below them; ``start`` sets fields of :class:`Need` to begin with."""
    need = Need(**({"model": "Llama-2-70B"} | start))
    decide(need)  # a name that is not known is said here, not in every redraw
    percent = [("any", math.inf), *[(f"{100 * x:g} %", x) for x in LOSSES]]
    controls = {
        "model": _choice("model", [*capacity.MODELS, *speed.MIXTURES], need.model),
        "device": _choice("device", list(hardware.DEVICES), need.device),
        "cards": _choice("cards, at most", [1, 2, 4, 8], need.cards),
        "users": _choice("users at once", [1, 2, 4, 8, 16, 32, 64], need.users),
        "context": _choice("context, tokens", [512, 1024, 2048, 4096, 8192, 16384, 32768], need.context),
        "keep_free_gib": _choice("keep free, GiB", [0.0, 1.0, 2.0, 4.0, 8.0], need.keep_free_gib),
        "tokens_per_s": _choice("tokens/s a user", [0, 5, 10, 15, 20, 30, 50, 100, 200], need.tokens_per_s),
        "ttft_ms": _choice("first token", [("any", math.inf), *[(f"{x:g} s", 1000.0 * x) for x in (0.2, 0.5, 1, 2, 5)]],
                           need.ttft_ms),
        "max_loss": _choice("perplexity lost", percent, need.max_loss),
        "can_train": _choice("can train", [("no", False), ("yes", True)], need.can_train),
        **{name: _choice(label, CHOICES[name], getattr(need, name))
           for name, label in (("engine", "engine"), ("kv_type", "type of cache"), ("prefer", "prefer"))},
    }  # fmt: skip
    layout = ipywidgets.Layout(grid_template_columns="repeat(auto-fit, minmax(330px, 1fr))")
    return live_picture(lambda **chosen: (table(decide(replace(need, **chosen))).to_html(), None),
                        ipywidgets.GridBox(list(controls.values()), layout=layout), **controls)  # fmt: skip
