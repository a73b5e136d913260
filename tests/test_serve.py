"""serve: the server answers as the model does, and is gone afterwards, whatever happened."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import tiny_llama

from qtutor import QtutorError, gguf_export, llamacpp, serve

try:
    llamacpp.tool("llama-server")
    _missing = ""
except QtutorError as error:
    _missing = str(error)
needs_server = pytest.mark.skipif(bool(_missing), reason=_missing)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    return gguf_export.export(tiny_llama.model(layers=1), folder / "tiny.gguf", tokenizer=tiny_llama.tokenizer())


def nobody_listens(port):
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) != 0


def family(process):
    return [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def soon(condition):
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False


@needs_server
@pytest.mark.slow
def test_answers_stream_and_key(path):

    with llamacpp.Model(path, ctx=64, threads=1, exact=False) as model:
        expected = model.generate("The for statement", 4).replace("\ufffd", "")
    with serve.llama_server(path, 64, 2, 1, alias="tiny", key="secret") as server:
        pids, port = family(server.process), server.port
        ask = {"prompt": "The for statement", "max_tokens": 4, "temperature": 0}
        with server.client() as client:
            assert client.post("/v1/completions", json=ask).status_code == 401
            client.headers["Authorization"] = "Bearer secret"
            assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny"]
            answer = client.post("/v1/completions", json=ask).json()
            assert answer["choices"][0]["text"].replace("\ufffd", "") == expected
            with client.stream("POST", "/v1/completions", json=ask | {"stream": True}) as response:
                lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
            too_long = client.post("/v1/completions", json=ask | {"prompt": "a " * 500})
        assert lines.pop() == "[DONE]" and all(json.loads(line) for line in lines)
        assert too_long.status_code == 400 and "context" in too_long.json()["error"]["message"]
    assert all(map(gone, pids)) and nobody_listens(port)
    server.stop()


@needs_server
@pytest.mark.slow
def test_an_error_in_the_block_stops_the_server(path):
    with pytest.raises(ZeroDivisionError), serve.llama_server(path, 32, 1, 1) as server:
        pids, port = family(server.process), server.port
        1 / 0  # noqa: B018
    assert all(map(gone, pids)) and nobody_listens(port)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.slow
def test_a_killed_notebook_leaves_no_server():
    """SIGKILL: no finally, no atexit; the leader of the group notices that its parent is gone."""
    code = f"from qtutor import serve; import time; s = serve.Server([{sys.executable!r}, '-c', {ANSWERS!r}, " \
           "'{port}']).start(); print(s.process.pid, s.port, flush=True); time.sleep(60)"  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    pid, port = map(int, parent.stdout.readline().split())
    assert not nobody_listens(port)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert soon(lambda: gone(pid) and nobody_listens(port))


ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_any_program_can_be_served_and_killed():
    with serve.Server([sys.executable, "-c", ANSWERS, "{port}"]) as server:
        pids, port = family(server.process), server.port
        server.kill()
        assert soon(lambda: all(map(gone, pids))) and nobody_listens(port)
        assert server.start().client().get("/health").status_code == 200  # once more
    assert server.log() == ""


def refused(match, function):
    with pytest.raises(QtutorError, match=match) as error:
        function()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_what_cannot_be_started_is_one_sentence(monkeypatch):
    server = serve.Server([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    refused("did not start within 0.2 s", server.start)
    assert server.process is None
    refused("no such luck", serve.Server([sys.executable, "-c", "raise SystemExit('error: no such luck')"]).start)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        refused("number below 65,536", serve.Server(["nothing"], port=99999).start)
        refused("is taken", serve.Server(["nothing"], port=sock.getsockname()[1]).start)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    refused("llama-server is not installed", lambda: llamacpp.tool("llama-server"))


@needs_server
@pytest.mark.slow
def test_missing_and_damaged_files(path, tmp_path):
    (tmp_path / "x.gguf").write_bytes(path.read_bytes()[:1000])
    refused("x.gguf", lambda: serve.llama_server(tmp_path / "x.gguf"))
    refused("no file", lambda: serve.llama_server(tmp_path / "none.gguf"))
    refused("instead of starting", serve.llama_server(path, 32, 1, 1, "--no-such-option").start)


@needs_server
@pytest.mark.slow
def test_settings_of_the_environment_do_not_reach_the_server(path, monkeypatch):
    import httpx

    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serve.llama_server(path, 32, 1, 1) as server, httpx.Client(trust_env=False) as client:
        assert client.get(f"{server.url}/v1/models").status_code == 200
