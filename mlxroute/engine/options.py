"""The options of one answer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from mlxroute.errors import UsageError
from mlxroute.types import Mode, Prices, Sampling

_LONGEST_TIMEOUT_S = 86_400
MAX_PREFETCH = 64


@dataclass(frozen=True, slots=True)
class Options:
    """Limits and sampling of one answer; `timeout_s` bounds a call and all faults together.

    Positions whose context a pattern of `never_send` matches anywhere are not escalated. Each call
    asks for `prefetch` tokens more than the one it is made for (None: as the mode has it). Over
    the answers of an `Experience` there are `call_ceiling` times as many calls as escalated
    positions at most (None: any number).
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

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if not 0 < self.timeout_s <= _LONGEST_TIMEOUT_S:
            raise UsageError(
                f"--timeout must be above 0 and at most {_LONGEST_TIMEOUT_S} seconds,"
                f" not {self.timeout_s:g}"
            )
        if self.sampling.seed is not None and not 0 <= self.sampling.seed < 2**64:
            raise UsageError(f"--seed must be from 0 to 2^64 - 1, not {self.sampling.seed}")
        if not 0 <= self.sampling.temperature < math.inf:
            raise UsageError(f"--temperature must be 0 or more, not {self.sampling.temperature:g}")
        if not 0 < self.sampling.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.sampling.top_p:g}")
        if self.prefetch is not None and not 0 <= self.prefetch <= MAX_PREFETCH:
            raise UsageError(f"--prefetch must be from 0 to {MAX_PREFETCH}, not {self.prefetch}")
        if self.call_ceiling is not None and not self.call_ceiling >= 1:
            raise UsageError(f"--call-ceiling must be at least 1, not {self.call_ceiling:g}")


def parse_mode(name: str) -> Mode:
    """The mode of this name. Raises UsageError."""
    try:
        return Mode(name)
    except ValueError as exc:
        raise UsageError(f"no mode named {name!r}; there are: {', '.join(Mode)}") from exc
