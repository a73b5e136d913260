"""Measurements with their provenance: one writer, one reader, one schema.

What a notebook measures goes to ``data/results/<machine>/<name>.json``, where ``<machine>`` is ``h200``, ``h100`` or
``cpu``, and what its prose says about another machine comes from there: no measured number is typed by hand.

    {"name": "gguf_quality", "created": "2026-01-31T12:00:00+00:00", "commit": "...", "profile": "full",
     "machine": {"device": "NVIDIA H200", "driver": "...", "memory_gib": 139.8},
     "versions": {"python": "...", "torch": "...", "llama_cpp": "..."},
     "rows": [{"type": "Q4_K_M", "bits_per_weight": 4.9, "kld_mean": 0.01, "kld_mean_se": 0.0002}, ...]}

Rows are flat, the unit is part of the name, and one thing has one name: :data:`COLUMNS` is the vocabulary, and a row
with another name is refused.  To a measured column belong, by its ending, ``_se`` (standard error), ``_low`` and
``_high`` (interval), ``_p10`` and ``_p90`` (percentiles), ``_sd`` (standard deviation of single values).

    results.save("gguf_quality", rows)
    if results.exists("gguf_quality", "h200"):
        recorded = results.load("gguf_quality", "h200")
        recorded.frame().plot(...)
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from . import QtutorError, files
from . import profile as current_profile

RESULTS = files.DATA / "results"
MACHINES = ("h200", "h100", "cpu")
PACKAGES = {"torch": "torch", "numpy": "numpy", "transformers": "transformers", "torchao": "torchao",
            "llama_cpp": "llama-cpp-python", "gguf": "gguf", "transformer_engine": "transformer-engine"}  # fmt: skip
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


#: name -> what it is.  Endings of ENDINGS may follow a name.
COLUMNS = {
    # what was measured
    "type": "llama.cpp's file type, e.g. Q4_K_M",
    "technique": "name of decide.techniques",
    "family": "group of techniques: float, torchao, llama.cpp ...",
    "format": "number format of weights (and activations)",
    "backend": "library that stores and multiplies",
    "runtime": "engine that ran it",
    "tool": "program that measured it",
    "method": "way of choosing the codes: RTN, GPTQ ...",
    "scheme": "target of QAT, e.g. int4 g32",
    "arm": "PTQ, trained, distilled, float",
    "recipe": "Transformer Engine recipe, or BF16",
    "rung": "step of the ladder of fp8_layers",
    "kind": "group of kernels, or part of a recording",
    "what": "operation that was timed",
    "model": "name of the model",
    "shape": "name of the model's shape",
    "trained": "trained with fake quantization before",
    "imatrix": "with an importance matrix",
    "stored_as": "dtypes that hold the weights",
    "seed": "of the random generator",
    "rate": "learning rate",
    "step": "of training, from 0",
    "steps": "of training, in all",
    "bits": "of a code",
    "group": "values that share a scale",
    "threads": "of the CPU",
    "notebook": "topic of a notebook",
    "jobs": "processes that shared the machine",
    "device": "cpu or cuda",
    "dtype": "of the tensor",
    "compiled": "with torch.compile",
    "graph": "in a CUDA graph",
    # sizes
    "hidden": "width of the model",
    "intermediate": "width of the MLP",
    "heads": "of attention",
    "kv_heads": "of keys and values",
    "layers": "number",
    "m": "rows of a product",
    "n": "columns of a product",
    "k": "terms of each sum",
    "batch": "sequences at once",
    "sequence": "tokens of a sequence",
    "length": "tokens of a sequence",
    "ctx": "tokens of the context",
    "depth": "tokens already in the KV cache",
    "kv_type": "type of the KV cache",
    "tokens": "in a step",
    "tokens_per_step": "of training",
    "prefill_tokens": "of a prompt",
    "decode_tokens": "written",
    "decode_context": "tokens in the cache while writing",
    "calibration_tokens": "that chose scales or the importance matrix",
    "scored_tokens": "of evaluation text",
    "windows": "of evaluation text",
    "text": "fingerprint of the evaluation text, or 'before pinning'",
    "repeats": "timed calls",
    # quality
    "perplexity": "exp of the mean negative log-likelihood, on scored_tokens",
    "base_perplexity": "of the unquantized model on the same tokens",
    "perplexity_ratio": "perplexity / base_perplexity, error paired",
    "perplexity_diff": "perplexity - base_perplexity, error paired",
    "perplexity_correlation": "of the two log-likelihoods",
    "kld_mean": "KL(base || model), nats a token",
    "kld_mean_se_windows": "its standard error over windows",
    "kld_median": "KL(base || model), nats a token",
    "kld_p99": "99th percentile",
    "kld_p999": "99.9th percentile",
    "kld_max": "largest",
    "kld_less_rtn": "kld_mean - that of round-to-nearest, paired",
    "delta_p_mean": "mean change of the true token's probability, a share",
    "delta_p_rms": "its root mean square",
    "same_top": "share of tokens with the same first choice",
    "accuracy": "share of questions answered right",
    "accuracy_diff": "accuracy - that of the unquantized model, paired",
    "accuracy_n": "questions",
    "held_out_nats": "negative log-likelihood a token, held-out text",
    "train_nats": "negative log-likelihood a token, training batch",
    "imatrix_gain": "kld_mean without an importance matrix - with",
    "imatrix_gain_se_windows": "its standard error over windows",
    "imatrix_ignored": "the matrix changed nothing",
    # memory
    "bits_per_weight": "stored, scales included",
    "weights_mb": "weights as stored, 10**6 bytes",
    "weights_gib": "weights as stored, 2**30 bytes",
    "file_mb": "10**6 bytes",
    "file_bytes": "bytes",
    "peak_gib": "peak memory of the device, 2**30 bytes",
    "read_bytes_per_token": "weights and cache that a token reads",
    "gpu_used_loaded_gib": "in use by everybody once loaded",
    "gpu_used_gib": "in use by everybody, peak",
    "device_model_mib": "llama.cpp's account",
    "host_model_mib": "llama.cpp's account",
    "device_kv_mib": "llama.cpp's account",
    "host_kv_mib": "llama.cpp's account",
    "device_compute_mib": "llama.cpp's account",
    "host_compute_mib": "llama.cpp's account",
    "fits": "it ran in the memory there is",
    # speed
    "ms_per_step": "median time of a step, a call or a product",
    "ms": "time of a group of kernels",
    "ms_bf16": "median time of a step",
    "ms_fp8": "median time of a step",
    "speedup": "time of the other over time of this",
    "prefill_speedup": "over the unquantized model",
    "decode_speedup": "over the unquantized model",
    "time_to_first_token_ms": "from the prompt to its first new token",
    "prefill_tokens_per_s": "tokens read a second, all sequences",
    "decode_tokens_per_s": "tokens written a second, all sequences",
    "tool_prefill_tokens_per_s": "as llama-bench says",
    "tool_decode_tokens_per_s": "as llama-bench says",
    "ceiling_tokens_per_s": "bandwidth over bytes read",
    "ceiling_share": "decode_tokens_per_s / ceiling_tokens_per_s",
    "copy_gb_per_s": "bandwidth of a copy, read and written",
    "read_gb_per_s": "bandwidth of reading",
    "bandwidth_gb_per_s": "the larger of both",
    "gb_per_s": "bytes that have to move over the time",
    "share_of_copy": "gb_per_s / copy_gb_per_s",
    "tflop_per_s": "10**12 floating-point operations a second",
    "peak_tflop_per_s": "of the data sheet",
    "share_of_peak": "tflop_per_s / peak_tflop_per_s",
    "load_s": "seconds to load",
    "write_s": "seconds to write",
    "seconds": "wall-clock time",
    # energy
    "joules_per_step": "of the whole device",
    "joules_per_prefill_token": "of the whole device",
    "joules_per_decode_token": "of the whole device",
    "energy_source": "counter, sampled power, RAPL or estimate",
    "watts": "mean",
    "prefill_watts": "mean",
    "decode_watts": "mean",
    "idle_watts": "mean",
    "mhz": "clock of the GPU",
    # what happened
    "not_run": "why there are no numbers",
    "build": "of llama.cpp",
    "backends": "of llama.cpp",
}  # fmt: skip
ENDINGS = ("_se", "_low", "_high", "_p10", "_p90", "_sd")


def vocabulary_of(row) -> list[str]:
    """The names among ``row`` that :data:`COLUMNS` knows, with or without one of ENDINGS."""

    def known(key):
        return key in COLUMNS or any(key.endswith(e) and key.removesuffix(e) in COLUMNS for e in ENDINGS)

    return [key for key in row if known(key) or key in ("ms_p10", "ms_p90")]


@dataclass(frozen=True)
class Results:
    """One file of measurements: ``rows`` (a list of flat dicts) and where they come from."""

    name: str
    rows: list
    machine: dict
    versions: dict
    created: str
    profile: str
    commit: str
    migrated: str | None = None

    def frame(self):
        """Return the rows as a pandas DataFrame, one column a key."""
        import pandas

        return pandas.DataFrame(self.rows)

    @property
    def device(self) -> str:
        """Name of the GPU or CPU that the rows were measured on."""
        return self.machine["device"]


def machine_folder(about: dict | None = None) -> str:
    """Return the folder for measurements of this machine: ``cpu``, or a GPU's model such as ``h200``."""
    from . import measure

    about = about or measure.machine()
    if "compute_capability" not in about:
        return "cpu"
    words = re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9 ]", " ", about["device"].lower()).split()
    return words[0] if words else "gpu"  # "NVIDIA H200" and "NVIDIA H200 NVL" are both h200


def versions() -> dict:
    """Versions of Python and of PACKAGES, where installed."""
    found = {"python": platform.python_version()}
    for key, package in PACKAGES.items():
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, with ``+`` when files differ from it.

    Outside a checkout (a copy of the files on a GPU machine): what ``QTUTOR_COMMIT`` says, else ``unknown``.
    """
    try:
        def git(*argv):
            return subprocess.run(["git", "-C", str(files.ROOT), *argv], capture_output=True, text=True, timeout=20,
                                  check=True).stdout.strip()  # fmt: skip

        changed = git("status", "--porcelain", "--untracked-files=no", "--", "qtutor", "data/model")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("QTUTOR_COMMIT", "unknown")


def _plain(value):
    """NumPy and torch scalars as Python numbers; everything else as it is."""
    if isinstance(value, (str, bool, int, float, type(None))):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    return value


def validate(data: dict) -> dict:
    """Return ``data`` when it follows the schema; raise QtutorError with what is wrong otherwise."""
    from pydantic import ValidationError

    try:
        _schema().model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"]) or "the file"
        what = first["msg"].removeprefix("Value error, ")
        raise QtutorError(f"These results do not follow the schema: {where}: {what}; see the docstring of "
                          "qtutor.results, and save them again.") from None  # fmt: skip
    return data


@cache
def _schema():
    """The schema of a file, as a pydantic model."""
    from typing import Annotated, Any, Literal

    from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StrictStr

    def flat(value):
        if not isinstance(value, str | bool | int | float | None):
            raise ValueError("rows are flat: numbers, strings, booleans and None")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("numbers must be finite, None says that there is none")
        return value

    Value = Annotated[Any, AfterValidator(flat)]

    def in_vocabulary(row: dict) -> dict:
        if strange := sorted(set(row) - set(vocabulary_of(row))):
            raise ValueError(f"{strange[0]!r} is no column of results.COLUMNS")
        return row

    def has(*keys):
        def check(value: dict) -> dict:
            if not any(isinstance(value.get(key), str) for key in keys):
                raise ValueError(f"it must name {' or '.join(keys)}")
            return value

        return AfterValidator(check)

    class File(BaseModel):
        model_config = ConfigDict(extra="forbid")
        name: Annotated[StrictStr, Field(pattern=f"^{_NAME.pattern}$")]
        created: AwareDatetime
        commit: StrictStr
        profile: Literal["quick", "full"]
        migrated: StrictStr | None = None
        machine: Annotated[dict, has("device")]
        versions: Annotated[dict, has("torch", "python")]
        rows: Annotated[list[Annotated[dict[StrictStr, Value], Field(min_length=1), AfterValidator(in_vocabulary)]],
                        Field(min_length=1)]  # fmt: skip

    return File


def save(name: str, rows, created: str | None = None, profile: str | None = None, directory=None) -> Path:
    """Write ``rows`` with their provenance; return the path.

    Args:
        name: small letters, digits and underscores; names the file.
        rows: flat dicts (or a DataFrame) of finite numbers, strings, booleans and None.
        created: ISO 8601 time with its zone; now by default.
        profile: "quick" or "full"; the one in force by default.
        directory: where ``<machine>/<name>.json`` goes, by default the course's ``data/results``.

    Raises QtutorError for rows that do not follow the schema and where the file cannot be written.
    """
    from . import measure

    if hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    about = measure.machine()
    data = validate({
        "name": name,
        "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "profile": profile or current_profile(),
        "machine": about,
        "versions": versions(),
        "rows": [{key: _plain(value) for key, value in row.items()} if isinstance(row, dict) else row for row in rows],
    })  # fmt: skip
    path = Path(directory or RESULTS) / machine_folder(about) / f"{name}.json"
    return files.write_text(path, dumps(data), "choose another directory, or free some space")


def dumps(data: dict) -> str:
    """JSON with one row a line, so that two recordings compare well in a diff; six significant digits."""

    def short(value):
        return float(f"{value:.6g}") if isinstance(value, float) else value

    head = {key: value for key, value in data.items() if key != "rows"}
    rows = ",\n".join("    " + json.dumps({k: short(v) for k, v in row.items()}, ensure_ascii=False)
                      for row in data["rows"])  # fmt: skip
    return json.dumps(head, indent=2, ensure_ascii=False)[:-2] + f',\n  "rows": [\n{rows}\n  ]\n}}\n'


def _path(name: str, machine: str, directory) -> Path:
    for part in (name, machine):
        if not isinstance(part, str) or not _NAME.fullmatch(part):
            raise QtutorError(f"{part!r} cannot name results: use small letters, digits and underscores.")
    return Path(directory or RESULTS) / machine / f"{name}.json"


def exists(name: str, machine: str = "h200", directory=None) -> bool:
    """True when there are results ``name`` of ``machine``, one of MACHINES."""
    return _path(name, machine, directory).is_file()


def load(name: str, machine: str = "h200", directory=None) -> Results:
    """Read the results ``name`` measured on ``machine``; raises QtutorError where there are none or damaged ones."""
    path = _path(name, machine, directory)
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError:
        folder = Path(directory or RESULTS) / machine
        there = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none yet"
        raise QtutorError(f"There are no results '{name}' of machine '{machine}' (there: {there}): choose one of "
                          "those, or record them with 'make results'.") from None  # fmt: skip
    except ValueError:
        raise QtutorError(f"The results '{machine}/{name}.json' are damaged: restore them with "
                          "'git checkout data/results'.") from None  # fmt: skip
    return Results(**validate(data))


def on_gpu(name: str, directory=None) -> Results | None:
    """The results ``name`` of a GPU, from the first folder of MACHINES that has them; None where no GPU has any.

    Prose then names the machine through ``found.device``, whichever it is.
    """
    folders = (machine for machine in MACHINES if machine != "cpu" and exists(name, machine, directory))
    return next((load(name, machine, directory) for machine in folders), None)
