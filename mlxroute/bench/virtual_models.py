"""Both models on a clock of their own: what a schedule costs, without waiting for it.

The engine is the real one, and so is every token: positions come from the small model, calls are
answered by the large one, each once. Only times are set: a step, a batch and a call take what they
are told to.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mlxroute.engine.protocols import LargeProtocol
from mlxroute.errors import LargeError
from mlxroute.small import SmallModel
from mlxroute.small.batch import Batch
from mlxroute.types import (
    BranchCost,
    LargeContext,
    LargeToken,
    Message,
    Progress,
    Sampling,
    Signals,
    Uploads,
    Vocabulary,
)


@dataclass(slots=True)
class VirtualClock:
    """Seconds that pass only when somebody says so."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class Known:
    """What both models said so far: signals behind token ids, answers to contexts.

    `batched` are those of rows of a batch. `tokens` are the large model's first words on each
    context: a server that computes one in two ways may give two answers at a near tie.
    """

    signals: dict[tuple[int, ...], Signals] = field(default_factory=dict)
    batched: dict[tuple[int, ...], Signals] = field(default_factory=dict)
    answers: dict[tuple[tuple[int, ...], int], tuple[LargeToken, ...] | LargeError] = field(
        default_factory=dict
    )
    tokens: dict[tuple[int, ...], LargeToken] = field(default_factory=dict)

    def abided(
        self, ids: tuple[int, ...], answer: tuple[LargeToken, ...]
    ) -> tuple[LargeToken, ...]:
        """The answer to a context as far as it is what was said before, and that instead."""
        found: list[LargeToken] = []
        for token in answer:
            found.append(self.tokens.setdefault(ids, token))
            if found[-1].token_ids != token.token_ids:
                break
            ids += token.token_ids
        return tuple(found)


class VirtualSmall:
    """The small model, with a step of one row and of a batch as long as `cost` says."""

    def __init__(
        self, small: SmallModel, known: Known, clock: VirtualClock, cost: BranchCost
    ) -> None:
        self._small = small
        self._known = known
        self._clock = clock
        self._cost = cost
        self._ids: list[int] = []
        self._rows: list[list[int]] = []
        self._batch: Batch | None = None
        self._batched: list[list[int]] = []

    @property
    def vocabulary(self) -> Vocabulary:
        return self._small.vocabulary

    @property
    def context_length(self) -> int:
        return self._small.context_length

    @property
    def max_rows(self) -> int:
        return self._cost.rows

    def render(self, messages: Sequence[Message]) -> str:
        return self._small.render(messages)

    def encode_prompt(self, text: str) -> list[int]:
        return self._small.encode_prompt(text)

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
        return True

    def rollback(self, count: int) -> None:
        del self._ids[len(self._ids) - count :]

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        return self._cost

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        self._clock.now_s += self._cost.batch_s
        rows = self._rows or [self._ids]
        self._rows = [[*rows[row], each] for row, each in zip(parents, token_ids, strict=True)]
        known, keys = self._known.batched, [tuple(row) for row in self._rows]
        if not all(key in known for key in keys):
            for key, signals in zip(keys, self._stepped(rows, parents, token_ids), strict=True):
                known.setdefault(key, signals)
        return [known[key] for key in keys]

    def select(self, row: int) -> None:
        if self._rows:
            self._ids, self._rows = self._rows[row], []

    def _stepped(
        self, rows: Sequence[list[int]], parents: Sequence[int], token_ids: Sequence[int]
    ) -> list[Signals]:
        """What a real batch says behind one more token a row."""
        if self._batch is None or self._batched != rows:
            self._batch = self._small.start_batch(
                [self._small.prefill_copy(row)[1] for row in rows]
            )
        self._batched = self._rows
        return self._batch.step(parents, token_ids)

    def _signals(self, ids: Sequence[int]) -> Signals:
        key = tuple(ids)
        if key not in self._known.signals:
            self._known.signals[key] = self._small.prefill(ids)[0]
        return self._known.signals[key]


class _Flight:
    """A call whose outcome is known and comes at its times: one for each token, or one in all."""

    def __init__(
        self,
        outcome: tuple[LargeToken, ...] | LargeError,
        *,
        times_s: Sequence[float],
        clock: VirtualClock,
    ) -> None:
        self._outcome = outcome
        self._times_s = times_s
        self._clock = clock
        self._cancelled_s = math.inf

    @property
    def next_s(self) -> float:
        """When it changes next; inf when it does not."""
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
    """The large model, whose calls take `call_s` times what `delay` draws for each context.

    Each token that a call brings beyond the first takes `token_s` more; if `streams`, only until it
    is there itself.
    """

    def __init__(
        self,
        large: LargeProtocol,
        known: Known,
        clock: VirtualClock,
        *,
        call_s: float,
        token_s: float,
        streams: bool,
        delay: Callable[[random.Random], float],
    ) -> None:
        self._large = large
        self._streams = streams
        self._known = known
        self._clock = clock
        self._call_s = call_s
        self._token_s = token_s
        self._delay = delay
        self._flights: list[_Flight] = []

    @property
    def uploads(self) -> Uploads:
        """Nothing is sent that counts."""
        return Uploads()

    @property
    def max_in_flight(self) -> int:
        return self._large.max_in_flight

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> _Flight:
        key = (tuple(context.token_ids), prefetch)
        if key not in self._known.answers:
            answer = self._asked(context, deadline_s, prefetch)
            if not isinstance(answer, LargeError):
                answer = self._known.abided(key[0], answer)
            self._known.answers[key] = answer
        drawn = self._delay(random.Random(str(key)))
        # A lost call is made again at once.
        drawn = drawn if math.isfinite(drawn) else 1.0
        outcome = self._known.answers[key]
        took_s = [self._call_s * drawn]
        if not isinstance(outcome, LargeError):
            took_s = [took_s[0] + number * self._token_s for number in range(len(outcome))]
            took_s = took_s if self._streams else took_s[-1:]
            latencies = zip(outcome, took_s, strict=self._streams)
            timed = (replace(token, latency_s=seconds) for token, seconds in latencies)
            outcome = (*timed, *outcome[len(took_s) :])
        times_s = [self._clock.now_s + seconds for seconds in took_s]
        flight = _Flight(outcome, times_s=times_s, clock=self._clock)
        self._flights = [each for each in self._flights if not each.finished] + [flight]
        return flight

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        ends_s = self._clock.now_s + timeout_s
        while not ready() and self._clock.now_s < ends_s:
            self._clock.now_s = min(ends_s, *(each.next_s for each in self._flights))

    def _asked(
        self, context: LargeContext, deadline_s: float, prefetch: int
    ) -> tuple[LargeToken, ...] | LargeError:
        flight = self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)
        self._large.wait(lambda: flight.finished, timeout_s=deadline_s)
        try:
            return flight.result()
        except LargeError as exc:
            return exc
