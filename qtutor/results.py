"""Measurements with their provenance: one writer, one reader, one schema.

What a notebook measures goes to ``data/results/<machine>/<name>.json``, where ``<machine>`` is ``h200``, ``h100`` or
``cpu``, and what its prose says about another machine comes from there: no measured number is typed by hand.

    {"name": "gguf_quality", "created": "2026-01-31T12:00:00+00:00", "commit": "...", "profile": "full",
     "machine": {"device": "NVIDIA H200", "driver": "...", "memory_gib": 139.8},
     "versions": {"python": "...", "torch": "...", "llama_cpp": "..."},
     "rows": [{"type": "Q4_K_M", "bits_per_weight": 4.9, "kld_mean": 0.01, "kld_mean_se": 0.0002}, ...]}

Rows are flat, the unit is part of the name, and one thing has one name: :data:`VOCABULARY` lists them, and a row with
another name is refused.  To a measured column belong, by its ending, ``_se`` (standard error), ``_low`` and ``_high``
(interval), ``_p10`` and ``_p90`` (percentiles), ``_sd`` (standard deviation of single values).

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
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from . import QtutorError, files
from . import profile as current_profile

RESULTS = files.DATA / "results"
MACHINES = ("h200", "h100", "h200x4", "h100x4", "h200x2", "h100x2", "cpu")
PACKAGES = ("torch", "numpy", "transformers", "torchao", "llama-cpp-python", "gguf", "transformer-engine")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")

#: The columns of all rows, by subject; in brackets what the name leaves open.
VOCABULARY = {
    "what was measured": """
        technique (name of decide.techniques), family (group of techniques: float, torchao, llama.cpp ...), format (of
        the weights, and of activations), type (llama.cpp's, such as Q4_K_M), backend (library that stores and
        multiplies), runtime (engine that ran it), cards (GPUs that hold the model), split (over them: tensor, layer or
        row), tool (program that measured it), method (way of choosing the codes: RTN, GPTQ ...), scheme (target of
        QAT, such as int4 g32), arm (PTQ; QAT trained or distilled; float), trained
        (with fake quantization before), imatrix (with an importance matrix), recipe (of Transformer Engine, or BF16),
        rung (step of the ladder of fp8_layers), kind (group of kernels, or part of a recording), what (operation that
        was timed), stored_as (dtypes that hold the weights), bits (of a code), group (values that share a scale),
        device (cpu or cuda), dtype, compiled (with torch.compile), graph (in a CUDA graph), build, backends (both of
        llama.cpp), threads (of the CPU), notebook (its topic), jobs (processes that shared the machine), ranks
        (processes that train together, one a GPU), tensor (its name in GGUF), mixture (who chose the tensors' types),
        rival (what it is compared with), rotation (of keys and values before rounding), not_run (why there are no
        numbers), recorded (date and commit of the row, where a file joins recordings)""",
    "model": "model (its name), shape (name of its shape), hidden (width), intermediate (width of the MLP), heads, "
             "kv_heads, layers",
    "tokens": """
        m, n, k (rows, columns, terms of each sum of a product), batch (sequences at once), sequence, length (both:
        tokens of a sequence), ctx (tokens of the context), depth (tokens already in the KV cache), kv_type (of the KV
        cache), tokens (in a step), prefill_tokens (of a prompt), decode_tokens (written), decode_context (tokens in the
        cache while writing), calibration_tokens (that chose scales or the importance matrix), scored_tokens, windows
        (both of the evaluation text), text (fingerprint of the evaluation text, or "before pinning"), repeats (timed
        calls)""",
    "training": """
        seed, rate (learning rate), step (from 0), steps (in all), tokens_per_step, optimizer, trained_weights (numbers
        that it updates), train_nats, held_out_nats (negative log-likelihood a token of the training batch, of held-out
        text)""",
    "quality": """
        perplexity (exp of the mean negative log-likelihood, on scored_tokens), base_perplexity (of the unquantized
        model on the same tokens), perplexity_ratio, perplexity_diff (to the base, error paired), perplexity_correlation
        (of the two log-likelihoods), kld_mean, kld_median, kld_p99, kld_p999, kld_max (KL divergence of the model from
        the base, nats a token; p99 and p999 are percentiles), kld_mean_se_windows, perplexity_ratio_se_windows
        (standard errors over windows), kld_less_rival (kld_mean minus that of the rival, paired), entropy_diff (of the
        predictions, minus the base's), nll_less_rival (negative log-likelihood minus the rival's), nll_hot_less_rival
        (the same with all logits divided by 1.1), kld_calibration (on the text that chose the types), kld_predicted
        (sum of the tensors' single scores there), block (tokens averaged before an interval), delta_p_mean, delta_p_rms
        (change of the true token's probability, a share), same_top (share of tokens with the same first choice),
        accuracy (share of questions answered right), accuracy_diff (to the unquantized model, paired), accuracy_n
        (questions), imatrix_gain (kld_mean without an importance matrix minus with), imatrix_gain_se_windows (standard
        error over windows), imatrix_ignored (the matrix changed nothing)""",
    "chat": """
        form (what the prompt asks for), prompt, answer (greedy), wanted (what a right answer holds), stopped (the model
        ended its answer by itself), repetition (share of the answer's 4-grams that occurred before), prompt_tokens,
        answer_tokens, gate_checks, gate_failed (of decide.gate, numbers), gate_says (which failed)""",
    "memory": """
        bits_per_weight (stored, scales included), stored_bytes (of a tensor), weights_mb, weights_gib (as stored; 1 MB
        is 10**6 bytes, a GiB 2**30), file_mb, file_bytes, peak_gib (of the device), read_bytes_per_token (weights and
        cache), gpu_used_gib, gpu_used_loaded_gib (by everybody: peak, once loaded), device_model_mib, host_model_mib,
        device_kv_mib, host_kv_mib, device_compute_mib, host_compute_mib (llama.cpp's account), fits (ran)""",
    "speed": """
        ms_per_step (median time of a step, a call or a product), ms_bf16, ms_fp8 (the same, side by side), ms (time of
        a group of kernels), seconds (wall-clock time), load_s, write_s, speedup (time of the other over time of this),
        prefill_speedup, decode_speedup (over the unquantized model), time_to_first_token_ms, train_tokens_per_s (of one
        GPU), prefill_tokens_per_s, decode_tokens_per_s (read and written, all sequences together),
        tool_prefill_tokens_per_s, tool_decode_tokens_per_s (as llama-bench says), ceiling_tokens_per_s (bandwidth over
        bytes read), ceiling_share (decode_tokens_per_s over that ceiling), copy_gb_per_s, read_gb_per_s (bandwidth of a
        copy, read and written; of reading), bandwidth_gb_per_s (the larger of both), gb_per_s (bytes that have to move
        over the time), share_of_copy (gb_per_s over copy_gb_per_s), gathered_bytes_per_weight,
        scattered_bytes_per_weight (by all-gathers and reduce-scatters of a step, over the model's weights),
        exposed_share (of a step's time, in which the GPU only communicated), ours_ms, torchao_ms, torch_ms, compiled_ms
        (of a call), ours_kernel_ms, compiled_kernel_ms (on the GPU alone), compiled_gb_per_s, compiled_share_of_copy,
        tflop_per_s, peak_tflop_per_s (of the data sheet), share_of_peak""",
    "serving": """
        loop (open: requests come at a rate; closed: users wait for their answer), rate_per_s (offered, open loop),
        rate_lost_per_s (the lowest tried above it that broke a limit), options (more words of a server's command),
        streams (users, closed loop), slots (requests computed at once), users_fit (whose caches fit beside the
        weights), kv_tokens (that the cache holds), start_s (until the server answers), requests (of all repeats),
        failed (without an answer), requests_per_s (answered), output_tokens_per_s, ttft_p50_ms, ttft_p95_ms,
        ttft_p99_ms (time to first token, percentiles of requests), itl_p50_ms, itl_p95_ms, itl_p99_ms (inter-token
        latency of a request), ttft_limit_ms, itl_limit_ms, goodput_per_s (within both limits), within (their share),
        server_ttft_ms (arrival to first token, vLLM's clock), engine_prefill_ms (from its first step on; means)""",
    "energy": """
        joules_per_step, joules_per_train_token (of all GPUs), joules_per_prefill_token, joules_per_decode_token (of the
        whole device), energy_source (NVML or RAPL counter, or estimate), watts, prefill_watts, decode_watts, idle_watts
        (means), mhz (of the GPU)""",
}  # fmt: skip
COLUMNS = frozenset(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", " ".join(VOCABULARY.values()))))


def vocabulary_of(row) -> list[str]:
    """The names among ``row`` that :data:`VOCABULARY` has, with or without an ending for an error or an interval."""
    return [key for key in row if key in COLUMNS or re.sub("_(se|low|high|p10|p90|sd)$", "", key) in COLUMNS]


def _row(row: dict) -> dict:
    """The row with scalars of NumPy and torch as Python numbers; refused unless flat, finite and in the vocabulary."""
    if strange := sorted(set(row) - set(vocabulary_of(row))):
        raise ValueError(f"{strange[0]!r} is no column of results.VOCABULARY")
    row = {key: value.item() if getattr(value, "ndim", None) == 0 else value for key, value in row.items()}
    for key, value in row.items():
        if not isinstance(value, str | bool | int | float | None):
            raise ValueError(f"{key}: rows are flat: numbers, strings, booleans and None")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}: numbers must be finite, None says that there is none")
    return row


class Results(BaseModel):
    """One file of measurements: ``rows`` (a list of flat dicts) and where they come from.  This is the schema."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[StrictStr, Field(pattern=f"^{_NAME.pattern}$")]
    created: StrictStr
    commit: StrictStr
    profile: Literal["quick", "full"]
    migrated: StrictStr | None = None
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: Annotated[list[Annotated[dict[StrictStr, Any], Field(min_length=1), AfterValidator(_row)]],
                    Field(min_length=1)]  # fmt: skip

    @model_validator(mode="after")
    def _provenance(self):
        if not datetime.fromisoformat(self.created).tzinfo:
            raise ValueError("created needs its time zone")
        if "device" not in self.machine or not self.versions:
            raise ValueError("machine must name the device, and versions the packages")
        return self

    def frame(self):
        """Return the rows as a pandas DataFrame, one column a key."""
        import pandas

        return pandas.DataFrame(self.rows)

    @property
    def device(self) -> str:
        """Name of the GPU or CPU that the rows were measured on."""
        return self.machine["device"]


def validate(data: dict) -> Results:
    """Return ``data`` as Results when it follows the schema; raise QtutorError with what is wrong otherwise."""
    try:
        return Results.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"]) or "the file"
        what = first["msg"].removeprefix("Value error, ")
        raise QtutorError(f"These results do not follow the schema: {where}: {what}; see the docstring of "
                          "qtutor.results, and save them again.") from None  # fmt: skip


def machine() -> dict:
    """:func:`qtutor.measure.machine`; torch, which it needs, is not needed to read results."""
    from . import measure

    return measure.machine()


def machine_folder(about: dict | None = None) -> str:
    """Return the folder for measurements of this machine: ``cpu``, or a GPU's model such as ``h200``."""
    about = about or machine()
    if "compute_capability" not in about:
        return "cpu"
    words = re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9 ]", " ", about["device"].lower()).split()
    devices = about.get("devices", 1)  # "NVIDIA H200" and "NVIDIA H200 NVL" are both h200; four of them h200x4
    return (words[0] if words else "gpu") + (f"x{devices}" if devices > 1 else "")


def versions() -> dict:
    """Versions of Python and of PACKAGES, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package.removesuffix("-python").replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, with ``+`` when files of the package or the model differ from it.  Of a copy of the
    files on a GPU machine: what ``QTUTOR_COMMIT`` says; where nobody knows, ``unknown``."""
    if os.environ.get("QTUTOR_COMMIT"):
        return os.environ["QTUTOR_COMMIT"]
    run = partial(subprocess.check_output, cwd=files.ROOT, text=True, timeout=20, stderr=subprocess.DEVNULL)
    try:
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "--", "qtutor", "data/model"]).strip()
        return run(["git", "rev-parse", "--short=12", "HEAD"]).strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def save(name: str, rows, created: str | None = None, profile: str | None = None, directory=None,
         devices: int = 1) -> Path:  # fmt: skip
    """Write ``rows`` (flat dicts, or a DataFrame) with their provenance; return the path ``<machine>/<name>.json``.
    ``devices``: GPUs that were measured together.

    ``created`` is now by default (ISO 8601 with its zone), ``profile`` the one in force, ``directory`` the course's
    ``data/results``.  Raises QtutorError for rows that do not follow the schema and where nothing can be written.
    """
    about = machine() | ({"devices": devices} if devices > 1 else {})
    data = {"name": name, "created": created or datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
            "profile": profile or current_profile(), "machine": about, "versions": versions(),
            "rows": rows.to_dict("records") if hasattr(rows, "to_dict") else rows}  # fmt: skip
    text = dumps(data | {"rows": validate(data).rows})
    path = Path(directory or RESULTS) / machine_folder(about) / f"{name}.json"
    return files.write_text(path, text, "choose another directory, or free some space")


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
    return validate(data)


def on_all(name: str, directory=None) -> list[Results]:
    """The results ``name`` of every machine in MACHINES that has them, in that order: a CPU's last."""
    return [load(name, machine, directory) for machine in MACHINES if exists(name, machine, directory)]


def on_gpu(name: str, directory=None, kind: str | None = None) -> Results | None:
    """The results ``name`` of the first GPU in MACHINES that has them, with rows of this ``kind``, or None."""
    there = (load(name, machine, directory) for machine in MACHINES[:-1] if exists(name, machine, directory))
    return next((run for run in there if kind is None or any(row.get("kind") == kind for row in run.rows)), None)
