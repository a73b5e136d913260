"""Size, quality, speed and energy of one technique on this machine: the rows behind the trade-off and the guide.

A comparison is fair when everything but one thing is the same.  So all techniques here run on one machine, on the same
weights, prompt lengths and text, and each number means the same for all of them:

    size      bytes of all stored weights, embedding and head included, as they lie in memory or in the file
    quality   against the FP32 model in PyTorch, on the same tokens and the same questions
    prefill   one pass over a prompt; tokens a second of the whole batch
    decode    one step, one token for each sequence, with ``decode_context`` tokens in the cache
    energy    of the GPU, from its own counter; on a CPU without a counter an estimate that says so

PyTorch's phases are called layer by layer with a cache of fixed length (:mod:`qtutor.rigs.decoding`), on a GPU from a
CUDA graph, so that Python's time is not what is compared; llama.cpp runs as people run it (F16 cache, flash attention).
The course model has real weights.  The Llama-2-7B shape has random ones: bytes, speed and energy do not depend on their
values, quality does, and is left out.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import QtutorError, corpus, course_model, energy, evaluate, llamacpp, measure, paired, qat
from ..checkpoints import convert
from ..decide import accuracy
from ..decide.techniques import TECHNIQUES, Technique
from . import decoding, random_gguf, techniques
from .fp8_layers import free
from .techniques import device

SHAPES = {"course": "course", "llama2_7b": "Llama-2-7B"}  # as rows call them -> as techniques.float_model does
CTX = 512  # tokens of a window of the evaluation text
COLUMNS = (  # what every row has, None where there is no value
    "shape technique family runtime trained batch not_run bits_per_weight weights_mb peak_gib perplexity perplexity_se "
    "kld_mean kld_mean_se same_top accuracy accuracy_se accuracy_diff accuracy_diff_se accuracy_n scored_tokens text "
    "prefill_tokens decode_context threads prefill_tokens_per_s decode_tokens_per_s joules_per_prefill_token "
    "joules_per_decode_token energy_source"
).split()


@dataclass(frozen=True)
class Sizes:
    """How much is run: ``tokens`` of each prompt and in the cache of a decoding step, ``seconds`` for each timing,
    ``windows`` of the text and multiple-choice ``questions`` for the quality."""

    tokens: int = 256
    seconds: float = 1.0
    windows: int = 64
    questions: int = 400


def _phase(name: str, call, tokens: int, seconds: float, where: str, clock=None, before=None) -> dict:
    """Columns of one phase: ``call`` handles ``tokens`` tokens and is repeated for about ``seconds``.

    Energy is read on ``where``, and time too unless ``clock`` says "cpu", for a library that waits for its own work.
    ``_low`` and ``_high`` are tokens a second at the 90th and the 10th percentile of the times.
    """
    timing, used = energy.timed(call, 1, 3, seconds, where, clock=clock, before=before)
    column, joules = f"{name}_tokens_per_s", f"joules_per_{name}_token"
    row = {column: 1000 * tokens / timing.median_ms, f"{column}_low": 1000 * tokens / timing.p90,
           f"{column}_high": 1000 * tokens / timing.p10, "energy_source": used.source}  # fmt: skip
    spent = used.per(timing.n * tokens)
    if spent is None:
        return row
    ends = 1 - used.relative_error, 1 + used.relative_error  # a counter moves in steps: so much may be missing
    if not used.relative_error:  # without steps it follows the time
        ends = timing.p10 / timing.median_ms, timing.p90 / timing.median_ms
    return row | {joules: spent, f"{joules}_low": spent * ends[0], f"{joules}_high": spent * ends[1]}


def pytorch_speed(model, batch: int, sizes: Sizes, phases=("prefill", "decode")) -> dict:
    """Speed and energy columns of a Llama in PyTorch, for one batch size; on a GPU replayed from a CUDA graph."""
    where, n = model.device.type, sizes.tokens
    row = {"prefill_tokens": n, "decode_context": n, "threads": torch.get_num_threads() if where == "cpu" else None}
    torch.manual_seed(0)
    with torch.no_grad():
        ids = torch.randint(0, model.config.vocab_size, (batch, n), device=where)
        cache = decoding.FixedCache(model.config, batch, n, where, model.model.norm.weight.dtype)
        token = ids[:, :1].contiguous()
        calls = {"prefill": (lambda: decoding.llama_logits(model, ids, last_only=True), batch * n),
                 "decode": (lambda: decoding.llama_logits(model, token, cache), batch)}  # fmt: skip
        for name in phases:
            call, tokens = calls[name]
            call = measure.captured(call)[0] if where == "cuda" else call
            row |= _phase(name, call, tokens, sizes.seconds, where)
    return row


def llama_speed(path, batch: int, sizes: Sizes) -> dict:
    """Speed, energy and (on a GPU) memory columns of a GGUF file in llama.cpp, for one batch size."""
    free()
    before, n = measure.device_memory_gib() if device() == "cuda" else 0.0, sizes.tokens
    with llamacpp.Model(path, ctx=n + 8, exact=False, sequences=batch) as model:
        ids = np.random.default_rng(0).integers(0, model.n_vocab, (batch, n + 1), dtype=np.int32)
        how = {"seconds": sizes.seconds, "where": "cuda" if model.on_gpu else "cpu", "clock": "cpu"}
        row = {"prefill_tokens": n, "decode_context": n}
        row |= _phase("prefill", lambda: model.step(ids[:, :-1], 0), batch * n, before=model.clear, **how)
        # always the first token after the prompt: every step sees a cache of the same length
        row |= _phase("decode", lambda: model.step(ids[:, -1:], n), batch, before=lambda: model.rewind(n), **how)
        return row | ({"peak_gib": measure.device_memory_gib() - before} if model.on_gpu else
                      {"threads": llamacpp.n_threads()})  # fmt: skip


class Reference:
    """What all techniques are compared with: the FP32 model's logits on some text, and its answers to the questions."""

    def __init__(self, sizes: Sizes, where: str | None = None):
        model = course_model.load(device=where or device())
        windows = evaluate.windows(corpus.tokens("eval", course_model.load_tokenizer(), progress=False), CTX)
        self.tokens = windows[:: max(1, len(windows) // sizes.windows)][: sizes.windows].ravel()
        self.logits = evaluate.logits_of(model, self.tokens, CTX)
        self.items = accuracy.build_items(sizes.questions)
        self.answers = accuracy.score_items(model, self.items)

    def quality(self, source) -> dict:
        """The quality columns of a Hugging Face model or an open llamacpp.Model."""
        found = evaluate.compare_models(self.logits, source, self.tokens, CTX)
        answers = accuracy.score_items(source, self.items)
        change = paired.mcnemar(self.answers.hits_norm, answers.hits_norm)
        return found.row() | answers.row() | {"accuracy_diff": change.difference, "accuracy_diff_se": change.se,
                                              "text": corpus.fingerprint(corpus.eval_text())}  # fmt: skip


class Files:
    """GGUF files by technique, in a folder of its own that ``close()`` deletes; made when first asked for."""

    def __init__(self, folder=None):
        temporary = tempfile.TemporaryDirectory(prefix="qtutor-tradeoff-", dir=folder)
        self.folder, self.close = Path(temporary.name), temporary.cleanup

    def source(self, trained: bool = False) -> Path:
        """The course model as an F32 file, before or after QAT."""
        target = self.folder / f"f32-{trained}.gguf"
        if not target.exists():
            model = qat.load_q4_0() if trained else course_model.load()
            convert.to_gguf(model, target, "f32", tokenizer=course_model.load_tokenizer())
        return target

    def path(self, name: str, shape: str = "course") -> Path:
        """The file of a technique, made now where it is not there yet."""
        technique, target = TECHNIQUES[name], self.folder / f"{shape} {name}.gguf"
        if target.exists():
            return target
        if shape == "course":
            tensors = qat.Q4_0_TENSORS if technique.trained else None
            return llamacpp.quantize(self.source(technique.trained), target, technique.gguf, tensor_types=tensors)
        return random_gguf.write(target, SHAPES[shape], technique.gguf)


def why_not(technique: Technique, shape: str = "course") -> str | None:
    """One sentence where a technique has no place on this machine or in this shape."""
    if technique.needs in ("gpu", "fp8") and device() != "cuda":
        return "It needs a GPU."
    if technique.needs == "cpu" and device() != "cpu":
        return "On a GPU with FP8 units the real thing runs instead."
    if shape != "course" and (technique.name == "FP32" or technique.trained or technique.emulated):
        return "The shape has random weights: there is nothing to train, and FP32 is not how a 7B model is served."
    if shape == "course" and technique.compiled:
        return "Compiled for the 7B shape only: the numbers are those without torch.compile, and compiling takes long."
    return None


def _rows_of(technique: Technique, shape: str, batches, sizes: Sizes, reference, files: Files) -> list[dict]:
    """The rows of one technique, one for each batch size."""
    if reason := why_not(technique, shape):
        raise QtutorError(reason)
    free()
    if technique.gguf:
        path = files.path(technique.name, shape)
        size = sum(row["bytes"] for row in llamacpp.tensor_table(path))
        common = {"bits_per_weight": llamacpp.bits_per_weight(path), "weights_mb": size / 1e6}
        if reference is not None:
            with llamacpp.Model(path, ctx=CTX, exact=False) as model:
                common |= reference.quality(model)
        return [common | {"batch": batch} | llama_speed(path, batch, sizes) for batch in batches]
    on_gpu, before = device() == "cuda", torch.cuda.memory_allocated() / measure.GIB
    model, common, found = techniques.build(technique, SHAPES[shape]), {}, []
    if not technique.emulated:  # which stores floats
        size, weights = measure.stored_bytes(model)
        common = {"bits_per_weight": 8 * size / weights, "weights_mb": size / 1e6}
    if reference is not None:
        with torch.no_grad():
            common |= reference.quality(model)
    if technique.emulated:
        return [common | {"batch": batches[0]}]
    if technique.compiled:
        decoding.compile_layers(model)
    for batch in batches:
        free()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        alone = technique.compiled and batch != batches[0]  # each shape is compiled anew: one prompt is enough
        row = pytorch_speed(model, batch, sizes, ("decode",) if alone else ("prefill", "decode"))
        if on_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / measure.GIB - before
        found.append(common | {"batch": batch} | row)
    return found


def rows(names=None, shape: str = "course", batches=(1, 8), sizes: Sizes | None = None, reference=None,
         files: Files | None = None, progress: bool = True) -> list[dict]:  # fmt: skip
    """The rows of techniques (by default all), in the order of TECHNIQUES; what fails gives one row with ``not_run``.

    ``shape`` is a key of SHAPES; ``reference`` None leaves the quality columns empty; ``files`` None makes the GGUF
    files and deletes them.
    """
    if unknown := sorted({*(names or ())} - {*TECHNIQUES}):
        raise QtutorError(f"There is no technique {unknown[0]!r}: choose from {', '.join(TECHNIQUES)}.")
    made, found = files or Files(), []
    chosen = [technique for technique in TECHNIQUES.values() if names is None or technique.name in names]
    try:
        for technique in tqdm(chosen, desc=shape, unit="technique", leave=False, disable=not progress):
            about = {key: getattr(technique, key) for key in ("family", "runtime", "trained")}
            head = dict.fromkeys(COLUMNS) | {"shape": shape, "technique": technique.name} | about
            try:
                part = _rows_of(technique, shape, batches, sizes or Sizes(), reference, made)
            except Exception as error:  # noqa: BLE001 - what one library cannot run must not cost the rest
                first = (str(error).strip().splitlines() or [""])[0][:200]
                why = str(error) if isinstance(error, QtutorError) else f"{type(error).__name__}: {first}."
                part = [{"batch": batches[0], "not_run": why}]
            found += [head | row for row in part]
    finally:
        if files is None:
            made.close()
        free()
    return found
