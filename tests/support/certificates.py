"""Certificates of a private authority for servers on loopback."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme


class Authority:
    """A private authority; `bundle` is its certificate as a PEM file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self.bundle = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(str(self.bundle))

    def server(self, name: str = "127.0.0.1") -> ssl.SSLContext:
        """Return the TLS context of a server with a certificate for `name`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(name).configure_cert(context)
        return context
