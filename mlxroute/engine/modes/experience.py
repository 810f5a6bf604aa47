"""What both models turned out to be like: times, agreement, coverage, runs of the large model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from mlxroute.types import BranchCost, LargeToken, Signals

# Branches of the next likeliest choices, the small model's own included.
BRANCH_ROWS: Final = 4
# As many observations an even pace counts for, so that one late call says little.
TRUSTED: Final = 3
# How much a new observation counts; positions are many to each that is escalated.
_NEW: Final = 0.05
_NEW_POSITION: Final = 0.005


@dataclass(slots=True)
class Average:
    """A running mean that forgets; a first value counts as `seen` observations.

    A new one counts `new` at least.
    """

    value: float
    seen: int = 0
    new: float = _NEW

    def add(self, value: float) -> None:
        """Count an observation."""
        self.seen += 1
        self.value += max(self.new, 1.0 / self.seen) * (value - self.value)


@dataclass(slots=True)
class Experience:
    """One small and one large model, over the answers of a session.

    `step_s` is a decode step, `call_s` a call for one token and `run_s` one that brings more, until
    its first token is there, each while nothing else was done; `large_step_s` what the large model
    takes for each of the others; `step_slowdown` and `call_slowdown` are how many times as long
    they take at the same time, as where both models share a machine.
    `agreement` and `coverage` are the shares of escalated positions where the large model wants
    the small one's choice, or one of its `BRANCH_ROWS` likeliest; `rate` is that of the positions
    that are escalated, `answered` the share of them that an earlier call had
    answered, where there was one. Until seen they are guesses. `begun` calls were made, for `needed` positions that were
    escalated and others that were not reached.
    """

    step_s: Average = field(default_factory=lambda: Average(0.0))
    call_s: Average = field(default_factory=lambda: Average(0.0))
    run_s: Average = field(default_factory=lambda: Average(0.0))
    step_slowdown: Average = field(default_factory=lambda: Average(1.0, TRUSTED))
    call_slowdown: Average = field(default_factory=lambda: Average(1.0, TRUSTED))
    agreement: Average = field(default_factory=lambda: Average(0.4, 5))
    coverage: Average = field(default_factory=lambda: Average(0.75, 5))
    rate: Average = field(default_factory=lambda: Average(0.07, 30, _NEW_POSITION))
    answered: Average = field(default_factory=lambda: Average(0.3, 5))
    large_step_s: Average = field(default_factory=lambda: Average(0.0))
    branches: BranchCost | None = None
    calls: int = 0
    begun: int = 0
    needed: int = 0
    in_runs: bool = False
    told: bool = False

    def stepped(self, seconds: float, *, alone: bool) -> None:
        """A row took a decode step, `alone` or while the large model was asked."""
        _add(seconds, self.step_s, self.step_slowdown, alone=alone)

    def called(self, tokens: int, seconds: float, *, alone: bool, streamed: bool = False) -> None:
        """A call brought so many tokens, `alone` or while decoding went on.

        A `streamed` one goes on bringing them, and its first came as soon as that of a call for it.
        """
        self.calls += 1
        self.in_runs = streamed or tokens > 1
        usual = self.run_s if self.in_runs else self.call_s
        _add(seconds, usual, self.call_slowdown, alone=alone)
        if streamed and alone:
            self.call_s.add(seconds)

    def wrote(self, tokens: Sequence[LargeToken]) -> None:
        """A run of the large model's tokens has come to its end."""
        if len(tokens) < 2:
            return
        if tokens[-1].latency_s:
            seconds = tokens[-1].latency_s - tokens[0].latency_s
        elif self.call_s.seen:
            seconds = self.run_s.value - self.call_s.value
        else:
            return
        self.large_step_s.add(max(0.0, seconds) / (len(tokens) - 1))

    def escalated(self, signals: Signals, token: LargeToken, *, prefetched: bool) -> None:
        """The large model's token at a position was committed."""
        own = token.token_ids == (signals.token_id,)
        self.agreement.add(own)
        covered = len(token.token_ids) == 1 and token.token_ids[0] in signals.top_ids[:BRANCH_ROWS]
        self.coverage.add(own or covered)
        if self.in_runs:
            self.answered.add(prefetched)

    def committed(self, *, escalated: bool) -> None:
        """A position was committed."""
        self.rate.add(escalated)
        self.needed += escalated


def _add(seconds: float, usual: Average, slowdown: Average, *, alone: bool) -> None:
    if alone or not usual.value:
        usual.add(seconds)
    else:
        slowdown.add(seconds / usual.value)
