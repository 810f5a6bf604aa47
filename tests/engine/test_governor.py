"""Which way of spending the wait `auto` picks, and what it says about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mlxroute.engine import Answer, Experience, Options
from mlxroute.engine.experience import SLOWDOWN_PRIOR, MovingAverage
from mlxroute.engine.governor import Governor, mode_times
from mlxroute.routers import EntropyRouter
from mlxroute.types import BranchCost, Mode, RunStats, Signals
from tests.support.fakes import FakeClock
from tests.support.worlds import World, WorldLarge, WorldSmall, token_of


def experience(
    *,
    step: float = 1.0,
    call: float,
    agreement: float = 0.4,
    coverage: float = 0.8,
    slowdown: float = 1.0,
) -> Experience:
    return Experience(
        step_s=MovingAverage(step, 9),
        call_s=MovingAverage(call, 9),
        call_slowdown=MovingAverage(slowdown, 9),
        agreement=MovingAverage(agreement, 9),
        coverage=MovingAverage(coverage, 9),
        branch_cost=BranchCost(4, 1.0, 1.4, 0.0),
    )


def governor(seen: Experience, *, ceiling: float | None = None) -> Governor:
    return Governor(Mode.AUTO, seen, prefetch=None, call_ceiling=ceiling)


@pytest.mark.parametrize(
    ("call", "agreement", "coverage", "mode"),
    [
        (0.5, 0.4, 0.8, Mode.WAIT),
        (0.5, 0.9, 0.9, Mode.WAIT),
        (34.0, 0.4, 0.8, Mode.HEDGE),
        (34.0, 0.8, 0.85, Mode.OVERLAP),
        (34.0, 0.0, 0.0, Mode.WAIT),
    ],
)
def test_the_way_with_the_least_time_a_token_is_taken(
    call: float, agreement: float, coverage: float, mode: Mode
) -> None:
    seen = experience(call=call, agreement=agreement, coverage=coverage)
    assert governor(seen).mode is mode


def test_first_a_call_alone_is_seen_then_one_beside_decoding() -> None:
    seen = Experience(step_s=MovingAverage(1.0, 9))
    assert governor(seen).mode is Mode.WAIT
    seen.on_call_answered(1, 20.0, is_alone=True)
    assert governor(seen).mode is Mode.OVERLAP
    seen.on_call_answered(1, 160.0, is_alone=False)
    assert governor(seen).mode is Mode.WAIT
    assert seen.call_s.value == 20.0


def test_one_late_call_says_little_about_what_decoding_does_to_it() -> None:
    seen = experience(call=20.0)
    seen.call_slowdown = MovingAverage(1.0, SLOWDOWN_PRIOR)
    seen.on_call_answered(1, 30.0, is_alone=False)
    assert governor(seen).mode is not Mode.WAIT


def test_the_formulas_give_the_times_of_a_worked_example() -> None:
    # a = 5 ms, R = 170 ms, p = 7 %, q = .4, c = .8, b = 1.3.
    seen = experience(step=5.0, call=170.0, agreement=0.4, coverage=0.8)
    seen.escalation_rate = MovingAverage(0.07, 9)
    times = mode_times(seen, branch_cost=1.3)
    assert times.wait_s == pytest.approx(16.9, abs=0.05)
    assert times.overlap_s == pytest.approx(12.1, abs=0.05)
    assert times.hedge_s == pytest.approx(9.6, abs=0.05)


def test_more_tokens_a_call_are_tried_and_kept_where_they_pay() -> None:
    seen = experience(call=10.0)
    assert governor(seen).prefetch > 0
    seen.prefetch_call_s, seen.prefetch_hit_rate = MovingAverage(12.0, 9), MovingAverage(0.5, 9)
    assert governor(seen).prefetch > 0
    seen.prefetch_hit_rate = MovingAverage(0.0, 9)
    assert governor(seen).prefetch == 0
    assert Governor(Mode.HEDGE, seen, prefetch=3, call_ceiling=None).prefetch == 3


def test_that_streaming_would_be_faster_is_said_once_with_figures() -> None:
    seen = experience(step=0.01, call=2.0)
    assert governor(seen).advice() is None
    seen.large_step_s, seen.escalation_rate = MovingAverage(0.05, 9), MovingAverage(0.1, 9)
    assert "50 ms" in (governor(seen).advice() or "")
    assert governor(seen).advice() is None
    seen.advice_was_given, seen.escalation_rate = False, MovingAverage(0.01, 9)
    assert governor(seen).advice() is None


class Crowded(WorldSmall):
    """A small model whose steps hold up the large one, as on one machine."""

    def __init__(self, world: World, clock: FakeClock, large: WorldLarge) -> None:
        super().__init__(world, clock)
        self._large = large

    def extend(self, token_ids: Sequence[int]) -> Signals:
        self._hold_up()
        return super().extend(token_ids)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        self._hold_up()
        return super().branch(parents, token_ids)

    def _hold_up(self) -> None:
        for flight in self._large.flights:
            if not flight.finished:
                flight.lands_s += 0.8


def answered(
    world: World, seen: Experience, *, crowded: bool = False, **options: object
) -> tuple[RunStats, float]:
    clock = FakeClock()
    large = WorldLarge(world, clock, prompt="[user]hi>", order=0)
    answer = Answer(
        Crowded(world, clock, large) if crowded else WorldSmall(world, clock),
        large,
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(1.0),
        options=Options(max_tokens=120, timeout_s=10_000.0, **options),  # type: ignore[arg-type]
        experience=seen,
        clock=clock,
    )
    for _ in answer:
        pass
    return answer.stats(), clock.now


def world(seed: int) -> World:
    return World(seed, doubt=0.1, agreement=0.4, loss=0.0, end=0.0, longest_s=40.0)


def test_a_ceiling_bounds_the_calls_and_changes_no_word() -> None:
    for seed in range(5):
        waited, _ = answered(world(seed), Experience(), mode=Mode.WAIT)
        free, _ = answered(world(seed), Experience(), mode=Mode.HEDGE, prefetch=0)
        bound, _ = answered(
            world(seed), Experience(), mode=Mode.HEDGE, prefetch=0, call_ceiling=1.2
        )
        assert waited.text == free.text == bound.text
        assert free.calls > 1.5 * waited.calls
        assert bound.calls <= 1.2 * (waited.calls + 1)


def test_what_earlier_answers_left_of_the_ceiling_may_be_used() -> None:
    seen = Experience()
    calls, needed, alone = 0, 0, 0
    for seed in range(8):
        waited, _ = answered(world(seed), Experience(), mode=Mode.WAIT)
        bound, _ = answered(world(seed), seen, mode=Mode.OVERLAP, prefetch=8, call_ceiling=1.2)
        first, _ = answered(
            world(seed), Experience(), mode=Mode.OVERLAP, prefetch=8, call_ceiling=1.2
        )
        assert waited.text == bound.text == first.text
        calls, needed, alone = calls + bound.calls, needed + waited.calls, alone + first.calls
        assert calls <= 1.2 * (needed + 1)
    assert calls > alone


def test_over_a_few_answers_auto_is_about_as_fast_as_the_best_way() -> None:
    seen = Experience()
    times = {mode: 0.0 for mode in Mode}
    for seed in range(8):
        for mode in Mode:
            known = seen if mode is Mode.AUTO else Experience()
            _, seconds = answered(world(seed), known, mode=mode, prefetch=0)
            # What it takes to learn is not held against it.
            times[mode] += seconds if seed else 0.0
    fixed = [times[mode] for mode in Mode if mode is not Mode.AUTO]
    assert times[Mode.AUTO] <= 1.1 * min(fixed)
    assert times[Mode.AUTO] <= 0.85 * times[Mode.WAIT]


def test_where_decoding_on_holds_the_calls_up_auto_stands_still() -> None:
    seen, times = Experience(), dict.fromkeys((Mode.WAIT, Mode.HEDGE, Mode.AUTO), 0.0)
    for seed in range(8):
        for mode in times:
            known = seen if mode is Mode.AUTO else Experience()
            one = replace(world(seed), longest_s=20.0)
            _, seconds = answered(one, known, crowded=True, mode=mode, prefetch=0)
            times[mode] += seconds
    assert times[Mode.HEDGE] > 1.2 * times[Mode.WAIT]
    assert times[Mode.AUTO] < 1.15 * times[Mode.WAIT]


def test_the_figures_behind_the_choice_are_told() -> None:
    stats, _ = answered(world(1), Experience(), mode=Mode.AUTO)
    assert stats.plan.startswith(f"{stats.mode}: call ")
    fixed, _ = answered(world(1), Experience(), mode=Mode.OVERLAP)
    assert fixed.plan == ""


def test_a_stretch_without_escalations_does_not_make_the_rate_forgotten() -> None:
    seen = Experience()
    for position in range(300):
        seen.on_committed(escalated=position % 10 == 0)
    for _ in range(25):
        seen.on_committed(escalated=False)
    assert seen.escalation_rate.value == pytest.approx(0.09, abs=0.02)


def test_what_the_large_model_takes_for_a_token_is_seen_in_its_runs() -> None:
    token = token_of((1,))
    streamed = [replace(token, latency_s=latency_s) for latency_s in (2.0, 2.5, 3.0)]
    seen = Experience()
    seen.on_continuation_finished(streamed)
    assert seen.large_step_s.value == pytest.approx(0.5)
    whole = Experience(call_s=MovingAverage(2.0, 3), prefetch_call_s=MovingAverage(2.6, 3))
    whole.on_continuation_finished([replace(token, latency_s=2.6), token, token])
    assert whole.large_step_s.value == pytest.approx(0.3)
