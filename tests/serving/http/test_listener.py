"""Connections that wait or send slowly, and signals that end the endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from unittest.mock import Mock

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.server import ServerState

from mlxroute.cli import main
from mlxroute.errors import UsageError
from mlxroute.serving.http import listener
from mlxroute.serving.http.endpoint_app import create_app, create_loading_app
from mlxroute.serving.http.guard import AccessRules
from mlxroute.serving.http.listener import bind, serving_in_thread
from mlxroute.small import SmallModel
from tests.support.command_process import CommandProcess
from tests.support.endpoint import chat, make_session
from tests.support.tiny import make_tiny_model


@pytest.fixture
def port(small: SmallModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Serve a tiny model on a free port."""
    monkeypatch.setattr(listener, "_MAX_HEAD_S", 0.5)
    monkeypatch.setattr(listener, "_MAX_WAITING", 20)
    with bind("127.0.0.1", 0) as sock:
        app = create_app(make_session(small))
        with serving_in_thread(app, sock):
            yield sock.getsockname()[1]


def request(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def is_closed(sock: socket.socket) -> bool:
    sock.settimeout(5)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def test_requests_are_answered(port: int) -> None:
    assert request(port, "GET", "/health") == (200, {"status": "ok"})
    status, reply = request(port, "POST", "/v1/chat/completions", chat())
    assert status == 200
    assert reply["choices"][0]["message"]["content"]


def test_clients_are_told_that_the_models_are_loaded_and_later_ones_wait_for_them(
    small: SmallModel,
) -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with serving_in_thread(create_loading_app(AccessRules()), sock):
            status, reply = request(port, "POST", "/v1/chat/completions", chat())
            assert (status, reply["error"]["code"]) == (503, "loading")
        with socket.create_connection(("127.0.0.1", port), timeout=30) as early:
            early.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            with serving_in_thread(create_app(make_session(small)), sock):
                assert early.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_slow_sender_is_closed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        began_s = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" * 10:
                sock.send(bytes([byte]))
                time.sleep(0.02)
                if time.monotonic() - began_s > 3:
                    break
        assert is_closed(sock)
        assert time.monotonic() - began_s < 3


def test_a_client_that_writes_its_whole_body_gets_the_refusal(port: int) -> None:
    # A reset connection would hide the reply from clients that read it after they have written.
    body = {"messages": " " * 20_000_000}
    status, reply = request(port, "POST", "/v1/chat/completions", body)
    assert (status, reply["error"]["message"]) == (413, "the body is larger than 4 MiB")


def test_a_refused_request_does_not_keep_its_connection(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_MAX_REST_S", 0.5)
    head = b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(head)
        assert sock.recv(4096).startswith(b"HTTP/1.1 405 ")
        began_s = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began_s < 5:
                sock.send(b" ")
                time.sleep(0.05)
        assert time.monotonic() - began_s < 5


def test_a_broken_body_behind_its_refusal_ends_the_connection_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    rules = AccessRules(keys=["0123456789abcdef"])
    with (
        bind("127.0.0.1", 0) as listening,
        serving_in_thread(create_loading_app(rules), listening),
        socket.create_connection(listening.getsockname()) as sock,
    ):
        sock.sendall(head)
        with sock.makefile("rb") as reply:
            assert reply.readline().startswith(b"HTTP/1.1 401 ")
            sock.sendall(b"no length\r\n")
            with contextlib.suppress(ConnectionError):
                reply.read()
    assert not caplog.records


def test_a_client_that_leaves_is_noticed_behind_its_next_request() -> None:
    has_begun, has_left = threading.Event(), threading.Event()

    async def wait(request: Request) -> Response:
        await request.body()
        if not has_begun.is_set():
            has_begun.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(request.receive(), 10.0)
                has_left.set()
        return Response()

    next_request = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"
    app = Starlette(routes=[Route("/", wait, methods=["POST"])])
    with bind("127.0.0.1", 0) as listening, serving_in_thread(app, listening):
        with socket.create_connection(listening.getsockname()) as sock:
            sock.sendall(next_request)
            assert has_begun.wait(10.0)
            sock.sendall(next_request)
        assert has_left.wait(15.0)


class _SlowTransport(asyncio.Transport):
    """A connection whose client has `unread` bytes of a reply still to read."""

    def __init__(self, unread: int) -> None:
        super().__init__()
        self.unread = unread
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.is_aborted = True


def test_a_slow_reader_gets_its_reply_and_one_that_reads_nothing_is_closed() -> None:
    loop, transport = Mock(), _SlowTransport(100_000)
    config = uvicorn.Config(create_loading_app(AccessRules()), ws="none", log_config=None)
    connection = listener.BoundedConnection(config, ServerState(), {}, loop)
    connection.connection_made(transport)
    connection.pause_writing()
    for unread in (90_000, 89_999):
        transport.unread = unread
        _, check, *arguments = loop.call_later.call_args.args
        check(*arguments)
        assert not transport.is_aborted
    _, check, *arguments = loop.call_later.call_args.args
    check(*arguments)
    assert transport.is_aborted
    connection.connection_lost(ConnectionAbortedError())


def test_idle_connections_do_not_keep_others_out(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    try:
        assert request(port, "GET", "/health")[0] == 200
        assert all(map(is_closed, idle))
    finally:
        for sock in idle:
            sock.close()


def test_a_running_answer_is_no_idle_connection(port: int) -> None:
    status, _ = request(port, "POST", "/v1/chat/completions", chat(max_tokens=200))
    assert status == 200


def test_an_address_in_use_is_refused(port: int) -> None:
    with pytest.raises(UsageError, match="cannot listen on port"):
        bind("127.0.0.1", port)


def test_a_port_of_all_addresses_is_in_use_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("0.0.0.0", 0) as taken:
        port = taken.getsockname()[1]
        # macOS binds loopback beside all addresses.
        monkeypatch.setattr(socket, "create_server", lambda *args, **options: socket.socket())
        with pytest.raises(UsageError, match=f"cannot listen on port {port} .*in use"):
            bind("127.0.0.1", port)


@contextlib.contextmanager
def serve(
    path: Path, stderr: IO[bytes] | None = None
) -> Iterator[tuple[CommandProcess, int, IO[bytes]]]:
    """Run `mlxroute serve` with a tiny model; yield its process, port and stderr."""
    reader, writer = os.pipe()
    serving = ("serve", "--small", str(path), "--offline", "--port", "0")
    with (
        open(reader) as output,
        tempfile.TemporaryFile() as file,
        CommandProcess(serving, stdout=writer, stderr=(err := stderr or file)) as process,
    ):
        os.close(writer)
        port = int(output.readline().rsplit(":", 1)[1].split("/")[0])
        end_s = time.monotonic() + 60
        while request_or_none(port) != 200 and time.monotonic() < end_s:
            time.sleep(0.1)
        yield process, port, err


def request_or_none(port: int) -> int | None:
    with contextlib.suppress(OSError):
        return request(port, "GET", "/health")[0]
    return None


@contextlib.contextmanager
def begin_stream(port: int, **fields: Any) -> Iterator[http.client.HTTPResponse]:
    """Yield a stream whose first chunks were read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = chat(**{"stream": True, "temperature": 1.5, "seed": 1, **fields})
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        with contextlib.closing(connection.getresponse()) as response:
            for _ in range(6):
                response.readline()
            yield response


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("served") / "tiny", context=32_768)


def test_a_first_signal_drains_and_a_second_one_ends(tiny: Path) -> None:
    with serve(tiny) as (process, port, _), begin_stream(port, max_tokens=300) as response:
        process.send(signal.SIGTERM)
        time.sleep(0.3)
        assert request_or_none(port) is None
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait() == 0

    long = {"max_tokens": 30_000, "temperature": 0}
    with serve(tiny) as (process, port, err), begin_stream(port, **long) as response:
        process.send(signal.SIGTERM)
        # Two signals at nearly the same time count as one.
        time.sleep(0.3)
        process.send(signal.SIGTERM)
        assert process.wait() == 0
        try:
            data = response.read()
        except http.client.IncompleteRead as exc:
            data = exc.partial
        assert b"[DONE]" not in data
        err.seek(0)
        assert b"Traceback" not in err.read()


def test_a_log_that_nobody_reads_stops_no_replies(tiny: Path) -> None:
    reader, writer = os.pipe()
    with (
        open(reader, "rb", buffering=0) as log,
        open(writer, "wb", buffering=0) as err,
        serve(tiny, err) as (_, port, _),
    ):
        shown = b""
        while b"ready" not in shown:
            shown += log.read(10_000)
        os.set_blocking(writer, False)
        # A pipe returns None once it is full.
        while err.write(b" " * 4096):
            pass
        os.set_blocking(writer, True)
        for _ in range(2):
            assert request(port, "POST", "/v1/chat/completions", chat(max_tokens=2))[0] == 200
        assert not log.read(2**20).strip()
        assert request(port, "POST", "/v1/chat/completions", chat(max_tokens=2))[0] == 200
        os.set_blocking(reader, False)
        assert b"tokens" in (log.read(10_000) or b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "other machines could use the endpoint"),
        (["--small", "no-such-model"], "no-such-model"),
        (["--max-running", "0"], "--max-running must be at least 1"),
        (["--client-key-env", "MLXROUTE_NO_SUCH_KEY"], "is not set"),
        (["--port", "99999"], "--port must be from 0 to 65535"),
    ],
)
def test_settings_that_cannot_be_used(
    tiny: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [] if "--small" in arguments else ["--small", str(tiny)]
    port = [] if "--port" in arguments else ["--port", "0"]
    assert main(["serve", "--offline", *small, *port, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_keys_of_clients_come_from_a_private_file(tmp_path: Path, tiny: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("0123456789abcdef-one\n\n0123456789abcdef-two\n")
    os.chmod(file, 0o644)
    assert main(["serve", "--offline", "--client-key-file", str(file), "--port", "0"]) == 2
