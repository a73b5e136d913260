"""Measurements with their provenance: one writer, one reader, one schema.

What a notebook measures goes to ``data/results/<machine>/<name>.json``, where ``<machine>`` is ``h200``, ``h100`` or
``cpu``, and what its prose says about another machine comes from there: no measured number is typed by hand.

    {"name": "gguf_quality", "created": "2026-01-31T12:00:00+00:00", "commit": "...", "profile": "full",
     "machine": {"device": "NVIDIA H200", "driver": "...", "memory_gib": 139.8},
     "versions": {"python": "...", "torch": "...", "llama_cpp": "..."},
     "rows": [{"type": "Q4_K_M", "bits_per_weight": 4.9, "kld_mean": 0.01, "kld_se": 0.0002}, ...]}

Rows are flat; the unit is part of the key: ``ms_per_step``, ``peak_gib``, ``joules_per_token``, ``tokens_per_s``,
``kld_mean`` with its standard error ``kld_se``.

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
from importlib import metadata
from pathlib import Path

from . import QtutorError
from . import profile as current_profile

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
MACHINES = ("h200", "h100", "cpu")
PACKAGES = {"torch": "torch", "numpy": "numpy", "transformers": "transformers", "torchao": "torchao",
            "llama_cpp": "llama-cpp-python", "gguf": "gguf", "transformer_engine": "transformer-engine"}  # fmt: skip
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


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


def _versions() -> dict:
    found = {"python": platform.python_version()}
    for key, package in PACKAGES.items():
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of this checkout, with ``+`` when files differ from it.

    Outside a checkout (a copy of the files on a GPU machine): what ``QTUTOR_COMMIT`` says, else ``unknown``.
    """
    try:
        def git(*argv):
            return subprocess.run(["git", "-C", str(ROOT), *argv], capture_output=True, text=True, timeout=20,
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

    def need(condition, what):
        if not condition:
            raise QtutorError(f"These results do not follow the schema: {what}; see the docstring of qtutor.results, "
                              "and save them again.")  # fmt: skip

    need(isinstance(data, dict), "the file must hold one object")
    kinds = dict.fromkeys(("name", "created", "commit", "profile"), str)
    kinds |= {"machine": dict, "versions": dict, "rows": list}
    for key, kind in kinds.items():
        need(isinstance(data.get(key), kind), f"{key!r} must be there, as {kind.__name__}")
    need(set(data) == set(kinds), f"unknown keys {sorted(set(data) - set(kinds))}")
    need(_NAME.fullmatch(data["name"]), f"the name {data['name']!r} must be small letters, digits and underscores")
    need(data["profile"] in ("quick", "full"), f"the profile {data['profile']!r} must be quick or full")
    try:
        when = datetime.fromisoformat(data["created"])
    except ValueError:
        when = None
    need(when is not None and when.tzinfo is not None, "'created' must be an ISO 8601 time with its zone")
    need(isinstance(data["machine"].get("device"), str), "'machine' must name its 'device'")
    need(data["versions"].get("torch") or data["versions"].get("python"), "'versions' must name torch or python")
    need(data["rows"], "there must be at least one row")
    for number, row in enumerate(data["rows"]):
        need(isinstance(row, dict) and row, f"row {number} must be a dict with values")
        for key, value in row.items():
            need(isinstance(key, str) and re.fullmatch(r"[A-Za-z]\w*", key), f"row {number} has the key {key!r}, "
                 "which must be letters, digits and underscores")  # fmt: skip
            need(isinstance(value, (str, bool, int, float, type(None))), f"row {number} must be flat, and {key!r} is "
                 f"a {type(value).__name__}")  # fmt: skip
            need(not isinstance(value, float) or math.isfinite(value), f"row {number} must have finite numbers, and "
                 f"{key!r} is {value}")  # fmt: skip
    return data


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
        "commit": _commit(),
        "profile": profile or current_profile(),
        "machine": about,
        "versions": _versions(),
        "rows": [{key: _plain(value) for key, value in row.items()} if isinstance(row, dict) else row for row in rows],
    })  # fmt: skip
    path = Path(directory or RESULTS) / machine_folder(about) / f"{name}.json"
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(dumps(data), "utf-8")
        os.replace(partial, path)
    except OSError as error:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass  # where a file stands in for the folder there is nothing to remove
        raise QtutorError(f"The results cannot be written to '{path.parent}' ({error.strerror}): choose another "
                          "directory, or free some space.") from None  # fmt: skip
    return path


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
