"""Hold the lesson on quantization after training to llm-compressor: ``make llmc-env results ONLY=ptq_official``.

It asks for an older transformers, so :func:`write` runs in an environment of its own: ``.venv-llmc``, or that of the
Python which QTUTOR_LLMC_PYTHON names.  The course's transformers loads its checkpoints.  The course's own functions
quantize with the same settings on the same text, and both are scored on the same windows.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from qtutor import QtutorError, corpus, course_model, evaluate, files, observers, ptq, results
from qtutor import fake_quant as fq

from .record_gguf import interval
from .record_ptq import assigned, lesson_cells

PLAIN, ALONE, SMOOTH = "round to nearest", "GPTQ, blocks alone", "SmoothQuant, 0.5"
FP8 = fq.FakeQuantizer("FP8", "tensor"), fq.FakeQuantizer("FP8", "tensor", observer=observers.MinMaxObserver())
FORMATS = {"FP8 dynamic": ("FP8_DYNAMIC", "FP8", "FP8"), "FP8 static": ("FP8", *FP8),  # llm-compressor's name, and ours
           "W8A8": ("W8A8", "int8", fq.FakeQuantizer("int8", "token"))}  # fmt: skip
GROUPS = 128, 32
CASES = [*(("W4A16", group, method) for group in GROUPS for method in (PLAIN, ALONE, "GPTQ", "GPTQ + order")),
         *((kind, None, PLAIN) for kind in FORMATS), ("W8A8", None, SMOOTH)]  # format, group, method  # fmt: skip
EXACT = ", float32"  # llm-compressor on a float32 model: its own rounding of scales to bfloat16 is out of the way
CASES += [(kind, group, method + EXACT) for kind, group, method in CASES if method in (PLAIN, SMOOTH)
          and kind in ("W4A16", "W8A8")]  # fmt: skip


def python() -> Path:
    """The Python of the environment that has llm-compressor."""
    return Path(os.environ.get("QTUTOR_LLMC_PYTHON") or files.ROOT / ".venv-llmc/bin/python")


def available() -> bool:
    """Whether it is here, and in this environment compressed-tensors, with which transformers reads the checkpoints."""
    return python().is_file() and importlib.util.find_spec("compressed_tensors") is not None


def write(asked):
    """In the other environment: a checkpoint for each case, in folders by number; returns llm-compressor's version."""
    import torch
    from llmcompressor import __version__, oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM

    rows = [{"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row))} for row in asked["calibration"]]
    for number, (preset, group, method) in enumerate(asked["cases"]):
        weights = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
        groups = {"all": {"targets": ["Linear"], "weights": weights}}
        scheme = dict(config_groups=groups) if group else dict(scheme=preset)
        order, alone = {} if "order" in method else {"actorder": None}, "alone" in method  # its default: static order
        last = GPTQModifier(ignore=["lm_head"], **scheme, **order) if "GPTQ" in method else (
            QuantizationModifier(ignore=["lm_head"], **scheme))  # fmt: skip
        dtype = "float32" if alone or "float32" in method else "bfloat16"
        model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype)
        oneshot(model=model, recipe=[SmoothQuantModifier(smoothing_strength=0.5)] * ("Smooth" in method) + [last],
                dataset=torch.utils.data.DataLoader(rows), num_calibration_samples=len(rows), propagate_error=not alone)
        model.save_pretrained(str(number), save_compressed=True)
    return __version__


def checkpoints(folder: Path, calibration) -> str:
    """Have :func:`write` fill the folder; return the version of llm-compressor."""
    asked = {"model": str(course_model.model_dir()), "calibration": calibration.tolist(),
             "cases": [(FORMATS.get(kind, [kind])[0], group, method) for kind, group, method in CASES]}  # fmt: skip
    code = f"import json, sys\n{inspect.getsource(write)}\nprint(write(json.load(sys.stdin)))"
    done = subprocess.run([python(), "-c", code], input=json.dumps(asked), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise QtutorError(f"llm-compressor stopped: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return done.stdout.split()[-1]


def lesson(model) -> dict:
    """The functions of the lesson's cells, for this model on its device, and which packages it calibrates on."""
    (path,) = (files.ROOT / "notebooks").glob("*_ptq_fundamentals.ipynb")
    names = {"__name__": "lesson", "device": next(model.parameters()).device, "model": model}
    for source in lesson_cells(path):
        kept = [part for part in ast.parse(source).body if assigned(ast.unparse(part)) == {"packages"}
                or isinstance(part, ast.Import | ast.ImportFrom | ast.FunctionDef)]  # fmt: skip
        exec(compile(ast.Module(kept, []), path.name, "exec"), names)
    return names


@torch.no_grad()
def ours(case, model, use: dict, inputs: dict, calibration):
    """The model quantized by the lesson's functions ``use``, its activations by fake_quant.  ALONE takes all scales
    from the float weights, as llm-compressor does; the lesson's GPTQ takes a group's scales when it gets there.  EXACT
    divides by the scale, as llm-compressor does; the lesson multiplies by its reciprocal."""
    (kind, group, method), model, scale_of = case, copy.deepcopy(model), use["scale_of"]
    layers = ptq.linears(model)
    for source in (s for s in inputs if SMOOTH in method and s.endswith(("q_proj", "gate_proj"))):  # folded into norms
        after = [layers[name] for name in use["readers"](layers, source)]
        scale = use["smooth"](inputs[source].amax, torch.cat([layer.weight for layer in after]), 0.5)
        use["fold"](use["producers"](model)[source], after, scale)
    if kind in FORMATS:
        fq.prepare(model, *FORMATS[kind][1:])
        with fq.calibrate(model) if kind == "FP8 static" else contextlib.nullcontext():
            for window in calibration:
                model(torch.from_numpy(window)[None])
        return model
    for name, layer in layers.items():
        w, H = layer.weight.clone(), inputs[ptq.source(name)].H
        scale = scale_of(w.view(-1, group), 4)
        fixed = iter(scale.view(len(w), -1, 1).unbind(1))
        use["scale_of"] = (lambda *_, fixed=fixed: next(fixed)) if method == ALONE else scale_of
        q = use["rtn"](w, 4, group) if PLAIN in method else use["gptq"](w, H, 4, group, order="order" in method)
        if EXACT in method:
            q = ((w.view(-1, group) / scale).round().clamp(-8, 7) * scale).view_as(w)
        layer.weight.copy_(q)
    use["scale_of"] = scale_of
    return model


def record(full: bool = True, *, directory=None) -> Path:
    """Every case by both, calibrated on 64 windows of 512 tokens and scored on 32."""
    if not available():
        raise QtutorError("llm-compressor is not here: make llmc-env.")
    model, tokenizer, rows, compared = course_model.load(), course_model.load_tokenizer(), [], {}
    use, weights = lesson(model), sum(layer.weight.numel() for layer in ptq.linears(model).values())
    seen = corpus.tokens("train", tokenizer, packages=use["packages"], progress=False)
    cut = [(evaluate.windows(ids, 512), n) for ids, n in ((seen, 64 if full else 4),
           (corpus.tokens("eval", tokenizer), 32 if full else 2))]  # fmt: skip
    calibration, scored = (windows[:: max(1, len(windows) // n)][:n] for windows, n in cut)
    text, inputs = scored.ravel(), use["watch"](model, calibration)
    kept = evaluate.logits_of(model, text, 512)
    about = {"calibration_tokens": calibration.size, "windows": len(scored),
             "text": corpus.fingerprint(corpus.eval_text())}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qtutor-llmc-") as folder:
        theirs = f"llm-compressor {checkpoints(Path(folder), calibration)}"
        for number, case in enumerate(tqdm(CASES, desc="cases", leave=False)):
            place = Path(folder) / str(number)
            loaded = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
            for backend, quantized in (("ours", ours(case, model, use, inputs, calibration)), (theirs, loaded)):
                found = compared[backend, case] = evaluate.compare_models(kept, quantized, text, 512)
                rows.append(dict(zip(("format", "group", "method"), case, strict=True)) | {"backend": backend} | about
                            | found.row() | interval(found.token_kld, "kld_mean", 511)
                            | {"kld_mean_se_windows": evaluate.standard_error(found.token_kld, 511)})  # fmt: skip
            file, less = place / "model.safetensors", found.token_kld - compared["ours", case].token_kld
            held = sum(x.nbytes for key, x in load_file(file).items() if "_proj." in key)
            rows[-1] |= {"file_bytes": file.stat().st_size, "bits_per_weight": 8 * held / weights, "rival": "ours",
                         **interval(less, "kld_less_rival", 511)}  # fmt: skip
    for group, backend in itertools.product(GROUPS, ("ours", theirs)):  # what the usual way changes, in each
        usual, alone = (compared[backend, ("W4A16", group, method)].token_kld for method in ("GPTQ", ALONE))
        rows.append({"format": "W4A16", "group": group, "method": "GPTQ", "backend": backend} | about
                    | {"rival": f"{backend}, {ALONE}", **interval(usual - alone, "kld_less_rival", 511)})  # fmt: skip
    return results.save("ptq_official", rows, profile="full" if full else "quick", directory=directory)


RECORDS = {"ptq_official": record}
