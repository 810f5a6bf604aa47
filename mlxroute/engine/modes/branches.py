"""Branches: the continuations of the committed answer that are decoded ahead of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlxroute.engine.escalation.calls import Call
from mlxroute.engine.escalation.decision import Decision
from mlxroute.engine.modes.decode_context import append_decision
from mlxroute.engine.transcript import Transcript
from mlxroute.types import Signals


@dataclass(slots=True, eq=False)
class Position:
    """A position that is not committed yet, after `index` tokens of the answer.

    Branches that share a position share this object.

    Args:
        index: Number of answer tokens before it.
        small_choice: The decision for the small model's token.
        call: The call in flight for it.
        in_character: Whether the answer before it ends inside a character.
        final: The decision, once it is made.
    """

    index: int
    small_choice: Decision
    call: Call | None
    in_character: bool
    final: Decision | None = None


@dataclass(slots=True, eq=False)
class Step:
    """A branch's token at a position.

    `choice` is what the branch assumes, with the small model's `probability`; `transcript` is the
    answer with it.
    """

    position: Position
    choice: Decision
    transcript: Transcript
    probability: float = 1.0

    @property
    def decision(self) -> Decision:
        """What was decided at the position, or what the branch assumes until then."""
        return self.position.final or self.choice


@dataclass(slots=True, eq=False)
class Branch:
    """One continuation of the committed answer.

    Args:
        steps: Its tokens after the committed ones.
        batch_row: Its row in the small model's batch; None if the KV cache holds no beginning of
            it.
        signals: Those of the position after its last step; None until it is decoded.
        unbatched: Whether its next decoding takes one row alone, and computes again what a batch
            computed.
    """

    steps: list[Step]
    batch_row: int | None
    signals: Signals | None = None
    unbatched: bool = False

    @property
    def probability(self) -> float:
        """The small model's probability of the assumptions that are not confirmed yet."""
        return math.prod(step.probability for step in self.steps if step.position.final is None)

    @property
    def is_certain(self) -> bool:
        """Whether every position of the branch is decided."""
        return all(step.position.final for step in self.steps)

    def index_of(self, position: Position) -> int | None:
        """Return the index of the branch's step at a position, None if it has none."""
        for index, step in enumerate(self.steps):
            if step.position is position:
                return index
        return None


class Branches:
    """All branches of an answer, and the transcript of what is committed.

    There is always at least one branch, and all of them begin with the same position.
    """

    def __init__(self, committed: Transcript, signals: Signals) -> None:
        self.committed = committed
        self.all = [Branch([], 0, signals)]

    @property
    def first(self) -> Branch:
        """The branch whose tokens are shown."""
        return self.all[0]

    def transcript(self, branch: Branch) -> Transcript:
        """Return the answer along a branch."""
        return branch.steps[-1].transcript if branch.steps else self.committed

    def transcript_before(self, position: Position) -> Transcript:
        """Return the answer before a position of some branch."""
        branch = next(branch for branch in self.all if branch.index_of(position) is not None)
        index = branch.index_of(position)
        return branch.steps[index - 1].transcript if index else self.committed

    def pending_positions(self) -> list[Position]:
        """Return the positions with a call in flight, the earliest first."""
        steps = (step for branch in self.all for step in branch.steps)
        return _sorted_positions(step for step in steps if step.position.call is not None)

    def positions_after(self, position: Position) -> list[Position]:
        """Return the positions after one, on all branches that have it, the earliest first."""
        indices = ((branch, branch.index_of(position)) for branch in self.all)
        return _sorted_positions(
            step
            for branch, index in indices
            if index is not None
            for step in branch.steps[index + 1 :]
        )

    def append(self, branch: Branch, position: Position, choice: Decision, p: float = 1.0) -> None:
        """Add a step to a branch; `p` is the small model's probability of the choice."""
        transcript = append_decision(self.transcript(branch), choice)
        branch.steps.append(Step(position, choice, transcript, p))
        branch.signals = None

    def fork(self, branch: Branch, choice: Decision, p: float) -> Branch:
        """Return a new branch that makes another choice at the last step of a branch."""
        before, last = branch.steps[:-1], branch.steps[-1]
        transcript = append_decision(before[-1].transcript if before else self.committed, choice)
        step = Step(last.position, choice, transcript, p)
        return Branch([*before, step], branch.batch_row)

    def decide(self, position: Position, decision: Decision) -> list[Call]:
        """Record the decision at a position; return the calls that are no longer needed.

        Branches with another token there are dropped. If all have another one, a new branch that
        ends with the decision replaces them.
        """
        position.call, position.final = None, decision
        kept: list[Branch] = []
        corrected: Branch | None = None
        is_confirmed = False
        for branch in self.all:
            index = branch.index_of(position)
            if index is None:
                kept.append(branch)
            elif branch.steps[index].choice.token_ids == decision.token_ids:
                is_confirmed = True
                kept.append(branch)
                self._refresh(branch, index)
            elif corrected is None:
                corrected = Branch([*branch.steps[:index]], batch_row=None)
                self.append(corrected, position, decision)
                kept.append(corrected)
        if is_confirmed and corrected is not None:
            kept.remove(corrected)
        return self.keep(kept)

    def keep(self, branches: Sequence[Branch]) -> list[Call]:
        """Keep only these branches; return the calls for positions that none of them has."""
        reached = {id(step.position) for branch in branches for step in branch.steps}
        dropped = [p for p in self.pending_positions() if id(p) not in reached]
        calls = [position.call for position in dropped if position.call is not None]
        for position in dropped:
            position.call = None
        self.all = list(branches)
        return calls

    def pop_decided(self) -> Decision | None:
        """Move the first position to the committed transcript, if it is decided.

        Returns the decision.
        """
        if not self.first.steps or self.first.steps[0].position.final is None:
            return None
        step = self.first.steps[0]
        self.committed = step.transcript
        for branch in self.all:
            del branch.steps[0]
        return step.decision

    def _refresh(self, branch: Branch, start: int) -> None:
        """Rebuild the transcripts from a step on, after a decision with the same tokens."""
        transcript = branch.steps[start - 1].transcript if start else self.committed
        for step in branch.steps[start:]:
            transcript = step.transcript = append_decision(transcript, step.decision)


def _sorted_positions(steps: Iterable[Step]) -> list[Position]:
    """Return the positions of steps, each once, the earliest first."""
    positions = {id(step.position): step.position for step in steps}
    return sorted(positions.values(), key=lambda position: position.index)


def find_likeliest(branches: Sequence[Branch]) -> Branch | None:
    """Return the branch with the highest probability; None without branches."""
    return max(branches, key=lambda branch: branch.probability, default=None)
