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

Definitions follow llama.cpp's ``tools/perplexity`` (README.md and perplexity.cpp, functions ``perplexity`` and
``kl_divergence``), including which tokens count: ``second_half_only=True`` scores a window as llama-perplexity does.
Standard errors treat tokens as independent draws, as llama.cpp's do; neighbours in a text are not quite, so they are
somewhat too small (:func:`standard_error` with ``block`` shows by how much).  Whether a loss is real, and whether it is
small enough, are questions for the paired tests of :mod:`qtutor.paired`.

Everything here takes a Hugging Face causal language model, a :class:`qtutor.llamacpp.Model`, or any function from a
window of token ids to logits; sums are float64 and only one window's logits need to be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch

from . import QtutorError
from .paired import (  # noqa: F401 - is the difference real?  Here too, beside what they test
    Paired,
    Verdict,
    equivalent,
    mcnemar,
    non_inferior,
    paired_nll,
    sample_needed,
)

# Logits in float64 at a time.  A CPU is fastest where they fit its cache (2 MiB), a GPU where they fill it (32 MiB).
_ELEMENTS = {"cpu": 1 << 18, "gpu": 1 << 22}


class Estimate(NamedTuple):
    """A value and its standard error, in the same unit."""

    value: float
    se: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.se:.2g}"


def standard_error(values, block: int | None = None) -> float:
    """Standard error of the mean of ``values`` (n,): sample standard deviation / sqrt(n).

    ``block`` averages so many consecutive values first (batch means), which keeps the correlation between
    neighbouring tokens out of the estimate; give one window's worth.  Raises QtutorError for fewer than two values.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if block:
        values = values[: len(values) // block * block].reshape(-1, block).mean(1)
    if len(values) < 2:
        raise QtutorError(f"A standard error needs at least two values, here there are {len(values)}: use more text.")
    return float(values.std(ddof=1) / math.sqrt(len(values)))


# ------------------------------------------------------------------------------------------------------- windows


def windows(tokens, ctx: int, stride: int | None = None) -> np.ndarray:
    """Cut token ids (n,) into windows of ``ctx``: int64 (n_windows, ctx); a last shorter one is dropped.

    ``stride`` (default ``ctx``) is the step from one window to the next; less than ``ctx`` makes them overlap.
    Raises QtutorError where the text is too short, or ``ctx`` or ``stride`` makes no sense.
    """
    tokens = np.asarray(tokens).ravel()
    if tokens.dtype.kind not in "iu":
        raise QtutorError(f"Token ids must be integers, not {tokens.dtype}: pass the tokenizer's ids.")
    stride = ctx if stride is None else stride
    if ctx < 2 or stride < 1:
        raise QtutorError(f"Windows need ctx >= 2 and stride >= 1, not {ctx} and {stride}.")
    if len(tokens) < ctx:
        raise QtutorError(f"{len(tokens)} tokens do not fill a window of {ctx}: use more text or a smaller ctx.")
    view = np.lib.stride_tricks.sliding_window_view(tokens, ctx)[::stride]
    return view.astype(np.int64)


def _first_scored(ctx: int, second_half_only: bool) -> int:
    """The first position of a window whose prediction counts: llama-perplexity gives each half a window of context."""
    return ctx // 2 if second_half_only else 0


def targets_of(tokens, ctx: int = 512, second_half_only: bool = False) -> np.ndarray:
    """The true tokens that :func:`logits_of` predicts, in the same order: int64 (n_scored,)."""
    return windows(tokens, ctx)[:, _first_scored(ctx, second_half_only) + 1 :].reshape(-1)


def bos_of(source) -> int | None:
    """The token that llama-perplexity puts first in every window of this GGUF model (None where it puts none)."""
    meta = getattr(getattr(source, "gguf", None), "metadata", {})
    return meta.get("tokenizer.ggml.bos_token_id") if meta.get("tokenizer.ggml.add_bos_token") else None


def _logits_function(source, first: int = 0) -> Callable[[np.ndarray], torch.Tensor]:
    """One function from a window (ctx,) to its logits from position ``first`` on, whatever the source is."""
    from . import llamacpp

    if isinstance(source, llamacpp.Model):  # which need not compute what nobody asks for
        return lambda window: torch.from_numpy(source.logits(window, first=first))
    if isinstance(source, torch.nn.Module):
        device = next(source.parameters()).device

        def run(window):
            ids = torch.from_numpy(window)[None].to(device)
            with torch.inference_mode():
                return source(input_ids=ids, use_cache=False).logits[0]
    elif hasattr(source, "logits"):
        def run(window):
            return torch.as_tensor(source.logits(window))
    elif callable(source):
        def run(window):
            return torch.as_tensor(source(window))
    else:
        raise QtutorError("Give a Hugging Face model, a llamacpp.Model or a function from token ids to logits.")

    def last_positions(window):
        logits = run(window)
        if logits.ndim != 2 or len(logits) != len(window):
            raise QtutorError(f"The model gave logits of shape {tuple(logits.shape)} for {len(window)} tokens.")
        return logits[first:]

    return last_positions


def iter_logits(
    source, tokens, ctx: int = 512, *, second_half_only: bool = False, bos: int | None = None, progress: bool = False
) -> Iterator[torch.Tensor]:
    """Yield one window's scored logits at a time: (n_scored_in_window, vocab), on the model's device.

    ``second_half_only`` drops predictions made with less than half a window of context, as llama-perplexity does.
    ``bos`` replaces the first token of each window (see :func:`bos_of`); it is context and never scored.
    """
    from tqdm.auto import tqdm

    run, cut = _logits_function(source, _first_scored(ctx, second_half_only)), windows(tokens, ctx)
    if bos is not None:
        cut[:, 0] = bos
    training = getattr(source, "training", False)
    if training:
        source.eval()
    try:
        for window in tqdm(cut, desc="logits", unit="window", leave=False, disable=not progress):
            yield run(window)[:-1]  # the last position predicts a token beyond the window
    finally:
        if training:
            source.train()


def logits_of(source, tokens, ctx: int = 512, *, second_half_only: bool = False, bos: int | None = None,
              progress: bool = False) -> torch.Tensor:
    """All scored logits, to keep as the base of many comparisons: float32 (n_scored, vocab), on the CPU.

    Memory: 4 bytes times vocabulary times tokens (a vocabulary of 4,096: 16 KiB a token).
    """
    chunks = iter_logits(source, tokens, ctx, second_half_only=second_half_only, bos=bos, progress=progress)
    return torch.cat([c.float().cpu() for c in chunks])


# ---------------------------------------------------------------------------------------------------- perplexity


@dataclass(frozen=True)
class Perplexity:
    """``value = exp(nll)`` and its standard error; ``nll`` in nats per token, with its own; ``n`` tokens scored.

    ``accuracy`` is the share of tokens that the model puts first.  ``token_nll`` (n,) holds the single values.
    """

    value: float
    se: float
    nll: float
    nll_se: float
    accuracy: float
    accuracy_se: float
    n: int
    token_nll: np.ndarray = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.se:.4f}"


def _share(hits: np.ndarray) -> Estimate:
    """A share and its binomial standard error in the normal approximation, n - 1 as in llama.cpp."""
    p, n = float(hits.mean()), len(hits)
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)))


def _exponentials(logits: torch.Tensor, what: str) -> tuple[torch.Tensor, ...]:
    """Of logits (rows, vocab): themselves and exp(logits - max) in float64, the sum of those, ln sum exp, and the top.

    One exponential a logit is all that probabilities and their logarithms take:
    p = e / sum, and ln p = logits - lse with lse = max + ln sum.
    """
    logits = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
    highest, top = logits.max(-1)
    if not torch.isfinite(highest).all():  # NaN spreads to the maximum
        raise QtutorError(f"The {what} logits hold NaN or infinity: load a model that is not damaged.")
    wide = logits.double()
    e = (wide - highest.double()[:, None]).exp_()
    total = e.sum(-1)
    return wide, e, total, highest.double() + total.log(), top


def _check_targets(targets: torch.Tensor, vocab: int) -> None:
    if len(targets) and (targets.min() < 0 or targets.max() >= vocab):
        raise QtutorError(f"Targets must lie in 0..{vocab - 1}: these tokens come from another tokenizer.")


def _chunks(logits) -> Iterator[torch.Tensor]:
    """Pieces (rows, vocab) small enough for float64, from an array or from an iterable of arrays."""
    whole = isinstance(logits, (torch.Tensor, np.ndarray))
    for part in (logits,) if whole else logits:
        part = torch.as_tensor(part)
        if part.ndim != 2:
            raise QtutorError(f"Logits have the shape (tokens, vocabulary), not {tuple(part.shape)}.")
        size = _ELEMENTS["gpu" if part.device.type == "cuda" else "cpu"]
        yield from part.split(max(1, size // part.shape[-1]))


def score(logits, targets) -> Perplexity:
    """Perplexity of logits (n, vocab), or an iterable of such pieces, against the true tokens (n,).

    The error is the delta method's, as in llama.cpp: ``se(exp(m)) = exp(m) * se(m)``.
    """
    targets = torch.as_tensor(np.asarray(targets, dtype=np.int64)).ravel()
    nll, hit, at = [], [], 0
    for part in _chunks(logits):
        true = targets[at : at + len(part)].to(part.device)
        if len(true) != len(part):
            raise QtutorError(f"There are more logits than the {len(targets)} targets: they must pair up.")
        _check_targets(true, part.shape[-1])
        x, _, _, lse, top = _exponentials(part, "model's")
        true = true.to(x.device)
        nll.append((lse - x.gather(1, true[:, None])[:, 0]).cpu().numpy())
        hit.append((top == true).cpu().numpy())
        at += len(part)
    if at != len(targets):
        raise QtutorError(f"There are {at} logits for {len(targets)} targets: they must pair up.")
    nll, hit = np.concatenate(nll), np.concatenate(hit)
    mean, se, top = float(nll.mean()), standard_error(nll), _share(hit)
    return Perplexity(math.exp(mean), math.exp(mean) * se, mean, se, top.value, top.se, len(nll), nll)


def perplexity(source, tokens, ctx: int = 512, *, second_half_only: bool = False, bos: int | None = None,
               progress: bool = False) -> Perplexity:
    """Perplexity of a model on token ids (n,), in windows of ``ctx``.

    By default every token but the first of each window is scored.  ``second_half_only=True`` scores as
    llama-perplexity does: lower, since every token then has at least half a window of context.  Never compare one
    with the other.  Raises QtutorError for too few tokens and for logits that are not finite.
    """
    chunks = iter_logits(source, tokens, ctx, second_half_only=second_half_only, bos=bos, progress=progress)
    return score(chunks, targets_of(tokens, ctx, second_half_only))


def bits_per_byte(result: Perplexity, n_tokens: int, n_bytes: int) -> Estimate:
    """Bits the model needs per byte of text: ``nll / ln 2 * tokens / bytes``; comparable between tokenizers.

    ``n_tokens`` and ``n_bytes`` are those of the text that was scored (UTF-8), or of any longer stretch of it.
    """
    if n_bytes < 1 or n_tokens < 1:
        raise QtutorError("bits_per_byte needs at least one token and one byte.")
    scale = n_tokens / n_bytes / math.log(2)
    return Estimate(result.nll * scale, result.nll_se * scale)


# ---------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """A model against the model that it came from, on the same ``n`` tokens.  ``*_se`` are standard errors.

    - ``perplexity``, ``base_perplexity``: the two perplexities; ``perplexity_ratio``: their ratio, ``perplexity_diff``: their difference, with
      the error of paired values (what both share cancels); ``perplexity_correlation`` of the two ln perplexities
    - ``kld_mean`` ... ``kld_max``: KL(base || model) per token, in nats; ``p99`` and ``p999`` are percentiles
    - ``delta_p_mean``: mean change of the true token's probability (negative: worse), ``delta_p_rms``: its root mean square,
      both as shares of one (llama.cpp prints percent)
    - ``same_top``: share of tokens where both put the same token first
    - ``token_kld``, ``token_dp``, ``token_dnll`` (nll of the model minus nll of the base): the single values, float64
      (n,); :func:`paired_nll` tests the last of them
    """

    kld_mean: float
    kld_mean_se: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    perplexity: float
    perplexity_se: float
    base_perplexity: float
    base_perplexity_se: float
    perplexity_ratio: float
    perplexity_ratio_se: float
    perplexity_diff: float
    perplexity_diff_se: float
    perplexity_correlation: float
    delta_p_mean: float
    delta_p_mean_se: float
    delta_p_rms: float
    delta_p_rms_se: float
    same_top: float
    same_top_se: float
    n: int
    token_kld: np.ndarray = field(repr=False, compare=False)
    token_dp: np.ndarray = field(repr=False, compare=False)
    token_dnll: np.ndarray = field(repr=False, compare=False)

    def row(self) -> dict:
        """The scalars as a flat dict, for a table or a results file."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("token_")}


def _pairs(base, logits) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of equal length of both; where one side comes whole it is cut to fit the other's pieces."""
    if isinstance(base, (torch.Tensor, np.ndarray)):
        base, at = torch.as_tensor(base), 0
        for part in _chunks(logits):
            yield base[at : at + len(part)], part
            at += len(part)
        if at != len(base):
            raise QtutorError(f"There are {len(base)} base logits for {at} of the model: they must pair up.")
    elif isinstance(logits, (torch.Tensor, np.ndarray)):
        yield from ((b, a) for a, b in _pairs(logits, base))
    else:
        try:
            for first, second in zip(base, logits, strict=True):
                yield from zip(_chunks(first), _chunks(second), strict=True)
        except ValueError:
            raise QtutorError("The base and the model give different numbers of windows: same tokens?") from None


def _per_token(base: torch.Tensor, logits: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """nll, base nll, KLD and same-top of each token, float64 (rows,)."""
    if base.shape != logits.shape or len(true) != len(logits):
        raise QtutorError(
            f"Base logits {tuple(base.shape)}, logits {tuple(logits.shape)} and {len(true)} targets do not pair up: "
            "use the same tokens and vocabulary."
        )
    _check_targets(true, logits.shape[-1])
    x, _, _, lse, top = _exponentials(logits, "model's")
    b, e, total, base_lse, base_top = _exponentials(base.to(logits.device), "base model's")
    true = true.to(x.device)[:, None]
    nll, base_nll = lse - x.gather(1, true)[:, 0], base_lse - b.gather(1, true)[:, 0]
    # KL(base || model) = sum of p_base (ln p_base - ln p) = sum of p_base (b - x), minus the difference of the lse
    weighted = (b - x).mul_(e).sum(1)
    if torch.isnan(weighted).any():
        # a token that the base model excludes contributes 0 (the limit of p log p), not 0 * infinity
        weighted = torch.where(e > 0, (b - x) * e, 0.0).sum(1)
    return nll, base_nll, weighted / total + lse - base_lse, top == base_top


def compare(base, logits, targets) -> Comparison:
    """Compare a model's logits with its base model's on the same tokens; see :class:`Comparison`.

    ``base`` and ``logits`` are (n, vocab), or iterables of such pieces (:func:`iter_logits`); ``targets`` (n,) are
    the true tokens (:func:`targets_of`).  Raises QtutorError where they do not pair up or are not finite.
    """
    targets = torch.as_tensor(np.asarray(targets, dtype=np.int64)).ravel()
    parts, at = [], 0
    for one, other in _pairs(base, logits):
        found = _per_token(one, other, targets[at : at + len(other)])
        parts.append([x.cpu().numpy() for x in found])
        at += len(other)
    if at != len(targets):
        raise QtutorError(f"There are {at} logits for {len(targets)} targets: they must pair up.")
    return summarize(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def summarize(nll, base_nll, kld, same_top) -> Comparison:
    """The statistics of per-token values, each (n,): negative log-likelihoods, KLD (nats) and whether tops agree."""
    nll, base_nll, kld = (np.asarray(x, dtype=np.float64) for x in (nll, base_nll, kld))
    log_ratio, log_ratio_se = float((nll - base_nll).mean()), standard_error(nll - base_nll)
    perplexity, base_perplexity = math.exp(nll.mean()), math.exp(base_nll.mean())
    ratio = math.exp(log_ratio)
    dp = np.exp(-nll) - np.exp(-base_nll)
    rms = math.sqrt(float((dp**2).mean()))
    top = _share(np.asarray(same_top, dtype=bool))
    # d(perplexity - base) = perplexity d(nll) - base d(base_nll): the error of paired values again
    diff_se = standard_error(perplexity * nll - base_perplexity * base_nll)
    spread = nll.std() * base_nll.std()
    correlation = float(((nll - nll.mean()) * (base_nll - base_nll.mean())).mean() / spread) if spread else 1.0
    return Comparison(
        kld_mean=float(kld.mean()), kld_mean_se=standard_error(kld), kld_median=float(np.median(kld)),
        kld_p99=float(np.percentile(kld, 99)), kld_p999=float(np.percentile(kld, 99.9)), kld_max=float(kld.max()),
        perplexity=perplexity, perplexity_se=perplexity * standard_error(nll), base_perplexity=base_perplexity, base_perplexity_se=base_perplexity * standard_error(base_nll),
        perplexity_ratio=ratio, perplexity_ratio_se=ratio * log_ratio_se, perplexity_diff=perplexity - base_perplexity, perplexity_diff_se=diff_se,
        perplexity_correlation=correlation, delta_p_mean=float(dp.mean()), delta_p_mean_se=standard_error(dp), delta_p_rms=rms,
        delta_p_rms_se=0.5 / rms * standard_error(dp**2) if rms else 0.0, same_top=top.value, same_top_se=top.se, n=len(nll),
        token_kld=kld, token_dp=dp, token_dnll=nll - base_nll,
    )  # fmt: skip


def compare_models(base, model, tokens, ctx: int = 512, *, second_half_only: bool = False, bos: int | None = None,
                   progress: bool = False) -> Comparison:
    """:func:`compare` of two models, window by window, or of a model with kept logits (from :func:`logits_of`)."""
    how = dict(second_half_only=second_half_only, bos=bos)
    kept = isinstance(base, (torch.Tensor, np.ndarray))
    reference: Iterable | torch.Tensor = base if kept else iter_logits(base, tokens, ctx, **how)
    parts = iter_logits(model, tokens, ctx, progress=progress, **how)
    return compare(reference, parts, targets_of(tokens, ctx, second_half_only))
