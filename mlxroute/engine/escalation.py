"""Asking the large model, within what faults may cost one answer."""

from __future__ import annotations

from collections.abc import Callable

from mlxroute.engine.roles import Large
from mlxroute.errors import LargeError, LargeUnavailable
from mlxroute.types import Escalation, LargeContext


class Escalator:
    """Counts and bounds the calls of one answer.

    Failed calls, and failed attempts of others, may cost an answer `timeout_s` of waiting in all;
    after that the rest of it is the small model's. With `strict`, a failure is raised.
    """

    def __init__(
        self, large: Large | None, *, timeout_s: float, strict: bool, clock: Callable[[], float]
    ) -> None:
        self._large = large
        self._timeout_s = timeout_s
        self._strict = strict
        self._clock = clock
        self._allowance_s = timeout_s
        self.fallbacks = 0
        self.escalated = 0
        self.agreed = 0
        self.stall_s = 0.0
        self.uploaded_tokens = 0
        self.uploaded_bytes = 0
        self.large_cached_tokens = 0

    @property
    def open(self) -> bool:
        """Whether this answer still makes calls."""
        return self._large is not None and self._allowance_s > 0

    def ask(self, context: LargeContext, small_id: int) -> Escalation | None:
        """One call, its failure part of the result; None when the large side made no call.

        Use it only while `open`.
        """
        assert self._large is not None
        began = self._clock()
        try:
            answer = self._large.next_token(
                context, deadline_s=min(self._timeout_s, self._allowance_s)
            )
        except LargeError as exc:
            if self._strict:
                raise
            if isinstance(exc, LargeUnavailable):
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
        self.uploaded_bytes += answer.uploaded_bytes
        self.large_cached_tokens += answer.cached_tokens or 0
        counted = answer.prompt_tokens
        self.uploaded_tokens += len(context.token_ids) if counted is None else counted
        return escalation
