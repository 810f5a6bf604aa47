"""The range of each number that users set, by the name of its parameter."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, time
from typing import Any, Final

from mlxroute.errors import UsageError

MAX_PREFETCH: Final = 64
MAX_TIMEOUT_S: Final = 86_400
_MAX_PORT: Final = 65_535
_MAX_GB: Final = 1_000_000
# Longest value, in characters, that a message repeats in full.
_SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class Limits:
    """The values that a number may have.

    Args:
        words: What a value must be, as in `it must be at least 1`.
        allows: Whether a number is one of them; never called with NaN.
        integer: Whether the number must be an integer. False by default.
    """

    words: str
    allows: Callable[[Any], bool]
    integer: bool = False

    def accepts(self, value: object) -> bool:
        """Return whether a value is a number within the limits."""
        kind = numbers.Integral if self.integer else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        return value == value and self.allows(value)  # NaN equals nothing.


def _from_0(value: float) -> bool:
    return 0 <= value < math.inf


_PRICE: Final = Limits("a finite number of at least 0, per million tokens", _from_0)
LIMITS: Final[Mapping[str, Limits]] = {
    "max_tokens": Limits("at least 1", lambda n: n >= 1, integer=True),
    "timeout": Limits(
        f"above 0 and at most {MAX_TIMEOUT_S} seconds", lambda s: 0 < s <= MAX_TIMEOUT_S
    ),
    "temperature": Limits("at least 0, and finite", _from_0),
    "top_p": Limits("above 0 and at most 1", lambda p: 0 < p <= 1),
    "top_k": Limits("at least 0", lambda k: k >= 0, integer=True),
    "min_p": Limits("from 0 to 1", lambda p: 0 <= p <= 1),
    "seed": Limits("from 0 to 2^64 - 1", lambda n: 0 <= n < 2**64, integer=True),
    "accept_within": Limits("at least 0 nats, and finite", _from_0),
    "top_logprobs": Limits("at least 1", lambda n: n >= 1, integer=True),
    "prefetch": Limits(f"from 0 to {MAX_PREFETCH}", lambda n: 0 <= n <= MAX_PREFETCH, integer=True),
    "call_ceiling": Limits("at least 1", lambda x: x >= 1),
    "threshold": Limits("a number, inf or -inf", lambda _: True),
    "budget": Limits("a share from 0% to 100%, such as 7% or 0.07", lambda x: 0 <= x <= 1),
    "port": Limits("from 0 to 65535", lambda n: 0 <= n <= _MAX_PORT, integer=True),
    "max_running": Limits("at least 1", lambda n: n >= 1, integer=True),
    "max_queued": Limits("at least 0", lambda n: n >= 0, integer=True),
    "cache_bytes": Limits("at least 0", lambda n: n >= 0, integer=True),
    "cache_memory": Limits("from 0 to 1000000 GB", lambda gb: 0 <= gb <= _MAX_GB),
    "price_input": _PRICE,
    "price_cached_input": _PRICE,
    "price_output": _PRICE,
}


def check_number(parameter: str, value: object, *, limits: str | None = None) -> None:
    """Raise UsageError, with the parameter's name, for a value out of its range.

    `limits` is the key in `LIMITS` where that is not the parameter's name.
    """
    allowed = LIMITS[limits or parameter]
    if not allowed.accepts(value):
        needs_integer = allowed.integer and isinstance(value, float)
        words = "an integer" if needs_integer else allowed.words
        shown = shown_value(value, keep_point=needs_integer)
        raise UsageError(f"{parameter} must be {words}, not {shown}", parameter=parameter)


def shown_value(value: object, *, keep_point: bool = False) -> str:
    """Return a value for a message: short, as config files write it, without needless digits.

    With `keep_point`, 2.0 is not shown as 2, which is an integer.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, date | time):
        return value.isoformat()
    try:
        if isinstance(value, list | dict):
            text = json.dumps(value, ensure_ascii=False, default=str)
        else:
            is_short = isinstance(value, float) and not keep_point
            text = f"{value:g}" if is_short else repr(value)
    except ValueError:
        # Python limits the digits of an integer.
        return "a number with thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
