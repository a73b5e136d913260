"""Around post-training quantization: which layers, how many bytes they really hold, why a library said no.

The methods themselves (rounding, clipping, SmoothQuant, AWQ, GPTQ) stand in the cells of notebook 07, where they are
the lesson.  Here is what the lesson leans on:

    layers = ptq.linears(model)                    # every linear layer but the output head
    held = ptq.stored(model)                       # bytes that lie in memory, whatever the configuration says
    model, why = ptq.attempt(lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))
    ptq.speed(reference, model, ids)               # how many times as fast as the reference, measured in turns

A quantized model is believed by its bytes.  A library that skipped a layer, or keeps 4-bit codes in 8-bit integers,
gives a model that works perfectly and saves less than it says, or nothing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import QtutorError

SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # fed by the same tensor as ...


def linears(model) -> dict:
    """Name -> layer: every linear layer of a causal language model except its output head.

    Some libraries' quantized layers are no ``nn.Linear``: what has ``in_features`` and ``out_features`` counts as one.
    """

    def linear(module):
        return all(isinstance(getattr(module, side, None), int) for side in ("in_features", "out_features"))

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name: module for name, module in model.named_modules() if linear(module) and module is not head}


def source(name: str) -> str:
    """The layer whose input stands for this layer's: query, key and value share one, so do gate and up."""
    head, dot, last = name.rpartition(".")
    return head + dot + SHARED.get(last, last)


# ----------------------------------------------------------------------------------------------- what is really stored


@dataclass(frozen=True)
class Stored:
    """Bytes of a model, counted from the storage behind its tensors.

    - ``bits_per_weight``: of its linear layers without the head; scales, zero points and tables included
    - ``weights``: how many those layers have;  ``linear_bytes``: their bytes
    - ``total_bytes``: of all tensors, a tied embedding once;  ``dtypes``: what the layers' weights are made of
    """

    bits_per_weight: float
    weights: int
    linear_bytes: int
    total_bytes: int
    dtypes: str


def _leaves(value) -> Iterator:
    """The plain tensors inside a tensor: itself, or the parts of a tensor subclass such as torchao's."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _leaves(getattr(value, name))
    elif hasattr(value, "untyped_storage"):
        yield value


def _bytes(values, seen: set) -> int:
    total = 0
    for value in values:
        for leaf in _leaves(value):
            storage = leaf.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def stored(model) -> Stored:
    """Count the bytes that a model holds (see :class:`Stored`).

    Ask before the model has computed anything: bitsandbytes rearranges 4-bit weights at their first use on some CPUs,
    and asking for the state, as this function does, makes it try to undo that.

    Raises QtutorError where the model has no linear layers.
    """
    layers = linears(model)
    if not layers:
        raise QtutorError("This model has no linear layers outside its head: there is nothing to count.")
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    seen: set = set()
    states = {name: list(layer.state_dict().values()) for name, layer in layers.items()}
    inside = _bytes((value for state in states.values() for value in state), seen)
    rest = _bytes(model.state_dict().values(), seen)
    kinds = {str(max(_leaves(state[0]), key=lambda leaf: leaf.numel()).dtype).removeprefix("torch.")
             for state in states.values()}  # fmt: skip
    return Stored(8 * inside / weights, weights, inside, inside + rest, ", ".join(sorted(kinds)))


# ---------------------------------------------------------------------------------------------- libraries that say no


class _Listener(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record):
        self.heard.append(record.getMessage())


def _sentence(error: BaseException, heard: list[str]) -> str:
    """One sentence from an exception; transformers puts the cause of a failed conversion into its log only."""
    text = str(error)
    if "CONVERSION" in text:
        found = re.findall(r"^\s*(?:\w+\.)*(\w+(?:Error|Exception): .+?)\s*$", "\n".join(heard), re.M)
        text = found[-1] if found else text
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = " ".join(text.split()) or type(error).__name__
    text = re.sub(r"(?<![\w:/.])/[^\s'\"]*/", "", text)  # where this machine keeps its files is nobody's business
    first = re.match(r".{25,}?[.!?](?=\s+[A-Z])", text)  # a dot inside a version or a name does not end a sentence
    text = first[0] if first else text
    return text if len(text) <= 200 else text[:197] + "..."


def attempt(function: Callable, *args):
    """Call ``function(*args)``; return ``(its result, None)``, or ``(None, why not)`` in one sentence.

    Whatever a library raises is caught (KeyboardInterrupt is not).  What transformers logs meanwhile is kept from the
    screen and searched for the cause.
    """
    listener, logger = _Listener(), logging.getLogger("transformers")
    before = logger.level, logger.propagate, logger.handlers[:]
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    try:
        return function(*args), None
    except Exception as error:  # any library, any reason: the reader gets a sentence
        return None, _sentence(error, listener.heard)
    finally:
        level, logger.propagate, logger.handlers = before
        logger.setLevel(level)


def speed(reference, model, ids, repeats: int = 7) -> float:
    """How many times as fast as ``reference`` the model reads ``ids`` (1, n): ratio of median times, measured in turns.

    In turns, so that whatever else the machine does meets both.  Above 1: the model is faster.
    """
    import torch

    from . import measure

    times: dict = {0: [], 1: []}
    with torch.no_grad():
        for turn in range(repeats + 1):
            for which, one in enumerate((reference, model)):
                measure.synchronize(ids.device)
                start = time.perf_counter()
                one(input_ids=ids, use_cache=False)
                measure.synchronize(ids.device)
                if turn:  # the first turn warms up
                    times[which].append(time.perf_counter() - start)
    middle = [sorted(times[which])[repeats // 2] for which in (0, 1)]
    return middle[0] / middle[1]


# ------------------------------------------------------------------------------------------------------------ pictures


def clip_curve(weight, bits: int, group: int | None, ratios) -> tuple:
    """What clipping costs and what it saves: ``(rounding, clipping)``, relative squared errors, one for each ratio.

    ``weight`` (rows, columns) is rounded to signed integers of ``bits`` with one scale for ``group`` neighbours (None:
    a row); ``2 ** (bits - 1) - 1/2`` steps are ``ratio`` times the group's amax.  ``clipping`` is the error of the
    weights beyond the last code, ``rounding`` that of all others.
    """
    import torch

    blocks = weight.detach().float().reshape(-1, group or weight.shape[1])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    size, rounding, clipping = blocks.square().sum(), [], []
    for ratio in ratios:
        scale = (float(ratio) * blocks.abs().amax(1, keepdim=True) / ((high - low) / 2)).clamp_min(1e-12)
        codes = (blocks / scale).round()
        kept = codes.clamp(low, high)
        error = (kept * scale - blocks).square()
        beyond = codes != kept
        rounding.append((error[~beyond].sum() / size).item())
        clipping.append((error[beyond].sum() / size).item())
    return torch.tensor(rounding), torch.tensor(clipping)


def clip_picture(weight, bits: int = 3, group: int | None = None, ratio: float = 0.8):
    """Figure: one row of the weight with its grid, and the error against the clip ratio, in its two parts."""
    import numpy as np

    from . import plots

    ratios = np.linspace(0.3, 1.1, 41)
    rounding, clipping = (part.numpy() for part in clip_curve(weight, bits, group, ratios))
    best = ratios[(rounding + clipping).argmin()]
    here_rounding, here_clipping = (part.item() for part in clip_curve(weight, bits, group, [ratio]))

    fig, (left, right) = plots.figure(8.5, 3.5, ncols=2)
    row = weight.detach().float().cpu()[0][: group or weight.shape[1]]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = ratio * row.abs().max().item() / ((high - low) / 2)
    plots.histogram(left, row, bins=40 if len(row) > 100 else 16, density=False, color=plots.PALETTE[0])
    for code in range(low, high + 1):
        left.axvline(code * scale, color=plots.PALETTE[1], lw=1, ls="-")
    left.axvspan(-abs(row).max() * 1.05, (low - 0.5) * scale, color="0.5", alpha=0.2)
    left.axvspan((high + 0.5) * scale, abs(row).max() * 1.05, color="0.5", alpha=0.2)
    left.set(title=f"{len(row)} weights and their int{bits} grid", xlabel="weight (grey: clipped)", ylabel="count",
             xlim=(-abs(row).max().item() * 1.05, abs(row).max().item() * 1.05))  # fmt: skip
    right.plot(ratios, rounding + clipping, color="black", label="both")
    right.plot(ratios, rounding, color=plots.PALETTE[0], ls="--", label="rounding")
    right.plot(ratios, clipping, color=plots.PALETTE[3], ls=":", lw=2, label="clipping")
    right.axvline(best, color="0.6", lw=1)
    right.plot([ratio], [here_rounding + here_clipping], "o", ms=9, mfc="none", mec="black", mew=1.5)
    right.set(title=f"Whole matrix: least error at {best:.2f}", xlabel="clip ratio (share of the amax that is kept)",
              ylabel="squared error / squared weights", ylim=(0, 1.15 * max(rounding + clipping)))  # fmt: skip
    right.legend()
    return fig


def clip_explorer(weight):
    """Bits, group and clip ratio against the error of a weight (rows, columns): a widget (notebook 07)."""
    import ipywidgets

    from .figures.live import live_picture

    groups = {"row": None} | {f"group of {g}": g for g in (128, 32) if weight.shape[1] % g == 0}
    return live_picture(
        lambda bits, group, ratio: clip_picture(weight, bits, groups[group], ratio),
        bits=ipywidgets.IntSlider(3, 2, 8, description="bits"),
        group=ipywidgets.Dropdown(options=list(groups), value="row", description="scale per"),
        ratio=ipywidgets.FloatSlider(value=0.8, min=0.3, max=1.1, step=0.02, description="clip ratio"),
    )


def outlier_picture(amax: dict, name: str, other: str):
    """Figure: the amax of each input channel of two layers, and how far the largest stands out, layer by layer.

    ``amax`` maps layer names to (channels,) tensors; ``name`` and ``other`` are two of them.
    """
    from . import plots

    fig, (left, right) = plots.figure(8.5, 3.5, ncols=2, width_ratios=(1.25, 1))
    for key, color, style in ((name, plots.PALETTE[3], "-"), (other, plots.PALETTE[0], "-")):
        values = amax[key].cpu() / amax[key].cpu().median()
        left.plot(values, color=color, ls=style, lw=0.9, label=".".join(key.split(".")[-3:]))
    left.set(title="Inputs: the largest value of each channel", xlabel="channel", ylabel="amax (median channel = 1)")
    left.set_ylim(0)
    left.legend(loc="upper left")
    kinds: dict = {}
    for key, values in amax.items():
        kinds.setdefault(key.rsplit(".", 1)[-1], []).append((values.max() / values.median()).item())
    labels = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}
    for (kind, values), marker, color in zip(kinds.items(), "osD^v<>", plots.PALETTE, strict=False):
        right.plot(range(len(values)), values, marker=marker, ms=5, lw=1.2, color=color, label=labels.get(kind, kind))
    right.axhline(1, color="0.6", lw=1, ls=":")
    right.set(title="How far the largest stands out", xlabel="block of the model",
              ylabel="largest / median amax")  # fmt: skip
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_ylim(0, 1.1 * max(max(values) for values in kinds.values()))
    right.legend(title="input of", loc="upper right", fontsize=8.5)
    return fig


def smooth_picture(alphas, errors: dict, before, after):
    """Figure: SmoothQuant's output error against alpha, and the channels' amax before and after the best alpha.

    ``errors`` maps a label to one error for each alpha; ``before`` and ``after`` are pairs of (channels,) tensors: the
    amax of the activations and of the weight's columns.
    """
    from . import plots

    fig, (left, right) = plots.figure(8.5, 3.5, ncols=2)
    for (label, values), color, marker in zip(errors.items(), plots.PALETTE, "os^", strict=False):
        left.semilogy(alphas, values, marker=marker, ms=4, color=color, label=label)
    left.set(title="Output error, W8A8", xlabel="alpha (0: all in the activations, 1: all in the weights)",
             ylabel="relative error of the output")  # fmt: skip
    left.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %"])
    left.minorticks_off()
    left.set_ylim(0.7 * min(map(min, errors.values())), 1.5 * max(map(max, errors.values())))
    left.legend()
    order = before[0].cpu().argsort(descending=True)
    for (x, w), style, when in ((before, ":", "before"), (after, "-", "after")):
        for values, color, what in ((x, plots.PALETTE[3], "activations"), (w, plots.PALETTE[0], "weights")):
            right.semilogy(values.cpu()[order] / values.max().cpu(), color=color, ls=style, lw=1.1,
                           label=f"{what}, {when}")  # fmt: skip
    right.set(title="How even the channels are", xlabel="channel, largest activations first",
              ylabel="amax (largest channel = 1)")  # fmt: skip
    lowest = min((values / values.max()).min().item() for values in (*before, *after))
    right.set_ylim(lowest / 4, 1.5)  # room for the legend
    right.legend(fontsize=8, ncols=2, loc="lower center")
    return fig


def optimum_picture(rtn, gptq):
    """Figure: the share of rows whose error is within a factor of the smallest possible one, by method.

    ``rtn`` and ``gptq`` are (rows,) tensors: squared output error / the optimum's, at least 1.
    """
    import numpy as np

    from . import plots

    fig, ax = plots.figure(7, 3.3)
    for values, label, color, style in ((gptq, "GPTQ", plots.PALETTE[2], "-"),
                                        (rtn, "round to nearest", plots.PALETTE[1], "--")):  # fmt: skip
        values = np.sort(np.asarray(values.cpu(), float))
        ax.step(np.append(values, 100), np.append(np.arange(1, len(values) + 1), len(values)) / len(values),
                where="post", color=color, ls=style, lw=2, label=label)  # fmt: skip
    ax.set(title="Eight weights, two bits: how close to the best of 65,536 codes?", xscale="log", xlim=(0.97, 8),
           ylim=(0, 1.03), xlabel="squared error / least possible squared error", ylabel="share of rows")  # fmt: skip
    ax.set_xticks([1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"])
    ax.xaxis.minorticks_off()
    ax.legend(loc="lower right")
    return fig


def methods_picture(table):
    """Figure: KLD of each method with two standard errors, one panel for each number of bits.

    ``table`` has the columns bits, method, kld_mean and kld_mean_se.
    """
    from . import plots

    bits = sorted(table["bits"].unique(), reverse=True)
    fig, axes = plots.figure(8.5, 3.3, ncols=len(bits), squeeze=False)
    for ax, b in zip(axes[0], bits, strict=True):
        rows = table[table["bits"] == b].iloc[::-1]
        places = range(len(rows))
        ax.errorbar(rows["kld_mean"], places, xerr=2 * rows["kld_mean_se"], fmt="o", ms=6, capsize=3, color=plots.PALETTE[0])
        ax.set_yticks(places, rows["method"])
        most = (rows["kld_mean"] + 2 * rows["kld_mean_se"]).max()
        ax.set(title=f"{b} bits", xlabel="mean KL divergence (nats; bars: two standard errors)",
               xlim=(0, 1.15 * most), ylim=(-0.6, len(rows) - 0.4))  # fmt: skip
        ax.xaxis.label.set_size(9)
        ax.grid(False, axis="y")
    return fig


def backends_picture(table):
    """Figure: KLD against the bits per weight that are really stored, one named point for each back end.

    ``table`` has the columns bits_per_weight, kld_mean and kld_mean_se, and the back ends' names as its index.
    """
    from . import plots

    fig, ax = plots.figure(8.5, 4)
    ax.set_yscale("log")
    ax.set_ylim(table["kld_mean"].min() / 3, table["kld_mean"].max() * 4)
    looks = {"bfloat16": (7, "D"), "torchao": (0, "o"), "bitsandbytes": (1, "s")}
    for name, row in table.iterrows():
        color, marker = looks.get(name.split()[0], (2, "^"))
        plots.quality_vs_bits(ax, [row["bits_per_weight"]], [row["kld_mean"]], [2 * row["kld_mean_se"]],
                              color=plots.PALETTE[color], marker=marker)  # fmt: skip
    ax.set_xlim(3, max(17.5, table["bits_per_weight"].max() + 1))
    ax.set(title="What is stored, and what it costs", xlabel="bits per weight of the linear layers, counted in memory",
           ylabel="mean KL divergence (nats)")  # fmt: skip
    plots.annotate(ax, table["bits_per_weight"].tolist(), table["kld_mean"].tolist(), table.index.tolist())
    return fig
