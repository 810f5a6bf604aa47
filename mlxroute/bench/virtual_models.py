"""Both models on a virtual clock, to find out how long an answer takes without waiting for it.

The engine and all tokens are real: the small model computes each position once and the large model
answers each call once. Only the times of a step, a batch and a call are set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mlxroute.engine.protocols import LargeProtocol
from mlxroute.errors import LargeError
from mlxroute.small import SmallModel
from mlxroute.types import (
    BranchCost,
    EncodedPrompt,
    LargeContext,
    LargeToken,
    Message,
    Progress,
    Sampling,
    Signals,
    Uploads,
    Vocabulary,
)

_Outcome = tuple[LargeToken, ...] | LargeError


@dataclass(slots=True)
class VirtualClock:
    """A clock that moves only when `now_s` is set."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class OutputCache:
    """The outputs of both models so far, so that each is computed once.

    Args:
        signals: Signals of the small model, by all token ids before the position.
        batch_signals: The same from a row of a batch, which rounds differently.
        outcomes: Outcomes of calls, by context and prefetch.
        large_tokens: The large model's first answer to each context. A server may decide a near tie
            differently the next time.
    """

    signals: dict[tuple[int, ...], Signals] = field(default_factory=dict)
    batch_signals: dict[tuple[int, ...], Signals] = field(default_factory=dict)
    outcomes: dict[tuple[tuple[int, ...], int], _Outcome] = field(default_factory=dict)
    large_tokens: dict[tuple[int, ...], LargeToken] = field(default_factory=dict)

    def make_consistent(
        self, ids: tuple[int, ...], tokens: tuple[LargeToken, ...]
    ) -> tuple[LargeToken, ...]:
        """Return the tokens after `ids`, each replaced by the first answer to its context.

        The tokens after the first replaced one are dropped, because they do not follow it.
        """
        consistent: list[LargeToken] = []
        for token in tokens:
            consistent.append(self.large_tokens.setdefault(ids, token))
            if consistent[-1].token_ids != token.token_ids:
                break
            ids += token.token_ids
        return tuple(consistent)


class VirtualSmall:
    """The small model on the virtual clock.

    Its KV cache can be rolled back as far as a real one of the same length.

    Args:
        small: The real small model.
        outputs: Outputs so far.
        clock: The virtual clock.
        cost: Seconds that a step and a batch take; of one row where there are no batches.
    """

    def __init__(
        self, small: SmallModel, outputs: OutputCache, clock: VirtualClock, cost: BranchCost
    ) -> None:
        self._small = small
        # Tells what a real cache allows at a length, which need not be that of `small` now.
        self._empty = small.with_own_cache()
        self._outputs = outputs
        self._clock = clock
        self._cost = cost
        self._ids: list[int] = []
        self._rows: list[list[int]] = []

    @property
    def vocabulary(self) -> Vocabulary:
        return self._small.vocabulary

    @property
    def context_length(self) -> int:
        return self._small.context_length

    @property
    def max_rows(self) -> int:
        return self._cost.rows if self.can_rollback(0) else 1

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        return self._small.encode_conversation(messages)

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        self._ids = list(prompt_ids)
        return self._signals(self._ids), 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        self._clock.now_s += self._cost.step_s
        self._ids += token_ids
        return self._signals(self._ids)

    @property
    def cached_ids(self) -> Sequence[int]:
        return self._ids

    @property
    def batch_tails(self) -> Sequence[Sequence[int]]:
        return [row[len(self._ids) :] for row in self._rows]

    def can_rollback(self, count: int) -> bool:
        length = len((self._rows or [self._ids])[0])
        return self._empty.can_rollback(length + count)

    def rollback(self, count: int) -> None:
        del self._ids[len(self._ids) - count :]

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        return self._cost

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        self._clock.now_s += self._cost.batch_s
        rows = self._rows or [self._ids]
        self._rows = [
            [*rows[row], token_id] for row, token_id in zip(parents, token_ids, strict=True)
        ]
        cached = self._outputs.batch_signals
        keys = [tuple(row) for row in self._rows]
        if not all(key in cached for key in keys):
            step_signals = self._step_batch(rows, parents, token_ids)
            for key, signals in zip(keys, step_signals, strict=True):
                cached.setdefault(key, signals)
        return [cached[key] for key in keys]

    def select(self, row: int) -> None:
        if self._rows:
            self._ids, self._rows = self._rows[row], []

    def _step_batch(
        self, rows: Sequence[list[int]], parents: Sequence[int], token_ids: Sequence[int]
    ) -> list[Signals]:
        """Feed one token per row to a batch of the real model; return the signals after it.

        The rows continue `cached_ids`, and all have the same length.
        """
        small = self._small
        common = len(self._ids)
        if [[*small.cached_ids, *tail] for tail in small.batch_tails or [[]]] != rows:
            small.prefill(self._ids)
            for place in range(common, len(rows[0])):
                row_numbers = [0] * len(rows) if place == common else range(len(rows))
                small.branch(row_numbers, [row[place] for row in rows])
        return small.branch(parents, token_ids)

    def _signals(self, ids: Sequence[int]) -> Signals:
        key = tuple(ids)
        if key not in self._outputs.signals:
            self._outputs.signals[key] = self._small.prefill(ids)[0]
        return self._outputs.signals[key]


class _VirtualCall:
    """A call whose outcome arrives at set times, one for each token or one for all."""

    def __init__(self, outcome: _Outcome, *, times_s: Sequence[float], clock: VirtualClock) -> None:
        self._outcome = outcome
        self._times_s = times_s
        self._clock = clock
        self._cancelled_s = math.inf

    @property
    def next_change_s(self) -> float:
        """Time at which the next token arrives; inf if none will."""
        last_s = min(self._cancelled_s, self._times_s[-1])
        later = (time_s for time_s in self._times_s if self._clock.now_s < time_s <= last_s)
        return next(later, math.inf)

    @property
    def ready(self) -> bool:
        return self._clock.now_s >= self._times_s[0]

    @property
    def finished(self) -> bool:
        return self._clock.now_s >= min(self._cancelled_s, self._times_s[-1])

    def result(self) -> tuple[LargeToken, ...]:
        if isinstance(self._outcome, LargeError):
            raise self._outcome
        if len(self._times_s) == 1:
            return self._outcome
        until_s = min(self._clock.now_s, self._cancelled_s)
        return self._outcome[: sum(time_s <= until_s for time_s in self._times_s)]

    def cancel(self) -> None:
        self._cancelled_s = min(self._cancelled_s, self._clock.now_s)


class VirtualLarge:
    """The large model on the virtual clock.

    Args:
        large: The real large model.
        outputs: Outputs so far.
        clock: The virtual clock.
        call_s: Mean seconds until the first token of a call.
        token_s: Seconds for each further token.
        streams: Whether each token arrives at its own time. If not, all arrive with the last.
        delay: Draws the factor of `call_s` for a context.
    """

    def __init__(
        self,
        large: LargeProtocol,
        outputs: OutputCache,
        clock: VirtualClock,
        *,
        call_s: float,
        token_s: float,
        streams: bool,
        delay: Callable[[random.Random], float],
    ) -> None:
        self._large = large
        self._outputs = outputs
        self._clock = clock
        self._call_s = call_s
        self._token_s = token_s
        self._streams = streams
        self._delay = delay
        self._calls: list[_VirtualCall] = []

    @property
    def uploads(self) -> Uploads:
        """Always empty: the simulation counts no uploads."""
        return Uploads()

    @property
    def is_local(self) -> bool:
        """False: the simulated models do not slow each other."""
        return False

    @property
    def max_in_flight(self) -> int:
        return self._large.max_in_flight

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> _VirtualCall:
        key = (tuple(context.token_ids), prefetch)
        if key not in self._outputs.outcomes:
            outcome = self._call(context, deadline_s, prefetch)
            if not isinstance(outcome, LargeError):
                outcome = self._outputs.make_consistent(key[0], outcome)
            self._outputs.outcomes[key] = outcome
        factor = self._delay(random.Random(str(key)))
        # A lost call is repeated at once, so it takes the mean time.
        first_s = self._call_s * (factor if math.isfinite(factor) else 1.0)
        timed_outcome, latencies_s = self._add_latencies(self._outputs.outcomes[key], first_s)
        times_s = [self._clock.now_s + latency_s for latency_s in latencies_s]
        call = _VirtualCall(timed_outcome, times_s=times_s, clock=self._clock)
        self._calls = [pending for pending in self._calls if not pending.finished] + [call]
        return call

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        ends_s = self._clock.now_s + timeout_s
        while not ready() and self._clock.now_s < ends_s:
            self._clock.now_s = min(ends_s, *(call.next_change_s for call in self._calls))

    def _add_latencies(self, outcome: _Outcome, first_s: float) -> tuple[_Outcome, list[float]]:
        """Return a call's outcome with the latencies of its tokens, and when its parts arrive."""
        if isinstance(outcome, LargeError):
            return outcome, [first_s]
        latencies_s = [first_s + number * self._token_s for number in range(len(outcome))]
        if not self._streams:
            latencies_s = latencies_s[-1:]
        timed = [
            replace(token, latency_s=latency_s)
            for token, latency_s in zip(outcome, latencies_s, strict=self._streams)
        ]
        return (*timed, *outcome[len(timed) :]), latencies_s

    def _call(self, context: LargeContext, deadline_s: float, prefetch: int) -> _Outcome:
        """Call the real large model and wait for its answer."""
        call = self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)
        self._large.wait(lambda: call.finished, timeout_s=deadline_s)
        try:
            return call.result()
        except LargeError as exc:
            return exc
