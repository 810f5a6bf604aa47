"""A small model with random weights, and large models whose replies a test releases."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from mlxroute.backend.load import load
from mlxroute.engine import Options, generate
from mlxroute.errors import LargeError
from mlxroute.routers import make_router
from mlxroute.serving import AnswerRequest, AnswerScheduler, RunningAnswer
from mlxroute.serving.prompts import encode_prompt
from mlxroute.serving.small_client import Invoke
from mlxroute.small import SmallModel
from mlxroute.types import LargeContext, LargeToken, Message, Mode, Sampling, Token, Uploads
from tests.support.tiny import make_tiny_model

PROMPTS = ["the quick brown fox", "a lazy dog and a", "def main", "Thursday " * 20]
TOKENS = 16


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    path: Path = make_tiny_model(tmp_path_factory.mktemp("serving") / "tiny")
    return SmallModel(*load(path), name="tiny")


@pytest.fixture
def scheduler(small: SmallModel) -> Iterator[AnswerScheduler]:
    with AnswerScheduler(small, None) as scheduler:
        yield scheduler


def messages(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def request(
    prompt: str,
    *,
    max_tokens: int = TOKENS,
    threshold: float = math.inf,
    mode: Mode = Mode.AUTO,
    sampling: Sampling | None = None,
    local_only: bool = False,
    exact: bool = False,
) -> AnswerRequest:
    options = Options(max_tokens=max_tokens, mode=mode, sampling=sampling or Sampling())
    router = make_router("entropy", threshold=threshold)
    return AnswerRequest(messages(prompt), router, options, local_only=local_only, exact=exact)


def written(answer: RunningAnswer) -> list[int]:
    """Wait for an answer; return its token ids."""
    return [event.token_id for event in answer.events() if isinstance(event, Token)]


def alone(
    small: SmallModel,
    prompt: str,
    *,
    large: ReleasedLarge | None = None,
    threshold: float = math.inf,
    **options: Any,
) -> list[int]:
    """Return the token ids of an answer that `generate` writes alone, once for each model."""
    known = _ALONE.setdefault(small, {})
    key = (prompt, large and large.choose, threshold, *sorted(options.items()))
    if key not in known:
        known[key] = _write_alone(small, prompt, large, threshold, options)
    return list(known[key])


_ALONE: WeakKeyDictionary[SmallModel, dict[tuple[Any, ...], list[int]]] = WeakKeyDictionary()


def _write_alone(
    small: SmallModel,
    prompt: str,
    large: ReleasedLarge | None,
    threshold: float,
    options: dict[str, Any],
) -> list[int]:
    router = make_router("entropy", threshold=threshold)
    own = small.with_own_cache()
    options = {"max_tokens": TOKENS, **options}
    answer = generate(own, large, messages(prompt), router=router, **options)
    return [token.token_id for token in answer]


@contextmanager
def held(scheduler: AnswerScheduler) -> Iterator[None]:
    """Stop the thread of the device in the `with` block, so that what is submitted meets there."""
    device = scheduler._device
    client = device.new_client(encode_prompt(scheduler._small, "held"))
    entered, ended = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert ended.wait(30)

    device.post(client, Invoke(wait))
    assert entered.wait(30)
    try:
        yield
    finally:
        ended.set()


class ReleasedLarge:
    """A large model that replies with `choose(context)`, at once or when the test says so."""

    is_local = False
    max_in_flight = 8
    model_name = "released"

    def __init__(
        self, choose: Callable[[LargeContext], int | LargeError], *, holds: bool = False
    ) -> None:
        self.choose = choose
        self._holds = holds
        self._changed = threading.Condition()
        self.calls: list[ReleasedCall] = []
        self.uploads = Uploads()

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> ReleasedCall:
        call = ReleasedCall(self.choose(context), is_ready=not self._holds)
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        return call

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(ready, timeout_s)

    def await_calls(self, count: int) -> None:
        """Block until `count` calls have been made."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, 30)

    def release(self) -> None:
        """Let all calls, and later ones, reply."""
        with self._changed:
            self._holds = False
            for call in self.calls:
                call.is_ready = True
            self._changed.notify_all()


class ReleasedCall:
    """A call of a `ReleasedLarge`."""

    def __init__(self, outcome: int | LargeError, *, is_ready: bool) -> None:
        self._outcome = outcome
        self.is_ready = is_ready
        self.is_cancelled = False

    @property
    def ready(self) -> bool:
        return self.is_ready

    finished = ready

    def result(self) -> tuple[LargeToken, ...]:
        if isinstance(self._outcome, LargeError):
            raise self._outcome
        return (_large_token(self._outcome),)

    def cancel(self) -> None:
        self.is_cancelled = True


def _large_token(token_id: int) -> LargeToken:
    return LargeToken(
        token_ids=(token_id,),
        text="",
        is_eos=False,
        logprob=-0.1,
        top=(),
        prompt_tokens=None,
        cached_tokens=None,
        completion_tokens=1,
        uploaded_bytes=10,
        latency_s=0.0,
    )


def choose_by_text(ids: Sequence[int]) -> int:
    """Return a token that depends on all the ids before it."""
    return 60 + sum(ids) % 40
