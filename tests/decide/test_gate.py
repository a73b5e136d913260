"""gate: the base passes, a good file passes, a bad one fails where it should."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from qtutor import QtutorError, corpus, course_model, evaluate, gguf_export, llamacpp
from qtutor.decide import accuracy, gate


@pytest.fixture(scope="module")
def tokenizer():
    return course_model.load_tokenizer()


@pytest.fixture(scope="module")
def built(base, tokenizer):
    tokens = corpus.tokens("eval", tokenizer)[:384]
    return gate.Gate.build(base, gate.DEFAULT_PROMPTS[:3], tokens=tokens, items=accuracy.build_items(12), name="base")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    source = gguf_export.export(course_model.model_dir(), folder / "f32.gguf")
    return {name: llamacpp.quantize(source, folder / f"{name}.gguf", name) for name in ("Q8_0", "Q2_K")}


def rounded(model, bits):
    """Each weight matrix on a grid of 2**bits steps over its whole range: as crude as it gets."""
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in damaged.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                step = (p.max() - p.min()) / (2**bits - 1)
                p.copy_((p / step).round() * step)
    return damaged


def failed(report):
    return set(report.failures["check"])


def values_of(report):
    return dict(zip(report.table["check"], report.table["value"], strict=True))


@pytest.mark.slow
def test_the_base_passes_with_nothing_to_spare_lost(built, base):
    report = built.check(base, name="again")
    assert report.passed and report.failures.empty and "PASSES" in str(report)
    report.raise_for_failure()
    values = values_of(report)
    assert values["KLD, mean"] == pytest.approx(0, abs=1e-6) and values["same top token"] == 1
    assert values["finite"] == 0 and values["accuracy"] == 1


@pytest.mark.slow
def test_a_good_file_passes_and_a_bad_one_does_not(built, files, tokenizer):
    with llamacpp.Model(files["Q8_0"]) as model:
        assert built.check(model, name="Q8_0").passed
    with llamacpp.Model(files["Q2_K"]) as model:
        report = built.check(model, name="Q2_K")
    assert {"perplexity", "KLD, mean", "KLD, 99th percentile", "same top token", "log-probability"} <= failed(report)
    assert "finite" not in failed(report)
    with pytest.raises(QtutorError, match="Q2_K FAILS .* Do not ship it"):
        report.raise_for_failure()


@pytest.mark.slow
def test_two_bits_by_rounding_fail(built, base):
    report = built.check(rounded(base, 2), name="int2")
    assert {"perplexity", "KLD, mean", "first token", "log-probability"} <= failed(report)
    assert not report.passed and (report.failures["margin"] < 0).all()
    assert (report.table[report.table["passed"]]["margin"] >= 0).all()


@pytest.mark.slow
def test_nan_is_found_and_named(built, base):
    def sometimes(ids):
        with torch.no_grad():
            logits = base(input_ids=torch.as_tensor(ids)[None]).logits[0]
        logits[3] = math.nan
        return logits

    report = built.check(sometimes)
    assert "finite" in failed(report) and "perplexity" in failed(report)
    assert values_of(report)["finite"] > 0


def test_a_loop_is_found(built):
    def stuck(ids):
        logits = torch.zeros(len(ids), built.n_vocab)
        logits[:, 17] = 5
        return logits

    assert "repetition" in failed(built.check(stuck))
    assert gate.repetition(list("abcdefgh")) == 0 and gate.repetition([1] * 20) == pytest.approx(16 / 17)
    assert gate.repetition([1, 2]) == 0


@pytest.mark.slow
def test_kld_of_the_top_tokens_never_exceeds_the_full_one(built, base):
    noisy = rounded(base, 5)
    tokens = np.array(built.tokens)
    full = evaluate.compare_models(base, noisy, tokens, ctx=built.ctx)
    report = values_of(built.check(noisy))
    assert 0.5 * full.kld_mean < report["KLD, mean"] <= full.kld_mean
    assert report["perplexity"] == pytest.approx(full.perplexity, rel=1e-4)
    assert report["same top token"] == pytest.approx(full.same_top)


@pytest.mark.slow
def test_accuracy_is_mcnemars_one_sided_test(built, base):
    from scipy import stats

    hits = np.array([item.base_hit for item in built.items])
    worst = [item.model_copy(update={"base_hit": True}) for item in built.items]  # a base that knew everything
    report = gate.Gate(**{**vars(built), "items": worst}).check(base)
    row = next(r for r in report.table.itertuples() if r.check == "accuracy")
    lost = int((~hits).sum())
    assert row.value == pytest.approx(stats.binomtest(lost, lost, 0.5, alternative="greater").pvalue)
    assert not row.passed and f"{lost} lost, 0 gained" in row.note


@pytest.mark.slow
def test_the_reference_is_what_the_base_writes(base, tokenizer):
    own = gate.Gate.build(base, ["Return the"], tokens=corpus.tokens("eval", tokenizer)[:128], ctx=64)
    (prompt,) = own.prompts
    ids = tokenizer("Return the")["input_ids"] + prompt.reference
    with torch.no_grad():
        logp = base(torch.tensor([ids])).logits[0].log_softmax(-1)
    n = len(prompt.reference)
    mean = np.mean([logp[len(ids) - n + i - 1, ids[len(ids) - n + i]].item() for i in range(n)])
    assert n == gate.REFERENCE and prompt.logprob == pytest.approx(mean, abs=1e-4)
    assert prompt.reference_text == tokenizer.decode(prompt.reference) and own.check(base).passed


# ----------------------------------------------------------------------------------------------------------- files


def test_save_and_load(built, base, tmp_path):
    path = built.save(tmp_path / "deep" / "gate.json")
    assert gate.Gate.load(path) == built and path.stat().st_size < 2**20
    assert [p.name for p in path.parent.iterdir()] == ["gate.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(QtutorError):
        built.save(tmp_path / "file" / "gate.json")


def test_damaged_files_are_one_sentence(built, tmp_path):
    whole = built.save(tmp_path / "gate.json").read_text("utf-8")
    data = json.loads(whole)

    def changed(**changes):
        return json.dumps({**data, **changes})

    cases = ["", "[]", "{}", whole[: len(whole) // 2], changed(version=99), changed(limits={"logprob": "x"}),
             changed(limits={"unknown": 1}), changed(tokens=[]), changed(prompts=[]), changed(prompts=[{}]),
             changed(n_vocab=3), changed(items=[{"choices": []}]), changed(extra=1),
             changed(top_ids=data["top_ids"][:-1]), changed(nll=math.nan)]  # fmt: skip
    for case in cases:
        (tmp_path / "bad.json").write_text(case, "utf-8")
        with pytest.raises(QtutorError) as error:
            gate.Gate.load(tmp_path / "bad.json")
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
    with pytest.raises(QtutorError):
        gate.Gate.load(tmp_path / "missing.json")


@pytest.mark.slow
def test_bad_input(built, base, tokenizer):
    tokens = corpus.tokens("eval", tokenizer)[:128]

    def broken(ids):
        return torch.full((len(ids), 4096), math.nan)

    for call in (
        lambda: gate.Gate.build(base, [], tokens=tokens),
        lambda: gate.Gate.build(base, [""], tokens=tokens),
        lambda: gate.Gate.build(base, [7], tokens=tokens),
        lambda: gate.Gate.build(base, ["a"], tokens=tokens[:10]),
        lambda: gate.Gate.build(broken, ["a"], tokens=tokens),
        lambda: built.check(lambda ids: torch.zeros(len(ids), 9)),  # another tokenizer's vocabulary
        lambda: built.check("model.gguf"),
        lambda: gate.Gate.build(base, "a prompt", tokens=tokens),
        lambda: gate.Gate.build(base, ["a"], tokens=tokens.astype("int64") - 1000),
        lambda: gate.Gate.build(lambda ids: torch.zeros(len(ids), 9), ["a"], tokens=tokens),
        lambda: gate.Gate.build(base, ["a"], tokens=tokens, items=[1, 2]),
    ):
        with pytest.raises(QtutorError) as error:
            call()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_limits_are_not_negative_numbers():
    for limits in ({"logprob": -1}, {"same_top": "most"}):
        with pytest.raises(ValueError):
            gate.Limits(**limits)


# ---------------------------------------------------------------------------------------------------------- report


@pytest.mark.slow
def test_report_says_what_and_by_how_much(built, base):
    report = built.check(rounded(base, 2), name="<int2>")
    assert {"check", "value", "expected", "passed", "margin"} <= set(report.table)
    text = str(report)
    assert all(sentence in text for sentence in report.sentences()) and len(report.sentences()) == len(report.failures)


def test_row_ranges():
    inside, below = gate.row("x", "", 3, 1, 4), gate.row("x", "", 0, 1, 4)
    assert inside["passed"] and inside["margin"] == 1 and not below["passed"] and below["margin"] == -1
    assert gate.row("x", "", 3, -math.inf, 4)["expected"] == "at most 4"
    assert gate.row("x", "", 3, 3, 3)["expected"] == "3"
    assert gate.row("x", "", 3, 2, math.inf)["expected"] == "at least 2" and inside["expected"] == "1 to 4"
    assert not gate.row("x", "", math.nan, -math.inf, math.inf)["passed"]
