"""Two models whose every word follows from the words before, and calls that land as a clock says.

What is answered depends on the context alone, when it is answered on the dice alone: so any
two ways of asking meet the same server.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnavailable,
)
from mlxroute.types import BranchCost, LargeContext, LargeToken, Signals, Uploads
from tests.support.fakes import EOS, STRADDLING, ByteVocabulary, FakeClock, ScriptedSmall

_E_ACUTE = tuple("é".encode())
_WORDS = (*b"ab.", *b"ab.", *_E_ACUTE, STRADDLING)
_BAND = 0.01
_SPELLED = (b"ab", b"a.b", "é".encode(), b"..")


@dataclass(frozen=True, slots=True)
class World:
    """How often things happen: doubt, agreement, ends, lost calls; and how calls take time.

    With `whole_only` no call can be made inside a character, as with most real servers. A batch
    decides otherwise than a row alone at positions so close to it, by `rounding`. If it `streams`,
    tokens ahead come one by one, slower or faster than steps.
    """

    seed: int
    doubt: float = 0.4
    agreement: float = 0.5
    end: float = 0.03
    loss: float = 0.1
    longest_s: float = 6.0
    cap: int = 8
    whole_only: bool = False
    rounding: float = 0.0
    window: int = 1 << 30
    streams: bool = False

    def dice(self, kind: str, ids: Sequence[int]) -> random.Random:
        """Chance that is the same wherever the same ids come before."""
        return random.Random(f"{self.seed} {kind} {list(ids)}")

    def small(self, ids: Sequence[int]) -> tuple[int, float]:
        """The small model's choice after these ids of the answer, and its entropy."""
        dice = self.dice("small", ids)
        token = EOS if dice.random() < self.end else dice.choice(_WORDS)
        return token, 2.0 + dice.random() if dice.random() < self.doubt else 0.5 * dice.random()

    def large(self, ids: Sequence[int]) -> tuple[int, ...] | LargeError:
        """The large model's token after these ids of the answer, or why it does not come."""
        dice = self.dice("large", ids)
        if dice.random() < self.loss:
            return dice.choice((LargeRefused("no"), LargeTimeout("late"), LargeUnavailable("off")))
        if dice.random() < self.agreement:
            return (self.small(ids)[0],)
        if dice.random() < self.end:
            return (EOS,)
        return tuple(dice.choice(_SPELLED)) if dice.random() < 0.3 else (dice.choice(_WORDS),)


class WorldSmall(ScriptedSmall):
    """The small model of a world; each step takes a second of the clock, a batch a half more."""

    def __init__(self, world: World, clock: FakeClock) -> None:
        super().__init__(())
        self._world = world
        self._clock = clock
        self._rows: list[list[int]] = []
        self.batches = 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        assert token_ids
        assert not self._rows
        self._clock.now += 1.0
        return super().extend(token_ids)

    def can_rollback(self, count: int) -> bool:
        return len(self.fed) + count < self._world.window

    def rollback(self, count: int) -> None:
        assert 0 < count <= len(self.fed) < self._world.window
        assert not self._rows
        super().rollback(count)

    @property
    def batch_tails(self) -> Sequence[Sequence[int]]:
        return [row[len(self.fed) :] for row in self._rows]

    @property
    def max_rows(self) -> int:
        return 4 if self._world.window > 9 else 1

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        return BranchCost(rows, 1.0, 1.5, _BAND)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        assert 1 < len(parents) <= 4
        rows = self._rows or [self.fed]
        self._rows = [[*rows[row], each] for row, each in zip(parents, token_ids, strict=True)]
        self._clock.now += 1.5
        self.batches += 1
        return [self._seen(row, batched=True) for row in self._rows]

    def select(self, row: int) -> None:
        if self._rows:
            self.fed = self._rows[row]
            self._rows = []

    def _signals(self) -> Signals:
        return self._seen(self.fed, batched=False)

    def _seen(self, ids: Sequence[int], *, batched: bool) -> Signals:
        token, entropy = self._world.small(ids)
        dice = self._world.dice("others", ids)
        others = dice.sample([each for each in (*b"ab.", EOS) if each != token], 3)
        gap = 0.5
        if dice.random() < self._world.rounding:
            entropy = 1.0 + dice.uniform(-0.3, 0.3) * _BAND
        if dice.random() < self._world.rounding:
            gap = dice.random() * 0.4 * _BAND
        first = [token, others[0]]
        if batched:
            entropy += dice.uniform(-0.5, 0.5) * _BAND
            if gap < _BAND and dice.random() < 0.5:
                first.reverse()
        tops = (-0.7, -0.7 - gap, -1.6 - gap, -2.5 - gap)
        return Signals(first[0], -0.7, entropy, 0.0, 0.1, (*first, *others[1:]), tops)


class WorldFlight:
    """A call that lands at its moment, unless it was cancelled before; a stream goes on from there.

    It brings a token every `step_s`, and breaks off after `last` tokens, with a second's silence.
    """

    def __init__(
        self,
        outcome: tuple[LargeToken, ...] | LargeError,
        *,
        lands_s: float,
        clock: FakeClock,
        step_s: float = 0.0,
        last: int | None = None,
    ) -> None:
        self._outcome = outcome
        self._clock = clock
        self._step_s = step_s
        self._last = last
        self.lands_s = lands_s
        self.settled = False
        self.cancelled_s = math.inf

    @property
    def times_s(self) -> list[float]:
        """When it changes: with each token of a stream and at its end."""
        count = 1 if isinstance(self._outcome, LargeError) else len(self._outcome)
        times_s = [self.lands_s + self._step_s * number for number in range(count)]
        if self._last is not None and self._last < count:
            times_s = [*times_s[: self._last], times_s[self._last - 1] + 1.0]
        return [time_s for time_s in times_s if time_s <= self.cancelled_s]

    @property
    def ready(self) -> bool:
        assert self.cancelled_s >= self.lands_s, "a cancelled call is not looked at"
        return self._clock.now >= self.lands_s

    @property
    def finished(self) -> bool:
        if self.cancelled_s < math.inf:
            return True
        return self._clock.now >= self.times_s[-1]

    def result(self) -> tuple[LargeToken, ...]:
        assert self.ready
        self.settled = True
        if isinstance(self._outcome, LargeError):
            raise self._outcome
        came = sum(time_s <= self._clock.now for time_s in self.times_s)
        return self._outcome[: came if self._last is None else min(came, self._last)]

    def cancel(self) -> None:
        assert not self.finished or not self.settled
        assert self.cancelled_s == math.inf
        self.settled = True
        self.cancelled_s = self._clock.now


class WorldLarge:
    """The large model of a world, whose calls take as long as the dice of `order` say."""

    def __init__(self, world: World, clock: FakeClock, *, prompt: str, order: int) -> None:
        self._world = world
        self._clock = clock
        self._prompt = prompt
        self._dice = random.Random(order)
        self.uploads = Uploads()
        self.flights: list[WorldFlight] = []

    @property
    def max_in_flight(self) -> int:
        return self._world.cap

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> WorldFlight:
        assert sum(not flight.settled for flight in self.flights) < self._world.cap
        prompt_ids = list(self._prompt.encode())
        assert list(context.token_ids[: len(prompt_ids)]) == prompt_ids
        ids = tuple(context.token_ids[len(prompt_ids) :])
        _check(context, self._prompt, ids)
        lands_s = self._clock.now + self._dice.uniform(0.0, self._world.longest_s)
        outcome = self._tokens(ids, prefetch)
        if self._world.whole_only and context.fragment_ids:
            outcome = LargeProtocolError("inside a character")
        streamed = self._world.streams and prefetch > 0
        flight = WorldFlight(
            outcome,
            lands_s=lands_s,
            clock=self._clock,
            step_s=self._dice.choice((0.2, 3.0)) if streamed else 0.0,
            last=self._dice.randint(1, 8) if streamed else None,
        )
        self.flights.append(flight)
        return flight

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        ends_s = self._clock.now + timeout_s
        while not ready() and self._clock.now < ends_s:
            coming = [t for flight in self.flights for t in flight.times_s if t > self._clock.now]
            assert coming, "nothing is waited for"
            self._clock.now = min(ends_s, *coming)

    def _tokens(self, ids: tuple[int, ...], prefetch: int) -> tuple[LargeToken, ...] | LargeError:
        found: list[LargeToken] = []
        while len(found) <= prefetch and not (found and found[-1].is_eos):
            answer = self._world.large(ids)
            if isinstance(answer, LargeError):
                # A call for this position would be lost: nothing is known of it.
                return tuple(found) or answer
            found.append(token_of(answer))
            ids = (*ids, *answer)
        return tuple(found)


def token_of(ids: tuple[int, ...]) -> LargeToken:
    """A large token of these small ids, as if it had come by itself."""
    return LargeToken(
        token_ids=ids,
        text="",
        is_eos=ids == (EOS,),
        logprob=-0.5,
        top=(),
        prompt_tokens=None,
        cached_tokens=None,
        completion_tokens=None,
        uploaded_bytes=0,
        latency_s=0.0,
        large_ids=tuple(1000 + i for i in ids[:1]),
    )


def _check(context: LargeContext, prompt: str, ids: tuple[int, ...]) -> None:
    """The context is one and the same text in all its forms."""
    whole = ids[: len(ids) - len(context.fragment_ids)]
    data = b"".join(map(ByteVocabulary().token_bytes, whole))
    assert context.text == prompt + data.decode(errors="ignore")
    assert ids[len(whole) :] == context.fragment_ids
    assert prompt + "".join(span.text for span in context.spans) == context.text
