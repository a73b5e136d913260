"""evaluate against values worked out by hand, torch's own losses, scipy's statistics and llama-perplexity itself."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from qtutor import QtutorError, course_model, evaluate, llamacpp

VOCAB = 50


@pytest.fixture(scope="module")
def pair():
    """Base logits, a noisy copy, and targets: (400, 50)."""
    rng = np.random.default_rng(0)
    base = 2 * rng.standard_normal((400, VOCAB)).astype(np.float32)
    noisy = base + 0.3 * rng.standard_normal(base.shape).astype(np.float32)
    return base, noisy, rng.integers(0, VOCAB, 400)


def logits_for(probabilities):
    return np.log(np.array(probabilities, dtype=np.float64))


# ---------------------------------------------------------------------------------------------------- by hand


def test_perplexity_by_hand():
    result = evaluate.score(logits_for([[0.5, 0.5], [0.25, 0.75]]), [0, 0])
    nll = [math.log(2), math.log(4)]
    assert result.nll == pytest.approx(1.5 * math.log(2))
    assert result.value == pytest.approx(2**1.5)
    # sample standard deviation of {ln 2, ln 4} is ln 2 / sqrt 2; over sqrt n it is ln 2 / 2
    assert result.se == pytest.approx(2**1.5 * math.log(2) / 2)
    assert result.scored_tokens == 2 and list(result.token_nll) == pytest.approx(nll)


def test_comparison_by_hand():
    base, model = [[0.5, 0.5], [0.2, 0.8]], [[0.25, 0.75], [0.2, 0.8]]
    c = evaluate.compare(logits_for(base), logits_for(model), [0, 1])
    kld = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert c.kld_mean == pytest.approx(kld / 2) and c.kld_max == pytest.approx(kld)
    assert c.kld_mean_se == pytest.approx(kld / 2) and c.kld_median == pytest.approx(kld / 2)
    assert c.delta_p_mean == pytest.approx(-0.125) and c.delta_p_rms == pytest.approx(0.25 / math.sqrt(2))
    assert c.delta_p_rms_se == pytest.approx(0.5 / c.delta_p_rms * 0.0625 / 2)
    assert c.perplexity_ratio == pytest.approx(math.sqrt(2))
    assert c.perplexity_ratio_se == pytest.approx(math.sqrt(2) * math.log(2) / 2)
    assert c.scored_tokens == 2


def test_same_model_is_zero_everywhere(pair):
    base, _, targets = pair
    c = evaluate.compare(base, base, targets)
    assert c.kld_mean == c.kld_mean_se == c.delta_p_rms == c.delta_p_rms_se == 0
    assert c.perplexity_ratio_se == c.same_top_se == 0
    assert c.same_top == c.perplexity_ratio == 1 and c.perplexity_correlation == pytest.approx(1)


def test_a_token_that_the_base_excludes_costs_nothing():
    base = np.array([[0.0, 0.0, -np.inf]] * 2)
    c = evaluate.compare(base, np.zeros((2, 3)), [0, 1])
    assert c.kld_mean == pytest.approx(math.log(1.5))


# ---------------------------------------------------------------------------------------------- other libraries


def test_against_torch_and_scipy(pair):
    base, noisy, targets = pair
    c = evaluate.compare(base, noisy, targets)
    b, q, t = (torch.from_numpy(x) for x in (base, noisy, targets))
    b, q = b.double().log_softmax(1), q.double().log_softmax(1)
    nll, nll_base = (torch.nn.functional.nll_loss(x, t, reduction="none").numpy() for x in (q, b))
    kld = torch.nn.functional.kl_div(q, b, reduction="none", log_target=True).sum(1).numpy()
    dp = np.exp(-nll) - np.exp(-nll_base)
    assert c.kld_mean == pytest.approx(kld.mean()) and c.kld_mean_se == pytest.approx(stats.sem(kld))
    assert c.kld_p99 == pytest.approx(np.quantile(kld, 0.99)) and c.kld_p999 == pytest.approx(np.quantile(kld, 0.999))
    assert c.perplexity == pytest.approx(math.exp(nll.mean()))
    assert c.perplexity_se == pytest.approx(c.perplexity * stats.sem(nll))
    assert c.delta_p_mean == pytest.approx(dp.mean()) and c.delta_p_mean_se == pytest.approx(stats.sem(dp))
    assert c.delta_p_rms_se == pytest.approx(stats.sem(dp**2) / (2 * c.delta_p_rms))
    assert c.perplexity_correlation == pytest.approx(stats.pearsonr(nll, nll_base).statistic)
    same = (b.argmax(1) == q.argmax(1)).numpy()
    assert c.same_top == same.mean() and c.same_top_se == pytest.approx(stats.sem(same))


def test_correlated_error_is_llama_cpps_formula(pair):
    """perplexity.cpp writes the error of the ratio with variances and a covariance: the same number."""
    base, noisy, targets = pair
    c = evaluate.compare(base, noisy, targets)
    nll, nll_base = evaluate.score(noisy, targets).token_nll, evaluate.score(base, targets).token_nll
    cov = np.cov(nll, nll_base) / len(nll)
    expected = math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert c.perplexity_ratio_se == pytest.approx(c.perplexity_ratio * expected)
    shared = 2 * c.perplexity * c.base_perplexity * cov[0, 1]
    expected = math.sqrt(c.perplexity_se**2 + c.base_perplexity_se**2 - shared)
    assert c.perplexity_diff_se == pytest.approx(expected)
    assert c.perplexity_diff == pytest.approx(c.perplexity - c.base_perplexity)


def test_standard_errors_cover():
    """The errors are of the right size: over many samples, the estimates scatter by what they claim."""
    rng, values, errors = np.random.default_rng(1), [], []
    for _ in range(150):
        base = rng.standard_normal((100, 8))
        c = evaluate.compare(base, base + 0.5 * rng.standard_normal(base.shape), rng.integers(0, 8, 100))
        values.append((c.kld_mean, c.delta_p_rms, c.same_top, c.perplexity_ratio, c.perplexity_diff))
        errors.append((c.kld_mean_se, c.delta_p_rms_se, c.same_top_se, c.perplexity_ratio_se, c.perplexity_diff_se))
    assert np.std(values, axis=0) == pytest.approx(np.mean(errors, axis=0), rel=0.2)


def test_block_errors_see_correlation():
    independent = np.random.default_rng(2).standard_normal(4096)
    correlated = np.repeat(independent[:256], 16)
    assert evaluate.standard_error(correlated, block=16) == pytest.approx(stats.sem(independent[:256]))
    assert evaluate.standard_error(correlated) < 0.5 * evaluate.standard_error(correlated, block=16)


# ------------------------------------------------------------------------------------------- windows and sources


def test_ids_of_another_tokenizer_are_one_sentence():
    from qtutor.decide import accuracy

    model, ids = course_model.new_model(num_hidden_layers=1, vocab_size=300), np.arange(600) % 300
    for bad in (ids + 50, np.where(ids == 7, -100, ids)):
        with pytest.raises(QtutorError, match="must lie in 0..299"):
            evaluate.perplexity(model, bad, ctx=128)
    with pytest.raises(QtutorError, match="must lie in 0..299"):
        accuracy.loglikelihoods(model, [([5, 300, 2], 1)])


def test_a_model_that_is_far_off_has_a_perplexity_of_infinity():
    logits = np.random.default_rng(3).standard_normal((300, 50)) * 1e4
    assert evaluate.score(logits, np.zeros(300, int)).value == math.inf
    found = evaluate.compare(np.zeros((300, 50)), logits, np.zeros(300, int))
    assert found.perplexity == math.inf and found.base_perplexity == pytest.approx(50)


def test_windows():
    cut = evaluate.windows(np.arange(11, dtype=np.uint16), 4)
    assert cut.dtype == np.int64 and cut.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluate.targets_of(np.arange(11), 4).tolist() == [1, 2, 3, 5, 6, 7]
    assert evaluate.targets_of(np.arange(11), 4, second_half_only=True).tolist() == [3, 7]


def test_chunks_make_no_difference(pair):
    base, noisy, targets = pair
    whole = evaluate.compare(base, noisy, targets)
    for first, second in (
        (base, iter(np.split(noisy, 8))),
        (iter(np.split(base, 8)), noisy),
        (iter(np.split(base, 4)), iter(np.split(noisy, 4))),
    ):
        assert evaluate.compare(first, second, targets).row() == pytest.approx(whole.row(), rel=1e-12)


@pytest.fixture(scope="module")
def tiny():
    """A Llama of random, not too small weights, and tokens of some text."""
    model = course_model.new_model(seed=3, num_hidden_layers=2).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(3)
    return model


def test_sources_agree_and_bos_is_context_only(tiny):
    tokens = np.random.default_rng(3).integers(1, 4096, 200)
    direct = evaluate.perplexity(tiny, tokens, ctx=64, second_half_only=True)
    function = evaluate.perplexity(
        lambda w: tiny(input_ids=torch.from_numpy(w)[None]).logits[0].detach().numpy(),
        tokens, ctx=64, second_half_only=True,
    )  # fmt: skip
    assert direct.value == pytest.approx(function.value) and direct.scored_tokens == 3 * 31
    loss = []
    for w in evaluate.windows(tokens, 64):
        ids = torch.from_numpy(w)[None]
        ids[0, 0] = 0
        with torch.no_grad():
            logits = tiny(input_ids=ids).logits[0, :-1]
        loss.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    with_bos = evaluate.perplexity(tiny, tokens, ctx=64, bos=0)
    assert with_bos.nll == pytest.approx(np.mean(loss), rel=1e-5) and with_bos.scored_tokens == 3 * 63


def test_compare_models_with_models_and_kept_logits(tiny):
    other = course_model.new_model(seed=4, num_hidden_layers=1).train()
    tokens = np.random.default_rng(4).integers(0, 4096, 128)
    kept = evaluate.logits_of(tiny, tokens, ctx=64)
    assert kept.shape == (126, 4096) and kept.dtype == torch.float32
    a, b = evaluate.compare_models(tiny, other, tokens, 64), evaluate.compare_models(kept, other, tokens, 64)
    assert a.row() == pytest.approx(b.row()) and a.kld_mean > 0
    assert other.training, "evaluation must leave the model as it found it"
    assert all(isinstance(v, (int, float)) for v in a.row().values())


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluate.windows(np.arange(3), 4),
        lambda: evaluate.windows(np.arange(8), 1),
        lambda: evaluate.standard_error([1.0]),
        lambda: evaluate.score(np.zeros((3, 4)), [0, 1]),
        lambda: evaluate.score(np.zeros((2, 4)), [0, 1, 2]),
        lambda: evaluate.score(np.zeros((2, 4)), [0, 4]),
        lambda: evaluate.score(np.full((2, 4), np.nan), [0, 1]),
        lambda: evaluate.score(np.zeros(4), [0]),
        lambda: evaluate.compare(np.zeros((2, 4)), np.zeros((2, 5)), [0, 1]),
        lambda: evaluate.compare(np.zeros((3, 4)), np.zeros((2, 4)), [0, 1]),
        lambda: evaluate.compare(iter([np.zeros((2, 4))] * 2), iter([np.zeros((2, 4))]), [0, 1]),
        lambda: evaluate.perplexity(object(), np.arange(8), 4),
        lambda: evaluate.perplexity(lambda w: np.zeros((1, 4)), np.arange(8), 4),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(QtutorError) as error:
        call()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- llama-perplexity


PPL, SAME_TOP = r"PPL = [\d.]+ \+/- [\d.]+\n", r"\nSame top p: +[\d.]+ ± +[\d.]+"


def _asked(*arguments, until):
    return llamacpp.run_tool("llama-perplexity", *arguments, until=until)[0]


@pytest.fixture(scope="module")
def ggufs(tiny, tmp_path_factory):
    from qtutor import gguf_export

    folder = tmp_path_factory.mktemp("perplexity")
    base = gguf_export.export(tiny, folder / "f32.gguf", tokenizer=course_model.load_tokenizer())
    return folder, base, llamacpp.quantize(base, folder / "q2.gguf", "Q2_K")


@pytest.mark.slow
@pytest.mark.skipif(not llamacpp.available()[0], reason="llama-cpp-python does not load")
def test_same_numbers_as_llama_perplexity(ggufs):
    try:
        llamacpp.tool("llama-perplexity")
    except QtutorError as error:
        pytest.skip(str(error))
    folder, base, quantized = ggufs
    from qtutor import corpus

    text = folder / "text.txt"
    text.write_text(corpus.eval_text()[:8000], encoding="utf-8")
    ctx, logits = 128, folder / "logits.kld"
    common = ("-f", text, "-c", ctx, "-b", ctx, "-t", 2, "-ngl", 0, "-ctk", "f32", "-ctv", "f32", "-fa", "off")
    said = _asked(*common, "-m", base, "--kl-divergence-base", logits, until=PPL)
    perplexity, se = map(float, re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", said).groups())
    said = _asked(*common, "-m", quantized, "--kl-divergence-base", logits, "--kl-divergence", until=SAME_TOP)

    def printed(key):
        found = re.search("^" + re.escape(key) + r"\s*: +(-?[\d.]+(?:e[-+]\d+)?%?(?: +± +[\d.]+)?)", said, re.M)
        assert found, f"no {key!r} in what llama-perplexity printed:\n{said[-4000:]}"
        return [float(x) for x in found[1].replace("%", "").split("±")]

    with llamacpp.Model(base, ctx=ctx) as one, llamacpp.Model(quantized, ctx=ctx) as two:
        tokens, bos = one.tokenize(text.read_text(encoding="utf-8")), evaluate.bos_of(one)
        mine = evaluate.perplexity(one, tokens, ctx, second_half_only=True, bos=bos)
        c = evaluate.compare_models(one, two, tokens, ctx, second_half_only=True, bos=bos)
    assert (mine.value, mine.se) == (pytest.approx(perplexity, rel=1e-3), pytest.approx(se, rel=1e-3))
    for key, value, error, digits in (
        ("Mean PPL(Q)", c.perplexity, c.perplexity_se, 6),
        ("Mean PPL(Q)/PPL(base)", c.perplexity_ratio, c.perplexity_ratio_se, 6),
        ("Mean    KLD", c.kld_mean, c.kld_mean_se, 6),
        ("RMS Δp", 100 * c.delta_p_rms, 100 * c.delta_p_rms_se, 3),
        ("Same top p", 100 * c.same_top, 100 * c.same_top_se, 3),
    ):
        printed_digits = 0.6 * 10**-digits
        assert value == pytest.approx(printed(key)[0], rel=2e-3, abs=printed_digits), key
        assert error == pytest.approx(printed(key)[1], rel=5e-3, abs=printed_digits), key
    assert c.kld_p999 == pytest.approx(printed("99.9%   KLD")[0], rel=2e-3)
    assert c.kld_median == pytest.approx(printed("Median  KLD")[0], rel=2e-3)
    assert 100 * c.perplexity_correlation == pytest.approx(printed("Cor(ln(PPL(Q)), ln(PPL(base)))")[0], abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not llamacpp.available()[0], reason="llama-cpp-python does not load")
def test_same_numbers_as_llama_perplexity_as_people_run_it(tmp_path):
    """The course model in windows of 512, with the F16 cache and fused attention, as the notebook on GGUF measures.

    Perplexity of the F32 file, then KLD of Q4_0 and of Q3_K_M, each to three digits.
    """
    try:
        llamacpp.tool("llama-perplexity")
    except QtutorError as error:
        pytest.skip(str(error))
    from qtutor import corpus, gguf_export

    model, tokenizer = course_model.load(), course_model.load_tokenizer()
    base = gguf_export.export(model, tmp_path / "f32.gguf", tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(corpus.eval_text()[:14_000], encoding="utf-8", newline="")
    common = ("-f", text, "-c", 512, "-b", 512, "-t", 1, "-tb", 1, "-ngl", 0, "-fa", "on")
    keep = ("--kl-divergence-base", tmp_path / "logits.kld")
    said = _asked(*common, "-m", base, *keep, until=PPL)
    perplexity, se = map(float, re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", said).groups())
    how = dict(ctx=512, second_half_only=True)
    with llamacpp.Model(base, ctx=512, threads=1, exact=False) as one:
        tokens, bos = one.tokenize(text.read_text(encoding="utf-8")), evaluate.bos_of(one)
        kept = evaluate.logits_of(one, tokens, bos=bos, **how)
        mine = evaluate.perplexity(one, tokens, bos=bos, **how)
    assert mine.scored_tokens == len(tokens) // 512 * 255 and mine.scored_tokens > 1000
    assert (mine.value, mine.se) == (pytest.approx(perplexity, rel=1e-3), pytest.approx(se, rel=1e-3))
    for name in ("Q4_0", "Q3_K_M"):
        quantized = llamacpp.quantize(base, tmp_path / f"{name}.gguf", name)
        said = _asked(*common, "-m", quantized, *keep, "--kl-divergence", until=SAME_TOP)
        kld, kld_mean_se = map(float, re.search(r"Mean +KLD: +([\d.]+) ± +([\d.]+)", said).groups())
        top = float(re.search(r"Same top p: +([\d.]+)", said)[1])
        with llamacpp.Model(quantized, ctx=512, threads=1, exact=False) as two:
            c = evaluate.compare_models(kept, two, tokens, bos=bos, **how)
        assert (c.kld_mean, c.kld_mean_se) == (pytest.approx(kld, rel=1e-3), pytest.approx(kld_mean_se, rel=5e-3)), name
        assert 100 * c.same_top == pytest.approx(top, abs=0.3)
