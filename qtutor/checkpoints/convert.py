"""Any model to GGUF: llama.cpp's own converter, in a process of its own, and its file compared with the original.

:mod:`qtutor.gguf_export` shows how a Llama becomes a GGUF file, and does so for the course model.  Every other family
(SentencePiece or Llama 3 vocabularies, Mistral, Qwen, Gemma, Phi ...) is a matter for ``convert_hf_to_gguf.py``, which
``python -m tools.llamacpp_source`` installs in the version of the llama.cpp that is here.

    convert.to_gguf("my-model/", "model-f16.gguf")

A converter reads names and numbers; what it does not expect it may drop, and the file is quietly another model.  So the
folder is first brought into the form that transformers would load, without code in it; afterwards weights are counted,
tokens compared, and logits, where the model is small enough to run here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from math import prod
from pathlib import Path

import numpy as np
import psutil

from .. import QtutorError, files, gguf_export, llamacpp

SCRIPT = "convert_hf_to_gguf.py"
#: added to what the tokenizer's own added tokens make
PROBE = "Hello  world\r\n\t it's 3.14159, 1234567\n\n\n 日本語 עברית 😀👩‍👧 é ½ and   done "
_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # computed, not trained
_TOLERANCE = {"f32": 5e-3, "f16": 2e-2, "bf16": 1e-1}  # of the logits' spread
# The child imports the converter's modules, then what this process can import.
_CHILD = """
import sys
sys.path[:0] = [sys.argv[1], *sys.argv[2].split("\\n")]
import conversion
pre, known = sys.argv[3], conversion.TextModel.get_vocab_base_pre
def name_of(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:  # a vocabulary that it has not seen, behind a regular expression that llama.cpp has
        if pre:
            return pre
        raise
conversion.TextModel.get_vocab_base_pre = name_of
indexed = conversion.ModelBase.index_tensors
def index(self, *args, **kwargs):
    def told(item):
        if (kept := type(self).filter_tensors(item)) is None:
            print("LEFT OUT", item[0], file=sys.stderr)
        return kept
    self.filter_tensors = told
    return indexed(self, *args, **kwargs)
conversion.ModelBase.index_tensors = index
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[4:]]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def folder() -> Path:
    """Where ``tools.llamacpp_source`` puts the converter: beside llama.cpp's programs."""
    spec = importlib.util.find_spec("llama_cpp")
    if not spec or not spec.origin:
        raise QtutorError("llama-cpp-python is not installed: install the course first (docs/install.md).")
    return Path(spec.origin).parent.parent / "bin" / "llama.cpp"


def to_gguf(model, path, dtype: str = "f16", tokenizer=None) -> Path:
    """Write any language model that llama.cpp knows as a GGUF file, and return its path.

    ``model`` is a folder as :meth:`save_pretrained` writes it, or a transformers model; ``dtype`` is the type of the
    matrices, ``"f32"``, ``"f16"`` or ``"bf16"``; ``tokenizer`` as in :func:`gguf_export.export`, which makes the file
    where it can.  Raises QtutorError, and writes nothing, where the file would be another model.
    """
    try:
        return gguf_export.export(model, path, dtype, tokenizer)
    except gguf_export.NotOursError:
        if not (folder() / SCRIPT).is_file():
            raise QtutorError("llama.cpp's converter is not installed: run python -m tools.llamacpp_source in the "
                              "course's folder, once, with a network.") from None  # fmt: skip
    with files.whole(path) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as temporary:
        staged = _staged(model, tokenizer, Path(temporary))
        left_out = _run(staged, partial, dtype)
        try:
            _same_model(staged, partial, dtype, left_out)
        except (QtutorError, OSError):
            raise
        except Exception as err:  # transformers or a tokenizer has met what it does not know
            why = f"{type(err).__name__}: {err}".strip().splitlines()[0].rstrip(".")
            raise QtutorError(f"{staged.name} cannot be compared with its GGUF file ({why}).") from None
    return llamacpp.trust(path)


def _staged(model, tokenizer, temporary: Path) -> Path:
    """A folder with what transformers would load of ``model``: weights as links, everything else copied, no code."""
    if isinstance(model, (str, os.PathLike)):
        source = Path(model)
    else:
        model = gguf_export.plain(model)
        source = temporary / "saved" / type(model).__name__
        if getattr(model.config, "quantization_config", None):
            raise QtutorError("This model is quantized already (config.quantization_config): export the original.")
        model.save_pretrained(source)
    config, where = gguf_export.checkpoint(source)
    kinds = {name: handle.get_slice(name).get_dtype() for name, (_, handle) in where.items()}
    if odd := [name for name, kind in kinds.items()
               if kind not in ("F64", "F32", "F16", "BF16") and not name.endswith(_BUFFERS)]:  # fmt: skip
        if not config.get("quantization_config"):
            raise QtutorError(f"{odd[0]} is stored as {kinds[odd[0]]}, and config.json does not say how: export the "
                              "original weights.")  # fmt: skip
    staged = temporary / "staged" / source.resolve().name
    staged.mkdir(parents=True)
    vocabulary = re.compile("tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template|tekken")
    for file in source.iterdir():
        given = tokenizer is not None and vocabulary.match(file.name)
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".md") and not given and "index.json" not in file.name:
            shutil.copyfile(file, staged / file.name)
    weights = {name: file for name, (file, _) in where.items()}
    for file in set(weights.values()):
        (staged / file).symlink_to((source / file).resolve())
    if set(weights.values()) != {"model.safetensors"}:
        files.write_text(staged / "model.safetensors.index.json", json.dumps({"weight_map": weights}))
    if isinstance(tokenizer, (str, os.PathLike)):
        place = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
        for file in filter(lambda file: vocabulary.match(file.name), place.iterdir()):
            shutil.copyfile(file, staged / file.name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(staged) if hasattr(tokenizer, "save_pretrained") else tokenizer.save(
            str(staged / "tokenizer.json"))  # fmt: skip
    settings = files.read_json(staged / "tokenizer_config.json") if (staged / "tokenizer_config.json").is_file() else {}
    if (staged / "tokenizer.json").is_file():
        tok = files.read_json(staged / "tokenizer.json")
        if tok["model"].get("byte_fallback"):
            added = {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in tok.get("added_tokens", [])}
            settings.setdefault("added_tokens_decoder", added)
            if not (staged / "tokenizer.model").is_file():
                (staged / "tokenizer.model").write_bytes(_sentencepiece(tok))
    for name, content in (("config.json", config), ("tokenizer_config.json", settings)):
        content.pop("auto_map", None)  # would name code to run
        if content:
            files.write_text(staged / name, json.dumps(content))
    return staged


def _sentencepiece(tok: dict) -> bytes:
    """A SentencePiece model (a protobuf message) with the pieces of a tokenizer.json, scored by the merges' order.

    transformers 5 saves no tokenizer.model, and without one the converter gives each piece the same score: llama.cpp
    would merge from left to right.  Source: sentencepiece_model.proto.
    """
    number = lambda n: bytes([n]) if n < 128 else bytes([n & 127 | 128]) + number(n >> 7)  # noqa: E731
    scores: dict[str, float] = {}
    for at, merge in enumerate(tok["model"]["merges"]):
        scores.setdefault(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge), -at)
    special = {one["content"]: 3 if one["special"] else 4 for one in tok.get("added_tokens", [])}
    special[tok["model"].get("unk_token") or "<unk>"] = 2
    rows = {at: text for text, at in tok["model"]["vocab"].items()}
    rows |= {one["id"]: one["content"] for one in tok.get("added_tokens", [])}
    made = bytearray()
    for at in range(max(rows) + 1):
        text = rows.get(at, f"[unused {at}]")
        kind = special.get(text) or (6 if re.fullmatch("<0x[0-9A-F]{2}>", text) else 1 if at in rows else 5)
        raw = text.encode()
        piece = b"\x0a" + number(len(raw)) + raw + b"\x15" + np.float32(scores.get(text, -1e9)).tobytes() + b"\x18"
        made += b"\x0a" + number(len(piece) + 1) + piece + bytes([kind])
    return bytes(made) + b"\x12\x05\x18\x02\x98\x02\x01" + b"\x1a\x02\x20\x00"  # BPE, byte fallback; spaces kept


def _run(staged: Path, target: Path, dtype: str) -> list[str]:
    """Run the converter on a folder, offline and apart from this process's environment; the tensors it left out."""
    pre = ""
    if (staged / "tokenizer.json").is_file():
        with contextlib.suppress(QtutorError):
            pre = gguf_export.pre_tokenizer_name(files.read_json(staged / "tokenizer.json"))
    command = [sys.executable, "-I", "-c", _CHILD, str(folder()), "\n".join(filter(None, sys.path)), pre,
               str(staged), "--outfile", str(target), "--outtype", dtype]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, env=env, cwd=target.parent, check=False)
    said = done.stderr.decode("utf-8", "replace").replace(f"{staged.parent}{os.sep}", "").splitlines()
    if done.returncode < 0 or any(line.startswith("MemoryError") for line in said):
        raise QtutorError(f"llama.cpp's converter was ended on {staged.name}, probably for lack of memory: free some.")
    if done.returncode or not target.is_file():
        told = [line for line in said if re.match(r"ERROR:|[\w.]*(Error|Exception)\b", line)] or said or ["no reason"]
        why = re.sub(r"^ERROR:[\w.-]+:", "", told[-1]).strip().rstrip(".")
        raise QtutorError(f"llama.cpp's converter refuses {staged.name}: {why[:200]}.")
    return [line.removeprefix("LEFT OUT ") for line in said if line.startswith("LEFT OUT ")]


def _same_model(staged: Path, target: Path, dtype: str, left_out: list[str]) -> None:
    """Raise QtutorError where the file is not the folder's model: by its settings, weights, tokens and logits."""
    from transformers import AutoConfig

    def refuse(why: str):
        raise QtutorError(f"{staged.name} cannot become a GGUF file: {why}.")

    found, config = llamacpp.check_gguf(target), AutoConfig.from_pretrained(staged).get_text_config()
    packed = bool(getattr(config, "quantization_config", None))  # the original's values are not in the folder
    _same_settings(config, found, staged.name, refuse)
    _same_weights(config, found, gguf_export.checkpoint(staged)[1], left_out, packed, refuse)
    with llamacpp.Model(target, ctx=512) as llama:
        ids = _same_tokens(staged, llama, refuse)
        if not packed and 12 * found.n_weights <= psutil.virtual_memory().available and found.n_weights <= 2e9:
            _same_logits(staged, llama, ids, dtype, refuse)


def _same_settings(config, found: llamacpp.Gguf, name: str, refuse) -> None:
    """Activation, rotary embedding and window."""
    setting = lambda key: found.metadata.get(f"{found.metadata['general.architecture']}.{key}")  # noqa: E731
    for key in ("hidden_act", "hidden_activation", "activation_function", "use_bidirectional_attention"):
        usual, here = getattr(type(config)(), key, None), getattr(config, key, None)
        if here != usual and (here, usual) != ("swish", "silu"):
            refuse(f"its {key} is {here!r} and llama.cpp computes this family with {usual!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    kind, part = rope.get("rope_type") or "default", rope.get("partial_rotary_factor") or 1
    factors = any(t.name.startswith("rope_f") for t in found.tensors)
    carried = factors if kind in ("llama3", "longrope") else setting("rope.scaling.type") == kind
    if kind not in ("default", "dynamic", "proportional") and not carried:
        refuse(f"llama.cpp does not know RoPE scaling {kind!r} in this family")
    if part != 1 and kind != "proportional":
        head_dim = setting("attention.key_length") or setting("embedding_length") // setting("attention.head_count")
        if setting("rope.dimension_count") != int(head_dim * part):
            refuse(f"llama.cpp does not know partial_rotary_factor {part} in this family")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and not setting("attention.sliding_window"):
        if window < config.max_position_embeddings:
            warnings.warn(f"llama.cpp has no sliding window in this family: beyond {window} tokens {name} differs "
                          "from transformers.", stacklevel=4)  # fmt: skip


def _same_weights(config, found: llamacpp.Gguf, where: dict, left_out: list[str], packed: bool, refuse) -> None:
    """As many weights as in the checkpoint ``where``, and a head that is the embedding where the file ties them."""
    import torch

    sizes = {name: prod(handle.get_slice(name).get_shape()) for name, (_, handle) in where.items()
             if not name.endswith(_BUFFERS)}  # fmt: skip
    written = {t.name: prod(t.shape) for t in found.tensors if not t.name.startswith("rope_f")}
    heads = [name for name in sizes if name.endswith("lm_head.weight")]
    if "output.weight" not in written:
        if not heads and not getattr(config, "tie_word_embeddings", False):
            refuse("it has no lm_head, and config.json does not tie the embedding to it")
        for head in heads:
            same = [name for name in sizes if re.search(r"(embed_tokens|wte|word_embeddings)\.weight$", name)
                    and torch.equal(where[name][1].get_tensor(name), where[head][1].get_tensor(head))]  # fmt: skip
            if not same:
                refuse(f"its {head} is not the embedding, and llama.cpp ties the two in this family")
            del sizes[head]
    lost = sum(sizes.values()) - sum(written.values())
    if lost > 0 and not packed:
        names = [name for name in left_out if name in sizes] or ["the converter does not say which"]
        refuse(f"{lost:,} of its weights have no place in the file ({names[0]})")


def _same_tokens(staged: Path, llama: llamacpp.Model, refuse) -> list[int]:
    """The ids of :data:`PROBE`, which are the same in both, as are those of the added tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(staged)
    for text in (PROBE, *PROBE.split(" ")):
        if llama.tokenize(text) != tokenizer(text)["input_ids"]:
            refuse(f"llama.cpp splits {text!r} into other tokens than transformers")
    if llama.tokenize("e\u0301") != tokenizer("e\u0301")["input_ids"]:
        warnings.warn(f"llama.cpp does not normalize text as the tokenizer of {staged.name} does: compose accents "
                      "(NFC) before.", stacklevel=4)  # fmt: skip
    added = tokenizer.added_tokens_decoder
    for token in added.values():
        pair = [llama.tokenize(f"a {token} b"), tokenizer(f"a {token} b")["input_ids"]]
        if not (token.lstrip or token.rstrip or token.single_word):  # spaces beside it are then of two schools
            pair = [[number for number in one if number in added] for one in pair]
        if pair[0] != pair[1]:
            refuse(f"llama.cpp reads the added token {str(token)!r} in another way than transformers")
    return tokenizer(PROBE)["input_ids"]


def _same_logits(staged: Path, llama: llamacpp.Model, ids: list[int], dtype: str, refuse) -> None:
    """Logits within :data:`_TOLERANCE` of transformers' own."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(staged, dtype=torch.float32).eval()
        theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    off = float(np.sqrt(np.mean((llama.logits(ids) - theirs) ** 2)) / theirs.std())
    if not off < _TOLERANCE[dtype]:
        refuse(f"its logits in llama.cpp are {off:.1%} of their spread away from transformers'")
