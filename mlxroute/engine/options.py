"""The options of one answer, and their limits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from mlxroute.errors import UsageError
from mlxroute.types import Mode, Prices, Sampling

MAX_PREFETCH = 64
_MAX_TIMEOUT_S = 86_400


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one answer; see `generate` for their meaning.

    Raises UsageError, with the parameter's name, for a value out of range.
    """

    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    timeout_s: float = 30.0
    strict: bool = False
    never_send: tuple[re.Pattern[str], ...] = ()
    prices: Prices | None = None
    mode: Mode = Mode.AUTO
    prefetch: int | None = None
    call_ceiling: float | None = None
    accept_within: float = 0.0

    def __post_init__(self) -> None:
        sampling = self.sampling
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check(
            "timeout_s",
            self.timeout_s,
            0 < self.timeout_s <= _MAX_TIMEOUT_S,
            f"above 0 and at most {_MAX_TIMEOUT_S} seconds",
        )
        _check(
            "temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "at least 0"
        )
        _check("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1")
        is_valid = 0 <= self.accept_within < math.inf
        _check("accept_within", self.accept_within, is_valid, "at least 0 nats")
        if sampling.seed is not None:
            _check("seed", sampling.seed, 0 <= sampling.seed < 2**64, "from 0 to 2^64 - 1")
        if self.prefetch is not None:
            in_range = 0 <= self.prefetch <= MAX_PREFETCH
            _check("prefetch", self.prefetch, in_range, f"from 0 to {MAX_PREFETCH}")
        if self.call_ceiling is not None:
            _check("call_ceiling", self.call_ceiling, self.call_ceiling >= 1, "at least 1")


def parse_mode(name: str) -> Mode:
    """Return the mode with this name. Raises UsageError."""
    try:
        return Mode(name)
    except ValueError as exc:
        raise UsageError(
            f"unknown mode {name!r}; choose one of {', '.join(Mode)}", parameter="mode"
        ) from exc


def _check(parameter: str, value: float, is_valid: bool, allowed: str) -> None:
    if not is_valid:
        shown = value if isinstance(value, int) else f"{value:g}"
        raise UsageError(f"{parameter} must be {allowed}, not {shown}", parameter=parameter)
