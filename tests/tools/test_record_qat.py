"""The recorder of QAT: its loop is the notebook's, its losses are the definitions, and every arm is there."""

import ast
import copy
import math

import nbformat
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import qtutor
from qtutor import corpus, evaluate, fake_quant, llamacpp, qat, results
from tools import notebooks, record_qat


def cells_of_the_lesson(**names):
    """The two losses, the training loop and the rates out of the notebook's cells, without running the rest of it."""
    (path,) = notebooks.NOTEBOOKS.glob("*_qat.ipynb")
    wanted, body = {"next_token_loss", "distillation_loss", "train"}, []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "recipe" not in notebooks.tags(cell):
            body += [node for node in ast.parse(cell.source).body
                     if isinstance(node, ast.FunctionDef) and node.name in wanted
                     or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "RATES"]  # fmt: skip
    names |= {"torch": torch, "F": F, "math": math, "tqdm": tqdm, "corpus": corpus, "device": "cpu"}
    exec(compile(ast.Module(body, []), str(path), "exec"), names)
    return names


@pytest.mark.slow
def test_the_loop_is_the_notebooks(base, text):
    lesson = cells_of_the_lesson(base=base, train_ids=text[0], BATCH=2, LENGTH=32)
    for loss, teacher in (("next_token_loss", None), ("distillation_loss", base)):
        mine, theirs = (fake_quant.prepare(copy.deepcopy(base), "int3") for _ in range(2))
        shown = lesson["train"](mine, lesson[loss], 4, 1e-3, seed=1)
        recorded = record_qat.train(theirs, text[0], 4, 1e-3, batch_size=2, context=32, seed=1, teacher=teacher)
        assert shown == pytest.approx(recorded, rel=1e-5)
        for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)  # a step moves a weight by about 1e-3


def test_the_rates_are_the_notebooks():
    rates = cells_of_the_lesson()["RATES"]
    assert {name: rates[name] for name in record_qat.TRAINED} == record_qat.RATES and set(rates) == set(qat.SCHEMES)


def test_loss_of_is_cross_entropy_or_the_divergence_from_the_teacher(base, text):
    batch = torch.from_numpy(text[0][:130].astype(np.int64)).view(2, 65)
    with torch.no_grad():
        assert record_qat.loss_of(base, batch).item() == pytest.approx(base(batch, labels=batch).loss.item(), rel=1e-5)
        assert abs(record_qat.loss_of(base, batch, teacher=base).item()) < 1e-6
        student = fake_quant.prepare(copy.deepcopy(base), "int3")
        p, q = (m(batch[:, :-1]).logits.double().log_softmax(-1) for m in (base, student))
        expected = (p.exp() * (p - q)).sum(-1).mean().item()
        assert record_qat.loss_of(student, batch, teacher=base).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_experiment_has_every_arm_and_training_helps(base, text, monkeypatch):
    ids, tokens = text
    monkeypatch.setattr(record_qat, "ARMS", ("control", "QAT", "QAT, distilled, LSQ"))
    how = dict(schemes=["FP8", "W2"], steps=12, seeds=(0,), batch_size=4, context=64, held_out=2)
    rows = list(record_qat.experiment(base, ids, tokens[:2048], **how))
    assert all(set(results.vocabulary_of(row)) == set(row) for row in rows)
    tried = [row for row in rows if row["kind"] == "rate"]
    rows = {(row["scheme"], row["arm"]): row for row in rows if row["kind"] == "result"}
    trained = ["control", "control, GPTQ", "QAT", "QAT, distilled, LSQ"]
    assert list(rows) == [("FP8", "RTN"), *(("W2", arm) for arm in (*record_qat.METHODS, *trained))]
    for arm in ("control", "QAT", "QAT, distilled, LSQ"):  # the rate is the best of three, on other text
        mine = [row for row in tried if row["arm"] == arm]
        assert len(mine) == 3 and rows["W2", arm]["rate"] == min(mine, key=lambda row: row["kld_calibration"])["rate"]
    kld = {arm: row["kld_mean"] for (scheme, arm), row in rows.items() if scheme == "W2"}
    assert kld["GPTQ"] < kld["RTN"] and kld["QAT"] < kld["control"] and kld["control, GPTQ"] < kld["control"]
    gap = rows["W2", "QAT"]["kld_less_rival"]
    assert gap == pytest.approx(kld["QAT"] - kld["GPTQ"], abs=1e-5) and rows["W2", "GPTQ"]["kld_less_rival"] == 0
    model = fake_quant.prepare(copy.deepcopy(base), **qat.SCHEMES["W2"])
    reference = evaluate.compare_models(base, model, tokens[:2048], 512)
    assert kld["RTN"] == pytest.approx(reference.kld_mean, abs=1e-5)
    row = rows["W2", "QAT"]
    record_qat.train(model, ids[: -2 * record_qat.CONTEXT], 12, row["rate"], batch_size=4, context=64)
    again = record_qat.evaluated(evaluate.logits_of(base, tokens[:2048], 512), model, tokens[:2048])
    assert again == {key: row[key] for key in again}  # the same seed, the same result


@pytest.mark.parametrize("scheme", ["W3", "MXFP4", "W8A8"])
def test_after_training_rounds_onto_the_grid(base, text, scheme):
    H = record_qat.hessians(base, text[0], windows=2)
    name, layer = next((n, m) for n, m in record_qat.ptq.linears(base).items() if n.endswith("down_proj"))
    x = []
    hook = layer.register_forward_pre_hook(lambda layer, args: x.append(args[0].flatten(0, 1).double()))
    base(torch.from_numpy(evaluate.windows(text[0][:1024], 512)))
    hook.remove()
    torch.testing.assert_close(H[name], x[0].T @ x[0], rtol=1e-4, atol=1e-3)
    target = fake_quant.FakeQuantizer(qat.SCHEMES[scheme]["weight"], group_size=qat.SCHEMES[scheme].get("group_size"))
    errors = {}
    for method in record_qat.METHODS:
        model = record_qat.after_training(base, scheme, method, H)
        (rounded,) = [m for n, m in model.named_modules() if n == name]
        w = target(rounded.weight) if method == "RTN" else rounded.weight
        by = H[name].diag().argsort(descending=True) if method.endswith("order") else slice(None)  # its groups
        codes = {len(row.unique()) for row in target.blocks(w.detach()[:, by])}
        assert max(codes) <= 2 ** {"W3": 3, "MXFP4": 4, "W8A8": 8}[scheme]
        d = (w - layer.weight).double()
        errors[method] = ((d @ H[name]) * d).sum().item()
    assert errors["GPTQ"] < 0.9 * errors["RTN"]


def test_a_loss_that_explodes_is_one_sentence(base, text):
    model = fake_quant.prepare(copy.deepcopy(base), "int2")
    with pytest.raises(qtutor.QtutorError, match="smaller rate"):
        record_qat.train(model, text[0], steps=4, rate=float("inf"), batch_size=2, context=32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_recovery_says_what_is_missing():
    with pytest.raises(qtutor.QtutorError, match="GPU"):
        record_qat.record_recovery(full=True)


@pytest.mark.slow
@pytest.mark.skipif(not llamacpp.available()[0], reason="llama.cpp is not here")
def test_gguf_rows_compare_files(base, text):
    rows = list(record_qat.gguf_rows(base, text[1][:1026], {0: qat.Q4_0_FILE}, types=("Q4_0", "Q8_0")))
    assert all(set(results.vocabulary_of(row)) == set(row) for row in rows)
    rows = {(r["model"], r["type"]): r for r in rows}
    assert list(rows) == [("PTQ", "Q4_0"), ("PTQ", "Q8_0"), ("PTQ, head in Q8_0", "Q4_0"), ("QAT", "Q4_0")]
    assert rows["QAT", "Q4_0"]["file_mb"] == pytest.approx(rows["PTQ, head in Q8_0", "Q4_0"]["file_mb"], rel=1e-3)
    assert rows["PTQ", "Q8_0"]["kld_mean"] < rows["PTQ", "Q4_0"]["kld_mean"]
    assert rows["QAT", "Q4_0"]["kld_mean"] < rows["PTQ, head in Q8_0", "Q4_0"]["kld_mean"]
