"""Which failures of a call pass by themselves, and how long to wait before the next attempt.

Every request may be sent twice: the replies are greedy, and nothing on the server changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import IncompleteRead
from typing import Final

from requests.exceptions import ChunkedEncodingError

RETRIES: Final = 3
_FIRST_S: Final = 0.1
_GROWTH: Final = 4
_LONGEST_S: Final = 1.0


def is_transient_status(status: int) -> bool:
    """Whether a status asks for patience; 501 and 505 say what the server will never do."""
    return status in (408, 429) or (500 <= status < 600 and status not in (501, 505))


def is_transient_error(error: BaseException) -> bool:
    """Whether the connection was refused, reset or closed early, at the bottom of an exception.

    A time-out is none of these: the request may still be running.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | IncompleteRead | ChunkedEncodingError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def pauses_s(random: Callable[[], float]) -> Iterator[float]:
    """The seconds to wait before each further attempt: growing, capped, half of it by chance."""
    for attempt in range(RETRIES):
        yield min(_LONGEST_S, _FIRST_S * _GROWTH**attempt) * (0.5 + 0.5 * random())


def retry_after_s(value: str | None, *, now: float) -> float:
    """Seconds asked for by a `Retry-After` (a number or a date); 0 when there is none to read.

    `now` is the wall clock, in seconds since 1970.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        # A date without a zone is in GMT, the only zone HTTP knows.
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.fromtimestamp(now, UTC)).total_seconds())
    except (ValueError, OverflowError, TypeError, IndexError):
        return 0.0
