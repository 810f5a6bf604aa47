"""The committed tokens of one answer: limits, stop strings and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mlxroute.engine.escalation.decision import Decision
from mlxroute.engine.escalation.failures import AnswerFailures
from mlxroute.engine.experience import Experience
from mlxroute.engine.stop_strings import StopStrings
from mlxroute.errors import LargeNotContinued
from mlxroute.types import Source, StopReason, Token


class Commits:
    """Commits decisions in order until the answer has `ended`, and counts tokens and escalations.

    Args:
        max_tokens: Maximum length of the answer, in tokens.
        stop: Stop strings.
        strict: Raise the error of a decision.
        experience: Counts committed and escalated positions.
        failures: Counts positions that stay unchecked because of an error.
        began_s: Clock time at which the request began.
        clock: Returns seconds.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        stop: Sequence[str],
        strict: bool,
        experience: Experience,
        failures: AnswerFailures,
        began_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._failures = failures
        self._max_tokens = max_tokens
        self._stop_strings = StopStrings(stop)
        self._strict = strict
        self._experience = experience
        self._began_s = began_s
        self._clock = clock
        self._released_texts: list[str] = []
        self.times_s: list[float] = []
        self.ended = False
        self.finish_reason = StopReason.CANCELLED
        self.large_tokens = 0
        self.escalated = 0
        self.agreed = 0
        self.fallbacks = 0
        self.unchecked = 0
        self.withheld = 0
        self.prefetch_used = 0
        self.accepted = 0

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def text(self) -> str:
        """The text released so far."""
        return "".join(self._released_texts)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request began, without those that `skip` left out."""
        return self._clock() - self._began_s

    def skip(self, seconds: float) -> None:
        """Leave out the time between the answer's making and its first iteration."""
        self._began_s += seconds

    def commit(self, decision: Decision, texts: Sequence[str]) -> Iterator[Token]:
        """Commit a decision, whose tokens add `texts`; yield the tokens that can be released.

        Raises the decision's LargeError if `strict`, except for a reply that does not go on: the
        server has not failed.
        """
        error = decision.error
        if self._strict and error is not None and not isinstance(error, LargeNotContinued):
            raise error
        self._count(decision)
        for number, (token_id, text) in enumerate(zip(decision.token_ids, texts, strict=True)):
            if self._stop_strings.is_hit or len(self) >= self._max_tokens:
                break
            token = Token(
                index=len(self),
                token_id=token_id,
                text=text,
                source=decision.source,
                score=decision.score,
                threshold=decision.threshold,
                judgement=decision.judgement,
                signals=decision.signals,
                # A large token spelled as several small ones is one escalation.
                escalation=decision.escalation if number == 0 else None,
                checked=decision.checked,
                unchecked_reason=decision.unchecked_reason,
                time_s=self.elapsed_s,
            )
            self.times_s.append(token.time_s)
            self.large_tokens += decision.source is Source.LARGE
            yield from self._release(self._stop_strings.push(token))
        if (finish_reason := self._finish_reason_after(decision)) is not None:
            self.ended, self.finish_reason = True, finish_reason
            yield from self._release(self._stop_strings.flush())

    def _count(self, decision: Decision) -> None:
        self.unchecked += not decision.checked
        self.withheld += decision.withheld
        if decision.error is not None:
            # Without an escalation no call was made, and the error may be that of an earlier one.
            was_called = decision.escalation is not None
            self._failures.record(decision.error, was_called=was_called)
        escalation = None if decision.withheld else decision.escalation
        self._experience.on_committed(escalated=escalation is not None)
        if escalation is None:
            return
        if escalation.large is not None:
            self._experience.on_escalated(
                decision.signals,
                escalation.large,
                keeps_small=escalation.agreed or escalation.accepted,
                prefetched=escalation.prefetched,
            )
        self.escalated += escalation.large is not None
        self.fallbacks += escalation.large is None
        self.agreed += escalation.agreed
        self.prefetch_used += escalation.prefetched
        self.accepted += escalation.accepted

    def _release(self, tokens: Iterator[Token]) -> Iterator[Token]:
        for token in tokens:
            self._released_texts.append(token.text)
            yield token

    def _finish_reason_after(self, decision: Decision) -> StopReason | None:
        if self._stop_strings.is_hit:
            return StopReason.STOP_STRING
        if decision.ends:
            return StopReason.EOS
        return StopReason.LENGTH if len(self) >= self._max_tokens else None
