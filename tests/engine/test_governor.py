"""The governor: which mode `auto` picks, and its call ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mlxroute.engine import Answer, Experience, Options
from mlxroute.engine.experience import MovingAverage
from mlxroute.engine.governor import Governor, expected_mode_times
from mlxroute.engine.machine_load import CORES
from mlxroute.routers import EntropyRouter
from mlxroute.types import BranchCost, Mode, RunStats, Signals
from tests.support.scripted_models import FakeClock
from tests.support.worlds import World, WorldLarge, WorldSmall, token_of


def measured(
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


def governor(experience: Experience, *, ceiling: float | None = None) -> Governor:
    return Governor(Mode.AUTO, experience, prefetch=None, call_ceiling=ceiling)


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
def test_auto_picks_the_mode_with_the_least_time_per_token(
    call: float, agreement: float, coverage: float, mode: Mode
) -> None:
    experience = measured(call=call, agreement=agreement, coverage=coverage)
    assert governor(experience).mode is mode


def test_auto_does_not_hedge_where_no_decision_of_a_batch_would_stand() -> None:
    experience = measured(call=34.0)
    modes = []
    for rounding_nats in (0.009, 0.01):
        experience.branch_cost = BranchCost(4, 1.0, 1.4, rounding_nats)
        auto = Governor(
            Mode.AUTO, experience, prefetch=None, call_ceiling=None, max_rounding_nats=0.01
        )
        modes.append(auto.mode)
    assert modes == [Mode.HEDGE, Mode.OVERLAP]


def test_auto_measures_a_call_alone_and_then_one_beside_decoding() -> None:
    experience = Experience(step_s=MovingAverage(1.0, 9))
    assert governor(experience).mode is Mode.WAIT
    experience.on_call_answered(1, 20.0, decoding_waited=True)
    assert governor(experience).mode is Mode.OVERLAP
    experience.on_call_answered(1, 160.0, decoding_waited=False)
    assert governor(experience).mode is Mode.WAIT
    assert experience.call_s.value == 20.0


def test_one_late_call_changes_the_slowdown_little() -> None:
    experience = measured(call=20.0)
    experience.call_slowdown = Experience().call_slowdown
    experience.on_call_answered(1, 30.0, decoding_waited=False)
    assert governor(experience).mode is not Mode.WAIT


def test_the_formulas_give_the_times_of_a_worked_example() -> None:
    # a = 5 ms, R = 170 ms, p = 7 %, q = .4, c = .8, b = 1.3.
    experience = measured(step=5.0, call=170.0, agreement=0.4, coverage=0.8)
    experience.escalation_rate = MovingAverage(0.07, 9)
    times = expected_mode_times(experience, branch_cost=1.3)
    assert times.wait_s == pytest.approx(16.9, abs=0.05)
    assert times.overlap_s == pytest.approx(12.1, abs=0.05)
    assert times.hedge_s == pytest.approx(9.6, abs=0.05)


def test_prefetching_is_tried_and_kept_where_it_pays() -> None:
    experience = measured(call=10.0)
    assert governor(experience).prefetch > 0
    experience.prefetch_call_s, experience.prefetch_hit_rate = (
        MovingAverage(12.0, 9),
        MovingAverage(0.5, 9),
    )
    assert governor(experience).prefetch > 0
    experience.prefetch_hit_rate = MovingAverage(0.0, 9)
    assert governor(experience).prefetch == 0
    assert Governor(Mode.HEDGE, experience, prefetch=3, call_ceiling=None).prefetch == 3


class SharedMachineSmall(WorldSmall):
    """A small model whose steps delay the large one, as on one machine."""

    def __init__(self, world: World, clock: FakeClock, large: WorldLarge) -> None:
        super().__init__(world, clock)
        self._large = large

    def extend(self, token_ids: Sequence[int]) -> Signals:
        self._delay_calls()
        return super().extend(token_ids)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        self._delay_calls()
        return super().branch(parents, token_ids)

    def _delay_calls(self) -> None:
        for call in self._large.calls:
            if not call.finished:
                call.ready_s += 0.8


class LocalLarge(WorldLarge):
    """A large model on the small model's machine."""

    @property
    def is_local(self) -> bool:
        return True


class SpinningSmall(WorldSmall):
    """A small model whose steps take 30 times as long while the large one computes."""

    def __init__(self, world: World, clock: FakeClock, large: WorldLarge) -> None:
        super().__init__(world, clock)
        self._large = large
        self.slow_steps = 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        if any(not call.finished for call in self._large.calls):
            self._clock.now += 29.0
            self.slow_steps += 1
        return super().extend(token_ids)


@pytest.fixture
def idle_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process computes anything."""
    monkeypatch.setattr("mlxroute.engine.escalation.calls.other_busy_core_s", lambda: 0.0)


def local_governor(experience: Experience) -> Governor:
    return Governor(Mode.AUTO, experience, prefetch=None, call_ceiling=None, is_local=True)


def test_on_this_machine_auto_waits_until_two_calls_were_measured() -> None:
    experience = Experience(step_s=MovingAverage(1.0, 9))
    for _ in range(2):
        assert local_governor(experience).mode is Mode.WAIT
        assert local_governor(experience).prefetch == 0
        experience.on_call_answered(1, 20.0, decoding_waited=True)
    assert local_governor(experience).mode is Mode.OVERLAP
    assert local_governor(experience).prefetch > 0


def test_on_this_machine_auto_waits_while_calls_keep_the_cores_busy() -> None:
    experience = measured(call=34.0)
    assert local_governor(experience).mode is not Mode.WAIT
    experience.on_local_step(1.0, float(CORES))
    experience.on_local_wait(2.0, 0.2)
    assert local_governor(experience).mode is not Mode.WAIT
    experience.on_local_wait(2.0, 2.0)
    assert local_governor(experience).mode is Mode.WAIT
    assert local_governor(experience).prefetch == 0
    assert governor(experience).mode is not Mode.WAIT


def test_slowed_steps_end_decoding_beside_calls_on_this_machine_for_some_calls() -> None:
    experience = measured(call=34.0)
    assert not local_governor(experience).on_shared_step(2.9)
    assert not governor(experience).on_shared_step(30.0)
    assert local_governor(experience).mode is not Mode.WAIT
    assert local_governor(experience).on_shared_step(30.0)
    for _ in range(128):
        assert local_governor(experience).mode is Mode.WAIT
        assert local_governor(experience).prefetch == 0
        experience.on_call_answered(1, 34.0, decoding_waited=True)
    assert local_governor(experience).mode is not Mode.WAIT


@pytest.mark.parametrize(("call", "slowed"), [(2.0, 1), (6.0, 2), (34.0, 9)])
def test_slowed_steps_may_cost_half_of_the_call_that_decoding_hides(
    call: float, slowed: int
) -> None:
    local = local_governor(measured(call=call))
    stopped = [local.on_shared_step(3.1) for _ in range(slowed)]
    assert stopped == [*[False] * (slowed - 1), True]


@pytest.mark.usefixtures("idle_cores")
@pytest.mark.parametrize("streams", [False, True])
def test_on_a_machine_without_room_auto_loses_two_steps_at_most(streams: bool) -> None:
    experience = Experience()
    slow_steps = 0
    for seed in range(6):
        clock = FakeClock()
        one = replace(world(seed), streams=streams)
        large = LocalLarge(one, clock, prompt="[user]hi>", order=0)
        small = SpinningSmall(one, clock, large)
        answer = Answer(
            small,
            large,
            [{"role": "user", "content": "hi"}],
            router=EntropyRouter(1.0),
            options=Options(max_tokens=120, timeout_s=10_000.0),
            experience=experience,
            clock=clock,
        )
        for _ in answer:
            pass
        slow_steps += small.slow_steps
    assert slow_steps <= 2


def answered(
    world: World, experience: Experience, *, shared_machine: bool = False, **options: object
) -> tuple[RunStats, float]:
    clock = FakeClock()
    large = WorldLarge(world, clock, prompt="[user]hi>", order=0)
    answer = Answer(
        SharedMachineSmall(world, clock, large) if shared_machine else WorldSmall(world, clock),
        large,
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(1.0),
        options=Options(max_tokens=120, timeout_s=10_000.0, **options),  # type: ignore[arg-type]
        experience=experience,
        clock=clock,
    )
    for _ in answer:
        pass
    return answer.stats(), clock.now


def world(seed: int) -> World:
    return World(seed, doubt=0.1, agreement=0.4, loss=0.0, end=0.0, max_call_s=40.0)


def test_a_ceiling_bounds_the_calls_and_changes_no_text() -> None:
    for seed in range(3):
        waited, _ = answered(world(seed), Experience(), mode=Mode.WAIT)
        free, _ = answered(world(seed), Experience(), mode=Mode.HEDGE, prefetch=0)
        bound, _ = answered(
            world(seed), Experience(), mode=Mode.HEDGE, prefetch=0, call_ceiling=1.2
        )
        assert waited.text == free.text == bound.text
        assert free.calls > 1.5 * waited.calls
        assert bound.calls <= 1.2 * (waited.calls + 1)


def test_calls_that_earlier_answers_did_not_need_may_be_used() -> None:
    experience = Experience()
    calls, needed, alone = 0, 0, 0
    for seed in range(4):
        waited, _ = answered(world(seed), Experience(), mode=Mode.WAIT)
        bound, _ = answered(
            world(seed), experience, mode=Mode.OVERLAP, prefetch=8, call_ceiling=1.2
        )
        first, _ = answered(
            world(seed), Experience(), mode=Mode.OVERLAP, prefetch=8, call_ceiling=1.2
        )
        assert waited.text == bound.text == first.text
        calls, needed, alone = calls + bound.calls, needed + waited.calls, alone + first.calls
        assert calls <= 1.2 * (needed + 1)
    assert calls > alone


def test_over_a_few_answers_auto_is_about_as_fast_as_the_best_mode() -> None:
    experience = Experience()
    times = {mode: 0.0 for mode in Mode}
    for seed in range(5):
        for mode in Mode:
            known = experience if mode is Mode.AUTO else Experience()
            _, seconds = answered(world(seed), known, mode=mode, prefetch=0)
            # The first answer, in which auto measures, does not count.
            times[mode] += seconds if seed else 0.0
    fixed = [times[mode] for mode in Mode if mode is not Mode.AUTO]
    assert times[Mode.AUTO] <= 1.1 * min(fixed)
    assert times[Mode.AUTO] <= 0.85 * times[Mode.WAIT]


def test_auto_waits_where_decoding_delays_the_calls() -> None:
    experience, times = Experience(), dict.fromkeys((Mode.WAIT, Mode.HEDGE, Mode.AUTO), 0.0)
    for seed in range(4):
        for mode in times:
            known = experience if mode is Mode.AUTO else Experience()
            one = replace(world(seed), max_call_s=20.0)
            _, seconds = answered(one, known, shared_machine=True, mode=mode, prefetch=0)
            times[mode] += seconds
    assert times[Mode.HEDGE] > 1.2 * times[Mode.WAIT]
    assert times[Mode.AUTO] < 1.15 * times[Mode.WAIT]


def test_the_plan_names_the_mode_and_its_figures() -> None:
    stats, _ = answered(world(1), Experience(), mode=Mode.AUTO)
    assert stats.plan.startswith(f"{stats.mode}: call ")
    fixed, _ = answered(world(1), Experience(), mode=Mode.OVERLAP)
    assert fixed.plan == ""


def test_a_run_without_escalations_changes_the_rate_slowly() -> None:
    experience = Experience()
    for position in range(300):
        experience.on_committed(escalated=position % 10 == 0)
    for _ in range(25):
        experience.on_committed(escalated=False)
    assert experience.escalation_rate.value == pytest.approx(0.09, abs=0.02)


def test_the_large_models_time_per_token_is_measured_from_continuations() -> None:
    token = token_of((1,))
    streamed = [replace(token, latency_s=latency_s) for latency_s in (2.0, 2.5, 3.0)]
    experience = Experience()
    experience.on_continuation_finished(streamed)
    assert experience.large_step_s.value == pytest.approx(0.5)
    whole = Experience(call_s=MovingAverage(2.0, 3), prefetch_call_s=MovingAverage(2.6, 3))
    whole.on_continuation_finished([replace(token, latency_s=2.6), token, token])
    assert whole.large_step_s.value == pytest.approx(0.3)
