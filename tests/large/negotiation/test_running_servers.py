"""The search for servers on this machine: what is asked, what is offered, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxroute.cli import main
from mlxroute.cli.server_offers import describe_server, no_large_lines, use_command
from mlxroute.large.negotiation import running_servers
from mlxroute.large.negotiation.running_servers import RunningServer, find_running_servers
from tests.support.loopback import Loopback, Reply
from tests.support.tiny import make_tiny_model


def listing(*names: str, **fields: Any) -> Reply:
    return Reply.of({"object": "list", "data": [{"id": name, **fields} for name in names]})


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback(lambda request: listing("qwen2.5:7b", "llama3.2")) as running:
        yield running


def search(
    monkeypatch: pytest.MonkeyPatch, *ports: int, timeout_s: float = 60.0
) -> tuple[RunningServer, ...]:
    monkeypatch.setattr(running_servers, "DEFAULT_PORTS", dict.fromkeys(ports, "Ollama"))
    monkeypatch.setattr(running_servers, "TIMEOUT_S", timeout_s)
    return find_running_servers()


def test_a_server_is_asked_for_its_models_and_nothing_else(
    server: Loopback, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (running,) = search(monkeypatch, server.port)
    url = f"http://127.0.0.1:{server.port}/v1"
    assert running == RunningServer(
        "a server on the port of Ollama", url, ("qwen2.5:7b", "llama3.2")
    )
    (request,) = server.requests
    assert (request.method, request.path, request.body) == ("GET", "/v1/models", b"")
    assert not request.headers.keys() & {"authorization", "cookie", "proxy-authorization"}
    assert "secret" not in str(request.headers)


def test_a_list_of_models_may_be_a_bare_array(monkeypatch: pytest.MonkeyPatch) -> None:
    with Loopback(lambda request: Reply.of([{"id": "a"}, {"id": "b"}])) as server:
        (running,) = search(monkeypatch, server.port)
    assert running.models == ("a", "b")


def test_ports_where_nothing_listens_are_left_out(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.gone():
        assert search(monkeypatch, server.port) == ()
    with Loopback(lambda request: listing("m", owned_by="llamacpp")) as other:
        names = [running.name for running in search(monkeypatch, server.port, other.port)]
    # A listed model's owner is surer than the port.
    assert names == ["a server on the port of Ollama", "llama-server"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"<html>"),
        Reply(b"[" * 100_000),
        Reply.of([]),
        Reply.of({"data": {}}),
        Reply.of({"data": []}),
        Reply.of({"data": [{"id": 3}]}),
        Reply.of({"data": ["m"]}),
        Reply.of({"data": [{"id": "\ud800"}]}),
        Reply.of({"data": [{"id": ""}]}),
        Reply.of({"error": "a key is needed"}, status=401),
        Reply(raw=b"SSH-2.0-OpenSSH_9.2\r\n"),
        Reply(b'{"data":[{"id":"m"}]}' + b" " * (1 << 20)),
        Reply(b'{"data":[{"id":"m"}]}', cut_at=60),
    ],
)
def test_what_lists_no_models_is_no_server(monkeypatch: pytest.MonkeyPatch, reply: Reply) -> None:
    with Loopback(lambda request: reply) as server:
        assert search(monkeypatch, server.port) == ()


def test_a_redirect_is_not_followed(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    location = {"Location": f"{server.url}/models"}
    with Loopback(lambda request: Reply(status=302, headers=location)) as other:
        assert search(monkeypatch, other.port) == ()
    assert server.requests == []


@pytest.mark.parametrize("reply", [Reply(stall_s=3600.0), Reply(byte_every_s=0.1, times=1000)])
def test_a_server_that_does_not_answer_in_time_is_left_out(
    monkeypatch: pytest.MonkeyPatch, reply: Reply
) -> None:
    with Loopback(lambda request: reply) as server:
        assert search(monkeypatch, server.port, timeout_s=0.2) == ()


def test_the_offer_is_the_exact_command() -> None:
    one = RunningServer("vLLM", "http://127.0.0.1:8000/v1", ("Qwen/Qwen2.5-7B",))
    assert use_command(one) == "mlxroute chat --large http://127.0.0.1:8000/v1"
    assert use_command(one, "ask --small smollm2-135m", ["Why is", "it?"]) == (
        "mlxroute ask --small smollm2-135m --large http://127.0.0.1:8000/v1 'Why is' 'it?'"
    )
    several = RunningServer("LM Studio", "http://127.0.0.1:1234/v1", ("text-embedding-x", "a b"))
    assert use_command(several).endswith(" --large http://127.0.0.1:1234/v1 --large-model 'a b'")
    assert describe_server(several) == "LM Studio at http://127.0.0.1:1234/v1 with a b"
    folder = RunningServer("mlx_lm.server", "http://127.0.0.1:8081/v1", ("/home/me/models/huge",))
    assert describe_server(folder).endswith(" with huge")


def test_names_of_a_server_cannot_control_the_terminal() -> None:
    hostile = RunningServer(
        "vLLM", "http://127.0.0.1:8000/v1", ("\x1b[2Jrm\n$(x)\u202e", "m" * 999)
    )
    text = describe_server(hostile) + use_command(hostile)
    assert text.isprintable()
    assert len(text) < 400
    assert use_command(hostile).endswith("--large-model ID")
    joined = RunningServer("vLLM", "http://127.0.0.1:8000/v1", ("qwen\u200d-7b", "qwen-7b"))
    assert use_command(joined).endswith("--large-model ID")
    quoted = RunningServer("vLLM", "http://127.0.0.1:8000/v1", ("$(rm -r x)", "b"))
    assert use_command(quoted).endswith("--large-model '$(rm -r x)'")


def test_ask_offers_a_server_and_does_not_use_it(
    server: Loopback,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    search(monkeypatch, server.port)
    tiny = make_tiny_model(tmp_path / "tiny")
    assert main(["ask", "--small", str(tiny), "--max-tokens", "2", "hi"]) == 0
    offer = f"mlxroute ask --small {tiny} --large {server.url} --large-model qwen2.5:7b hi\n"
    assert offer in capsys.readouterr().err
    assert {request.path for request in server.requests} == {"/v1/models"}
    count = len(server.requests)
    assert main(["ask", "--offline", "--small", str(tiny), "--max-tokens", "2", "hi"]) == 0
    assert len(server.requests) == count
    assert "no large model" not in capsys.readouterr().err


def test_doctor_lists_the_servers_it_finds(
    server: Loopback,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    search(monkeypatch, server.port)
    arguments = ["doctor", "--cache-dir", str(tmp_path)]
    assert main(arguments) == 0
    assert f"Ollama at {server.url} with qwen2.5:7b, llama3.2" in capsys.readouterr().out
    count = len(server.requests)
    assert main([*arguments, "--offline"]) == 0
    assert len(server.requests) == count
    search(monkeypatch)
    assert main(arguments) == 0
    assert "servers here   none" in capsys.readouterr().out


def test_without_a_server_the_note_shows_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    search(monkeypatch)
    (line,) = no_large_lines("chat")
    assert "--large URL" in line
