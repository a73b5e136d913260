"""A GGUF model over HTTP: a server of OpenAI's API that a notebook starts, and that ends with it.

llama-cpp-python brings a server that speaks the protocol most programs already speak (``/v1/completions``,
``/v1/chat/completions``, streaming).  In a terminal it is one line, and it runs until you stop it:

    python -m llama_cpp.server --model model-Q4_K_M.gguf --port 8000

:class:`Server` starts the same program from a notebook and makes sure that it ends: with the ``with`` block, with the
kernel, and (but not on Windows) also where the kernel is killed.

    with serve.Server("model-Q4_K_M.gguf") as server:
        httpx.post(f"{server.url}/completions", json={"prompt": "The for statement", "max_tokens": 16})
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import time

from . import QtutorError, llamacpp

# The server also reads its settings from the environment: a stray API_KEY there would lock everybody out.
_STRAY = ("API_KEY", "CONFIG_FILE", "SSL_KEYFILE", "SSL_CERTFILE", "ROOT_PATH", "CHAT_FORMAT", "CLIP_MODEL_PATH",
          "LORA_PATH", "LORA_BASE", "DRAFT_MODEL", "HF_MODEL_REPO_ID", "HF_TOKENIZER_CONFIG_PATH", "MODEL",
          "MODEL_ALIAS", "VERBOSE", "CACHE", "SEED", "HOST", "PORT")  # fmt: skip
# The watch ends the server with the process that started it, even where that was killed and could not say goodbye.
_CHILD = """
import os, runpy, sys, threading, time
parent = int(sys.argv.pop(1))
def watch():
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
if sys.platform != "win32":
    threading.Thread(target=watch, daemon=True).start()
runpy.run_module("llama_cpp.server", run_name="__main__", alter_sys=True)
"""


class Server:
    """llama-cpp-python's server for one GGUF file, on a free port of this machine only.  Use it in a ``with`` block.

    ``url`` is where an OpenAI client points its ``base_url``: ``http://127.0.0.1:<port>/v1``.  ``alias`` is the
    model's name in requests.  Where the server does not answer within ``timeout`` seconds, nothing is left running.
    """

    def __init__(self, path, ctx: int = 512, threads: int | None = None, *, alias: str = "model", timeout: float = 60):
        found = llamacpp.check_gguf(path, to_compute=True)
        self.path, self.alias, self.timeout = found.path.resolve(), alias, timeout
        self._options = ["--model", self.path, "--model_alias", alias, "--n_ctx", ctx, "--host", "127.0.0.1",
                         "--n_threads", threads or llamacpp.n_threads(), "--verbose", "False"]  # fmt: skip
        self.process, self.port, self._log = None, None, None

    url = property(lambda self: f"http://127.0.0.1:{self.port}/v1")

    def start(self) -> Server:
        """Start the server and wait until it answers."""
        if self.process is not None:
            return self
        with socket.socket() as sock:  # a port that nobody listens on at this moment
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - not a pipe: a full one would block the server
        env = {key: value for key, value in os.environ.items() if key.upper() not in _STRAY}
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-W", "ignore", "-c", _CHILD, os.getpid(), *self._options, "--port", self.port]
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=self._log,
                                        stderr=self._log, env=env)  # fmt: skip
        atexit.register(self.stop)
        try:
            if self._answers():
                return self
            self._log.seek(0)
            said = self._log.read()[-4000:].decode("utf-8", "replace").split("\n")
        except BaseException:  # an interrupt, too, must leave nothing running
            self.stop()
            raise
        self.stop()
        last = " ".join(next(filter(str.strip, reversed(said)), "it gave no reason").split())[:160].rstrip(".")
        raise QtutorError(f"The server did not start within {self.timeout:g} s ({last}): run 'python -m "
                          f"llama_cpp.server --model {self.path.name}' in a terminal to see why.")  # fmt: skip

    def _answers(self) -> bool:
        """Wait for the first answer; False where the process ends or the time is up."""
        import httpx

        end = time.monotonic() + self.timeout
        with httpx.Client(trust_env=False, timeout=5) as client:  # a proxy of the environment is not for 127.0.0.1
            while time.monotonic() < end and self.process.poll() is None:
                try:
                    if client.get(f"{self.url}/models").status_code == 200:
                        return True
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
        return False

    def stop(self) -> None:
        """End the server and wait until it is gone; harmless when repeated."""
        process, self.process = self.process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            atexit.unregister(self.stop)
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()
