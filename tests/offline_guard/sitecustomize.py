"""Refuse sockets to other machines in every Python process that starts with this folder on PYTHONPATH."""

import ipaddress
import socket

MESSAGE = "the network is off in this test run"


def _is_local(address) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path, or something for the real call to reject
        return True
    host = address[0]
    if host in ("", "localhost", None):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _guarded(real):
    def call(self, address, *args):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address):
            raise OSError(101, MESSAGE)
        return real(self, address, *args)

    return call


def _getaddrinfo(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    if not _is_local((name, 0)):
        raise socket.gaierror(socket.EAI_AGAIN, MESSAGE)
    return _real_getaddrinfo(host, *args, **kwargs)


_real_getaddrinfo = socket.getaddrinfo
socket.getaddrinfo = _getaddrinfo
# socket.socket is the subclass written in Python, so its methods can be replaced.
socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)
