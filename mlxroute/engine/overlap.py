"""`overlap`: ask and decode on, on the small model's own choice; go back where it was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlxroute.engine.decision import Decision
from mlxroute.engine.escalation import Call
from mlxroute.engine.walk import Desk
from mlxroute.types import Event, Provisional, Retracted, Signals


@dataclass(slots=True)
class _Position:
    """A position not yet committed: what stands there, and the call that may change it.

    It comes after `at` tokens of the answer.
    """

    at: int
    decision: Decision
    texts: tuple[str, ...]
    call: Call | None
    in_character: bool


class Overlap:
    """Walks ahead of the commits along a path of provisional tokens.

    `retracted` counts tokens taken back; `held` says that the cache once stopped the walk.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._path: list[_Position] = []
        # Signals of the position after the path, once its last token was fed.
        self._signals: Signals | None = None
        self._fed = 0
        self._announced = 0
        self.retracted = 0
        self.held = False

    def walk(self, signals: Signals) -> Iterator[Event]:
        """Decode to the end of the answer from the signals of its first position."""
        self._signals = signals
        while True:
            yield from self._land()
            yield from self._commit()
            if self._desk.commits.ended:
                break
            yield from self._announce()
            if self._signals is not None and self._place(self._signals):
                self._signals = None
            elif self._signals is None and self._may_run_on():
                self._signals = self._feed()
            else:
                self._desk.escalator.wait()
        yield from self._leave()

    def _land(self) -> Iterator[Event]:
        """Take in the answers that came; go back to the first that is another token."""
        for index, position in enumerate(self._path):
            own = position.decision
            if position.call is None or (decision := self._answer(position, position.call)) is None:
                continue
            position.call, position.decision = None, decision
            if decision.token_ids != own.token_ids:
                yield from self._go_back(index)
                return

    def _answer(self, position: _Position, call: Call) -> Decision | None:
        """What is decided at a position by now, its call being over then."""
        desk, ids = self._desk, self._desk.transcript.ids[: position.at]
        if desk.escalator.landed(call):
            return desk.decider.settled(position.decision, call, ids)
        if not desk.escalator.open:
            # The time that faults may cost is used up: the rest is not waited for.
            desk.escalator.abandon([call])
            return desk.decider.unchecked(position.decision)
        known = None
        if not position.in_character:
            known = desk.decider.from_prefetched(position.decision, ids)
        if known is not None:
            desk.escalator.abandon([call])
        return known

    def _go_back(self, index: int) -> Iterator[Event]:
        """Drop what was built on another token than the one now decided."""
        desk, position = self._desk, self._path[index]
        behind = self._path[index + 1 :]
        del self._path[index + 1 :]
        desk.escalator.abandon([each.call for each in behind if each.call is not None])
        yield from self._retract(position.at)
        desk.transcript.rollback(position.at)
        position.texts = desk.write(position.decision)
        self._unfeed(position.at)
        self._signals = None

    def _commit(self) -> Iterator[Event]:
        commits = self._desk.commits
        while self._path and self._path[0].call is None and not commits.ended:
            yield from commits.commit(self._path[0].decision, self._path[0].texts)
            del self._path[0]
        self._announced = max(self._announced, len(commits))

    def _announce(self) -> Iterator[Event]:
        """Show what stands on the path and was not shown yet."""
        for position in self._path:
            decision = position.decision
            shown = enumerate(zip(decision.token_ids, position.texts, strict=True), position.at)
            for index, (token_id, text) in shown:
                if index >= self._announced:
                    yield Provisional(index, token_id, text, decision.source, decision.signals)
                    self._announced = index + 1

    def _place(self, signals: Signals) -> bool:
        """Put the next position on the path; not while it must be asked and no call is free."""
        desk = self._desk
        own = desk.decider.own(signals)
        decision, call = desk.decider.at_once(own), None
        at, in_character = len(desk.transcript), desk.transcript.in_character
        if decision is None:
            if not desk.escalator.has_room:
                return False
            decision, call = own, desk.decider.ask()
        self._path.append(_Position(at, decision, desk.write(decision), call, in_character))
        return True

    def _may_run_on(self) -> bool:
        desk = self._desk
        if self._path and (self._path[-1].decision.ends or len(desk.transcript) >= desk.limit):
            return False
        next_count = len(desk.transcript) - self._fed
        if desk.escalator.calls and not desk.small.can_rollback(next_count):
            self.held = True
            return False
        return True

    def _feed(self) -> Signals:
        ids = self._desk.transcript.ids
        signals = self._desk.small.extend(ids[self._fed :])
        self._fed = len(ids)
        return signals

    def _leave(self) -> Iterator[Event]:
        """Take back what was decoded past the end of the answer."""
        self._desk.escalator.close()
        count = len(self._desk.commits)
        yield from self._retract(count)
        self._unfeed(count - 1)

    def _retract(self, index: int) -> Iterator[Event]:
        if self._announced > index:
            self.retracted += self._announced - index
            self._announced = index
            yield Retracted(index)

    def _unfeed(self, length: int) -> None:
        if self._fed > length:
            self._desk.small.rollback(self._fed - length)
            self._fed = length
