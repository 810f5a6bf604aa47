"""An answer of scripted steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mlxroute.answers.document import AnswerDocument
from mlxroute.types import Activity, Event, Judgement, RunStats, Signals, Source, StopReason, Token
from tests.support.documents import make_document

NO_STATS = RunStats(
    text="",
    tokens=0,
    large_tokens=0,
    escalated=0,
    agreed=0,
    fallbacks=0,
    unchecked=0,
    withheld=0,
    finish_reason=StopReason.EOS,
    prompt_tokens=0,
    cached_prompt_tokens=0,
    ttft_s=0.0,
    itl_p50_s=0.0,
    itl_p95_s=0.0,
    stall_s=0.0,
    tokens_per_s=0.0,
    total_s=0.0,
    requests=0,
    uploaded_tokens=0,
    uploaded_bytes=0,
    large_cached_tokens=0,
    large_completion_tokens=0,
    cost_estimate=None,
)
Step = str | Event | BaseException | Callable[["ScriptedAnswer"], None]


def token(
    text: str, *, index: int = 0, source: Source = Source.SMALL, entropy_nats: float = 0.0
) -> Token:
    signals = Signals(
        token_id=0,
        logprob=-0.1,
        entropy_nats=entropy_nats,
        varentropy=0.0,
        margin=0.5,
        top_ids=(0,),
        top_logprobs=(-0.1,),
    )
    return Token(
        index=index,
        token_id=0,
        text=text,
        source=source,
        score=entropy_nats,
        threshold=math.inf,
        judgement=Judgement.KEEP,
        signals=signals,
        escalation=None,
        checked=True,
        unchecked_reason=None,
        time_s=0.0,
    )


class ScriptedAnswer:
    """An answer of steps: texts and events are yielded, exceptions raised, functions called."""

    def __init__(self, steps: Sequence[Step], *, stats: RunStats = NO_STATS) -> None:
        self._steps = steps
        self._stats = stats
        self.given: list[str] = []
        self.activity = Activity.PREFILL
        self.prefill_done = 0
        self.prefill_total = 0

    def __iter__(self) -> Iterator[Token]:
        return (event for event in self.events() if isinstance(event, Token))

    def events(self) -> Iterator[Event]:
        self.activity = Activity.DECODE
        for step in self._steps:
            if isinstance(step, BaseException):
                raise step
            if callable(step):
                step(self)
                continue
            item = token(step) if isinstance(step, str) else step
            if isinstance(item, Token):
                self.given.append(item.text)
            yield item
        self.activity = Activity.DONE

    def document(self) -> AnswerDocument:
        return make_document()

    def stats(self) -> RunStats:
        return replace(self._stats, text="".join(self.given), tokens=len(self.given))
