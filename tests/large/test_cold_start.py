"""The first contact with a server that still loads its model."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from mlxroute.cli import large_setup, main
from mlxroute.errors import LargeRefused, LargeTimeout, LargeUnavailable
from mlxroute.large import LargeModel, client
from mlxroute.large.http import model_loading, retry
from mlxroute.large.http.deadline import Deadline
from tests.support.connected_clients import VOCABULARY, legacy
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import honest, negotiated, negotiation_reply
from tests.support.vocabularies import context

LOADING = Reply(b'{"error": {"message": "Loading model", "code": 503}}', status=503)
READY = honest(lambda request: Reply.of(legacy("a")))
POSITION = context("x", VOCABULARY)


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


def test_an_error_for_an_unknown_route_is_no_reply_of_the_model() -> None:
    """LM Studio gives it status 200."""
    # The request is sent again on a new connection.
    loading = cold(late, times=2)

    def answer(request: Request) -> Reply:
        reply = loading(request)
        if reply.status == 404:
            return Reply.of({"error": f"Unexpected endpoint or method. (POST {request.path})"})
        return reply

    with Loopback(answer) as server, LargeModel(server.url, timeout_s=0.6) as large:
        assert "OpenAI completions" in large.connect()


def test_a_server_that_lists_no_models_in_time_is_not_waited_for_longer() -> None:
    with (
        Loopback(lambda request: Reply(stall_s=30)) as server,
        LargeModel(server.url, timeout_s=0.4) as large,
        pytest.raises(LargeTimeout, match=r"in 0\.4 s"),
    ):
        large.connect()


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


class Loading:
    """An honest server that answers no completion before its model is loaded."""

    def __init__(self) -> None:
        self.is_loaded = threading.Event()

    def __call__(self, request: Request) -> Reply:
        reply = READY(request)
        if request.path.endswith("/completions") and reply.status == 200:
            self.is_loaded.wait(30)
        return reply


def run_out_of_time(large: LargeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a call times out, and leave much time to the one that repeats it."""
    monkeypatch.setattr(client, "_FIRST_REPLY_FACTOR", 100)
    with pytest.raises(LargeTimeout):
        large.next_token(POSITION)


def assert_is_answered(large: LargeModel) -> None:
    """Call until there is a token: on a busy machine the short timeout may pass."""
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        with contextlib.suppress(LargeUnavailable, LargeTimeout):
            assert large.next_token(POSITION).text == "a"
            return
        time.sleep(0.02)
    raise AssertionError("no call was answered")


def assert_waits_for_loading(large: LargeModel, model: Loading) -> None:
    """Check that no call is made until the model is loaded, and then again."""
    with pytest.raises(LargeUnavailable, match="may be loading its model"):
        large.next_token(POSITION)
    model.is_loaded.set()
    assert_is_answered(large)


def test_a_model_that_is_loaded_for_the_first_call_is_waited_for_in_the_background(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server was down when the client connected."""
    model = Loading()
    with Loopback(model) as server, LargeModel(server.url, timeout_s=0.5) as large:
        large._negotiator.find_model(Deadline(30))
        run_out_of_time(large, monkeypatch)
        assert_waits_for_loading(large, model)


def test_a_model_that_was_unloaded_is_waited_for_in_the_background(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Loading()
    with (
        Loopback(model) as server,
        negotiated(LargeModel(server.url, model="m", timeout_s=0.5)) as large,
    ):
        model.is_loaded.set()
        assert_is_answered(large)
        model.is_loaded.clear()
        # A server that replied just now is not loading, and a shorter call shows nothing.
        for _ in range(2):
            run_out_of_time(large, monkeypatch)
        monkeypatch.setattr(model_loading, "_IDLE_S", 0.0)
        with pytest.raises(LargeTimeout):
            large.next_token(POSITION, deadline_s=0.1)
        large._breaker.end_pause()
        run_out_of_time(large, monkeypatch)
        assert_waits_for_loading(large, model)


def test_a_client_that_is_closed_waits_no_longer_for_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Loopback(Loading()) as server, LargeModel(server.url, timeout_s=0.5) as large:
        large._negotiator.find_model(Deadline(30))
        run_out_of_time(large, monkeypatch)
        waiting = large._loading._waiting
        assert waiting is not None
        large.close()
        waiting.join(20)
        assert not waiting.is_alive()


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
