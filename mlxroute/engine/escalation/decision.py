"""What to commit at a position: the small model's token or the large model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlxroute.engine.escalation.calls import AnswerCalls, Call
from mlxroute.engine.escalation.never_send import NeverSend
from mlxroute.engine.escalation.prefetch import PrefetchedTokens
from mlxroute.engine.experience import Experience
from mlxroute.engine.protocols import RouterProtocol, RouterState
from mlxroute.engine.transcript import Transcript
from mlxroute.errors import LargeError, LargeRefused, LargeUnsendable
from mlxroute.types import Escalation, Judgement, LargeToken, Signals, Source, Vocabulary

_NO_LARGE = "no call was made: the answer has no large model"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to commit at a position, and how it was decided.

    Args:
        signals: The small model's view of the position.
        score: The router's score.
        threshold: The router's threshold.
        judgement: The router's judgement.
        state_after: The router's state after the position.
        token_ids: The token; several ids for a large token that is spelled as several small ones.
        source: The model that the token is from.
        ends: Whether the token ends the answer.
        escalation: The outcome of the escalation; None if there was none.
        checked: False if the router escalated the position but the small model's token stays:
            because of `error`, a never-send pattern, or because the answer has no calls left.
        error: Why the call failed, or was not made.
    """

    signals: Signals
    score: float
    threshold: float
    judgement: Judgement
    state_after: RouterState
    token_ids: tuple[int, ...]
    source: Source
    ends: bool
    escalation: Escalation | None = None
    checked: bool = True
    error: LargeError | None = None

    @property
    def withheld(self) -> bool:
        """Whether a never-send pattern kept the position local."""
        return self.escalation is not None and self.escalation.withheld

    @property
    def unchecked_reason(self) -> str | None:
        """Why the position was to be escalated and is unchecked; None if it is checked."""
        if self.checked:
            return None
        if self.error is not None:
            return str(self.error)
        return _NO_LARGE if self.escalation is None else self.escalation.failure

    @property
    def large_ids(self) -> tuple[int, ...]:
        """The large model's own ids; empty for a token of the small model."""
        large = None if self.escalation is None else self.escalation.large
        return () if self.source is Source.SMALL or large is None else large.large_ids

    @property
    def refusal(self) -> LargeError | None:
        """Why the server takes neither this position's prompt nor a longer one; None if it may."""
        is_too_long = isinstance(self.error, LargeRefused) and self.error.is_too_long
        return self.error if is_too_long or isinstance(self.error, LargeUnsendable) else None


class Decider:
    """Decides positions one after the other, with a call or without.

    A decision depends on the tokens before it and on the large model's replies, never on timing,
    except that repeated failures end the answer's calls.

    Args:
        router: Scores positions; its state advances with each committed one.
        calls: The calls of the answer.
        vocabulary: The small model's vocabulary.
        accept_within: Nats by which the small model's token may be less likely to the large model
            than its own and still be kept; 0 always takes the large model's.
        never_send: Patterns that keep positions local, with the messages of the prompt.
        experience: Receives what escalations and calls show.
        prefetched: The prefetched tokens of the answer.
    """

    def __init__(
        self,
        router: RouterProtocol,
        calls: AnswerCalls,
        *,
        vocabulary: Vocabulary,
        accept_within: float,
        never_send: NeverSend,
        experience: Experience,
        prefetched: PrefetchedTokens,
    ) -> None:
        self._router = router
        self._calls = calls
        self._vocabulary = vocabulary
        self._eos_ids = vocabulary.eos_ids
        self._accept_within = accept_within
        self._never_send = never_send
        # Why a committed position was withheld, and so is each later one.
        self._withheld_reason: str | None = None
        self._experience = experience
        self._prefetched = prefetched

    @property
    def router_state(self) -> RouterState:
        """The router's state after the last committed position."""
        return self._router.state

    def on_committed(self, decision: Decision) -> None:
        """Advance the router past a committed decision.

        No more calls are made after a refused or a withheld position.
        """
        self._router.state = decision.state_after
        if decision.withheld:
            self._withheld_reason = decision.unchecked_reason
        if decision.refusal is not None:
            self._calls.refuse(decision.refusal)
        for tokens in self._prefetched.take_finished():
            self._experience.on_continuation_finished(tokens)

    def judge(self, signals: Signals, state: RouterState) -> Decision:
        """Return the decision for the small model's own token, with the router's judgement."""
        score = self._router.score(signals, state.positions)
        judgement, state_after = state.decide(score)
        return Decision(
            signals,
            score,
            state.threshold,
            judgement,
            state_after,
            token_ids=(signals.token_id,),
            source=Source.SMALL,
            ends=signals.token_id in self._eos_ids,
        )

    def is_borderline(self, small_choice: Decision, state: RouterState, band: float) -> bool:
        """Return whether signals that differ by `band` nats could be judged differently."""
        return state.is_borderline(small_choice.score, band * self._router.gain)

    def decide_without_call(
        self, small_choice: Decision, transcript: Transcript, earlier: Sequence[Decision] = ()
    ) -> Decision | None:
        """Return the decision that needs no call; None if the position needs one.

        That is the small model's token if the router keeps it, a never-send pattern matches or the
        answer has no calls left, and a large token that an earlier call prefetched. `earlier` are
        the decisions of the positions before it that are not committed yet; none by default.
        """
        if small_choice.judgement is not Judgement.ESCALATE:
            return small_choice
        refusal = next((item.refusal for item in earlier if item.refusal is not None), None)
        if refusal is not None or not self._calls.is_open:
            return self.leave_unchecked(small_choice, refusal)
        reason = self._find_withheld_reason(transcript, earlier)
        if reason is not None:
            return _withhold(small_choice, reason)
        if transcript.ends_in_character:
            return None
        return self.decide_from_prefetched(small_choice, transcript.ids)

    def leave_unchecked(
        self, small_choice: Decision, refusal: LargeError | None = None
    ) -> Decision:
        """Return the decision for the small model's token, unchecked as no more calls are made.

        `refusal` is why; by default it is why the calls are closed.
        """
        return replace(small_choice, checked=False, error=refusal or self._calls.closed_error)

    def decide_from_prefetched(self, small_choice: Decision, ids: Sequence[int]) -> Decision | None:
        """Return the decision for a prefetched token after these answer ids; None without one."""
        token = self._prefetched.find(ids)
        if token is None or not self._is_conclusive(token):
            return None
        return self._escalate(small_choice, token, latency_s=0.0, prefetched=True)

    def _is_conclusive(self, token: LargeToken) -> bool:
        """Return whether a prefetched token decides as that of a call of its own would.

        Some servers give the logprobs that `accept_within` needs for the first token alone.
        """
        return not self._accept_within or token.logprob is not None

    def start_call(self, transcript: Transcript) -> Call:
        """Start a call for the position after the transcript.

        If a call in flight may still prefetch that token, and the answer's prefetched tokens so far
        were not all inconclusive, join it instead.
        """
        if not transcript.ends_in_character and self._may_join():
            pending = self._prefetched.pending(transcript.ids)
            if pending is not None:
                return self._calls.join(pending)
        return self._calls.start(transcript.context(), len(transcript))

    def _may_join(self) -> bool:
        """Return whether a prefetched token to come may be conclusive, judged by earlier ones."""
        if not self._accept_within:
            return True
        earlier = self._prefetched.arrived
        return not earlier or any(map(self._is_conclusive, earlier))

    def decide_from_call(
        self, small_choice: Decision, call: Call, ids: Sequence[int]
    ) -> Decision | None:
        """Return the decision by a finished call for the position after these answer ids.

        None if a joined call did not return the token, or one that is not conclusive: the position
        needs a call then.
        """
        outcome = self._calls.collect(call)
        if call.is_joined:
            tokens = outcome.tokens
            if outcome.error is not None or not tokens or not self._is_conclusive(tokens[0]):
                return None
            return self._escalate(
                small_choice, tokens[0], latency_s=outcome.latency_s, prefetched=True
            )
        if outcome.error is None:
            if call.max_tokens > 1:
                self._prefetched.add(ids, call.pending, max_tokens=call.max_tokens)
            self._experience.on_call_answered(
                len(outcome.tokens),
                outcome.tokens[0].latency_s or outcome.latency_s,
                decoding_waited=call.blocks_decoding,
                is_streamed=call.max_tokens > 1 and not call.pending.finished,
            )
            return self._escalate(small_choice, outcome.tokens[0], latency_s=outcome.latency_s)
        if not outcome.error.was_called:
            return replace(small_choice, checked=False, error=outcome.error)
        escalation = Escalation(
            small_choice.signals.token_id, None, str(outcome.error), latency_s=outcome.latency_s
        )
        return replace(small_choice, escalation=escalation, checked=False, error=outcome.error)

    def _find_withheld_reason(
        self, transcript: Transcript, earlier: Sequence[Decision]
    ) -> str | None:
        """Return which never-send pattern matches the context, or matched before; else None.

        What matched on another branch does not count, since `wait` never asks for its positions.
        """
        if self._withheld_reason is not None or not self._never_send.has_patterns:
            return self._withheld_reason
        for decision in earlier:
            if decision.withheld:
                return decision.unchecked_reason
        number = self._never_send.match(transcript.text)
        return None if number is None else f"withheld: never-send pattern {number}"

    def _escalate(
        self,
        small_choice: Decision,
        token: LargeToken,
        *,
        latency_s: float,
        prefetched: bool = False,
    ) -> Decision:
        """Return the decision for the large model's token, or for the small one it accepts."""
        if token.is_eos and small_choice.ends:
            # There may be several end tokens, and a server need not name the one it means.
            token = replace(token, token_ids=small_choice.token_ids)
        escalation = Escalation(
            small_choice.signals.token_id, token, None, latency_s, prefetched=prefetched
        )
        if self._is_acceptable(small_choice, token):
            return replace(small_choice, escalation=replace(escalation, accepted=True))
        return replace(
            small_choice,
            token_ids=token.token_ids,
            source=Source.LARGE,
            ends=token.is_eos,
            escalation=escalation,
        )

    def _is_acceptable(self, small_choice: Decision, token: LargeToken) -> bool:
        """Return whether the large model finds another token of the small one nearly as likely."""
        if not self._accept_within or token.logprob is None:
            return False
        small_bytes = self._vocabulary.token_bytes(small_choice.signals.token_id)
        if not small_bytes or token.token_ids == small_choice.token_ids:
            return False
        logprob = dict(token.top_bytes).get(small_bytes, -math.inf)
        return token.logprob - logprob <= self._accept_within


def _withhold(small_choice: Decision, reason: str) -> Decision:
    """Return the decision to keep a position local because a never-send pattern matches."""
    escalation = Escalation(
        small_choice.signals.token_id, None, reason, latency_s=0.0, withheld=True
    )
    return replace(small_choice, escalation=escalation, checked=False)
