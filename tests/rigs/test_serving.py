"""The load tool's report as a table, and its summary, on an invented report."""

import json

import pytest

from qtutor import QtutorError
from qtutor.rigs import serving


def request(start, ttft, itl, tokens=5, delay=0.001):
    first = start + ttft / 1000
    return {"info": {"timings": {"request_start": start, "first_token_iteration": first,
                                 "last_token_iteration": first + itl * (tokens - 1) / 1000}},
            "prompt_tokens": 10, "output_tokens": tokens, "time_to_first_token_ms": ttft,
            "inter_token_latency_ms": itl, "request_dispatch_delay": delay}  # fmt: skip


def report(path, errored=()):
    good = [request(101.0, 100, 10), request(100.0, 200, 10), request(102.0, 900, 10), request(103.0, 100, 90)]
    runs = [{"config": {"strategy": {"type_": "poisson", "rate": 2.0}},
             "requests": {"successful": good, "errored": list(errored), "incomplete": None}},
            {"config": {"strategy": {"type_": "concurrent", "streams": 4}},
             "requests": {"successful": good[:2], "errored": [], "incomplete": []}}]  # fmt: skip
    path.write_text(json.dumps({"benchmarks": runs}))
    return path


def test_report_and_summary(tmp_path):
    lost = request(104.0, 0, 0) | {"time_to_first_token_ms": None, "inter_token_latency_ms": None}
    table = serving.read(report(tmp_path / "r.json", [lost]))
    opened = table[table["loop"] == "open"]
    assert list(opened["start"]) == [0, 1, 2, 3, 4] and set(table["load"]) == {2.0, 4}
    row = serving.summary(table, 500, 50).set_index("loop").loc["open"]
    assert row["requests"] == 5 and row["failed"] == 1 and row["within"] == pytest.approx(2 / 5)
    assert row["ttft_p50_ms"] == 150 and row["ttft_p99_ms"] is None
    assert row["goodput_per_s"] == pytest.approx(row["requests_per_s"] / 2)


def test_a_server_that_died_early_has_no_goodput(tmp_path):
    """Who got no answer was sent for, too: the time does not end with the last answer."""
    lost = request(119.0, 0, 0) | {"time_to_first_token_ms": None, "inter_token_latency_ms": None}
    lost["info"]["timings"] |= {"first_token_iteration": None, "last_token_iteration": None}
    table = serving.read(report(tmp_path / "r.json", [lost]))
    row = serving.summary(table, 500, 50).set_index("loop").loc["open"]
    assert row["requests_per_s"] == pytest.approx(4 / 19, rel=0.01)


def test_nobody_was_answered(tmp_path):
    lost = request(1.0, 0, 0) | {"time_to_first_token_ms": None, "inter_token_latency_ms": None}
    lost["info"]["timings"] |= {"first_token_iteration": None, "last_token_iteration": None}
    asked = {"successful": [], "errored": [lost], "incomplete": [lost]}
    run = {"config": {"strategy": {"rate": 2.0}}, "requests": asked}
    (tmp_path / "r.json").write_text(json.dumps({"benchmarks": [run]}))
    (row,) = serving.summary(serving.read(tmp_path / "r.json"), 500, 50).to_dict("records")
    assert row["failed"] == 2 and row["within"] == 0 and row["ttft_p95_ms"] is None


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    for text in ("{", "{}", '{"benchmarks": [{}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(QtutorError, match="no report of guidellm"):
            serving.read(tmp_path / "bad.json")
    with pytest.raises(QtutorError, match="either rates"):
        serving.load("http://127.0.0.1:1", ".", rates=(1,), streams=(1,))
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QtutorError, match="guidellm is not installed"):
        serving.load("http://127.0.0.1:1", ".", rates=(1,))
