"""Records what llama.cpp's own converter makes of a few Llamas: every tensor's type, shape and SHA-256, all metadata.

``tests/test_gguf_export.py`` builds the same models again and compares qtutor's export with the record, tensor for
tensor: in seconds, and where the converter is not installed (``tests/test_convert.py`` calls it where it is).  To run
this script anew, with the folder that ``python -m tools.llamacpp_source`` names:

    python data/reference/record_converter.py .venv/lib/python3.11/site-packages/bin/llama.cpp

One thing is not the converter's: it knows tokenizers by a hash of what they make of a test sentence, and refuses one
that it has not seen, as ours.  The script answers "gpt-2" in its place; everything else is the converter's own.

The models are the course model and two small ones, whose weights are multiples of 2**-24 drawn by numpy's PCG64:
exact in float32, and to be rounded in float16 and bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
COURSE = HERE.parent / "model"
RECORD = HERE / "converter.json"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SHAPE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
         "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}  # fmt: skip
MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied_bias_chat": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
}  # fmt: skip
CASES = [("course", "f32"), ("course", "f16"), ("course", "bf16"), ("tied", "f16"), ("tied", "bf16"),
         ("untied_bias_chat", "f32"), ("untied_bias_chat", "bf16")]  # fmt: skip

_RUN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
sys.argv[0] = "convert_hf_to_gguf.py"
convert_hf_to_gguf.main()
"""


def model_folder(name: str, folder: Path) -> Path:
    """A Hugging Face folder of one of the models; the small ones are made here, the same on every machine."""
    if name == "course":
        return COURSE
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    target = Path(folder) / name
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **MODELS[name]}))
    rng = np.random.default_rng(8)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            drawn = rng.integers(-(2**20), 2**20, tuple(parameter.shape)) / 2**24
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(COURSE)
    if "chat" in name:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    return target


def digest(path) -> dict:
    """``{"tensors": {name: [type, shape, SHA-256 of the bytes]}, "metadata": {key: value}}`` of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {t.name: [t.tensor_type.name, [int(n) for n in t.shape], hashlib.sha256(t.data.tobytes()).hexdigest()]
               for t in reader.tensors}  # fmt: skip
    metadata = {}
    for key, field in reader.fields.items():
        value = field.contents()
        if isinstance(value, list) and len(value) > 16:  # the vocabulary: its hash is enough to tell
            value = "SHA-256 " + hashlib.sha256(json.dumps(value).encode()).hexdigest()
        if not key.startswith("GGUF."):
            metadata[key] = value
    return {"tensors": tensors, "metadata": metadata}


def main(source: str) -> None:
    source = Path(source).resolve()
    if not (source / "convert_hf_to_gguf.py").is_file():
        sys.exit(f"There is no convert_hf_to_gguf.py in {source.name}/: give the folder of llama.cpp's source.")
    record = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in CASES:
            model, target = model_folder(name, Path(folder)), Path(folder) / f"{name}-{dtype}.gguf"
            subprocess.run([sys.executable, "-W", "ignore", "-c", _RUN, source, model, "--outfile", target,
                            "--outtype", dtype], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
            record[f"{name}-{dtype}"] = digest(target)
            print(f"{name:18s}{dtype:5s}{len(record[f'{name}-{dtype}']['tensors'])} tensors")
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
