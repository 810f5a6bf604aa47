"""Retries: which failures are transient, how often a request is repeated, and the pauses between.

A repeated request for tokens is harmless: replies are greedy, and requests change nothing on the
server. One for a whole answer would be paid for twice if the server still writes the first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import IncompleteRead
from typing import Final, Protocol, TypeVar

from requests.exceptions import ChunkedEncodingError

from mlxroute.large.http.deadline import Deadline

RETRIES: Final = 3
_FIRST_PAUSE_S: Final = 0.1
_GROWTH: Final = 4
_MAX_PAUSE_S: Final = 1.0
_RETRY_DELAY: Final = re.compile(rb'"retryDelay": {0,9}"([0-9.]{1,20})s"')


class Attempt(Protocol):
    """A finished attempt to exchange a request for a reply."""

    @property
    def is_transient(self) -> bool:
        """Whether the attempt failed and the same request may succeed later."""
        ...

    @property
    def is_loading(self) -> bool:
        """Whether the server says that it is loading its model."""
        ...

    @property
    def retry_after_s(self) -> float:
        """The seconds that the server asks to wait before the next request; 0 by default."""
        ...


_Attempt = TypeVar("_Attempt", bound=Attempt)


def retry_transient(
    failed: _Attempt,
    attempt: Callable[[], _Attempt],
    deadline: Deadline,
    *,
    left_s: float,
    sleep: Callable[[float], object],
    random: Callable[[], float],
) -> _Attempt:
    """Repeat a transient failure at most `RETRIES` times; return the last attempt.

    A server that is loading its model is asked without limit if the deadline awaits that.

    The pause before each attempt is the backoff or, if longer, the one that the server asks for.
    There is no further attempt if the deadline would pass during the pause. `left_s` is the time
    left before the failed attempt. The time that failures cost is added to the deadline's `lost_s`.
    """
    last = failed
    for number in itertools.count():
        if number >= RETRIES and not (last.is_loading and deadline.awaits_loading):
            break
        backoff = backoff_s(number, random)
        pause_s = max(backoff, last.retry_after_s)
        if pause_s >= deadline.left_s():
            break
        sleep(pause_s)
        deadline.lost_s += left_s - deadline.left_s()
        left_s = deadline.left_s()
        last = attempt()
        if not last.is_transient:
            break
    return last


def is_transient_status(status: int, *, whole_answer: bool = False) -> bool:
    """Return whether the same request may succeed later; 501 and 505 are permanent.

    A whole answer that took too long would do so again, and may still be being written.
    """
    if whole_answer and status in (408, 504, 524):
        return False
    return status in (408, 429) or (500 <= status < 600 and status not in (501, 505))


def is_transient_error(error: BaseException) -> bool:
    """Return whether a connection was refused, reset or closed early.

    A timeout is not transient: the server may still be computing the reply.
    """
    transient = ConnectionError | IncompleteRead | ChunkedEncodingError
    return any(isinstance(cause, transient) for cause in causes(error))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it, the innermost last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def backoff_s(number: int, random: Callable[[], float]) -> float:
    """Return the seconds to wait before a retry: exponential, capped, half of it random."""
    pause_s: float = _FIRST_PAUSE_S * _GROWTH ** min(number, RETRIES)
    return min(_MAX_PAUSE_S, pause_s) * (0.5 + 0.5 * random())


def asked_pause_s(headers: Mapping[str, str], body: bytes, *, now_s: float) -> float:
    """Return the seconds that a reply asks to wait before the next request; 0 if it asks for none.

    `Retry-After` counts first, then OpenAI's header in milliseconds, then the delay in the body of
    Google's refusals. `now_s` is the wall clock, in seconds since 1970.
    """
    if value := headers.get("Retry-After"):
        return retry_after_s(value, now_s=now_s)
    if value := headers.get("retry-after-ms"):
        return retry_after_s(value, now_s=now_s) / 1000
    delay = _RETRY_DELAY.search(body)
    return retry_after_s(delay[1].decode(), now_s=now_s) if delay else 0.0


def retry_after_s(value: str | None, *, now_s: float) -> float:
    """Return the seconds that a `Retry-After` (a number or a date) asks for; 0 if unreadable.

    `now_s` is the wall clock, in seconds since 1970.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        # A date without a zone is in GMT, the only zone HTTP has.
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.fromtimestamp(now_s, UTC)).total_seconds())
    except (ValueError, OverflowError, TypeError, IndexError):
        return 0.0
