"""The address of a large model's server, as a user types it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from mlxroute.errors import UsageError

_EXAMPLE = "http://127.0.0.1:8081/v1"


@dataclass(frozen=True, slots=True)
class Address:
    """A checked base address; `url` has no user, no password and no trailing slash."""

    url: str
    host: str
    userinfo: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def root(self) -> str:
        """The address without the version (`/v1`) at the end: the base of native routes."""
        return re.sub(r"/v\d+$", "", self.url)

    @property
    def is_loopback(self) -> bool:
        """Whether the server runs on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_address(text: str) -> Address:
    """Parse and check an address; a missing path becomes `/v1`. Raises UsageError."""
    typed = text.strip()
    try:
        parts = urlsplit(typed)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise _invalid(typed, "it is not a URL") from exc
    if parts.scheme not in ("http", "https"):
        raise _invalid(typed, "it must begin with http:// or https://")
    if not host:
        raise _invalid(typed, "it names no host")
    try:
        host.encode("idna")
    except UnicodeError as exc:
        raise _invalid(typed, "a part of its host name is empty or too long") from exc
    if parts.query or parts.fragment:
        raise _invalid(typed, "it must end with the path, without ? or #")
    if not typed.isprintable() or " " in typed:
        raise _invalid(typed, "it contains a space or a control character")
    url_host = f"[{host}]" if ":" in host else host
    url_port = "" if port is None else f":{port}"
    path = parts.path.rstrip("/") or "/v1"
    userinfo = None
    if parts.username is not None:
        userinfo = (unquote(parts.username), unquote(parts.password or ""))
    return Address(f"{parts.scheme}://{url_host}{url_port}{path}", host, userinfo)


def strip_userinfo(text: str) -> str:
    """Remove the user and password before the host from the text of a URL."""
    return re.sub(r"(?<=//)[^/]*@|^[^/]*@", "", text)


def _invalid(typed: str, reason: str) -> UsageError:
    printable = "".join(c if c.isprintable() else "?" for c in strip_userinfo(typed))
    return UsageError(
        f"invalid address of a large model {printable!r}: {reason} (for example {_EXAMPLE})"
    )
