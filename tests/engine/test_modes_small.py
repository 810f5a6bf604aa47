"""The modes over real caches: plain, sliding windows, states that cannot be rolled back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from mlxroute.backend.load import load
from mlxroute.engine import Answer, Options
from mlxroute.errors import UsageError
from mlxroute.routers import Threshold
from mlxroute.small import SmallModel
from mlxroute.types import (
    LargeContext,
    LargeToken,
    Mode,
    RunStats,
    Sampling,
    Signals,
    Token,
    Uploads,
)
from tests.support.scripted_models import FakeCall, FakeClock
from tests.support.tiny import KINDS, WINDOW, make_tiny_model
from tests.support.worlds import token_of


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = tmp_path_factory.mktemp(kind) / kind
    return load(make_tiny_model(path, model_type=kind, extra=KINDS[kind]))


class RandomRouter:
    """A router that escalates about half of the positions, whatever the entropies are."""

    def __init__(self) -> None:
        self.state = Threshold(0.5)
        self.gain = 1.0

    def score(self, signals: Signals, number: int) -> float:
        # What is told by order alone, a batch does not round.
        return float(random.Random(str(signals.top_ids)).random() < 0.5)


class RandomLarge:
    """A large model that often agrees with the small one, and answers after random times."""

    def __init__(self, oracle: SmallModel, clock: FakeClock) -> None:
        self._oracle = oracle
        self._clock = clock
        self._order = random.Random(1)
        self._calls: list[FakeCall] = []
        self.uploads = Uploads()

    @property
    def is_local(self) -> bool:
        return False

    @property
    def max_in_flight(self) -> int:
        return 4

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> FakeCall:
        dice = random.Random(str(list(context.token_ids)))
        own = self._oracle.prefill(context.token_ids)[0].token_id
        token: LargeToken = token_of((own if dice.random() < 0.5 else dice.randrange(200),))
        ready_s = self._clock.now + self._order.random()
        self._calls.append(FakeCall(token, ready_s=ready_s, clock=self._clock))
        return self._calls[-1]

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        if not ready():
            self._clock.now = min(call.ready_s for call in self._calls if not call.ready)


def run(
    loaded: tuple[Any, Any], mode: Mode, sampling: Sampling
) -> tuple[list[Token], list[int], RunStats]:
    small, clock = SmallModel(*loaded, name="small"), FakeClock()
    answer = Answer(
        small,
        RandomLarge(SmallModel(*loaded, name="oracle"), clock),
        [{"role": "user", "content": "hi"}],
        router=RandomRouter(),
        options=Options(max_tokens=28, mode=mode, sampling=sampling),
        clock=clock,
    )
    tokens = list(answer)
    prompt = list(small.encode_conversation([{"role": "user", "content": "hi"}]).ids)
    assert list(small.cached_ids[: len(prompt)]) == prompt
    return tokens, list(small.cached_ids[len(prompt) :]), answer.stats()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_overlap_writes_what_wait_writes_over_every_kind_of_cache(
    loaded: tuple[Any, Any], kind: str, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, seed=3)
    waited, cached, _ = run(loaded, Mode.WAIT, sampling)
    overlapped, overlap_cached, stats = run(loaded, Mode.OVERLAP, sampling)
    ids = [token.token_id for token in waited]
    assert [token.token_id for token in overlapped] == ids
    assert [token.signals for token in overlapped] == [token.signals for token in waited]
    assert cached == overlap_cached == ids[:-1]
    assert stats.escalated > 5
    # A window is given back until it is full, a state of a convolution never.
    assert stats.held == (kind != "llama")


def test_hedge_writes_what_wait_writes_over_every_kind_of_cache(
    loaded: tuple[Any, Any], kind: str
) -> None:
    waited, cached, plain = run(loaded, Mode.WAIT, Sampling())
    hedged, hedge_cached, stats = run(loaded, Mode.HEDGE, Sampling())
    ids = [token.token_id for token in waited]
    assert [token.token_id for token in hedged] == ids
    assert cached == hedge_cached == ids[:-1]
    assert stats.escalated == plain.escalated > 5


def test_rows_of_a_batch_are_what_each_would_be_alone(loaded: tuple[Any, Any], kind: str) -> None:
    small, alone = (SmallModel(*loaded, name="small") for _ in range(2))
    prompt = list(range(5, 15))
    if kind == "lfm2":
        small.prefill(prompt)
        assert small.max_rows == 1
        return
    small.prefill(prompt)
    assert small.max_rows > 3
    batch = small.branch([0, 0, 0], [20, 21, 22])
    batch = small.branch([2, 0], [30, 31])
    for tail, row in zip(([22, 30], [20, 31]), batch, strict=True):
        alone.prefill(prompt)
        alone.step(tail[0])
        same = alone.step(tail[1])
        assert row.top_ids == same.top_ids
        assert row.entropy_nats == pytest.approx(same.entropy_nats, abs=1e-4)
    small.select(0)
    assert list(small.cached_ids) == [*prompt, 22, 30]
    small.rollback(1)
    assert small.step(30).token_id == batch[0].token_id
    cost = small.measure_branch_cost(31, rows=3)
    assert cost.step_s > 0
    assert 0 < cost.rounding_nats < 1e-2
    assert list(small.cached_ids) == [*prompt, 22, 30]


def test_a_plain_cache_can_always_be_rolled_back_and_a_full_window_not(
    loaded: tuple[Any, Any], kind: str
) -> None:
    small = SmallModel(*loaded, name="small")
    small.prefill(list(range(5, 15)))
    assert small.can_rollback(1) == (kind != "lfm2")
    assert small.can_rollback(WINDOW) == (kind == "llama")


def test_prompts_of_different_lengths_are_continued_as_one_batch(
    loaded: tuple[Any, Any], kind: str
) -> None:
    small, alone = (SmallModel(*loaded, name="small") for _ in range(2))
    prompts = [list(range(5, 15)), list(range(40, 45))]
    firsts, copies = zip(*(small.prefill_copy(prompt) for prompt in prompts), strict=True)
    tails = small.continue_greedily(
        [(copy, first.token_id) for copy, first in zip(copies, firsts, strict=True)],
        max_tokens=[3, 2],
    )
    for prompt, first, tail in zip(prompts, firsts, tails, strict=True):
        signals, _ = alone.prefill(prompt)
        assert signals.top_ids == first.top_ids
        for token_id in tail:
            signals = alone.step(signals.token_id)
            assert signals.token_id == token_id
    assert list(map(len, tails)) == [3, 2]
    # The model's own cache is not touched by the batch.
    assert list(small.cached_ids) == prompts[1]
    if kind == "llama":
        assert small.copy_cache(3)
    else:
        with pytest.raises(UsageError, match="plain KV caches"):
            small.copy_cache(3)
