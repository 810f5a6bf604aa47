"""`overlap` and `hedge`: ask and decode on along provisional tokens; go back where they were wrong.

A row is one way the answer may go on from what is committed: the small model's own choices, and in
`hedge` some of its next likeliest where the large model was asked. Rows of one length are decoded
as one batch. What the large model answers at a position drops the rows that took another token
there; when none is left, decoding goes back to that position.

A batch rounds differently from a row alone. Where that could have changed a decision, the tokens
since the first batch are decoded again, one row and one token at a time, before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlxroute.engine.cached import Cached
from mlxroute.engine.decision import Decision
from mlxroute.engine.escalation import Call
from mlxroute.engine.experience import ROWS
from mlxroute.engine.walk import Desk
from mlxroute.types import Event, Mode, Provisional, Retracted, Signals

# A branch less likely than this is not worth a row.
_LEAST_SHARE = 0.02


@dataclass(slots=True, eq=False)
class _Position:
    """A position not yet committed, after `at` tokens of the answer; `final` when it is decided."""

    at: int
    own: Decision
    call: Call | None
    in_character: bool
    final: Decision | None = None


@dataclass(slots=True, eq=False)
class _Step:
    """What a row takes at a position, and how likely the small model has it."""

    position: _Position
    choice: Decision
    share: float = 1.0

    @property
    def decision(self) -> Decision:
        return self.position.final or self.choice


@dataclass(slots=True, eq=False)
class _Row:
    """`slot` is its row in the small model's batch, None where the cache is not its beginning.

    `signals` are those of the position after its last step. With `again` it is to be decoded anew.
    """

    steps: list[_Step]
    slot: int | None
    signals: Signals | None = None
    again: bool = False

    @property
    def share(self) -> float:
        """How likely this is the way the answer goes on, as the small model sees it."""
        return math.prod(step.share for step in self.steps if step.position.final is None)

    def place_of(self, position: _Position) -> int | None:
        """The index of the step at this position, if the row goes through it."""
        for index, step in enumerate(self.steps):
            if step.position is position:
                return index
        return None


@dataclass(frozen=True, slots=True)
class _Written:
    """A decision in the transcript that is not committed yet."""

    at: int
    decision: Decision
    texts: tuple[str, ...]


class Ahead:
    """Walks ahead of the commits along one row, or several if `branching`.

    `retracted` counts shown tokens that were taken back, `redecoded` decisions taken again for
    their rounding; `held` says that the cache once stopped the walk.
    """

    def __init__(self, desk: Desk, *, branching: bool) -> None:
        self._desk = desk
        self._branching = branching
        self._rows: list[_Row] = []
        self._written: list[_Written] = []
        # Where each committed decision begins.
        self._bounds: list[int] = []
        self._shown: list[int] = []
        self._cached = Cached(desk)
        self.retracted = 0
        self.redecoded = 0
        self.held = False

    def walk(self, signals: Signals) -> Iterator[Event]:
        """Decode to the end of the answer from the signals of its first position."""
        self._rows = [_Row([], 0, signals)]
        while True:
            self._land()
            yield from self._retract()
            yield from self._commit()
            if self._desk.commits.ended:
                break
            yield from self._announce()
            if not (self._place() or self._advance()):
                self._desk.escalator.wait()
        yield from self._leave()

    @property
    def _width(self) -> int:
        """How many rows there may be now; several once it was measured how they round."""
        desk, branches = self._desk, self._desk.experience.branches
        if branches is None or not self._branching or desk.governor.mode is not Mode.HEDGE:
            return 1
        return min(branches.rows, desk.small.most_rows)

    # What the large model answered

    def _land(self) -> None:
        """Take in the answers that came."""
        prefetched = self._desk.decider.prefetched
        known = prefetched.generated
        for position in self._asked():
            # What an earlier one dropped is not asked any more.
            if position.call is not None and (decision := self._answer(position, position.call)):
                self._settle(position, decision)
        if prefetched.generated > known:
            for position in self._asked():
                self._settle_prefetched(position)

    def _asked(self) -> list[_Position]:
        steps = (step for row in self._rows for step in row.steps)
        found = {id(s.position): s.position for s in steps if s.position.call is not None}
        return sorted(found.values(), key=lambda position: position.at)

    def _answer(self, position: _Position, call: Call) -> Decision | None:
        """What a call decides, if it is over."""
        desk = self._desk
        if desk.escalator.landed(call):
            return desk.decider.settled(position.own, call, self._ids_before(position))
        if not desk.escalator.open:
            # The time that faults may cost is used up: the rest is not waited for.
            desk.escalator.abandon([call])
            return desk.decider.unchecked(position.own)
        return None

    def _settle_prefetched(self, position: _Position) -> None:
        """Answer a position that is asked from what another call brought."""
        if position.call is None or position.in_character:
            return
        ids = self._ids_before(position)
        if (decision := self._desk.decider.from_prefetched(position.own, ids)) is not None:
            self._desk.escalator.abandon([position.call])
            self._settle(position, decision)

    def _settle(self, position: _Position, decision: Decision) -> None:
        """Decide a position, and drop the rows that took another token there."""
        position.call, position.final = None, decision
        kept: list[_Row] = []
        turned: _Row | None = None
        followed = False
        for row in self._rows:
            index = row.place_of(position)
            if index is None:
                kept.append(row)
            elif row.steps[index].choice.token_ids == decision.token_ids:
                followed = True
                kept.append(row)
            elif turned is None:
                turned = _Row([*row.steps[:index], _Step(position, decision)], slot=None)
                kept.append(turned)
        if followed and turned is not None:
            kept.remove(turned)
        self._keep(kept)

    def _keep(self, rows: list[_Row]) -> None:
        """Go on with these rows, without the calls of the others."""
        still = {id(step.position) for row in rows for step in row.steps}
        lost = [each for each in self._asked() if id(each) not in still]
        self._desk.escalator.abandon([each.call for each in lost if each.call is not None])
        for each in lost:
            each.call = None
        self._rows = rows

    def _ids_before(self, position: _Position) -> Sequence[int]:
        row = next(row for row in self._rows if row.place_of(position) is not None)
        self._stand(row)
        return self._desk.transcript.ids[: position.at]

    # What is committed and shown

    def _stand(self, row: _Row) -> None:
        """Make the transcript hold what a row says."""
        same = 0
        for written, step in zip(self._written, row.steps, strict=False):
            if written.decision is not step.decision:
                break
            same += 1
        if same < len(self._written):
            self._desk.transcript.rollback(self._written[same].at)
            del self._written[same:]
        for step in row.steps[same:]:
            texts = self._desk.write(step.decision)
            self._written.append(_Written(step.position.at, step.decision, texts))

    def _commit(self) -> Iterator[Event]:
        commits = self._desk.commits
        # All rows begin with the same position; once that is decided, with the same token.
        while (steps := self._rows[0].steps) and steps[0].position.final and not commits.ended:
            self._stand(self._rows[0])
            first = self._written.pop(0)
            self._bounds.append(first.at)
            yield from commits.commit(first.decision, first.texts)
            del self._shown[: len(first.decision.token_ids)]
            for row in self._rows:
                del row.steps[0]

    def _retract(self) -> Iterator[Event]:
        """Take back what was shown and is not what the first row says."""
        self._stand(self._rows[0])
        said = [token_id for each in self._written for token_id in each.decision.token_ids]
        same = 0
        for shown, token_id in zip(self._shown, said, strict=False):
            if shown != token_id:
                break
            same += 1
        if same < len(self._shown):
            self.retracted += len(self._shown) - same
            del self._shown[same:]
            yield Retracted(len(self._desk.commits) + same)

    def _announce(self) -> Iterator[Event]:
        """Show what the first row says and was not shown yet."""
        self._stand(self._rows[0])
        at = len(self._desk.commits)
        new = at + len(self._shown)
        for written in self._written:
            decision = written.decision
            for token_id, text in zip(decision.token_ids, written.texts, strict=True):
                if at >= new:
                    yield Provisional(at, token_id, text, decision.source, decision.signals)
                    self._shown.append(token_id)
                at += 1

    # Where decoding goes on

    def _place(self) -> bool:
        """Put the next position on every row that has come to one; say whether there was any."""
        placed = False
        for row in sorted(self._rows, key=lambda row: -row.share):
            # A likelier one may have taken its place.
            if row.signals is None or row not in self._rows:
                continue
            if not self._cached.is_exact and self._near(row.signals):
                self.redecoded += 1
                row.slot, row.signals, row.again, placed = None, None, True, True
            else:
                placed = self._put(row, row.signals) or placed
        return placed

    def _put(self, row: _Row, signals: Signals) -> bool:
        """Put the next position on a row; not while it must be asked and no call is free."""
        desk = self._desk
        self._stand(row)
        own = desk.decider.own(signals)
        at, in_character = len(desk.transcript), desk.transcript.in_character
        decision = desk.decider.at_once(own)
        if decision is not None:
            row.steps.append(_Step(_Position(at, own, None, in_character, decision), decision))
        elif desk.escalator.has_room and self._may_ask(row):
            position = _Position(at, own, desk.decider.ask(), in_character)
            before = list(row.steps)
            row.steps.append(_Step(position, own, math.exp(signals.top_logprobs[0])))
            self._branch(before, row.slot, position, signals)
        else:
            return False
        row.signals = None
        return True

    def _may_ask(self, row: _Row) -> bool:
        """Whether a call at the end of a row is within the ceiling on calls."""
        if all(step.position.final for step in row.steps):
            return True
        desk = self._desk
        needed = desk.commits.escalated + desk.commits.fallbacks - desk.commits.prefetch_used
        return desk.governor.may_ask_early(begun=desk.escalator.begun, needed=needed)

    def _branch(
        self, before: list[_Step], slot: int | None, position: _Position, signals: Signals
    ) -> None:
        """Add rows for the small model's next likeliest choices, in place of less likely rows."""
        self._measure(signals)
        width = self._width
        if width == 1:
            return
        likely = zip(signals.top_ids, signals.top_logprobs, strict=True)
        others = [each for each in likely if each[0] != signals.token_id]
        for token_id, logprob in others[: width - 1]:
            ends = token_id in self._desk.small.vocabulary.eos_ids
            choice = replace(position.own, token_ids=(token_id,), ends=ends)
            row = _Row([*before, _Step(position, choice, math.exp(logprob))], slot)
            if row.share >= _LEAST_SHARE:
                self._rows.append(row)
        best = sorted(self._rows, key=lambda row: -row.share)[:width]
        self._keep([row for row in self._rows if row in best])

    def _measure(self, signals: Signals) -> None:
        """Find out, once in a session and while a call is under way, what batches cost here."""
        desk = self._desk
        known = not self._branching or desk.experience.branches is not None
        if known or desk.governor.mode is not Mode.HEDGE or not desk.small.can_rollback(ROWS):
            return
        rows = min(ROWS, desk.small.most_rows)
        if rows > 1 and len(self._rows) == 1 and not self._cached.is_batch:
            desk.experience.branches = desk.small.branch_cost(signals.token_id, rows=rows)

    def _advance(self) -> bool:
        """Feed the likeliest row, and with it those of its length; say whether anything was fed."""
        rows = [row for row in self._rows if not self._is_complete(row)]
        if not rows:
            return False
        best = max(rows, key=lambda row: row.share)
        # With signals it has to be asked, and no call is free.
        if best.signals or self._desk.escalator.oldest_s > self._desk.governor.patience_s:
            return False
        batch = [row for row in rows if row.signals is None and self._is_next(row)]
        width = self._width
        together = width > 1 and best in batch and len(batch) > 1
        count = 1 if together else self._length(best) - len(self._cached)
        if self._desk.escalator.calls and not self._desk.small.can_rollback(count):
            self.held = True
            return False
        if together:
            batch.sort(key=lambda row: -row.share)
            self._feed_batch(batch[:width])
        else:
            self._feed(best)
        return True

    def _is_complete(self, row: _Row) -> bool:
        ends = bool(row.steps) and row.steps[-1].decision.ends
        return ends or self._length(row) >= self._desk.limit

    def _length(self, row: _Row) -> int:
        count = sum(len(step.decision.token_ids) for step in row.steps)
        return len(self._desk.commits) + count

    def _is_next(self, row: _Row) -> bool:
        """Whether all of a row but its last token is in the cache."""
        return row.slot is not None and self._length(row) == len(self._cached) + 1

    def _feed(self, row: _Row) -> None:
        """Decode one row alone, from where the cache holds it."""
        self._stand(row)
        ids = self._desk.transcript.ids
        bounds = self._bounds + [written.at for written in self._written]
        if row.slot is None or self._cached.is_batch:
            self._cached.collapse(ids)
        row.signals = self._cached.feed(ids, bounds, exactly=row.again)
        for each in self._rows:
            each.slot = None
        row.slot, row.again = 0, False

    def _feed_batch(self, rows: list[_Row]) -> None:
        """Decode rows of one length by one token each."""
        parents = [row.slot or 0 for row in rows]
        ids = [row.steps[-1].decision.token_ids[-1] for row in rows]
        signals = self._cached.feed_batch(parents, ids)
        for each in self._rows:
            each.slot = None
        for slot, row in enumerate(rows):
            row.slot, row.signals = slot, signals[slot]

    def _near(self, signals: Signals) -> bool:
        """Whether rounding could have changed what is decided from these signals."""
        branches = self._desk.experience.branches
        band_nats = branches.rounding_nats if branches is not None else 0.0
        gap = signals.top_logprobs[0] - signals.top_logprobs[1]
        return gap <= band_nats or self._desk.decider.is_near(signals, band_nats)

    def _leave(self) -> Iterator[Event]:
        """Take back what was decoded past the end of the answer."""
        self._desk.escalator.close()
        count = len(self._desk.commits)
        if self._shown:
            self.retracted += len(self._shown)
            yield Retracted(count)
        self._cached.leave(self._desk.transcript.ids[:count], last=self._bounds[-1])
