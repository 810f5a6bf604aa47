"""Every mode writes the same answer: random models, delays and failures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.engine import Answer, Experience, Options
from mlxroute.engine.escalation.calls import AnswerCalls, Call
from mlxroute.engine.experience import MovingAverage
from mlxroute.engine.protocols import PendingCallProtocol
from mlxroute.errors import LargeError, LargeUnsendable
from mlxroute.routers import EntropyRouter
from mlxroute.types import (
    Event,
    Mode,
    Provisional,
    Retracted,
    RunStats,
    Sampling,
    Source,
    Token,
)
from tests.support.scripted_models import FakeClock, ScriptedLarge, ScriptedSmall, signals
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
    *("withheld", "accepted", "finish_reason", "failures"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished answer: its events and figures, and what was fed to the small model."""

    events: list[Event]
    stats: RunStats
    fed: list[int]
    batches: int
    seconds: float
    spans: set[tuple[tuple[int, ...], tuple[str, ...]]]

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
    assert all(f.finished and f.consumed for f in large.calls), "a call was left behind"
    assert answer.stats().calls == sum(call.was_made for call in large.calls)
    return Run(events, answer.stats(), list(small.fed), small.batches, clock.now, large.spans)


def experience() -> Experience:
    """Return measurements of slow calls, so that `auto` begins with branches."""
    return Experience(
        step_s=MovingAverage(1.0, 3),
        call_s=MovingAverage(30.0, 3),
        call_slowdown=MovingAverage(1.0, 9),
    )


def record(token: Token, *, rounded: bool = False) -> Token:
    """Return a token without what depends on time or on the kind of call.

    With `rounded`, also without what a batch rounds differently.
    """
    if rounded:
        token = replace(token, signals=signals(token.token_id), score=0.0, threshold=0.0)
    escalation = token.escalation
    if escalation is not None:
        escalation = replace(escalation, latency_s=0.0, prefetched=False)
    return replace(token, escalation=escalation, time_s=0.0)


def check_events(events: Sequence[Event]) -> None:
    """Check that each provisional token was committed or retracted before another replaced it."""
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


def called_ids(run: Run) -> set[tuple[int, ...]]:
    """Return the ids before each token of the answer that a call of its own returned."""
    ids = [token.token_id for token in run.tokens]
    return {
        tuple(ids[:i])
        for i, token in enumerate(run.tokens)
        if token.escalation and not token.escalation.prefetched
    }


def check_cache(run: Run) -> None:
    """Check that the cache holds the answer but for its last decision."""
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
    refusal=st.sampled_from([0.0, 0.0, 0.03, 0.2]),
    max_call_s=st.sampled_from([0.0, 3.0, 30.0]),
    max_in_flight=st.sampled_from([1, 2, 8]),
    whole_only=st.booleans(),
    rounding=st.sampled_from([0.0, 0.1, 0.5]),
    window=st.sampled_from([1 << 30, 1 << 30, 30, 20, 9, 0]),
    streams=st.booleans(),
    band=st.sampled_from([0.004, 0.004, 0.02]),
)


@settings(max_examples=80)
@given(
    world=_WORLDS,
    order=st.integers(0, 1 << 30),
    stop=st.sampled_from([(), ("ab",), ("a.a", "bb"), ("é.",)]),
    max_tokens=st.sampled_from([1, 2, 17, 40]),
    never_send=st.sampled_from(
        [(), *((re.compile(pattern),) for pattern in (r"b\.b", r"bb\b", r"b$"))]
    ),
    prefetch=st.sampled_from([1, 4, 8]),
    budget=st.sampled_from([None, None, 0.1, 0.4]),
    accept_within=st.sampled_from([0.0, 0.2]),
)
def test_the_answer_is_the_same_in_every_mode_whatever_the_timing_of_calls(
    world: World, order: int, prefetch: int, **options: Any
) -> None:
    expected = run(world, **options)
    check_cache(expected)
    for mode in Mode:
        rounded = mode in (Mode.HEDGE, Mode.AUTO)
        records = [record(token, rounded=rounded) for token in expected.tokens]
        for prefetched_tokens in (0, prefetch):
            got = run(world, order=order, mode=mode, prefetch=prefetched_tokens, **options)
            assert [record(token, rounded=rounded) for token in got.tokens] == records
            for name in _SAME:
                assert getattr(got.stats, name) == getattr(expected.stats, name), name
            # Of a large token of several ids at the end, overlap may have fed all but the last.
            assert got.fed[: len(expected.fed)] == expected.fed
            check_cache(got)
            check_events(got.events)
            # A branch that was dropped may have had the same ids, chosen otherwise.
            called = called_ids(got)
            assert {span for span in expected.spans if span[0] in called} <= got.spans
            assert got.stats.prefetch_used <= got.stats.prefetch_generated
            if not prefetched_tokens:
                assert not any(t.escalation.prefetched for t in got.tokens if t.escalation)


def test_wait_shows_nothing_early() -> None:
    events = run(World(3)).events
    assert all(isinstance(event, Token) for event in events)


def test_overlap_makes_the_next_call_without_waiting_and_takes_less_time() -> None:
    world = World(5, agreement=1.0, loss=0.0, end=0.0)
    waited, overlapped = run(world), run(world, mode=Mode.OVERLAP)
    assert overlapped.stats.calls == waited.stats.calls
    assert overlapped.stats.retracted == 0
    assert overlapped.stats.stall_s < 0.2 * waited.stats.stall_s
    assert overlapped.seconds < waited.seconds


def test_a_disagreement_retracts_what_followed_the_small_token() -> None:
    world = World(5, agreement=0.0, loss=0.0, end=0.0, doubt=0.2)
    overlapped = run(world, mode=Mode.OVERLAP)
    assert overlapped.stats.retracted > 0
    assert any(isinstance(event, Retracted) for event in overlapped.events)
    assert overlapped.stats.calls > overlapped.stats.escalated


def test_hedge_keeps_the_branch_that_the_large_model_chose() -> None:
    worlds = [
        World(i, agreement=0.0, loss=0.0, end=0.0, doubt=0.2, max_call_s=20) for i in range(9)
    ]
    overlapped, hedged = (
        [run(w, mode=mode) for w in worlds] for mode in (Mode.OVERLAP, Mode.HEDGE)
    )
    assert sum(r.seconds for r in hedged) < 0.95 * sum(r.seconds for r in overlapped)


def test_the_likeliest_branch_gets_the_calls_where_they_are_few() -> None:
    sure = World(0, agreement=1.0, loss=0.0, end=0.0, doubt=0.3, max_call_s=20, max_in_flight=2)
    worlds = [replace(sure, seed=i) for i in range(9)]
    overlapped, hedged = (
        [run(w, mode=mode) for w in worlds] for mode in (Mode.OVERLAP, Mode.HEDGE)
    )
    # No other branch is ever chosen, and a batched step takes 1.5 times as long.
    assert sum(r.seconds for r in hedged) < 1.3 * sum(r.seconds for r in overlapped)


def test_decisions_within_the_rounding_of_a_batch_are_made_again() -> None:
    world = World(5, loss=0.0, end=0.0, rounding=0.3)
    assert run(world, mode=Mode.HEDGE).stats.redecoded > 0
    assert run(replace(world, rounding=0.0), mode=Mode.HEDGE).stats.redecoded == 0
    assert run(world, mode=Mode.OVERLAP).stats.redecoded == 0


@pytest.mark.parametrize("mode", [Mode.HEDGE, Mode.AUTO])
def test_branches_are_not_decoded_where_every_decision_would_be_made_again(mode: Mode) -> None:
    coarse = World(0, agreement=0.2, loss=0.0, end=0.0, max_call_s=20.0, band=0.01)
    worlds = [replace(coarse, seed=i) for i in range(9)]
    overlapped = [run(world, mode=Mode.OVERLAP, budget=0.4) for world in worlds]
    hedged = [run(world, mode=mode, budget=0.4) for world in worlds]
    assert sum(r.batches + r.stats.redecoded for r in hedged) == 0
    assert [r.stats.text for r in hedged] == [r.stats.text for r in overlapped]
    if mode is Mode.AUTO:
        assert Mode.HEDGE not in {r.stats.mode for r in hedged}
    else:
        assert [r.seconds for r in hedged] == [r.seconds for r in overlapped]
    # A threshold leaves most decisions as they are, and so does a batch that rounds by less.
    fine = [replace(world, band=0.004) for world in worlds]
    assert sum(run(world, mode=mode).batches for world in worlds) > 9
    assert sum(run(world, mode=mode, budget=0.4).batches for world in fine) > 9


def test_auto_does_not_choose_branches_where_tokens_are_drawn() -> None:
    worlds = [World(i, agreement=0.2, loss=0.0, end=0.0, max_call_s=20.0) for i in range(9)]
    drawn = [run(w, mode=Mode.AUTO, sampling=Sampling(temperature=1.0)) for w in worlds]
    assert Mode.HEDGE in {run(world, mode=Mode.AUTO).stats.mode for world in worlds}
    assert Mode.HEDGE not in {r.stats.mode for r in drawn}


def test_a_window_that_fills_after_batches_does_not_end_the_answer() -> None:
    worlds = [
        World(i, agreement=0.9, loss=0.0, end=0.0, max_call_s=3, rounding=0.1, window=30)
        for i in range(20)
    ]
    hedged = [run(world, mode=Mode.HEDGE) for world in worlds]
    assert sum(r.batches for r in hedged) > 9
    assert [r.stats.text for r in hedged] == [run(world).stats.text for world in worlds]


def test_prefetched_tokens_save_calls_where_the_answer_follows_the_large_model() -> None:
    world = World(5, doubt=1.0, loss=0.0, end=0.0)
    plain, ahead = run(world), run(world, prefetch=8)
    assert ahead.stats.calls * 4 < plain.stats.calls
    assert ahead.stats.prefetch_used == ahead.stats.escalated - ahead.stats.calls
    assert ahead.stats.prefetch_generated == 8 * ahead.stats.calls


@pytest.mark.parametrize("seed", [1, 7])
def test_a_match_on_one_branch_is_not_forgotten_while_others_are_searched(seed: int) -> None:
    world = World(seed, agreement=0.0, loss=0.0, end=0.0, doubt=0.6, max_call_s=30.0)
    never_send = (re.compile(r"bb\b"),)
    waited, hedged = (
        run(world, mode=mode, never_send=never_send) for mode in (Mode.WAIT, Mode.HEDGE)
    )
    assert waited.stats.withheld > 1
    assert hedged.stats.text == waited.stats.text
    assert hedged.stats.withheld == waited.stats.withheld


@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP])
def test_a_match_on_a_branch_that_was_dropped_keeps_nothing_local(mode: Mode) -> None:
    clock = FakeClock()
    answer = Answer(
        ScriptedSmall(b"abcd", entropies=dict.fromkeys(range(3), 2.0)),
        # The first token begins as the small model's own, after which the pattern matched.
        ScriptedLarge([b"ax", b"y"], clock=clock, seconds=5.0),
        _MESSAGES,
        router=EntropyRouter(1.0),
        options=Options(**(_OPTIONS | {"mode": mode, "never_send": (re.compile("a$"),)})),
        clock=clock,
    )
    assert "".join(token.text for token in answer) == "axyd"
    assert answer.stats().withheld == 0


@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP])
def test_a_position_that_a_stream_will_reach_waits_for_its_token_instead_of_calling(
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


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("streams", [False, True])
def test_prefetched_tokens_without_logprobs_are_asked_for_again_to_compare_them(
    mode: Mode, streams: bool
) -> None:
    """llama-server gives no logprobs of drafted tokens."""
    worlds = [
        World(i, doubt=1.0, agreement=0.7, end=0.0, loss=0.0, streams=streams, drafted=0.5)
        for i in range(9)
    ]
    expected = [run(world, accept_within=0.2) for world in worlds]
    ahead = [run(world, mode=mode, prefetch=8, accept_within=0.2) for world in worlds]
    assert [r.stats.text for r in ahead] == [r.stats.text for r in expected]
    assert [r.stats.accepted for r in ahead] == [r.stats.accepted for r in expected]
    assert sum(r.stats.accepted for r in ahead) > 9
    # Those with logprobs are used.
    assert sum(r.stats.prefetch_used for r in ahead) > 0


def test_streams_whose_tokens_lack_logprobs_are_not_waited_for_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joins: list[object] = []
    join = AnswerCalls.join

    def counted(calls: AnswerCalls, pending: PendingCallProtocol) -> Call:
        joins.append(pending)
        return join(calls, pending)

    monkeypatch.setattr(AnswerCalls, "join", counted)
    worlds = [
        World(i, doubt=1.0, agreement=1.0, end=0.0, loss=0.0, streams=True, drafted=1.0)
        for i in range(9)
    ]
    for world in worlds:
        run(world, prefetch=8, accept_within=0.2)
    # Once in an answer, and again where that stream ended before its second token.
    assert len(joins) < 2 * len(worlds)


@pytest.mark.parametrize("window", [0, 9])
def test_decoding_waits_where_the_cache_cannot_be_rolled_back_and_the_figures_say_so(
    window: int,
) -> None:
    world = World(5, doubt=0.5, agreement=0.5, window=window)
    assert run(world, mode=Mode.OVERLAP).stats.held
    assert not run(replace(world, window=1 << 30), mode=Mode.OVERLAP).stats.held


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("loss", "refusal"), [(0.3, 0.0), (0.0, 0.15)])
def test_strict_raises_once_everything_before_the_lost_call_is_committed(
    mode: Mode, loss: float, refusal: float
) -> None:
    world = World(5, doubt=0.8, agreement=0.9, end=0.0, loss=loss, refusal=refusal)
    clock = FakeClock()
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
def test_a_prompt_that_is_too_long_ends_only_the_calls_after_it(mode: Mode) -> None:
    world = ShortWorld(5, doubt=1.0, agreement=0.9, end=0.0, loss=0.0, max_call_s=30.0)
    answered = run(world, mode=mode, order=1)
    checked = [token.index for token in answered.tokens if token.checked]
    assert len(checked) > 18
    assert checked == list(range(len(checked)))
    refused = {ids for ids, _ in answered.spans if len(ids) >= 20}
    assert refused
    # What is decoded further ahead makes no calls.
    assert not any(ids[:length] in refused for ids in refused for length in range(len(ids)))


class ShortWorld(World):
    """A world whose server takes no answer of 20 tokens, and says so at once."""

    def large(self, ids: Sequence[int]) -> tuple[int, ...] | LargeError:
        return LargeUnsendable("too long") if len(ids) >= 20 else super().large(ids)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("prefetch", [0, 4])
def test_a_server_that_never_answers_costs_one_timeout_in_all(mode: Mode, prefetch: int) -> None:
    world = World(5, doubt=1.0, end=0.0, loss=0.0, max_call_s=0.0)
    clock = FakeClock()
    large = HangingLarge(world, clock, prompt=_PROMPT, order=0)
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
    assert all(call.finished for call in large.calls)


class HangingLarge(WorldLarge):
    """A large model whose calls never become ready, not even at their deadline."""

    def begin(self, *arguments: Any, **named: Any) -> Any:
        call = super().begin(*arguments, **named)
        call.ready_s = float("inf")
        return call
