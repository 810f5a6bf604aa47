"""The sides that `bench quality` compares: each model alone, and routers within budgets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

BUDGETS: Final = (0.01, 0.03, 0.05, 0.07, 0.10, 0.15, 0.30)
ORACLES: Final = {
    "disagreements": "oracle, disagreements",
    "large_outcome": "oracle, large outcome",
    "gold": "oracle, gold (luck)",
}
"""Keys of the oracles in a report, and their names in tables and plots."""


@dataclass(frozen=True, slots=True)
class QualitySide:
    """One model alone (no `router`), or both with a router and a budget.

    With `samples`, the small model alone writes so many answers, and the most frequent one counts.
    """

    name: str
    router: str | None = None
    budget: float = 0.0
    samples: int = 0

    @property
    def is_large(self) -> bool:
        """Whether the large model answers alone."""
        return self.name == LARGE.name


SMALL: Final = QualitySide("small")
LARGE: Final = QualitySide("large")


def make_sides(
    routers: Iterable[str], budgets: Iterable[float], *, majority: int = 0
) -> list[QualitySide]:
    """Return both models alone, and each router with each budget (once for each name).

    `majority` adds the majority of that many answers of the small model, unless it is 0.
    """
    names = {f"{100 * budget:g}%": budget for budget in budgets}
    routed = [
        QualitySide(f"{router} {name}", router, budget)
        for router in routers
        for name, budget in names.items()
    ]
    voting = [QualitySide(f"majority of {majority}", samples=majority)] if majority else []
    return [SMALL, LARGE, *voting, *routed]
