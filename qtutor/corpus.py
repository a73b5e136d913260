"""Text that every Python installation already has: nothing to download, nothing to redistribute.

Training text is the docstrings of the installed packages (numpy, scipy, torch, transformers, sympy,
scikit-learn, pandas, ..., and the standard library): tens of megabytes of technical English.  They are
read from the source files with ``ast``; no package is imported.

Evaluation text is the Python language reference, which ships inside CPython as ``pydoc_data.topics``
and which ``help("for")`` prints.  Three things keep it honest.  It is pinned by content, so that every Python scores
the same tokens.  The topics repeat whole sections, which a model (or ``xz``) could score by copying, so every
paragraph is kept once.  And a training document that shares thirteen consecutive words with the evaluation text is
left out (the overlap rule of GPT-3, arXiv 2005.14165, appendix C).

    text = corpus.eval_text()
    ids = corpus.tokens("eval", tokenizer)          # uint16
    for batch in corpus.batches(ids, batch_size=8, seq_len=256, seed=0): ...
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from . import QtutorError, files

OVERLAP_WORDS = 13
MIN_CHARACTERS = 80
HELD_OUT_EVERY = 100  # one document in so many is validation text, for choices made during training
_SKIP_FOLDERS = set("tests test testing _test idlelib lib2to3 pydoc_data site-packages qtutor _vendor".split())


def cache_dir() -> Path:
    """Return the folder for things that can be made again (``QTUTOR_CACHE``, else ``.cache`` in the project)."""
    default = files.ROOT / ".cache" if (files.ROOT / "pyproject.toml").exists() else Path.home() / ".cache" / "qtutor"
    folder = Path(os.environ.get("QTUTOR_CACHE") or default)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise QtutorError(f"The cache folder {folder} cannot be written: set QTUTOR_CACHE to a folder that can.")
    return folder


def fingerprint(text: str) -> str:
    """Return the first 12 hex digits of the text's SHA-256 (UTF-8), to tell one text from another."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


@cache
def eval_text() -> str:
    """Return the evaluation text, the same on every machine: paragraphs of the language reference, pinned by hash.

    ``pydoc_data.topics`` differs a little from one Python to the next.  ``data/eval_paragraphs.txt`` lists the
    paragraphs (SHA-256, in order) that CPython 3.11.2, 3.11.7, 3.12.1, 3.13.0 and 3.14.7 have in common; the text is
    these, joined by blank lines.  Where this Python lacks one, a warning says that scores are not comparable, and the
    :func:`fingerprint` that results carry tells the two texts apart.
    """
    from pydoc_data.topics import topics

    have = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name].replace("\r\n", "\n")):
            paragraph = paragraph.rstrip()
            have.setdefault(fingerprint(paragraph), paragraph)
    pinned = (files.DATA / "eval_paragraphs.txt").read_text("ascii").split()
    kept = [have[key] for key in pinned if key in have]
    if len(kept) < len(pinned):
        warnings.warn(f"Python {platform.python_version()} lacks {len(pinned) - len(kept)} of the {len(pinned)} "
                      "paragraphs of the evaluation text: do not compare its scores with recorded ones.",
                      stacklevel=2)  # fmt: skip
    return "\n\n".join(kept) + "\n"


def _shingles(text: str) -> set[int]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + OVERLAP_WORDS])) for i in range(len(words) - OVERLAP_WORDS + 1)}


def _source_files(packages: tuple[str, ...] | None) -> list[Path]:
    """Python files of the named packages (all installed ones and the standard library if None), in a fixed order."""
    roots = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))]
    if packages is not None:
        places = [base / place for name in packages for base in roots for place in (name, f"{name}.py")]
        roots = [place for place in places if place.exists()]
        if not roots:
            raise QtutorError(f"None of the packages {', '.join(packages)} is installed: name installed packages.")
    found = []
    for root in roots:
        inside = [root] if root.is_file() else sorted(root.rglob("*.py"))
        base = root.parent if root.is_file() else root
        found += [f for f in inside if not _SKIP_FOLDERS & set(f.relative_to(base).parts[:-1])]
    return found


def docstrings(source: bytes | str) -> list[str]:
    """Return the docstrings of a module's source, its classes and functions, cleaned as ``help`` does, in order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) >= MIN_CHARACTERS]


def _text_of_packages(packages, progress) -> list[str]:
    """The unique docstrings of the packages, without those that overlap with the evaluation text."""
    from tqdm.auto import tqdm

    known = _shingles(eval_text())
    documents, seen = [], set()
    paths = _source_files(packages)
    for path in tqdm(paths, desc="reading docstrings", unit="file", disable=not progress, leave=False):
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            continue
        for text in docstrings(source):
            key = fingerprint(" ".join(text.split()))
            if key not in seen and not known & _shingles(text):
                documents.append(text)
            seen.add(key)
    return documents


def train_documents(packages: tuple[str, ...] | list[str] | None = None, progress: bool = True) -> list[str]:
    """Return the training documents: unique docstrings that share no 13 words with the evaluation text.

    ``packages`` are names of installed ones; None reads them all and the standard library (two minutes the first time,
    cached afterwards by Python version and package versions).
    """
    from importlib.metadata import distributions

    packages = None if packages is None else tuple(packages)
    installed = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]})
    key = fingerprint(json.dumps([sysconfig.get_python_version(), packages, installed, MIN_CHARACTERS, "v1"]))
    cached = cache_dir() / f"docstrings-{key}.json"
    try:
        return json.loads(cached.read_text("utf-8"))
    except (OSError, ValueError):  # not there, or damaged: a cache is only a cache, make it again
        pass
    documents = _text_of_packages(packages, progress)
    documents = [d.encode("utf-8", "replace").decode("utf-8") for d in documents]  # lone surrogates
    files.write_text(cached, json.dumps(documents), "free some disk space or set QTUTOR_CACHE to another folder")
    return documents


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Split documents into (training, validation): every hundredth is held out, for choosing settings."""
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [d for i, d in enumerate(documents) if (i + 1) % HELD_OUT_EVERY], held_out


def tokens(source, tokenizer, packages=None, progress: bool = True) -> np.ndarray:
    """Token ids (n,), uint16 (uint32 for a vocabulary beyond 65,536), of a text.

    ``source`` is ``"eval"``, ``"train"`` (of ``packages``, see :func:`train_documents`), a list of documents, or any
    other string as the text itself.  Documents of a list and of ``"train"`` each begin with the end-of-text token, so
    that the model knows where one starts.
    """
    if isinstance(source, str) and source == "train":
        source = split(train_documents(packages, progress))[0]
    marked = not isinstance(source, str) and tokenizer.eos_token_id is not None
    documents = [eval_text() if source == "eval" else source] if isinstance(source, str) else list(source)
    dtype = np.uint16 if len(tokenizer) <= 65_536 else np.uint32
    pieces = [np.zeros(0, dtype)]
    for start in range(0, len(documents), 1000):  # batched: the Rust tokenizer is far faster that way
        for ids in tokenizer(documents[start : start + 1000], add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.array([tokenizer.eos_token_id, *ids] if marked else ids, dtype=dtype))
    return np.concatenate(pieces)


def batches(ids: np.ndarray, batch_size: int, seq_len: int, seed: int = 0, device=None) -> Iterator:
    """Yield shuffled training batches for ever: LongTensors (batch_size, seq_len + 1), a fresh order each epoch.

    Inputs are ``[:, :-1]``, targets ``[:, 1:]``.  Each epoch begins at its own random offset, so that windows differ
    from epoch to epoch.  The same seed gives the same batches on every machine, which makes two precisions comparable.
    """
    import torch

    window = seq_len + 1
    per_epoch = (len(ids) - seq_len) // seq_len  # windows overlap by one token: each target is seen once
    if per_epoch < batch_size + 1:
        raise QtutorError(f"{len(ids)} tokens are too few for batches of {batch_size} x {seq_len}: "
                          "use more text, or a smaller batch_size or seq_len.")  # fmt: skip
    rng = np.random.default_rng(seed)
    while True:
        offset = int(rng.integers(0, seq_len))
        starts = rng.permutation(per_epoch - 1) * seq_len + offset
        for i in range(0, len(starts) - batch_size + 1, batch_size):
            chosen = np.stack([ids[s : s + window] for s in starts[i : i + batch_size]]).astype(np.int64)
            batch = torch.from_numpy(chosen)
            yield batch.to(device, non_blocking=True) if device is not None else batch
