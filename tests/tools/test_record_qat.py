"""The recorder of QAT: its loop is the notebook's, its losses are the definitions, and every arm is there."""

import ast
import copy
import functools
import json
import math
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import qtutor
from qtutor import corpus, course_model, evaluate, fake_quant, files, gguf_export, llamacpp, ptq, qat, results
from qtutor.formats import E4M3, nvfp4_scales
from qtutor.ste import Target
from tools import notebooks, record_llmcompressor, record_qat


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
@pytest.mark.skipif(not llamacpp.available()[0], reason="llama.cpp is not here")
def test_experiment_has_every_arm_and_training_helps(base, text, monkeypatch):
    ids, tokens = text
    monkeypatch.setattr(record_qat, "ARMS", ("control", "QAT", "QAT, distilled, LSQ"))
    monkeypatch.setattr(record_qat, "METHODS", ("RTN", "GPTQ", "AWQ"))
    how = dict(schemes=["FP8", "W2"], steps=12, seeds=(0,), batch_size=4, context=64, held_out=2, calibration=8)
    rows = list(record_qat.experiment(base, ids, tokens[:1024], **how))
    assert all(set(results.vocabulary_of(row)) == set(row) for row in rows)
    tried = [row for row in rows if row["kind"] == "rate"]
    rows = {(row["scheme"], row["arm"]): row for row in rows if row["kind"] == "result"}
    arms = ["AWQ", "K-quant", "K-quant, imatrix", "control", "control, GPTQ", "QAT", "QAT, distilled, LSQ"]
    assert list(rows) == [("FP8", "RTN"), ("FP8", "GPTQ"),  # AWQ is for weights alone
                          *(("W2", arm) for arm in ("RTN", "GPTQ", *arms))]  # fmt: skip
    for arm in ("control", "QAT", "QAT, distilled, LSQ"):  # the rate is the best of those tried, on other text
        mine = {row["rate"]: row["kld_calibration"] for row in tried if row["arm"] == arm}
        best = rows["W2", arm]["rate"]
        assert best == min(mine, key=mine.get) and (len(mine) == 5 or min(mine) < best < max(mine))
    kld = {arm: row["kld_mean"] for (scheme, arm), row in rows.items() if scheme == "W2"}
    assert kld["GPTQ"] < kld["RTN"] and kld["QAT"] < kld["control"] and kld["control, GPTQ"] < kld["control"]
    gap = rows["W2", "QAT"]["kld_less_rival"]
    assert gap == pytest.approx(kld["QAT"] - kld["GPTQ"], abs=1e-5) and rows["W2", "GPTQ"]["kld_less_rival"] == 0
    model = fake_quant.prepare(copy.deepcopy(base), **qat.SCHEMES["W2"])
    reference = evaluate.compare_models(base, model, tokens[:1024], 512)
    assert kld["RTN"] == pytest.approx(reference.kld_mean, abs=1e-5)
    row = rows["W2", "QAT"]
    record_qat.train(model, ids[: -2 * record_qat.CONTEXT], 12, row["rate"], batch_size=4, context=64)
    kept = evaluate.logits_of(base, tokens[:1024], 512)
    again = record_qat.columns(*record_qat.window_klds(kept, model, tokens[:1024]))
    assert again == {key: row[key] for key in again}  # the same seed, the same result


def test_the_search_for_a_rate_goes_on_while_the_best_is_at_an_end():
    def tried(loss):
        found = {}
        while rate := record_qat.next_rate(1.0, found):
            found[rate] = (loss(rate), "model")
        return sorted(round(rate, 3) for rate in found)

    assert tried(lambda rate: abs(rate - 1)) == [0.333, 1, 3]
    assert tried(lambda rate: abs(rate - 0.3)) == [0.111, 0.333, 1, 3]
    assert tried(lambda rate: rate) == [0.037, 0.111, 0.333, 1, 3]
    assert tried(lambda rate: math.inf if rate > 3 else -rate) == [0.333, 1, 3, 9]  # 9 exploded


@pytest.fixture(scope="module")
def lesson(base, text):
    """The functions of the lesson, what its ``watch`` sees of the model, the rotated model and what is seen of that."""
    use, windows = record_llmcompressor.lesson(base), evaluate.windows(text[0][:2048], 512)
    rotated = use["rotate"](base)
    return use, use["watch"](base, windows), rotated, use["watch"](rotated, windows)


@pytest.mark.parametrize("scheme", ["W3", "MXFP4", "W8A8", "NVFP4 weights", "ternary", "Q4_0", "W4A16 g128"])
def test_after_training_rounds_onto_the_grid(base, lesson, scheme):
    use, seen, _, _ = lesson
    name, layer = next((n, m) for n, m in ptq.linears(base).items() if n.endswith("down_proj"))
    how, s, errors = record_qat.AFTER[scheme], seen[name], {}
    target, group = Target.of(how["weight"]), how.get("group_size")
    only = {name: s}  # of one layer
    for method in ("RTN", "searched scale", "GPTQ", "GPTQ, activation order", "GPTQ, no clipping"):
        w = dict(record_qat.after_training(base, scheme, method, only, use).named_modules())[name]
        w = w.weight_fake_quant(w.weight).detach()
        by = s.H.diag().argsort(descending=True) if method.endswith("order") else slice(None)  # its groups
        blocks = w[:, by].reshape(-1, target.block or group or w.shape[1])
        assert max(len(row.unique()) for row in blocks[:2000]) <= (3 if scheme == "ternary" else 2**target.bits)
        if scheme == "NVFP4 weights":  # what is stored are E4M3 scales, and one of the tensor
            _, whole = nvfp4_scales(layer.weight.detach().reshape(-1, 16).abs().amax(1))
            points = blocks.abs().amax(1) / whole / torch.tensor([[6, 4, 3, 2, 1.5, 1, 0.5]]).T  # a scale, if one is
            assert ((points - E4M3.round(points)).abs() / points).amin(0).max() < 1e-5
        d = w - layer.weight.detach()
        errors[method] = ((d @ s.H) * d).sum().item()
    assert errors["GPTQ"] < 0.9 * errors["RTN"] and errors["searched scale"] < 1.001 * errors["RTN"]
    assert errors["GPTQ"] < errors["searched scale"]


def test_the_arms_are_those_of_the_lesson_and_of_the_package(base, lesson):
    """On integers each arm is what the lesson's own functions (of which the recorder replaces the grid) give, and GPTQ
    what ptq.gptq does, to which a test holds the lesson's."""
    use, seen, rotated, seen_rotated = lesson
    fresh = record_llmcompressor.lesson(base)
    fresh |= {"GROUP": 32, "RATIOS": list(ptq.RATIOS)}
    by = {"searched scale": lambda w, s, name: fresh["clipped"](w, 3, 32, s.H.diag()),
          "AWQ": lambda w, s, name: fresh["awq_of"](w, s, 3, name),
          "AWQ, searched scale": lambda w, s, name: fresh["awq_of"](w, s, 3, name, clip=True),
          "GPTQ": lambda w, s, name: ptq.gptq(w, s.H, 3, 32, clip=True),
          "GPTQ, activation order": lambda w, s, name: ptq.gptq(w, s.H, 3, 32, clip=True, order=True),
          "GPTQ, no clipping": lambda w, s, name: ptq.gptq(w, s.H, 3, 32)}  # fmt: skip
    for model, inputs in ((base, seen), (rotated, seen_rotated)):
        few = {name: s for name, s in inputs.items() if ".3." in name}  # one block: o_proj, down_proj, shared inputs
        for method, function in by.items():
            found = ptq.linears(record_qat.after_training(model, "W3", method, few, use))
            for source, s in few.items():
                names = fresh["readers"](found, source)
                floats = [ptq.linears(model)[name].weight.detach() for name in names]
                wanted = function(torch.cat(floats), s, source)
                q = torch.cat([found[name].weight.detach() for name in names])
                assert (q - wanted).abs().gt(1e-5).float().mean() < 0.002, (method, source)  # halves may round apart
    turned = record_qat.after_training(rotated, "W8A16", "RTN")  # the online rotation is still there
    ids = torch.arange(64)[None]
    assert (turned(ids).logits - base(ids).logits).abs().mean() < 0.1


@pytest.mark.slow
@pytest.mark.skipif(not llamacpp.available()[0], reason="llama.cpp is not here")
def test_k_quants_are_llama_cpps_own(base, text, tmp_path):
    ids, _ = text
    matrix = llamacpp.imatrix(base, ids[:2048])
    size = {"Q4_K": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625}
    for kind in record_qat.K_QUANTS.values():
        model, bits = record_qat.k_quant(base, kind, matrix)
        assert bits == size[kind]
    found = record_qat.k_quant(base, "Q4_K")[0]
    error = {name: (layer.weight - ptq.linears(base)[name].weight).norm() / layer.weight.norm()
             for name, layer in ptq.linears(found).items()}  # fmt: skip
    assert 0.01 < min(error.values()) and max(error.values()) < 0.1  # no row in another's place
    assert torch.equal(found.lm_head.weight, base.lm_head.weight)
    f32 = gguf_export.export(base, tmp_path / "f32.gguf", tokenizer=course_model.load_tokenizer())
    file = llamacpp.quantize(f32, tmp_path / "q.gguf", "Q4_K", None, {"blk.*weight": "Q4_K", "token_embd": "F32"})
    with llamacpp.Model(file) as quantized, torch.no_grad():
        apart = evaluate.compare_models(found, quantized, ids[:512], 512).kld_mean
        lost = evaluate.compare_models(base, found, ids[:512], 512).kld_mean
    assert apart < 0.1 * lost  # llama.cpp rounds the activations, too, to 8 bits


def a_row(arm, kld, scheme="W3", seed=-1, steps=0, **more):
    return dict(scheme=scheme, arm=arm, seed=seed, rate=0.0, steps=steps, kld_mean=kld, text="t", windows=4) | more


def test_runs_add_to_one_file_and_lose_no_row(tmp_path):
    add = functools.partial(record_qat.add, "qat_recovery", full=True, directory=tmp_path)
    add([a_row("GPTQ", 0.2, kind="result", kld_less_rival=0.0), a_row("QAT", 0.1, seed=0, steps=700)])
    path = add([a_row("QAT", 0.15, seed=0, steps=700, kld_less_rival=-0.05), a_row("AWQ", 0.3, kld_less_rival=0.1),
                a_row("RTN", 0.5, scheme="FP8", kld_less_rival=0.1)])  # fmt: skip
    rows = results.validate(files.read_json(path)).rows
    assert [(row["scheme"], row["arm"], row["kld_mean"]) for row in rows] == [
        ("W3", "GPTQ", 0.2), ("W3", "AWQ", 0.3), ("W3", "QAT", 0.15), ("FP8", "RTN", 0.5)]  # fmt: skip
    rows = results.validate(files.read_json(add([a_row("GPTQ", 0.21, kld_less_rival=0.0)]))).rows
    assert [row["kld_less_rival"] for row in rows[:3]] == pytest.approx([0, 0.09, -0.06])  # from the GPTQ that is there
    for other in (dict(text="another"), dict(windows=5)):
        with pytest.raises(qtutor.QtutorError, match="move the file away"):
            add([a_row("GPTQ", 0.2, **other)])
    with pytest.raises(qtutor.QtutorError, match="profile full, here it is quick"):
        record_qat.add("qat_recovery", [a_row("GPTQ", 0.2)], False, tmp_path)
    text = path.read_text()
    path.write_text(text.replace(results.machine()["device"], "Another device"))
    with pytest.raises(qtutor.QtutorError, match="Another device"):
        record_qat.earlier("qat_recovery", True, tmp_path)


@pytest.mark.slow
def test_processes_add_at_the_same_time(tmp_path):
    code = ("import sys; from tools import record_qat; from tests.tools.test_record_qat import a_row\n"
            "for seed in range(3): record_qat.add('qat_recovery', [a_row(sys.argv[1], 0.1, seed=seed)], True, "
            "sys.argv[2])")  # fmt: skip
    jobs = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, arm, tmp_path], cwd=files.ROOT)
            for arm in ("QAT", "control")]  # fmt: skip
    assert [job.wait() for job in jobs] == [0, 0]
    (path,) = tmp_path.rglob("qat_recovery.json")
    assert len(results.validate(files.read_json(path)).rows) == 6


def test_one_process_a_gpu_and_nothing_is_saved_without_new_rows(tmp_path, monkeypatch):
    started, saves = [], []

    class Job:
        """Writes a row at the first and at the third question, and ends at the fourth."""

        def __init__(self, command, env):
            self.out, self.first, self.asked, self.returncode = command[5], command[9], 0, 0
            started.append((env["CUDA_VISIBLE_DEVICES"], command[8], command[9:]))

        def poll(self):
            self.asked += 1
            if self.asked in (1, 3):
                rows = [a_row("GPTQ", 0.2, self.first, kind="result", text=fingerprint),
                        a_row("QAT", 0.1, kind="rate", rate=1e-4 * self.asked, steps=7)]  # fmt: skip
                with open(self.out, "a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
            return None if self.asked < 4 else 0

    machine, fingerprint = results.machine(), corpus.fingerprint(corpus.eval_text())
    monkeypatch.setenv("QTUTOR_COMMIT", "asks no process")
    monkeypatch.setattr(results, "machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record_qat.subprocess, "Popen", Job)
    monkeypatch.setattr(record_qat.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(corpus, "tokens", lambda *args: np.arange(9))
    monkeypatch.setattr(record_qat, "keep", lambda path: saves.append(path.stem) or path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    record_qat.record_recovery(True, "ptq", tmp_path)
    assert [gpu for gpu, _, _ in started] == ["2", "5"] and {arms for _, arms, _ in started} == {"ptq"}
    assert sorted(sum((mine for _, _, mine in started), [])) == sorted(record_qat.AFTER)
    assert saves == ["qat_rates", "qat_recovery"] * 4
    (path,) = tmp_path.rglob("qat_rates.json")
    assert len(results.validate(files.read_json(path)).rows) == 2
    monkeypatch.setattr(Job, "poll", lambda job: setattr(job, "returncode", 1) or 1)
    with pytest.raises(qtutor.QtutorError, match="2 of 2 processes"):
        record_qat.record_recovery(True, "training", tmp_path)
    assert started[-1][2] == list(record_qat.TRAINED[1::2])


@pytest.mark.slow
@pytest.mark.skipif(not llamacpp.available()[0], reason="llama.cpp is not here")
def test_a_worker_writes_its_rows_one_a_line(tmp_path, text, monkeypatch):
    monkeypatch.setattr(record_qat, "METHODS", ("RTN", "GPTQ", "rotation, RTN"))
    np.save(tmp_path / "text.npy", text[0])
    record_qat.worker(str(tmp_path / "out"), str(tmp_path / "text.npy"), "0", "ptq", "W8A16")
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(row["scheme"], row["arm"], row["windows"]) for row in rows] == [
        ("W8A16", arm, 4) for arm in record_qat.METHODS]  # fmt: skip
    assert all(row["bits_per_weight"] == pytest.approx(8.05, abs=0.01) and row["kld_mean"] < 0.01 for row in rows)
    assert record_qat.add("qat_recovery", rows, False, tmp_path).is_file()


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
    tokens, types = text[1][:1026], ("Q4_0", "Q4_K_M")
    rows = list(record_qat.gguf_rows(base, tokens, {0: qat.Q4_0_FILE}, types, llamacpp.imatrix(base, tokens)))
    assert all(set(results.vocabulary_of(row)) == set(row) for row in rows)
    rows = {(r["model"], r["type"]): r for r in rows}
    assert list(rows) == [(name, kind) for name in ("PTQ", "PTQ, imatrix") for kind in types] + [
        ("PTQ, head in Q8_0", "Q4_0"), ("QAT", "Q4_0")]  # fmt: skip
    assert rows["QAT", "Q4_0"]["file_mb"] == pytest.approx(rows["PTQ, head in Q8_0", "Q4_0"]["file_mb"], rel=1e-3)
    kld = {key: row["kld_mean"] for key, row in rows.items()}
    assert kld["PTQ", "Q4_K_M"] < kld["PTQ", "Q4_0"] and kld["QAT", "Q4_0"] < kld["PTQ, head in Q8_0", "Q4_0"]
    assert kld["PTQ, imatrix", "Q4_0"] < kld["PTQ", "Q4_0"]
    for key, row in list(rows.items())[-2:]:
        assert row["kld_less_rival"] == pytest.approx(kld[key] - kld["PTQ, imatrix", "Q4_K_M"], abs=2e-6)
        assert row["perplexity_ratio_se_windows"] > 0 and row["kld_less_rival_se"] > 0
