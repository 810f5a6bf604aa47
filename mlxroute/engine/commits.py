"""The committed tokens of one answer, in order: limits, stop strings, figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mlxroute.engine.escalation.decision import Decision
from mlxroute.engine.modes.experience import Experience
from mlxroute.engine.text import StopStrings
from mlxroute.types import Source, StopReason, Token


class Commits:
    """Takes decisions in order until the answer has `ended`; counts them."""

    def __init__(
        self,
        *,
        limit: int,
        stop: Sequence[str],
        strict: bool,
        experience: Experience,
        began_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._limit = limit
        self._stop_strings = StopStrings(stop)
        self._strict = strict
        self._experience = experience
        self._began_s = began_s
        self._clock = clock
        self._shown_text: list[str] = []
        self.times_s: list[float] = []
        self.ended = False
        self.finish = StopReason.CANCELLED
        self.large_tokens = 0
        self.escalated = 0
        self.agreed = 0
        self.fallbacks = 0
        self.unchecked = 0
        self.withheld = 0
        self.prefetch_used = 0

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def text(self) -> str:
        """What may be shown so far."""
        return "".join(self._shown_text)

    def commit(self, decision: Decision, texts: Sequence[str]) -> Iterator[Token]:
        """Commit what was decided, `texts` being what its tokens add; yield what may be shown.

        Raises the decision's LargeError if `strict`.
        """
        if self._strict and decision.error is not None:
            raise decision.error
        self._count(decision)
        for position, (token_id, text) in enumerate(zip(decision.token_ids, texts, strict=True)):
            if self._stop_strings.hit or len(self) >= self._limit:
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
                # A large token spelled as several small ones is still one escalation.
                escalation=decision.escalation if position == 0 else None,
                checked=decision.checked,
                time_s=self._clock() - self._began_s,
            )
            self.times_s.append(token.time_s)
            self.large_tokens += decision.source is Source.LARGE
            yield from self._shown(self._stop_strings.push(token))
        if (finish := self._finish_after(decision)) is not None:
            self.ended, self.finish = True, finish
            yield from self._shown(self._stop_strings.flush())

    def _count(self, decision: Decision) -> None:
        self.unchecked += not decision.checked
        self.withheld += decision.withheld
        escalation = decision.escalation
        called = escalation is not None and not decision.withheld
        self._experience.committed(escalated=called)
        if escalation is None or decision.withheld:
            return
        if escalation.large is not None:
            self._experience.escalated(
                decision.signals, escalation.large, prefetched=escalation.prefetched
            )
        self.escalated += escalation.large is not None
        self.fallbacks += escalation.large is None
        self.agreed += escalation.agreed
        self.prefetch_used += escalation.prefetched

    def _shown(self, tokens: Iterator[Token]) -> Iterator[Token]:
        for token in tokens:
            self._shown_text.append(token.text)
            yield token

    def _finish_after(self, decision: Decision) -> StopReason | None:
        if self._stop_strings.hit:
            return StopReason.STOP_STRING
        if decision.ends:
            return StopReason.EOS
        return StopReason.LENGTH if len(self) >= self._limit else None
