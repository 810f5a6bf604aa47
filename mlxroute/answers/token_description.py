"""Committed tokens as entries of an answer document."""

from __future__ import annotations

from collections.abc import Sequence

from mlxroute.answers.document import (
    Choice,
    DocumentToken,
    LargeChoice,
    SmallChoice,
    TokenDecision,
)
from mlxroute.types import Judgement, LargeToken, Signals, Source, Token, Vocabulary

_TOP = 5


def describe_token(token: Token, vocabulary: Vocabulary) -> DocumentToken:
    """Return the entry of a token. `vocabulary` is the small model's."""
    decision = _decision(token)
    escalation = token.escalation
    is_part = decision is TokenDecision.CONTINUED
    large = None if escalation is None else escalation.large
    return DocumentToken(
        index=token.index,
        id=token.token_id,
        text=token.text,
        source=token.source,
        score=token.score,
        threshold=token.threshold,
        judgement=token.judgement,
        decision=decision,
        checked=token.checked,
        unchecked_reason=token.unchecked_reason,
        prefetched=escalation is not None and escalation.prefetched,
        small=None if is_part else _describe_small(token.signals, vocabulary),
        large=None if large is None else _describe_large(large, vocabulary),
        time_s=round(token.time_s, 6),
    )


def describe_ids(token_ids: Sequence[int], vocabulary: Vocabulary) -> tuple[str, bytes | None]:
    """Return what ids show, and their bytes where these are not those of the text."""
    data = b"".join(map(vocabulary.token_bytes, token_ids))
    if not data:
        return "".join(vocabulary.piece(token_id) or "" for token_id in token_ids), b""
    text = data.decode(errors="backslashreplace")
    return text, None if text.encode() == data else data


def _decision(token: Token) -> TokenDecision:
    escalation = token.escalation
    if not token.checked:
        return TokenDecision.UNCHECKED
    if escalation is None:
        if token.source is Source.LARGE:
            return TokenDecision.CONTINUED
        is_over = token.judgement is Judgement.OVER_BUDGET
        return TokenDecision.OVER_BUDGET if is_over else TokenDecision.KEPT
    if escalation.accepted:
        return TokenDecision.ACCEPTED
    return TokenDecision.AGREED if escalation.agreed else TokenDecision.REPLACED


def _describe_small(signals: Signals, vocabulary: Vocabulary) -> SmallChoice:
    top = zip(signals.top_ids[:_TOP], signals.top_logprobs[:_TOP], strict=False)
    return SmallChoice(
        id=signals.token_id,
        text=describe_ids((signals.token_id,), vocabulary)[0],
        logprob=round(signals.logprob, 6),
        entropy_nats=round(signals.entropy_nats, 6),
        margin=round(signals.margin, 6),
        top=tuple(_describe_choice(token_id, logprob, vocabulary) for token_id, logprob in top),
    )


def _describe_choice(token_id: int, logprob: float, vocabulary: Vocabulary) -> Choice:
    text, data = describe_ids((token_id,), vocabulary)
    return Choice(text, round(logprob, 6), id=token_id, bytes=data)


def _describe_large(large: LargeToken, vocabulary: Vocabulary) -> LargeChoice:
    return LargeChoice(
        ids=large.token_ids,
        text=describe_ids(large.token_ids, vocabulary)[0],
        ends=large.is_eos,
        logprob=large.logprob,
        top=tuple(Choice(text, logprob) for text, logprob in large.top[:_TOP]),
        latency_s=round(large.latency_s, 6),
    )
