"""The API key appears in no output of a command and not in the process list."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import psutil
import pytest

from mlxroute.errors import LargeProtocolError, LargeRefused
from mlxroute.large import LargeModel
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.transport import Transport
from mlxroute.large.negotiation.served_models import list_served_models
from tests.support.command_process import run_command
from tests.support.connected_clients import legacy
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import ask_once, honest
from tests.support.tiny import make_tiny_model
from tests.support.vocabularies import BYTE_CHARACTERS, TableVocabulary

KEY = "sk-do-not-show-77aa"


@pytest.mark.parametrize("form", ["--json", "--strict"])
def test_only_the_server_sees_the_key_of_a_command(tmp_path: Path, form: str) -> None:
    commands: list[str] = []
    played: list[Request] = []

    def play(request: Request) -> Reply:
        played.append(request)
        # All processes once, because to look at them takes a while.
        own = psutil.Process().children(recursive=True)
        for process in psutil.process_iter() if len(played) == 1 else own:
            with contextlib.suppress(psutil.Error):
                commands.append(" ".join(process.cmdline()))
        if len(played) % 2:
            return Reply.of(legacy("a"))
        echo = {"error": {"message": f"no: {request.headers['authorization']}"}}
        return Reply.of(echo, status=403)

    make_tiny_model(tmp_path / "tiny")
    arguments = ["--small", str(tmp_path / "tiny"), "--threshold=-inf", "--max-tokens=8", form]
    with Loopback(honest(play)) as server:
        asked = [*arguments, "--large", server.url, "--large-model", "m", "hi"]
        # Only the process of a new interpreter has the arguments in the list of processes.
        fresh, environ = form == "--json", {"OPENAI_API_KEY": KEY}
        result = run_command("ask", *asked, environ=environ, fresh=fresh)
    assert result.returncode == (3 if form == "--strict" else 0), result.stderr
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    output = (result.stdout + result.stderr).decode()
    assert "[key]" in output
    assert not fresh or any(f"mlxroute ask {shlex.join(arguments)}" in line for line in commands)
    assert KEY not in "".join([*commands, output])


@pytest.mark.parametrize("text", [KEY, f" the key is {KEY}.", KEY[:9]])
def test_a_reply_with_the_key_gives_no_token(text: str) -> None:
    with Loopback() as server, pytest.raises(LargeProtocolError, match="wrote the key") as caught:
        ask_once(server, legacy(text), api_key=KEY)
    assert KEY[:8] not in str(caught.value)


def test_a_text_that_only_begins_like_the_key_is_an_answer() -> None:
    with Loopback() as server:
        text, vocabulary = f" {KEY[:9]}, for example.", TableVocabulary(BYTE_CHARACTERS)
        assert ask_once(server, legacy(text), api_key=KEY, vocabulary=vocabulary).text == text


@pytest.mark.parametrize("text", [KEY, f"the key is {KEY}.", f"it is {KEY[:9]}"])
def test_a_whole_answer_with_the_key_is_an_error(text: str) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"arguments": text}]}
    reply = Reply.of({"choices": [{"message": message, "finish_reason": "length"}]})
    with (
        Loopback(lambda request: reply) as server,
        LargeModel(server.url, model="m", api_key=KEY) as large,
        pytest.raises(LargeProtocolError, match="wrote the key") as caught,
    ):
        large.whole_chat(timeout_s=20).ask({"messages": []})
    assert KEY[:8] not in str(caught.value)


def test_a_short_key_may_be_a_word_of_an_answer() -> None:
    with Loopback() as server:
        assert ask_once(server, legacy("a"), api_key="a").text == "a"


def test_a_model_that_is_named_by_the_key_is_not_listed() -> None:
    with Loopback() as server:
        server.script.append(Reply.of({"data": [{"id": "m"}, {"id": f"for-{KEY}"}]}))
        transport = Transport(parse_address(server.url), api_key=KEY)
        assert [model.name for model in list_served_models(transport, Deadline(30))] == ["m"]
        transport.close()


def test_the_target_of_a_redirect_is_shown_without_the_key() -> None:
    reply = Reply(status=307, headers={"Location": f"/login/{KEY}"})
    with Loopback() as server, pytest.raises(LargeRefused, match=r"/login/\[key\], ") as caught:
        ask_once(server, reply, api_key=KEY)
    assert KEY not in str(caught.value)
