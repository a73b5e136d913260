"""Servers that a notebook starts, and that end with it: llama.cpp's ``llama-server``, or any other program.

``llama-server`` answers many users at once, in OpenAI's protocol (``/v1/completions``, ``/v1/chat/completions``,
streaming).  It is compiled together with llama-cpp-python.  In a terminal it is one line:

    llama-server --model model-Q4_K_M.gguf --port 8080 --parallel 4

:class:`Server` starts a program on a free port of 127.0.0.1 and makes sure that it ends: with the ``with`` block, with
the kernel, and (but not on Windows) also where the kernel is killed.

    with serve.llama_server("model-Q4_K_M.gguf", slots=4) as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "The for statement", "max_tokens": 16})

vLLM and others start the same way: ``Server(["vllm", "serve", folder, "--host", "127.0.0.1", "--port", "{port}"])``.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from . import QtutorError, llamacpp

# Servers also read settings from the environment: a stray LLAMA_API_KEY there would lock everybody out.
_STRAY = ("LLAMA_ARG_", "LLAMA_API_KEY", "LLAMA_LOG_", "VLLM_API_KEY")
# Leads the server's process group, and ends the group when the process that started it is gone, even where that was
# killed and could not say goodbye.
_WATCH = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)  # the group gets it, and this one waits for the server
parent, server = int(sys.argv[1]), subprocess.Popen(sys.argv[2:])
while os.getppid() == parent:
    try:
        sys.exit(server.wait(0.5) != 0)
    except subprocess.TimeoutExpired:
        pass
os.killpg(0, signal.SIGKILL)
"""
_GROUPS = hasattr(os, "killpg")
_HTTP_THREADS = 128  # a connection holds one: with the default, six for two slots, clients wait before the queue


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """A server program, for the length of a ``with`` block.  ``command``: its words, ``"{port}"`` where the port goes.

    ``url`` is ``http://127.0.0.1:<port>``; OpenAI's clients take ``url + "/v1"``.  The server is ready when ``/health``
    answers.  Where that does not happen within ``timeout`` seconds, nothing is left running.  ``key``: the API key that
    requests need.
    """

    def __init__(self, command, timeout: float = 60, *, port: int | None = None, key: str | None = None):
        self.command, self.timeout, self.port, self.key = [str(word) for word in command], timeout, port, key
        self.process = self._log = None

    url = property(lambda self: f"http://127.0.0.1:{self.port}")

    def start(self) -> Server:
        """Start the program and wait until it answers."""
        if self.process is not None and self.process.poll() is None:
            return self
        self.stop()  # what is left of one that was killed
        if not 0 <= int(self.port or 0) < 2**16:
            raise QtutorError(f"A port is a number below 65,536: {self.port} is not.")
        self.port = self.port or free_port()
        if _listens(self.port):
            raise QtutorError(f"Port {self.port} is taken: leave port out, and a free one is found.")
        env = {key: value for key, value in os.environ.items() if not key.upper().startswith(_STRAY)}
        env |= {"HF_HUB_OFFLINE": "1"} | ({"LLAMA_API_KEY": self.key, "VLLM_API_KEY": self.key} if self.key else {})
        command = [word.replace("{port}", str(self.port)) for word in self.command]
        if _GROUPS:
            command = [sys.executable, "-S", "-c", _WATCH, str(os.getpid()), *command]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - not a pipe: a full one would block the server
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=env,
                                        start_new_session=True)  # fmt: skip
        atexit.register(self.stop)
        try:
            if self._answers():
                return self
            said, ended = self.log().split("\n"), self.process.poll() is not None
        except BaseException:  # an interrupt, too, must leave nothing running
            self.stop()
            raise
        self.stop()
        how = "ended instead of starting" if ended else f"did not start within {self.timeout:g} s"
        errors = [line for line in said if "error" in line.lower()] or [line for line in said if line.strip()]
        last = " ".join((errors or ["it gave no reason"])[-1].split())[:160].rstrip(".:")
        name = os.path.basename(self.command[0])
        raise QtutorError(f"{name} {how} ({last}): run it in a terminal to see why.")

    def client(self, timeout: float = 60):
        """An ``httpx.Client`` of this server: past any proxy, and with a connection for each request, since
        llama-server closes idle ones after some seconds."""
        import httpx

        return httpx.Client(base_url=self.url, timeout=timeout, trust_env=False,
                            limits=httpx.Limits(max_keepalive_connections=0))  # fmt: skip

    def log(self) -> str:
        """What the program has printed so far; nothing where it does not run."""
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def _answers(self) -> bool:
        """Wait for the first answer; False where the process ends or the time is up."""
        import httpx

        end = time.monotonic() + self.timeout
        with self.client(5) as client:
            while time.monotonic() < end and self.process.poll() is None:
                try:
                    if client.get("/health").status_code == 200:
                        return True
                except httpx.HTTPError:
                    pass
                time.sleep(0.05)
        return False

    def _signal(self, process, number: int) -> None:
        try:
            os.killpg(process.pid, number) if _GROUPS else process.terminate()
        except OSError:  # gone already
            pass

    def kill(self) -> None:
        """End the program at once, as a crash would: nobody can answer any more."""
        self._signal(self.process, getattr(signal, "SIGKILL", signal.SIGTERM))
        self.process.wait()
        end = time.monotonic() + 5  # the server is the child of a child: its port closes a moment later
        while _listens(self.port) and time.monotonic() < end:
            time.sleep(0.01)

    def stop(self) -> None:
        """End the program and wait until it is gone; harmless when repeated."""
        process, self.process = self.process, None
        if process is not None:
            self._signal(process, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                pass
            self._signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))  # who did not listen, and the rest
            process.wait()
            atexit.unregister(self.stop)
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()


def llama_server(path, ctx: int = 512, slots: int = 1, threads: int | None = None, *options, alias: str = "model",
                 **how) -> Server:  # fmt: skip
    """llama.cpp's server for one GGUF file: ``slots`` requests at once, ``ctx`` tokens for each of them.

    ``options`` are words of its command line (``--help`` lists them), ``how`` is for :class:`Server`.
    """
    found = llamacpp.check_gguf(path, to_compute=True)
    threads = threads or llamacpp.n_threads()
    return Server([llamacpp.tool("llama-server"), "--model", found.path.resolve(), "--alias", alias, "--host",
                   "127.0.0.1", "--port", "{port}", "--parallel", slots, "--ctx-size", ctx * slots, "--no-kv-unified",
                   "--threads", threads, "--threads-batch", threads, "--threads-http", _HTTP_THREADS, "--offline",
                   *options], **how)  # fmt: skip
