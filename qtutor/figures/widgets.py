"""Interactive explorers for the notebooks: each function returns a widget that redraws its picture.

The pictures are PNG bytes in an ``ipywidgets.Image``: nothing flickers, and a saved notebook still
shows them.  Each explorer has a plain function beside it that draws one state for readers without widgets.
"""

from __future__ import annotations

# ------------------------------------------------------------- notebook 05: fake quantization


def ste_picture(bits: int = 3, clip: float = 1.0):
    """Figure: the quantizer's forward staircase, and the gradient it really has beside the straight-through one.

    The grid is symmetric and ends at about ``clip`` (scale = clip / ((quant_max - quant_min) / 2)).
    """
    import matplotlib.pyplot as plt
    import torch

    from ..fake_quant import Target, choose_qparams, fake_quantize

    target, edge = Target.of(f"int{bits}"), torch.tensor([[clip]])
    scale, _ = choose_qparams(-edge, edge, target)
    x = torch.linspace(-2, 2, 2001, requires_grad=True)
    y = fake_quantize(x, scale.item(), None, target.quant_min, target.quant_max)
    y.sum().backward()
    low, high = (target.quant_min - 0.5) * scale.item(), (target.quant_max + 0.5) * scale.item()

    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    left.plot([-2, 2], [-2, 2], color="0.6", ls="--", lw=1, label="x (no quantization)")
    left.plot(x.detach(), y.detach(), color="C0", label=f"fake-quantized, {2**bits} values")
    left.set(title=f"Forward: int{bits}, scale = {scale.item():.3f}", xlabel="x (input)", ylabel="y (output)",
             ylim=(-2.1, 2.1))  # fmt: skip
    right.plot(x.detach(), torch.zeros_like(x).detach(), color="0.6", ls="--", label="true derivative (0 or none)")
    right.plot(x.detach(), x.grad, color="C1", label="straight-through estimate")
    right.set(title="Backward: dy/dx", xlabel="x (input)", ylabel="gradient", ylim=(-0.1, 1.45))
    for axis in (left, right):
        axis.axvspan(-2, low, color="0.5", alpha=0.12)
        axis.axvspan(high, 2, color="0.5", alpha=0.12, label="clipped")
        axis.set_xlim(-2, 2)
        axis.legend(loc="upper left" if axis is left else "upper center", fontsize=8, ncols=1 if axis is left else 2)
    return fig


def granularity_weight(outlier: float = 8.0):
    """A (64, 256) weight whose rows grow 10x from first to last, with a few input columns ``outlier`` times larger."""
    import torch

    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=g) * torch.logspace(-1, 0, 64)[:, None]
    weight[:, [37, 101, 230]] *= outlier
    return weight


GRANULARITIES = {"tensor": ("tensor", None), "channel": ("channel", None), "group of 128": ("group", 128),
                 "group of 32": ("group", 32), "group of 16": ("group", 16)}  # fmt: skip


def granularity_error(weight, bits: int, name: str):
    """(relative RMS error, stored bits per weight with 16-bit scales, fake-quantized weight) of one choice."""
    from ..fake_quant import FakeQuantizer

    granularity, group_size = GRANULARITIES[name]
    quantizer = FakeQuantizer(f"int{bits}", granularity, group_size)
    quantized = quantizer(weight)
    error = (quantized - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    return error.item(), bits + 16 * quantizer.qparams(weight)[0].numel() / weight.numel(), quantized


def granularity_picture(bits: int = 4, granularity: str = "channel", outlier: float = 8.0):
    """Figure: where the error of one choice sits, and all choices of granularity and bits against stored size."""
    import matplotlib.pyplot as plt

    weight = granularity_weight(outlier)
    error, stored, quantized = granularity_error(weight, bits, granularity)
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained", width_ratios=(1, 1.25))
    row_size = weight.square().mean(1, keepdim=True).sqrt()
    image = left.imshow(((quantized - weight).abs() / row_size)[:, :128], vmin=0, vmax=1, cmap="magma", aspect="auto",
                        interpolation="nearest")  # fmt: skip
    left.grid(False)
    left.set_title(f"int{bits} per {granularity}: |error| / RMS of the row", fontsize=10)
    left.set(xlabel="input feature (first 128)",
             ylabel="output channel")  # fmt: skip
    fig.colorbar(image, ax=left, label="relative error")
    for marker, name in zip("osD^v", GRANULARITIES, strict=True):
        points = [granularity_error(weight, b, name)[:2] for b in range(2, 9)]
        right.plot([p[1] for p in points], [p[0] for p in points], marker=marker, ms=4, lw=1, label=f"per {name}")
    right.plot(stored, error, "o", ms=13, mfc="none", mec="black", mew=1.5, label="your choice")
    right.set_title(f"All choices; yours: error {error:.3f} at {stored:.2f} bits", fontsize=10)
    right.set(yscale="log", ylim=(0.003, 1.5),
              xlabel="stored bits per weight (codes + 16-bit scales)", ylabel="RMS error / RMS weight")  # fmt: skip
    right.legend(fontsize=7.5, loc="lower left")
    return fig


def _image():
    """An empty picture that is shown in its own size: stretched to the page's width, it would blur."""
    import ipywidgets

    image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))
    image.add_class("qtutor-explorer-picture")
    return image


def _live_picture(draw, **controls):
    """Controls above a picture that is drawn anew when one moves; ``draw(**values)`` returns a figure."""
    import ipywidgets
    import matplotlib.pyplot as plt

    from .. import plots

    def render():
        fig = draw(**{name: control.value for name, control in controls.items()})
        try:
            return plots.png(fig)
        finally:
            plt.close(fig)

    image = _image()
    image.value = render()

    def redraw(_):
        image.value = render()

    for control in controls.values():
        control.observe(redraw, names="value")
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), image])


def ste_explorer():
    """Bits and clip range against the quantizer's forward and backward (notebook 05)."""
    import ipywidgets

    return _live_picture(
        ste_picture,
        bits=ipywidgets.IntSlider(3, 2, 8, description="bits"),
        clip=ipywidgets.FloatSlider(value=1.0, min=0.2, max=2.0, step=0.1, description="clip range"),
    )


def granularity_explorer():
    """Bits, granularity and outliers against the quantization error of a weight (notebook 05)."""
    import ipywidgets

    return _live_picture(
        granularity_picture,
        bits=ipywidgets.IntSlider(4, 2, 8, description="bits"),
        granularity=ipywidgets.Dropdown(options=list(GRANULARITIES), value="channel", description="scale per"),
        outlier=ipywidgets.FloatSlider(value=8.0, min=1.0, max=32.0, step=1.0, description="outliers x"),
    )


# ------------------------------------------------------------- notebook 01: number formats


def format_picture(names=("E4M3", "E5M2", "E2M1", "INT4"), value: float = 2.7, log: bool = False):
    """Figure: one row of ticks per format (its grid), the value as a line, the nearest grid points as dots."""
    import torch

    from .. import formats, plots

    fig, axis = plots.figure(8.5, 1.3 + 0.5 * max(1, len(names)))
    for row, name in enumerate(names):
        grid = formats.FORMATS[name].grid()
        grid = grid[grid > 0] if log else grid[grid.abs() <= 8.5]
        color = plots.PALETTE[row % 8]
        axis.vlines(grid.tolist(), row - 0.32, row + 0.32, color=color, lw=1.3)
        nearest = formats.round_to(torch.tensor([value]), name).item()
        axis.plot([nearest], [row], "o", ms=9, color="black", mfc=color, zorder=3, clip_on=True)
    if not log or value > 0:
        axis.axvline(value, color="black", ls="--", lw=1.3)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set(title=f"Grids; dashed: {value:.3g}, dots: its nearest point in each format",
             xlabel="value (log axis, positive half)" if log else "value (the part from -8.5 to 8.5)")  # fmt: skip
    if log:
        axis.set_xscale("log", base=2)
        axis.set_xlim(2.0**-17, 2.0**16.5)
    else:
        axis.set_xlim(-8.5, 8.5)
    axis.grid(False, axis="y")
    return fig


def _nearest_table(names, value: float) -> str:
    import torch

    from .. import formats

    rows = ""
    for name in names:
        nearest = formats.round_to(torch.tensor([value]), name).item()
        relative = f"{abs(nearest - value) / abs(value):.2%}" if value else "-"
        rows += f"<tr><td>{name}</td><td>{nearest:.5g}</td><td>{nearest - value:+.3g}</td><td>{relative}</td></tr>"
    head = "<tr><th>format</th><th>nearest</th><th>error</th><th>relative error</th></tr>"
    return f"<table style='border-spacing: 14px 2px; border-collapse: separate'>{head}{rows}</table>"


def format_explorer():
    """Formats, axis and a value to drag against the grids and the rounding error (notebook 01)."""
    import ipywidgets

    from .. import formats, plots

    names = [name for name in formats.FORMATS if name != "E8M0"]
    chosen = ipywidgets.SelectMultiple(options=names, value=("E4M3", "E5M2", "E2M1", "INT4"), rows=len(names),
                                       description="formats")  # fmt: skip
    scale = ipywidgets.ToggleButtons(options=["linear", "log"], description="axis")
    value = ipywidgets.FloatSlider(value=2.7, min=-8, max=8, step=0.01, description="value")
    image, table = _image(), ipywidgets.HTML()

    def redraw(_=None):
        image.value = plots.png(format_picture(chosen.value, value.value, scale.value == "log"))
        table.value = _nearest_table(chosen.value, value.value)

    for control in (chosen, scale, value):
        control.observe(redraw, names="value")
    redraw()
    box = ipywidgets.VBox([ipywidgets.HBox([chosen, ipywidgets.VBox([scale, value])]), image, table])
    box.add_class("qtutor-format-explorer")
    return box


# ------------------------------------------------------------- notebook 03: delayed scaling


def scaling_tensor(values: int = 4096):
    """Values (n,) spread over many powers of two, as a transformer's activations are; the largest one is 1."""
    import torch

    g = torch.Generator().manual_seed(3)
    x = torch.randn(values, generator=g) * torch.exp2(2.5 * torch.randn(values, generator=g))
    return x / x.abs().max()


SCENARIOS = ("one spike", "a jump that stays", "growth without end")


def _sizes(scenario: str, octaves: float, at: int, steps: int) -> list[float]:
    """What the largest value of each step is multiplied by, beside a wobble that every training has."""
    wobble = [2 ** (0.3 * ((step * 7) % 5 - 2) / 2) for step in range(steps)]
    event = {
        "one spike": [2.0**octaves if step == at else 1.0 for step in range(steps)],
        "a jump that stays": [2.0**octaves if step >= at else 1.0 for step in range(steps)],
        "growth without end": [2.0 ** (octaves / 16 * max(0, step - at)) for step in range(steps)],
    }[scenario]
    return [w * e for w, e in zip(wobble, event, strict=True)]


def delayed_scaling(history_len: int = 8, margin: int = 0, algorithm: str = "max", scenario: str = "one spike",
                    octaves: float = 10, at: int = 6, steps: int = 28) -> list[dict]:  # fmt: skip
    """Run delayed scaling in E4M3 on a tensor that something happens to; return one dict for each step.

    The keys: ``history`` (amaxes that the scale in use came from, oldest first), ``chosen`` (the one taken, None before
    there is one), ``scale`` (in use), ``top`` and ``bottom`` (largest and smallest normal number it can hold), ``amax``
    and ``low`` (of this step's tensor: largest, and first percentile of the magnitudes), ``saturated`` and ``lost``
    (shares beyond the top, and rounded to zero), ``error`` and ``error_current`` (relative RMS error, with this scale
    and with the scale that current scaling takes).  Without an amax the scale is 1, as in the library.
    """
    import torch

    def rounded(x, scale):
        return (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale

    base, history, scale, chosen, run = scaling_tensor(), [], 1.0, None, []
    spot = base.abs().argmax()
    for step, size in enumerate(_sizes(scenario, octaves, at, steps)):
        if scenario == "one spike":
            x = base.clone()
            x[spot] *= size  # one value of the tensor
        else:
            x = base * size  # all of it
        x = x * 4
        amax = x.abs().max().item()
        got, best = rounded(x, scale), rounded(x, 448 / amax)
        run.append(dict(
            step=step, history=history[-history_len:], chosen=chosen, scale=scale, top=448 / scale,
            bottom=2.0**-6 / scale, amax=amax, low=x.abs().quantile(0.01).item(),
            saturated=(x.abs() * scale > 448).float().mean().item(), lost=((got == 0) & (x != 0)).float().mean().item(),
            error=((got - x).norm() / x.norm()).item(),
            error_current=((best - x).norm() / x.norm()).item()))  # fmt: skip
        history.append(amax)
        chosen = max(history[-history_len:]) if algorithm == "max" else amax
        scale = 448 / chosen / 2**margin
    return run


def scaling_picture(step: int = 9, history_len: int = 8, margin: int = 0, algorithm: str = "max",
                    scenario: str = "one spike", octaves: float = 10, at: int = 6):  # fmt: skip
    """Figure: the amax history before ``step``, what the scale can hold against what comes, error and loss by step."""
    import matplotlib.pyplot as plt
    import numpy as np

    from .. import plots

    run = delayed_scaling(history_len, margin, algorithm, scenario, octaves, at)
    now, steps = run[step], np.arange(len(run))
    blue, orange, green, red, grey = (plots.PALETTE[i] for i in (0, 1, 2, 3, 7))
    amax, low, bottom, top = (np.array([row[key] for row in run]) for key in ("amax", "low", "bottom", "top"))
    over, edge = amax > top * 1.0001, np.append(steps, len(run)) - 0.5
    extent = max(min(low.min(), bottom.min()) / 2, 2.0**-18), max(amax.max(), top.max()) * 3

    fig = plt.figure(figsize=(8.5, 4.9), layout="constrained")
    one, two = fig.subfigures(1, 2, width_ratios=(1, 1.8))
    left, key = one.subplots(2, 1, height_ratios=(2.3, 1))
    reach, error, shares = two.subplots(3, 1, sharex=True, height_ratios=(1.8, 1, 1))
    before = np.array(now["history"])
    chosen = before == now["chosen"] if now["chosen"] is not None else np.zeros(len(before), bool)
    colors = [orange if is_chosen else grey for is_chosen in chosen]
    left.bar(np.arange(-len(before), 0), before - extent[0], bottom=extent[0], color=colors, width=0.8)
    left.bar([0], [now["amax"] - extent[0]], bottom=extent[0], color=red if over[step] else blue, width=0.8)
    left.axhspan(now["bottom"], now["top"], color=blue, alpha=0.15, lw=0)
    left.axhline(now["top"], color="black", lw=1.6)
    left.annotate("top of the format", (-history_len - 0.6, now["top"]), xytext=(2, 3), textcoords="offset points",
                  fontsize=8.5)  # fmt: skip
    left.set(title=f"Step {step}: history, and now", xlabel="steps ago (0: the tensor to quantize)", ylabel="amax",
             xlim=(-history_len - 0.7, 0.7))  # fmt: skip
    left.xaxis.get_major_locator().set_params(integer=True)

    band = reach.fill_between(edge, np.append(bottom, bottom[-1]), np.append(top, top[-1]), step="post", color=blue,
                              alpha=0.2, lw=0)  # fmt: skip
    bulk = reach.vlines(steps, low, amax, color=grey, lw=1.2)
    (fits,) = reach.plot(steps[~over], amax[~over], "o", ms=4, color=blue)
    (late,) = reach.plot(steps[over], amax[over], "X", ms=7, color=red)
    reach.set(title="What the scale in use can hold, and what comes", ylabel="magnitude")
    (delayed,) = error.semilogy(steps, [row["error"] for row in run], "-", color=blue)
    (current,) = error.semilogy(steps, [row["error_current"] for row in run], "--", color=orange)
    error.set(ylabel="relative\nerror", ylim=(5e-6, 3))
    (lost,) = shares.semilogy(steps, [max(row["lost"], 1e-6) for row in run], ".-", color=green)
    (saturated,) = shares.semilogy(steps, [max(row["saturated"], 1e-6) for row in run], "X", ms=5, color=red)
    shares.set(xlabel="step", ylabel="share of\nvalues", ylim=(5e-5, 3))
    for axis in (reach, error, shares):
        axis.axvline(step, color="black", lw=1, ls=":")
        axis.set_xlim(-0.7, len(run) - 0.3)
    for axis in (left, reach):
        axis.set_yscale("log", base=2)
        axis.set_ylim(*extent)
    key.axis("off")
    key.legend(
        [band, bulk, fits, late, delayed, current, lost],
        ["normal numbers at the scale in use", "the tensor, without its lowest 1 %", "amax",
         "amax that saturates (below: the share)", "error, delayed scaling", "error, current scaling",
         "share rounded to zero"],
        fontsize=8, loc="center", frameon=False, borderaxespad=0)  # fmt: skip
    return fig


def _scaling_sentence(step: int, margin: int, **settings) -> str:
    import math

    now = delayed_scaling(margin=margin, **settings)[step]
    source = "no amax yet: 1" if now["chosen"] is None else f"448 / {now['chosen']:.4g} / 2<sup>{margin}</sup>"
    room = math.log2(now["top"] / now["amax"])
    where = (f"{room:.1f} powers of two of headroom" if room >= -1e-4 else
             f"<b>{-room:.1f} powers of two too large: {now['saturated']:.2%} of the values saturate</b>")  # fmt: skip
    return (f"<div style='line-height: 1.4'><b>Step {step}</b>: "
            f"scale in use {now['scale']:.4g} ({source}), so the top is {now['top']:.4g}. "
            f"This tensor's amax is {now['amax']:.4g}: {where}; {now['lost']:.2%} round to zero. "
            f"Relative error {now['error']:.3g}; current scaling {now['error_current']:.3g}.</div>")  # fmt: skip


def scaling_explorer():
    """Step through delayed scaling: history length, margin, algorithm, and what happens to the tensor (notebook 03)."""
    import ipywidgets

    from .. import plots

    wide = {"description_width": "70px"}
    controls = dict(
        scenario=ipywidgets.Dropdown(options=SCENARIOS, description="event", style=wide),
        octaves=ipywidgets.IntSlider(10, 0, 14, description="size (2^n)", style=wide),
        history_len=ipywidgets.IntSlider(8, 1, 24, description="history", style=wide),
        margin=ipywidgets.IntSlider(0, 0, 8, description="margin", style=wide),
        algorithm=ipywidgets.Dropdown(options=["max", "most_recent"], description="algorithm", style=wide),
    )
    step = ipywidgets.IntSlider(5, 0, 27, description="step", style=wide)
    back, forth = ipywidgets.Button(description="◂ back"), ipywidgets.Button(description="next step ▸")
    for button in (back, forth):
        button.layout.width = "100px"
    image, sentence = _image(), ipywidgets.HTML()

    def redraw(_=None):
        settings = {name: control.value for name, control in controls.items()}
        image.value = plots.png(scaling_picture(step.value, **settings))
        sentence.value = _scaling_sentence(step.value, **settings)

    def move(by):
        step.value = min(max(step.value + by, step.min), step.max)

    back.on_click(lambda _: move(-1))
    forth.on_click(lambda _: move(1))
    for control in (step, *controls.values()):
        control.observe(redraw, names="value")
    redraw()
    columns = ((controls["scenario"], controls["octaves"]), (controls["history_len"], controls["margin"]),
               (controls["algorithm"], step))  # fmt: skip
    box = ipywidgets.VBox([ipywidgets.HBox([ipywidgets.VBox(column) for column in columns]),
                           ipywidgets.HBox([back, forth]), sentence, image])  # fmt: skip
    box.add_class("qtutor-scaling-explorer")
    return box


# ------------------------------------------------------------- notebook 04: will FP8 pay?


def breakeven_speedup(rows, hidden: float, tokens: float, graph: bool, column: str = "speedup") -> float:
    """Read the recorded map between its points: linear in the logarithms; beyond its edge, the value at the edge.

    Args:
        rows: DataFrame of ``fp8_breakeven``: hidden, tokens, graph, speedup, ms_bf16, ms_fp8 on a full grid.
        hidden, tokens: the size of the layer and of the batch.
        graph: replayed from a CUDA graph, or launched from Python.
        column: which figure, all of them positive.
    """
    import numpy as np

    grid = rows[rows["graph"] == graph].pivot(index="hidden", columns="tokens", values=column).sort_index()
    across, down = np.log2(grid.columns.to_numpy(float)), np.log2(grid.index.to_numpy(float))
    values = np.log(grid.sort_index(axis=1).to_numpy(float))
    line = [np.interp(np.log2(tokens), across, row) for row in values]
    return float(np.exp(np.interp(np.log2(hidden), down, line)))


def breakeven_picture(rows, hidden: int = 4096, tokens: int = 4096, graph: bool = False):
    """Figure: the recorded map with the reader's size marked, and the times of a layer over tokens at that size."""
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm

    from .. import plots

    fig, (left, right) = plots.figure(8.5, 3.5, ncols=2, width_ratios=(1.25, 1))
    y, x = np.sort(rows["hidden"].unique()), np.sort(rows["tokens"].unique())
    fine_y, fine_x = np.geomspace(y[0], y[-1], 41), np.geomspace(x[0], x[-1], 49)
    surface = np.array([[breakeven_speedup(rows, h, t, graph) for t in fine_x] for h in fine_y])
    image = left.pcolormesh(fine_x, fine_y, surface, cmap="PuOr", norm=TwoSlopeNorm(1, 0.5, 2), shading="gouraud")
    left.contour(fine_x, fine_y, surface, levels=[1], colors="black", linewidths=1.6)
    left.plot([tokens], [hidden], "o", ms=11, mfc="none", mec="black", mew=2.5)
    left.set(title="CUDA graph" if graph else "Eager", xlabel="tokens in a batch", ylabel="hidden size")
    left.grid(False)
    fig.colorbar(image, ax=left, label="BF16 time / FP8 time", ticks=[0.5, 0.75, 1, 1.5, 2])
    for column, name, style in (("ms_bf16", "BF16", "-"), ("ms_fp8", "FP8", "--")):
        times = [breakeven_speedup(rows, hidden, t, graph, column) for t in fine_x]
        right.plot(fine_x, times, style, color=plots.PALETTE[0 if name == "BF16" else 1], label=name)
        right.plot([tokens], [breakeven_speedup(rows, hidden, tokens, graph, column)], "o", color="black", ms=5)
    right.set(title=f"One layer, hidden {hidden:,}", xlabel="tokens in a batch", ylabel="ms, forward + backward",
              yscale="log")  # fmt: skip
    right.legend()
    for axis, ticks in ((left, x), (right, x[::2])):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else f"{t}" for t in ticks])
    left.set_yscale("log", base=2)
    left.set_yticks(y, [f"{h}" for h in y])
    left.minorticks_off()
    right.yaxis.set_major_locator(plt.LogLocator(base=10, subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}"))
    right.yaxis.set_minor_formatter(plt.NullFormatter())
    return fig


def breakeven_explorer(machine: str = "h200"):
    """Choose hidden size, tokens and CUDA graph; see where that lies on the recorded break-even map (notebook 04)."""
    import ipywidgets

    from .. import plots, results

    recorded = results.load("fp8_breakeven", machine)
    rows, wide = recorded.frame(), {"description_width": "90px"}
    hiddens = [h for h in (512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192)
               if rows["hidden"].min() <= h <= rows["hidden"].max()]  # fmt: skip
    counts = [2**i for i in range(4, 20) if rows["tokens"].min() <= 2**i <= rows["tokens"].max()]
    hidden = ipywidgets.SelectionSlider(options=hiddens, value=4096, description="hidden size", style=wide)
    tokens = ipywidgets.SelectionSlider(options=counts, value=2048, description="tokens", style=wide)
    graph = ipywidgets.Checkbox(value=False, description="CUDA graph", indent=False)
    image, sentence = _image(), ipywidgets.HTML()

    def redraw(_=None):
        at = dict(hidden=hidden.value, tokens=tokens.value, graph=graph.value)
        image.value = plots.png(breakeven_picture(rows, **at))
        gain, bf16, fp8 = (breakeven_speedup(rows, **at, column=c) for c in ("speedup", "ms_bf16", "ms_fp8"))
        verdict = "FP8 pays" if gain >= 1.1 else "about even" if gain > 0.95 else "FP8 is slower"
        sentence.value = (
            f"<b>{verdict}</b>: {gain:.2f}x; a layer takes about {bf16:.2f} ms in BF16 and {fp8:.2f} ms in FP8 "
            f"(delayed scaling). Recorded on an {recorded.device}, {recorded.created[:10]}; interpolated.")

    for control in (hidden, tokens, graph):
        control.observe(redraw, names="value")
    redraw()
    box = ipywidgets.VBox([ipywidgets.HBox([hidden, tokens, graph]), sentence, image])
    box.add_class("qtutor-breakeven-explorer")
    return box


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
    return _live_picture(
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
