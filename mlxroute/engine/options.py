"""The options of one answer, and their limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mlxroute.errors import UsageError
from mlxroute.types import Mode, Prices, Sampling
from mlxroute.types.limits import check_number


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
        check_number("max_tokens", self.max_tokens)
        check_number("timeout_s", self.timeout_s, limits="timeout")
        check_number("temperature", self.sampling.temperature)
        check_number("top_p", self.sampling.top_p)
        check_number("accept_within", self.accept_within)
        for name in ("prefetch", "call_ceiling"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        if self.sampling.seed is not None:
            check_number("seed", self.sampling.seed)


def parse_mode(name: str) -> Mode:
    """Return the mode with this name. Raises UsageError."""
    try:
        return Mode(name)
    except ValueError as exc:
        raise UsageError(
            f"unknown mode {name!r}; choose one of {', '.join(Mode)}", parameter="mode"
        ) from exc
