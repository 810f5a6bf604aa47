"""Proxies of the environment: used where they should be, and named where they cannot be."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from mlxroute.errors import LargeUnreachable
from mlxroute.large import LargeModel
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.proxy import describe_proxy, find_proxy, proxy_problem
from tests.support.loopback import Loopback, Reply

_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def failure(
    monkeypatch: pytest.MonkeyPatch, url: str = "http://box.example/v1", **proxies: str
) -> str:
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    with LargeModel(url, connect_timeout_s=2) as large, pytest.raises(LargeUnreachable) as caught:
        large.connect()
    return str(caught.value)


def test_a_socks_proxy_without_its_package_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec

    def hide(name: str, *more: Any) -> Any:
        return None if name == "socks" else find_spec(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", hide)
    for scheme in ("socks5", "socks5h", "socks4", "SOCKS5"):
        text = failure(monkeypatch, ALL_PROXY=f"{scheme}://me:word@127.0.0.1:1080")
        assert "needs the package PySocks; run `pip install pysocks`" in text
        assert "127.0.0.1:1080" in text
        assert "word" not in text


@pytest.mark.parametrize(
    ("proxy", "reason"),
    [
        ("http://", "not a URL"),
        ("http://me:word@host:port", "not a URL"),
        ("http://host:0", "not a URL"),
        ("http://host:99999", "not a URL"),
        ("http://[::1", "not a URL"),
        ("foo://me:word@host:1", "unknown kind"),
        ("ftp://host:1", "unknown kind"),
        ("http://me:word@127.0.0.1:9", "proxy http://127.0.0.1:9 for http://box.example/v1 failed"),
        ("127.0.0.1:9", "proxy http://127.0.0.1:9 for"),
        ("me:word@127.0.0.1:9", "not a URL such as http://host:3128"),
        (" ", "not a URL"),
        ("http://127.0.0.1:9\n", "not a URL"),
        ("http://127.0.0.1\\@host:9", "not a URL"),
        ("http://\uff1127.0.0.1:9", "not a URL"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, proxy: str, reason: str, short_retry_pauses: None
) -> None:
    text = failure(monkeypatch, HTTP_PROXY=proxy)
    assert reason in text
    assert "word" not in text
    assert text.isprintable()


def test_a_tunnel_that_the_proxy_refuses_is_said_with_its_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Loopback(lambda request: Reply(status=407)) as server:
        proxy = f"http://me:word@127.0.0.1:{server.port}"
        text = failure(monkeypatch, "https://box.example/v1", HTTPS_PROXY=proxy)
    assert f"the proxy http://127.0.0.1:{server.port} for https://box.example/v1 failed" in text


@pytest.mark.parametrize(
    ("url", "no_proxy", "is_used"),
    [
        ("http://box.example/v1", "", True),
        ("http://box.example/v1", "box.example", False),
        ("http://box.example/v1", ".example", False),
        ("http://box.example:8000/v1", "box.example:8000", False),
        ("http://box.example/v1", "*", False),
        ("http://box.example/v1", "other.example, BOX.example", False),
        ("http://10.1.2.3:8000/v1", "10.0.0.0/8", False),
        ("http://11.1.2.3:8000/v1", "10.0.0.0/8", True),
        ("http://127.0.0.1:8000/v1", "", False),
        ("http://[::1]:8000/v1", "", False),
        ("http://localhost:8000/v1", "", False),
    ],
)
def test_the_forms_of_no_proxy(
    monkeypatch: pytest.MonkeyPatch, url: str, no_proxy: str, is_used: bool
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert (find_proxy(parse_address(url)) is not None) is is_used


def test_a_request_goes_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with Loopback(lambda request: Reply(b"no", status=403)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
        with LargeModel("http://box.example/v1") as large, pytest.raises(Exception, match="403"):
            large.connect()
    assert server.requests[0].path == "http://box.example/v1/models"


def test_a_usable_proxy_has_no_problem() -> None:
    for proxy in ("http://host:3128", "https://me:word@host", "host:3128", "[::1]:3128"):
        assert proxy_problem(proxy) is None
        assert "word" not in describe_proxy(proxy)
