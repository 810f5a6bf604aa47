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
        self._counted: dict[tuple[str, bool], CallFailure] = {}

    @property
    def all(self) -> tuple[CallFailure, ...]:
        """The failures by kind, and by whether a call was made, in the order of their first."""
        return tuple(self._counted.values())

    def record(self, error: LargeError, *, was_called: bool) -> None:
        """Count a position that stays unchecked because of an error, with a call or without."""
        kind = failure_kind(error)
        key = kind, was_called
        if (failure := self._counted.get(key)) is not None:
            self._counted[key] = replace(failure, count=failure.count + 1)
            return
        is_new = not any(kind == failure.kind for failure in self._counted.values())
        failure = CallFailure(kind, str(error), 1, was_called, error.parameter)
        self._counted[key] = failure
        if is_new:
            self._on_failure(failure)
