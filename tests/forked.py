"""gguf_file's child process, forked from a server that has imported everything: a hundred damaged files take seconds.

``monkeypatch.setattr(gguf_file.subprocess, "run", forked.run)``; each file is still looked at by a process of its own.
"""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
import tempfile

_SERVER = """
import os, signal, sys
from qtutor import llamacpp
llamacpp.native()
for line in sys.stdin:
    path, said, seconds = line[:-1].split("\\t")
    child = os.fork()
    if child == 0:
        signal.alarm(int(seconds))
        os.dup2(os.open(said, os.O_WRONLY), 1)
        status = llamacpp._open_as_child(llamacpp.Path(path))
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_server: list[subprocess.Popen] = []


def run(command, timeout, **_):
    """As subprocess.run, for the command that opens a GGUF file."""
    if not _server:
        _server.append(subprocess.Popen([sys.executable, "-c", _SERVER], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))  # fmt: skip
        atexit.register(_server[0].communicate)  # closes its input, which ends it
    with tempfile.NamedTemporaryFile() as said:
        _server[0].stdin.write(f"{command[-1]}\t{said.name}\t{timeout}\n")
        _server[0].stdin.flush()
        status = int(_server[0].stdout.readline())
        if status == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status, said.read())
