"""What every way of spending the wait works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlxroute.engine.commits import Commits
from mlxroute.engine.escalation.calls import Escalator
from mlxroute.engine.escalation.decision import Decider, Decision
from mlxroute.engine.modes.experience import Experience
from mlxroute.engine.modes.governor import Governor
from mlxroute.engine.protocols import SmallProtocol
from mlxroute.engine.transcript import Transcript
from mlxroute.types import Signals, Token


@dataclass(frozen=True, slots=True)
class Desk:
    """One answer's parts, each the owner of its state."""

    small: SmallProtocol
    transcript: Transcript
    decider: Decider
    escalator: Escalator
    commits: Commits
    limit: int
    governor: Governor
    experience: Experience
    clock: Callable[[], float]

    def extend(self, token_ids: Sequence[int]) -> Signals:
        """Feed the small model's only row; a step that nothing was waited before is timed."""
        stalled = self.escalator.take_stalled()
        began_s = self.clock()
        signals = self.small.extend(token_ids)
        # After a wait the step that ran ahead is done already.
        if len(token_ids) == 1 and not stalled:
            self.experience.stepped(self.clock() - began_s, alone=not self.escalator.calls)
        return signals

    def commit(self, decision: Decision, texts: Sequence[str]) -> Iterator[Token]:
        """Commit a decision that was written; yield what may be shown."""
        self.decider.committed(decision)
        yield from self.commits.commit(decision, texts)
        self.decider.prefetched.committed(self.transcript.ids, len(self.commits))

    def write(self, decision: Decision) -> tuple[str, ...]:
        """Put a decision's tokens into the transcript; return the texts they add."""
        return tuple(
            self.transcript.push(
                token_id, ends=decision.ends, large_ids=decision.large_ids(position)
            )
            for position, token_id in enumerate(decision.token_ids)
        )
