"""An answer of the large model that is asked for as a whole, at the chat route."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from mlxroute.errors import LargeRefused, LargeUnreachable
from mlxroute.large import LargeModel
from mlxroute.large.dialects import get_dialect
from mlxroute.large.dialects.base import Dialect
from mlxroute.large.dialects.chat.chat_continuation import ChatContinuation, ContinuationMethod
from mlxroute.large.dialects.chat.example_completion import ExampleCompletion
from mlxroute.large.dialects.chat.request_fields import RequestFields
from mlxroute.large.negotiation.served_models import ModelName
from mlxroute.large.whole_chat import WholeChat
from mlxroute.types import Message
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import PLAIN, negotiated

_CHAT = ChatContinuation(ContinuationMethod.TRAILING)
_CONVERSATION: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
]


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as server:
        yield server


def chat(text: str | None, *, finish: str = "stop") -> Reply:
    """Return a reply of the chat route."""
    message = {"role": "assistant", "content": text}
    return Reply.of({"choices": [{"message": message, "finish_reason": finish}]})


def ask(server: Loopback, dialect: Dialect) -> tuple[str, bool, list[dict[str, Any]]]:
    """Return a whole answer, whether it ended, and the bodies of its requests."""
    with negotiated(LargeModel(server.url), dialect) as large:
        large._negotiator._negotiator.model = ModelName(None, ("served",))
        whole = large.whole_chat(timeout_s=20).answer(_CONVERSATION, max_tokens=9)
    return whole.text, whole.ends, [json.loads(request.body) for request in server.requests]


def test_a_whole_answer_is_asked_for_as_single_tokens_are(server: Loopback) -> None:
    server.answer = lambda request: chat("hello")
    text, ends, (body,) = ask(server, PLAIN)
    assert (text, ends, body["messages"], body["max_tokens"]) == ("hello", True, _CONVERSATION, 9)
    # Single tokens come from a model that does not think.
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["model"] == "served"
    mlx_lm = get_dialect("mlx_lm completions")
    assert mlx_lm is not None
    assert not mlx_lm.names_model
    # By its name this server may load another model than its own.
    assert "model" not in ask(server, mlx_lm)[2][-1]


def test_a_refused_system_message_becomes_part_of_the_question(server: Loopback) -> None:
    def answer(request: Request) -> Reply:
        roles = [message["role"] for message in json.loads(request.body)["messages"]]
        if "system" in roles:
            return Reply(b'{"error": "System role not supported"}', status=400)
        return chat("hello", finish="length")

    server.answer = answer
    text, ends, bodies = ask(server, PLAIN)
    assert (text, ends, len(bodies)) == ("hello", False, 3)
    assert "Be brief." in bodies[-1]["messages"][0]["content"]


def test_a_refused_system_message_of_a_forwarded_request_becomes_part_of_the_question(
    server: Loopback,
) -> None:
    def answer(request: Request) -> Reply:
        if any(message["role"] == "system" for message in request.json["messages"]):
            return Reply(b'{"error": "System role not supported"}', status=400)
        return chat("hello")

    server.answer = answer
    called: dict[str, Any] = {"role": "assistant", "tool_calls": []}
    with negotiated(LargeModel(server.url, model="m")) as large:
        large.whole_chat(timeout_s=20).ask({"messages": [*_CONVERSATION, called], "tools": [1]})
    assert len(server.requests) == 2
    question = {"role": "user", "content": "Be brief.\n\nhi"}
    body = {"messages": [question, called], "tools": [1], "model": "m"}
    assert server.requests[1].json == body


def test_a_forwarded_request_that_is_refused_for_other_reasons_is_sent_once(
    server: Loopback,
) -> None:
    server.answer = lambda request: Reply(b'{"error": "tools[0] has no name"}', status=400)
    with (
        negotiated(LargeModel(server.url, model="m")) as large,
        pytest.raises(LargeRefused, match="has no name"),
    ):
        large.whole_chat(timeout_s=20).ask({"messages": [*_CONVERSATION], "tools": [1]})
    assert len(server.requests) == 1


def test_parts_of_a_forwarded_request_are_not_moved(server: Loopback) -> None:
    server.answer = lambda request: Reply(b'{"error": "System role not supported"}', status=400)
    parts = [{"type": "text", "text": "hi"}]
    messages = [_CONVERSATION[0], {"role": "user", "content": parts}]
    with (
        negotiated(LargeModel(server.url, model="m")) as large,
        pytest.raises(LargeRefused, match="System role not supported"),
    ):
        large.whole_chat(timeout_s=20).ask({"messages": messages})
    assert [request.json["messages"] for request in server.requests] == [messages]


@pytest.mark.parametrize("status", [400, 403, 422])
@pytest.mark.parametrize(
    "message",
    [
        "unknown field: chat_template_kwargs",
        # vLLM and NIM
        "chat_template is not supported for Mistral tokenizers.",
    ],
)
def test_a_server_that_refuses_the_switch_for_thinking_is_asked_without_it(
    server: Loopback, message: str, status: int
) -> None:
    def answer(request: Request) -> Reply:
        if "chat_template_kwargs" in json.loads(request.body):
            return Reply.of({"error": message}, status=status)
        return chat("hello")

    server.answer = answer
    with negotiated(LargeModel(server.url, model="m")) as large:
        for _ in range(2):
            whole = large.whole_chat(timeout_s=20).answer(_CONVERSATION, max_tokens=9)
            assert whole.text == "hello"
    bodies = [json.loads(request.body) for request in server.requests]
    assert ["chat_template_kwargs" in body for body in bodies] == [True, False, False]
    assert all(body["messages"] == _CONVERSATION for body in bodies)


def test_flags_turn_thinking_off_in_a_whole_answer_too(server: Loopback) -> None:
    server.answer = lambda request: chat("hello")
    flags, trailing = (
        ask(server, ChatContinuation(method))[2][-1]
        for method in (ContinuationMethod.FLAGS, ContinuationMethod.TRAILING)
    )
    assert flags["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in trailing


@pytest.mark.parametrize("text", [None, ""])
def test_a_withheld_answer_is_empty(text: str | None, server: Loopback) -> None:
    server.answer = lambda request: chat(text, finish="content_filter")
    assert ask(server, ExampleCompletion())[:2] == ("", False)


@pytest.mark.parametrize(
    "send",
    [
        lambda whole: whole.ask({"messages": _CONVERSATION}),
        lambda whole: whole.answer(_CONVERSATION, max_tokens=9),
    ],
    ids=["forwarded", "own"],
)
def test_an_error_with_status_200_is_an_error(
    server: Loopback, send: Callable[[WholeChat], object]
) -> None:
    message = "Provider returned error: rate limited"
    server.answer = lambda request: Reply.of({"error": {"message": message, "code": 429}})
    with negotiated(LargeModel(server.url, model="m")) as large:
        whole = large.whole_chat(timeout_s=20)
        with pytest.raises(LargeRefused, match=f"answered 429: {message}") as caught:
            send(whole)
    assert (caught.value.status, caught.value.may_pass) == (429, True)


@pytest.mark.parametrize("text", ["", "The sky"])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ({"code": 502, "message": "Upstream error"}, 502, "502: Upstream error"),
        ({"code": "server_error", "message": "Upstream error"}, 200, "200: Upstream error"),
        (None, 200, "200: an error without a message"),
    ],
)
def test_an_answer_that_a_provider_breaks_off_is_an_error(
    server: Loopback, text: str, error: object, status: int, message: str
) -> None:
    broken = {"message": {"role": "assistant", "content": text}, "finish_reason": "error"}
    server.answer = lambda request: Reply.of({"choices": [{**broken, "error": error}]})
    with pytest.raises(LargeRefused, match=f"answered {message}") as caught:
        ask(server, PLAIN)
    assert caught.value.status == status


def test_names_of_control_tokens_in_a_whole_answers_request_are_reported(server: Loopback) -> None:
    server.answer = lambda request: chat("hello")
    with negotiated(LargeModel(server.url, model="m")) as large:
        message: Message = {"role": "user", "content": "a <|im_end|> b"}
        large.whole_chat(timeout_s=20).answer([message], max_tokens=9)
        assert set(large.neutralised) == {"<|im_end|>"}
        message = {"role": "user", "content": "a <|eot_id|> b"}
        large.whole_chat(timeout_s=20).ask({"messages": [message]})
        assert set(large.neutralised) == {"<|im_end|>", "<|eot_id|>"}
    assert server.requests[-1].json["messages"][0]["content"] == "a < |eot_id|> b"


def test_a_whole_answer_may_be_longer_than_one_of_tokens(server: Loopback) -> None:
    text = "x" * (1 << 20)
    server.answer = lambda request: chat(text)
    assert ask(server, PLAIN)[0] == text


@pytest.mark.parametrize("forwarded", [True, False])
def test_a_slow_answer_is_asked_for_once(server: Loopback, forwarded: bool) -> None:
    server.script.extend([chat("hello"), replace(chat("hello"), stall_s=0.8)])
    with negotiated(LargeModel(server.url, model="m")) as large:
        for _ in range(2):
            whole = large.whole_chat(timeout_s=1.5)
            if forwarded:
                whole.ask({"messages": _CONVERSATION})
            else:
                whole.answer(_CONVERSATION, max_tokens=9)
    assert len(server.requests) == 2


def test_a_forwarded_request_names_the_model_though_no_connection_was_made(
    server: Loopback,
) -> None:
    def answer(request: Request) -> Reply:
        if request.path.endswith("/models"):
            return Reply.of({"data": [{"id": "served"}]})
        return chat("hello")

    server.answer = answer
    with LargeModel(server.url) as large:
        with server.gone(), pytest.raises(LargeUnreachable):
            large.whole_chat(timeout_s=20).ask({"messages": _CONVERSATION})
        for _ in range(2):
            large.whole_chat(timeout_s=20).ask({"messages": _CONVERSATION})
    listing, *asked = server.requests
    assert listing.method == "GET"
    assert [request.json["model"] for request in asked] == ["served", "served"]


def test_a_server_without_a_list_of_models_is_sent_no_name(server: Loopback) -> None:
    script = {"/v1/models": Reply(status=404), "/v1/chat/completions": chat("hello")}
    server.answer = lambda request: script[request.path]
    with LargeModel(server.url) as large:
        large.whole_chat(timeout_s=20).ask({"messages": _CONVERSATION})
    assert "model" not in server.requests[-1].json


def test_control_tokens_in_descriptions_are_sent_as_text(server: Loopback) -> None:
    server.answer = lambda request: chat("hello")
    hostile, plain = "a<|im_end|>b", "a< |im_end|>b"

    def schema(text: str) -> dict[str, Any]:
        return {
            "title": text,
            "properties": {"description": {"type": "string", "description": text}},
            "$defs": {"tag": {"enum": [hostile], "const": hostile, "pattern": hostile}},
        }

    def fields(text: str) -> dict[str, Any]:
        function = {"name": hostile, "description": text, "parameters": schema(text)}
        return {
            "messages": [{"role": "user", "content": text}],
            "tools": [{"type": "function", "function": function}],
            "functions": [function],
            "response_format": {"type": "json_schema", "json_schema": {"schema": schema(text)}},
            "guided_json": schema(text),
            "stop": [hostile],
        }

    with negotiated(LargeModel(server.url, model="m")) as large:
        large.whole_chat(timeout_s=20).ask(fields(hostile))
        assert large.neutralised == ("<|im_end|>",)
    # A reply has to have the names and values that the client knows.
    assert server.requests[-1].json == {**fields(plain), "model": "m"}


_OLD, _NEW = "max_tokens", "max_completion_tokens"


@pytest.mark.parametrize(
    ("dialect", "limits", "sent"),
    [
        (PLAIN, {_NEW: 5}, {_OLD: 5}),
        (PLAIN, {_NEW: 5, _OLD: None}, {_OLD: 5}),
        (PLAIN, {_OLD: 5}, {_OLD: 5}),
        (PLAIN, {_NEW: 5, _OLD: 6}, {_NEW: 5, _OLD: 6}),
        (PLAIN, {}, {}),
        (_CHAT.with_fields(RequestFields(limit_name=_NEW)), {_OLD: 5}, {_NEW: 5}),
        (_CHAT.with_fields(RequestFields(limit_name=_NEW)), {_NEW: 5}, {_NEW: 5}),
        (None, {_NEW: 5}, {_NEW: 5}),
    ],
)
def test_the_limit_of_a_forwarded_request_has_the_name_that_the_server_takes(
    server: Loopback, dialect: Dialect | None, limits: dict[str, Any], sent: dict[str, Any]
) -> None:
    server.answer = lambda request: chat("hello")
    with LargeModel(server.url, model="m") as large:
        if dialect is not None:
            negotiated(large, dialect)
        large.whole_chat(timeout_s=20).ask({"messages": _CONVERSATION, **limits})
    assert server.requests[-1].json == {"messages": _CONVERSATION, "model": "m", **sent}
