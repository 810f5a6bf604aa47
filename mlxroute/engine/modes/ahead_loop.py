"""The decode loop of every mode but `wait`, and of every exact answer of `serve`.

Under `overlap` and `hedge` decoding goes on while calls are in flight. A branch is one continuation
of the committed answer: the small model's own choices, and under `hedge` also some of its next
likeliest choices at the positions with a call. Branches of equal length are decoded as one batch.
The large model's token at a position drops the branches that have another token there; when none is
left, decoding goes back to that position.

A batch rounds differently from a row alone. Where that could change a decision, the tokens since
the first batch are decoded again, one row and one token at a time, before the decision is made. So
are they before the KV cache gets so long that it can no longer be rolled back. Where every decision
would be made again, nothing is decoded as a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from mlxroute.engine.escalation.calls import Call
from mlxroute.engine.escalation.decision import Decision
from mlxroute.engine.experience import BRANCH_ROWS
from mlxroute.engine.modes.answer_cache import AnswerCache
from mlxroute.engine.modes.branches import Branch, Branches, Position, find_likeliest
from mlxroute.engine.modes.decode_context import DecodeContext
from mlxroute.engine.modes.provisional import ProvisionalTokens
from mlxroute.engine.protocols import RouterState
from mlxroute.engine.transcript import Transcript
from mlxroute.errors import LargeError
from mlxroute.types import Event, Judgement, Mode, Signals

# A branch with a lower probability is not worth a row.
_MIN_PROBABILITY = 0.02


class AheadLoop:
    """Decodes ahead of the commits along one branch, or several under `hedge`.

    `provisional` counts the retracted tokens, `redecoded` the decisions that were made again
    without a batch. `was_blocked` is True if decoding paused because the KV cache could not be
    rolled back.
    """

    def __init__(self, context: DecodeContext) -> None:
        self._context = context
        self._cache = AnswerCache(context)
        # Number of prefetched tokens when the pending positions were last compared with them.
        self._checked_prefetched = 0
        # Where the last committed decision starts.
        self._last_decision = 0
        self.provisional = ProvisionalTokens()
        self.redecoded = 0
        self.was_blocked = False

    def run(self, signals: Signals) -> Iterator[Event]:
        """Decode to the end of the answer; `signals` are those of its first position."""
        context, provisional = self._context, self.provisional
        self._branches = Branches(Transcript(context.prompt), signals)
        while True:
            self._take_outcomes()
            yield from provisional.retract(self._uncommitted_ids(), committed=self._committed)
            yield from self._commit_decided()
            if context.commits.ended:
                break
            steps = self._branches.first.steps
            yield from provisional.show(steps, committed=self._committed)
            # Whoever takes the events may have begun another answer.
            context.claim.check(context.small)
            if not (self._decide_next_positions() or self._decode()):
                context.calls.wait(self._has_new_prefetched)
        context.calls.close()
        yield from provisional.retract((), committed=self._committed)
        ids = self._branches.committed.ids[: self._committed]
        if context.claim.holds(context.small):
            self._cache.finish(ids, last_decision=self._last_decision)

    @property
    def _committed(self) -> int:
        return len(self._context.commits)

    def _uncommitted_ids(self) -> tuple[int, ...]:
        """Return the ids along the first branch that are not committed."""
        return self._branches.transcript(self._branches.first).ids[self._committed :]

    # The outcomes of calls

    def _take_outcomes(self) -> None:
        """Decide the positions whose calls have ended."""
        for position in self._branches.pending_positions():
            # An earlier outcome may have dropped this position.
            if (call := position.call) is None:
                continue
            if (decision := self._decision_by_call(position, call)) is not None:
                self._decide(position, decision)
        if self._has_new_prefetched():
            self._checked_prefetched = self._context.prefetched.generated
            for position in self._branches.pending_positions():
                self._decide_by_prefetched(position)

    def _has_new_prefetched(self) -> bool:
        """Return whether tokens were prefetched that no pending position was compared with."""
        return self._context.prefetched.generated != self._checked_prefetched

    def _decision_by_call(self, position: Position, call: Call) -> Decision | None:
        """Return the decision by a call if it is finished or the calls are closed, else None."""
        context = self._context
        if context.calls.is_finished(call):
            ids = self._branches.transcript_before(position).ids
            decision = context.decider.decide_from_call(position.small_choice, call, ids)
            return decision or self._call_again(position)
        if not context.calls.is_open:
            # Failures have used up the time that they may cost this answer.
            context.calls.discard([call])
            return context.decider.leave_unchecked(position.small_choice)
        return None

    def _call_again(self, position: Position) -> Decision | None:
        """Call for a token that a joined call did not return, unless it is known by now."""
        transcript = self._branches.transcript_before(position)
        decider = self._context.decider
        decision = decider.decide_without_call(position.small_choice, transcript)
        position.call = decider.start_call(transcript) if decision is None else None
        return decision

    def _decide_by_prefetched(self, position: Position) -> None:
        """Decide a pending position whose token another call prefetched."""
        if position.call is None or position.in_character:
            return
        ids = self._branches.transcript_before(position).ids
        decision = self._context.decider.decide_from_prefetched(position.small_choice, ids)
        if decision is not None:
            self._context.calls.discard([position.call])
            self._decide(position, decision)

    def _decide(self, position: Position, decision: Decision) -> None:
        self._context.calls.discard(self._branches.decide(position, decision))
        if decision.refusal is not None:
            self._leave_later_unchecked(position, decision.refusal)

    def _leave_later_unchecked(self, position: Position, refusal: LargeError) -> None:
        """Decide the positions after a refused one as `wait` does, which calls for none of them."""
        context = self._context
        for later in self._branches.positions_after(position):
            if later.small_choice.judgement is not Judgement.ESCALATE:
                continue
            if later.call is not None:
                context.calls.discard([later.call])
            unchecked = context.decider.leave_unchecked(later.small_choice, refusal)
            context.calls.discard(self._branches.decide(later, unchecked))

    def _commit_decided(self) -> Iterator[Event]:
        """Commit the positions at the start of the branches that are decided."""
        while not self._context.commits.ended and (decision := self._branches.pop_decided()):
            transcript = self._branches.committed
            self._last_decision = len(transcript) - len(decision.token_ids)
            yield from self._context.commit(decision, transcript)
            self.provisional.on_committed(len(decision.token_ids))

    # The next positions

    def _decide_next_positions(self) -> bool:
        """Judge the next position of each decoded branch; return whether any branch changed."""
        is_progress = False
        for branch in sorted(self._branches.all, key=lambda branch: -branch.probability):
            # Forks of a likelier branch may have displaced this one.
            if branch.signals is None or branch not in self._branches.all:
                continue
            state = self._router_state_after(branch)
            small_choice = self._context.decider.judge(branch.signals, state)
            if not self._cache.is_exact and self._is_borderline(small_choice, state):
                self.redecoded += 1
                branch.batch_row = branch.signals = None
                branch.unbatched = True
                is_progress = True
            else:
                is_progress = self._add_position(branch, small_choice) or is_progress
        return is_progress

    def _router_state_after(self, branch: Branch) -> RouterState:
        if branch.steps:
            return branch.steps[-1].choice.state_after
        return self._context.decider.router_state

    def _is_borderline(self, small_choice: Decision, state: RouterState) -> bool:
        """Return whether the rounding of batches could change the decision."""
        band_nats = self._context.rounding_nats
        best, second = small_choice.signals.top_logprobs[:2]
        is_tie = best - second <= band_nats
        return is_tie or self._context.decider.is_borderline(small_choice, state, band_nats)

    def _add_position(self, branch: Branch, small_choice: Decision) -> bool:
        """Add the next position to a branch, with a call if it needs one.

        Returns False where it needs a call that cannot be made now.
        """
        context, transcript = self._context, self._branches.transcript(branch)
        position = Position(len(transcript), small_choice, None, transcript.ends_in_character)
        earlier = [step.decision for step in branch.steps]
        decision = context.decider.decide_without_call(small_choice, transcript, earlier)
        if decision is not None:
            position.final = decision
            self._branches.append(branch, position, decision)
        elif context.calls.has_free_slot and self._may_call(branch):
            position.call = context.decider.start_call(transcript)
            self._branches.append(
                branch, position, small_choice, math.exp(small_choice.signals.top_logprobs[0])
            )
            self._measure_branch_cost(small_choice.signals)
            self._fork(branch, small_choice)
        else:
            return False
        return True

    def _may_call(self, branch: Branch) -> bool:
        """Return whether the ceiling allows a call at the end of a branch."""
        if branch.is_certain:
            return True
        is_likeliest = branch is find_likeliest(self._open_branches())
        joined = self._context.calls.joined
        return self._context.governor.may_call_speculatively(
            is_likeliest=is_likeliest, joined=joined
        )

    @property
    def _max_branches(self) -> int:
        """Maximum number of branches now; 1 until the rounding of batches is known and small."""
        context, cost = self._context, self._context.experience.branch_cost
        if cost is None or not context.may_batch or context.governor.mode is not Mode.HEDGE:
            return 1
        return min(cost.rows, context.small.max_rows)

    def _fork(self, branch: Branch, small_choice: Decision) -> None:
        """Fork a branch by the small model's next likeliest choices at its last position.

        Only the likeliest branches are kept.
        """
        max_branches = self._max_branches
        if max_branches == 1:
            return
        signals = small_choice.signals
        choices = zip(signals.top_ids, signals.top_logprobs, strict=True)
        others = [choice for choice in choices if choice[0] != signals.token_id]
        for token_id, logprob in others[: max_branches - 1]:
            ends = token_id in self._context.small.vocabulary.eos_ids
            choice = replace(small_choice, token_ids=(token_id,), ends=ends)
            fork = self._branches.fork(branch, choice, math.exp(logprob))
            if fork.probability >= _MIN_PROBABILITY:
                self._branches.all.append(fork)
        best = sorted(self._branches.all, key=lambda branch: -branch.probability)[:max_branches]
        kept = [branch for branch in self._branches.all if branch in best]
        self._context.calls.discard(self._branches.keep(kept))

    def _measure_branch_cost(self, signals: Signals) -> None:
        """Measure, once a session and while a call is in flight, what batches cost."""
        context, small = self._context, self._context.small
        if not context.may_batch or context.experience.branch_cost is not None:
            return
        if context.governor.mode is not Mode.HEDGE or not small.can_rollback(BRANCH_ROWS):
            return
        rows = min(BRANCH_ROWS, small.max_rows)
        if rows > 1 and len(self._branches.all) == 1 and not self._cache.is_batch:
            context.experience.on_branch_cost(
                small.measure_branch_cost(signals.token_id, rows=rows)
            )

    # Decoding

    def _decode(self) -> bool:
        """Decode the likeliest open branch, in a batch with others of its length.

        Returns whether anything was done.
        """
        context, open_branches = self._context, self._open_branches()
        if (best := find_likeliest(open_branches)) is None:
            return False
        # A decoded branch is still open only if it needs a call that could not be made.
        if best.signals:
            return not context.calls.has_free_slot and self._free_slot(best)
        if not context.governor.may_decode_ahead(context.calls.oldest_age_s):
            return False
        batch = [b for b in open_branches if b.signals is None and self._is_cached(b)]
        max_branches = self._max_branches
        is_batch = max_branches > 1 and best in batch and len(batch) > 1
        missing = 1 if is_batch else self._length(best) - len(self._cache)
        may_roll_back = context.calls.in_flight or not self._cache.is_exact
        if may_roll_back and not context.small.can_rollback(missing):
            if context.calls.in_flight:
                self.was_blocked = True
                return False
            # The last time that what a batch computed can be removed from the cache.
            best.unbatched = True
        if context.batching is not None and not context.may_batch:
            # In a batch with other answers it would be decoded twice.
            best.unbatched = True
        if is_batch:
            batch.sort(key=lambda branch: -branch.probability)
            self._feed_batch(batch[:max_branches])
        else:
            self._feed(best)
        return True

    def _free_slot(self, best: Branch) -> bool:
        """Cancel the least likely call that the likeliest branch does not need.

        Branches that wait for it are cut back to its position. Returns whether there was one.
        """
        shortened: tuple[Branch, Position] | None = None
        for branch in self._branches.all:
            for index, step in enumerate(branch.steps):
                position = step.position
                if position.call is None or best.index_of(position) is not None:
                    continue
                before = Branch(branch.steps[:index], None, position.small_choice.signals)
                if before.probability < (shortened[0] if shortened else best).probability:
                    shortened = before, position
                break
        if shortened is None:
            return False
        before, position = shortened
        branches = [
            branch if branch.index_of(position) is None else before for branch in self._branches.all
        ]
        self._context.calls.discard(self._branches.keep(list(dict.fromkeys(branches))))
        return True

    def _open_branches(self) -> list[Branch]:
        """Return the branches that have not reached an end of the answer."""
        return [branch for branch in self._branches.all if not self._is_complete(branch)]

    def _is_complete(self, branch: Branch) -> bool:
        ends = bool(branch.steps) and branch.steps[-1].decision.ends
        return ends or self._length(branch) >= self._context.max_tokens

    def _length(self, branch: Branch) -> int:
        return len(self._branches.transcript(branch))

    def _is_cached(self, branch: Branch) -> bool:
        """Return whether the KV cache holds all of a branch but its last token."""
        return branch.batch_row is not None and self._length(branch) == len(self._cache) + 1

    def _feed(self, branch: Branch) -> None:
        """Decode one branch as a single row, after the part of it that the KV cache holds."""
        transcript = self._branches.transcript(branch)
        if branch.batch_row is None or self._cache.is_batch:
            self._cache.collapse(transcript.ids)
        branch.signals = self._cache.feed(transcript, unbatched=branch.unbatched)
        for other in self._branches.all:
            other.batch_row = None
        branch.batch_row = 0
        branch.unbatched = False

    def _feed_batch(self, branches: list[Branch]) -> None:
        """Decode one token of each branch as a batch; the branches have the same length."""
        parents = [branch.batch_row or 0 for branch in branches]
        ids = [branch.steps[-1].decision.token_ids[-1] for branch in branches]
        signals = self._cache.feed_batch(parents, ids)
        for branch in self._branches.all:
            branch.batch_row = None
        for row, branch in enumerate(branches):
            branch.batch_row, branch.signals = row, signals[row]
