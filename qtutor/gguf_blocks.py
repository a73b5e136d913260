"""Inside a GGUF block: which bytes are codes and which are scales, and which tensor gets which format.

A block is the unit in which llama.cpp stores weights: 32, 64, 128 or 256 neighbours of a row, some bits of code for
each, and what turns codes back into weights.  :data:`LAYOUT` lists the fields of every format in the order of their
bytes, as ``ggml-common.h`` declares them; :func:`fields` shows those of one block, and :func:`bits` says where the bits
of each format go.

The second half is about mixtures: a file type such as ``Q4_K_M`` gives some tensors a better format than others, by
rules in ``src/llama-quant.cpp``.  :func:`mixture` lists what a type chooses, from llama.cpp's own dry run.
"""

from __future__ import annotations

import re

import numpy as np

from . import QtutorError, llamacpp
from .gguf_file import GGML

# Format -> fields in the order of their bytes: (name, bytes, role, what it is), as in ggml-common.h.  Roles:
# "codes" (the low bits or the only ones), "high" (more bits of the codes), "signs", "scales", "d" (scale of the block).
LAYOUT: dict[str, tuple[tuple[str, int, str, str], ...]] = {
    "Q8_0": (("d", 2, "d", "scale, float16"), ("qs", 32, "codes", "32 codes of 8 bits, signed")),
    "Q4_0": (("d", 2, "d", "scale, float16"), ("qs", 16, "codes", "32 codes of 4 bits")),
    "Q4_1": (("d", 2, "d", "scale, float16"), ("m", 2, "d", "minimum, float16"),
             ("qs", 16, "codes", "32 codes of 4 bits")),
    "Q5_0": (("d", 2, "d", "scale, float16"), ("qh", 4, "high", "the fifth bit of 32 codes"),
             ("qs", 16, "codes", "the low 4 bits")),
    "Q5_1": (("d", 2, "d", "scale, float16"), ("m", 2, "d", "minimum, float16"),
             ("qh", 4, "high", "the fifth bit of 32 codes"), ("qs", 16, "codes", "the low 4 bits")),
    "Q2_K": (("scales", 16, "scales", "16 scales and 16 minimums of 4 bits"),
             ("qs", 64, "codes", "256 codes of 2 bits"), ("d", 2, "d", "scale of the scales, float16"),
             ("dmin", 2, "d", "scale of the minimums, float16")),
    "Q3_K": (("hmask", 32, "high", "the third bit of 256 codes"), ("qs", 64, "codes", "the low 2 bits"),
             ("scales", 12, "scales", "16 scales of 6 bits"), ("d", 2, "d", "scale of the scales, float16")),
    "Q4_K": (("d", 2, "d", "scale of the scales, float16"), ("dmin", 2, "d", "scale of the minimums, float16"),
             ("scales", 12, "scales", "8 scales and 8 minimums of 6 bits"),
             ("qs", 128, "codes", "256 codes of 4 bits")),
    "Q5_K": (("d", 2, "d", "scale of the scales, float16"), ("dmin", 2, "d", "scale of the minimums, float16"),
             ("scales", 12, "scales", "8 scales and 8 minimums of 6 bits"),
             ("qh", 32, "high", "the fifth bit of 256 codes"), ("qs", 128, "codes", "the low 4 bits")),
    "Q6_K": (("ql", 128, "codes", "the low 4 bits of 256 codes"), ("qh", 64, "high", "the upper 2 bits"),
             ("scales", 16, "scales", "16 scales of 8 bits"), ("d", 2, "d", "scale of the scales, float16")),
    "IQ4_NL": (("d", 2, "d", "scale, float16"), ("qs", 16, "codes", "32 places of 4 bits in a table of 16 values")),
    "IQ4_XS": (("d", 2, "d", "scale of the scales, float16"), ("scales_h", 2, "scales", "upper 2 bits of 8 scales"),
               ("scales_l", 4, "scales", "low 4 bits of 8 scales"),
               ("qs", 128, "codes", "256 places of 4 bits in a table of 16 values")),
    "IQ3_S": (("d", 2, "d", "scale of the scales, float16"), ("qs", 64, "codes", "64 places in a codebook, low 8 bits"),
              ("qh", 8, "high", "their ninth bits"), ("signs", 32, "signs", "256 signs"),
              ("scales", 4, "scales", "8 scales of 4 bits")),
    "IQ3_XXS": (("d", 2, "d", "scale of the scales, float16"), ("qs", 64, "codes", "64 places in a codebook of 256"),
                ("signs and scales", 32, "signs", "8 times 28 bits of signs and a scale of 4 bits")),
    "IQ2_S": (("d", 2, "d", "scale of the scales, float16"), ("qs", 32, "codes", "32 places in a codebook, low 8 bits"),
              ("signs", 32, "signs", "256 signs"), ("qh", 8, "high", "two more bits of the places"),
              ("scales", 8, "scales", "16 scales of 4 bits")),
    "IQ2_XS": (("d", 2, "d", "scale of the scales, float16"),
               ("qs", 64, "codes", "32 times a place of 9 bits in a codebook and 7 bits of signs"),
               ("scales", 8, "scales", "16 scales of 4 bits")),
    "IQ2_XXS": (("d", 2, "d", "scale of the scales, float16"),
                ("qs", 64, "codes", "8 times 4 places in a codebook of 256, 28 bits of signs and a scale of 4 bits")),
    "IQ1_M": (("qs", 32, "codes", "32 places in a codebook, low 8 bits"),
              ("qh", 16, "high", "three more bits of the places, and a shift"),
              ("scales", 8, "scales", "16 scales of 3 bits, and a float16 in what is left")),
    "IQ1_S": (("d", 2, "d", "scale of the scales, float16"), ("qs", 32, "codes", "32 places in a codebook, low 8 bits"),
              ("qh", 16, "high", "three more bits of the places, 8 scales of 3 bits and shifts")),
    "TQ1_0": (("qs", 48, "codes", "240 codes of 3 values, 5 in a byte"), ("qh", 4, "codes", "16 more, 4 in a byte"),
              ("d", 2, "d", "scale, float16")),
    "TQ2_0": (("qs", 64, "codes", "256 codes of 2 bits, of which 3 values are used"), ("d", 2, "d", "scale, float16")),
    "MXFP4": (("e", 1, "d", "scale, a power of two (E8M0)"), ("qs", 16, "codes", "32 codes of 4 bits (E2M1)")),
    "NVFP4": (("d", 4, "scales", "4 scales of 8 bits (E4M3 without sign), one for 16 weights"),
              ("qs", 32, "codes", "64 codes of 4 bits (E2M1)")),
    "Q2_0": (("d", 2, "d", "scale, float16"), ("qs", 16, "codes", "64 codes of 2 bits")),
    "Q1_0": (("d", 2, "d", "scale, float16"), ("qs", 16, "codes", "128 codes of 1 bit")),
}  # fmt: skip
ROLES = {"codes": "codes", "high": "upper bits of the codes", "signs": "signs", "scales": "scales of small blocks",
         "d": "scale (and minimum) of the whole block"}  # fmt: skip


def bits_of(kind: str) -> float:
    """Bits per weight of a tensor type, scales included."""
    return 8 * GGML[kind].nbytes / GGML[kind].weights


def bits() -> dict[str, dict[str, float]]:
    """Format -> role -> bits per weight, most bits first: what a format spends on codes and what on scales."""
    found = {}
    for kind in sorted(LAYOUT, key=bits_of, reverse=True):
        found[kind] = dict.fromkeys(ROLES, 0.0)
        for _, nbytes, role, _ in LAYOUT[kind]:
            found[kind][role] += 8 * nbytes / GGML[kind].weights
    return found


def fields(kind: str, block) -> list[dict]:
    """One row a field of one block (uint8, its bytes): name, bytes from and to, what it is, and the bytes in hex."""
    if kind not in LAYOUT:
        raise QtutorError(f"There is no block layout {kind!r}: choose one of {', '.join(LAYOUT)}.")
    at, rows, block = 0, [], np.asarray(block, np.uint8).ravel()
    if len(block) != GGML[kind].nbytes:
        raise QtutorError(f"A {kind} block has {GGML[kind].nbytes} bytes and this one {len(block)}: pass one block.")
    for name, nbytes, role, what in LAYOUT[kind]:
        shown = block[at : at + nbytes].tobytes()
        rows.append({"field": name, "bytes": f"{at}-{at + nbytes - 1}", "role": role, "what": what,
                     "here": shown[:8].hex(" ") + (" ..." if nbytes > 8 else "")})  # fmt: skip
        at += nbytes
    return rows


KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def mixture(src, type: str, imatrix: bool = False) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What ``type`` chooses for the GGUF file ``src``, by llama.cpp's dry run; nothing is written.  Returns
    ``({"attn_q": [format of layer 0, of layer 1, ...], ...}, {"token_embd": format, ...})``."""
    layers: dict[str, dict[int, str]] = {kind: {} for kind in KINDS}
    others = {}
    for tensor in llamacpp.plan(src, type, imatrix=imatrix):
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match and match[2] in layers:
            layers[match[2]][int(match[1])] = tensor.type
        elif len(tensor.shape) == 2:
            others[tensor.name.removesuffix(".weight")] = tensor.type
    return {kind: [found[i] for i in sorted(found)] for kind, found in layers.items()}, others
