"""GGUF files: which types there are, what a file holds, and whether native code may open it.

A GGUF file is a header, metadata (key and value), a table of tensors (name, shape, type, offset) and their bytes.  Its
types come in two layers.  A *tensor type* (:data:`GGML`) says how many weights share a block of how many bytes; a
*file type* (:data:`TYPES`), such as Q4_K_M, is a recipe that gives each tensor a tensor type.

    found = gguf_file.check_gguf("model.gguf")
    found.metadata["llama.block_count"], found.tensors[0].type

:mod:`qtutor.llamacpp` has these names too.  Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from . import QtutorError, files


class Block(NamedTuple):
    """A tensor type: its number in files, and how many weights a block holds in how many bytes."""

    number: int
    weights: int
    nbytes: int


#: tensor types by name; Q2_0 is newer than the gguf package
GGML = {kind.name: Block(int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
GGML["Q2_0"] = Block(42, 64, 18)
#: those that weights are stored in
STORED = tuple(name for name in GGML if name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"))
_NAMES = {block.number: name for name, block in GGML.items()}


@dataclass(frozen=True)
class QuantType:
    """One llama.cpp file type: a recipe that gives each tensor a tensor type.

    ``ftype`` is llama.cpp's number of it, ``base`` the tensor type of most matrices.  ``needs_imatrix``: without an
    importance matrix llama.cpp refuses, because the result would be noise.
    """

    name: str
    ftype: int
    base: str
    needs_imatrix: bool = False
    overrides: tuple = ()

    @property
    def bpw(self) -> float:
        """Bits per weight of ``base``, scales included; a mixture's file has more (:func:`bits_per_weight`)."""
        return 8 * GGML[self.base].nbytes / GGML[self.base].weights


def _quant_type(name: str) -> QuantType:
    numbers = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE", "NVFP4": "MOSTLY_MXFP4_MOE"}
    ftype = 41 if name == "Q2_0" else int(gguf.LlamaFileType[numbers.get(name, f"MOSTLY_{name}")])
    mixtures = {"IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS"}
    base = mixtures.get(name) or (name[:4] if "_K" in name else name)
    needs = name.startswith(("IQ1", "IQ2")) or name in ("IQ3_XS", "IQ3_XXS", "Q2_K_S")
    # llama.cpp's own MXFP4 type is for mixtures of experts and turns a dense model into Q8_0: name the matrices instead
    overrides = ((r"blk\..*\.weight$", name),) if name in ("MXFP4", "NVFP4") else ()
    return QuantType(name, ftype, base, needs, overrides)


TYPES = {name: _quant_type(name) for name in (
    "F32 F16 BF16 Q8_0 Q6_K Q5_1 Q5_0 Q5_K_M Q5_K_S Q4_1 Q4_0 Q4_K_M Q4_K_S IQ4_NL IQ4_XS Q3_K_L Q3_K_M Q3_K_S IQ3_M "
    "IQ3_S IQ3_XS IQ3_XXS Q2_K Q2_K_S IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S TQ2_0 TQ1_0 Q2_0 Q1_0 MXFP4 NVFP4"
).split()}  # fmt: skip
_ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}


def file_type(name: str) -> QuantType:
    """The file type called ``name``, in any case and with llama-quantize's short names."""
    key = str(name).upper()
    if (key := _ALIASES.get(key, key)) not in TYPES:
        raise QtutorError(f"There is no quantization type {name!r}: choose one of {', '.join(TYPES)}.")
    return TYPES[key]


class Tensor(NamedTuple):
    """A row of the tensor table.  ``shape`` is row-major as in numpy: (rows, columns); ``nbytes`` as stored."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Gguf:
    """What a file holds: metadata (key -> value) and the tensor table."""

    path: Path
    metadata: dict
    tensors: tuple[Tensor, ...]
    data_offset: int
    file_bytes: int

    @property
    def n_weights(self) -> int:
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def quantized(self) -> list[str]:
        """The types among its tensors that are not floating-point."""
        return sorted({t.type for t in self.tensors} - {"F32", "F16", "BF16"})


class _Reader(gguf.GGUFReader):
    """gguf's reader, which here never reads past the end and leaves the tensors' data alone."""

    def _get(self, offset, dtype, count=1, override_order=None):
        self.data = self.data.view(np.ndarray)  # slices of a memmap cost ten times as much
        found = super()._get(offset, dtype, count, override_order)
        if len(found) != count:
            raise ValueError("it ends too early")
        return found

    def _build_tensors(self, start, fields):
        self.table = []
        for field in fields:
            _, name, _, dims, number, offset = field.parts
            name, dims = str(bytes(name), "utf-8"), dims.tolist()
            if (kind := _NAMES.get(int(number[0]))) is None:
                raise ValueError(f"it stores {name} in an unknown type {number[0]}")
            _, block, width = GGML[kind]
            if not dims or min(dims) < 1 or dims[0] % block:
                raise ValueError(f"it stores {name} as {kind}, whose blocks of {block} do not divide "
                                 f"{dims[0] if dims else 'no'} columns")  # fmt: skip
            size, at = prod(dims) // block * width, start + int(offset[0])
            if at + size > len(self.data):
                raise ValueError(f"it ends before the data of {name}: it is truncated")
            self.table.append(Tensor(name, kind, tuple(reversed(dims)), at, size))


def read(path: Path) -> Gguf:
    """Read a file in this process, which is for files that are trusted; any exception means that it is damaged."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    if start[4:6] == b"\0\0":
        raise ValueError("it is big-endian")
    reader = _Reader(path)
    meta = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    if not isinstance(meta.get("general.architecture"), str):
        raise ValueError("it does not name its architecture")
    return Gguf(path, meta, tuple(reader.table), int(reader.data_offset), len(reader.data))


DAMAGED, SECONDS = 42, 120  #: what the child says with its exit status, and how long it may take
NOT_HERE = ("llama.cpp does not run on this processor (illegal instruction): reinstall it with docs/install.md's "
            "CMAKE_ARGS.")  # fmt: skip
_known: dict = {}  # stamp of a file -> what is in it
_trusted: set = set()  # stamps of files that this process wrote
computed: set = set()  #: whether a child has computed here with a quantized model (True), with another (False)


def _stamp(path) -> tuple:
    stat = os.stat(path)
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns


def trust(path) -> Path:
    """Remember that this process wrote the file ``path`` as it is, so that no child has to open it first."""
    _trusted.add(_stamp(path))
    return Path(path)


def check_gguf(path, to_compute: bool = False) -> Gguf:
    """What is in a GGUF file that native code may open; a file is looked at once.

    A child process opens it first: it reads the whole structure, and where it is a model lets llama.cpp load it,
    compute a few tokens and plan a quantization.  If a damaged or hostile file ends that process, or keeps it busy, the
    notebook goes on.  Values are not judged: a flipped bit in a weight is a slightly different model.  Files of ours
    need a child only before the first quantized and the first other model computes (``to_compute``): a build may hold
    instructions that the processor lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise QtutorError(f"'{path}' is a folder: give the path of a .gguf file." if path.is_dir() else
                          f"There is no file '{path}': export or quantize the model first.")  # fmt: skip
    stamp = _stamp(path)
    if (found := _known.get(stamp)) is None:
        if stamp not in _trusted:
            _look_first(path)
        found = read(path)
        if found.metadata.get("split.count", 1) not in (0, 1):
            raise QtutorError(f"{path.name} is one part of a split model: join it with llama-gguf-split --merge.")
        if stamp not in _trusted and "tokenizer.ggml.model" in found.metadata:
            computed.add(bool(found.quantized))
        _known[stamp] = found
    if to_compute and bool(found.quantized) not in computed:
        _look_first(path)
        computed.add(bool(found.quantized))
    return found


def _look_first(path: Path) -> None:
    """Open a file in a child process, which is :mod:`qtutor.llamacpp` as a program."""
    places = os.pathsep.join(filter(None, [str(files.ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": places, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qtutor.llamacpp", os.fspath(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=env, check=False)
    except subprocess.TimeoutExpired:
        status, why = None, f"it keeps a reader busy for more than {SECONDS} s"
    else:
        status, why = done.returncode, done.stdout.decode("utf-8", "replace").strip()
    if status == -signal.SIGILL:
        raise QtutorError(NOT_HERE)
    if status not in (0, None, DAMAGED):
        why = "llama.cpp ends the process that opens it, so it is damaged, or this build does not work here"
    if status != 0:
        raise QtutorError(f"{path.name} is not a sound GGUF file: {why}; export, quantize or copy it again.")


def tensor_table(path) -> list[dict]:
    """One row a tensor: ``name``, ``type``, ``shape`` (rows, columns), ``weights``, ``bytes``."""
    return [{"name": t.name, "type": t.type, "shape": t.shape, "weights": prod(t.shape), "bytes": t.nbytes}
            for t in check_gguf(path).tensors]  # fmt: skip


def bits_per_weight(path) -> float:
    """Stored bits per weight over all tensors (norms included), as llama.cpp reports it: BPW."""
    found = check_gguf(path)
    return 8 * sum(t.nbytes for t in found.tensors) / found.n_weights
