"""Results: what is saved comes back, what breaks the schema is refused, the committed files follow it."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from recorded_rows import H100, H200, saved

from qtutor import QtutorError, measure, results

ROWS = [{"type": "Q4_0", "bits_per_weight": np.float32(4.5), "n": np.int64(3), "kld_mean": torch.tensor(0.25)},
        {"type": "Q8_0", "bits_per_weight": 8.5, "n": None, "kld_mean": 1 / 3}]  # fmt: skip
FILES = sorted(results.RESULTS.glob("*/*.json"))


def test_round_trip(tmp_path):
    path = results.save("demo", ROWS, profile="quick", directory=tmp_path)
    here = results.machine_folder()
    assert path == tmp_path / here / "demo.json" and [p.name for p in path.parent.iterdir()] == ["demo.json"]
    assert results.exists("demo", here, tmp_path) and not results.exists("other", here, tmp_path)
    found = results.load("demo", here, tmp_path)
    assert found.rows[0] == {"type": "Q4_0", "bits_per_weight": 4.5, "n": 3, "kld_mean": 0.25}
    assert found.rows[1]["kld_mean"] == pytest.approx(1 / 3, rel=1e-5) and found.rows[1]["n"] is None
    assert found.machine == measure.machine() and found.device == found.machine["device"]
    assert found.versions["torch"] == torch.__version__ and found.profile == "quick"
    assert list(found.frame().columns) == list(ROWS[0])
    results.validate(json.loads(path.read_text()))
    again = results.save("demo", found.frame()[["type"]], directory=tmp_path)
    assert again == path and results.load("demo", here, tmp_path).rows == [{"type": "Q4_0"}, {"type": "Q8_0"}]


@pytest.mark.parametrize("gpu, folder", [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"),
                                         ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090")])
def test_folder_is_named_after_the_gpu(gpu, folder):
    assert results.machine_folder({"device": gpu, "compute_capability": "9.0"}) == folder
    assert results.machine_folder({"device": "some CPU"}) == "cpu"


@pytest.mark.parametrize("rows, said", [
    ([], "rows: List should have at least 1 item"), ([{}], "rows 0: .*at least 1 item"), ([3], "rows 0"),
    ([{"ms": math.nan}], "rows 0: ms: numbers must be finite"), ([{"ms": 1}, {"ms": math.inf}], "rows 1: ms: .*finite"),
    ([{"ms": [1]}], "rows are flat"), ([{"ms": {"b": 1}}], "rows are flat"),
    ([{"ms per step": 1}], "'ms per step' is no column"), ([{"ms_of": 1}], "no column"),
])  # fmt: skip
def test_bad_rows_are_refused(rows, said, tmp_path):
    with pytest.raises(QtutorError, match=said):
        results.save("demo", rows, directory=tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_schema(tmp_path):
    data = json.loads(results.save("demo", ROWS, directory=tmp_path).read_text())
    changes = {"name": "No Name", "created": "yesterday", "commit": None, "profile": "huge", "machine": {},
               "versions": {}, "rows": None, "extra": 1}  # fmt: skip
    for key, value in changes.items():
        bad = copy.deepcopy(data)
        bad[key] = value
        with pytest.raises(QtutorError, match="schema"):
            results.validate(bad)
        if key != "extra":
            del bad[key]
            with pytest.raises(QtutorError, match=key):
                results.validate(bad)


def test_missing_and_damaged_files_are_one_sentence(tmp_path):
    path = results.save("demo", ROWS, directory=tmp_path)
    with pytest.raises(QtutorError, match="there: demo"):
        results.load("other", results.machine_folder(), tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(QtutorError, match="damaged"):
        results.load("demo", results.machine_folder(), tmp_path)
    with pytest.raises(QtutorError, match="name"):
        results.load("../demo", "cpu", tmp_path)
    (tmp_path / "a_file").write_text("")
    with pytest.raises(QtutorError, match="cannot be written"):
        results.save("demo", ROWS, directory=tmp_path / "a_file" / "results")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_results_follow_the_schema(path):
    data = results.validate(json.loads(path.read_text("utf-8")))
    assert data.name == path.stem and results.machine_folder(data.machine) == path.parent.name
    assert data.profile == ("full" if path.parent.name != "cpu" else data.profile)


def test_on_gpu_takes_the_first_gpu_that_has_the_results(tmp_path):
    assert results.on_gpu("speed", tmp_path) is None
    for device, value, kind in ((H100, 4.0, "b"), (H200, 5.0, "a")):
        path = saved(tmp_path, "speed", device, [{"decode_tokens_per_s": value, "kind": kind}])
    (tmp_path / "cpu").mkdir()
    text = path.read_text().replace('"compute_capability"', '"cpu"').replace("5.0", "3.0").replace('"a"', '"c"')
    (tmp_path / "cpu" / "speed.json").write_text(text)
    found = [results.on_gpu("speed", tmp_path, kind).rows[0]["decode_tokens_per_s"] for kind in (None, "a", "b")]
    assert found == [5.0, 5.0, 4.0] and results.on_gpu("speed", tmp_path, "c") is None


def test_an_ending_belongs_to_a_column_that_is_there():
    row = {"perplexity": 1, "perplexity_se": 1, "decode_tokens_per_s_low": 1, "ms_p10": 1, "ppl": 1, "nothing_se": 1}
    assert results.vocabulary_of(row) == ["perplexity", "perplexity_se", "decode_tokens_per_s_low", "ms_p10"]
