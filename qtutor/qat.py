"""Quantization-aware training of a language model: its schemes, and a trained model.

The QAT notebook has the training loop; one trained model, on llama.cpp's grid, is there already: :func:`load_q4_0`.
"""

from __future__ import annotations

from pathlib import Path

from . import QtutorError, files

HEAD = {"embed_tokens": "Q8_0", "lm_head": "Q8_0"}  # llama.cpp's name for 8 bits in blocks of 32

SCHEMES = {  # name -> options of fake_quant.prepare
    "W8A8": dict(weight="int8", activation="int8"),
    "W4A16": dict(weight="int4", group_size=32),
    "W4A8": dict(weight="int4", activation="int8", group_size=32),
    "W3": dict(weight="int3", group_size=32),
    "W2": dict(weight="int2", group_size=32),
    "ternary": dict(weight="ternary", group_size=32),
    "FP8": dict(weight="FP8", activation="FP8"),
    "MXFP4": dict(weight="MXFP4", activation="MXFP4"),
    "NVFP4": dict(weight="NVFP4", activation="NVFP4"),
    "Q4_0": dict(weight="Q4_0", overrides=HEAD),
}

# Codes and scales of the course model after QAT with SCHEMES["Q4_0"], as tools/record_qat.py writes them.
Q4_0_FILE = files.DATA / "qat" / "course_model_q4_0.safetensors"
# What SCHEMES["Q4_0"] means to llamacpp.quantize; the second pattern is for models whose head is not tied.
Q4_0_TENSORS = {"token_embd": "Q8_0", r"^output\.weight": "Q8_0"}


def load_q4_0(path=Q4_0_FILE):
    """The course model after QAT on llama.cpp's Q4_0 grid (head and embedding: Q8_0), as a float model on that grid.
    Raises QtutorError where the file is missing, damaged, or for another model than the one in use."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from . import course_model, fake_quant, packed

    if not Path(path).is_file():
        raise QtutorError(f"There is no '{path}': restore it with 'git checkout data/qat'.")
    model = packed.convert(fake_quant.prepare(course_model.load(), **SCHEMES["Q4_0"]))
    try:
        load_model(model, path)
    except (SafetensorError, RuntimeError, ValueError, OSError):
        raise QtutorError(f"'{path}' does not fit the model in use: it belongs to the course model; unset "
                          "QTUTOR_MODEL, or restore the file with 'git checkout data/qat'.") from None  # fmt: skip
    return packed.bake(model).eval()
