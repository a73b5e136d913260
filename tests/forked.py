"""gguf_file's child process, forked from a server that has imported everything: a hundred damaged files take seconds.

``monkeypatch.setattr(gguf_file.subprocess, "run", forked.run)``; each file is still looked at by a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile


def _look(path, said):
    from qtutor import llamacpp

    os.dup2(os.open(said, os.O_WRONLY), 1)
    status = llamacpp._open_as_child(llamacpp.Path(path))
    sys.stdout.flush()
    os._exit(status)


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["qtutor.llamacpp", "llama_cpp.llama_cpp"])


def run(command, timeout, **_):
    """As subprocess.run, for the command that opens a GGUF file."""
    with tempfile.NamedTemporaryFile() as said:
        child = _context.Process(target=_look, args=(command[-1], said.name))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, child.exitcode, said.read())
