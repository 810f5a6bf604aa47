"""A check that no other program listens on a port."""

from __future__ import annotations

import errno
import os
import socket

_CONNECT_S = 0.5
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def check_port_free(host: str, port: int) -> None:
    """Raise OSError if a program accepts connections on a port of this machine.

    macOS lets a program bind `127.0.0.1` on a port that another one has on all addresses, and then
    hands it the other's connections.

    Args:
        host: Address or host name; an address that stands for all is checked at loopback.
        port: Port; 0 stands for any free one.

    Raises:
        OSError: The port is in use (EADDRINUSE).
    """
    if port == 0:
        return
    try:
        socket.create_connection((_LOOPBACK.get(host, host), port), timeout=_CONNECT_S).close()
    except (OSError, OverflowError):
        return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
