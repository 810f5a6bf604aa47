"""Every way of spending the wait writes the same answer: random worlds, delays and losses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.engine import Answer, Experience, Options
from mlxroute.engine.experience import MovingAverage
from mlxroute.errors import LargeError
from mlxroute.routers import EntropyRouter
from mlxroute.types import Event, Mode, Provisional, Retracted, RunStats, Source, Token
from tests.support.fakes import FakeClock, signals
from tests.support.worlds import World, WorldLarge, WorldSmall

_MESSAGES = [{"role": "user", "content": "hi"}]
_PROMPT = "[user]hi>"
_OPTIONS: dict[str, Any] = {
    "max_tokens": 40,
    "timeout_s": 10_000.0,
    "mode": Mode.WAIT,
    "prefetch": 0,
}
_SAME = (
    *("text", "tokens", "large_tokens", "escalated", "agreed", "fallbacks", "unchecked"),
    *("withheld", "finish_reason"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """An answer to its end, and what is left of it."""

    events: list[Event]
    stats: RunStats
    fed: list[int]
    seconds: float

    @property
    def tokens(self) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token)]


def run(world: World, *, order: int = 0, budget: float | None = None, **options: Any) -> Run:
    clock = FakeClock()
    small = WorldSmall(world, clock)
    large = WorldLarge(world, clock, prompt=_PROMPT, order=order)
    answer = Answer(
        small,
        large,
        _MESSAGES,
        router=EntropyRouter(1.0) if budget is None else EntropyRouter(budget=budget),
        options=Options(**(_OPTIONS | options)),
        experience=experience(),
        clock=clock,
    )
    events = list(answer.events())
    assert all(f.finished and f.settled for f in large.flights), "a call was left behind"
    assert answer.stats().calls == len(large.flights)
    return Run(events, answer.stats(), list(small.fed), clock.now)


def experience() -> Experience:
    """Calls were slow until now, so that `auto` begins with branches."""
    return Experience(
        step_s=MovingAverage(1.0, 3),
        call_s=MovingAverage(30.0, 3),
        call_slowdown=MovingAverage(1.0, 9),
    )


def record(token: Token, *, rounded: bool = False) -> Token:
    """A token without what depends on time and on the way it was asked for.

    With `rounded` without what a batch computes otherwise, too.
    """
    if rounded:
        token = replace(token, signals=signals(token.token_id), score=0.0, threshold=0.0)
    escalation = token.escalation
    if escalation is not None:
        escalation = replace(escalation, latency_s=0.0, prefetched=False)
    return replace(token, escalation=escalation, time_s=0.0)


def check_events(events: Sequence[Event]) -> None:
    """What was shown early came true or was taken back, before anything else took its place."""
    shown: dict[int, Provisional] = {}
    committed = -1
    for event in events:
        match event:
            case Provisional():
                assert event.index > max([committed, *shown])
                shown[event.index] = event
            case Retracted():
                assert any(index >= event.index for index in shown)
                shown = {index: item for index, item in shown.items() if index < event.index}
            case Token():
                assert event.index > committed
                committed = event.index
                early = shown.pop(event.index, None)
                if early is not None:
                    assert early.token_id == event.token_id
                    assert early.text.startswith(event.text)


def check_cache(run: Run) -> None:
    """The cache holds the answer but for what was committed last: one token, or of a large one."""
    last = next(i for i in range(1, 9) if len(run.fed) + i == run.stats.tokens)
    ids = [token.token_id for token in run.tokens]
    assert run.fed[: len(ids)] == ids[: len(run.fed)]
    assert last == 1 or run.tokens[-last].source is Source.LARGE


_WORLDS = st.builds(
    World,
    seed=st.integers(0, 1 << 30),
    doubt=st.sampled_from([0.1, 0.4, 1.0]),
    agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    end=st.sampled_from([0.0, 0.03, 0.2]),
    loss=st.sampled_from([0.0, 0.1, 0.5]),
    longest_s=st.sampled_from([0.0, 3.0, 30.0]),
    cap=st.sampled_from([1, 2, 8]),
    whole_only=st.booleans(),
    rounding=st.sampled_from([0.0, 0.1, 0.5]),
    window=st.sampled_from([1 << 30, 1 << 30, 9, 0]),
    streams=st.booleans(),
)


@settings(max_examples=300)
@given(
    world=_WORLDS,
    order=st.integers(0, 1 << 30),
    stop=st.sampled_from([(), ("ab",), ("a.a", "bb"), ("é.",)]),
    max_tokens=st.sampled_from([1, 2, 17, 40]),
    never_send=st.sampled_from([(), (re.compile(r"b\.b"),)]),
    prefetch=st.sampled_from([1, 4, 8]),
    budget=st.sampled_from([None, None, 0.1, 0.4]),
)
def test_the_answer_is_the_same_in_every_mode_whenever_and_in_whatever_order_calls_land(
    world: World, order: int, prefetch: int, **options: Any
) -> None:
    wanted = run(world, **options)
    check_cache(wanted)
    for mode in Mode:
        rounded = mode in (Mode.HEDGE, Mode.AUTO)
        records = [record(token, rounded=rounded) for token in wanted.tokens]
        for ahead in (0, prefetch):
            got = run(world, order=order, mode=mode, prefetch=ahead, **options)
            assert [record(token, rounded=rounded) for token in got.tokens] == records
            for name in _SAME:
                assert getattr(got.stats, name) == getattr(wanted.stats, name), name
            # Of a large token of several ids at the end, overlap may have fed all but the last.
            assert got.fed[: len(wanted.fed)] == wanted.fed
            check_cache(got)
            check_events(got.events)
            assert got.stats.prefetch_used <= got.stats.prefetch_generated
            if not ahead:
                assert not any(t.escalation.prefetched for t in got.tokens if t.escalation)


def test_wait_shows_nothing_early() -> None:
    events = run(World(3)).events
    assert all(isinstance(event, Token) for event in events)


def test_overlap_asks_again_without_waiting_and_takes_less_time() -> None:
    world = World(5, agreement=1.0, loss=0.0, end=0.0)
    waited, overlapped = run(world), run(world, mode=Mode.OVERLAP)
    assert overlapped.stats.calls == waited.stats.calls
    assert overlapped.stats.retracted == 0
    assert overlapped.stats.stall_s < 0.2 * waited.stats.stall_s
    assert overlapped.seconds < waited.seconds


def test_a_disagreement_takes_back_what_was_built_on_the_small_token() -> None:
    world = World(5, agreement=0.0, loss=0.0, end=0.0, doubt=0.2)
    overlapped = run(world, mode=Mode.OVERLAP)
    assert overlapped.stats.retracted > 0
    assert any(isinstance(event, Retracted) for event in overlapped.events)
    assert overlapped.stats.calls > overlapped.stats.escalated


def test_hedge_keeps_the_branch_that_the_large_model_chose() -> None:
    worlds = [World(i, agreement=0.0, loss=0.0, end=0.0, doubt=0.2, longest_s=20) for i in range(9)]
    overlapped, hedged = (
        [run(w, mode=mode) for w in worlds] for mode in (Mode.OVERLAP, Mode.HEDGE)
    )
    assert sum(r.seconds for r in hedged) < 0.95 * sum(r.seconds for r in overlapped)


def test_the_likeliest_way_is_asked_first_where_calls_are_few() -> None:
    sure = World(0, agreement=1.0, loss=0.0, end=0.0, doubt=0.3, longest_s=20, cap=2)
    worlds = [replace(sure, seed=i) for i in range(9)]
    overlapped, hedged = (
        [run(w, mode=mode) for w in worlds] for mode in (Mode.OVERLAP, Mode.HEDGE)
    )
    # Here the other ways are all in vain, and a batch takes half as long again.
    assert sum(r.seconds for r in hedged) < 1.3 * sum(r.seconds for r in overlapped)


def test_what_a_batch_may_have_rounded_to_another_decision_is_decoded_again() -> None:
    world = World(5, loss=0.0, end=0.0, rounding=0.3)
    assert run(world, mode=Mode.HEDGE).stats.redecoded > 0
    assert run(replace(world, rounding=0.0), mode=Mode.HEDGE).stats.redecoded == 0
    assert run(world, mode=Mode.OVERLAP).stats.redecoded == 0


def test_prefetched_tokens_save_calls_where_the_answer_follows_the_large_model() -> None:
    world = World(5, doubt=1.0, loss=0.0, end=0.0)
    plain, ahead = run(world), run(world, prefetch=8)
    assert ahead.stats.calls * 4 < plain.stats.calls
    assert ahead.stats.prefetch_used == ahead.stats.escalated - ahead.stats.calls
    assert ahead.stats.prefetch_generated == 8 * ahead.stats.calls


@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP])
def test_a_position_that_a_stream_will_reach_waits_for_its_token_instead_of_asking(
    mode: Mode,
) -> None:
    worlds = [World(i, doubt=1.0, agreement=1.0, loss=0.0, end=0.0) for i in range(9)]
    whole = [run(world, mode=mode, prefetch=8) for world in worlds]
    streamed = [run(replace(world, streams=True), mode=mode, prefetch=8) for world in worlds]
    asked = [run(world, mode=mode) for world in worlds]
    # Streams that break off, as these do after 1 to 8 tokens, have to be asked for again.
    assert sum(r.stats.calls for r in streamed) < 0.5 * sum(r.stats.calls for r in asked)
    assert sum(r.stats.prefetch_used for r in streamed) > 0
    assert all(r.stats.text == s.stats.text for r, s in zip(whole, streamed, strict=True))


@pytest.mark.parametrize("window", [0, 9])
def test_a_cache_that_cannot_go_back_is_waited_for_and_the_figures_say_so(window: int) -> None:
    world = World(5, doubt=0.5, agreement=0.5, window=window)
    assert run(world, mode=Mode.OVERLAP).stats.held
    assert not run(replace(world, window=1 << 30), mode=Mode.OVERLAP).stats.held


@pytest.mark.parametrize("mode", Mode)
def test_strict_raises_once_everything_before_the_lost_call_is_committed(mode: Mode) -> None:
    world, clock = World(5, loss=0.3, end=0.0), FakeClock()
    lost = next(token for token in run(world).tokens if not token.checked)
    answer = Answer(
        WorldSmall(world, clock),
        WorldLarge(world, clock, prompt=_PROMPT, order=1),
        _MESSAGES,
        router=EntropyRouter(1.0),
        options=Options(max_tokens=40, timeout_s=10_000.0, strict=True, mode=mode),
        clock=clock,
    )
    with pytest.raises(LargeError):
        list(answer)
    assert answer.stats().tokens == lost.index


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("prefetch", [0, 4])
def test_a_server_that_never_answers_costs_one_timeout_in_all(mode: Mode, prefetch: int) -> None:
    world = World(5, doubt=1.0, end=0.0, loss=0.0, longest_s=0.0)
    clock = FakeClock()
    large = Silent(world, clock, prompt=_PROMPT, order=0)
    answer = Answer(
        WorldSmall(world, clock),
        large,
        _MESSAGES,
        router=EntropyRouter(1.0),
        options=Options(max_tokens=40, timeout_s=10.0, mode=mode, prefetch=prefetch),
        clock=clock,
    )
    tokens = list(answer)
    assert len(tokens) == 40
    assert not any(token.checked for token in tokens)
    # The large side has a quarter of a second to say itself that it is late.
    assert answer.stats().stall_s <= 10.5
    # A step of a batch takes half as long again.
    assert clock.now <= 39 * 1.5 + 10.5
    assert all(flight.finished for flight in large.flights)


class Silent(WorldLarge):
    """A large model whose calls never land, not even at their deadline."""

    def begin(self, *arguments: Any, **named: Any) -> Any:
        flight = super().begin(*arguments, **named)
        flight.lands_s = float("inf")
        return flight
