"""Certificates are always verified, by the public authorities or by those of `ca_bundle`."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlxroute.cli import main
from mlxroute.errors import LargeUnreachable, UsageError
from mlxroute.large import LargeModel
from tests.support.certificates import Authority
from tests.support.connected_clients import VOCABULARY, legacy
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import negotiated
from tests.support.vocabularies import context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def answer(request: Request) -> Reply:
    return Reply.of(legacy("a"))


def test_a_private_authority_is_trusted_if_named_and_its_connection_reused(
    authority: Authority,
) -> None:
    with (
        Loopback(answer, tls=authority.server()) as server,
        negotiated(LargeModel(server.url, model="m", ca_bundle=str(authority.bundle))) as large,
    ):
        for _ in range(5):
            assert large.next_token(context("x", VOCABULARY)).text == "a"
        assert server.connections == 1


def test_a_named_bundle_overrides_that_of_the_environment(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(Authority(tmp_path).bundle))
    monkeypatch.setenv("no_proxy", "*")
    look_up = socket.getaddrinfo
    # The environment applies to servers elsewhere only, so this machine gets another name.
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: look_up("127.0.0.1", *rest))
    with Loopback(answer, tls=authority.server("server.example")) as server:
        url = server.url.replace("127.0.0.1", "server.example")
        with negotiated(LargeModel(url, model="m", ca_bundle=authority.bundle)) as large:
            assert large.next_token(context("x", VOCABULARY)).text == "a"


@pytest.mark.parametrize("name", ["127.0.0.1", "elsewhere.example"])
def test_a_certificate_that_does_not_verify_is_an_error_and_sends_nothing(
    authority: Authority, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURL_CA_BUNDLE", "")
    trusted = None if name == "127.0.0.1" else authority.bundle
    with (
        Loopback(answer, tls=authority.server(name)) as server,
        LargeModel(server.url, model="m", api_key="sk-secret", ca_bundle=trusted) as large,
        pytest.raises(LargeUnreachable) as caught,
    ):
        large.connect()
    assert "certificate verify failed" in str(caught.value)
    only = f"only the authorities in {trusted} are trusted"
    assert ("ca_bundle can name" if trusted is None else only) in str(caught.value)
    assert caught.value.parameter == "ca_bundle"
    assert server.requests == []
    # The failure is not transient.
    assert server.connections == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no certificate in PEM form"),
        (b"\x30\x82\x01\x00", "holds no certificate in PEM form"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds no certificate"),
    ],
)
def test_an_invalid_bundle_is_one_clear_line_and_exit_code_2(
    tmp_path: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle.pem"
    if content is not None:
        path.write_bytes(content)
    assert main(["ask", "--large", "https://host/v1", "--ca-bundle", str(path), "hi"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {captured.err.strip().removeprefix('error: ')}\n"
    assert f"--ca-bundle {path} {said}" in captured.err
    assert captured.out == ""


def test_a_folder_or_a_pipe_is_not_a_bundle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match=r"ca_bundle .* is not a file"):
            LargeModel("https://host/v1", ca_bundle=path)
