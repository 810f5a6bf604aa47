"""What to commit at a position: the small model's own token, or what the large one answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlxroute.engine.escalation.calls import Call, Escalator
from mlxroute.engine.escalation.never_send import NeverSend
from mlxroute.engine.escalation.prefetch import Prefetched
from mlxroute.engine.modes.experience import Experience
from mlxroute.engine.protocols import RouterProtocol, RouterState
from mlxroute.engine.transcript import Transcript
from mlxroute.errors import LargeError, LargeUnavailable, LargeUnrecorded
from mlxroute.types import Escalation, Judgement, LargeToken, Signals, Source


@dataclass(frozen=True, slots=True)
class Decision:
    """What to commit at a position, and how it came about; `error` is why it is unchecked.

    `threshold` and `judgement` are the router's, `after` is its pace behind the position.
    """

    signals: Signals
    score: float
    threshold: float
    judgement: Judgement
    after: RouterState
    token_ids: tuple[int, ...]
    source: Source
    ends: bool
    escalation: Escalation | None = None
    checked: bool = True
    withheld: bool = False
    error: LargeError | None = None

    def large_ids(self, position: int) -> tuple[int, ...] | None:
        """The large model's own ids of a token of these; None for the later ones of several."""
        if self.source is Source.SMALL or self.escalation is None:
            return ()
        large = self.escalation.large
        return None if position or large is None else large.large_ids


class Decider:
    """Decides at the end of the transcript, with a call or without.

    What it decides depends on the tokens before and on the answers alone, never on time, but for
    the end of an answer's calls after failures.
    """

    def __init__(
        self,
        router: RouterProtocol,
        escalator: Escalator,
        transcript: Transcript,
        *,
        eos_ids: frozenset[int],
        never_send: NeverSend,
        experience: Experience,
    ) -> None:
        self._router = router
        self._escalator = escalator
        self._transcript = transcript
        self._eos_ids = eos_ids
        self._never_send = never_send
        self._experience = experience
        self.prefetched = Prefetched()

    @property
    def pace(self) -> RouterState:
        """The router's, behind the last committed position."""
        return self._router.pace

    def committed(self, decision: Decision) -> None:
        """A decision was committed."""
        self._router.pace = decision.after
        for tokens in self.prefetched.take_ended():
            self._experience.wrote(tokens)

    def own(self, signals: Signals, pace: RouterState) -> Decision:
        """The small model's own choice, where the router has come to `pace`."""
        score = self._router.score(signals, pace.seen)
        judgement, after = pace.decide(score)
        return Decision(
            signals,
            score,
            pace.threshold,
            judgement,
            after,
            token_ids=(signals.token_id,),
            source=Source.SMALL,
            ends=signals.token_id in self._eos_ids,
        )

    def is_near(self, own: Decision, pace: RouterState, band: float) -> bool:
        """Whether signals that differ by `band` would be scored to another decision."""
        return pace.is_near(own.score, band * self._router.gain)

    def at_once(self, own: Decision) -> Decision | None:
        """What takes no call to decide; None where the large model has to be asked."""
        if own.judgement is not Judgement.ESCALATE:
            return own
        if not self._escalator.open:
            return self.unchecked(own)
        if (number := self._never_send.match(self._transcript.context().text)) is not None:
            failure = f"withheld: never-send pattern {number}"
            escalation = Escalation(own.signals.token_id, None, failure, latency_s=0.0)
            return replace(own, escalation=escalation, checked=False, withheld=True)
        if self._transcript.in_character:
            return None
        return self.from_prefetched(own, self._transcript.ids)

    def unchecked(self, own: Decision) -> Decision:
        """The small model's own choice, without the opinion that was wanted."""
        return replace(own, checked=False)

    def from_prefetched(self, own: Decision, ids: Sequence[int]) -> Decision | None:
        """The large model's token after these ids of the answer, if an earlier call brought it."""
        token = self.prefetched.find(ids)
        if token is None:
            return None
        return _large(own, token, latency_s=0.0, prefetched=True)

    def ask(self) -> Call:
        """Begin a call for the token after the transcript, or wait for one that may bring it."""
        if not self._transcript.in_character:
            coming = self.prefetched.coming(self._transcript.ids)
            if coming is not None:
                return self._escalator.join(coming)
        return self._escalator.begin(self._transcript.context())

    def settled(self, own: Decision, call: Call, ids: Sequence[int]) -> Decision | None:
        """What a call that has landed decides at the position after these ids of the answer.

        None where it was another's, which did not bring the token: it has to be asked for.
        """
        outcome = self._escalator.settle(call)
        if call.joined:
            if outcome.error is not None or not outcome.tokens:
                return None
            return _large(own, outcome.tokens[0], latency_s=outcome.latency_s, prefetched=True)
        if outcome.error is None:
            self.prefetched.add(ids, call.flight, most=call.most)
            took_s = outcome.tokens[0].latency_s or outcome.latency_s
            streamed = call.most > 1 and not call.flight.finished
            self._experience.called(
                len(outcome.tokens), took_s, alone=call.alone, streamed=streamed
            )
            return _large(own, outcome.tokens[0], latency_s=outcome.latency_s)
        escalation = Escalation(
            own.signals.token_id, None, str(outcome.error), latency_s=outcome.latency_s
        )
        # These say that there was no call.
        if isinstance(outcome.error, LargeUnavailable | LargeUnrecorded):
            return replace(own, checked=False, error=outcome.error)
        return replace(own, escalation=escalation, checked=False, error=outcome.error)


def _large(
    own: Decision, token: LargeToken, *, latency_s: float, prefetched: bool = False
) -> Decision:
    return replace(
        own,
        token_ids=token.token_ids,
        source=Source.LARGE,
        ends=token.is_eos,
        escalation=Escalation(own.signals.token_id, token, None, latency_s, prefetched),
    )
