"""Run Python with the network off: ``python tests/offline.py -m pytest ...``.

On Linux the process enters a network namespace of its own, in which only the loopback interface exists
(Jupyter kernels talk over it); that covers native code and every child process.  Where the system refuses
(containers, macOS), ``tests/offline_guard/sitecustomize.py`` is put on PYTHONPATH instead: every Python
process below this one then refuses sockets to other machines.  One line says which of the two it was;
QTUTOR_OFFLINE=guard asks for the second, to test it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

# Python 3.11 has neither os.unshare nor these constants (linux/sched.h, net/if.h).
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
GUARD = Path(__file__).resolve().parent / "offline_guard"


def leave_network() -> None:
    """Move this process into an empty network namespace with ``lo`` up; OSError when that is not allowed."""
    if not sys.platform.startswith("linux"):
        raise OSError("network namespaces are a Linux feature")
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) != 0:  # root may do it directly; anybody else needs a user namespace
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14s", b"lo", 0, b"")
        flags = struct.unpack("16sh14s", fcntl.ioctl(sock, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14s", b"lo", flags | IFF_UP, b""))


def try_in_child() -> None:
    """Rehearse in a child process: a system may grant the namespace and then refuse its loopback interface."""
    child = os.fork()
    if child == 0:
        try:
            leave_network()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise OSError(code, os.strerror(abs(code)))


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit(__doc__)
    try:
        if os.environ.get("QTUTOR_OFFLINE") == "guard":
            raise OSError("QTUTOR_OFFLINE=guard")
        try_in_child()
        leave_network()
        print("network off: a namespace with the loopback interface only", flush=True)
    except OSError as error:
        path = [str(GUARD), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        print(f"network off: Python sockets to other machines are refused (no namespace: {error})", flush=True)
    os.execv(sys.executable, [sys.executable, *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
