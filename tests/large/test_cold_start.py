"""The first contact with a server that still loads its model."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from mlxroute.cli import large_setup, main
from mlxroute.errors import LargeRefused, LargeTimeout
from mlxroute.large import LargeModel
from mlxroute.large.http import retry
from tests.support.connected_clients import legacy
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import honest, negotiation_reply

LOADING = Reply(b'{"error": {"message": "Loading model", "code": 503}}', status=503)
READY = honest(lambda request: Reply.of(legacy("a")))


def cold(fault: Callable[[Request], Reply], *, times: int) -> Callable[[Request], Reply]:
    """Return an honest server whose first completions get `fault`."""
    left = [times]

    def answer(request: Request) -> Reply:
        is_question = request.path.endswith("/completions") and READY(request).status == 200
        if is_question and left[0] > 0:
            left[0] -= 1
            return fault(request)
        return READY(request)

    return answer


def late(request: Request) -> Reply:
    reply = negotiation_reply(request)
    assert reply is not None
    return replace(reply, stall_s=1.2)


def test_the_first_reply_may_take_longer_than_a_later_one() -> None:
    with Loopback(cold(late, times=1)) as server, LargeModel(server.url, timeout_s=0.6) as large:
        assert "OpenAI completions" in large.connect()
    with (
        Loopback(cold(late, times=99)) as server,
        LargeModel(server.url, timeout_s=0.6) as large,
        pytest.raises(LargeTimeout, match=r"in 0\.6 s; a longer limit may help") as caught,
    ):
        large.connect()
    assert caught.value.parameter == "timeout_s"


def test_a_server_that_lists_no_models_in_time_is_not_waited_for_longer() -> None:
    with Loopback(lambda request: Reply(stall_s=30)) as server:
        began_s = time.monotonic()
        with LargeModel(server.url, timeout_s=0.4) as large, pytest.raises(LargeTimeout):
            large.connect()
        assert time.monotonic() - began_s < 1.5


def test_a_server_that_says_that_it_is_loading_is_asked_until_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "_MAX_PAUSE_S", 0.01)
    server = Loopback(cold(lambda request: LOADING, times=30))
    with server, LargeModel(server.url, timeout_s=20) as large:
        assert "OpenAI completions" in large.connect()
    overloaded = Reply(b'{"error": "overloaded"}', status=503)
    server = Loopback(cold(lambda request: overloaded, times=30))
    with server, LargeModel(server.url, timeout_s=20) as large, pytest.raises(LargeRefused):
        large.connect()


def test_a_long_wait_is_explained_with_its_limit_and_the_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(large_setup, "_SLOW_REPLY_S", 0.05)
    with Loopback(cold(late, times=1)) as server:
        assert main(["probe", server.url, "--timeout", "5"]) == 0
        first = capsys.readouterr().err.splitlines()[0]
        assert first == (
            f"waiting for {server.url}: it may be loading the model; 20 s at most, which --timeout"
            " raises"
        )


def test_a_short_wait_is_not_explained() -> None:
    err = Console(file=io.StringIO())
    with (
        LargeModel("http://127.0.0.1:9/v1") as large,
        large_setup.first_reply_status(large, err, "connecting"),
    ):
        pass
    assert isinstance(err.file, io.StringIO)
    assert err.file.getvalue() == ""


def test_the_error_of_a_command_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with Loopback(cold(late, times=99)) as server:
        assert main(["probe", server.url, "--timeout", "0.25"]) == 3
    assert capsys.readouterr().err.endswith(
        f"error: no full reply from {server.url} in 1 s; a longer limit may help (--timeout)\n"
    )


def test_a_slow_negotiation_after_the_first_reply_is_not_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(large_setup, "_SLOW_REPLY_S", 0.05)
    err = Console(file=io.StringIO())
    with Loopback(READY) as server, LargeModel(server.url) as large:
        large.connect()
        with large_setup.first_reply_status(large, err, "connecting"):
            time.sleep(0.3)
    assert isinstance(err.file, io.StringIO)
    assert err.file.getvalue() == ""
