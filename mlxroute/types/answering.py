"""Values of an answer: its tokens, its events and its summary."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mlxroute.types.decoding import Judgement, Mode, Signals, Source, StopReason
from mlxroute.types.escalating import CallFailure, Escalation


class Activity(StrEnum):
    """What an answer is doing at this moment."""

    PREFILL = "prefill"
    DECODE = "decode"
    WAIT = "wait"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Token:
    """One committed token of an answer.

    Args:
        index: Its number in the answer, from 0.
        token_id: Its id in the small model's vocabulary.
        text: What it adds to the visible text. Empty for an end token, for a token that is only
            part of a character, and for text that a stop string cut off.
        source: The model it came from.
        score: The router's score of the position.
        threshold: The threshold that the router compared it with.
        judgement: The router's judgement.
        signals: The small model's view of the position.
        escalation: The large model's answer, or the reason for its absence; None where the position
            was not escalated, and for the second and later ids of a large token.
        checked: False where the position was to be escalated but got no token of the large model.
        unchecked_reason: Why it got none, also where no call was made; None where `checked`.
        time_s: Seconds since the request began.
    """

    index: int
    token_id: int
    text: str
    source: Source
    score: float
    threshold: float
    judgement: Judgement
    signals: Signals
    escalation: Escalation | None
    checked: bool
    unchecked_reason: str | None
    time_s: float


@dataclass(frozen=True, slots=True)
class Provisional:
    """A token that was shown before it is committed, as number `index` of the answer."""

    index: int
    token_id: int
    text: str
    source: Source
    signals: Signals


@dataclass(frozen=True, slots=True)
class Retracted:
    """The retraction of all provisional tokens from number `index` on."""

    index: int


Event = Token | Provisional | Retracted
"""What `Answer.events` yields; the `Token`s alone are the answer."""


@dataclass(frozen=True, slots=True)
class RunStats:
    """The summary of one answer. Times are in seconds, rates are fractions.

    Args:
        text: The answer.
        tokens: Committed tokens.
        large_tokens: Those of them that came from the large model.
        escalated: Positions that the large model answered.
        agreed: Those of them where it chose the small model's own token.
        fallbacks: Calls that failed, so that the small model's token stayed.
        unchecked: Positions that were to be escalated but got no token of the large model.
        withheld: Those of them that a never-send pattern kept local.
        finish_reason: Why the answer ended.
        prompt_tokens: Tokens of the prompt.
        cached_prompt_tokens: Those of them that the KV cache held already.
        ttft_s: Time to the first token.
        itl_p50_s: Median inter-token latency.
        itl_p95_s: 95th percentile of the inter-token latency.
        stall_s: Time in which decoding waited for the large model.
        tokens_per_s: Tokens after the first one, per second since the prompt was read; 0 for one.
        total_s: Time to the last token, or to the interrupt or error that stopped the answer.
        requests: Requests sent, answered or not.
        uploaded_tokens: Prompt tokens of answered requests, as the server counts them, or else the
            small model's count of the same text.
        uploaded_bytes: Size of all request bodies.
        large_cached_tokens: Uploaded tokens that the server had in its cache.
        large_completion_tokens: Tokens that the server generated.
        cost_estimate: Estimated cost; None without prices.
        mode: The mode used last; `wait` by default.
        calls: Calls made, also for positions that were retracted; 0 by default.
        retracted: Provisional tokens that were taken back; 0 by default.
        prefetch_generated: Prefetched tokens, which calls returned beyond the one they were made
            for; 0 by default.
        prefetch_used: Those of them that answered a position; 0 by default.
        held: Whether decoding paused somewhere because the KV cache could not be rolled back
            there; False by default.
        redecoded: Decisions of a batch that were made again with one row; 0 by default.
        accepted: Escalations where the small model's token was kept, within `accept_within`; 0 by
            default.
        plan: The mode that `auto` picked and the figures behind it; empty by default.
        advice: The advice to use the large model alone, where that would be faster or cheaper, once
            a session; None by default.
        failures: Why positions stayed unchecked, by kind in the order of their first, and by
            whether a call was made; none by default. Withheld positions are not among them.
    """

    text: str
    tokens: int
    large_tokens: int
    escalated: int
    agreed: int
    fallbacks: int
    unchecked: int
    withheld: int
    finish_reason: StopReason
    prompt_tokens: int
    cached_prompt_tokens: int
    ttft_s: float
    itl_p50_s: float
    itl_p95_s: float
    stall_s: float
    tokens_per_s: float
    total_s: float
    requests: int
    uploaded_tokens: int
    uploaded_bytes: int
    large_cached_tokens: int
    large_completion_tokens: int
    cost_estimate: float | None
    mode: Mode = Mode.WAIT
    calls: int = 0
    retracted: int = 0
    prefetch_generated: int = 0
    prefetch_used: int = 0
    held: bool = False
    redecoded: int = 0
    accepted: int = 0
    plan: str = ""
    advice: str | None = None
    failures: tuple[CallFailure, ...] = ()

    @property
    def escalation_rate(self) -> float:
        """Escalated over committed tokens; 0 for an empty answer."""
        return self.escalated / self.tokens if self.tokens else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of escalations where the large token is the small model's own; None without any."""
        return self.agreed / self.escalated if self.escalated else None
