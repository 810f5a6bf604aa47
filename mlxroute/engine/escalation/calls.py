"""The calls of one answer: starting, waiting and collecting, within an allowance for failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxroute.engine.escalation.failures import AllowanceUsed
from mlxroute.engine.experience import Experience
from mlxroute.engine.governor import Governor
from mlxroute.engine.machine_load import other_busy_core_s
from mlxroute.engine.protocols import LargeProtocol, PendingCallProtocol
from mlxroute.errors import LargeError, LargeTimeout
from mlxroute.types import LargeContext, LargeToken, Mode, Uploads

# The engine waits this much longer, since the large model's own error at the deadline is better.
_GRACE_S = 0.25


@dataclass(slots=True)
class Call:
    """A call for one position, in flight or finished.

    Args:
        pending: The call of the large model, or a prefetched token to wait for.
        started_s: Clock time of the start.
        expires_s: Clock time after which its result is not waited for.
        stall_before_s: The answer's total stall when the call was started, in seconds.
        blocks_decoding: Whether decoding waits for it.
        max_tokens: Maximum number of tokens that it returns.
        is_joined: Whether it waits for a prefetched token of an earlier call.
    """

    pending: PendingCallProtocol
    started_s: float
    expires_s: float
    stall_before_s: float
    blocks_decoding: bool
    max_tokens: int = 1
    is_joined: bool = False


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """The result of a finished call: tokens or an error, and its latency in seconds.

    A joined call has neither if the earlier call's tokens contradict the answer.
    """

    tokens: tuple[LargeToken, ...]
    error: LargeError | None
    latency_s: float


class AnswerCalls:
    """Starts, counts and bounds the calls of one answer.

    Waiting for failed calls, and for failed attempts inside successful ones, costs the answer at
    most `timeout_s` in total. After that no call is made for the rest of the answer. No call asks
    for more tokens than an answer of `max_tokens` has room for.

    Args:
        large: The large model; None where there is none, and no call is made.
        max_tokens: Maximum length of the answer, in tokens.
        timeout_s: Time limit in seconds of each call, and of all waiting for failures.
        governor: Decides how many tokens a call prefetches, and whether decoding waits for it.
        experience: Receives what the calls show.
        clock: Returns seconds.

    Attributes:
        started: Calls that were started, without those that were not made in the end.
        stall_s: Seconds for which decoding waited for calls.
        is_stalling: Whether decoding waits for a call now.
    """

    def __init__(
        self,
        large: LargeProtocol | None,
        *,
        max_tokens: int,
        timeout_s: float,
        governor: Governor,
        experience: Experience,
        clock: Callable[[], float],
    ) -> None:
        self._large = large
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._governor = governor
        self._experience = experience
        self._clock = clock
        # Seconds of waiting that failures may still cost.
        self._failure_allowance_s = timeout_s
        # Why the large model cannot take the committed answer, nor a longer one.
        self._refusal: LargeError | None = None
        # Total stall up to which failures were charged already.
        self._charged_s = 0.0
        self._in_flight: list[Call] = []
        self.started = 0
        self.stall_s = 0.0
        self.is_stalling = False
        self._stalled_since_step = False
        # None until the answer is begun.
        self._uploads_before: Uploads | None = None

    def begin(self) -> None:
        """Count as this answer's what is sent to the large model from now on."""
        self._uploads_before = self._uploads_so_far()

    @property
    def uploads(self) -> Uploads:
        """Totals of what has been sent to the large model since the answer was begun."""
        before = self._uploads_before
        return Uploads() if before is None else self._uploads_so_far() - before

    @property
    def is_open(self) -> bool:
        """Whether this answer may still make calls."""
        has_large = self._large is not None and self._refusal is None
        return has_large and self._failure_allowance_s > 0

    @property
    def closed_error(self) -> LargeError | None:
        """Why this answer makes no more calls; None if it may, or if there is no large model."""
        is_closed = self._large is not None and not self.is_open
        return (self._refusal or AllowanceUsed(self._timeout_s)) if is_closed else None

    @property
    def has_free_slot(self) -> bool:
        """Whether one more call may be in flight."""
        return self._large is not None and len(self._in_flight) < self._large.max_in_flight

    @property
    def in_flight(self) -> int:
        """The number of calls in flight."""
        return len(self._in_flight)

    @property
    def joined(self) -> int:
        """The number of positions that wait for a prefetched token of an earlier call."""
        return sum(call.is_joined for call in self._in_flight)

    @property
    def oldest_age_s(self) -> float | None:
        """Seconds since the oldest call in flight began; None without one."""
        ages_s = (self._clock() - call.started_s for call in self._in_flight)
        return max(ages_s, default=None)

    def start(self, context: LargeContext, position: int) -> Call:
        """Start a call for the token at a position of the answer; requires `is_open`."""
        assert self._large is not None
        deadline_s = min(self._timeout_s, self._failure_allowance_s)
        started_s = self._clock()
        prefetch = max(0, min(self._governor.prefetch, self._max_tokens - position - 1))
        blocks_decoding = self._governor.mode is Mode.WAIT
        self._governor.on_call_started()
        pending = self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)
        call = Call(
            pending,
            started_s,
            expires_s=started_s + deadline_s + _GRACE_S,
            stall_before_s=self.stall_s,
            blocks_decoding=blocks_decoding,
            max_tokens=1 + prefetch,
        )
        self.stall_s += self._clock() - started_s
        self._in_flight.append(call)
        self._experience.on_call_started()
        self.started += 1
        return call

    def join(self, pending: PendingCallProtocol) -> Call:
        """Return a call that waits for a prefetched token of an earlier call."""
        call = Call(
            pending, self._clock(), math.inf, self.stall_s, blocks_decoding=False, is_joined=True
        )
        self._in_flight.append(call)
        return call

    def take_stalled(self) -> bool:
        """Return whether decoding has waited since the last call of this method."""
        stalled, self._stalled_since_step = self._stalled_since_step, False
        return stalled

    def is_finished(self, call: Call) -> bool:
        """Return whether a call has a result, or its time is up."""
        return call.pending.ready or self._clock() >= call.expires_s

    def wait(self, has_news: Callable[[], bool] = lambda: False) -> None:
        """Block until a call is finished or `has_news()` is true."""
        assert self._large is not None

        def is_ready() -> bool:
            return any(call.pending.ready for call in self._in_flight) or has_news()

        began_s = self._clock()
        is_measured = self._large.is_local and self._governor.mode is Mode.WAIT
        busy_before_s = other_busy_core_s() if is_measured else 0.0
        left_s = min(call.expires_s for call in self._in_flight) - began_s
        self.is_stalling = self._stalled_since_step = True
        try:
            self._large.wait(is_ready, timeout_s=max(0.0, min(left_s, self._timeout_s)))
        finally:
            self.is_stalling = False
            waited_s = self._clock() - began_s
            self.stall_s += waited_s
            if is_measured:
                self._experience.on_local_wait(waited_s, other_busy_core_s() - busy_before_s)

    def collect(self, call: Call) -> CallOutcome:
        """Remove a finished call and return its outcome."""
        self._in_flight.remove(call)
        latency_s = self._clock() - call.started_s
        try:
            if not call.pending.ready:
                call.pending.cancel()
                raise LargeTimeout(f"no answer from the large model in {latency_s:.3g} s")
            tokens = call.pending.result()
        except LargeError as exc:
            if not exc.was_called:
                self.started -= 1
                self._experience.on_call_not_made()
            if exc.counts_as_failure:
                self._charge(call, lost_s=latency_s)
            return CallOutcome((), exc, latency_s)
        self._charge(call, lost_s=tokens[0].lost_s if tokens and not call.is_joined else 0.0)
        return CallOutcome(tokens, None, latency_s)

    def refuse(self, refusal: LargeError) -> None:
        """Start no more calls: the large model cannot take the committed answer."""
        self._refusal = refusal

    def discard(self, calls: Sequence[Call]) -> None:
        """Cancel calls whose results are not needed."""
        for call in calls:
            self._in_flight.remove(call)
            call.pending.cancel()

    def close(self) -> None:
        """Cancel all calls."""
        self.discard(list(self._in_flight))

    def _charge(self, call: Call, *, lost_s: float) -> None:
        """Subtract the waiting that a failure caused from the allowance, each second only once."""
        since_s = max(call.stall_before_s, self._charged_s)
        cost_s = min(lost_s, self.stall_s - since_s)
        self._charged_s = since_s + cost_s
        self._failure_allowance_s -= cost_s
        last_s = self._clock() + self._failure_allowance_s + _GRACE_S
        for other in self._in_flight:
            other.expires_s = min(other.expires_s, last_s)

    def _uploads_so_far(self) -> Uploads:
        return Uploads() if self._large is None else self._large.uploads
