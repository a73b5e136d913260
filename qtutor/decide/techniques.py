"""The techniques of the course under one set of names: what a table's row, a picture and a decision call them.

A technique is a way to store and run a model.  Nothing here computes and nothing is imported: :mod:`qtutor.rigs`
builds a technique by its name, figures give its family a colour, and :mod:`qtutor.decide.choosing` reads what it needs.

    TECHNIQUES["torchao FP8 dynamic"].torchao       # 'Float8DynamicActivationFloat8WeightConfig'
    [t.name for t in TECHNIQUES.values() if t.runtime == "llama.cpp"]
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Technique:
    """One way to store and run a model.

    - ``family``: a key of :data:`FAMILIES`; ``runtime``: the engine, a key of :data:`FLOAT`
    - ``torchao``: name of the configuration in torchao.quantization, ``torchao_gpu`` where a GPU takes another one
    - ``gguf``: llama.cpp's file type
    - ``needs``: "any", "gpu", "fp8" (a GPU with FP8 units), or "cpu" (what a GPU would not do that way)
    - ``trained``: trained with fake quantization before; ``compiled``: with torch.compile
    - ``emulated``: right numbers, but neither size nor speed
    - ``how``: what the reader types
    """

    name: str
    family: str
    runtime: str
    how: str
    torchao: str | None = None
    torchao_gpu: str | None = None
    gguf: str | None = None
    needs: str = "any"
    trained: bool = False
    compiled: bool = False
    emulated: bool = False


def _torchao(name: str, config: str, needs: str = "any", **options) -> Technique:
    return Technique(name, "torchao", "pytorch", f"quantize_(model, {config}())", config, needs=needs, **options)


def _gguf(kind: str) -> Technique:
    return Technique(f"GGUF {kind}", "gguf", "llama.cpp", f"llama-quantize model.gguf {kind}", gguf=kind)


TECHNIQUES = {technique.name: technique for technique in (
    Technique("FP32", "float", "pytorch", "model.to(torch.float32)"),
    Technique("BF16", "float", "pytorch", "model.to(torch.bfloat16)"),
    Technique("FP8 (Transformer Engine)", "fp8", "te", "te.Linear, quantized_model_init, autocast", needs="fp8"),
    Technique("FP8 emulated", "fp8", "pytorch", "te.Linear, autocast", needs="cpu", emulated=True),
    Technique("BF16, compiled", "float", "pytorch", "layer.compile()", needs="gpu", compiled=True),
    _torchao("torchao INT8 weight-only, compiled", "Int8WeightOnlyConfig", "gpu", compiled=True),
    _torchao("torchao INT8 dynamic, compiled", "Int8DynamicActivationInt8WeightConfig", "gpu", compiled=True),
    _torchao("torchao INT4 group 32, compiled", "Int4WeightOnlyConfig", "gpu", compiled=True),
    _torchao("torchao FP8 dynamic, compiled", "Float8DynamicActivationFloat8WeightConfig", "fp8", compiled=True),
    _torchao("torchao INT8 weight-only", "Int8WeightOnlyConfig"),
    _torchao("torchao INT8 dynamic", "Int8DynamicActivationInt8WeightConfig"),
    _torchao("torchao INT4 group 32", "IntxWeightOnlyConfig", torchao_gpu="Int4WeightOnlyConfig"),
    _torchao("torchao FP8 weight-only", "Float8WeightOnlyConfig"),
    _torchao("torchao FP8 dynamic", "Float8DynamicActivationFloat8WeightConfig", "fp8"),
    Technique("QAT Q4_0", "qat", "llama.cpp", "train on the grid of Q4_0, export", gguf="Q4_0", trained=True),
    *[_gguf(kind) for kind in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")],
)}  # fmt: skip

#: family -> what a legend calls it
FAMILIES = {"float": "float", "fp8": "FP8", "torchao": "torchao", "qat": "QAT", "gguf": "GGUF (llama.cpp)"}

#: runtime -> the technique that it runs without quantization; a speed is divided by this one's
FLOAT = {"pytorch": "BF16", "te": "BF16", "llama.cpp": "GGUF F16"}
