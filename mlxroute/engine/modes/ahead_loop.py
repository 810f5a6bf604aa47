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
from dataclasses import replace

from mlxroute.engine.escalation.calls import Call
from mlxroute.engine.escalation.decision import Decision
from mlxroute.engine.modes.branches import Position, Row, Step, Written
from mlxroute.engine.modes.cached_rows import Cached
from mlxroute.engine.modes.decode_context import Desk
from mlxroute.engine.modes.experience import BRANCH_ROWS
from mlxroute.engine.protocols import RouterState
from mlxroute.types import Event, Mode, Provisional, Retracted, Signals

# A branch less likely than this is not worth a row.
_LEAST_SHARE = 0.02


class Ahead:
    """Walks ahead of the commits along one row, or several if `branching`.

    `retracted` counts shown tokens that were taken back, `redecoded` decisions taken again for
    their rounding; `held` says that the cache once stopped the walk.
    """

    def __init__(self, desk: Desk, *, branching: bool) -> None:
        self._desk = desk
        self._branching = branching
        self._rows: list[Row] = []
        self._written: list[Written] = []
        # Where each committed decision begins.
        self._bounds: list[int] = []
        self._shown: list[int] = []
        # How many prefetched tokens were looked at.
        self._known = 0
        self._cached = Cached(desk)
        self.retracted = 0
        self.redecoded = 0
        self.held = False

    def walk(self, signals: Signals) -> Iterator[Event]:
        """Decode to the end of the answer from the signals of its first position."""
        self._rows = [Row([], 0, signals)]
        while True:
            self._land()
            yield from self._retract()
            yield from self._commit()
            if self._desk.commits.ended:
                break
            yield from self._announce()
            if not (self._place() or self._advance()):
                self._desk.escalator.wait(self._has_news)
        yield from self._leave()

    @property
    def _width(self) -> int:
        """How many rows there may be now; several once it was measured how they round."""
        desk, branches = self._desk, self._desk.experience.branches
        if branches is None or not self._branching or desk.governor.mode is not Mode.HEDGE:
            return 1
        return min(branches.rows, desk.small.max_rows)

    # What the large model answered

    def _land(self) -> None:
        """Take in the answers that came."""
        prefetched = self._desk.decider.prefetched
        for position in self._asked():
            # What an earlier one dropped is not asked any more.
            if position.call is not None and (decision := self._answer(position, position.call)):
                self._settle(position, decision)
        if self._has_news():
            self._known = prefetched.generated
            for position in self._asked():
                self._settle_prefetched(position)

    def _has_news(self) -> bool:
        """Whether calls brought tokens that were not looked at."""
        return self._desk.decider.prefetched.generated != self._known

    def _asked(self) -> list[Position]:
        steps = (step for row in self._rows for step in row.steps)
        found = {id(s.position): s.position for s in steps if s.position.call is not None}
        return sorted(found.values(), key=lambda position: position.at)

    def _answer(self, position: Position, call: Call) -> Decision | None:
        """What a call decides, if it is over."""
        desk = self._desk
        if desk.escalator.landed(call):
            decision = desk.decider.settled(position.own, call, self._ids_before(position))
            return decision or self._asked_again(position)
        if not desk.escalator.open:
            # The time that faults may cost is used up: the rest is not waited for.
            desk.escalator.abandon([call])
            return desk.decider.unchecked(position.own)
        return None

    def _asked_again(self, position: Position) -> Decision | None:
        """Ask for a token that another call did not bring, if nothing else decides it by now."""
        row = next(row for row in self._rows if row.place_of(position) is not None)
        self._stand(Row(row.steps[: row.place_of(position)], slot=None))
        decision = self._desk.decider.at_once(position.own)
        position.call = self._desk.decider.ask() if decision is None else None
        return decision

    def _settle_prefetched(self, position: Position) -> None:
        """Answer a position that is asked from what another call brought."""
        if position.call is None or position.in_character:
            return
        ids = self._ids_before(position)
        if (decision := self._desk.decider.from_prefetched(position.own, ids)) is not None:
            self._desk.escalator.abandon([position.call])
            self._settle(position, decision)

    def _settle(self, position: Position, decision: Decision) -> None:
        """Decide a position, and drop the rows that took another token there."""
        position.call, position.final = None, decision
        kept: list[Row] = []
        turned: Row | None = None
        followed = False
        for row in self._rows:
            index = row.place_of(position)
            if index is None:
                kept.append(row)
            elif row.steps[index].choice.token_ids == decision.token_ids:
                followed = True
                kept.append(row)
            elif turned is None:
                turned = Row([*row.steps[:index], Step(position, decision)], slot=None)
                kept.append(turned)
        if followed and turned is not None:
            kept.remove(turned)
        self._keep(kept)

    def _keep(self, rows: list[Row]) -> None:
        """Go on with these rows, without the calls of the others."""
        still = {id(step.position) for row in rows for step in row.steps}
        lost = [each for each in self._asked() if id(each) not in still]
        self._desk.escalator.abandon([each.call for each in lost if each.call is not None])
        for each in lost:
            each.call = None
        self._rows = rows

    def _ids_before(self, position: Position) -> Sequence[int]:
        row = next(row for row in self._rows if row.place_of(position) is not None)
        self._stand(row)
        return self._desk.transcript.ids[: position.at]

    # What is committed and shown

    def _stand(self, row: Row) -> None:
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
            self._written.append(Written(step.position.at, step.decision, texts))

    def _commit(self) -> Iterator[Event]:
        commits = self._desk.commits
        # All rows begin with the same position; once that is decided, with the same token.
        while (steps := self._rows[0].steps) and steps[0].position.final and not commits.ended:
            self._stand(self._rows[0])
            first = self._written.pop(0)
            self._bounds.append(first.at)
            yield from self._desk.commit(first.decision, first.texts)
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
            pace = self._pace(row)
            own = self._desk.decider.own(row.signals, pace)
            if not self._cached.is_exact and self._near(own, pace):
                self.redecoded += 1
                row.slot, row.signals, row.again, placed = None, None, True, True
            else:
                placed = self._put(row, own) or placed
        return placed

    def _pace(self, row: Row) -> RouterState:
        """What the router has come to behind a row."""
        return row.steps[-1].choice.after if row.steps else self._desk.decider.pace

    def _put(self, row: Row, own: Decision) -> bool:
        """Put the next position on a row; not while it must be asked and no call is free."""
        desk = self._desk
        self._stand(row)
        at, in_character = len(desk.transcript), desk.transcript.in_character
        decision = desk.decider.at_once(own)
        if decision is not None:
            row.steps.append(Step(Position(at, own, None, in_character, decision), decision))
        elif desk.escalator.has_room and self._may_ask(row):
            position = Position(at, own, desk.decider.ask(), in_character)
            before = list(row.steps)
            row.steps.append(Step(position, own, math.exp(own.signals.top_logprobs[0])))
            self._branch(before, row.slot, position, own.signals)
        else:
            return False
        row.signals = None
        return True

    def _may_ask(self, row: Row) -> bool:
        """Whether a call at the end of a row is within the ceiling on calls."""
        if all(step.position.final for step in row.steps):
            return True
        desk = self._desk
        likeliest = row is _likeliest(self._open_rows())
        return desk.governor.may_ask_early(likeliest=likeliest, joined=desk.escalator.joined)

    def _branch(
        self, before: list[Step], slot: int | None, position: Position, signals: Signals
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
            row = Row([*before, Step(position, choice, math.exp(logprob))], slot)
            if row.share >= _LEAST_SHARE:
                self._rows.append(row)
        best = sorted(self._rows, key=lambda row: -row.share)[:width]
        self._keep([row for row in self._rows if row in best])

    def _measure(self, signals: Signals) -> None:
        """Find out, once in a session and while a call is under way, what batches cost here."""
        desk = self._desk
        known = not self._branching or desk.experience.branches is not None
        if (
            known
            or desk.governor.mode is not Mode.HEDGE
            or not desk.small.can_rollback(BRANCH_ROWS)
        ):
            return
        rows = min(BRANCH_ROWS, desk.small.max_rows)
        if rows > 1 and len(self._rows) == 1 and not self._cached.is_batch:
            desk.experience.branches = desk.small.measure_branch_cost(signals.token_id, rows=rows)

    def _advance(self) -> bool:
        """Feed the likeliest row, and with it those of its length; say whether anything was fed."""
        rows = self._open_rows()
        if (best := _likeliest(rows)) is None:
            return False
        # With signals it has to be asked, and may not yet.
        if best.signals:
            return not self._desk.escalator.has_room and self._make_room(best)
        if self._desk.escalator.oldest_s > self._desk.governor.patience_s:
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

    def _make_room(self, best: Row) -> bool:
        """Give up the least likely calls that are not for the likeliest row; say whether any were.

        A row that loses one stands where it would have to be asked.
        """
        found: tuple[Row, Position] | None = None
        for row in self._rows:
            for index, step in enumerate(row.steps):
                if step.position.call is not None and best.place_of(step.position) is None:
                    stands = Row(row.steps[:index], None, step.position.own.signals)
                    if stands.share < (found[0] if found else best).share:
                        found = stands, step.position
                    break
        if found is None:
            return False
        stands, position = found
        rows = [stands if row.place_of(position) is not None else row for row in self._rows]
        self._keep(list(dict.fromkeys(rows)))
        return True

    def _open_rows(self) -> list[Row]:
        return [row for row in self._rows if not self._is_complete(row)]

    def _is_complete(self, row: Row) -> bool:
        ends = bool(row.steps) and row.steps[-1].decision.ends
        return ends or self._length(row) >= self._desk.limit

    def _length(self, row: Row) -> int:
        count = sum(len(step.decision.token_ids) for step in row.steps)
        return len(self._desk.commits) + count

    def _is_next(self, row: Row) -> bool:
        """Whether all of a row but its last token is in the cache."""
        return row.slot is not None and self._length(row) == len(self._cached) + 1

    def _feed(self, row: Row) -> None:
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

    def _feed_batch(self, rows: list[Row]) -> None:
        """Decode rows of one length by one token each."""
        parents = [row.slot or 0 for row in rows]
        ids = [row.steps[-1].decision.token_ids[-1] for row in rows]
        signals = self._cached.feed_batch(parents, ids)
        for each in self._rows:
            each.slot = None
        for slot, row in enumerate(rows):
            row.slot, row.signals = slot, signals[slot]

    def _near(self, own: Decision, pace: RouterState) -> bool:
        """Whether rounding could have changed what is decided."""
        branches = self._desk.experience.branches
        band_nats = branches.rounding_nats if branches is not None else 0.0
        best, second = own.signals.top_logprobs[:2]
        return best - second <= band_nats or self._desk.decider.is_near(own, pace, band_nats)

    def _leave(self) -> Iterator[Event]:
        """Take back what was decoded past the end of the answer."""
        self._desk.escalator.close()
        count = len(self._desk.commits)
        if self._shown:
            self.retracted += len(self._shown)
            yield Retracted(count)
        self._cached.leave(self._desk.transcript.ids[:count], last=self._bounds[-1])


def _likeliest(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row.share, default=None)
