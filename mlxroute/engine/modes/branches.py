"""Ways the answer may go on from what is committed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxroute.engine.escalation.calls import Call
from mlxroute.engine.escalation.decision import Decision
from mlxroute.types import Signals


@dataclass(slots=True, eq=False)
class Position:
    """A position not yet committed, after `at` tokens of the answer; `final` when it is decided."""

    at: int
    own: Decision
    call: Call | None
    in_character: bool
    final: Decision | None = None


@dataclass(slots=True, eq=False)
class Step:
    """What a row takes at a position, and how likely the small model has it."""

    position: Position
    choice: Decision
    share: float = 1.0

    @property
    def decision(self) -> Decision:
        return self.position.final or self.choice


@dataclass(slots=True, eq=False)
class Row:
    """`slot` is its row in the small model's batch, None where the cache is not its beginning.

    `signals` are those of the position after its last step. With `again` it is to be decoded anew.
    """

    steps: list[Step]
    slot: int | None
    signals: Signals | None = None
    again: bool = False

    @property
    def share(self) -> float:
        """How likely this is the way the answer goes on, as the small model sees it."""
        return math.prod(step.share for step in self.steps if step.position.final is None)

    def place_of(self, position: Position) -> int | None:
        """The index of the step at this position, if the row goes through it."""
        for index, step in enumerate(self.steps):
            if step.position is position:
                return index
        return None


@dataclass(frozen=True, slots=True)
class Written:
    """A decision in the transcript that is not committed yet."""

    at: int
    decision: Decision
    texts: tuple[str, ...]
