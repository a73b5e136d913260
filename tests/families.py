"""Small configurations of the families that people bring, each with what sets it apart; and llama.cpp's converter."""

import json
import subprocess
import sys

import pytest

from qtutor import QtutorError, llamacpp

COMMON = dict(vocab_size=320, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=8,
              num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}  # fmt: skip
LONG = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
CONFIGS = {name: COMMON | config for name, config in {
    "Llama 2": dict(model_type="llama", num_key_value_heads=8),
    "Llama 3": dict(model_type="llama", rope_theta=5e5, rope_scaling=LLAMA3),
    "TinyLlama, tied": dict(model_type="llama", tie_word_embeddings=True, num_key_value_heads=1),
    "Llama with biases, wide heads": dict(model_type="llama", attention_bias=True, mlp_bias=True, head_dim=64),
    "Mistral": dict(model_type="mistral", sliding_window=128, head_dim=64),
    "Mistral, rope of Llama 3": dict(model_type="mistral", rope_scaling=LLAMA3),
    "Qwen2": dict(model_type="qwen2", sliding_window=128, use_sliding_window=True),
    "Qwen2, tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "Qwen3": dict(model_type="qwen3", head_dim=64),
    "Qwen3, tied": dict(model_type="qwen3", head_dim=128, num_key_value_heads=8, tie_word_embeddings=True),
    "Gemma": dict(model_type="gemma", num_key_value_heads=1, head_dim=64, tie_word_embeddings=True),
    "Gemma 2": dict(model_type="gemma2", head_dim=64, sliding_window=300, num_hidden_layers=5,
                    tie_word_embeddings=True),
    "Gemma 3": dict(model_type="gemma3_text", head_dim=64, sliding_window=512, num_hidden_layers=8,
                    tie_word_embeddings=True),
    "Gemma 3, untied": dict(model_type="gemma3_text", head_dim=32, sliding_window=64, num_hidden_layers=7),
    "Phi-3": dict(model_type="phi3", num_key_value_heads=8, pad_token_id=0, sliding_window=128),
    "Phi-3, long": dict(model_type="phi3", pad_token_id=0, rope_scaling=LONG, original_max_position_embeddings=512),
}.items()}  # fmt: skip

CHILD = """
import json, runpy, sys
from pathlib import Path
source = Path(sys.argv[1])
sys.path[:0] = [str(source), str(source / "gguf-py")]
from conversion import TextModel, load_all_models
load_all_models()
def kinds(one):
    return [one, *(found for below in one.__subclasses__() for found in kinds(below))]
for kind in kinds(TextModel):
    kind.set_vocab = TextModel._set_vocab_none
for folder in json.loads(sys.argv[2]):
    sys.argv = ["convert", folder, "--outtype", "f16", "--outfile", folder + ".gguf"]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
"""


def save(config: dict, folder):
    """Write a model with random weights (float16) into a folder; no vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).half().save_pretrained(folder)
    words = {f"w{i}": i for i in range(config["vocab_size"])}  # Gemma 3's converter counts them
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
    return folder


def converter():
    """The folder of llama.cpp's converter; skips where it is not installed."""
    try:
        beside = llamacpp.tool("llama-quantize").parent
    except QtutorError as why:
        pytest.skip(str(why))
    if not (found := sorted(beside.rglob("convert_hf_to_gguf.py"))):
        pytest.skip("llama.cpp's converter is not installed")
    return found[0].parent


def convert(folders) -> list:
    """GGUF files (F16, no vocabulary) that llama.cpp's converter makes of the folders, in one child process."""
    command = [sys.executable, "-c", CHILD, str(converter()), json.dumps([str(folder) for folder in folders])]
    subprocess.run(command, check=True, capture_output=True)
    # trusted: without a vocabulary llama.cpp cannot try the model out
    return [llamacpp.trust(folder.with_name(folder.name + ".gguf")) for folder in folders]
