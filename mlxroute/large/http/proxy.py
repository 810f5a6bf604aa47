"""The proxy that the environment names for a server, and what is wrong with it."""

from __future__ import annotations

import importlib.util
from typing import Final
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies, select_proxy

from mlxroute.large.http.address import Address

_SOCKS: Final = ("socks4", "socks4a", "socks5", "socks5h")


def find_proxy(address: Address) -> str | None:
    """Return the URL of the proxy for a server; None for a direct connection.

    No proxy is used for a server on this machine, nor for one that NO_PROXY names.
    """
    if address.is_loopback:
        return None
    return select_proxy(address.url, get_environ_proxies(address.url, no_proxy=None)) or None


def describe_proxy(proxy: str) -> str:
    """Return a proxy's scheme, host and port for a message, without its user and password."""
    text = proxy if "://" in proxy else f"http://{proxy}"
    scheme, _, rest = text.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('/')[0]}"


def proxy_problem(proxy: str) -> str | None:
    """Return why a proxy cannot be used, with what to do; None if nothing is known against it."""
    name = f"the proxy {describe_proxy(proxy)!r} of the environment"
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        # requests takes the user of a URL without a scheme for the scheme.
        is_complete = (
            bool(parts.hostname)
            and (parts.hostname or "").isascii()
            and parts.port != 0
            and ("://" in proxy or "@" not in proxy)
            and proxy.isprintable()
            and not any(char in proxy for char in " \\")
        )
    except ValueError:
        is_complete = False
    if not is_complete:
        return f"{name} is not a URL such as http://host:3128; correct it"
    if parts.scheme in _SOCKS:
        if importlib.util.find_spec("socks") is None:
            return f"{name} needs the package PySocks; run `pip install pysocks`"
    elif parts.scheme not in ("http", "https"):
        return f"{name} has an unknown kind; http, https, socks4 and socks5 are known"
    return None
