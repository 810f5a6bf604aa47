"""The address of a large model's server, as a user types it."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

import idna

from mlxroute.errors import UsageError
from mlxroute.safe_text import strip_secrets

_EXAMPLE = "http://127.0.0.1:8081/v1"
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_ZONE = re.compile(r"[A-Za-z0-9._~-]+")
_MAX_HOST_CHARACTERS = 253
_HOST_AND_PORT = re.compile(r"(\[[^\[\]]*:[^\[\]]*\]|[^\[\]:]*)(:[0-9]*)?")
_PORT_REASON = "its port is not a number from 1 to 65535"


@dataclass(frozen=True, slots=True)
class Address:
    """A checked base address.

    `url` has no user, no password and no trailing slash, and its host is spelled so that every URL
    parser reads the same one. `userinfo` is the user and the password.
    """

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
        name = self.host.removesuffix(".")
        if name == "localhost" or name.endswith(".localhost"):
            return True
        address = _ip_address(name)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        # A connection to the unspecified address goes to this machine.
        return address is not None and (address.is_loopback or address.is_unspecified)


def parse_address(text: str) -> Address:
    """Parse and check an address; a missing path becomes `/v1`. Raises UsageError."""
    typed = text.strip()
    if not typed.isprintable() or " " in typed:
        raise _invalid(typed, "it contains a space or a control character")
    if "\\" in typed:
        # Browsers read it as a slash, so that another host follows it.
        raise _invalid(typed, "it contains a backslash; write it as %5C in a password")
    try:
        parts = urlsplit(typed)
        host = parts.hostname
    except ValueError as exc:
        raise _invalid(typed, "it is not a URL") from exc
    if parts.scheme not in ("http", "https"):
        raise _invalid(typed, "it must begin with http:// or https://")
    if not host:
        raise _invalid(typed, "it names no host")
    if not _HOST_AND_PORT.fullmatch(parts.netloc.rpartition("@")[2]):
        hint = "; write / ? # in a password as %2F %3F %23" if "@" in typed else ""
        raise _invalid(typed, f"its host or port is not valid{hint}")
    if parts.query or parts.fragment:
        raise _invalid(typed, "it must end with the path, without ? or #")
    port, host = _port(parts, typed), _checked_host(host, typed)
    url_host = f"[{host.replace('%', '%25')}]" if ":" in host else host
    path = parts.path.rstrip("/") or "/v1"
    return Address(f"{parts.scheme}://{url_host}{port}{path}", host, _userinfo(parts, typed))


def _port(parts: SplitResult, typed: str) -> str:
    """Return the port as it stands in a URL; empty without one."""
    try:
        port = parts.port
    except ValueError as exc:
        raise _invalid(typed, _PORT_REASON) from exc
    if port == 0:
        raise _invalid(typed, _PORT_REASON)
    return "" if port is None else f":{port}"


def _checked_host(host: str, typed: str) -> str:
    """Return the host in ASCII. Raises UsageError for one that URL parsers may read differently."""
    if ":" in host:
        bare, _, zone = host.replace("%25", "%", 1).partition("%")
        if _ip_address(bare) is None or (zone and not _ZONE.fullmatch(zone)):
            raise _invalid(typed, "its host is not an IPv6 address")
        return f"{bare}%{zone}" if zone else bare
    try:
        name = host if host.isascii() else idna.encode(host, uts46=True).decode("ascii")
    except UnicodeError as exc:
        raise _invalid(typed, "its host name is not valid") from exc
    labels = name.removesuffix(".").split(".")
    if len(name) > _MAX_HOST_CHARACTERS or not all(len(label) in range(1, 64) for label in labels):
        raise _invalid(typed, "a part of its host name is empty or too long")
    if not all(map(_LABEL.fullmatch, labels)):
        raise _invalid(typed, "its host name has a character that host names do not have")
    return name


def _userinfo(parts: SplitResult, typed: str) -> tuple[str, str] | None:
    # Bytes that are not UTF-8 are kept as surrogates, and sent as they were typed.
    user = unquote(parts.username or "", errors="surrogateescape")
    password = unquote(parts.password or "", errors="surrogateescape")
    if ":" in user:
        raise _invalid(typed, "its user name contains a colon, which basic authentication lacks")
    return (user, password) if user or password else None


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host literally is, in any form that the system accepts."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(text.partition("%")[0])
    # Short, hexadecimal and octal forms, such as 127.1.
    with contextlib.suppress(OSError, UnicodeError):
        if re.fullmatch(r"[0-9a-fxA-FX.]+", text):
            return ipaddress.IPv4Address(socket.inet_aton(text))
    return None


def _invalid(typed: str, reason: str) -> UsageError:
    printable = "".join(c if c.isprintable() else "?" for c in strip_secrets(typed))
    return UsageError(
        f"invalid address of a large model {printable!r}: {reason} (for example {_EXAMPLE})",
        parameter="base_url",
    )
