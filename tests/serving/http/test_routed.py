"""Answers with a large model: what replies say of it, failures, and clients that leave."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlxroute.answers.document_file import parse_document
from mlxroute.engine import Answer, Options
from mlxroute.errors import LargeRefused, LargeUnavailable, LargeUnreachable
from mlxroute.serving import PromptProgress, RunningAnswer
from mlxroute.serving.http.answer_endpoint import ServingLimits
from mlxroute.serving.http.endpoint_app import create_app
from mlxroute.serving.requests import ServedEvent
from mlxroute.small import SmallModel
from mlxroute.types import LargeContext, LargeToken, Mode
from tests.support.endpoint import call_until, chat, make_session, read_stream, running
from tests.support.scripted_models import ScriptedLarge

_X = 40
_ALWAYS = {"threshold": "-inf"}


class _NeverReady:
    ready = finished = False

    def __init__(self) -> None:
        self.cancelled = False

    def result(self) -> tuple[LargeToken, ...]:
        raise AssertionError("it is never ready")

    def cancel(self) -> None:
        self.cancelled = True


class HangingLarge(ScriptedLarge):
    """A large model whose calls end only when they are cancelled."""

    def __init__(self) -> None:
        super().__init__([(_X,)])
        self.hanging: list[_NeverReady] = []

    def begin(  # type: ignore[override]
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> _NeverReady:
        self.hanging.append(_NeverReady())
        return self.hanging[-1]

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        time.sleep(min(timeout_s, 0.01))


@pytest.fixture
def large() -> ScriptedLarge:
    return ScriptedLarge([(_X,)])


@pytest.fixture
def routed(small: SmallModel, large: ScriptedLarge) -> Iterator[TestClient]:
    with running(make_session(small, large)) as client:
        yield client


def post(client: TestClient, body: dict[str, Any]) -> Any:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_each_token_names_the_model_that_it_is_from(
    routed: TestClient, large: ScriptedLarge
) -> None:
    reply = post(routed, chat(logprobs=True, top_logprobs=1, max_tokens=4, **_ALWAYS))
    assert reply["model"] == "tiny+scripted"
    entries = reply["choices"][0]["logprobs"]["content"]
    assert [entry["source"] for entry in entries] == ["large"] * 4
    for entry in entries:
        assert entry["logprob"] == -0.5
        assert entry["decision"] in ("replaced", "agreed")
        assert (entry["unchecked_reason"], entry["prefetched"]) == (None, False)
        assert entry["large"]["ids"] == [_X]
        assert "id" in entry["small"]
    summary = reply["mlxroute"]
    assert summary["escalated"] == summary["large_tokens"] == 4
    assert summary["escalation_rate"] == 1.0
    assert summary["calls"] == len(large.contexts)
    assert reply["usage"]["mlxroute"]["escalated"] == 4
    document = routed.get(f"/v1/mlxroute/answers/{reply['id']}").json()
    assert [token["source"] for token in document["tokens"]] == ["large"] * 4
    assert document["replies"]


@pytest.mark.parametrize("fields", [{"model": "mlxroute:small", **_ALWAYS}, {"local_only": True}])
def test_a_local_answer_calls_nothing(
    routed: TestClient, large: ScriptedLarge, fields: dict[str, Any]
) -> None:
    reply = post(routed, chat(**fields))
    assert large.contexts == []
    summary = reply["mlxroute"]
    assert (summary["large"], summary["escalated"], summary["unchecked"]) == (None, 0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "mlxroute:small", "budget": 0.5, "mode": "wait"},
        {"model": "mlxroute:large", "threshold": 1.0, "mode": "wait"},
        {"local_only": True, "budget": 0.5},
        {"top_logprobs": 3, "events": True, "stream_options": {"include_usage": True}},
    ],
)
def test_fields_without_effect_are_named(routed: TestClient, fields: dict[str, Any]) -> None:
    reply = post(routed, chat(**fields))
    assert reply["mlxroute"]["ignored"] == sorted(fields.keys() - {"model", "local_only"})


def test_an_echo_without_an_answer_calls_nothing(routed: TestClient, large: ScriptedLarge) -> None:
    body = {"prompt": "the fox", "echo": True, "max_tokens": 0, **_ALWAYS}
    reply = routed.post("/v1/completions", json=body).json()
    assert reply["choices"][0]["text"] == "the fox"
    summary = reply["mlxroute"]
    assert (summary["tokens"], summary["escalated"], summary["calls"]) == (0, 0, 0)
    assert large.contexts == []


def test_the_large_model_does_not_answer_locally(routed: TestClient) -> None:
    body = chat(model="mlxroute:large", local_only=True)
    response = routed.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "local_only")
    assert "ask tiny+scripted:small" in response.json()["error"]["message"]


def test_the_large_model_alone(routed: TestClient) -> None:
    reply = post(routed, chat(model="mlxroute:large", max_tokens=3))
    assert reply["model"] == "tiny+scripted:large"
    assert reply["mlxroute"]["large_tokens"] == 3


def test_figures_for_prometheus(routed: TestClient) -> None:
    for _ in range(2):
        post(routed, chat("the quick brown fox " * 20, max_tokens=4, **_ALWAYS))
    lines = routed.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['mlxroute_answers_total{finish_reason="length",model="routed"}'] == "2.0"
    assert values['mlxroute_tokens_total{source="large"}'] == "8.0"
    assert values["mlxroute_escalations_total"] == values["mlxroute_large_calls_total"] == "8.0"
    assert values["mlxroute_cache_hits_total"] == values["mlxroute_cache_misses_total"] == "1.0"
    assert float(values["mlxroute_cached_prompt_tokens_total"]) > 0
    assert values["mlxroute_running"] == values["mlxroute_queued"] == "0.0"


def test_the_page_on_the_endpoint_names_every_figure(routed: TestClient) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")
    section = page.split("## Figures for Prometheus")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(\w+)`", section)) - {"mlxroute_"}
    lines = routed.get("/metrics").text.splitlines()
    named = {line.split()[2].removeprefix("mlxroute_") for line in lines if "# TYPE" in line}
    assert documented == {name for name in named if not name.endswith("_created")}


def test_a_budget_of_a_request_is_kept(routed: TestClient) -> None:
    none = post(routed, chat(budget=0))
    assert none["mlxroute"]["escalated"] == 0
    some = post(routed, chat(budget="50%"))
    assert 0 < some["mlxroute"]["escalated"] <= 0.5 * some["mlxroute"]["tokens"] + 4


def test_a_large_model_that_is_down_leaves_marks(small: SmallModel) -> None:
    down = ScriptedLarge([LargeUnreachable("no connection\x1b[2J")])
    lines: list[str] = []
    with running(make_session(small, down), notify=lambda line: lines.append(line)) as client:
        reply = post(client, chat(logprobs=True, max_tokens=3, **_ALWAYS))
        entries = reply["choices"][0]["logprobs"]["content"]
        assert [entry["source"] for entry in entries] == ["small"] * 3
        assert not any(entry["checked"] for entry in entries)
        assert all("no connection" in entry["unchecked_reason"] for entry in entries)
        summary = reply["mlxroute"]
        assert (summary["escalated"], summary["unchecked"]) == (0, 3)
        assert summary["failures"][0]["kind"] == "unreachable"
        assert "3 unchecked (unreachable)" in lines[-1]


def test_a_prompt_that_is_too_long_is_one_failure_of_all_its_positions(small: SmallModel) -> None:
    refusal = LargeRefused("this exceeds the available context size", status=400)
    lines: list[str] = []
    session = make_session(small, ScriptedLarge([refusal]))
    with running(session, notify=lambda line: lines.append(line)) as client:
        summary = post(client, chat(max_tokens=3, **_ALWAYS))["mlxroute"]
    assert summary["failures"] == [{"kind": "status 400", "reason": str(refusal), "positions": 3}]
    assert "3 unchecked (status 400)" in lines[-1]


def test_a_strict_endpoint_fails_in_form(small: SmallModel) -> None:
    down = ScriptedLarge([(_X,), LargeUnreachable("no connection")])
    session = make_session(small, down)
    object.__setattr__(session, "options", _strict(session.options))
    with running(session) as client:
        response = client.post("/v1/chat/completions", json=chat(**_ALWAYS))
        assert response.status_code == 502
        assert response.headers["x-should-retry"] == "false"
        assert response.json()["error"]["code"] == "large_model_failed"
        body = chat(stream=True, **_ALWAYS)
        events = read_stream(client.post("/v1/chat/completions", json=body).text)
        assert events[-1]["error"]["code"] == "large_model_failed"
        reasons = [c["finish_reason"] for e in events if "choices" in e for c in e["choices"]]
        assert set(reasons) == {None}


@pytest.mark.parametrize("is_stream", [False, True])
def test_log_and_figures_say_that_the_large_model_has_failed(
    small: SmallModel, is_stream: bool
) -> None:
    refusal = LargeRefused("the server answered 400: a private text", status=400)
    session = make_session(small, ScriptedLarge([(_X,), refusal]))
    object.__setattr__(session, "options", _strict(session.options))
    lines: list[str] = []
    with running(session, notify=lambda line: lines.append(line)) as client:
        client.post("/v1/chat/completions", json=chat(stream=is_stream, **_ALWAYS))
        figures = client.get("/metrics").text
    assert 'mlxroute_answers_total{finish_reason="error",model="routed"} 1.0' in figures
    answer, error = lines
    assert answer.endswith("ended by an error")
    assert error == "error: the large model failed (status 400)"


def test_a_strict_answer_that_cost_no_call_may_be_asked_for_again(small: SmallModel) -> None:
    session = make_session(small, ScriptedLarge([LargeUnavailable("calls are paused")]))
    object.__setattr__(session, "options", _strict(session.options))
    with running(session) as client:
        response = client.post("/v1/chat/completions", json=chat(**_ALWAYS))
        assert response.status_code == 502
        assert "x-should-retry" not in response.headers


def test_the_log_has_each_warning_of_a_session_once(
    small: SmallModel, large: ScriptedLarge, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = Answer.stats
    monkeypatch.setattr(
        Answer, "stats", lambda answer: replace(stats(answer), held=True, advice="use it alone")
    )
    large.neutralised = ("<|private|>",)
    lines: list[str] = []
    with running(make_session(small, large), notify=lambda line: lines.append(line)) as client:
        for _ in range(2):
            post(client, chat(max_tokens=1))
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert "scripted would read 1 name as control tokens" in warnings[0]
    assert "the KV cache of tiny cannot be rolled back" in warnings[1]
    assert warnings[2] == "warning: use it alone"
    assert not any("private" in line for line in lines)


def test_positions_kept_local_are_no_calls_of_no_time(
    small: SmallModel, large: ScriptedLarge
) -> None:
    session = make_session(small, large)
    options = replace(session.options, never_send=(re.compile("secret"),))
    object.__setattr__(session, "options", options)
    lines: list[str] = []
    with running(session, notify=lambda line: lines.append(line)) as client:
        assert post(client, chat("a secret", max_tokens=1, **_ALWAYS))["mlxroute"]["withheld"] > 0
        assert lines[-1].endswith("in 0 calls, 1 unchecked (withheld), ended by length")
        assert "mlxroute_large_call_seconds_count 0.0" in client.get("/metrics").text
        calls = post(client, chat("hi", max_tokens=3, **_ALWAYS))["mlxroute"]["calls"]
        assert f"mlxroute_large_call_seconds_count {calls}.0" in client.get("/metrics").text


def _strict(options: Any) -> Any:
    return replace(options, strict=True)


def test_a_silent_stream_is_kept_alive(small: SmallModel) -> None:
    hanging = HangingLarge()
    limits = ServingLimits(keep_alive_s=0.05)
    app = create_app(make_session(small, hanging), limits=limits)
    received: list[bytes] = []

    def on_body(data: bytes) -> bool:
        received.append(data)
        return b"".join(received).count(b": keep-alive\n\n") >= 2

    asyncio.run(call_until(app, chat(stream=True, **_ALWAYS), on_body))
    assert b"".join(received).startswith(b"data: ")
    app.state.endpoint.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat(stream=True)),
        ("/v1/completions", {"prompt": "the fox", "stream": True}),
    ],
)
def test_events_that_a_stream_does_not_show_do_not_keep_it_silent(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    app = create_app(make_session(small), limits=ServingLimits(keep_alive_s=1.0))
    received: list[bytes] = []
    plain = RunningAnswer.events

    def is_kept_alive() -> bool:
        return b": keep-alive\n\n" in received

    def events(running: RunningAnswer) -> Iterator[ServedEvent]:
        end_s = time.monotonic() + 5.0
        while not is_kept_alive() and time.monotonic() < end_s:
            yield PromptProgress(0, 1)
            time.sleep(0.02)
        yield from plain(running)

    def on_body(data: bytes) -> bool:
        received.append(data)
        return is_kept_alive() or not data

    monkeypatch.setattr(RunningAnswer, "events", events)
    asyncio.run(call_until(app, body, on_body, path=path))
    assert is_kept_alive()
    app.state.endpoint.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer_and_its_calls(
    small: SmallModel, stream: bool
) -> None:
    hanging, before = HangingLarge(), set(threading.enumerate())
    app = create_app(make_session(small, hanging), limits=ServingLimits(keep_alive_s=0.05))
    asyncio.run(call_until(app, chat(stream=stream, **_ALWAYS), lambda data: bool(hanging.hanging)))
    endpoint = app.state.endpoint
    deadline_s = time.monotonic() + 5
    while endpoint.scheduler.figures().running and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert endpoint.scheduler.figures().running == 0
    assert all(call.cancelled for call in hanging.hanging)
    endpoint.close()
    new = set(threading.enumerate()) - before
    own = [thread for thread in new if thread.name.startswith("mlxroute")]
    for thread in own:
        thread.join(5)
    assert not any(thread.is_alive() for thread in own)


def test_concurrent_answers_count_their_own_calls(small: SmallModel, large: ScriptedLarge) -> None:
    with running(make_session(small, large)) as client:
        replies: list[Any] = []
        bodies = [chat(max_tokens=n, **_ALWAYS) for n in (2, 4, 6)]
        threads = [
            threading.Thread(target=lambda body=body: replies.append(post(client, body)))
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = sorted(reply["mlxroute"]["large_tokens"] for reply in replies)
        assert counts == [2, 4, 6]
        total = sum(reply["mlxroute"]["uploaded_bytes"] for reply in replies)
        assert total <= large.uploads.size_bytes
    assert math.isfinite(total)


def test_an_echo_with_logprobs_is_the_small_models(routed: TestClient) -> None:
    body = {"prompt": "the fox", "echo": True, "logprobs": 1, "max_tokens": 1}
    response = routed.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "echo"
    small = {**body, "model": "mlxroute:small"}
    assert routed.post("/v1/completions", json=small).status_code == 200


def test_the_limit_on_calls_is_that_of_the_requests_mode(small: SmallModel) -> None:
    session = make_session(small, ScriptedLarge([(_X,)] * 8))
    limits = {Mode.AUTO: 1.5, Mode.HEDGE: None}

    def limit_calls(options: Options) -> Options:
        return replace(options, call_ceiling=limits[options.mode])

    session = replace(session, adapt_options=limit_calls)
    with running(session) as client:
        for mode, limit in limits.items():
            reply = post(client, chat(mode=mode, max_tokens=2, **_ALWAYS))
            data = client.get(f"/v1/mlxroute/answers/{reply['id']}").content
            assert parse_document(data).options.call_ceiling == limit
