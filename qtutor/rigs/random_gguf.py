"""A GGUF file of any Llama's shape with random weights: a model's size, memory, speed and energy without its download.

How large a model is, how fast it runs and what energy it takes depend on the *shapes and types* of its tensors, not on
the values in them: a matrix product takes as long with random numbers as with learned ones.  So :func:`write` makes a
file in which every tensor has exactly the type that llama.cpp's quantizer would give it (``capacity.plan``), filled
with valid random blocks.  **The text of such a model is nonsense; what it takes to write it is the real thing.**

llama.cpp's own quantizer makes the blocks of normally distributed weights, as Llamas begin training with: activations
neither overflow nor vanish, and the bits are as varied as real ones, which matters for the power that a GPU draws.
"""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .. import QtutorError, files, llamacpp
from ..decide import capacity

POOL_BLOCKS = 16411  # of each type, repeated over the file; a prime: no row starts at the same block as its neighbours
STD = 0.02  # of the random weights: initializer_range in Llama's configuration

# Llama-2-70B made small: the same rules (grouped queries 8:1, ffn 3.5 x hidden), every row a multiple of 256
TINY = capacity.llama(256, 1024, 2, 8, 1, 512, 512)
# an eighth of its width with the same head size, and few layers: a minute's work for a CPU, more than its caches hold
SMALL = capacity.llama(1024, 3584, 6, 8, 1, 8192, 4096)
MEDIUM = capacity.llama(4096, 14336, 8, 32, 4, 32000, 4096)  # the same for a GPU: 2 GB in Q8_0


@cache
def _ggml():
    """libggml's quantizer, with argument types: ctypes would guess wrong ones."""
    llamacpp.native()  # starts it: the conversions read tables that are made then
    from llama_cpp import llama_cpp

    lib = llama_cpp._lib  # libllama links libggml, and on most systems its handle finds the functions there
    if not hasattr(lib, "ggml_quantize_chunk"):
        from llama_cpp._ggml import libggml as lib
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return lib


def quantize_blocks(kind: str, weights) -> np.ndarray:
    """``weights`` (float, any shape) as GGML blocks of type ``kind``, uint8 (n, bytes per block), by llama.cpp's own
    quantizer."""
    if kind not in llamacpp.STORED:
        raise QtutorError(f"There is no tensor type {kind!r}: choose one of {', '.join(llamacpp.STORED)}.")
    number, per_block, width = llamacpp.GGML[kind]
    weights = np.ascontiguousarray(weights, np.float32)
    if weights.size == 0 or weights.size % per_block:
        raise QtutorError(f"{weights.size} weights are no whole number of {kind} blocks of {per_block}.")
    lib, n = _ggml(), weights.size // per_block
    out, ones = np.empty((n, width), np.uint8), np.ones(per_block, np.float32)
    importance = ones.ctypes.data if lib.ggml_quantize_requires_imatrix(number) else None
    lib.ggml_quantize_chunk(number, weights.ctypes.data, out.ctypes.data, 0, n, per_block, importance)
    return out


def blocks(kind: str, n: int, seed: int) -> np.ndarray:
    """``n`` blocks of N(0, STD) weights, by numpy's generator at ``seed``."""
    normal = np.random.default_rng(seed).standard_normal((n, llamacpp.GGML[kind].weights), dtype=np.float32)
    return quantize_blocks(kind, normal * np.float32(STD))


def write(path, config="Llama-2-70B", type: str = "Q6_K", seed: int = 0) -> Path:
    """Write a GGUF file of the shape ``config`` (anything that ``capacity.config_of`` takes) with random weights.

    Every tensor has the type that llama.cpp's quantizer would choose for ``type``; norms are 1, and the vocabulary is
    made up.  The same arguments give the same bytes.  56 GB take ten to thirty seconds in memory-backed storage.
    """
    planned, size = {t.name: t.type for t in capacity.plan(config, type)}, capacity.size(config, type)
    name = config if isinstance(config, str) and config in capacity.MODELS else "llama"
    with files.whole(path) as partial:
        free = shutil.disk_usage(partial.parent).free
        if free < size.file_bytes:
            raise QtutorError(f"'{partial.parent}' has {free / 1e9:.1f} GB free and the file needs {size.gb:.1f} GB: "
                              "choose another folder or free some space.")  # fmt: skip
        stub = capacity.write_stub(partial, config, planned, f"{name} {type}, random weights",
                                   ftype=llamacpp.TYPES[size.type].ftype)  # fmt: skip
        _fill(stub, seed)
    return llamacpp.trust(path)  # no child has to look at it first


def _fill(stub: llamacpp.Gguf, seed: int) -> None:
    pools, jobs = {}, []
    for number, t in enumerate(stub.tensors):
        if len(t.shape) == 1:  # norms are 1; RoPE factors of 1 leave every frequency as it is
            pool, first = np.ones(t.nbytes // 4, np.float32).view(np.uint8), 0
        else:
            _, per_block, width = llamacpp.GGML[t.type]
            if t.type not in pools:  # about as many weights whatever the block, and never a round number of rows
                n = POOL_BLOCKS * 256 // per_block + (per_block != 256)
                n = min(n, -(-max(x.nbytes for x in stub.tensors) // width))
                pools[t.type] = tiled(blocks(t.type, n, seed).reshape(-1), t.nbytes)
            pool, first = pools[t.type], number * 7919 * width  # each tensor begins elsewhere in the pool
        jobs += [(stub.path, pool, *piece) for piece in pieces(t.nbytes, t.offset, pool.size, first)]
    write_pieces(jobs)


def tiled(unit: np.ndarray, need: int = 2**26) -> np.ndarray:
    """Bytes repeated to about 64 MB or what a tensor needs, for large writes."""
    return np.tile(unit, max(1, min(2**26, need) // unit.size))


def write_pieces(jobs) -> None:
    """Write (path, pool, offset in the file, offset in the pool, bytes) into files that are there, by some threads."""

    def work(job):
        path, pool, offset, start, n = job
        with open(path, "r+b") as file:  # a handle for each: threads would share its position
            file.seek(offset)
            file.write(memoryview(pool)[start : start + n])
        return n

    total = sum(job[-1] for job in jobs)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False, disable=total < 2**30)
    with bar, ThreadPoolExecutor(min(8, llamacpp.n_threads())) as workers:
        for n in workers.map(work, jobs):
            bar.update(n)


def pieces(nbytes: int, offset: int, pool: int, first: int, most: int = 2**28):
    """(offset in the file, offset in a pool of ``pool`` bytes, bytes) of the writes that fill ``nbytes`` from
    ``offset`` on, none longer than ``most``: as if the pool were endless, from ``first`` on."""
    done = 0
    while done < nbytes:
        at = (first + done) % pool
        n = min(nbytes - done, pool - at, most)
        yield offset + done, at, n
        done += n
