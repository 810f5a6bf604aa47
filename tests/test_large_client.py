"""Finding out how a server wants to be asked, and keeping secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxroute.errors import (
    LargeRefused,
    UsageError,
)
from mlxroute.large import LargeModel
from tests.asking import VOCABULARY, ask_plain, legacy
from tests.loopback import REFUSES_NUMBER, Loopback, Reply, Request, mlx_lm_reply
from tests.vocabularies import context


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def test_connect_names_the_model_and_the_dialect_and_generates_nothing_on_mlx_lm(
    server: Loopback,
) -> None:
    server.script.extend([REFUSES_NUMBER, Reply.of({"data": [{"id": "/home/someone/big-7b"}]})])
    with LargeModel(server.url.removesuffix("/v1")) as large:
        line = large.connect()
        assert line == f"large model big-7b at {server.url} (mlx_lm completions)"
        assert (large.base_url, large.model_name) == (server.url, "big-7b")


def test_the_only_model_of_a_plain_server_is_used(server: Loopback) -> None:
    server.script.append(Reply.of({"error": {"message": "you must name a model"}}, status=400))
    server.script.append(Reply.of({"data": [{"id": "only"}]}))
    server.script.extend([Reply.of(legacy("4")), Reply.of(legacy("a"))])
    with LargeModel(server.url) as large:
        assert "only" in large.connect()
        large.next_token(context("x", VOCABULARY))
    assert server.requests[-1].json["model"] == "only"


def test_several_models_need_a_choice(server: Loopback) -> None:
    models = Reply.of({"data": [{"id": "m1"}, {"id": "m\x1b[31m2"}]})
    server.script.extend([Reply.of(legacy("4")), models, Reply.of(legacy("4")), models])
    with LargeModel(server.url) as large:
        with pytest.raises(UsageError, match=r"--large-model: m1, m \[31m2$"):
            large.connect()
        with pytest.raises(LargeRefused, match="--large-model"):
            large.next_token(context("x", VOCABULARY))


def test_several_models_on_mlx_lm_need_no_choice(server: Loopback) -> None:
    server.script.extend([REFUSES_NUMBER, Reply.of({"data": [{"id": "m1"}, {"id": "m2"}]})])
    server.script.append(mlx_lm_reply([(2, "a"), (2, "a")]))
    with LargeModel(server.url) as large:
        large.connect()
        large.next_token(context("x", VOCABULARY))
    assert "model" not in server.requests[-1].json


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("localhost:8081", "http:// or https://"),
        ("ftp://host/v1", "http:// or https://"),
        ("http://", "no host"),
        ("http://host:port/v1", "not a URL"),
        ("http://host:99999/v1", "not a URL"),
        ("http://[::1/v1", "not a URL"),
        ("http://host/v1?key=1", "without"),
        ("http://ho st/v1", "space"),
        ("http://a..b/v1", "empty or too long part"),
        (f"http://{'a' * 64}.example/v1", "empty or too long part"),
        ("", "http:// or https://"),
    ],
)
def test_a_malformed_address_is_one_clear_line_with_an_example(typed: str, reason: str) -> None:
    with pytest.raises(UsageError, match=r"for example http://127\.0\.0\.1:8081/v1") as caught:
        LargeModel(typed)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("http://host:8081", "http://host:8081/v1"),
        ("http://host:8081/", "http://host:8081/v1"),
        ("https://host/inference/v1/", "https://host/inference/v1"),
        ("HTTP://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_the_address_is_completed(typed: str, url: str) -> None:
    with LargeModel(typed) as large:
        assert large.base_url == url


# Secrets


def test_the_key_is_sent_and_shown_nowhere() -> None:
    def answer(request: Request) -> Reply:
        echoed = request.headers["authorization"]
        return Reply.of({"error": {"message": f"bad key: {echoed}"}}, status=401)

    with Loopback(answer) as strict, LargeModel(strict.url, api_key="sk-secret") as large:
        with pytest.raises(LargeRefused, match="check the API key") as caught:
            large.connect()
        assert strict.requests[0].headers["authorization"] == "Bearer sk-secret"
        assert "secret" not in str(caught.value) + repr(large)


def test_a_key_with_a_line_break_is_refused_without_showing_it() -> None:
    with pytest.raises(UsageError) as caught:
        LargeModel("http://host/v1", api_key="sk-secret\nX-Evil: 1")
    assert "secret" not in str(caught.value)


def test_user_and_password_in_the_address_are_sent_but_not_shown(server: Loopback) -> None:
    server.script.extend([Reply.of({"error": "no"}, status=403)])
    typed = server.url.replace("http://", "http://me:pass%40word@")
    with LargeModel(typed, model="m") as large:
        with pytest.raises(LargeRefused) as caught:
            large.connect()
        assert "word" not in repr(large) + str(caught.value) + large.base_url
    assert server.requests[0].headers["authorization"] == "Basic bWU6cGFzc0B3b3Jk"


@pytest.mark.parametrize("typed", ["htp://me:word@host", "me:word@host:1", "http://me:word@:1/"])
def test_a_password_in_a_malformed_address_is_not_shown(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        LargeModel(typed)
    assert "word" not in str(caught.value)


def test_credentials_of_a_netrc_file_are_never_sent(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password word\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    ask_plain(server, legacy("a"))
    assert all("authorization" not in request.headers for request in server.requests)


def test_cookies_of_a_server_are_not_kept(server: Loopback) -> None:
    body = json.dumps(legacy("4")).encode()
    server.script.append(Reply(body, headers={"Set-Cookie": "id=1"}))
    server.script.append(Reply.of(legacy("a")))
    with LargeModel(server.url, model="m") as large:
        large.connect()
        large.next_token(context("x", VOCABULARY))
    assert "cookie" not in server.requests[-1].headers


def test_a_proxy_for_the_outside_is_not_used_for_this_machine(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    assert ask_plain(server, legacy("a")).text == "a"
