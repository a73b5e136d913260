"""The course model: a small Llama that we train ourselves, so that the whole course fits on a laptop.

The architecture is Llama's to the letter (RMSNorm, rotary positions, SwiGLU, grouped-query attention,
tied embeddings), only small: every tool that takes a Llama takes this one.  All row sizes are multiples
of 256, so every llama.cpp type applies, and of 16, so FP8 does.  ``tools/train_course_model.py`` trains it.

    model = course_model.load()                   # the one in data/model, or QTUTOR_MODEL
    tokenizer = course_model.load_tokenizer()
    fresh = course_model.new_model(seed=0)        # the same architecture, random weights

``QTUTOR_MODEL`` (a hub name or a local folder) swaps in another model everywhere: Llama, Mistral, Qwen, Gemma, Phi-3.
A notebook that needs a certain architecture says so with :func:`only`, and goes on with the course model.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from . import QtutorError, files

MODEL_DIR = files.DATA / "model"
VOCABULARY = 4096
TRAINED_CONTEXT = 512


def model_dir() -> str | Path:
    """Return the folder (Path) or hub name (str) of the model in use: ``QTUTOR_MODEL``, else the course model."""
    chosen = os.environ.get("QTUTOR_MODEL")
    if not chosen:
        return MODEL_DIR
    looks_local = chosen.startswith((".", "/", "~")) or chosen.count("/") != 1 or Path(chosen).exists()
    return Path(chosen).expanduser() if looks_local else chosen


def name() -> str:
    """What titles call the model in use: "course model", or the last part of QTUTOR_MODEL."""
    where = model_dir()
    return "course model" if where == MODEL_DIR else Path(where).name


SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")  # q, k, v, gate and up on their own


def only(families: tuple[str, ...], what: str, plain: bool = False, multiple: int = 1) -> None:
    """Go on with the course model for this session, and say so, where the model in use is of another family.

    ``families``: values of model_type; ``what`` the notebook does that needs it.  ``plain``: also without biases, with
    heads of hidden / heads and RoPE unscaled.  ``multiple``: of which hidden or intermediate size must be.
    """
    from transformers import AutoConfig

    if (where := model_dir()) == MODEL_DIR:
        return
    try:
        found = AutoConfig.from_pretrained(where).get_text_config()
    except (OSError, ValueError):
        raise _missing(where) from None
    usual, rope = found.hidden_size // found.num_attention_heads, getattr(found, "rope_parameters", None) or {}
    odd = {"biases": plain and any(getattr(found, key, False) for key in ("attention_bias", "mlp_bias")),
           "heads of another size": plain and (getattr(found, "head_dim", None) or usual) != usual,
           "scaled RoPE": plain and rope.get("rope_type", "default") != "default",
           f"no rows of {multiple} n": found.hidden_size % multiple and found.intermediate_size % multiple}  # fmt: skip
    odd = [words for words, true in odd.items() if true]
    if found.model_type not in families or odd:
        kind = found.model_type + (f" with {', '.join(odd)}" if odd else "")
        print(f"QTUTOR_MODEL is a {kind}, and this notebook {what}: it goes on with the course model.")
        del os.environ["QTUTOR_MODEL"]


def config(**changes):
    """Return the course model's ``LlamaConfig``; keyword arguments change it (``num_hidden_layers=2``)."""
    from transformers import LlamaConfig

    values = dict(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_theta=10_000.0, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaConfig(**{**values, **changes})


def new_model(seed: int = 0, **changes):
    """Return a fresh float32 Llama with the course architecture (see :func:`config`), the same for the same seed."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config(**changes)).float()
        # GPT-2's rule: what is added to the residual stream starts smaller the more layers add to it.
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data /= math.sqrt(2 * model.config.num_hidden_layers)
    return model


def _missing(where) -> QtutorError:
    if isinstance(where, str):
        return QtutorError(f"The model {where!r} is not here and could not be downloaded: check its name and the "
                           "network, or set QTUTOR_MODEL to a local folder.")  # fmt: skip
    if where == MODEL_DIR:
        return QtutorError("The course model is missing from data/model: restore it with 'git checkout data/model'.")
    return QtutorError(f"There is no model in {where}: set QTUTOR_MODEL to a folder with config.json, or unset it.")


def check_folder(where: Path) -> None:
    """Refuse a damaged folder in one sentence, before a loader fails in the middle."""
    from safetensors import SafetensorError, safe_open

    if not (where / "config.json").is_file():
        raise _missing(where)
    files.read_json(where / "config.json", "model file")
    if not (shards := sorted(where.glob("*.safetensors"))):
        raise QtutorError(f"There are no *.safetensors weights in {where}: restore or download the model again.")
    for shard in shards:
        try:
            with safe_open(shard, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError, ValueError):
            raise QtutorError(f"{shard} is damaged or truncated: restore or download the model again.") from None


def load(dtype=None, device=None):
    """Load the model in use for inference: a Hugging Face causal language model in eval mode.  ``dtype`` of the weights
    is torch.float32 by default (the file holds bfloat16), ``device`` the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    where = model_dir()
    if isinstance(where, Path):
        check_folder(where)
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(where, str):
            raise _missing(where) from None
        reason = str(error).splitlines()[0]
        raise QtutorError(f"{where} cannot be loaded ({reason}): download the model again.") from None
    if bad := [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]:
        raise QtutorError(f"The weights of {bad[0]} are not all finite: the file is damaged, download the model again.")
    return model.eval().to(device or "cpu")


def load_tokenizer():
    """Load the tokenizer of the model in use."""
    from transformers import AutoTokenizer

    where = model_dir()
    if isinstance(where, Path) and not (where / "tokenizer_config.json").is_file():
        raise _missing(where)
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # the Rust tokenizer raises a bare Exception on damaged JSON
        if isinstance(where, str):
            raise _missing(where) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QtutorError(f"The tokenizer in {where} cannot be read ({reason}): download the model again.") from None


def bits_per_byte(model=None, tokenizer=None, text: str | None = None) -> dict:
    """Return bits per byte of a text (the evaluation text by default): keys ``model``, ``gzip`` and ``xz``, both at -9.

    A model's figure is its total cross-entropy in bits over the text's UTF-8 bytes: unlike perplexity per token, it
    does not depend on the tokenizer.
    """
    import gzip
    import lzma

    from . import corpus, evaluate

    model, tokenizer = model or load(), tokenizer or load_tokenizer()
    text = corpus.eval_text() if text is None else text
    data, ids = text.encode("utf-8"), corpus.tokens(text, tokenizer)
    nats = evaluate.perplexity(model, ids, TRAINED_CONTEXT).nll * len(ids)
    compressed = {"gzip": gzip.compress(data, 9), "xz": lzma.compress(data, preset=9)}
    return {"model": nats / math.log(2) / len(data), **{k: 8 * len(v) / len(data) for k, v in compressed.items()}}


def complete(prompt: str, model=None, tokenizer=None, max_tokens: int = 40, temperature: float = 0.0, seed: int = 0):
    """Return the prompt with the model's continuation; greedy at temperature 0, else sampled with ``seed``."""
    import torch

    if not prompt or re.search("[\ud800-\udfff]", prompt):  # lone surrogates: not UTF-8
        raise QtutorError("There is no text to continue: give at least one character, in UTF-8.")
    if max_tokens < 1 or temperature < 0:
        raise QtutorError(f"Ask for at least one token and a temperature from 0, not {max_tokens} and {temperature}.")
    model, tokenizer = model or load(), tokenizer or load_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    choice = dict(do_sample=True, temperature=temperature, top_p=0.95) if temperature > 0 else dict(do_sample=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens,
                             pad_token_id=tokenizer.eos_token_id, **choice)  # fmt: skip
    return tokenizer.decode(out[0], skip_special_tokens=True)
