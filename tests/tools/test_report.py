"""README's tables and the page of results say what data/results says, and cannot fall out of step unnoticed."""

from __future__ import annotations

import copy
import json
import re
import shutil
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest

from qtutor import QtutorError, files, results
from tools import notebooks, report, topic

ROOT = files.ROOT
FILES = sorted(results.RESULTS.glob("*/*.json"))


def copy_of_project(folder: Path) -> Path:
    for name in ("README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder)
    for part in ("data/results", "notebooks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return folder


def test_readme_and_the_page_are_in_step():
    assert report.check() == []
    command = [sys.executable, "-m", "tools.report", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "everything is in step", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_page_has_every_file_with_its_provenance(path):
    data = json.loads(path.read_text("utf-8"))
    page = (ROOT / report.PAGE).read_text("utf-8")
    section = page.split(f"### {path.parent.name}/{path.stem}\n")[1].split("\n### ")[0]
    for part in (data["machine"]["device"], data["created"], data["commit"], data["profile"],
                 f"**rows** {len(data['rows'])}", *data["versions"].values(), *data["rows"][0]):
        assert part in section, part
    about = report.RESULTS[path.stem]
    assert f"{about.topic}.ipynb" in section and f"tools/{about.by}.py" in section
    assert f"| [{path.parent.name}/{path.stem}]({path.parent.name}/{path.stem}.json) |" in page


def test_the_links_of_the_page_lead_somewhere():
    page = ROOT / report.PAGE
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_another_measurement_shows_in_both(tmp_path):
    root = copy_of_project(tmp_path)
    assert report.check(root) == [] and report.write(root) == []
    path = root / "data/results/h100/fp8_model.json"
    data = json.loads(path.read_text("utf-8"))
    for row in data["rows"]:
        row["ms_per_step"] *= 2 if row["rung"] == "TE BF16" else 1
    path.write_text(results.dumps(data | {"created": "2031-02-03T04:05:06+00:00"}), "utf-8")
    assert sorted(line.split()[0] for line in report.check(root)) == ["README.md", report.PAGE]
    before = report.headline_table()
    assert {p.name for p in report.write(root)} == {"README.md"}  # both are called that
    assert report.check(root) == [] and report.write(root) == []
    assert "2031-02-03" in (root / report.PAGE).read_text("utf-8")
    assert before not in (root / "README.md").read_text("utf-8")
    assert not list(root.rglob("*.partial"))


def test_a_number_typed_by_hand_is_found(tmp_path):
    root = copy_of_project(tmp_path)
    path = root / "README.md"
    table = report.headline_table()
    number = re.search(r"\d\.\d\d", table)[0]
    path.write_text(path.read_text("utf-8").replace(number, "9.99"), "utf-8")
    assert report.check(root) == ["README.md is out of step: python -m tools.report write"]


def test_nothing_recorded_is_said_and_not_made_up(tmp_path):
    empty = tmp_path / "results"
    empty.mkdir()
    assert report.headlines(empty) == [] and report.headline_table(empty).count("\n") == 1
    assert set(report.missing(empty)) == set(report.RESULTS)
    page = report.page(empty)
    for name, about in report.RESULTS.items():
        assert f"| {name} | " in page and report.NEEDS[about.needs][0] in page


def test_what_nobody_described_is_found(tmp_path):
    root = copy_of_project(tmp_path)
    data = json.loads(FILES[0].read_text("utf-8")) | {"name": "surprise"}
    (root / "data/results/cpu/surprise.json").write_text(results.dumps(data), "utf-8")
    assert "results 'surprise' are not described: add them to RESULTS in tools/report.py" in report.check(root)
    report.write(root)
    assert "not described yet" in (root / report.PAGE).read_text("utf-8")


def test_rows_that_do_not_answer_are_one_sentence(tmp_path):
    root = copy_of_project(tmp_path)
    path = root / "data/results/h100/fp8_model.json"
    data = json.loads(path.read_text("utf-8"))
    for change in (lambda row: row.pop("joules_per_step"), lambda row: row.update(rung="another")):
        bad = copy.deepcopy(data)
        for row in bad["rows"]:
            change(row)
        path.write_text(results.dumps(bad), "utf-8")
        with pytest.raises(QtutorError, match="in step with them"):
            report.check(root)


# ------------------------------------------------------------------------- the answers, computed in another way


def answers() -> dict:
    return {data.name: (answer, data) for _, _, data, answer in report.headlines()}


def test_training_headline_against_pandas():
    answer, data = answers()["fp8_model"]
    frame = data.frame()
    frame = frame[(frame.layers == frame.layers.max()) & (frame.batch == 4)].set_index(["shape", "rung"])
    for shape in ("Llama-2-7B", "Llama-3-8B"):
        ms = frame.ms_per_step[shape]
        fp8 = ms["TE FP8 delayed"]
        energy = 1 - frame.joules_per_step[shape, "TE FP8 delayed"] / frame.joules_per_step[shape, "TE BF16"]
        bf16 = ms[ms.index.str.startswith("TE BF16")].idxmin()  # both times, where it was measured twice
        ends = [frame.ms_p10[shape, bf16] / frame.ms_p90[shape, "TE FP8 delayed"],
                frame.ms_p90[shape, bf16] / frame.ms_p10[shape, "TE FP8 delayed"]]  # fmt: skip
        assert (f"{shape}'s shape: **{ms[bf16] / fp8:.2f} × ({ends[0]:.2f} to {ends[1]:.2f})** the speed of its BF16 "
                f"at −{100 * energy:.0f} %") in answer  # fmt: skip
        compiled = ms["Hugging Face BF16, compiled"] / fp8
        assert re.search(rf"{compiled:.2f} × \([\d. to]+\) that of torch.compile in BF16", answer)
        best = ms[ms.index.str.startswith("torchao")].min() / fp8
        assert re.search(rf"{best:.2f} × \([\d. to]+\) that of torchao's FP8", answer)


def test_loss_headline_against_scipy():
    from scipy import stats

    answer, data = answers()["fp8_loss"]
    frame = data.frame()
    ends = frame[frame.step == frame.step.max()].pivot(index="seed", columns="recipe", values="held_out_nats")
    for recipe in ("FP8 delayed", "FP8 current", "FP8 block"):
        gap = (ends[recipe] - ends["BF16"]).dropna()
        low, high = stats.ttest_1samp(gap, 0).confidence_interval(0.95)
        shown = f"{recipe[4:]} **{gap.mean():+.4f}** ({low:+.4f} to {high:+.4f})"
        assert shown.replace("-", "−") in answer
    assert f"{len(ends)} seeds, paired" in answer and len(ends) >= 8 and "again" not in answer


def test_qat_headlines_against_pandas():
    answer, data = answers()["qat_recovery"]
    rows = data.frame()
    means = rows[rows.steps.isin([0, 700])].groupby(["scheme", "arm"]).kld_mean.mean()
    after = rows[rows.seed < 0].set_index("arm").groupby("scheme").kld_mean
    for scheme in ("W4A16", "W3", "W2"):
        assert f"{means[scheme, 'RTN']:.3f} rounded to nearest, {after.min()[scheme]:.3f} by " in answer
        assert f" by {after.idxmin()[scheme]}, **{means[scheme, 'QAT, distilled']:.3f}** trained" in answer
    answer, data = answers()["qat_gguf"]
    kld = data.frame().groupby(["model", "type"]).kld_mean.mean()
    assert f"KLD {kld['PTQ, head in Q8_0', 'Q4_0']:.3f} rounded, **{kld['QAT', 'Q4_0']:.3f}** trained" in answer


def test_breakeven_headline_begins_where_fp8_begins_to_pay():
    answer, data = answers()["fp8_breakeven"]
    frame = data.frame()
    frame = frame[frame.graph & (frame.tokens == frame.tokens.max())]
    assert f"from width {frame[frame.speedup > 1].hidden.min():,} on" in answer


def save_for(directory: Path, machine: str, name: str, rows: list, device: str) -> None:
    data = {"name": name, "created": "2030-01-01T00:00:00+00:00", "commit": "abc", "profile": "full",
            "machine": {"device": device}, "versions": {"python": "3.12"}, "rows": rows}  # fmt: skip
    (directory / machine).mkdir(parents=True, exist_ok=True)
    (directory / machine / f"{name}.json").write_text(results.dumps(data), "utf-8")


def test_headlines_of_what_a_gpu_records_later(tmp_path):
    """The rows that llama70b.record and tradeoff.record will save: made up here, answered without an edit."""
    run = {"kind": "model", "fits": True, "type": "Q6_K", "gpu_used_gib": 54.5, "decode_tokens_per_s": 30.0,
           "joules_per_decode_token": 20.0}  # fmt: skip
    batch = {"kind": "batch", "type": "Q6_K", "batch": 32, "fits": True, "decode_tokens_per_s": 301.0}
    rows = [run, batch, {"kind": "model", "type": "Q8_0", "fits": False, "not_run": "too large"},
            batch | {"batch": 64, "fits": False}, {"kind": "tool", "type": "Q6_K"},
            *[{"kind": "served", "runtime": "vLLM", "cards": cards, "type": "FP8", "kv_type": "BF16", "streams": users,
               "split": "tensor", "prefill_tokens": 128, "output_tokens_per_s": 37.0 * cards * users,
               "joules_per_decode_token": 0.7 * cards} for cards, users in ((1, 1), (1, 32), (2, 1))]]  # fmt: skip
    save_for(tmp_path, "h100", "llama70b", rows, "NVIDIA H100 80GB HBM3")
    def speed(technique, runtime, value, joules, **more):
        ends = {"decode_tokens_per_s_low": value * 0.99, "decode_tokens_per_s_high": value * 1.01,
                "joules_per_decode_token_low": joules * 0.8, "joules_per_decode_token_high": joules * 1.2}  # fmt: skip
        return {"technique": technique, "runtime": runtime, "shape": "llama2_7b", "batch": 1, "not_run": None,
                "decode_context": 512, "decode_tokens_per_s": value, "joules_per_decode_token": joules} | ends | more

    rows = [speed("GGUF F16", "llama.cpp", 100.0, 3.0), speed("GGUF Q8_0", "llama.cpp", 103.0, 2.9),
            speed("GGUF Q4_K_M", "llama.cpp", 150.0, 2.8), speed("BF16", "pytorch", 500.0, 0.1),
            speed("GGUF Q2_K", "llama.cpp", 900.0, 0.1, shape="course")]  # fmt: skip
    save_for(tmp_path, "h200", "tradeoff", rows, "NVIDIA H200")
    save_for(tmp_path, "h100", "tradeoff", rows[:1], "NVIDIA H100 PCIe")  # never two machines in one answer
    save_for(tmp_path, "cpu", "tradeoff", rows[:1], "a CPU")
    fixed = {"kind": "fixed", "runtime": "vLLM", "shape": "Llama-2-7B", "cards": 1, "kv_type": "BF16", "streams": 1,
             "prefill_tokens": 32, "decode_tokens": 128, "joules_per_decode_token": None}  # fmt: skip
    rows = [row for kind, value in (("BF16", 200.0), ("FP8", 300.0)) for row in (
        fixed | {"kind": "server", "type": kind, "file_bytes": 7_000_000},
        fixed | {"type": kind, "decode_tokens_per_s": value, "decode_tokens_per_s_low": value - 2,
                 "decode_tokens_per_s_high": value + 2})]  # fmt: skip
    save_for(tmp_path, "h200", "serving", rows, "NVIDIA H200")
    served = [answer for question, *_, answer in report.headlines(tmp_path) if "in 16 bits on two" in question]
    assert len(served) == 1 and "to 1 and to 32 users" in served[0] and "vLLM** FP8 37 and 1184 (0.7 J) (" in served[0]
    found = {data.name: (machine, answer) for question, machine, data, answer in report.headlines(tmp_path)
             if "two" not in question}  # fmt: skip
    machine, answer = found["llama70b"]
    assert machine == "h100" and "**Q6_K: 54.5 GiB, 30.0 tokens/s**, 20.0 J a token (301 tokens/s at batch" in answer
    assert "Q8_0 does not fit; **Q6_K" in answer
    machine, answer = found["tradeoff"]
    assert machine == "h200" and "Q8_0 1.03 (1.01 to 1.05); Q4_K_M **1.50** (1.47 to 1.53)" in answer
    assert "Fastest with 1: Q4_K_M; least energy: Q4_K_M or Q8_0 or F16 (" in answer and "BF16" not in answer
    machine, answer = found["serving"]
    assert machine == "h200" and answer.startswith("vLLM, ") and "FP8 **1.50** (1.48 to 1.53) (" in answer
    assert "least energy: not measured" in answer
    assert not {"llama70b", "tradeoff"} & set(report.missing(tmp_path))


def test_every_headline_names_one_machine():
    asked = [question for question, *_ in report.headlines()]
    assert set(asked) == {question for question, *_ in report.HEADLINES} and len(set(asked)) == len(asked) <= 11
    for _, machine, data, answer in report.headlines():
        assert data.device == results.load(data.name, machine).device
        assert "nan" not in answer and "None" not in answer and "|" not in answer
        assert f"| {answer} | {data.device} |" in (ROOT / "README.md").read_text("utf-8")


def test_helpers():
    assert report.percent(0.064) == "+6 %" and report.percent(-0.4) == "−40 %"
    assert report.percent(-0.0001, 2) == "−0.01 %" and report.percent(-0.000001) == "0 %"
    data = results.Results.model_construct(rows=[{"a": 1, "b": 2}, {"a": 1, "b": 4}])
    assert report.one(data, b=4) == {"a": 1, "b": 4} and report.mean(data, "b", a=1) == statistics.fmean([2, 4])
    for call in (lambda: report.one(data, a=1), lambda: report.one(data, a=2), lambda: report.mean(data, "b", a=2)):
        with pytest.raises(LookupError, match="a = 1|a = 2|b = 2"):
            call()


# ---------------------------------------------------------------------------------------------- the map of notebooks


def test_a_notebook_that_the_map_says_nothing_about_is_found(tmp_path):
    import nbformat

    root = copy_of_project(tmp_path)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 99 · Something new")])
    nbformat.write(nb, root / "notebooks/99_new.ipynb")
    assert root / "README.md" in report.write(root)
    found = report.check(root)
    assert len(found) == 1 and "map does not say" in found[0] and "Something new" in found[0]


def test_readme_without_markers_is_one_sentence(tmp_path):
    with pytest.raises(QtutorError, match="markers <!-- results -->"):
        report.with_block("<!-- runs -->\n<!-- /runs -->\n", "results", "")
    with pytest.raises(QtutorError, match="README.md is missing"):
        report.documents(tmp_path)


# ----------------------------------------------------------------------------------------------------- recording


def test_every_recording_is_described():
    """What is described belongs to a notebook that is there, and a recorder of that name records it."""
    topics = set(map(topic, notebooks.names()))
    for name, about in report.RESULTS.items():
        assert about.needs in report.NEEDS and about.topic in topics, name
    for path in sorted((ROOT / "tools").glob("record_*.py")):
        for name in report.importlib.import_module(f"tools.{path.stem}").RECORDS:
            assert report.RESULTS[name].by == path.stem and callable(report.recorder(name))


def test_no_notebook_records():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert "QTUTOR_SAVE_RESULTS" not in path.read_text("utf-8"), path.name


def test_can_record(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not report.can_record("fp8_loss") and not report.can_record("qat_recovery")
    assert report.can_record("tradeoff")
    with pytest.raises(QtutorError, match="choose from fp8_loss"):
        report.record(["nothing"])


@pytest.fixture
def recorders(monkeypatch, tmp_path):
    """RESULTS of three names: two by one function, one that fails; what each call was asked for."""
    calls = []

    def both(full):
        calls.append(full)
        return [results.save(name, [{"seconds": 1.0}], directory=tmp_path / "results") for name in ("one", "two")]

    def fails(full):
        raise ValueError("out of memory")

    module = types.SimpleNamespace(RECORDS={"one": both, "two": both, "bad": fails})
    monkeypatch.setitem(sys.modules, "tools.record_demo", module)
    about = {"bad": "any", "one": "any", "two": "any", "far": "fp8"}
    monkeypatch.setattr(report, "RESULTS", {name: report.About("qat", needs, "record_demo", "Demo.")
                                            for name, needs in about.items()})  # fmt: skip
    monkeypatch.setattr(report, "write", lambda: [])
    monkeypatch.setenv("QTUTOR_PROFILE", "quick")
    return calls


def test_record_goes_on_after_a_failure_and_says_what_is_not_here(recorders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "can_record", lambda name: name != "far")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert report.record(full=False) == 1
    out = capsys.readouterr().out
    assert "bad: failed: ValueError: out of memory" in out and "far: not here, it needs a GPU with FP8 units" in out
    here = results.machine_folder()
    for name in ("one", "two"):
        assert f"results/{here}/{name}.json" in out and (tmp_path / "out" / here / f"{name}.json").is_file()
    assert recorders == [False], "one function for two names is called once"
    assert report.record(["two"]) == 0 and recorders == [False, True]
    assert report.os.environ["QTUTOR_PROFILE"] == "full"


def test_the_command(recorders, monkeypatch, capsys):
    assert report.main(["record", "one"]) == 0 == report.main(["record", "one", "--quick"])
    assert recorders == [True, False]
    with pytest.raises(QtutorError, match="There are no results 'three': choose from bad, one"):
        report.main(["record", "three"])


def test_report_needs_nothing_heavy():
    code = ("import sys; from tools import report; report.documents(); "
            "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
