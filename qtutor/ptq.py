"""Around post-training quantization: which layers, what they really hold, why a library said no.

The methods themselves are in the cells of the notebook on quantization after training.  Here is what they use:

    layers = ptq.linears(model)                    # every linear layer but the output head
    held = ptq.stored(model)                       # what lies in memory, whatever the configuration says
    model, why = ptq.attempt(lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from . import QtutorError, measure

SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # layer: one that gets the same input


def linears(model) -> dict:
    """Name -> layer: every linear layer of a causal language model except its output head.  Some libraries' quantized
    layers are no ``nn.Linear``: what has ``in_features`` and ``out_features`` counts as one."""

    def linear(module):
        return all(isinstance(getattr(module, side, None), int) for side in ("in_features", "out_features"))

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name: module for name, module in model.named_modules() if linear(module) and module is not head}


def source(name: str) -> str:
    """The layer under whose name an input is kept: query, key and value get the same one, and so do gate and up."""
    head, dot, last = name.rpartition(".")
    return head + dot + SAME_INPUT.get(last, last)


def stored(model) -> dict:
    """What a model really holds, counted from the storage behind its tensors (see :func:`measure.stored_bytes`).

    - ``bits_per_weight``: of its linear layers without the head; scales, zero points and tables included
    - ``stored_as``: the dtypes of the codes of these layers
    - ``weights_mb``: of the whole model, a tied embedding once

    Raises QtutorError where the model has no linear layers.
    """
    from torch import nn

    layers = nn.ModuleList(linears(model).values())
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
