"""What every way of spending the wait works with."""

from __future__ import annotations

from dataclasses import dataclass

from mlxroute.engine.commits import Commits
from mlxroute.engine.decision import Decider, Decision
from mlxroute.engine.escalation import Escalator
from mlxroute.engine.roles import Small
from mlxroute.engine.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Desk:
    """One answer's parts, each the owner of its state."""

    small: Small
    transcript: Transcript
    decider: Decider
    escalator: Escalator
    commits: Commits
    limit: int

    def write(self, decision: Decision) -> tuple[str, ...]:
        """Put a decision's tokens into the transcript; return the texts they add."""
        return tuple(
            self.transcript.push(
                token_id, ends=decision.ends, large_ids=decision.large_ids(position)
            )
            for position, token_id in enumerate(decision.token_ids)
        )
