"""GET requests to several ports of this machine at once, within one limit of time.

They carry no key and no cookie, use no proxy, and follow no redirect: `http.client` does none of
this, and `requests` would have to be told.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from typing import Final

_HOST: Final = "127.0.0.1"
_MAX_BODY_BYTES: Final = 1 << 18


def get_from_ports(ports: Sequence[int], path: str, *, timeout_s: float) -> dict[int, bytes]:
    """Return the bodies of the replies with status 200, by port, after at most `timeout_s`.

    It returns as soon as every port has answered or refused the connection. A body of more than
    256 KiB counts as no reply.
    """
    gets = [_LoopbackGet(port, path, timeout_s) for port in dict.fromkeys(ports)]
    deadline_s = time.monotonic() + timeout_s
    for get in gets:
        get.start()
    for get in gets:
        get.join(max(0.0, deadline_s - time.monotonic()))
    for get in gets:
        get.abort()
    return {get.port: get.body for get in gets if get.body is not None}


class _LoopbackGet(threading.Thread):
    """One request, in a thread of its own; `body` is set if it is answered."""

    def __init__(self, port: int, path: str, timeout_s: float) -> None:
        super().__init__(daemon=True, name="mlxroute-loopback-get")
        self.port = port
        self.body: bytes | None = None
        self._path = path
        self._connection = HTTPConnection(_HOST, port, timeout=timeout_s)

    def run(self) -> None:
        """Send the request and read the reply."""
        with contextlib.suppress(OSError, HTTPException, ValueError):
            self._connection.request("GET", self._path, headers={"Accept": "application/json"})
            response = self._connection.getresponse()
            body = response.read(_MAX_BODY_BYTES + 1)
            if response.status == 200 and len(body) <= _MAX_BODY_BYTES:
                self.body = body
        self._connection.close()

    def abort(self) -> None:
        """End the request if it is still running: a socket's timeout bounds only a single read."""
        sock = self._connection.sock
        if self.is_alive() and sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
