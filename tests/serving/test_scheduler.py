"""Answers of the scheduler are those that the engine writes alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest

from mlxroute.backend.load import load
from mlxroute.engine import Options, generate
from mlxroute.routers import make_router
from mlxroute.serving import AnswerRequest, AnswerScheduler, PromptProgress, RunningAnswer
from mlxroute.small import SmallModel
from mlxroute.types import Message, StopReason, Token
from tests.support.tiny import make_tiny_model

_PROMPTS = ["the quick brown fox", "a lazy dog and a", "def main", "Thursday " * 20]
_TOKENS = 24


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    path = make_tiny_model(tmp_path_factory.mktemp("small") / "tiny")
    return SmallModel(*load(path), name="tiny")


@pytest.fixture
def scheduler(small: SmallModel) -> Iterator[AnswerScheduler]:
    with AnswerScheduler(small, None) as scheduler:
        yield scheduler


def messages(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def request(prompt: str, *, max_tokens: int = _TOKENS, exact: bool = False) -> AnswerRequest:
    router = make_router("entropy", threshold=math.inf)
    return AnswerRequest(messages(prompt), router, Options(max_tokens=max_tokens), exact=exact)


def written(answer: RunningAnswer) -> list[int]:
    return [event.token_id for event in answer.events() if isinstance(event, Token)]


def alone(small: SmallModel, prompt: str, *, max_tokens: int = _TOKENS) -> list[int]:
    router = make_router("entropy", threshold=math.inf)
    own = small.with_own_cache()
    answer = generate(own, None, messages(prompt), router=router, max_tokens=max_tokens)
    return [token.token_id for token in answer]


def test_one_answer_is_decoded_as_one_row(scheduler: AnswerScheduler, small: SmallModel) -> None:
    answer = scheduler.submit(request(_PROMPTS[0]))
    events = list(answer.events())
    assert [e.token_id for e in events if isinstance(e, Token)] == alone(small, _PROMPTS[0])
    assert any(isinstance(event, PromptProgress) for event in events)
    figures = answer.stats()
    assert figures.run is not None
    assert figures.run.finish_reason is not StopReason.CANCELLED
    assert not figures.batched
    assert scheduler.figures().batched_tokens == 0


@pytest.mark.parametrize("exact", [False, True])
def test_answers_of_a_batch_are_what_each_would_be_alone(
    scheduler: AnswerScheduler, small: SmallModel, exact: bool
) -> None:
    answers = [scheduler.submit(request(prompt, exact=exact)) for prompt in _PROMPTS]
    assert [written(answer) for answer in answers] == [alone(small, p) for p in _PROMPTS]
    assert any(answer.stats().batched for answer in answers)


def test_no_thread_is_left(small: SmallModel) -> None:
    before = threading.active_count()
    scheduler = AnswerScheduler(small, None)
    answers = [scheduler.submit(request(prompt, max_tokens=400)) for prompt in _PROMPTS]
    scheduler.close()
    assert all(answer.ended for answer in answers)
    assert threading.active_count() == before
