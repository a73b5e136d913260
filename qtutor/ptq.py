"""Around post-training quantization: what a layer's inputs are, GPTQ, what a model really holds, why a library said no.

The notebook on quantization after training has the methods in its cells, explained; a test holds its GPTQ to this one.

    layers = ptq.linears(model)                    # every linear layer but the output head
    layer.weight.copy_(ptq.gptq(layer.weight, H, bits=3, group=32, clip=True))
    held = ptq.stored(model)                       # what lies in memory, whatever the configuration says
    model, why = ptq.attempt(AutoModelForCausalLM.from_pretrained, folder)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import torch

from . import QtutorError, measure

RATIOS = tuple(1 - i / 20 for i in range(11))  # clip ratios: shares of a group's largest magnitude, 1.00 to 0.50
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # layer: one that gets the same input


def linears(model) -> dict:
    """Name -> layer: every linear layer of a causal language model except its output head.  Some libraries' quantized
    layers are no ``nn.Linear``: what has ``in_features`` and ``out_features`` counts as one."""
    sides = ("in_features", "out_features")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name: module for name, module in model.named_modules()
            if module is not head and all(isinstance(getattr(module, side, None), int) for side in sides)}  # fmt: skip


def source(name: str) -> str:
    """The layer under whose name an input is kept: query, key and value get the same one, and so do gate and up."""
    head, dot, last = name.rpartition(".")
    return head + dot + SAME_INPUT.get(last, last)


@torch.no_grad()
def input_squares(model, batches) -> dict:
    """Name of a layer -> H (columns, columns), float64: the sum of x x^T over its inputs x while ``model`` reads
    ``batches`` of token ids (rows, tokens).  Layers that share an input share one tensor."""
    layers, sums = linears(model), {}

    def add(name, x):
        sums[name] = sums.get(name, 0) + x.T @ x

    hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0].flatten(0, -2).double()))
             for name, layer in layers.items() if source(name) == name]  # fmt: skip
    try:
        for batch in batches:
            model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise QtutorError("There is nothing to calibrate on: give at least one batch of token ids.")
    return {name: sums[source(name)] for name in layers}


def nearest(blocks, scale, bits: int):
    """``blocks`` rounded to the nearest point of the signed grid of ``bits`` bits with steps of ``scale``."""
    return (blocks * (1 / scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def clip_scale(blocks, importance, bits: int, ratios=RATIOS):
    """The scale (n, 1) of each block of weights (n, k) that makes its squared error smallest, among ``ratios`` of its
    largest magnitude.  Errors are weighted by ``importance``: (k,) or (n, k), such as the diagonal of H."""
    scales = [(r * blocks.abs().amax(1) / (2 ** (bits - 1) - 0.5)).clamp_min(1e-12)[:, None] for r in ratios]
    losses = [((nearest(blocks, scale, bits) - blocks).square() * importance).sum(1, keepdim=True) for scale in scales]
    return torch.stack(scales).gather(0, torch.stack(losses).argmin(0, keepdim=True))[0]


@torch.no_grad()
def gptq(w, H, bits: int, group: int, damp: float = 0.01, clip: bool = False, order: bool = False, onto=nearest,
         search=clip_scale):  # fmt: skip
    """``w`` (rows, columns) rounded by GPTQ: the columns not yet rounded compensate for the error of each column.

    ``H`` (columns, columns) is the sum of x x^T over the inputs x; ``damp`` times its mean diagonal is added to the
    diagonal.  ``group`` columns share a scale, found when the first of them is reached: from their largest magnitude,
    or with ``clip`` by :func:`clip_scale`.  ``order`` takes the columns by falling diagonal of ``H``.
    ``onto`` and ``search``: functions like :func:`nearest` and :func:`clip_scale`, of another grid.  QtutorError where
    sizes do not fit, or a number is not finite.
    """
    if bits < 2 or group < 1 or w.dim() != 2 or H.shape != (w.shape[1], w.shape[1]):
        raise QtutorError(f"GPTQ needs 2 bits or more, groups of 1 or more, and H (columns, columns): not {bits} bits, "
                          f"groups of {group}, and H {tuple(H.shape)} for weights {tuple(w.shape)}.")  # fmt: skip
    if not (w.is_floating_point() and w.isfinite().all() and H.isfinite().all()):
        raise QtutorError("GPTQ needs finite floats: the weights or H hold NaN, infinity or integers.")
    if order:
        by = H.diag().argsort(descending=True)
        return gptq(w[:, by], H[by][:, by], bits, group, damp, clip, False, onto, search)[:, by.argsort()]
    w, q, H = w.clone(), torch.zeros_like(w), H.double().clone()
    H.diagonal().add_(damp * H.diag().mean() + 1e-9 * (H.diag() == 0))  # an input may be 0 throughout
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).to(w.dtype)
    for start in range(0, w.shape[1], group):  # the columns behind a group are updated once, when it is finished
        now, importance = w[:, start : start + group].clone(), H.diag()[start : start + group].to(w.dtype)
        u, errors, n = U[start : start + group, start:], torch.zeros_like(now), now.shape[1]
        scale = search(now, importance, bits, RATIOS if clip else (1,))
        for j in range(n):
            q[:, start + j] = onto(now[:, j : j + 1], scale, bits)[:, 0]
            errors[:, j] = (now[:, j] - q[:, start + j]) / u[j, j]
            now[:, j + 1 :] -= torch.outer(errors[:, j], u[j, j + 1 : n])
        w[:, start + n :] -= errors @ u[:, n:]
    return q


def stored(model) -> dict:
    """What a model really holds, counted from the storage behind its tensors (:func:`measure.stored_bytes`):
    ``bits_per_weight`` of its linear layers without the head, scales and tables included; ``stored_as``, the dtypes of
    their codes; ``weights_mb`` of the whole model, a tied embedding once.  QtutorError where it has no such layers."""
    layers = torch.nn.ModuleList(linears(model).values())
    if not len(layers):
        raise QtutorError("This model has no linear layers outside its head: there is nothing to count.")
    held, weights = measure.stored_bytes(layers)
    codes = [max(measure.plain_tensors(layer.weight), key=lambda tensor: tensor.numel()) for layer in layers]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in codes}
    return {"bits_per_weight": 8 * held / weights, "stored_as": ", ".join(sorted(dtypes)),
            "weights_mb": measure.stored_bytes(model)[0] / 1e6}  # fmt: skip


def _sentence(error: BaseException, heard: list[str]) -> str:
    """One sentence from an exception; transformers puts the cause of a failed conversion into its log only."""
    text = str(error)
    if "CONVERSION" in text:
        found = re.findall(r"^\s*(?:\w+\.)*(\w+(?:Error|Exception): .+?)\s*$", "\n".join(heard), re.M)
        text = found[-1] if found else text
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours of a terminal
    text = " ".join(text.split()) or type(error).__name__
    text = re.sub(r"(?<![\w:/.])/[^\s'\"]*/", "", text)  # the folders of this machine, which would differ elsewhere
    first = re.match(r".{25,}?[.!?](?=\s+[A-Z])", text)  # a dot inside a version or a name does not end a sentence
    text = first[0] if first else text
    return text if len(text) <= 200 else text[:197] + "..."


def attempt(function: Callable, *args):
    """Call ``function(*args)``; return ``(its result, None)``, or ``(None, why not)`` in one sentence.

    Catches what a library raises (not KeyboardInterrupt), and searches what transformers logs for the cause.
    """
    listener, heard, logger = logging.Handler(logging.WARNING), [], logging.getLogger("transformers")
    listener.emit = lambda record: heard.append(record.getMessage())
    before = logger.level, logger.propagate, logger.handlers[:]
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    try:
        return function(*args), None
    except Exception as error:  # any library, any reason: the reader gets a sentence
        return None, _sentence(error, heard)
    finally:
        level, logger.propagate, logger.handlers = before
        logger.setLevel(level)
