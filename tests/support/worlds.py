"""Two random models on a fake clock, for comparing the modes on many schedules of calls.

Their tokens depend only on the ids before, the duration of a call only on the random `order`: every
mode gets the same answers, at other times.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnavailable,
    LargeUnsendable,
)
from mlxroute.types import BranchCost, LargeContext, LargeToken, Signals, Uploads
from tests.support.scripted_models import EOS, STRADDLING, ByteVocabulary, FakeClock, ScriptedSmall

_E_ACUTE = tuple("é".encode())
_WORDS = (*b"ab.", *b"ab.", *_E_ACUTE, STRADDLING)
_SPELLED = (b"ab", b"a.b", "é".encode(), b"..")


@dataclass(frozen=True, slots=True)
class World:
    """A pair of models, given by probabilities, and the limits of their server and KV cache.

    Args:
        seed: Determines every token.
        doubt: Share of positions at which the small model's entropy is above 2 nats.
        agreement: Share of calls that return the small model's own token.
        end: Share of positions at which a model ends the answer.
        loss: Share of positions at which a call fails.
        refusal: Share of positions whose prompt is refused as too long, some of them at once.
        max_call_s: Longest duration of a call, in seconds.
        max_in_flight: Most calls at a time.
        whole_only: Calls inside a character fail, as with most real servers.
        rounding: Share of positions at which a batch may decide differently from a single row.
        window: Tokens after which the KV cache can no longer be rolled back.
        streams: Prefetched tokens arrive one by one, faster or slower than steps.
        drafted: Share of prefetched tokens without logprobs, as llama-server drafts them.
        band: Bound of the rounding of batches, in nats. From half a step of a budget on, which is
            0.01, a budget could count every position of a batch differently.
    """

    seed: int
    doubt: float = 0.4
    agreement: float = 0.5
    end: float = 0.03
    loss: float = 0.1
    max_call_s: float = 6.0
    max_in_flight: int = 8
    whole_only: bool = False
    rounding: float = 0.0
    window: int = 1 << 30
    streams: bool = False
    refusal: float = 0.0
    drafted: float = 0.0
    band: float = 0.004

    def rng(self, kind: str, ids: Sequence[int]) -> random.Random:
        """Return a random generator that depends only on the seed, `kind` and the ids before."""
        return random.Random(f"{self.seed} {kind} {list(ids)}")

    def small(self, ids: Sequence[int]) -> tuple[int, float]:
        """Return the small model's token after these ids of the answer, and its entropy."""
        return _small(self, tuple(ids))

    def large(self, ids: Sequence[int]) -> tuple[int, ...] | LargeError:
        """Return the large model's token after these ids of the answer, or the call's error."""
        if self.refusal and (rng := self.rng("refusal", ids)).random() < self.refusal:
            too_long = LargeRefused("this exceeds the context", status=400)
            return rng.choice((LargeUnsendable("the context is full"), too_long))
        rng = self.rng("large", ids)
        if rng.random() < self.loss:
            return rng.choice((LargeRefused("no"), LargeTimeout("late"), LargeUnavailable("off")))
        if rng.random() < self.agreement:
            return (self.small(ids)[0],)
        if rng.random() < self.end:
            return (EOS,)
        return tuple(rng.choice(_SPELLED)) if rng.random() < 0.3 else (rng.choice(_WORDS),)


# The modes ask at the same positions, and a random generator takes long to make.
@lru_cache(maxsize=4096)
def _small(world: World, ids: tuple[int, ...]) -> tuple[int, float]:
    rng = world.rng("small", ids)
    token = EOS if rng.random() < world.end else rng.choice(_WORDS)
    return token, 2.0 + rng.random() if rng.random() < world.doubt else 0.5 * rng.random()


@lru_cache(maxsize=4096)
def _small_signals(world: World, ids: tuple[int, ...], *, batched: bool) -> Signals:
    token, entropy = world.small(ids)
    rng = world.rng("others", ids)
    others = rng.sample([token_id for token_id in (*b"ab.", EOS) if token_id != token], 3)
    gap = 0.5
    if rng.random() < world.rounding:
        entropy = 1.0 + rng.uniform(-0.3, 0.3) * world.band
    if rng.random() < world.rounding:
        gap = rng.random() * 0.4 * world.band
    first = [token, others[0]]
    if batched:
        entropy += rng.uniform(-0.5, 0.5) * world.band
        if gap < world.band and rng.random() < 0.5:
            first.reverse()
    tops = (-0.7, -0.7 - gap, -1.6 - gap, -2.5 - gap)
    return Signals(first[0], -0.7, entropy, 0.0, 0.1, (*first, *others[1:]), tops)


class WorldSmall(ScriptedSmall):
    """The small model of a world; a step takes 1 s on the clock, a step of a batch 1.5 s.

    `exact_length` is the number of leading tokens that no batch computed; after others, signals
    are rounded as those of a batch.
    """

    def __init__(self, world: World, clock: FakeClock) -> None:
        super().__init__(())
        self._world = world
        self._clock = clock
        self._rows: list[list[int]] = []
        self.exact_length = 0
        self.batches = 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        assert token_ids
        assert not self._rows
        self._clock.now += 1.0
        if self.exact_length == len(self.fed):
            self.exact_length += len(token_ids)
        return super().extend(token_ids)

    def can_rollback(self, count: int) -> bool:
        return len((self._rows or [self.fed])[0]) + count < self._world.window

    def rollback(self, count: int) -> None:
        assert 0 < count <= len(self.fed) < self._world.window
        assert not self._rows
        super().rollback(count)
        self.exact_length = min(self.exact_length, len(self.fed))

    @property
    def batch_tails(self) -> Sequence[Sequence[int]]:
        return [row[len(self.fed) :] for row in self._rows]

    @property
    def max_rows(self) -> int:
        return 4 if self.can_rollback(0) else 1

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        return BranchCost(rows, 1.0, 1.5, self._world.band)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        assert 1 < len(parents) <= 4
        rows = self._rows or [self.fed]
        self._rows = [
            [*rows[row], token_id] for row, token_id in zip(parents, token_ids, strict=True)
        ]
        self._clock.now += 1.5
        self.batches += 1
        return [self._signals_after(row, batched=True) for row in self._rows]

    def select(self, row: int) -> None:
        if self._rows:
            self.fed = self._rows[row]
            self._rows = []

    def _signals(self) -> Signals:
        return self._signals_after(self.fed, batched=self.exact_length < len(self.fed))

    def _signals_after(self, ids: Sequence[int], *, batched: bool) -> Signals:
        return _small_signals(self._world, tuple(ids), batched=batched)


class WorldCall:
    """A call that is ready at `ready_s` unless it is cancelled before.

    A stream brings a token every `step_s` from then on. It breaks off a second after `max_tokens`
    tokens. A call is `consumed` once its result was read or it was cancelled.
    """

    def __init__(
        self,
        outcome: tuple[LargeToken, ...] | LargeError,
        *,
        ready_s: float,
        clock: FakeClock,
        step_s: float = 0.0,
        max_tokens: int | None = None,
    ) -> None:
        self._outcome = outcome
        self._clock = clock
        self._step_s = step_s
        self._max_tokens = max_tokens
        self.ready_s = ready_s
        self.consumed = False
        self.was_read = False
        self.cancelled_s = math.inf

    @property
    def was_made(self) -> bool:
        """Whether it was not read to be an error that stands for no call."""
        if self.was_read and isinstance(self._outcome, LargeError):
            return self._outcome.was_called
        return True

    @property
    def times_s(self) -> list[float]:
        """The times of its tokens and of its end."""
        count = 1 if isinstance(self._outcome, LargeError) else len(self._outcome)
        times_s = [self.ready_s + self._step_s * number for number in range(count)]
        if self._max_tokens is not None and self._max_tokens < count:
            times_s = [*times_s[: self._max_tokens], times_s[self._max_tokens - 1] + 1.0]
        return [time_s for time_s in times_s if time_s <= self.cancelled_s]

    @property
    def ready(self) -> bool:
        assert self.cancelled_s >= self.ready_s, "a cancelled call is not read"
        return self._clock.now >= self.ready_s

    @property
    def finished(self) -> bool:
        if self.cancelled_s < math.inf:
            return True
        return self._clock.now >= self.times_s[-1]

    def result(self) -> tuple[LargeToken, ...]:
        assert self.ready
        self.consumed = self.was_read = True
        if isinstance(self._outcome, LargeError):
            raise self._outcome
        count = sum(time_s <= self._clock.now for time_s in self.times_s)
        return self._outcome[: count if self._max_tokens is None else min(count, self._max_tokens)]

    def cancel(self) -> None:
        assert not self.finished or not self.consumed
        assert self.cancelled_s == math.inf
        self.consumed = True
        self.cancelled_s = self._clock.now


class WorldLarge:
    """The large model of a world; the seed `order` determines how long each call takes."""

    model_name = "world"

    def __init__(self, world: World, clock: FakeClock, *, prompt: str, order: int) -> None:
        self._world = world
        self._clock = clock
        self._prompt = prompt
        self._rng = random.Random(order)
        self.uploads = Uploads()
        self.calls: list[WorldCall] = []
        self._contexts: list[tuple[tuple[int, ...], tuple[str, ...]]] = []

    @property
    def spans(self) -> set[tuple[tuple[int, ...], tuple[str, ...]]]:
        """For each call that was read, the ids before it and the texts that may be cut apart."""
        contexts = zip(self.calls, self._contexts, strict=True)
        return {context for call, context in contexts if call.was_read}

    @property
    def is_local(self) -> bool:
        return False

    @property
    def max_in_flight(self) -> int:
        return self._world.max_in_flight

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> WorldCall:
        assert sum(not call.consumed for call in self.calls) < self._world.max_in_flight
        prompt_ids = list(self._prompt.encode())
        assert list(context.token_ids[: len(prompt_ids)]) == prompt_ids
        ids = tuple(context.token_ids[len(prompt_ids) :])
        _check(context, self._prompt, ids)
        texts = tuple(span.text for span in context.spans if span.text)
        self._contexts.append((ids, texts))
        ready_s = self._clock.now + self._rng.uniform(0.0, self._world.max_call_s)
        outcome = self._tokens(ids, prefetch)
        if self._world.whole_only and context.fragment_ids:
            outcome = LargeProtocolError("inside a character")
        if isinstance(outcome, LargeUnsendable):
            ready_s = self._clock.now
        streamed = self._world.streams and prefetch > 0
        call = WorldCall(
            outcome,
            ready_s=ready_s,
            clock=self._clock,
            step_s=self._rng.choice((0.2, 3.0)) if streamed else 0.0,
            max_tokens=self._rng.randint(1, 8) if streamed else None,
        )
        self.calls.append(call)
        return call

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        ends_s = self._clock.now + timeout_s
        while not ready() and self._clock.now < ends_s:
            times_s = [t for call in self.calls for t in call.times_s if t > self._clock.now]
            assert times_s, "no call is in flight"
            self._clock.now = min(ends_s, *times_s)

    def _tokens(self, ids: tuple[int, ...], prefetch: int) -> tuple[LargeToken, ...] | LargeError:
        tokens: list[LargeToken] = []
        while len(tokens) <= prefetch and not (tokens and tokens[-1].is_eos):
            answer = self._world.large(ids)
            if isinstance(answer, LargeError):
                # A call for this position fails, so no prefetched token may replace it.
                return tuple(tokens) or answer
            token = token_of(answer)
            token = replace(token, top_bytes=self._alternatives(ids))
            if tokens and self._world.rng("drafted", ids).random() < self._world.drafted:
                token = replace(token, logprob=None, top_bytes=())
            tokens.append(token)
            ids = (*ids, *answer)
        return tuple(tokens)

    def _alternatives(self, ids: tuple[int, ...]) -> tuple[tuple[bytes, float], ...]:
        """Return the small model's token, at most 0.4 nats less likely than the large one's."""
        small_id = self._world.small(ids)[0]
        gap = 0.4 * self._world.rng("gap", ids).random()
        data = ByteVocabulary().token_bytes(small_id)
        return ((data, -0.5 - gap),) if data else ()


def token_of(ids: tuple[int, ...]) -> LargeToken:
    """Return a large token of these small ids, as a call for it alone returns it."""
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
    """Check that all forms of the context are the same text."""
    whole = ids[: len(ids) - len(context.fragment_ids)]
    data = b"".join(map(ByteVocabulary().token_bytes, whole))
    assert context.text == prompt + data.decode(errors="ignore")
    assert ids[len(whole) :] == context.fragment_ids
    assert prompt + "".join(span.text for span in context.spans) == context.text
