"""What was measured about a pair of models: times, agreement, coverage, and calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from mlxroute.engine.machine_load import CORES
from mlxroute.types import BranchCost, LargeToken, Signals

# Branches of a position, the small model's own choice included.
BRANCH_ROWS: Final = 4
# Prior weight, in observations, of a slowdown of 1.0.
_SLOWDOWN_PRIOR: Final = 3
# Cores that other processes may use, beyond those that decoding leaves idle.
_BACKGROUND_CORES: Final = 0.3
# Calls that decoding waits for after calls slowed its steps.
_PAUSE_CALLS: Final = 128
# Least weight of a new observation; the second is that of committed positions, which are frequent.
_MIN_WEIGHT: Final = 0.05
_MIN_POSITION_WEIGHT: Final = 0.005


@dataclass(slots=True)
class MovingAverage:
    """An exponential moving average that starts as a plain mean.

    The first `value` counts as `count` observations; a new one has the weight 1 / count, and at
    least `weight`.
    """

    value: float
    count: int = 0
    weight: float = _MIN_WEIGHT

    def add(self, value: float) -> None:
        """Add an observation."""
        self.count += 1
        self.value += max(self.weight, 1.0 / self.count) * (value - self.value)


@dataclass(slots=True)
class Experience:
    """Measurements of one pair of models over the answers of a session.

    Each `on_...` method records one kind of event. Times, slowdowns and shares are moving averages.
    Shares are from 0 to 1 and start as guesses; times start at 0, which stands for not measured.

    Attributes:
        step_s: Seconds of a decode step while no call is in flight.
        call_s: Seconds until the first token of a call that prefetches nothing, or streams, while
            decoding waits.
        prefetch_call_s: Seconds until the first token of a call that prefetches, while decoding
            waits.
        large_step_s: Seconds of each further token of a call that prefetches.
        step_slowdown: Time of a step while a call is in flight, over `step_s`. It exceeds 1 where
            both models share a machine.
        call_slowdown: Time of a call while decoding goes on, over its time while decoding waits.
        agreement: Share of escalations where the large token is the small model's own choice.
        coverage: Share of escalations where it is among the `BRANCH_ROWS` likeliest choices.
        escalation_rate: Share of committed positions that were escalated.
        prefetch_hit_rate: Share of escalations that a prefetched token answered, while calls
            prefetch.
        branch_cost: Times of a step of one row and of a batch; None until measured.
        answered_calls: Calls that returned a token.
        started_calls: Calls started, including those for positions never reached; calls that were
            not made in the end are subtracted.
        escalated_positions: Committed positions that were escalated.
        calls_prefetch: Whether the last answered call could return more than one token.
        busy_cores: Cores that other processes use while decoding waits for a call to this machine.
        step_cores: Cores that this process uses in a decode step.
        pauses: How often calls to this machine slowed decode steps far beyond their usual time.
        pause_end: Value of `answered_calls` at which the pause after slowed steps ends.
        advice_was_given: Whether the session's advice to use the large model alone was given.
    """

    step_s: MovingAverage = field(default_factory=lambda: MovingAverage(0.0))
    call_s: MovingAverage = field(default_factory=lambda: MovingAverage(0.0))
    prefetch_call_s: MovingAverage = field(default_factory=lambda: MovingAverage(0.0))
    large_step_s: MovingAverage = field(default_factory=lambda: MovingAverage(0.0))
    step_slowdown: MovingAverage = field(
        default_factory=lambda: MovingAverage(1.0, _SLOWDOWN_PRIOR)
    )
    call_slowdown: MovingAverage = field(
        default_factory=lambda: MovingAverage(1.0, _SLOWDOWN_PRIOR)
    )
    agreement: MovingAverage = field(default_factory=lambda: MovingAverage(0.4, 5))
    coverage: MovingAverage = field(default_factory=lambda: MovingAverage(0.75, 5))
    escalation_rate: MovingAverage = field(
        default_factory=lambda: MovingAverage(0.07, 30, _MIN_POSITION_WEIGHT)
    )
    prefetch_hit_rate: MovingAverage = field(default_factory=lambda: MovingAverage(0.3, 5))
    branch_cost: BranchCost | None = None
    answered_calls: int = 0
    started_calls: int = 0
    escalated_positions: int = 0
    calls_prefetch: bool = False
    busy_cores: MovingAverage = field(default_factory=lambda: MovingAverage(0.0))
    step_cores: MovingAverage = field(default_factory=lambda: MovingAverage(0.0))
    pauses: int = 0
    pause_end: int = 0
    advice_was_given: bool = False

    @property
    def has_call_slowdown(self) -> bool:
        """Whether a call was measured while decoding went on."""
        return self.call_slowdown.count > _SLOWDOWN_PRIOR

    @property
    def machine_is_busy(self) -> bool:
        """Whether calls to this machine leave too few cores for decoding at the same time."""
        used_cores = self.busy_cores.value + self.step_cores.value
        is_paused = self.answered_calls < self.pause_end
        return is_paused or used_cores > CORES + _BACKGROUND_CORES

    def on_step(self, seconds: float, *, during_call: bool) -> None:
        """Record a decode step of one row; `during_call` if a call was in flight."""
        _record_time(seconds, self.step_s, self.step_slowdown, is_undisturbed=not during_call)

    def on_call_started(self) -> None:
        """Record that a call was started."""
        self.started_calls += 1

    def on_call_not_made(self) -> None:
        """Record that a call that was started turned out not to be made."""
        self.started_calls -= 1

    def on_call_answered(
        self, tokens: int, seconds: float, *, decoding_waited: bool, is_streamed: bool = False
    ) -> None:
        """Record a call that returned its first token after `seconds`, with `tokens` so far.

        The first token of a call that `is_streamed` takes as long as a call for one token; more may
        follow.
        """
        self.answered_calls += 1
        self.calls_prefetch = is_streamed or tokens > 1
        average = self.prefetch_call_s if self.calls_prefetch else self.call_s
        _record_time(seconds, average, self.call_slowdown, is_undisturbed=decoding_waited)
        if is_streamed and decoding_waited:
            self.call_s.add(seconds)

    def on_continuation_finished(self, tokens: Sequence[LargeToken]) -> None:
        """Record the tokens of a call that prefetched, once no more can arrive."""
        if len(tokens) < 2:
            return
        if tokens[-1].latency_s:
            seconds = tokens[-1].latency_s - tokens[0].latency_s
        elif self.call_s.count:
            seconds = self.prefetch_call_s.value - self.call_s.value
        else:
            return
        self.large_step_s.add(max(0.0, seconds) / (len(tokens) - 1))

    def on_escalated(
        self, signals: Signals, token: LargeToken, *, keeps_small: bool, prefetched: bool
    ) -> None:
        """Record an escalation, by which the small model's token stays if `keeps_small`."""
        self.agreement.add(keeps_small)
        top_ids = signals.top_ids[:BRANCH_ROWS]
        is_covered = len(token.token_ids) == 1 and token.token_ids[0] in top_ids
        self.coverage.add(keeps_small or is_covered)
        if self.calls_prefetch:
            self.prefetch_hit_rate.add(prefetched)

    def on_committed(self, *, escalated: bool) -> None:
        """Record a committed position."""
        self.escalation_rate.add(escalated)
        self.escalated_positions += escalated

    def on_branch_cost(self, cost: BranchCost) -> None:
        """Record what a batch of branches costs."""
        self.branch_cost = cost

    def on_local_wait(self, seconds: float, busy_core_s: float) -> None:
        """Record a wait for a call to this machine, and what other processes computed in it."""
        if seconds > 0:
            self.busy_cores.add(busy_core_s / seconds)

    def on_local_step(self, seconds: float, own_core_s: float) -> None:
        """Record what this process computed in a decode step beside a server on this machine."""
        if seconds > 0:
            self.step_cores.add(own_core_s / seconds)

    def on_slowed_steps(self) -> None:
        """Record that calls to this machine slowed decode steps far beyond their usual time."""
        self.pause_end = self.answered_calls + _PAUSE_CALLS
        self.pauses += 1

    def on_advice(self) -> None:
        """Record that the advice to use the large model alone was given."""
        self.advice_was_given = True


def _record_time(
    seconds: float, average: MovingAverage, slowdown: MovingAverage, *, is_undisturbed: bool
) -> None:
    """Add to the average or, if both models worked at once and it is known, to the slowdown."""
    if is_undisturbed or not average.value:
        average.add(seconds)
    else:
        slowdown.add(seconds / average.value)
