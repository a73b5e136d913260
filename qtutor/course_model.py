"""The course model: a small Llama that we train ourselves, so that the whole course fits on a laptop.

The architecture is Llama's to the letter (RMSNorm, rotary positions, SwiGLU, grouped-query attention,
tied embeddings), only small: every tool that takes a Llama takes this one.  All row sizes are multiples
of 256, so every llama.cpp type applies, and of 16, so FP8 does.

    model = course_model.load()                   # the one in data/model, or QTUTOR_MODEL
    tokenizer = course_model.load_tokenizer()
    fresh = course_model.new_model(seed=0)        # the same architecture, random weights

``QTUTOR_MODEL`` (a hub name or a local folder) swaps in another Llama-family model everywhere.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from . import QtutorError

MODEL_DIR = Path(__file__).resolve().parent.parent / "data" / "model"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
TRAINED_CONTEXT = 512


def model_dir() -> str | Path:
    """Return the folder (Path) or hub name (str) of the model in use: ``QTUTOR_MODEL``, else the course model."""
    chosen = os.environ.get("QTUTOR_MODEL")
    if not chosen:
        return MODEL_DIR
    looks_local = chosen.startswith((".", "/", "~")) or chosen.count("/") != 1 or Path(chosen).exists()
    return Path(chosen).expanduser() if looks_local else chosen


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
        return QtutorError(
            f"The model {where!r} is not here and could not be downloaded: check its name and the network, "
            "or set QTUTOR_MODEL to a local folder."
        )
    if Path(where) == MODEL_DIR:
        return QtutorError("The course model is missing from data/model: restore it with 'git checkout data/model'.")
    return QtutorError(f"There is no model in {where}: set QTUTOR_MODEL to a folder with config.json, or unset it.")


def _check_folder(where) -> None:
    """Refuse a damaged folder in one sentence, before a loader fails in the middle."""
    if isinstance(where, str):
        return
    from safetensors import SafetensorError, safe_open

    if not (where / "config.json").is_file():
        raise _missing(where)
    try:
        json.loads((where / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise QtutorError(f"{where / 'config.json'} is not valid JSON: restore or download the model again.") from None
    shards = sorted(where.glob("*.safetensors"))
    if not shards:
        raise QtutorError(f"There are no *.safetensors weights in {where}: restore or download the model again.")
    for shard in shards:
        try:
            with safe_open(shard, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError, ValueError):
            raise QtutorError(f"{shard} is damaged or truncated: restore or download the model again.") from None


def load(dtype=None, device=None):
    """Load the model in use for inference.

    Args:
        dtype: torch dtype of the weights, float32 by default (the file holds bfloat16).
        device: where to put it; the CPU by default.

    Returns:
        A Hugging Face causal language model in eval mode.

    Raises:
        QtutorError: the model is missing or damaged, or holds values that are not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    where = model_dir()
    _check_folder(where)
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(where, str):
            raise _missing(where) from None
        raise QtutorError(
            f"{where} cannot be loaded ({str(error).splitlines()[0]}): download the model again."
        ) from None
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise QtutorError(f"The weights of {bad[0]} are not all finite: the file is damaged, download the model again.")
    return model.eval().to(device or "cpu")


def load_tokenizer():
    """Load the tokenizer that belongs to the model in use.

    Raises:
        QtutorError: it is missing or damaged.
    """
    from transformers import AutoTokenizer

    where = model_dir()
    if not isinstance(where, str) and not (where / "tokenizer_config.json").is_file():
        raise _missing(where)
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # the Rust tokenizer raises a bare Exception on damaged JSON
        if isinstance(where, str):
            raise _missing(where) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QtutorError(f"The tokenizer in {where} cannot be read ({reason}): download the model again.") from None


def train_tokenizer(documents: list[str], folder: Path, vocab_size: int = VOCABULARY):
    """Train a byte-level BPE tokenizer (GPT-2's pre-tokenization) on ``documents`` and save it into ``folder``.

    Bytes are the base alphabet, so any text can be encoded and comes back unchanged (GPT-2, section 2.2).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return fast


# --- training ---------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, decay_share: float = 0.6) -> float:
    """Warm-up, plateau, then a straight line to zero over the last ``decay_share`` of the steps (arXiv 2405.18392)."""
    decay_from = int(steps * (1 - decay_share))
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1, steps - decay_from))


def optimizers(model, rate: float, name: str = "muon", weight_decay: float = 0.1):
    """Return the optimizers of a model: AdamW for all of it, or Muon for the hidden matrices and AdamW for the rest.

    Muon (https://kellerjordan.github.io/posts/muon) orthogonalizes the momentum of each matrix.  With
    ``match_rms_adamw`` its updates have AdamW's size, so that one learning rate serves both.
    """
    import torch

    cuda = next(model.parameters()).is_cuda
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    embedding = [p for n, p in named if p.ndim == 2 and ("embed" in n or "lm_head" in n)]
    norms = [p for n, p in named if p.ndim != 2]
    groups = [dict(params=embedding, weight_decay=weight_decay), dict(params=norms, weight_decay=0.0)]
    if name == "adamw":
        groups.append(dict(params=hidden, weight_decay=weight_decay))
    result = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=cuda)]
    if name == "muon":
        result.append(
            torch.optim.Muon(hidden, lr=rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
    return result


def mean_nll(model, ids, context: int = TRAINED_CONTEXT, batch_size: int = 16, max_windows: int | None = None):
    """Return the mean negative log-likelihood (nats per token) of a token stream in windows of ``context`` tokens.

    Args:
        ids: token ids, shape (n,), any integer dtype; each window predicts tokens 1..context-1 from those before.
    """
    import numpy as np
    import torch

    count = len(ids) // context
    count = min(count, max_windows) if max_windows else count
    device = next(model.parameters()).device
    windows = torch.from_numpy(np.asarray(ids[: count * context]).astype(np.int64)).view(count, context)
    total, n = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in windows.split(batch_size):
            batch = batch.to(device)
            logits = model(input_ids=batch[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            total += loss.item()
            n += batch[:, 1:].numel()
    model.train(training)
    return total / n


def _save_checkpoint(folder: Path, model, opts, step: int, log: list, settings: dict, seconds: float) -> None:
    """Weights, optimizer state and log, each written whole and then renamed; safetensors only, no pickle."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = {id(p): n for n, p in model.named_parameters()}
    state = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    for i, opt in enumerate(opts):
        for p, values in opt.state.items():
            for key, value in values.items():
                state[f"optimizer.{i}.{key}.{names[id(p)]}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(state, folder / "checkpoint.partial")
    (folder / "state.partial").write_text(json.dumps(dict(step=step, log=log, settings=settings, seconds=seconds)))
    os.replace(folder / "checkpoint.partial", folder / "checkpoint.safetensors")
    os.replace(folder / "state.partial", folder / "state.json")


def _load_checkpoint(folder: Path, model, opts, settings: dict) -> tuple[int, list, float]:
    """Return (step, log, seconds) of the checkpoint in ``folder`` after loading it, or (0, [], 0.0)."""
    from safetensors.torch import load_file

    if not (folder / "state.json").exists():
        return 0, [], 0.0
    saved = json.loads((folder / "state.json").read_text())
    if saved["settings"] != settings:
        raise QtutorError(f"{folder} holds a checkpoint with other settings: use them again or choose another --out.")
    device = next(model.parameters()).device
    state = load_file(folder / "checkpoint.safetensors", device=str(device))
    by_name = dict(model.named_parameters())
    for name, p in by_name.items():
        p.data.copy_(state[name])
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, i, field, name = key.split(".", 3)
            opts[int(i)].state[by_name[name]][field] = value if field != "step" or value.is_cuda else value.cpu()
    return saved["step"], saved["log"], saved["seconds"]


def train(out: Path, ids, valid_ids=None, precision: str = "auto", steps: int = 1000, batch_size: int = 64,
          seq_len: int = TRAINED_CONTEXT, rate: float = 3e-3, optimizer: str = "muon", weight_decay: float = 0.1,
          seed: int = 0, log_every: int = 50, save_every: int = 1000, progress: bool = True, **changes):  # fmt: skip
    """Train the course model and save it into ``out``; an interrupted run goes on from its last checkpoint.

    Under ``precision="fp8"`` the linear layers of the blocks become ``te.Linear`` and their three matrix
    products run in FP8 (delayed scaling); under ``"bf16"`` they stay what they are and run in BF16.  Master
    weights, optimizer, norms, attention and the head stay in higher precision, as NVIDIA's recipe has it.

    Args:
        ids: training token ids, shape (n,).  valid_ids: held-out ids, or None.
        precision: "fp8", "bf16", or "auto": FP8 where real Transformer Engine can run it, else BF16.

    Returns:
        (model, log, seconds); the log is a list of dicts with step, tokens, loss (nats per token), and valid.

    Raises:
        QtutorError: the loss is not finite, or ``out`` holds a checkpoint with other settings.
    """
    import contextlib

    import torch
    from tqdm.auto import tqdm

    from . import corpus

    if precision != "bf16":
        from . import te_switch

        status = te_switch.activate()
        precision = "fp8" if precision == "fp8" or status.real else "bf16"

    def products():  # the context in which the blocks' matrix products run
        if precision == "bf16":
            return contextlib.nullcontext()
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import DelayedScaling

        return te.autocast(enabled=True, recipe=DelayedScaling())

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(seed, **changes).to(device).train()
    if precision == "fp8":
        te_switch.swap_linears(model)
    opts = optimizers(model, rate, optimizer, weight_decay)
    out = Path(out)
    settings = dict(precision=precision, steps=steps, batch_size=batch_size, seq_len=seq_len, rate=rate,
                    optimizer=optimizer, weight_decay=weight_decay, seed=seed)  # fmt: skip
    first, log, spent = _load_checkpoint(out, model, opts, settings)
    stream = corpus.batches(ids, batch_size, seq_len, seed=seed, device=device)
    for _ in range(first):
        next(stream)
    parameters = [p for p in model.parameters() if p.requires_grad]
    began, running = time.perf_counter() - spent, []
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=not progress, desc=precision, unit="step")
    for step in bar:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, steps, rate)
        batch = next(stream)
        with torch.autocast(device, torch.bfloat16):
            with products():
                logits = model(input_ids=batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        running.append(loss.detach())
        if (step + 1) % log_every == 0 or step + 1 == steps:
            mean = torch.stack(running).mean().item()
            running = []
            if not math.isfinite(mean):
                raise QtutorError(f"The loss is not finite at step {step + 1}: lower --rate and start again.")
            row = dict(step=step + 1, tokens=(step + 1) * batch_size * seq_len, loss=round(mean, 4))
            if valid_ids is not None and ((step + 1) % (10 * log_every) == 0 or step + 1 == steps):
                with torch.autocast(device, torch.bfloat16):
                    row["valid"] = round(mean_nll(model, valid_ids, seq_len), 4)
            log.append(row)
            bar.set_postfix(loss=f"{mean:.3f}")
        if (step + 1) % save_every == 0:
            _save_checkpoint(out, model, opts, step + 1, log, settings, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    # Same names, plain layers: the trained weights go back into a Hugging Face Llama.
    plain = new_model(seed, **changes)
    plain.load_state_dict({n: p.detach().float().cpu() for n, p in model.named_parameters()}, strict=False)
    plain.tie_weights()
    return plain, log, seconds


def _card(folder: Path, info: dict) -> None:
    """Write the model card, every number of it from ``info``."""
    log = [row for row in info["log"] if "valid" in row] or info["log"]
    table = "\n".join(
        f"| {r['step']} | {r['tokens'] / 1e6:.1f} | {r['loss']:.3f} | {r.get('valid', '')} |" for r in log
    )
    bits = info["bits_per_byte"]
    (folder / "README.md").write_text(
        f"""# The course model

A Llama of {info["parameters"]:,} parameters, trained from nothing on the docstrings of installed Python packages
by `python -m qtutor model train`. Weights are bfloat16 safetensors.

| | |
| --- | --- |
| architecture | 8 layers, hidden 256, SwiGLU 768, 4 heads, 2 key-value heads, tied embeddings |
| tokenizer | byte-level BPE, vocabulary 4,096 |
| precision | {info["precision_words"]} |
| machine | {info["device"]} |
| versions | {", ".join(f"{k} {v}" for k, v in info["versions"].items())} |
| training text | {info["train_bytes"] / 1e6:.1f} MB of unique docstrings, fingerprint `{info["train_fingerprint"]}` |
| tokens seen | {info["tokens"] / 1e6:.0f} M ({info["epochs"]:.1f} passes) |
| optimizer | {info["optimizer"]}, peak rate {info["rate"]}, weight decay {info["weight_decay"]} |
| batch | {info["batch_size"]} x {info["seq_len"]} tokens, {info["steps"]:,} steps |
| time | {info["seconds"]:.0f} s{info.get("note", "")} |

Evaluation text: the Python language reference (`pydoc_data.topics`), each paragraph once, {info["eval_bytes"]:,} bytes,
fingerprint `{info["eval_fingerprint"]}` (Python {info["python"]}); no training document shares 13 words in a row
with it.

| bits per byte of the evaluation text | |
| --- | --- |
| this model, windows of 512 tokens | **{bits["model"]:.3f}** |
| gzip -9 | {bits["gzip"]:.3f} |
| xz -9 | {bits["xz"]:.3f} |

Loss while training (nats per token; "valid" is one docstring in a hundred, held out):

| step | tokens (M) | loss | valid |
| --- | --- | --- | --- |
{table}

The whole log is in `training.json`. Licence: Apache-2.0. Use: this course. It knows how Python documentation
sounds, and nothing that you should rely on.
""",
        encoding="utf-8",
    )


def bits_per_byte(model=None, tokenizer=None, text: str | None = None, context: int = TRAINED_CONTEXT) -> dict:
    """Return bits per byte of a text (the evaluation text by default) for the model, gzip -9 and xz -9.

    A model's figure is its total cross-entropy in bits over the text's UTF-8 bytes: unlike perplexity per
    token, it does not depend on the tokenizer.
    """
    import gzip
    import lzma

    from . import corpus

    model, tokenizer = model or load(), tokenizer or load_tokenizer()
    text = corpus.eval_text() if text is None else text
    data = text.encode("utf-8")
    ids = corpus.tokens(text, tokenizer)
    nats = mean_nll(model, ids, context)
    return {
        "model": nats * len(ids) / math.log(2) / len(data),
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9)) / len(data),
        "nats_per_token": nats, "tokens": len(ids), "bytes": len(data), "fingerprint": corpus.fingerprint(text),
    }  # fmt: skip


def complete(
    prompt: str, model=None, tokenizer=None, max_tokens: int = 40, temperature: float = 0.0, seed: int = 0
) -> str:
    """Return the prompt with the model's continuation; greedy at temperature 0, else sampled with ``seed``."""
    import torch

    model, tokenizer = model or load(), tokenizer or load_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    choice = dict(do_sample=True, temperature=temperature, top_p=0.95) if temperature > 0 else dict(do_sample=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens,
                             pad_token_id=tokenizer.eos_token_id, **choice)  # fmt: skip
    return tokenizer.decode(out[0], skip_special_tokens=True)


def main(argv: list[str]) -> int:
    """``python -m qtutor model train | evaluate | complete TEXT``."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m qtutor model", description="Train or try the course model.")
    commands = parser.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train", help="train it and save it (goes on where it was interrupted)")
    t.add_argument("--out", type=Path, default=None, help="folder (default: a new one in the cache)")
    t.add_argument("--data", type=Path, help="folder with train.npy and valid.npy instead of this machine's docstrings")
    t.add_argument("--precision", choices=["auto", "bf16", "fp8"], default="auto")
    t.add_argument("--steps", type=int, default=8000)
    t.add_argument("--batch-size", type=int, default=64)
    t.add_argument("--rate", type=float, default=3e-3)
    t.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    t.add_argument("--weight-decay", type=float, default=0.1)
    t.add_argument("--seed", type=int, default=0)
    e = commands.add_parser("evaluate", help="bits per byte of the evaluation text, next to gzip -9 and xz -9")
    e.add_argument("--update-card", action="store_true", help="write the figures into the model card")
    c = commands.add_parser("complete", help="continue a text")
    c.add_argument("text")
    c.add_argument("--max-tokens", type=int, default=60)
    c.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args(argv)
    if args.command == "train":
        return _train_command(args)
    if args.command == "evaluate":
        bits = bits_per_byte()
        print("\n".join(f"{k:8s}{bits[k]:.3f} bits per byte" for k in ("model", "gzip", "xz")))
        if args.update_card:
            info = json.loads((MODEL_DIR / "training.json").read_text(encoding="utf-8"))
            _write_info(MODEL_DIR, {**info, **_evaluation(bits)})
    else:
        print(complete(args.text, max_tokens=args.max_tokens, temperature=args.temperature))
    return 0


def _evaluation(bits: dict) -> dict:
    import platform

    return dict(
        python=platform.python_version(), eval_bytes=bits["bytes"], eval_fingerprint=bits["fingerprint"],
        bits_per_byte={k: round(bits[k], 4) for k in ("model", "gzip", "xz")},
    )  # fmt: skip


def _write_info(folder: Path, info: dict) -> None:
    """Write ``training.json`` and the model card made from it."""
    (folder / "training.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    _card(folder, info)


def _train_command(args) -> int:
    import platform
    import shutil

    import numpy as np
    import torch
    import transformers

    from . import corpus

    out = args.out or corpus.cache_dir() / "course-model"
    out.mkdir(parents=True, exist_ok=True)
    if args.data:
        ids, valid = np.load(args.data / "train.npy"), np.load(args.data / "valid.npy")
        about = json.loads((args.data / "meta.json").read_text())
        tokenizer = load_tokenizer()
    else:
        kept, held_out = corpus.split(corpus.train_documents())
        tokenizer = train_tokenizer(kept, out)
        ids, valid = corpus.tokens(kept, tokenizer), corpus.tokens(held_out, tokenizer)
        about = dict(train=corpus.fingerprint("\n".join(kept)), train_bytes=sum(len(d.encode()) for d in kept))
    precision, real, te_version = args.precision, False, None
    if precision != "bf16":
        from . import te_switch

        status = te_switch.activate()
        precision, real, te_version = (
            "fp8" if precision == "fp8" or status.real else "bf16",
            status.real,
            status.version,
        )
    model, log, seconds = train(out, ids, valid, precision, args.steps, args.batch_size, rate=args.rate,
                                optimizer=args.optimizer, weight_decay=args.weight_decay, seed=args.seed)  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(out)
    if args.data:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL_DIR / name, out / name)
    bits = bits_per_byte(model.float(), tokenizer)
    words = {"bf16": "BF16 matrix products"}.get(
        precision, ("FP8 by Transformer Engine" if real else "emulated FP8")
        + " (delayed scaling, E4M3 forward, E5M2 gradients), FP32 master weights")  # fmt: skip
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    if real:
        versions["transformer_engine"] = str(te_version)
    info = dict(
        parameters=sum(p.numel() for p in model.parameters()), precision=precision, precision_words=words,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        versions=versions, train_bytes=about["train_bytes"],
        train_fingerprint=about["train"], train_tokens=len(ids), tokens=args.steps * args.batch_size * TRAINED_CONTEXT,
        epochs=args.steps * args.batch_size * TRAINED_CONTEXT / len(ids), steps=args.steps, batch_size=args.batch_size,
        seq_len=TRAINED_CONTEXT, optimizer=args.optimizer, rate=args.rate, weight_decay=args.weight_decay,
        seed=args.seed, seconds=round(seconds, 1), log=log, **_evaluation(bits),
    )  # fmt: skip
    _write_info(out, info)
    for name in ("checkpoint.safetensors", "state.json"):
        (out / name).unlink(missing_ok=True)
    print(f"saved to {out}: {bits['model']:.3f} bits per byte (gzip {bits['gzip']:.3f}, xz {bits['xz']:.3f})")
    return 0
