"""Engines under load: command lines, joules, parts that are joined, and both recorders tried on a tiny shape."""

import contextlib
import importlib.util
import json
import sys
import time
import types

import httpx
import pytest

from qtutor import QtutorError, llamacpp, results
from tools import engines, record_llama70b, record_serving

# Options of vLLM 0.26.0 (vllm/engine/arg_utils.py, vllm/entrypoints/openai/cli_args.py) that are used.
VLLM_OPTIONS = {
    "--served-model-name", "--host", "--port", "--dtype", "--max-model-len", "--max-num-seqs", "--tensor-parallel-size",
    "--gpu-memory-utilization", "--no-enable-prefix-caching", "--cudagraph-capture-sizes", "--kv-cache-dtype",
    "--generation-config", "--disable-uvicorn-access-log", "--load-format", "--compilation-config",
}  # fmt: skip
# Stands in for vLLM in a dry run: takes its command line, and serves the folder's shape with llama-server.
STAND_IN = """
import os, sys
from qtutor import llamacpp
from qtutor.rigs import random_gguf
folder, words = sys.argv[2], sys.argv[3:]
say = dict(zip(words, words[1:]))
path = random_gguf.write(folder + "/stand-in.gguf", folder, "Q8_0")
print("Model loading took 12.5 GiB memory and 1.0 seconds")
print("GPU KV cache size: 1,536 tokens", flush=True)
slots = min(4, int(say["--max-num-seqs"]))
os.execv(llamacpp.tool("llama-server"), ["llama-server", "--model", path, "--alias", "model", "--host", "127.0.0.1",
         "--port", say["--port"], "--parallel", str(slots), "--ctx-size", str(slots * int(say["--max-model-len"])),
         "--no-kv-unified", "--no-cache-prompt", "--cache-ram", "0", "--offline", "--threads", "1"])
"""


def has_server():
    try:
        llamacpp.tool("llama-server")
    except QtutorError:
        return False
    return importlib.util.find_spec("guidellm") is not None


needs_server = pytest.mark.skipif(not has_server(), reason="needs llama-server and guidellm: make install")


def test_vllm_is_started_with_options_that_it_has():
    server = engines.vllm("env PYTHONPATH=/a python3 -m vllm.entrypoints.cli.main", "/m", 40, 4352, cards=2,
                          kv_type="FP8", dummy=True)  # fmt: skip
    words = server.command
    assert words[:7] == ["env", "PYTHONPATH=/a", "python3", "-m", "vllm.entrypoints.cli.main", "serve", "/m"]
    assert {word for word in words if word.startswith("--")} == VLLM_OPTIONS
    given = dict(zip(words, words[1:], strict=False))
    assert given["--host"] == "127.0.0.1" and given["--kv-cache-dtype"] == "fp8" and given["--load-format"] == "dummy"
    assert words[words.index("--cudagraph-capture-sizes") + 7] == "32" and "48" not in words
    one = set(engines.vllm("vllm", "/m", 4, 256).command)
    assert not one & {"--load-format", "--compilation-config"}


def test_joules_between_two_moments():
    meter, start = engines.Meter(0), time.time()
    assert meter.joules(start, start + 5) is None and meter.gib() is None
    meter.points = [(start + i / 10, 30.0 * i) for i in range(101)]  # 300 W for ten seconds
    assert meter.joules(start + 2, start + 6) == pytest.approx(1200)
    assert meter.joules(start + 2, start + 2.5) is None and meter.joules(start + 5, start + 15) is None


def test_parts_take_the_place_of_older_rows(tmp_path):
    def part(name, *rows):
        results.save("serving", list(rows), directory=tmp_path / name)
        return tmp_path / name / results.machine_folder() / "serving.json"

    old = part("all", {"runtime": "vLLM", "type": "FP8", "ms": 1}, {"runtime": "vLLM", "type": "BF16", "ms": 2})
    one = part("a", {"runtime": "vLLM", "type": "FP8", "ms": 3}, {"runtime": "vLLM", "type": "FP8", "ms": 4})
    two = part("b", {"runtime": "llama.cpp", "type": "Q8_0", "ms": 5})
    path = engines.join("serving", [one, two], ("runtime", "type"), tmp_path / "all")
    rows = results.validate(json.loads(path.read_text())).rows
    assert path == old and [row["ms"] for row in rows] == [2, 3, 4, 5]
    made = json.loads(one.read_text())
    assert {row["recorded"] for row in rows} == {f"{made['created'][:10]} {made['commit']}"}
    with pytest.raises(QtutorError, match="Only parts of 'llama70b'"):
        engines.join("llama70b", [one], ("runtime",), tmp_path)


@contextlib.contextmanager
def answers(text):
    """A client that gets ``text`` from every address."""
    everywhere = httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    with httpx.Client(base_url="http://a", transport=everywhere) as c:
        yield c


def test_clocks_of_vllm():
    said = "".join(f'{name}_{end}{{engine="0",model_name="model"}} {value}\n' for name in engines.CLOCKS.values()
                   for end, value in (("sum", 1.5), ("count", 3.0), ("created", 1.7e9)))  # fmt: skip
    found = engines.clocks(types.SimpleNamespace(client=lambda _: answers(said)))
    assert {name: list(pair) for name, pair in found.items()} == dict.fromkeys(engines.CLOCKS, [1500, 3])
    assert engines.clocks(types.SimpleNamespace(client=lambda _: answers('{"error": "not enabled"}'))) == {}


def test_where_the_limits_are_lost():
    def row(rate, ttft, failed=0):
        return {"kind": "rate", "rate_per_s": rate, "ttft_p95_ms": ttft, "itl_p95_ms": 9.0, "requests": 100,
                "failed": failed, "ttft_limit_ms": 200.0, "itl_limit_ms": 50.0, "goodput_per_s": rate}  # fmt: skip

    assert record_serving.kept(row(6, 200)) and not record_serving.kept(row(6, 201))
    assert not record_serving.kept(row(6, 90, failed=6)) and not record_serving.kept(row(6, None))
    grid = (4, 16, 64)
    assert record_serving.next_rate([], grid) == 4 and record_serving.next_rate([row(4, 90)], grid) == 16
    assert record_serving.next_rate([row(4, 90), row(16, 900)], grid) == 8
    assert record_serving.next_rate([row(4, 90), row(16, 900), row(8, 900)], grid) == pytest.approx(4 * 2**0.5)
    assert record_serving.next_rate([row(4, 900)], grid) == 2  # none kept: further down
    assert record_serving.next_rate([row(4, 90), row(4.3, 900)], grid) is None is record_serving.next_rate(
        [row(64, 90)], grid)  # fmt: skip
    found = record_serving.best([row(4, 90), row(16, 900), {"kind": "fixed"}])
    assert (found["goodput_per_s"], found["rate_per_s"], found["rate_lost_per_s"]) == (4, 4, 16)


def test_users_of_llama_server():
    card = types.SimpleNamespace(memory=lambda: (0, 80 * 2**30))
    model = types.SimpleNamespace(file_bytes=57 * 10**9, config="Llama-2-70B")
    one = types.SimpleNamespace(boards=[card])
    assert record_llama70b.llama_users(model, one, "F16", 4352) == 18
    assert record_llama70b.llama_users(model, one, "Q8_0", 4352) == 29
    two, model.file_bytes = types.SimpleNamespace(boards=[card] * 2), 138 * 10**9
    assert record_llama70b.llama_users(model, two, "F16", 4352) == 11


@pytest.fixture
def program(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return f"{sys.executable} -W ignore {tmp_path}/stand_in.py"


def saved(path):
    return results.validate(json.loads(path.read_text())).rows


@needs_server
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_dry_run_of_serving(program, tmp_path):
    tiny = record_serving.TINY | {"fixed": ((32, 8, 2, 6),)}
    path = record_serving.record_gpu("vLLM:W4A16", program, tmp_path, tmp_path / "out", 300, **tiny)
    rows = saved(path)
    kinds = [row["kind"] for row in rows]
    assert kinds[:3] == ["server", "fixed", "rate"] and kinds[-1] == "best"
    assert not [row["not_run"] for row in rows if "not_run" in row]
    server, fixed, rates = rows[0], rows[1], rows[2:-1]
    assert server["weights_gib"] == 12.5 and server["kv_tokens"] == 1536 and server["start_s"] > 0
    assert fixed["streams"] == 2 and fixed["decode_tokens_per_s"] > 0 and fixed["failed"] == 0
    for column in ("decode_tokens_per_s", "ttft_p50_ms"):
        assert fixed[f"{column}_low"] <= fixed[column] <= fixed[f"{column}_high"]
    assert all(row["requests"] >= 4 and row["runtime"] == "vLLM" and row["type"] == "W4A16" for row in rates)
    assert list(tmp_path.glob("qtutor-*")) == []


@needs_server
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_dry_run_of_the_70b(program, tmp_path):
    tiny = record_llama70b.TINY | {"users": (1,)}
    where = (program, tmp_path, tmp_path / "out", 300)
    path = record_llama70b.record_served("vLLM", ["FP8"], *where, kv_types=["FP8"], **tiny)
    start, short, long, most = saved(path)
    assert start["users_fit"] == 3 and start["kv_type"] == "FP8" and start["model"] == "random codes"
    assert (short["prefill_tokens"], long["prefill_tokens"], most["streams"]) == (32, 256, 3) and not most["failed"]
    path = record_llama70b.record_served("llama.cpp", ["Q8_0"], *where, kv_types=["Q8_0"], **tiny)
    rows = saved(path)
    assert [row.get("streams") for row in rows] == [None, 1, None, 1, 3] and rows[2]["users_fit"] == 3
    wrong = record_llama70b.record_served("vLLM", ["BF16"], f"{sys.executable} -c 1", *where[1:],
                                          cards=2, kv_types=["BF16"], **tiny)  # fmt: skip
    (row,) = saved(wrong)
    assert "instead of starting" in row["not_run"] and row["split"] == "tensor"
    assert list(tmp_path.glob("qtutor-*")) == []
