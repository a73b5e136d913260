"""Inside a GGUF block: which bytes are codes and which are scales, and which tensor gets which format.

A block is the unit in which llama.cpp stores weights: 32, 64, 128 or 256 neighbours of a row, some bits of code for
each, and what turns codes back into weights.  :data:`LAYOUT` lists the fields of every format in the order of their
bytes, as ``ggml-common.h`` declares them; :func:`bits` says where the bits of a format go, :func:`dismantle` takes the
blocks of the formats apart that notebook 08 does by hand, and :func:`byte_map` draws one.

    blocks = tensor.data.reshape(-1, 144)                       # uint8, a Q4_K tensor of gguf.GGUFReader
    parts = gguf_blocks.dismantle("Q4_K", blocks)
    parts["d"], parts["scales"], parts["codes"], parts["weights"]

The second half is about mixtures: a file type such as ``Q4_K_M`` gives some tensors a better format than others, by
rules in ``src/llama-quant.cpp``.  :func:`mixture` lists what a type chooses, from llama.cpp's own dry run.
"""

from __future__ import annotations

import re

import numpy as np

from . import QtutorError, llamacpp

# Format -> fields in the order of their bytes: (name, bytes, role, what it is).  Source: ggml/src/ggml-common.h.
# Roles: "codes" (the low bits or the only ones), "high" (more bits of the codes), "signs", "scales", "d" (what scales
# the whole block, minimum included).
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
         "d": "scale of the whole block"}  # fmt: skip


def _layout(kind: str):
    if kind not in LAYOUT:
        raise QtutorError(f"There is no block layout {kind!r}: choose one of {', '.join(LAYOUT)}.")
    return LAYOUT[kind]


def size(kind: str) -> tuple[int, int]:
    """(weights, bytes) of one block."""
    _layout(kind)
    return next((weights, nbytes) for name, weights, nbytes in llamacpp.GGML_TYPES.values() if name == kind)


def _bits(kind: str) -> float:
    """Bits per weight of any GGML type, floats included."""
    return next(8 * nbytes / weights for name, weights, nbytes in llamacpp.GGML_TYPES.values() if name == kind)


def bits() -> dict[str, dict[str, float]]:
    """Format -> role -> bits per weight, most bits first: what a format spends on codes and what on scales."""
    found = {}
    for kind in sorted(LAYOUT, key=lambda name: -size(name)[1] / size(name)[0]):
        found[kind] = dict.fromkeys(ROLES, 0.0)
        for _, nbytes, role, _ in LAYOUT[kind]:
            found[kind][role] += 8 * nbytes / size(kind)[0]
    return found


# ------------------------------------------------------------------------------------------------------- taken apart


def _half(blocks: np.ndarray) -> np.ndarray:
    """Two bytes of each block as float16, widened: (n, 2) uint8 -> (n,) float32."""
    return np.ascontiguousarray(blocks).view("<f2")[:, 0].astype(np.float32)


def _q4_0(b):
    d = _half(b[:, :2])
    codes = np.concatenate([b[:, 2:] & 15, b[:, 2:] >> 4], axis=1)  # low halves: weights 0 to 15
    return {"d": d, "codes": codes, "weights": d[:, None] * (codes.astype(np.float32) - 8)}


def _q8_0(b):
    d, codes = _half(b[:, :2]), np.ascontiguousarray(b[:, 2:]).view(np.int8)
    return {"d": d, "codes": codes, "weights": d[:, None] * codes.astype(np.float32)}


def _q4_k(b):
    d, dmin, packed, qs = _half(b[:, :2]), _half(b[:, 2:4]), b[:, 4:16], b[:, 16:]
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    # 8 scales and 8 minimums of 6 bits in 12 bytes: the first four of each whole, of the last four the low bits in
    # the halves of the last four bytes and the upper two above the first ones
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    mins = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=1)
    halves = qs.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    codes = halves.reshape(-1, 8, 32)  # 32 bytes hold two small blocks: the low halves one, the high halves the next
    weights = (d[:, None] * scales)[..., None] * codes - (dmin[:, None] * mins)[..., None]
    return {"d": d, "dmin": dmin, "scales": scales, "mins": mins, "codes": codes,
            "weights": weights.reshape(-1, 256).astype(np.float32)}  # fmt: skip


def _q6_k(b):
    ql, qh = b[:, :128].reshape(-1, 2, 1, 64), b[:, 128:192].reshape(-1, 2, 1, 32)
    scales, d = np.ascontiguousarray(b[:, 192:208]).view(np.int8), _half(b[:, 208:])
    low = (ql >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(-1, 2, 4, 32)
    high = qh >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = ((high << 4 | low).astype(np.int8) - 32).reshape(-1, 16, 16)
    weights = (d[:, None] * scales)[..., None] * codes
    return {"d": d, "scales": scales, "codes": codes, "weights": weights.reshape(-1, 256).astype(np.float32)}


_TAKEN_APART = {"Q4_0": _q4_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}


def dismantle(kind: str, blocks) -> dict[str, np.ndarray]:
    """The fields of blocks of ``kind`` (Q4_0, Q8_0, Q4_K or Q6_K), and the weights they stand for.

    ``blocks``: uint8 (n, bytes of a block).  Returns arrays with n rows: ``d`` (float32), ``codes``, ``weights``
    (float32), and where there are small blocks ``scales``, ``dmin`` and ``mins``.  Raises QtutorError for another
    format or another shape.
    """
    if kind not in _TAKEN_APART:
        raise QtutorError(f"{kind!r} is not taken apart here: choose one of {', '.join(_TAKEN_APART)}.")
    blocks = np.asarray(blocks)
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != size(kind)[1]:
        raise QtutorError(f"A {kind} block has {size(kind)[1]} bytes: pass uint8 of shape (n, {size(kind)[1]}).")
    return _TAKEN_APART[kind](blocks)


def fields(kind: str, block) -> list[dict]:
    """One row a field of one block (uint8, its bytes): name, bytes from and to, what it is, and the bytes in hex.

    Raises QtutorError for a format that is not in LAYOUT, and for another number of bytes.
    """
    layout, at, rows = _layout(kind), 0, []
    block = np.asarray(block, np.uint8).ravel()
    if len(block) != size(kind)[1]:
        raise QtutorError(f"A {kind} block has {size(kind)[1]} bytes and this one {len(block)}: pass one block.")
    for name, nbytes, _, what in layout:
        shown = block[at : at + nbytes].tobytes()
        text = shown[:8].hex(" ") + (" ..." if nbytes > 8 else "")
        rows.append({"field": name, "bytes": f"{at}-{at + nbytes - 1}", "what": what, "here": text})
        at += nbytes
    return rows


# ----------------------------------------------------------------------------------------------------------- pictures

_COLORS = {"codes": 0, "high": 4, "signs": 3, "scales": 1, "d": 2}  # places in plots.PALETTE


def byte_map(kind: str, block, columns: int = 16):
    """Figure: every byte of one block in its place, coloured by what it is for, with its value in hex."""
    from matplotlib.patches import Patch, Rectangle

    from . import plots

    block, roles = np.asarray(block, np.uint8).ravel(), []
    for _, nbytes, role, _ in _layout(kind):
        roles += [role] * nbytes
    if len(block) != len(roles):
        raise QtutorError(f"A {kind} block has {len(roles)} bytes and this one {len(block)}: pass one block.")
    rows = -(-len(block) // columns)
    fig, ax = plots.figure(8.5, 0.34 * rows + 1.1)
    for i, (value, role) in enumerate(zip(block, roles, strict=True)):
        y, x = divmod(i, columns)
        color = plots.PALETTE[_COLORS[role]]
        ax.add_patch(Rectangle((x, y), 1, 1, facecolor=color, alpha=0.35, edgecolor="white"))
        ax.text(x + 0.5, y + 0.5, f"{value:02x}", ha="center", va="center", family="monospace", fontsize=9)
    ax.set(xlim=(0, columns), ylim=(rows, 0), title=f"One {kind} block: {len(block)} bytes for {size(kind)[0]} weights",
           xlabel="byte within the row", ylabel="first byte of the row")  # fmt: skip
    ax.set_xticks(np.arange(columns) + 0.5, np.arange(columns))
    ax.set_yticks(np.arange(rows) + 0.5, np.arange(rows) * columns)
    ax.grid(False)
    used = [role for role in ROLES if role in roles]
    fig.legend(handles=[Patch(color=plots.PALETTE[_COLORS[r]], alpha=0.35, label=ROLES[r]) for r in used],
               loc="outside lower center", ncols=len(used), frameon=False)  # fmt: skip
    return fig


def bits_picture():
    """Figure: where the bits of each format go, codes and scales stacked."""
    from . import plots

    found = bits()
    fig, ax = plots.figure(8.5, 5.6)
    left = np.zeros(len(found))
    for role, text in ROLES.items():
        values = np.array([row[role] for row in found.values()])
        ax.barh(list(found), values, left=left, color=plots.PALETTE[_COLORS[role]], label=text, height=0.75)
        left += values
    for y, total in enumerate(left):
        ax.text(total + 0.06, y, f"{total:.4g}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(title="Where the bits of a format go", xlabel="bits per weight", xlim=(0, 9.2))
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(False, axis="y")
    fig.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return fig


# ----------------------------------------------------------------------------------------------------------- mixtures

KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def mixture(src, type: str, imatrix: bool = False) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What ``type`` chooses for the GGUF file ``src``, by llama.cpp's dry run; nothing is written.

    Returns ``({"attn_q": [format of layer 0, of layer 1, ...], ...}, {"token_embd": format, ...})``.
    """
    layers: dict[str, dict[int, str]] = {kind: {} for kind in KINDS}
    others = {}
    for tensor in llamacpp.plan(src, type, imatrix=imatrix):
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match and match[2] in layers:
            layers[match[2]][int(match[1])] = tensor.type
        elif len(tensor.shape) == 2:
            others[tensor.name.removesuffix(".weight")] = tensor.type
    return {kind: [found[i] for i in sorted(found)] for kind, found in layers.items()}, others


def in_words(formats: list[str]) -> str:
    """``["Q6_K", "Q4_K", "Q4_K", "Q6_K"]`` -> ``"Q4_K; Q6_K in 0, 3"``: the commonest format, and where it is not.

    Of two that are equally common, the smaller.
    """
    common = max(formats, key=lambda f: (formats.count(f), -_bits(f)))
    rest = {kind: [str(i) for i, f in enumerate(formats) if f == kind] for kind in formats if kind != common}
    return "; ".join([common, *(f"{kind} in {', '.join(places)}" for kind, places in rest.items())])


def mixture_picture(src, types, imatrix=()):
    """Figure: for each of ``types`` a map of layer and tensor, coloured by bits per weight and named by format.

    ``imatrix``: those of ``types`` that are planned as if there were an importance matrix.
    """
    import matplotlib.pyplot as plt

    from . import plots

    columns = 2
    rows = -(-len(types) // columns)
    fig, axes = plots.figure(8.5, 2.5 * rows + 0.3, ncols=columns, nrows=rows, sharex=True, sharey=True)
    axes, used = np.ravel(axes), None
    cmap = plt.get_cmap("cividis")
    for ax, name in zip(axes, types, strict=False):
        layers, others = mixture(src, name, imatrix=name in imatrix or llamacpp.TYPES[name].needs_imatrix)
        grid = np.array([[_bits(f) for f in layers[kind]] for kind in KINDS])
        used = ax.imshow(grid, cmap=cmap, vmin=1.5, vmax=8.5, aspect="auto")
        for y, kind in enumerate(KINDS):
            for x, f in enumerate(layers[kind]):
                if len(layers[kind]) <= 12:
                    ax.text(x, y, f, ha="center", va="center", fontsize=6, color="white" if grid[y, x] < 5 else "black")
        ax.set(title=f"{name} (embedding: {others['token_embd']})", yticks=range(len(KINDS)), yticklabels=KINDS)
        ax.title.set_fontsize(10)
        ax.tick_params(labelsize=8)
        ax.grid(False)
        ax.label_outer()
    for ax in axes[len(types) :]:
        ax.set_visible(False)
    for ax in axes[-columns:]:
        ax.set_xlabel("layer")
    fig.colorbar(used, ax=list(axes), label="bits per weight of the format", shrink=0.8)
    return fig
