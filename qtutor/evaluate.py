"""How much did quantization change the model?  Perplexity, KL divergence and agreement, each with its error.

Three questions, from the coarse to the fine:

- *Perplexity*, ``exp(mean nll)``: how well does the model predict a text?  It compares a model with the text, so
  its error bar contains all the luck of which text was chosen, and small losses drown in it.
- *Perplexity ratio*: the same text read by both models.  The luck is shared and cancels, token by token: the error
  of the ratio is far smaller than the errors of the two perplexities suggest.
- *KL divergence* (KLD) compares the two models' whole next-token distributions and needs no true token: zero only
  where nothing changed.  Perplexity can come out right by mistakes that cancel; KLD cannot.

Beside them: the change of the true token's probability (mean: got worse?  root mean square: how noisy?) and how
often both models put the same token first (what greedy decoding would notice).

Definitions follow llama.cpp's ``tools/perplexity`` (README.md and perplexity.cpp), including which tokens count:
``second_half_only=True`` scores a window as llama-perplexity does.  Standard errors treat tokens as independent draws,
as llama.cpp's do; neighbours in a text are not quite, so they are somewhat too small (:func:`standard_error` with
``block`` shows by how much).  Whether a loss is real, and small enough, is for the tests of :mod:`qtutor.paired`.

A model is a Hugging Face causal language model, a :class:`qtutor.llamacpp.Model`, or any function from a window of
token ids to logits; sums are float64 and only one window's logits need to be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from torch import Tensor

from . import QtutorError

# Logits in float64 at a time.  A CPU is fastest where they fit its cache (2 MiB), a GPU where they fill it (32 MiB).
_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}


def standard_error(values, block: int | None = None) -> float:
    """Standard error of the mean of ``values`` (n,): sample standard deviation / sqrt(n).

    ``block`` averages so many consecutive values first (batch means), which keeps the correlation between
    neighbouring tokens out of the estimate; give one window's worth.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if block:
        values = values[: len(values) // block * block].reshape(-1, block).mean(1)
    if len(values) < 2:
        raise QtutorError(f"A standard error needs at least two values, here there are {len(values)}: use more text.")
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def share(hits) -> tuple[float, float]:
    """The share of True in ``hits`` (n,) and its binomial standard error, with n - 1 as in llama.cpp."""
    p, n = float(np.mean(hits)), len(hits)
    return p, math.sqrt(p * (1 - p) / (n - 1))


def windows(tokens, ctx: int) -> np.ndarray:
    """Cut token ids (n,) into windows of ``ctx``: int64 (n_windows, ctx); a last shorter one is dropped."""
    tokens = np.asarray(tokens).ravel()
    if ctx < 2 or len(tokens) < ctx:
        raise QtutorError(f"{len(tokens)} tokens do not fill a window of {ctx}: use more text, or a ctx of 2 or more.")
    return tokens[: len(tokens) // ctx * ctx].reshape(-1, ctx).astype(np.int64)


def targets_of(tokens, ctx: int = 512, second_half_only: bool = False) -> np.ndarray:
    """The true tokens that :func:`logits_of` predicts, in the same order: int64 (n_scored,)."""
    return windows(tokens, ctx)[:, ctx // 2 + 1 if second_half_only else 1 :].reshape(-1)


def bos_of(source) -> int | None:
    """The token that llama-perplexity puts first in every window of this GGUF model (None where it puts none)."""
    meta = getattr(getattr(source, "gguf", None), "metadata", {})
    return meta.get("tokenizer.ggml.bos_token_id") if meta.get("tokenizer.ggml.add_bos_token") else None


def check_ids(model, ids) -> None:
    """Raise QtutorError where ``model`` has no row for one of ``ids``: on a GPU that costs the process its CUDA."""
    rows = getattr(getattr(model, "config", None), "vocab_size", None)
    if np.asarray(ids).dtype.kind == "f":
        raise QtutorError("Token ids must be whole numbers: these are floats.")
    if rows and len(ids) and (ids.min() < 0 or ids.max() >= rows):
        raise QtutorError(f"Token ids must lie in 0..{rows - 1}: check the tokenizer, and cut out padding.")


def logits_function(source, first: int = 0) -> Callable[[np.ndarray], Tensor]:
    """One function from a window of token ids (ctx,) to the logits from position ``first`` on: (ctx - first, vocab)."""
    from . import llamacpp

    if isinstance(source, llamacpp.Model):  # which need not compute what nobody asks for
        return lambda window: torch.from_numpy(source.logits(window, first=first))
    if not callable(source):
        raise QtutorError("Give a Hugging Face model, a llamacpp.Model or a function from token ids to logits.")

    def run(window):
        if isinstance(source, torch.nn.Module):
            check_ids(source, window)
            ids = torch.from_numpy(window)[None].to(next(source.parameters()).device)
            with torch.inference_mode():
                logits = source(input_ids=ids, use_cache=False).logits[0]
        else:
            logits = torch.as_tensor(source(window))
        if logits.ndim != 2 or len(logits) != len(window):
            raise QtutorError(f"The model gave logits of shape {tuple(logits.shape)} for {len(window)} tokens.")
        return logits[first:]

    return run


@contextmanager
def eval_mode(source):
    """A module in eval mode inside the block, and as it was afterwards; any other source is left alone."""
    training = getattr(source, "training", False)
    if training:
        source.eval()
    try:
        yield
    finally:
        if training:
            source.train()


def iter_logits(source, tokens, ctx: int = 512, *, second_half_only: bool = False, bos: int | None = None,
                progress: bool = False) -> Iterator[Tensor]:  # fmt: skip
    """Yield one window's scored logits at a time: (n_scored_in_window, vocab), on the model's device.

    ``second_half_only`` drops predictions made with less than half a window of context, as llama-perplexity does.
    ``bos`` replaces the first token of each window (see :func:`bos_of`); it is context and never scored.
    """
    from tqdm.auto import tqdm

    run, cut = logits_function(source, ctx // 2 if second_half_only else 0), windows(tokens, ctx)
    if bos is not None:
        cut[:, 0] = bos
    with eval_mode(source):
        for window in tqdm(cut, desc="logits", unit="window", leave=False, disable=not progress):
            yield run(window)[:-1]  # the last position predicts a token beyond the window


def logits_of(source, tokens, ctx: int = 512, **options) -> Tensor:
    """All scored logits, to keep as the base of many comparisons: float32 (n_scored, vocab), on the CPU.  ``options``
    are those of :func:`iter_logits`.  With a vocabulary of 4,096 a token takes 16 KiB, with 150,000 it takes 600."""
    parts, n, free = [], len(windows(tokens, ctx)), psutil.virtual_memory().available
    for part in iter_logits(source, tokens, ctx, **options):
        if 2 * n * part.numel() * 4 > free:  # once in parts, once together
            raise QtutorError(f"The logits of {n} windows need {n * part.numel() * 4 / 2**30:.1f} GiB, twice, and "
                              f"{free / 2**30:.1f} are free: use fewer windows.")  # fmt: skip
        parts.append(part.float().cpu())
    return torch.cat(parts)


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of logits (rows, vocab), nats, float64.  Raises QtutorError where they are not finite."""
    if logits.ndim != 2:
        raise QtutorError(f"Logits have the shape (tokens, vocabulary), not {tuple(logits.shape)}.")
    logits = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
    if not torch.isfinite(logits.max(-1).values).all():  # NaN spreads to the maximum
        raise QtutorError("The model's logits hold NaN or infinity: load a model that is not damaged.")
    return logits.double().log_softmax(-1)


def _nll(logp: Tensor, targets: Tensor) -> Tensor:
    targets = targets.to(logp.device)
    if len(targets) and (targets.min() < 0 or targets.max() >= logp.shape[-1]):
        raise QtutorError(f"Targets must lie in 0..{logp.shape[-1] - 1}: these tokens come from another tokenizer.")
    return -logp.gather(1, targets[:, None])[:, 0]


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each true token (n,) under logits (n, vocab): nats, float64, on the logits' device."""
    return _nll(_log_softmax(logits), targets)


def _in_step(*sides) -> Iterator[list[Tensor]]:
    """Pieces of equal length of all sides (arrays, or iterables of arrays), small enough for float64."""
    readers = [iter((side,) if isinstance(side, (Tensor, np.ndarray)) else side) for side in sides]
    parts = [torch.empty(0)] * len(sides)
    while True:
        parts = [p if len(p) else torch.as_tensor(next(r, p)) for p, r in zip(parts, readers, strict=True)]
        if not all(map(len, parts)):
            break
        most = _ELEMENTS["cuda" if parts[0].is_cuda else "cpu"] // parts[0].shape[-1]
        n = min(max(1, most), *map(len, parts))
        yield [part[:n] for part in parts]
        parts = [part[n:] for part in parts]
    if any(map(len, parts)):
        raise QtutorError("Logits and targets do not pair up: use the same tokens and windows for all of them.")


@dataclass(frozen=True)
class Perplexity:
    """``value = exp(nll)`` and its standard error; ``nll`` in nats per token, the mean of ``token_nll`` (n,)."""

    value: float
    se: float
    nll: float
    scored_tokens: int
    token_nll: np.ndarray = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.se:.4f}"


def score(logits, targets) -> Perplexity:
    """Perplexity of logits (n, vocab), or an iterable of such pieces, against the true tokens (n,).  The error is the
    delta method's, as in llama.cpp: ``se(exp(m)) = exp(m) * se(m)``."""
    nll = np.concatenate([token_nll(*piece).cpu().numpy() for piece in _in_step(logits, np.asarray(targets))])
    mean = float(nll.mean())
    value = torch.tensor(mean, dtype=torch.float64).exp().item()  # infinity, not an error, where a model is far off
    return Perplexity(value, value * standard_error(nll), mean, len(nll), nll)


def perplexity(source, tokens, ctx: int = 512, *, second_half_only: bool = False, **options) -> Perplexity:
    """Perplexity of a model on token ids (n,), in windows of ``ctx``; ``options`` are those of :func:`iter_logits`.

    By default every token but the first of each window is scored.  ``second_half_only=True`` scores as
    llama-perplexity does: lower, since every token then has at least half a window of context.  Never compare one
    with the other.
    """
    chunks = iter_logits(source, tokens, ctx, second_half_only=second_half_only, **options)
    return score(chunks, targets_of(tokens, ctx, second_half_only))


class Comparison(SimpleNamespace):
    """A model against the model that it came from, on the same ``scored_tokens``.  ``*_se`` are standard errors.

    - ``perplexity_ratio``, ``perplexity_diff`` to the base's, with the error of paired values (what both share
      cancels); ``perplexity_correlation`` of the two ln perplexities
    - ``kld_mean`` ... ``kld_max``: KL(base || model) per token, in nats; ``p99`` and ``p999`` are percentiles
    - ``delta_p_mean``: mean change of the true token's probability (negative: worse), ``delta_p_rms``: its root mean
      square, both as shares of one (llama.cpp prints percent)
    - ``same_top``: share of tokens where both put the same token first
    - ``token_kld``, ``token_dnll`` (nll of the model minus nll of the base): the single values, float64 (n,);
      :func:`qtutor.paired.paired_nll` tests the latter
    """

    def __repr__(self) -> str:
        return f"Comparison({self.row()})"

    def row(self) -> dict:
        """The scalars as a flat dict with the names of results.VOCABULARY, for a table or a results file."""
        return {name: value for name, value in vars(self).items() if not name.startswith("token_")}


def _per_token(base: Tensor, logits: Tensor, true: Tensor) -> tuple[Tensor, ...]:
    """nll, base nll, KLD and same-top of each token, float64 (rows,)."""
    if base.shape != logits.shape:
        raise QtutorError(f"A vocabulary of {base.shape[-1]} tokens and one of {logits.shape[-1]} do not pair up: use "
                          "models with one tokenizer.")  # fmt: skip
    logp, base_logp = _log_softmax(logits), _log_softmax(base.to(logits.device))
    kld = ((base_logp - logp) * base_logp.exp()).sum(1)
    if torch.isnan(kld).any():
        # a token that the base model excludes contributes 0 (the limit of p log p), not 0 * infinity
        kld = torch.where(base_logp == -math.inf, 0.0, (base_logp - logp) * base_logp.exp()).sum(1)
    return _nll(logp, true), _nll(base_logp, true), kld, logp.argmax(1) == base_logp.argmax(1)


def compare(base, logits, targets) -> Comparison:
    """Compare a model's logits with its base's, both (n, vocab) or iterables of such pieces (:func:`iter_logits`),
    on the true tokens (n,) (:func:`targets_of`)."""
    parts = [[x.cpu().numpy() for x in _per_token(*piece)] for piece in _in_step(base, logits, np.asarray(targets))]
    nll, base_nll, kld, same_top = (np.concatenate(column) for column in zip(*parts, strict=True))
    means = torch.tensor([nll.mean(), base_nll.mean(), (nll - base_nll).mean()], dtype=torch.float64)
    perplexity, base_perplexity, ratio = means.exp().tolist()
    dp = np.exp(-nll) - np.exp(-base_nll)
    rms = math.sqrt((dp**2).mean())
    top, top_se = share(same_top)
    return Comparison(
        kld_mean=float(kld.mean()), kld_mean_se=standard_error(kld), kld_median=float(np.median(kld)),
        kld_p99=float(np.percentile(kld, 99)), kld_p999=float(np.percentile(kld, 99.9)), kld_max=float(kld.max()),
        perplexity=perplexity, perplexity_se=perplexity * standard_error(nll),
        base_perplexity=base_perplexity, base_perplexity_se=base_perplexity * standard_error(base_nll),
        perplexity_ratio=ratio, perplexity_ratio_se=ratio * standard_error(nll - base_nll),
        perplexity_diff=perplexity - base_perplexity,
        # d(perplexity - base) = perplexity d(nll) - base d(base_nll): the error of paired values again
        perplexity_diff_se=standard_error(perplexity * nll - base_perplexity * base_nll),
        perplexity_correlation=float(np.corrcoef(nll, base_nll)[0, 1]) if nll.std() * base_nll.std() else 1.0,
        delta_p_mean=float(dp.mean()), delta_p_mean_se=standard_error(dp),
        delta_p_rms=rms, delta_p_rms_se=0.5 / rms * standard_error(dp**2) if rms else 0.0,
        same_top=top, same_top_se=top_se, scored_tokens=len(nll), token_kld=kld, token_dnll=nll - base_nll,
    )  # fmt: skip


def compare_models(base, model, tokens, ctx: int = 512, *, second_half_only: bool = False, **options) -> Comparison:
    """:func:`compare` of two models, or of a model with kept logits; ``options`` are those of :func:`iter_logits`."""
    options["second_half_only"] = second_half_only
    if not isinstance(base, (Tensor, np.ndarray)):
        base = iter_logits(base, tokens, ctx, **options | {"progress": False})
    return compare(base, iter_logits(model, tokens, ctx, **options), targets_of(tokens, ctx, second_half_only))
