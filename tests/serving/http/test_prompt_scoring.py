"""Scoring of prompts beside other requests, and for clients that leave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from mlxroute.serving.http.answer_endpoint import ServingLimits
from mlxroute.serving.http.endpoint_app import create_app
from mlxroute.serving.small_client import AnswerCancelled
from mlxroute.small import SmallModel
from tests.support.endpoint import call_until, chat, make_session, running

_PATH = "/v1/completions"
_SCORED = {"prompt": "the fox", "echo": True, "logprobs": 1, "max_tokens": 1}


async def _use_one_thread() -> None:
    """Leave the event loop one thread, which one request would occupy."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))


def test_another_answer_starts_while_prompts_are_scored(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, released = threading.Event(), threading.Event()
    with running(make_session(small)) as client, ThreadPoolExecutor(2) as clients:
        scheduler = client.app.state.endpoint.scheduler  # type: ignore[attr-defined]
        score = scheduler.score

        def held_score(*args: Any, **options: Any) -> Any:
            begun.set()
            assert released.wait(120)
            return score(*args, **options)

        monkeypatch.setattr(scheduler, "score", held_score)
        assert client.portal is not None
        client.portal.call(_use_one_thread)
        scored = clients.submit(client.post, _PATH, json=_SCORED)
        try:
            assert begun.wait(60)
            other = clients.submit(client.post, "/v1/chat/completions", json=chat())
            assert other.result(60).status_code == 200
        finally:
            released.set()
        assert scored.result(60).status_code == 200


def test_requests_that_wait_to_be_scored_fill_a_queue(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, released = threading.Event(), threading.Event()
    limits = ServingLimits(max_running=1, max_queued=1)
    with running(make_session(small), limits=limits) as client, ThreadPoolExecutor(3) as clients:
        scheduler = client.app.state.endpoint.scheduler  # type: ignore[attr-defined]
        score = scheduler.score

        def held_score(*args: Any, **options: Any) -> Any:
            begun.set()
            assert released.wait(120)
            return score(*args, **options)

        def ask() -> Future[Any]:
            return clients.submit(client.post, _PATH, json=_SCORED)

        monkeypatch.setattr(scheduler, "score", held_score)
        replies = [ask()]
        assert begun.wait(60)
        replies += [ask(), ask()]
        try:
            done, _ = wait(replies, timeout=10, return_when=FIRST_COMPLETED)
            (refused,) = (reply.result() for reply in done)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) > 0
        finally:
            released.set()
        assert sorted(reply.result(60).status_code for reply in replies) == [200, 200, 429]
        assert ask().result(60).status_code == 200


def test_a_client_that_leaves_ends_the_scoring_of_its_prompt(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()
    app = create_app(make_session(small))
    scheduler = app.state.endpoint.scheduler

    def endless_score(prompt: object, *, owner: str, is_stopped: Callable[[], bool]) -> None:
        begun.set()
        end_s = time.monotonic() + 60
        while not is_stopped() and time.monotonic() < end_s:
            time.sleep(0.01)
        if is_stopped():
            ended.set()
        raise AnswerCancelled

    monkeypatch.setattr(scheduler, "score", endless_score)
    asyncio.run(call_until(app, _SCORED, lambda data: begun.is_set(), path=_PATH))
    assert ended.wait(60)
    app.state.endpoint.close()
