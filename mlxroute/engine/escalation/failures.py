"""The failures of one answer: counted by kind, and reported once for each kind."""

from __future__ import annotations

from dataclasses import replace

from mlxroute.errors import (
    LargeError,
    LargeNotContinued,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnavailable,
    LargeUnreachable,
    LargeUnrecorded,
    LargeUnsendable,
)
from mlxroute.types import CallFailure, OnFailure


class AllowanceUsed(LargeUnavailable):
    """Raised for positions after the time that failures may cost an answer is used up."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"failed calls have used up this answer's {timeout_s:.3g} s of waiting, so the small"
            " model finishes it alone",
            parameter="timeout_s",
        )


class ReplyNotRecorded(LargeUnavailable):
    """Raised at a position of a replay whose reply was not recorded."""


_KINDS: tuple[tuple[type[LargeError], str], ...] = (
    (LargeTimeout, "timeout"),
    (LargeUnreachable, "unreachable"),
    (AllowanceUsed, "no time left"),
    (ReplyNotRecorded, "no recorded reply"),
    (LargeUnavailable, "paused"),
    (LargeUnrecorded, "not recorded"),
    (LargeUnsendable, "cannot be sent"),
    (LargeNotContinued, "not continued"),
    (LargeProtocolError, "invalid reply"),
)


def failure_kind(error: LargeError) -> str:
    """Return the kind of an error, in a few words."""
    if isinstance(error, LargeRefused):
        return f"status {error.status}" if error.status else "refused"
    return next((kind for error_type, kind in _KINDS if isinstance(error, error_type)), "failed")


class AnswerFailures:
    """Counts the failures of one answer, and calls `on_failure` at the first of each kind."""

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure
        self._by_kind: dict[str, CallFailure] = {}

    @property
    def all(self) -> tuple[CallFailure, ...]:
        """The failures by kind, in the order of their first."""
        return tuple(self._by_kind.values())

    def record(self, error: LargeError) -> None:
        """Count a position that stays unchecked because of an error."""
        kind = failure_kind(error)
        if (failure := self._by_kind.get(kind)) is not None:
            self._by_kind[kind] = replace(failure, count=failure.count + 1)
            return
        failure = CallFailure(kind, str(error), 1, error.was_called, error.parameter)
        self._by_kind[kind] = failure
        self._on_failure(failure)
