"""Collaborators that the decode loops share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mlxroute.engine.cache_claim import CacheClaim
from mlxroute.engine.commits import Commits
from mlxroute.engine.escalation.calls import AnswerCalls
from mlxroute.engine.escalation.decision import Decider, Decision
from mlxroute.engine.escalation.prefetch import PrefetchedTokens
from mlxroute.engine.experience import Experience
from mlxroute.engine.governor import Governor
from mlxroute.engine.machine_load import own_busy_core_s
from mlxroute.engine.protocols import BatchingProtocol, SmallProtocol
from mlxroute.engine.transcript import RenderedPrompt, Transcript
from mlxroute.types import Judgement, Signals, Token


@dataclass(frozen=True, slots=True)
class DecodeContext:
    """The collaborators of one answer, each the owner of its state.

    `batching` is as in `Answer`.
    """

    small: SmallProtocol
    prompt: RenderedPrompt
    decider: Decider
    calls: AnswerCalls
    prefetched: PrefetchedTokens
    commits: Commits
    max_tokens: int
    governor: Governor
    experience: Experience
    clock: Callable[[], float]
    batching: BatchingProtocol | None = None
    claim: CacheClaim = field(default_factory=CacheClaim)

    @property
    def was_batched(self) -> bool:
        """Whether the latest signals may differ from those of one row by rounding."""
        return self.batching is not None and self.batching.was_batched

    @property
    def rounding_nats(self) -> float:
        """Bound of the rounding of batches, of branches and with other answers."""
        cost, batching = self.experience.branch_cost, self.batching
        return max(
            0.0 if cost is None else cost.rounding_nats,
            0.0 if batching is None else batching.rounding_nats,
        )

    @property
    def may_batch(self) -> bool:
        """Whether some decisions of a batch stand in spite of its rounding."""
        return self.governor.may_batch(self.rounding_nats)

    def feed(self, token_ids: Sequence[int], *, unbatched: bool = False) -> Signals:
        """Feed the small model's only row; return the signals of the next position.

        With `unbatched` it is not batched with other answers. Raises UsageError once another answer
        was begun on the small model.
        """
        self.claim.check(self.small)
        stalled = self.calls.take_stalled()
        began_s, busy_before_s = self.clock(), own_busy_core_s()
        if unbatched and self.batching is not None:
            signals = self.batching.extend_unbatched(token_ids)
        else:
            signals = self.small.extend(token_ids)
        # After a stall the queued step is finished already, so its time is not that of a step.
        if len(token_ids) == 1 and not stalled:
            self._record_step(self.clock() - began_s, own_busy_core_s() - busy_before_s)
        return signals

    def _record_step(self, seconds: float, own_core_s: float) -> None:
        during_call = self.calls.in_flight > 0 or self.prefetched.is_pending
        self.experience.on_step(seconds, during_call=during_call)
        if not during_call and self.governor.is_local:
            self.experience.on_local_step(seconds, own_core_s)
        if during_call and self.governor.on_shared_step(seconds):
            self.prefetched.close()

    def commit(self, decision: Decision, transcript: Transcript) -> Iterator[Token]:
        """Commit the decision that ends the transcript; yield the tokens that can be released."""
        texts = transcript.texts_from(len(transcript) - len(decision.token_ids))
        self.decider.on_committed(decision)
        yield from self.commits.commit(decision, texts)
        self.prefetched.on_committed(transcript.ids, len(self.commits))


def append_decision(transcript: Transcript, decision: Decision) -> Transcript:
    """Return the transcript followed by a decision's tokens."""
    return transcript.extend(
        decision.token_ids,
        ends=decision.ends,
        large_ids=decision.large_ids,
        is_asked=decision.judgement is Judgement.ESCALATE,
    )
