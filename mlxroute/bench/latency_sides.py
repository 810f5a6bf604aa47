"""The points and the settings that `bench latency` compares, and the answers with each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from mlxroute.engine import Experience
from mlxroute.engine.governor import PREFETCH_TOKENS
from mlxroute.types import Mode, RunStats, Token


@dataclass(frozen=True, slots=True)
class LatencyGrid:
    """The points of a run: each call time with each escalation rate.

    Args:
        max_tokens: Maximum length of an answer.
        ratios: Call times, in decode steps.
        rates: Shares of escalated positions.
        delay: Distribution of the call time, a name of `DELAYS`.
        measure: Whether to measure. If not, the report has the simulation alone. True by default.
    """

    max_tokens: int
    ratios: Sequence[float]
    rates: Sequence[float]
    delay: str
    measure: bool = True


@dataclass(frozen=True, slots=True)
class LatencySide:
    """A mode with its prefetch and its call ceiling, which have the meaning of `Options`."""

    mode: Mode
    prefetch: int | None = 0
    call_ceiling: float | None = None


SIDES: Final = {
    "wait": LatencySide(Mode.WAIT),
    "overlap": LatencySide(Mode.OVERLAP),
    "hedge": LatencySide(Mode.HEDGE),
    "wait+prefetch": LatencySide(Mode.WAIT, prefetch=PREFETCH_TOKENS),
    "overlap+prefetch": LatencySide(Mode.OVERLAP, prefetch=PREFETCH_TOKENS),
    "hedge+prefetch": LatencySide(Mode.HEDGE, prefetch=PREFETCH_TOKENS),
    "hedge+prefetch, 1.5x calls": LatencySide(
        Mode.HEDGE, prefetch=PREFETCH_TOKENS, call_ceiling=1.5
    ),
    "auto": LatencySide(Mode.AUTO, prefetch=None),
    "auto, 1.5x calls": LatencySide(Mode.AUTO, prefetch=None, call_ceiling=1.5),
}


@dataclass(slots=True)
class SideAnswers:
    """The answers of one side, and the experience gathered over them."""

    experience: Experience = field(default_factory=Experience)
    stats: list[RunStats] = field(default_factory=list)
    tokens: list[list[Token]] = field(default_factory=list)

    def add(self, stats: RunStats, tokens: list[Token]) -> None:
        """Add an answer."""
        self.stats.append(stats)
        self.tokens.append(tokens)

    def drop_first(self) -> None:
        """Remove the first answer, which was the warm-up."""
        del self.stats[0], self.tokens[0]

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all answers, from request to last token."""
        count = sum(stats.tokens for stats in self.stats)
        return count / sum(stats.total_s for stats in self.stats)
