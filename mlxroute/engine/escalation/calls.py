"""Calls to the large model, within what faults may cost one answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxroute.engine.modes.governor import Governor
from mlxroute.engine.protocols import LargeProtocol, PendingCallProtocol
from mlxroute.errors import LargeError, LargeTimeout, LargeUnavailable, LargeUnrecorded
from mlxroute.types import LargeContext, LargeToken, Mode, Uploads

# The large side keeps its deadlines itself, and its reasons are the better ones.
_GRACE_S = 0.25


@dataclass(slots=True)
class Call:
    """A call under way. `stall_s` is what the answer had waited in all when it began.

    `alone` says that nothing else is done meanwhile, `most` how many tokens it may bring, and
    `joined` that it is the place of a token in an earlier call.
    """

    flight: PendingCallProtocol
    began_s: float
    ends_s: float
    stall_s: float
    alone: bool
    most: int = 1
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call: tokens, or the error; neither where a joined one went another way."""

    tokens: tuple[LargeToken, ...]
    error: LargeError | None
    latency_s: float


class Escalator:
    """Counts and bounds the calls of one answer.

    Waiting for calls that fail, and for failed attempts of others, may cost an answer `timeout_s`
    in all; after that the rest of it is the small model's.
    """

    def __init__(
        self,
        large: LargeProtocol | None,
        *,
        timeout_s: float,
        governor: Governor,
        clock: Callable[[], float],
    ) -> None:
        self._large = large
        self._timeout_s = timeout_s
        self._governor = governor
        self._clock = clock
        self._allowance_s = timeout_s
        self._charged_s = 0.0
        self._calls: list[Call] = []
        self.begun = 0
        self.stall_s = 0.0
        self.stalling = False
        self._stalled = False
        self._uploads_before = self._uploads_so_far()

    @property
    def uploads(self) -> Uploads:
        """What this answer's calls sent."""
        return self._uploads_so_far() - self._uploads_before

    @property
    def open(self) -> bool:
        """Whether this answer still makes calls."""
        return self._large is not None and self._allowance_s > 0

    @property
    def has_room(self) -> bool:
        """Whether one more call may be under way."""
        return self._large is not None and len(self._calls) < self._large.max_in_flight

    @property
    def calls(self) -> int:
        """How many calls are under way."""
        return len(self._calls)

    @property
    def joined(self) -> int:
        """How many positions wait for their place in a call that was begun for another."""
        return sum(call.joined for call in self._calls)

    @property
    def oldest_s(self) -> float:
        """How long the oldest call is under way; -inf when there is none."""
        return max((self._clock() - call.began_s for call in self._calls), default=-math.inf)

    def begin(self, context: LargeContext) -> Call:
        """Begin a call. Use it only while `open`."""
        assert self._large is not None
        deadline_s = min(self._timeout_s, self._allowance_s)
        began_s = self._clock()
        prefetch = self._governor.ahead
        self._governor.begun()
        flight = self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)
        alone = self._governor.mode is Mode.WAIT
        ends_s = began_s + deadline_s + _GRACE_S
        call = Call(flight, began_s, ends_s, self.stall_s, alone, most=1 + prefetch)
        self.stall_s += self._clock() - began_s
        self._calls.append(call)
        self.begun += 1
        return call

    def join(self, flight: PendingCallProtocol) -> Call:
        """Wait for the place of a token in a call that was begun for another."""
        call = Call(flight, self._clock(), math.inf, self.stall_s, alone=False, joined=True)
        self._calls.append(call)
        return call

    def take_stalled(self) -> bool:
        """Whether there was a wait since this was asked last."""
        stalled, self._stalled = self._stalled, False
        return stalled

    def landed(self, call: Call) -> bool:
        """Whether a call is over, by its answer or by its time."""
        return call.flight.ready or self._clock() >= call.ends_s

    def wait(self, news: Callable[[], bool] = lambda: False) -> None:
        """Stand still until a call has landed, or there are other `news` of one."""
        assert self._large is not None

        def ready() -> bool:
            return any(call.flight.ready for call in self._calls) or news()

        began_s = self._clock()
        left_s = min(call.ends_s for call in self._calls) - began_s
        self.stalling = self._stalled = True
        try:
            self._large.wait(ready, timeout_s=max(0.0, min(left_s, self._timeout_s)))
        finally:
            self.stalling = False
            self.stall_s += self._clock() - began_s

    def settle(self, call: Call) -> Outcome:
        """What came of a call that has landed."""
        self._calls.remove(call)
        latency_s = self._clock() - call.began_s
        try:
            if not call.flight.ready:
                call.flight.cancel()
                raise LargeTimeout(f"no answer from the large model in {latency_s:.3g} s")
            tokens = call.flight.result()
        except LargeError as exc:
            if not isinstance(exc, LargeUnavailable | LargeUnrecorded):
                self._charge(call, lost_s=latency_s)
            return Outcome((), exc, latency_s)
        self._charge(call, lost_s=tokens[0].lost_s if tokens and not call.joined else 0.0)
        return Outcome(tokens, None, latency_s)

    def abandon(self, calls: Sequence[Call]) -> None:
        """Drop calls whose answers are not wanted any more."""
        for call in calls:
            self._calls.remove(call)
            call.flight.cancel()

    def close(self) -> None:
        """Drop all calls."""
        self.abandon(list(self._calls))

    def _charge(self, call: Call, *, lost_s: float) -> None:
        """Count what the answer waited for a fault, each second of it once."""
        since_s = max(call.stall_s, self._charged_s)
        cost_s = min(lost_s, self.stall_s - since_s)
        self._charged_s = since_s + cost_s
        self._allowance_s -= cost_s
        last_s = self._clock() + self._allowance_s + _GRACE_S
        for other in self._calls:
            other.ends_s = min(other.ends_s, last_s)

    def _uploads_so_far(self) -> Uploads:
        return Uploads() if self._large is None else self._large.uploads
