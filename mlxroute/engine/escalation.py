"""Asking the large model, within what faults may cost one answer."""

from __future__ import annotations

from collections.abc import Callable

from mlxroute.engine.privacy import NeverSend
from mlxroute.engine.roles import Large
from mlxroute.errors import LargeError, LargeUnavailable, LargeUnrecorded
from mlxroute.types import Escalation, LargeContext, Uploads


class Escalator:
    """Counts and bounds the calls of one answer.

    Failed calls, and failed attempts of others, may cost an answer `timeout_s` of waiting in all;
    after that the rest of it is the small model's. With `strict`, a failure is raised.
    Contexts that `never_send` matches are not sent; that is no failure.
    """

    def __init__(
        self,
        large: Large | None,
        *,
        never_send: NeverSend,
        timeout_s: float,
        strict: bool,
        clock: Callable[[], float],
    ) -> None:
        self._large = large
        self._never_send = never_send
        self._timeout_s = timeout_s
        self._strict = strict
        self._clock = clock
        self._allowance_s = timeout_s
        self.fallbacks = 0
        self.escalated = 0
        self.agreed = 0
        self.withheld = 0
        self.stall_s = 0.0
        self._uploads_before = self._uploads_so_far()

    @property
    def uploads(self) -> Uploads:
        """What this answer's calls sent."""
        return self._uploads_so_far() - self._uploads_before

    @property
    def open(self) -> bool:
        """Whether this answer still makes calls."""
        return self._large is not None and self._allowance_s > 0

    def ask(self, context: LargeContext, small_id: int) -> Escalation | None:
        """One call, its failure part of the result; None when the large side made no call.

        A context that must stay here is not sent, and says so. Use it only while `open`.
        """
        assert self._large is not None
        if (number := self._never_send.match(context.text)) is not None:
            self.withheld += 1
            failure = f"withheld: never-send pattern {number}"
            return Escalation(small_id, large=None, failure=failure, latency_s=0.0)
        began = self._clock()
        try:
            answer = self._large.next_token(
                context, deadline_s=min(self._timeout_s, self._allowance_s)
            )
        except LargeError as exc:
            if self._strict:
                raise
            if isinstance(exc, LargeUnavailable | LargeUnrecorded):
                return None
            latency_s = self._clock() - began
            self.fallbacks += 1
            self._allowance_s -= latency_s
            return Escalation(small_id, large=None, failure=str(exc), latency_s=latency_s)
        finally:
            self.stall_s += self._clock() - began
        escalation = Escalation(small_id, answer, failure=None, latency_s=self._clock() - began)
        self._allowance_s -= answer.lost_s
        self.escalated += 1
        self.agreed += escalation.agreed
        return escalation

    def _uploads_so_far(self) -> Uploads:
        return Uploads() if self._large is None else self._large.uploads
