"""Requests that are refused: wrong fields, foreign hosts and pages, wrong keys, full queues."""

from __future__ import annotations

import gzip
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mlxroute.answers.document import ModelPair
from mlxroute.config.setting_choices import ToolPolicyName
from mlxroute.errors import UsageError
from mlxroute.serving import AnswerRequest
from mlxroute.serving.http.answer_endpoint import EndpointRequest, ServingLimits
from mlxroute.serving.http.endpoint_app import create_loading_app
from mlxroute.serving.http.guard import AccessRules
from mlxroute.serving.http.model_names import ModelNames
from mlxroute.serving.http.parsing.fields import clean_text
from mlxroute.serving.http.parsing.request_body import MAX_BODY_BYTES
from mlxroute.serving.http.served_answer import ServedAnswer
from mlxroute.serving.http.serving_session import ServingSession
from mlxroute.serving.running_answer import RunningAnswer
from mlxroute.small import SmallModel
from tests.serving.conftest import held
from tests.support.endpoint import HOST, chat, make_session, running
from tests.support.scripted_models import ScriptedLarge

_PAGE = "http://page.example:3000"
_KEY, _OTHER_KEY = "a-key-of-a-client-01", "a-key-of-a-client-02"


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"temperature": 1, "typical_p": 0.5}, "typical_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 20, "logprobs": True}, "top_logprobs"),
        ({"stop": [1]}, "stop"),
        ({"seed": 2**65}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"budget": 7}, "budget"),
        ({"budget": 0.1, "threshold": 1}, "threshold"),
        ({"mode": "fast"}, "mode"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "fox " * 5000}]}, "messages"),
    ],
)
def test_a_field_that_would_change_the_answer_is_named(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    error = error_of(client.post("/v1/chat/completions", json=chat(**fields)), 400)
    assert error["param"] == param


_SCHEMAS: dict[str, Any] = {
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a", "b"],
    "guided_grammar": 'root ::= "a"',
    "structured_outputs": {"regex": "a+"},
    "grammar": 'root ::= "a"',
    "json_schema": {},
    "regex": "a+",
    "ebnf": 'root ::= "a"',
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function"}],
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "function_call": {"name": "f"},
}


@pytest.mark.parametrize("name", _SCHEMAS)
def test_tools_and_schemas_are_refused_on_both_routes(client: TestClient, name: str) -> None:
    field = {name: _SCHEMAS[name]}
    for path, body in (("chat/completions", chat(**field)), ("completions", {"prompt": "a"})):
        error = error_of(client.post(f"/v1/{path}", json=body | field), 400)
        assert (error["param"], error["code"]) == (name, "unsupported_value")


def test_tools_and_schemas_that_ask_for_nothing_are_accepted(client: TestClient) -> None:
    empty = {"tools": [], "tool_choice": "auto", "function_call": "none", "grammar": ""}
    neutral = {**dict.fromkeys(_SCHEMAS), **empty, "max_tokens": 1}
    for path, body in (("chat/completions", chat()), ("completions", {"prompt": "a"})):
        reply = client.post(f"/v1/{path}", json=body | neutral)
        assert reply.status_code == 200
        assert reply.json()["mlxroute"].get("ignored", []) == []


_CHANGED: dict[str, tuple[Any, Any]] = {
    "repeat_penalty": (1.3, 1.0),
    "repetition_penalty": (1.3, 1),
    "dry_multiplier": (0.8, 0),
    "no_repeat_ngram_size": (3, 0),
    "min_tokens": (5, 0),
    "ignore_eos": (True, False),
    "stop_token_ids": ([5], []),
    "bad_words": (["fox"], []),
    "allowed_token_ids": ([5], []),
    "chat_template": ("{{ messages }}", ""),
    "mirostat": (2, 0),
}
"""Fields of other servers, each with a value that changes the answer and one that does not."""


@pytest.mark.parametrize("name", _CHANGED)
def test_fields_of_other_servers_are_refused_unless_they_change_nothing(
    client: TestClient, name: str
) -> None:
    changing, neutral = _CHANGED[name]
    for path, body in (("chat/completions", chat()), ("completions", {"prompt": "a"})):
        body |= {"temperature": 1, "max_tokens": 1}
        error = error_of(client.post(f"/v1/{path}", json={**body, name: changing}), 400)
        assert (error["param"], error["code"]) == (name, "unsupported_value")
        reply = client.post(f"/v1/{path}", json={**body, name: neutral})
        assert reply.status_code == 200
        assert reply.json()["mlxroute"]["ignored"] == []


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, "", [], [[]], [["a"]], {"a": 1}, [1, "a"], [[-1]], [10**9], [True], [[1.5]]),
        *("fox " * 5000, [5] * 5000),
    ],
)
def test_a_wrong_prompt_is_named(client: TestClient, prompt: Any) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": prompt}), 400)
    assert error["param"] == "prompt"


def test_an_unknown_model_is_named(client: TestClient) -> None:
    error = error_of(client.post("/v1/chat/completions", json=chat(model="gpt-4o\x1b[2J")), 404)
    assert error["code"] == "model_not_found"
    assert "tiny:small" in error["message"]


def test_a_prompt_longer_than_the_context(client: TestClient) -> None:
    error = error_of(client.post("/v1/chat/completions", json=chat("fox " * 2000)), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"1", b'{"n": NaN}', b"\xff\xfe", b"[" * 100_000, b"1" * 10_000]
)
def test_a_body_that_is_no_object(client: TestClient, data: bytes) -> None:
    error_of(client.post("/v1/chat/completions", content=data), 400)


def test_a_compressed_body_is_called_one(client: TestClient) -> None:
    data = gzip.compress(json.dumps(chat()).encode())
    headers = {"Content-Encoding": "gzip"}
    error = error_of(client.post("/v1/chat/completions", content=data, headers=headers), 415)
    assert "Content-Encoding 'gzip'" in error["message"]
    headers = {"Content-Encoding": "identity"}
    response = client.post("/v1/chat/completions", json=chat(max_tokens=1), headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("number", [-2, 0, 2**40])
def test_the_limits_of_a_chat_are_those_in_the_message(client: TestClient, number: int) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        error = error_of(client.post("/v1/chat/completions", json={**chat(), name: number}), 400)
        assert error["message"] == f"{name} must be from 1 to 2,147,483,648"


def test_a_body_that_is_too_large(client: TestClient) -> None:
    error_of(client.post("/v1/chat/completions", content=b" " * (MAX_BODY_BYTES + 1)), 413)
    parts = (b" " * 2**20 for _ in range(8))
    error_of(client.post("/v1/chat/completions", content=parts), 413)


def test_unknown_paths_say_what_there_is(client: TestClient) -> None:
    for path in ("responses", "embeddings", "messages"):
        error = error_of(client.post(f"/v1/{path}", json={}), 404)
        assert "/v1/chat/completions" in error["message"]
        assert error["message"].endswith("GET /metrics, GET /")
    error_of(client.get("/v1/chat/completions"), 405)


def test_a_request_without_a_host_gets_no_advice_on_names(client: TestClient) -> None:
    error = error_of(client.get("/v1/models", headers={"host": ""}), 403)
    assert error["message"] == "the request has no Host header"


def test_a_foreign_host_is_refused(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:8787", "127.0.0.1.evil.example", "10.0.0.1", ""):
        error_of(client.get("/v1/models", headers={"host": host}), 403)
    for host in ("localhost:8787", "127.0.0.1", "[::1]:8787", "LOCALHOST"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "mymac.local"])
def test_an_endpoint_is_called_localhost_on_every_address(host: str) -> None:
    client = TestClient(create_loading_app(AccessRules(host=host)))
    for name in ("localhost:8787", "127.0.0.1:8787", "[::1]:8787"):
        error_of(client.get("/health", headers={"host": name}), 503)
    error_of(client.get("/health", headers={"host": "evil.example"}), 403)


@pytest.mark.parametrize(
    ("rules", "headers"),
    [
        (AccessRules(allowed_hosts=("MyMac.local:8787",)), {"host": "mymac.local:8787"}),
        (AccessRules(allowed_hosts=("[fd00::1]:8787",)), {"host": "[fd00::1]:8787"}),
        (AccessRules(allowed_hosts=("fd00::1",)), {"host": "[fd00::1]:8787"}),
        (AccessRules(allowed_origins=("http://Page.example:3000/",)), {"origin": _PAGE}),
        (AccessRules(allowed_origins=(_PAGE,)), {"origin": _PAGE}),
        (AccessRules(allowed_origins=("https://a.example:443",)), {"origin": "https://a.example"}),
        (AccessRules(allowed_origins=("*",)), {"origin": _PAGE}),
    ],
)
def test_names_and_origins_are_allowed_however_they_are_written(
    rules: AccessRules, headers: dict[str, str]
) -> None:
    client = TestClient(create_loading_app(rules), base_url=HOST)
    response = client.get("/health", headers=headers)
    error_of(response, 503)
    if "origin" in headers:
        assert response.headers["access-control-allow-origin"] in (_PAGE, headers["origin"], "*")


@pytest.mark.parametrize("name", ["", "*", "http://mymac.local", "mymac.local/v1", "a b"])
def test_a_name_that_no_request_has_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(UsageError, match=r"such as mymac\.local") as raised:
        AccessRules(allowed_hosts=(name,))
    assert raised.value.parameter == "allow_host"


@pytest.mark.parametrize("origin", ["", "localhost:3000", f"{_PAGE}/app", "http://"])
def test_an_origin_that_no_page_has_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(UsageError, match="such as http://localhost:3000") as raised:
        AccessRules(allowed_origins=(origin,))
    assert raised.value.parameter == "allow_origin"


def test_a_foreign_page_is_refused(client: TestClient) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", "\x1b"):
        error_of(client.post("/v1/chat/completions", headers={"origin": origin}, json=chat()), 403)
    own = {"origin": "http://127.0.0.1:8787"}
    assert client.get("/v1/models", headers=own).status_code == 200


def test_an_allowed_page_gets_its_headers(small: SmallModel) -> None:
    rules = AccessRules(allowed_origins=("https://page.example",))
    with running(make_session(small), rules=rules) as client:
        headers = {
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
            "access-control-request-private-network": "true",
        }
        preflight = client.options("/v1/chat/completions", headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-private-network"] == "true"
        reply = client.get("/v1/models", headers={"origin": "https://page.example"})
        assert reply.headers["access-control-allow-origin"] == "https://page.example"
        readable = reply.headers["access-control-expose-headers"].lower().split(", ")
        assert {"x-mlxroute-id", "retry-after", "x-should-retry"} <= set(readable)


@pytest.mark.parametrize("keys", [[""], [_KEY, "short"], _KEY])
def test_a_key_that_anybody_could_guess_is_refused_at_the_start(keys: Any) -> None:
    with pytest.raises(UsageError, match="keys") as raised:
        AccessRules(keys=keys)
    assert raised.value.parameter == "keys"


@pytest.mark.parametrize("key", ["schlüssel-für-den-endpunkt", f" {_KEY}", f"{_KEY}\r\n"])
def test_a_key_that_not_every_client_can_send_is_refused_at_the_start(key: str) -> None:
    with pytest.raises(UsageError, match="keys has a key that not every client can send") as raised:
        AccessRules(keys=[_KEY, key])
    assert raised.value.parameter == "keys"


@pytest.mark.parametrize(
    ("parameter", "text"), [("allowed_hosts", "mymac"), ("allowed_origins", "*")]
)
def test_one_text_is_no_list_of_names(parameter: str, text: str) -> None:
    with pytest.raises(UsageError, match="must be a list of texts") as raised:
        AccessRules(**{parameter: text})
    assert raised.value.parameter == parameter


def test_keys(small: SmallModel) -> None:
    rules = AccessRules(keys=(_KEY, _OTHER_KEY))
    with running(make_session(small), rules=rules) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {_KEY}"}):
            for path in ("/v1/models", "/metrics", "/v1/mlxroute/answers/a"):
                assert "key" in error_of(client.get(path, headers=headers), 401)["message"]
        owner = {"authorization": f"Bearer {_KEY}"}
        reply = client.post("/v1/chat/completions", json=chat(), headers=owner).json()
        path = f"/v1/mlxroute/answers/{reply['id']}"
        assert client.get(path, headers={"x-api-key": _KEY}).status_code == 200
        other = {"authorization": f"Bearer {_OTHER_KEY}"}
        error_of(client.get(path, headers=other), 404)


def test_a_client_does_not_learn_what_others_asked(small: SmallModel) -> None:
    rules = AccessRules(keys=(_KEY, _OTHER_KEY))
    scored = {"prompt": "Thursday " * 20, "echo": True, "logprobs": 1, "max_tokens": 1}
    with running(make_session(small), rules=rules) as client:

        def cached_tokens(key: str, path: str, body: dict[str, Any]) -> int:
            owner = {"authorization": f"Bearer {key}"}
            reply = client.post(f"/v1/{path}", json=body, headers=owner).json()
            count: int = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            return count

        for path, body in (("chat/completions", chat("fox " * 20)), ("completions", scored)):
            assert cached_tokens(_KEY, path, body) == 0
            assert cached_tokens(_OTHER_KEY, path, body) == 0
            assert cached_tokens(_KEY, path, body) > 0


def test_requests_that_reach_no_route_are_counted(small: SmallModel) -> None:
    owner = {"authorization": f"Bearer {_KEY}"}
    with running(make_session(small), rules=AccessRules(keys=(_KEY,))) as client:
        error_of(client.get("/v1/models"), 401)
        error_of(client.get("/v1/models", headers=owner | {"host": "evil.example"}), 403)
        error_of(client.get("/v1/any", headers=owner), 404)
        error_of(client.get("/v1/completions", headers=owner), 405)
        figures = client.get("/metrics", headers=owner).text
    for status in (401, 403, 404, 405):
        assert f'mlxroute_requests_total{{route="other",status="{status}"}} 1.0' in figures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_endpoint_whose_decoding_has_failed_is_not_healthy(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("gone")

    with running(make_session(small)) as client:
        endpoint = client.app.state.endpoint  # type: ignore[attr-defined]
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(endpoint.scheduler._device, "_take_turn", fail)
        error = error_of(client.post("/v1/chat/completions", json=chat()), 500)
        assert "restart the endpoint" in error["message"]
        assert "restart" in error_of(client.get("/health"), 503)["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", chat()),
        ("chat/completions", chat(stream=True)),
        ("completions", {"prompt": "the", "echo": True, "logprobs": 1, "max_tokens": 1}),
    ],
    ids=["whole", "stream", "scored"],
)
def test_the_error_behind_a_failed_answer_is_one_line_of_the_log(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[metal::malloc] cannot \x1b[2J allocate\n9 GB")

    lines: list[str] = []
    with running(make_session(small), notify=lambda line: lines.append(line)) as client:
        scheduler = client.app.state.endpoint.scheduler  # type: ignore[attr-defined]
        if "echo" in body:
            monkeypatch.setattr(scheduler, "score", fail)
        else:
            monkeypatch.setattr(scheduler._device, "_step_unbatched", fail)
        assert "see the server's output" in client.post(f"/v1/{path}", json=body).text
    (line,) = [line for line in lines if line.startswith("error")]
    assert line == "error: RuntimeError: [metal::malloc] cannot [2J allocate 9 GB"


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_whose_events_nobody_can_read_is_cancelled(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    def refuse(answer: ServedAnswer, loop: object) -> None:
        raise RuntimeError("can't start new thread")

    with running(make_session(small, max_tokens=400)) as client:
        scheduler = client.app.state.endpoint.scheduler  # type: ignore[attr-defined]
        started: list[RunningAnswer] = []
        submit = scheduler.submit

        def record(request: AnswerRequest) -> RunningAnswer:
            started.append(submit(request))
            return started[-1]

        monkeypatch.setattr(scheduler, "submit", record)
        monkeypatch.setattr(ServedAnswer, "start", refuse)
        error_of(client.post("/v1/chat/completions", json=chat(stream=is_stream)), 500)
        (answer,) = started
        assert answer.is_cancelled


def test_a_full_queue_says_when_to_come_back(small: SmallModel) -> None:
    limits = ServingLimits(max_running=1, max_queued=0)
    with running(make_session(small, max_tokens=400), limits=limits) as client:
        endpoint = client.app.state.endpoint  # type: ignore[attr-defined]
        session = endpoint.session
        request = AnswerRequest("the fox", session.make_router(None, None), session.options)
        busy = endpoint.scheduler.submit(request)
        response = client.post("/v1/chat/completions", json=chat(stream=True))
        error = error_of(response, 429)
        assert error["code"] == "queue_full"
        assert error["message"].startswith("1 running and 0 waiting answers are the limit")
        assert int(response.headers["retry-after"]) > 0
        busy.cancel()


def test_a_reply_that_has_answers_is_completed_whatever_the_queue_holds(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, body = ServingLimits(max_running=1, max_queued=0), {"prompt": ["the fox", "a dog"]}
    with running(make_session(small), limits=limits) as client:
        endpoint = client.app.state.endpoint  # type: ignore[attr-defined]
        session, scheduler, start = endpoint.session, endpoint.scheduler, endpoint.start
        other = AnswerRequest("def", session.make_router(None, None), session.options)

        def start_beside_another(asked: EndpointRequest) -> Any:
            if not asked.answer_id.endswith("-1"):
                return start(asked)
            while scheduler.figures().running:
                time.sleep(0.001)
            with held(scheduler):
                scheduler.submit(other)
                # A reply without answers is refused meanwhile.
                error_of(client.post("/v1/completions", json=body), 429)
                return start(asked)

        monkeypatch.setattr(endpoint, "start", start_beside_another)
        reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", chat()),
        ("chat/completions", chat(stream=True)),
        ("chat/completions", chat(tools=[{"type": "function"}])),
        ("completions", {"prompt": "the", "echo": True, "logprobs": 1, "model": "mlxroute:small"}),
    ],
    ids=["whole", "stream", "forwarded", "scored"],
)
def test_an_endpoint_that_ends_says_so(small: SmallModel, path: str, body: dict[str, Any]) -> None:
    limits, lines = ServingLimits(tools=ToolPolicyName.LARGE), list[str]()
    session = make_session(small, ScriptedLarge([]))
    with running(session, limits=limits, notify=lambda line: lines.append(line)) as client:
        client.app.state.endpoint.close()  # type: ignore[attr-defined]
        response = client.post(f"/v1/{path}", json=body)
        error = error_of(response, 503)
    assert (error["code"], error["message"]) == ("closing", "the endpoint is closing")
    assert int(response.headers["retry-after"]) > 0
    assert not lines


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_running": 0}, "max_running must be at least 1, not 0"),
        ({"max_queued": 1.5}, "max_queued must be an integer, not 1.5"),
        ({"cache_bytes": -1}, "cache_bytes must be at least 0, not -1"),
    ],
)
def test_limits_are_checked_under_their_own_names(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        ServingLimits(**limits)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    [
        *("model", "messages", "prompt", "n", "stop", "seed", "temperature", "top_p", "stream"),
        *("stream_options", "logprobs", "top_logprobs", "tools", "tool_choice", "budget"),
        *(
            "threshold",
            "mode",
            "local_only",
            "exact",
            "events",
            "response_format",
            "echo",
            "suffix",
        ),
        *(
            "max_tokens",
            "max_completion_tokens",
            "continue_final_message",
            "top_k",
            "min_p",
            "logit_bias",
        ),
    ]
)
_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": _JSON}),
    max_size=2,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["chat/completions", "completions"]),
    st.dictionaries(_NAMES, _JSON, max_size=3),
    st.booleans(),
    _MESSAGES,
)
def test_any_body_gives_a_reply_or_an_error_in_form(
    client: TestClient, path: str, fields: dict[str, Any], is_whole: bool, messages: list[Any]
) -> None:
    body = {"prompt": "the", **(chat() if is_whole else {"messages": messages}), "max_tokens": 1}
    response = client.post(f"/v1/{path}", content=json.dumps({**body, **fields}))
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        error_of(response, response.status_code)


@given(st.text(st.characters(codec=None), max_size=20))
def test_clean_text_has_no_lone_surrogates(text: str) -> None:
    cleaned = clean_text(text)
    cleaned.encode()
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert cleaned == text


def test_clients_do_not_learn_where_a_model_is() -> None:
    small = SimpleNamespace(name="/home/me/models/tiny", context_length=512, fingerprint="")
    session = ServingSession(small, None)  # type: ignore[arg-type]
    assert ModelNames(session, created=0).pair == "tiny"
    assert session.model_pair.small == "tiny"


@pytest.mark.parametrize(
    ("spec", "adapter", "is_hidden"),
    [
        ("qwen3-0.6b", None, False),
        ("some-org/tiny-model", None, False),
        ("/home/me/models/tiny", None, True),
        ("~/models/tiny", None, True),
        ("../tiny", None, True),
        ("qwen3-0.6b", "/home/me/adapter", True),
    ],
)
def test_clients_do_not_learn_where_files_of_a_session_are(
    spec: str, adapter: str | None, is_hidden: bool
) -> None:
    models = ModelPair(spec, spec, adapter, None, None)
    small = SimpleNamespace(name=spec, context_length=512, fingerprint="")
    session = ServingSession(small, None, find_models=lambda: models)  # type: ignore[arg-type]
    pair = session.model_pair
    assert (pair.small_spec, pair.adapter) == ((None, None) if is_hidden else (spec, adapter))
    assert pair.small == ("tiny" if spec.endswith("/tiny") else spec)
