"""The ways to spend the wait that `bench latency` compares, and the answers that each gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from mlxroute.engine import Experience
from mlxroute.engine.governor import PREFETCH_TOKENS
from mlxroute.types import Mode, RunStats, Token


@dataclass(frozen=True, slots=True)
class LatencySide:
    """One way to spend the wait."""

    mode: Mode
    prefetch: int | None = 0
    ceiling: float | None = None


SIDES: Final = {
    "wait": LatencySide(Mode.WAIT),
    "overlap": LatencySide(Mode.OVERLAP),
    "hedge": LatencySide(Mode.HEDGE),
    "wait+prefetch": LatencySide(Mode.WAIT, prefetch=PREFETCH_TOKENS),
    "overlap+prefetch": LatencySide(Mode.OVERLAP, prefetch=PREFETCH_TOKENS),
    "hedge+prefetch": LatencySide(Mode.HEDGE, prefetch=PREFETCH_TOKENS),
    "hedge+prefetch, 1.5x calls": LatencySide(Mode.HEDGE, prefetch=PREFETCH_TOKENS, ceiling=1.5),
    "auto": LatencySide(Mode.AUTO, prefetch=None),
    "auto, 1.5x calls": LatencySide(Mode.AUTO, prefetch=None, ceiling=1.5),
}


@dataclass(slots=True)
class Answers:
    """The answers of one side, and what it learned over them."""

    experience: Experience = field(default_factory=Experience)
    stats: list[RunStats] = field(default_factory=list)
    tokens: list[list[Token]] = field(default_factory=list)

    def add(self, stats: RunStats, tokens: list[Token]) -> None:
        """Count an answer."""
        self.stats.append(stats)
        self.tokens.append(tokens)

    def forget_first(self) -> None:
        """Do not count the first answer."""
        del self.stats[0], self.tokens[0]

    @property
    def tokens_per_s(self) -> float:
        """Over all answers, from request to last token."""
        count = sum(each.tokens for each in self.stats)
        return count / sum(each.total_s for each in self.stats)
