"""Every technique of the course on one machine: the rows behind notebooks 10 and 11.

A comparison is fair when everything but one thing is the same.  So all techniques here run on one machine, on the same
weights, prompt lengths and text, and each number means the same for all of them:

    size      bytes of all stored weights, embedding and head included, as they lie in memory or in the file
    quality   against the FP32 model in PyTorch, on the same tokens and the same questions
    prefill   one pass over a prompt; tokens a second of the whole batch
    decode    one step, one token for each sequence, with ``decode_context`` tokens in the cache
    energy    of the GPU, from its own counter; on a CPU without a counter an estimate that says so

Both phases are called layer by layer with a cache of fixed length (:func:`qtutor.rigs.fp8_models.llama_logits`), on a GPU
from a CUDA graph, so that Python's time is not what is compared; llama.cpp runs as people run it (F16 cache, flash
attention).  The course model has real weights.  The Llama-2-7B shape has random ones: bytes, speed and energy do not
depend on their values, quality does, and is left out.

    rows = tradeoff.rows(["FP32", "GGUF Q4_K_M"], batches=(1,))
    tradeoff.record()                            # everything -> data/results/<machine>/tradeoff.json

    python -m qtutor.rigs.tradeoff                    # the same from a shell; minutes on a CPU

A technique that cannot run here gives one row with the reason in ``not_run``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from .. import QtutorError, measure, pick, results

QUALITY = ("perplexity", "perplexity_se", "perplexity_ratio", "perplexity_ratio_se", "kld_mean", "kld_mean_se", "same_top", "same_top_se",
           "scored_tokens", "accuracy", "accuracy_se", "accuracy_diff", "accuracy_diff_se", "accuracy_n")  # fmt: skip
SPEED = ("prefill_tokens", "decode_context", "prefill_tokens_per_s", "prefill_tokens_per_s_low",
         "prefill_tokens_per_s_high", "decode_tokens_per_s", "decode_tokens_per_s_low", "decode_tokens_per_s_high",
         "peak_gib", "joules_per_prefill_token", "joules_per_prefill_token_low", "joules_per_prefill_token_high",
         "joules_per_decode_token", "joules_per_decode_token_low", "joules_per_decode_token_high", "energy_source",
         "threads")  # fmt: skip
COLUMNS = ("shape", "technique", "family", "runtime", "trained", "batch", "bits_per_weight", "weights_mb", *QUALITY,
           *SPEED, "not_run")  # fmt: skip
COUNTER_STEP_S = 0.1  # NVML's energy counter is brought up to date every 20 to 100 ms, by model
LEAST_FOR_ENERGY_S = 0.6  # a shorter window says too little: no joules then


@dataclass(frozen=True)
class Technique:
    """One way to store and run a model.

    ``apply(model)`` changes a BF16 LlamaForCausalLM (FP32: a float32 one) in place and returns it, on the model's own
    device; or ``gguf`` names a llama.cpp type.  ``fits`` says where it can run: "any", "gpu" or "cpu"; ``speed``
    is False for an emulation, whose speed would be nobody's.
    """

    name: str
    family: str
    runtime: str
    apply: Callable | None = None
    gguf: str | None = None
    fits: str = "any"
    speed: bool = True
    trained: bool = False
    compiled: bool = False


def _keep(model):
    return model


def _torchao(cpu: tuple, gpu: tuple | None = None) -> Callable:
    """``apply`` for a torchao configuration: its name and options, on a GPU perhaps another one."""

    def apply(model):
        for noisy in ("torchao", "torch.utils._pytree"):  # "Failed to load _C_*.so": true, and of no consequence
            logging.getLogger(noisy).setLevel(logging.ERROR)
        import torchao.quantization as ao

        on_gpu = next(model.parameters()).is_cuda
        if on_gpu:
            from . import fp8_models

            fp8_models.inference_formats()  # puts an int8 product that a CUDA graph can hold in torchao's place
        name, make = gpu if on_gpu and gpu else cpu
        ao.quantize_(model.model.layers, getattr(ao, name)(**make(ao)))
        return model

    return apply


def _none(ao) -> dict:
    return {}


def _int4(ao) -> dict:
    import torch

    return dict(weight_dtype=torch.int4, granularity=ao.PerGroup(32))


def _tiles(ao) -> dict:
    return dict(group_size=32, int4_packing_format="tile_packed_to_4d")


def _per_row(ao) -> dict:
    return dict(granularity=ao.PerRow())


def _te_fp8(model):
    from . import fp8_bench, fp8_models

    fp8_bench._require_fp8()
    return fp8_models._te_inference(model)


def _te_emulated(model):
    """FP8 products in every layer (current scaling), computed by the emulation: the numbers, not the speed."""
    from .. import te_switch as switch

    switch.activate()
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    switch.swap_linears(model)
    forward = model.forward

    def in_fp8(*args, **kwargs):
        with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
            return forward(*args, **kwargs)

    model.forward = in_fp8
    return model


INT8, INT8_DYNAMIC = ("Int8WeightOnlyConfig", _none), ("Int8DynamicActivationInt8WeightConfig", _none)
INT4, INT4_GPU = ("IntxWeightOnlyConfig", _int4), ("Int4WeightOnlyConfig", _tiles)
FP8, FP8_DYNAMIC = ("Float8WeightOnlyConfig", _none), ("Float8DynamicActivationFloat8WeightConfig", _per_row)
GGUF_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


def _all() -> dict[str, Technique]:
    def ao(name, *config, **options):
        return Technique(name, "torchao", "pytorch", _torchao(*config), **options)

    found = [
        Technique("FP32", "float", "pytorch", _keep),
        Technique("BF16", "float", "pytorch", _keep),
        Technique("FP8 (Transformer Engine)", "fp8", "te", _te_fp8, fits="gpu"),
        Technique("FP8 emulated", "fp8", "pytorch", _te_emulated, fits="cpu", speed=False),
        ao("torchao INT8 weight-only", INT8),
        ao("torchao INT8 dynamic", INT8_DYNAMIC),
        ao("torchao INT4 group 32", INT4, INT4_GPU),
        ao("torchao FP8 weight-only", FP8),
        ao("torchao FP8 dynamic", FP8_DYNAMIC, fits="gpu"),
        ao("torchao INT8 weight-only, compiled", INT8, fits="gpu", compiled=True),
        ao("torchao FP8 dynamic, compiled", FP8_DYNAMIC, fits="gpu", compiled=True),
        Technique("QAT Q4_0", "qat", "llama.cpp", gguf="Q4_0", trained=True),
    ]
    found += [Technique(f"GGUF {kind}", "gguf", "llama.cpp", gguf=kind) for kind in GGUF_TYPES]
    return {technique.name: technique for technique in found}


TECHNIQUES = _all()


def measured(rows) -> list[dict]:
    """The rows with numbers (``not_run`` is None), as dicts; ``rows``: dicts, or a results file with ``.rows``."""
    return [row for row in getattr(rows, "rows", rows) if row.get("not_run") is None]


def left_out(rows) -> dict[str, str]:
    """What did not run, and why: {"technique (shape)": sentence}."""
    return {f"{row['technique']} ({row['shape']})": row["not_run"] for row in getattr(rows, "rows", rows)
            if row.get("not_run") is not None}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- model shapes
SHAPES = ("course", "llama2_7b")
LLAMA2_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096)  # fmt: skip


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _free() -> None:
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        # cuBLAS keeps a work space for each stream, which would count as the next model's memory
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()


def _float_model(shape: str, technique: Technique, device: str):
    """The float model that a technique starts from: float32 for FP32, bfloat16 for all others."""
    import torch

    from .. import course_model

    dtype = torch.float32 if technique.name == "FP32" else torch.bfloat16
    if shape == "course":
        return course_model.load(dtype=dtype, device=device)
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**LLAMA2_7B)).eval()
    finally:
        torch.set_default_dtype(before)


def build(technique: Technique, shape: str = "course", device: str | None = None):
    """The model of a technique that runs in PyTorch, ready to run, in eval mode."""
    import torch

    with torch.no_grad():
        return technique.apply(_float_model(shape, technique, device or _device())).eval()


def _parts(tensor):
    """The plain tensors that a tensor subclass of torchao or Transformer Engine is made of."""
    if hasattr(tensor, "get_data_tensors"):  # Transformer Engine's quantized tensors
        made = [part for part in tensor.get_data_tensors() if part is not None]
        scale = getattr(tensor, "_scale_inv", None)
        return made + ([scale] if scale is not None else [])
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [plain for name in names for plain in _parts(getattr(tensor, name))]
    return [tensor]


def stored_size(model) -> tuple[int, int]:
    """(bytes, weights) of a PyTorch model as it is stored: tied weights once, codes and scales as they lie in memory.

    The dtype that a quantized tensor *shows* is that of its results, so this looks inside.
    """
    size = weights = 0
    seen = set()
    for parameter in model.parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            weights += parameter.numel()
            size += sum(part.numel() * part.element_size() for part in _parts(parameter))
    return size, weights


# ------------------------------------------------------------------------------------------------------------ speed
@dataclass(frozen=True)
class Sizes:
    """How much is run: ``tokens`` of each prompt and in the cache of a decoding step, ``seconds`` for each timing,
    ``windows`` of 512 tokens and multiple-choice ``questions`` for the quality."""

    tokens: int = 256
    seconds: float = 1.0
    windows: int = 64
    questions: int = 400


def sizes_for(shape: str = "course", full: bool | None = None) -> Sizes:
    """The sizes of a recording: ``full`` or quick ones, by default those of the profile in force."""
    full = pick(quick=False, full=True) if full is None else full
    if shape != "course":
        return Sizes(seconds=1.0, windows=0, questions=0)
    if not full:
        return Sizes(tokens=64, seconds=0.1, windows=4, questions=24)
    return Sizes(seconds=0.4 if _device() == "cuda" else 1.5)


def batches_for() -> tuple[int, ...]:
    """Batch sizes of a recording on this machine."""
    return (1, 8, 32) if _device() == "cuda" else (1, 8)


SLOW_S = 2.0  # a call that takes longer is timed twice only


def _seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call, after one to warm up: the best of three, or of one where that takes long."""
    call()
    measure.synchronize(device)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        call()
        measure.synchronize(device)
        best = min(best, time.perf_counter() - began)
        if best > 0.3:
            break
    return max(best, 1e-6)


def _phase(name: str, call, tokens: int, seconds: float, device: str, clock: str | None = None,
           one: float | None = None) -> dict:  # fmt: skip
    """Columns of one phase: ``call`` handles ``tokens`` tokens and is repeated for about ``seconds``.

    ``device`` is where energy is read, ``clock`` where time is: "cpu" for a library that waits for its own work.
    ``one``: seconds a call takes, where that is known and the call is warm.  ``_low`` and ``_high`` are tokens a second
    at the 90th and the 10th percentile of the times.
    """
    from .. import energy

    clock = clock or device
    one = _seconds(call, clock) if one is None else one
    repeats = 2 if one > SLOW_S else max(5, min(5000, round(seconds / one)))
    with energy.track_energy(device) as used:
        timing = measure.time_ms(call, warmup=0, repeats=repeats, device=clock)
    column, joules = f"{name}_tokens_per_s", f"joules_per_{name}_token"
    row = {column: timing.per_second(tokens), f"{column}_low": 1000 * tokens / timing.p90,
           f"{column}_high": 1000 * tokens / timing.p10, "energy_source": used.source}  # fmt: skip
    counted = used.source.startswith("NVML")  # its counter moves in steps
    if not math.isfinite(used.joules) or (counted and used.seconds < LEAST_FOR_ENERGY_S):
        return row
    per_token = used.joules / repeats / tokens
    if counted:  # so much of the window may be missing or too much
        off = COUNTER_STEP_S / used.seconds
        low, high = per_token * (1 - off), per_token * (1 + off)
    else:  # it follows the time
        low, high = (per_token * ms / timing.median_ms for ms in (timing.p10, timing.p90))
    return row | {joules: per_token, f"{joules}_low": low, f"{joules}_high": high}


def _compile_products(model) -> None:
    """torch.compile for the layers' products: one graph serves all layers, so it takes seconds and not minutes."""
    import torch

    torch._dynamo.config.recompile_limit = 64  # beyond the limit (8: a few shapes) it would stay eager without a word
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for child in parent.children():
                if isinstance(child, torch.nn.Linear):
                    child.compile(dynamic=False)


def pytorch_speed(model, batch: int, sizes: Sizes, phases=("prefill", "decode")) -> dict:
    """Speed and energy columns of a Llama in PyTorch, for one batch size.

    On a GPU each call is replayed from a CUDA graph, unless one takes longer than two seconds: then its launches are
    no matter.
    """
    import torch

    from .fp8_bench import _captured
    from .fp8_models import FixedCache, llama_logits

    device, vocab = model.device.type, model.config.vocab_size
    row = {"prefill_tokens": sizes.tokens, "decode_context": sizes.tokens,
           "threads": torch.get_num_threads() if device == "cpu" else None}  # fmt: skip

    def measured_phase(name, call, tokens):
        one = _seconds(call, device)
        if device == "cuda" and one <= SLOW_S:
            call, one = _captured(call)[0], None
        return _phase(name, call, tokens, sizes.seconds, device, one=one)

    torch.manual_seed(0)
    with torch.no_grad():
        if "prefill" in phases:
            ids = torch.randint(0, vocab, (batch, sizes.tokens), device=device)
            row |= measured_phase("prefill", lambda: llama_logits(model, ids, last_only=True), ids.numel())
        if "decode" in phases:
            cache = FixedCache(model.config, batch, sizes.tokens, device, model.model.norm.weight.dtype)
            token = torch.randint(0, vocab, (batch, 1), device=device)
            row |= measured_phase("decode", lambda: llama_logits(model, token, cache), batch)
    return row


def _used_gib() -> float:
    """GPU memory in use by everybody, in GiB: what llama.cpp takes is not in PyTorch's books."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) / measure.GIB


def llama_speed(path, batch: int, sizes: Sizes, threads: int | None = None) -> dict:
    """Speed, energy and (on a GPU) memory columns of a GGUF file in llama.cpp, for one batch size."""
    device = _device()
    _free()
    before = _used_gib() if device == "cuda" else 0.0
    with measure.Generation(path, sizes.tokens, 8, batch, threads=threads) as llama:

        def decode():  # always the first token after the prompt: every step sees a cache of the same length
            llama.rewind()
            llama.step()

        row = {"prefill_tokens": sizes.tokens, "decode_context": sizes.tokens}
        row |= _phase("prefill", llama.prefill, batch * sizes.tokens, sizes.seconds, llama.power, clock="cpu")
        row |= _phase("decode", decode, batch, sizes.seconds, llama.power, clock="cpu")
        row["peak_gib"] = _used_gib() - before if device == "cuda" else None
        row["threads"] = _threads(threads) if device == "cpu" else None
    return row


def _threads(threads: int | None) -> int:
    from .. import llamacpp

    return threads or llamacpp.n_threads()


def _child_peaks(technique: Technique, batches, sizes: Sizes, path=None) -> dict[int, float]:
    """GiB that a technique adds to a fresh process on the CPU, by batch: weights, cache and work space.

    A process of its own, since what this one has freed is not given back to the system at once.
    """
    code = "import sys; from qtutor import tradeoff; tradeoff._print_peaks(*sys.argv[1:])"
    argv = [technique.name, json.dumps(list(batches)), str(sizes.tokens), str(path or "")]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=results.ROOT, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    try:
        return {int(batch): gib for batch, gib in json.loads(done.stdout.splitlines()[-1]).items()}
    except (IndexError, ValueError):
        return {}


def _print_peaks(name: str, batches: str, sizes: str, path: str) -> None:
    """What :func:`_child_peaks` runs: the libraries are loaded first, so that they do not count."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from .. import course_model, llamacpp

    technique, sizes, peaks = TECHNIQUES[name], Sizes(int(sizes), seconds=0), {}
    if path:
        llamacpp._native()
    else:
        course_model.config()
        from transformers import LlamaForCausalLM  # noqa: F401
    with measure.track_memory("cpu") as memory:
        model = None if path else build(technique, device="cpu")
        for batch in json.loads(batches):
            if path:
                llama_speed(path, batch, sizes)
            else:
                pytorch_speed(model, batch, sizes)
            peaks[batch] = memory.added
    print(json.dumps(peaks))


# ---------------------------------------------------------------------------------------------------------- quality
class Reference:
    """What all techniques are compared with: the FP32 model's logits on some text, and its answers to the questions."""

    def __init__(self, sizes: Sizes, device: str | None = None):
        from .. import corpus, course_model, evaluate
        from ..decide import accuracy

        self.device = device or _device()
        model = course_model.load(device=self.device)
        windows = evaluate.windows(corpus.tokens("eval", course_model.load_tokenizer(), progress=False), 512)
        self.tokens = windows[:: max(1, len(windows) // sizes.windows)][: sizes.windows].ravel()
        self.logits = evaluate.logits_of(model, self.tokens, 512)
        self.items = accuracy.build_items(sizes.questions)
        self.answers = accuracy.score_items(model, self.items)

    def quality(self, source) -> dict:
        """The quality columns of a Hugging Face model or an open llamacpp.Model."""
        from .. import evaluate, paired
        from ..decide import accuracy

        found = evaluate.compare_models(self.logits, source, self.tokens, 512)
        answers = accuracy.score_items(source, self.items)
        change = paired.mcnemar(self.answers.hits_norm, answers.hits_norm)
        kept = {name: getattr(found, name) for name in QUALITY if hasattr(found, name)}
        return kept | {"scored_tokens": found.n, "accuracy": answers.acc_norm, "accuracy_se": answers.acc_norm_se,
                       "accuracy_diff": change.difference, "accuracy_diff_se": change.se,
                       "accuracy_n": answers.n}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- recording
class Files:
    """GGUF files by technique, in a folder of its own that :meth:`close` deletes; made when first asked for."""

    def __init__(self, folder=None):
        self._temporary = tempfile.TemporaryDirectory(prefix="qtutor-tradeoff-", dir=folder)
        self.folder = Path(self._temporary.name)
        self._sources = {}

    def source(self, trained: bool = False) -> Path:
        """The course model as an F32 file, before or after QAT."""
        from .. import course_model, gguf_export, qat

        if trained not in self._sources:
            model = qat.load_q4_0() if trained else course_model.load()
            self._sources[trained] = gguf_export.export(model, self.folder / f"f32-{trained}.gguf",
                                                        tokenizer=course_model.load_tokenizer())  # fmt: skip
        return self._sources[trained]

    def _target(self, technique: Technique, shape: str) -> Path:
        return self.folder / f"{shape}-{technique.gguf}{'-qat' if technique.trained else ''}.gguf"

    def path(self, technique: Technique | str, shape: str = "course") -> Path:
        """The file of a technique (or of its name), made now where it is not there yet."""
        technique = TECHNIQUES[technique] if isinstance(technique, str) else technique
        from .. import llamacpp, qat

        target = self._target(technique, shape)
        if target.exists():
            return target
        if shape == "course":
            tensors = qat.Q4_0_TENSORS if technique.trained else None
            return llamacpp.quantize(self.source(technique.trained), target, technique.gguf, tensor_types=tensors)
        from . import llama70b

        llama70b.write(target, "Llama-2-7B", technique.gguf, 0)
        return target

    def remove(self, technique: Technique, shape: str) -> None:
        """Delete a technique's file, where there is one."""
        self._target(technique, shape).unlink(missing_ok=True)

    def close(self) -> None:
        self._temporary.cleanup()


def _why_not(technique: Technique, shape: str, device: str) -> str | None:
    """One sentence where a technique has no place here."""
    if technique.fits == "gpu" and device != "cuda":
        return "It needs a GPU."
    if technique.fits == "cpu" and device != "cpu":
        return "On a GPU with FP8 units the real thing runs instead."
    if shape != "course" and (technique.name == "FP32" or technique.trained or not technique.speed):
        return "The shape has random weights: there is nothing to train, and FP32 is not how a 7B model is served."
    if shape == "course" and technique.compiled:
        return "Compiled for the 7B shape only: the numbers are those without torch.compile, and compiling takes long."
    return None


def _head(technique: Technique, shape: str, batch: int) -> dict:
    row = dict.fromkeys(COLUMNS) | {"shape": shape, "technique": technique.name, "family": technique.family}
    return row | {"runtime": technique.runtime, "trained": technique.trained, "batch": batch}


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return str(error) if isinstance(error, QtutorError) else f"{type(error).__name__}: {lines[0][:200]}."


def measure_one(technique: str, shape: str = "course", batches=None, sizes: Sizes | None = None,
                reference: Reference | None = None, files: Files | None = None, memory: bool = False) -> list[dict]:
    """The rows of one technique, one for each batch size.

    Args:
        technique: a name of TECHNIQUES.  shape: a name of SHAPES.
        reference: None leaves the quality columns empty.
        files: where GGUF files are kept between calls; None makes and deletes them.
        memory: on a CPU, measure ``peak_gib`` in a process of its own (several seconds).

    Raises QtutorError for unknown names; what a technique itself raises comes through.
    """
    if technique not in TECHNIQUES or shape not in SHAPES:
        raise QtutorError(f"There is no technique {technique!r} of shape {shape!r}: choose from "
                          f"{', '.join(TECHNIQUES)}; {', '.join(SHAPES)}.")  # fmt: skip
    what, device = TECHNIQUES[technique], _device()
    batches, sizes = tuple(batches or batches_for()), sizes or sizes_for(shape)
    if reason := _why_not(what, shape, device):
        raise QtutorError(reason)
    made = files or Files()
    try:
        if what.gguf:
            return _gguf_rows(what, shape, batches, sizes, reference, made.path(what, shape), memory)
        return _pytorch_rows(what, shape, batches, sizes, reference, device, memory)
    finally:
        if files is None:
            made.close()


def _gguf_rows(what, shape, batches, sizes, reference, path, memory) -> list[dict]:
    from .. import llamacpp

    weights = sum(row["bytes"] for row in llamacpp.tensor_table(path))
    common = {"bits_per_weight": llamacpp.bits_per_weight(path), "weights_mb": weights / 1e6}
    if reference is not None:
        with llamacpp.Model(path, ctx=512, exact=False) as model:
            common |= reference.quality(model)
    peaks = _child_peaks(what, batches, sizes, path) if memory and _device() == "cpu" else {}
    return [_head(what, shape, n) | common | {"peak_gib": peaks.get(n)} | _without_none(llama_speed(path, n, sizes))
            for n in batches]  # fmt: skip


def _without_none(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}


def _pytorch_rows(what, shape, batches, sizes, reference, device, memory) -> list[dict]:
    import torch

    _free()
    before = torch.cuda.memory_allocated() / measure.GIB if device == "cuda" else 0.0
    model = build(what, shape, device)
    size, weights = stored_size(model)
    common = {"bits_per_weight": 8 * size / weights, "weights_mb": size / 1e6}
    if not what.speed:  # an emulation stores floats
        common = dict.fromkeys(common)
    if reference is not None:
        with torch.no_grad():
            common |= reference.quality(model)
    if not what.speed:
        return [_head(what, shape, batches[0]) | common]
    if what.compiled:
        _compile_products(model)
    peaks = _child_peaks(what, batches, sizes) if memory and device == "cpu" else {}
    found = []
    for batch in batches:
        _free()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row = _head(what, shape, batch) | common | {"peak_gib": peaks.get(batch)}
        row |= pytorch_speed(model, batch, sizes, ("decode",) if what.compiled else ("prefill", "decode"))
        if device == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / measure.GIB - before
        found.append(row)
    return found


def rows(techniques=None, shape: str = "course", batches=None, sizes: Sizes | None = None, quality: bool = True,
         reference: Reference | None = None, files: Files | None = None, memory: bool = False, progress: bool = True,
         skip=(), budget_s: float | None = None, each=None) -> list[dict]:  # fmt: skip
    """The rows of several techniques, in the order of TECHNIQUES; what fails gives one row with ``not_run``.

    Args:
        techniques: names; all by default.  skip: names that have rows already.
        quality: False leaves the quality columns empty, as for a shape with random weights.
        reference, files: what was made before and is to be used again.  memory: see :func:`measure_one`.
        budget_s: seconds after which no further technique is begun.
        each: called with the rows of each technique as soon as they are there.
    """
    from tqdm.auto import tqdm

    batches, sizes = tuple(batches or batches_for()), sizes or sizes_for(shape)
    unknown = sorted(set(techniques or ()) - set(TECHNIQUES))
    if unknown:
        raise QtutorError(f"There is no technique {unknown[0]!r}: choose from {', '.join(TECHNIQUES)}.")
    names = [name for name in TECHNIQUES if name not in skip and (techniques is None or name in techniques)]
    if reference is None and quality and shape == "course" and sizes.windows and names:
        reference = Reference(sizes)
    mine = files is None
    files, found, began = files or Files(), [], time.perf_counter()
    try:
        bar = tqdm(names, desc=f"{shape}", unit="technique", leave=False, disable=not progress)
        for name in bar:
            bar.set_postfix_str(name)
            _free()
            try:
                over = budget_s is not None and time.perf_counter() - began > budget_s
                if over and not _why_not(TECHNIQUES[name], shape, _device()):
                    raise QtutorError(f"The time set for this recording ({budget_s:.0f} s) was over.")
                part = measure_one(name, shape, batches, sizes, reference, files, memory)
            except Exception as error:  # noqa: BLE001 - what one library cannot run must not cost the rest
                part = [_head(TECHNIQUES[name], shape, batches[0]) | {"not_run": _sentence(error)}]
            if shape != "course":
                files.remove(TECHNIQUES[name], shape)  # gigabytes each
            found += part
            if each is not None:
                each(part)
    finally:
        if mine:
            files.close()
        _free()
    return found


RESUME_HOURS = 2


def _resumable(directory, profile: str) -> list[dict]:
    """Rows of a recording on this machine that was interrupted within the last hours, at this commit and profile."""
    where = results.machine_folder()
    if not results.exists("tradeoff", where, directory):
        return []
    old = results.load("tradeoff", where, directory)
    fresh = datetime.now(UTC) - datetime.fromisoformat(old.created) < timedelta(hours=RESUME_HOURS)
    same = (old.commit, old.versions, old.profile) == (results.commit(), results.versions(), profile)
    return old.rows if fresh and same and old.device == measure.machine()["device"] else []


def record(shapes=None, techniques=None, batches=None, full: bool = True, resume: bool = True, directory=None,
           budget_s: float | None = None, progress: bool = True, sizes: Sizes | None = None, folder=None) -> Path:
    """Measure every technique on this machine and save ``tradeoff`` after each; return the path.

    Args:
        shapes: names of SHAPES; by default the course model, on a GPU the 7B shape as well.
        full: the large sizes; False: a minute's worth.
        resume: keep rows that a recording at this commit and of the same sizes (``full`` or not) saved in the last two
            hours (those of ``techniques`` are measured again where they are named).
        budget_s: seconds for each shape after which no further technique is begun.
        directory, folder: of the results; of the GGUF files for the time being.
    """
    shapes = tuple(shapes or (SHAPES if _device() == "cuda" else SHAPES[:1]))
    if unknown := set(shapes) - set(SHAPES):
        raise QtutorError(f"There is no shape {unknown.pop()!r}: choose from {', '.join(SHAPES)}.")
    profile = "full" if full else "quick"
    kept = _resumable(directory, profile) if resume else []
    path = None

    def save(part):
        nonlocal path, kept
        new = {(row["shape"], row["technique"]) for row in part}
        kept = [row for row in kept if (row["shape"], row["technique"]) not in new] + part
        path = results.save("tradeoff", kept, profile=profile, directory=directory)

    files = Files(folder)
    try:
        for shape in shapes:
            done = set() if techniques else {row["technique"] for row in measured(kept) if row["shape"] == shape}
            rows(techniques, shape, batches, sizes or sizes_for(shape, full), files=files, memory=full,
                 progress=progress, skip=done, budget_s=budget_s, each=save)  # fmt: skip
    finally:
        files.close()
    if path is None:  # all of it was there
        path = Path(directory or results.RESULTS) / results.machine_folder() / "tradeoff.json"
    return path


def main(argv=None) -> int:
    """``python -m qtutor.rigs.tradeoff``: record on this machine and say what came out."""
    parser = argparse.ArgumentParser(prog="python -m qtutor.rigs.tradeoff", description="measure every technique here")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="by default all that this machine can run")
    parser.add_argument("--techniques", nargs="+", metavar="NAME", help="by default all: " + ", ".join(TECHNIQUES))
    parser.add_argument("--quick", action="store_true", help="small sizes: a minute's worth")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an interrupted recording")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of each shape: begin nothing new after that")
    parser.add_argument("--directory", help="where the results go, by default data/results")
    parser.add_argument("--folder", help="for GGUF files, by default the system's temporary folder")
    options = parser.parse_args(argv)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    began = time.perf_counter()
    try:
        path = record(options.shapes, options.techniques, full=not options.quick, resume=not options.fresh,
                      directory=options.directory, budget_s=options.budget, folder=options.folder)  # fmt: skip
    except QtutorError as error:
        print(error)
        return 1
    saved = json.loads(path.read_text("utf-8"))["rows"]
    print(f"{len(measured(saved))} rows in {time.perf_counter() - began:.0f} s: {path.parent.name}/{path.name}")
    for name, reason in left_out(saved).items():
        print(f"  without {name}: {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
