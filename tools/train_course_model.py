"""Train the course model: ``python -m tools.train_course_model``; an interrupted run goes on from its last checkpoint.

Text, tokenizer, training, evaluation and model card, in this order.  Nothing is downloaded: the text is the docstrings
of the packages that are installed here (:mod:`qtutor.corpus`), so another machine trains a slightly different model.
What lies in data/model took about eight minutes on one H200.

    python -m tools.train_course_model --out my-model --steps 5000 --weight-decay 0.2
    QTUTOR_MODEL=my-model python -m qtutor model complete "The for statement"
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from qtutor import QtutorError, corpus, course_model, evaluate, files, te_switch
from qtutor.course_model import TRAINED_CONTEXT

END_OF_TEXT = "<|endoftext|>"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, decay_share: float = 0.6) -> float:
    """Warm-up, plateau, then a straight line to zero over the last ``decay_share`` of the steps (arXiv 2405.18392)."""
    decay_from = int(steps * (1 - decay_share))
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1, steps - decay_from))


def train_tokenizer(documents: list[str], folder: Path, vocab_size: int = course_model.VOCABULARY):
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
    fast.save_pretrained(folder)
    return fast


def optimizers(model, rate: float, name: str = "muon", weight_decay: float = 0.1):
    """Return the optimizers of a model: AdamW for all of it, or Muon for the hidden matrices and AdamW for the rest.

    Muon (https://kellerjordan.github.io/posts/muon) orthogonalizes the momentum of each matrix.  With
    ``match_rms_adamw`` its updates have AdamW's size, so that one learning rate serves both.
    """
    named = list(model.named_parameters())
    hidden = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    embedding = [p for n, p in named if p.ndim == 2 and ("embed" in n or "lm_head" in n)]
    norms = [p for n, p in named if p.ndim != 2]
    groups = [dict(params=embedding, weight_decay=weight_decay), dict(params=norms, weight_decay=0.0)]
    if name == "adamw":
        groups.append(dict(params=hidden, weight_decay=weight_decay))
    result = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=named[0][1].is_cuda)]
    if name == "muon":
        result.append(
            torch.optim.Muon(hidden, lr=rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
    return result


# -------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, model, opts, **about) -> None:
    """Write weights and optimizer state as safetensors (no pickle), then ``about``: step, log, settings, seconds."""
    from safetensors.torch import save_file

    names = {id(p): n for n, p in model.named_parameters()}
    state = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    for i, opt in enumerate(opts):
        for p, values in opt.state.items():
            for key, value in values.items():
                state[f"optimizer.{i}.{key}.{names[id(p)]}"] = torch.as_tensor(value).detach().cpu().contiguous()
    with files.whole(folder / "checkpoint.safetensors") as partial:
        save_file(state, partial)
    files.write_text(folder / "state.json", json.dumps(about))


def load_checkpoint(folder: Path, model, opts, settings: dict) -> tuple[int, list, float]:
    """Return (step, log, seconds) of the checkpoint in ``folder`` after loading it, or (0, [], 0.0)."""
    from safetensors.torch import load_file

    if not (folder / "state.json").exists():
        return 0, [], 0.0
    saved = files.read_json(folder / "state.json", "checkpoint")
    if saved["settings"] != settings:
        raise QtutorError(f"{folder} holds a checkpoint with other settings: use them again or choose another --out.")
    by_name = dict(model.named_parameters())
    state = load_file(folder / "checkpoint.safetensors", device=str(next(model.parameters()).device))
    for name, p in by_name.items():
        p.data.copy_(state[name])
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, i, field, name = key.split(".", 3)
            opts[int(i)].state[by_name[name]][field] = value
    return saved["step"], saved["log"], saved["seconds"]


# ----------------------------------------------------------------------------------------------------------- training


def train(out: Path, ids, valid_ids=None, precision: str = "bf16", steps: int = 1000, batch_size: int = 64,
          seq_len: int = TRAINED_CONTEXT, rate: float = 3e-3, optimizer: str = "muon", weight_decay: float = 0.1,
          seed: int = 0, log_every: int = 50, save_every: int = 1000, progress: bool = True, **changes):  # fmt: skip
    """Train a course model; an interrupted run goes on from the last checkpoint in ``out``.

    Under ``precision="fp8"`` the linear layers of the blocks become ``te.Linear`` and their three matrix
    products run in FP8 (delayed scaling); under ``"bf16"`` they stay what they are and run in BF16.  Master
    weights, optimizer, norms, attention and the head stay in higher precision, as NVIDIA's recipe has it.

    ``ids`` (n,) are training tokens, ``valid_ids`` held-out ones or None; ``changes`` go to the model's config.
    Returns (model, log, seconds); the log is a list of dicts with step, tokens, loss (nats per token), and valid.
    Raises QtutorError where the loss is not finite, or ``out`` holds a checkpoint with other settings.
    """
    model = course_model.new_model(seed, **changes).to(DEVICE).train()
    products = contextlib.nullcontext  # the context in which the blocks' matrix products run
    if precision == "fp8":
        te_switch.activate()
        te_switch.swap_linears(model)
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import DelayedScaling

        def products():
            return te.autocast(enabled=True, recipe=DelayedScaling())

    opts = optimizers(model, rate, optimizer, weight_decay)
    settings = dict(precision=precision, steps=steps, batch_size=batch_size, seq_len=seq_len, rate=rate,
                    optimizer=optimizer, weight_decay=weight_decay, seed=seed)  # fmt: skip
    first, log, spent = load_checkpoint(out, model, opts, settings)
    stream = corpus.batches(ids, batch_size, seq_len, seed=seed, device=DEVICE)
    for _ in range(first):
        next(stream)
    began, running = time.perf_counter() - spent, []
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=not progress, desc=precision, unit="step")
    for step in bar:
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = learning_rate(step, steps, rate)
        batch = next(stream)
        with torch.autocast(DEVICE, torch.bfloat16):
            with products():
                logits = model(input_ids=batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        running.append(loss.detach())
        if (step + 1) % log_every == 0 or step + 1 == steps:
            mean, running = torch.stack(running).mean().item(), []
            if not math.isfinite(mean):
                raise QtutorError(f"The loss is not finite at step {step + 1}: lower --rate and start again.")
            row = dict(step=step + 1, tokens=(step + 1) * batch_size * seq_len, loss=round(mean, 4))
            if valid_ids is not None and ((step + 1) % (10 * log_every) == 0 or step + 1 == steps):
                with torch.autocast(DEVICE, torch.bfloat16):
                    row["valid"] = round(evaluate.perplexity(model, valid_ids, seq_len).nll, 4)
            log.append(row)
            bar.set_postfix(loss=f"{mean:.3f}")
        if (step + 1) % save_every == 0:
            seconds = time.perf_counter() - began
            save_checkpoint(out, model, opts, step=step + 1, log=log, settings=settings, seconds=seconds)
    seconds = time.perf_counter() - began
    # Same names, plain layers: the trained weights go back into a Hugging Face Llama.
    plain = course_model.new_model(seed, **changes)
    plain.load_state_dict({n: p.detach().float().cpu() for n, p in model.named_parameters()}, strict=False)
    plain.tie_weights()
    return plain, log, seconds


# --------------------------------------------------------------------------------------------------------- model card


def card(info: dict) -> str:
    """The model card, every number of it from ``info``, which training.json holds."""
    log = [row for row in info["log"] if "valid" in row] or info["log"]
    table = "\n".join(
        f"| {r['step']} | {r['tokens'] / 1e6:.1f} | {r['loss']:.3f} | {r.get('valid', '')} |" for r in log
    )
    bits = info["bits_per_byte"]
    return f"""# The course model

A Llama of {info["parameters"]:,} parameters, trained from nothing on the docstrings of installed Python packages
by `python -m tools.train_course_model`. Weights are bfloat16 safetensors.

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
"""


def evaluation(model, tokenizer) -> dict:
    """What the card says of the evaluation text."""
    text = corpus.eval_text()
    bits = course_model.bits_per_byte(model, tokenizer, text)
    return dict(python=platform.python_version(), eval_bytes=len(text.encode()),
                eval_fingerprint=corpus.fingerprint(text),
                bits_per_byte={name: round(value, 4) for name, value in bits.items()})  # fmt: skip


def write_card(folder: Path, info: dict) -> None:
    """Write ``training.json`` and the model card made from it."""
    files.write_text(folder / "training.json", json.dumps(info, indent=1) + "\n")
    files.write_text(folder / "README.md", card(info))


# -------------------------------------------------------------------------------------------------------- the command


def update_card(folder: Path = course_model.MODEL_DIR) -> None:
    """Score the course model again and write the figures into its card."""
    info = files.read_json(folder / "training.json", "training log")
    write_card(folder, {**info, **evaluation(course_model.load(), course_model.load_tokenizer())})


def make(args) -> None:
    """Read the text, train tokenizer and model, and write all that data/model holds into ``args.out``."""
    import transformers

    args.out.mkdir(parents=True, exist_ok=True)
    if args.data:  # tokens from another machine, whose packages are the training text
        ids, valid = np.load(args.data / "train.npy"), np.load(args.data / "valid.npy")
        about = files.read_json(args.data / "meta.json", "description of the tokens")
        tokenizer = course_model.load_tokenizer()
        tokenizer.save_pretrained(args.out)
    else:
        kept, held_out = corpus.split(corpus.train_documents())
        tokenizer = train_tokenizer(kept, args.out)
        ids, valid = corpus.tokens(kept, tokenizer), corpus.tokens(held_out, tokenizer)
        about = dict(train=corpus.fingerprint("\n".join(kept)), train_bytes=sum(len(d.encode()) for d in kept))
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    words, status = "BF16 matrix products", te_switch.activate()
    precision = "fp8" if args.precision == "fp8" or (args.precision == "auto" and status.real) else "bf16"
    if precision == "fp8":
        words = ("FP8 by Transformer Engine" if status.real else "emulated FP8") + (
            " (delayed scaling, E4M3 forward, E5M2 gradients), FP32 master weights")
        versions |= dict(transformer_engine=str(status.version)) if status.real else {}
    settings = dict(steps=args.steps, batch_size=args.batch_size, rate=args.rate, optimizer=args.optimizer,
                    weight_decay=args.weight_decay, seed=args.seed)  # fmt: skip
    model, log, seconds = train(args.out, ids, valid, precision, **settings)
    model.to(torch.bfloat16).save_pretrained(args.out)
    seen = args.steps * args.batch_size * TRAINED_CONTEXT
    info = dict(
        parameters=sum(p.numel() for p in model.parameters()), precision=precision, precision_words=words,
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({platform.machine()})", versions=versions,
        train_bytes=about["train_bytes"], train_fingerprint=about["train"],
        train_tokens=len(ids), tokens=seen, epochs=seen / len(ids), seq_len=TRAINED_CONTEXT, **settings,
        seconds=round(seconds, 1), log=log, **evaluation(model.float(), tokenizer),
    )  # fmt: skip
    write_card(args.out, info)
    for name in ("checkpoint.safetensors", "state.json"):
        (args.out / name).unlink(missing_ok=True)
    print(f"saved to {args.out}: {info['bits_per_byte']}")


def main(argv: list[str] | None = None) -> int:
    """``python -m tools.train_course_model --help``."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_course_model", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=files.ROOT / ".cache" / "course-model", help="folder to write")
    parser.add_argument("--data", type=Path, help="folder with train.npy, valid.npy, meta.json, not docstrings")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp8"], default="auto")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update-card", action="store_true", help="train nothing: score data/model, write its card")
    args = parser.parse_args(argv)
    try:
        update_card() if args.update_card else make(args)
    except QtutorError as error:
        print(f"train_course_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
