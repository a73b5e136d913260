"""serve: the server answers as the model does, and is gone afterwards, whatever happened."""

import json
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import tiny_llama

from qtutor import QtutorError, gguf_export, llamacpp, serve

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_llama.tokenizer(), bos_token="<|endoftext|>",
                                        eos_token="<|endoftext|>")  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("serve")
    return gguf_export.export(tiny_llama.model(layers=1), folder / "tiny.gguf", tokenizer=tokenizer)


def nobody_listens(port):
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) != 0


def gone(process, port):
    return not psutil.pid_exists(process.pid) and nobody_listens(port)


@pytest.mark.slow
def test_completions_chat_and_stream_are_what_the_model_says(path):
    import httpx

    with llamacpp.Model(path, ctx=64, threads=1, exact=False) as model:
        # random weights also say halves of letters, which the server leaves out
        expected = model.generate("The for statement", 4).replace("\ufffd", "")
        expected_chat = model.generate("user: Hello\nassistant:", 4).replace("\ufffd", "")
    with serve.Server(path, ctx=64, threads=1, alias="tiny") as server:
        process, port = server.process, server.port
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
            assert [m["id"] for m in client.get("/models").json()["data"]] == ["tiny"]
            ask = {"prompt": "The for statement", "max_tokens": 4, "temperature": 0}
            answer = client.post("/completions", json=ask).json()
            assert answer["choices"][0]["text"] == expected and answer["usage"]["completion_tokens"] == 4
            messages = [{"role": "user", "content": "Hello"}]
            answer = client.post("/chat/completions", json={"messages": messages, "max_tokens": 4, "temperature": 0})
            assert answer.json()["choices"][0]["message"]["content"] == expected_chat
            with client.stream("POST", "/completions", json=ask | {"stream": True}) as response:
                lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == expected
    assert gone(process, port)
    server.stop()


@pytest.mark.slow
def test_a_quantized_model_is_served(path, tmp_path):
    import httpx

    q4 = llamacpp.quantize(path, tmp_path / "q4.gguf", "Q4_0")
    with serve.Server(q4, ctx=64, threads=1) as server, httpx.Client(trust_env=False, timeout=60) as client:
        ask = {"prompt": "The for statement is used to iterate over the elements", "max_tokens": 4}
        assert client.post(f"{server.url}/completions", json=ask).json()["usage"]["completion_tokens"] >= 1


@pytest.mark.slow
def test_an_error_in_the_block_stops_the_server(path):
    with pytest.raises(ZeroDivisionError), serve.Server(path, ctx=32, threads=1) as server:
        process, port = server.process, server.port
        1 / 0  # noqa: B018
    assert gone(process, port)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_notebook_leaves_no_server(path):
    """SIGKILL: no finally, no atexit; the server notices that its parent is gone."""
    code = f"from qtutor import serve; import time; s = serve.Server({str(path)!r}, ctx=32, threads=1).start()\n" \
           "print(s.process.pid, s.port, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    pid, port = map(int, parent.stdout.readline().split())
    assert not nobody_listens(port)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    assert nobody_listens(port)


@pytest.mark.slow
def test_what_cannot_be_served_is_one_sentence(path, tmp_path, monkeypatch):
    def refused(match, function):
        with pytest.raises(QtutorError, match=match) as error:
            function()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")

    (tmp_path / "x.gguf").write_bytes(path.read_bytes()[:1000])
    refused("x.gguf", lambda: serve.Server(tmp_path / "x.gguf"))
    refused("no file", lambda: serve.Server(tmp_path / "none.gguf"))
    server = serve.Server(path, timeout=0.01)
    refused("did not start within 0.01 s", server.start)
    assert server.process is None
    broken = serve.Server(path)
    broken._options += ["--no_such_option", "1"]
    refused("did not start", broken.start)
    monkeypatch.setattr(serve, "_CHILD", "import no_such_package")
    refused("No module named 'no_such_package'", serve.Server(path).start)


@pytest.mark.slow
def test_settings_of_the_environment_do_not_reach_the_server(path, monkeypatch):
    import httpx

    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("PORT", "1")
    with serve.Server(path, ctx=32, threads=1) as server, httpx.Client(trust_env=False) as client:
        assert client.get(f"{server.url}/models").status_code == 200
