"""Number formats, drawn: the bits of a code and what they mean, and the grid of a format."""

from __future__ import annotations

import math

import ipywidgets
import torch
from matplotlib.patches import Patch, Rectangle

from .. import formats, plots
from .live import dropdown, image_widget, redraw_on_change

FORMATS = formats.WIDE | formats.FORMATS
COLORS = {"sign": plots.PALETTE[3], "exponent": plots.PALETTE[0], "mantissa": plots.PALETTE[2], "integer": "#595959"}
WITH_BITS = ("FP32", "TF32", "BF16", "FP16", "E4M3", "E5M2", "E3M2", "E2M3", "E2M1", "INT8", "INT4")


def places(fmt) -> list[str]:
    """Return what each bit of a format belongs to, from the highest bit down: "sign", "exponent", ..."""
    if isinstance(fmt, formats.IntFormat):
        return ["integer"] * fmt.bits
    return ["sign"] + ["exponent"] * fmt.exponent_bits + ["mantissa"] * fmt.mantissa_bits


def explain(fmt, code: int) -> tuple[float, str]:
    """Return the value of a code, and the decoding formula with the code's bits filled in."""
    if isinstance(fmt, formats.IntFormat):
        return (code, f"code {code}") if code <= fmt.max else (code - 2**fmt.bits, f"code {code} − {2**fmt.bits}")
    top, steps = 2**fmt.exponent_bits - 1, 2**fmt.mantissa_bits
    minus, exponent, mantissa = code >> (fmt.bits - 1), code >> fmt.mantissa_bits & top, code % steps
    sign, implicit, power = -1.0 if minus else 1.0, int(exponent > 0), max(exponent, 1)
    if exponent == top and (fmt.specials == "ieee" or (fmt.specials == "nan" and mantissa == steps - 1)):
        value = math.nan if mantissa else sign * math.inf
        return value, f"exponent all ones, mantissa {mantissa}/{steps}"
    formula = f"{'−' if minus else '+'} ({implicit} + {mantissa}/{steps}) × 2^({power} − {fmt.bias})"
    return sign * (implicit + mantissa / steps) * 2.0 ** (power - fmt.bias), formula


def code_of(fmt, value: float) -> int:
    """Return the code of the number that ``value`` is rounded to; it saturates, and NaN is refused."""
    value = formats.round_to(torch.tensor(value, dtype=torch.float64), fmt).item()
    if isinstance(fmt, formats.IntFormat):
        return int(value) % 2**fmt.bits
    exponent = max(math.frexp(abs(value) or fmt.min_subnormal)[1] - 1, 1 - fmt.bias)
    steps = int(abs(value) / 2.0 ** (exponent - fmt.mantissa_bits))  # counts from 0 for subnormals, 2**mantissa_bits on
    return steps + ((exponent + fmt.bias - 1) << fmt.mantissa_bits) + ((value < 0) << (fmt.bits - 1))


def bits_picture(value: float = 2.7, names=WITH_BITS):
    """Figure: the bits that each format stores for ``value``, and the formula that gives the stored number back."""
    fig, axis = plots.figure(10.5, 0.7 + 0.36 * len(names))
    for row, name in enumerate(names):
        code, fmt = code_of(FORMATS[name], value), FORMATS[name]
        for place, (bit, field) in enumerate(zip(f"{code:0{fmt.bits}b}", places(fmt), strict=True)):
            axis.add_patch(Rectangle((place, row - 0.4), 1, 0.8, fc=COLORS[field], ec="white"))
            axis.text(place + 0.5, row, bit, color="white", ha="center", va="center", fontsize=9)
        stored, formula = explain(fmt, code)
        axis.text(fmt.bits + 0.5, row, f"{formula} = {stored:.8g}", va="center", fontsize=9)
    axis.set(title=f"What each format stores for {value:g}", xlim=(-0.5, 58), ylim=(len(names) - 0.4, -0.6), xticks=[])
    axis.set_yticks(range(len(names)), names)
    axis.grid(False)
    axis.legend(handles=[Patch(color=color, label=field) for field, color in COLORS.items()], loc="lower right")
    return fig


def format_picture(names=("E4M3", "E5M2", "E2M1", "INT4"), value: float = 2.7, log: bool = False):
    """Figure: one row of ticks per format (its grid), the value as a line, the nearest grid points as dots."""
    fig, axis = plots.figure(8.5, 1.3 + 0.5 * len(names))
    for row, name in enumerate(names):
        grid = formats.FORMATS[name].grid()
        grid = grid[grid > 0] if log else grid[grid.abs() <= 8.5]
        axis.vlines(grid.tolist(), row - 0.32, row + 0.32, color=plots.PALETTE[row], lw=1.3)
        nearest = formats.round_to(torch.tensor([value]), name).item()
        axis.plot([nearest], [row], "o", ms=9, color="black", mfc=plots.PALETTE[row], zorder=3)
    axis.axvline(value or math.nan, color="black", ls="--", lw=1.3)  # zero has no place on a log axis
    axis.set_yticks(range(len(names)), names)
    axis.set(title=f"Grids. Dashed line: {value:.3g}. Dots: the number it is rounded to",
             xlabel="value (log axis, positive half)" if log else "value (the part from -8.5 to 8.5)",
             xlim=(2.0**-17, 2.0**16.5) if log else (-8.5, 8.5), ylim=(len(names) - 0.4, -0.6))  # fmt: skip
    if log:
        axis.set_xscale("log", base=2)
    axis.grid(False, axis="y")
    return fig


def bit_explorer() -> ipywidgets.VBox:
    """Widget: flip the bits of a code, step through the codes, or type a number; the decoding formula follows."""
    chosen = dropdown("format", list(FORMATS), "E4M3")
    number = ipywidgets.FloatText(value=2.7, description="encode")
    code = ipywidgets.IntSlider(max=255, description="code", layout={"width": "620px"})
    square, white = {"width": "28px", "padding": "0"}, {"text_color": "white"}
    buttons = [ipywidgets.Button(layout=square, style=white) for _ in range(32)]
    bits, words, image = ipywidgets.HBox(), ipywidgets.HTML(), image_widget()
    for place, button in enumerate(reversed(buttons)):
        button.on_click(lambda _, worth=1 << place: setattr(code, "value", code.value ^ worth))

    def encode():
        code.max = 2 ** FORMATS[chosen.value].bits - 1
        code.value = code_of(FORMATS[chosen.value], number.value)

    def show():
        fmt = FORMATS[chosen.value]
        bits.children = buttons[-fmt.bits :]
        for button, bit, field in zip(bits.children, f"{code.value:0{fmt.bits}b}", places(fmt), strict=False):
            button.description, button.tooltip = bit, f"{field}: press to flip"
            button.style.button_color = COLORS[field]
        value, formula = explain(fmt, code.value)
        key = " · ".join(f"<b style='color: {COLORS[field]}'>{field}</b>" for field in dict.fromkeys(places(fmt)))
        words.value = f"{key}<p style='font-size: 120%'>{formula} = <b>{value:.9g}</b></p>"
        small = fmt.bits <= 8 and math.isfinite(value)  # larger grids are too dense to draw
        image.layout.display = "flex" if small else "none"
        if small:
            image.value = plots.png(format_picture([chosen.value], abs(value), log=True))

    redraw_on_change((chosen, number), encode)
    redraw_on_change((chosen, code), show)
    box = ipywidgets.VBox([ipywidgets.HBox([chosen, number]), code, bits, words, image])
    return box.add_class("qtutor-bit-explorer")
