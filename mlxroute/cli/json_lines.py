"""Answers as JSON Lines: the public form of tokens, events and summaries.

Every key is written out here, or is a field of the answer document, so that renaming a field of the
library cannot change the output.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

from mlxroute.answers.document import AnswerSummary
from mlxroute.answers.record_json import to_json
from mlxroute.cli.exit_codes import EXIT_INTERRUPTED, EXIT_OK
from mlxroute.errors import MlxRouteError
from mlxroute.types import Event, LargeToken, Provisional, Retracted, RunStats, Token

if TYPE_CHECKING:
    from mlxroute.answers.recorded_answer import RecordedAnswer
    from mlxroute.cli.session import Session


def write_json(
    answer: RecordedAnswer, session: Session, *, stream: TextIO, events: bool = False
) -> int:
    """Write one object per committed token, then a summary; return 130 after Ctrl-C, else 0.

    With `events`, also write one object per provisional token and per retraction. An answer that a
    failure ends has its summary too, before the error is raised.
    """
    try:
        for event in answer.events():
            if events or isinstance(event, Token):
                write_object(event_object(event), stream)
    except (KeyboardInterrupt, MlxRouteError) as reason:
        # Here, so that an error of a closed pipe tells of the interrupt. After other signals, a
        # reader that stalls would use up the time in which the answer can be saved.
        write_object(summary_object(answer.stats(), session), stream)
        if isinstance(reason, KeyboardInterrupt):
            return EXIT_INTERRUPTED
        raise
    write_object(summary_object(answer.stats(), session), stream)
    return EXIT_OK


def event_object(event: Event) -> dict[str, Any]:
    """Return the JSON object of an event."""
    match event:
        case Provisional():
            return {
                "type": "provisional",
                "index": event.index,
                "id": event.token_id,
                "text": event.text,
                "source": event.source.value,
            }
        case Retracted():
            return {"type": "retracted", "index": event.index}
        case Token():
            return token_object(event)


def token_object(token: Token) -> dict[str, Any]:
    """Return the JSON object of a committed token."""
    escalation = token.escalation
    large = None if escalation is None else escalation.large
    return {
        "type": "token",
        "index": token.index,
        "id": token.token_id,
        "text": token.text,
        "source": token.source.value,
        "score": token.score,
        "threshold": token.threshold,
        "judgement": token.judgement.value,
        "entropy_nats": token.signals.entropy_nats,
        "margin": token.signals.margin,
        "small_id": token.signals.token_id,
        "escalated": large is not None,
        "checked": token.checked,
        "large": None if large is None else _large_object(large),
        "prefetched": escalation.prefetched if escalation else False,
        "accepted": escalation.accepted if escalation else False,
        "failure": token.unchecked_reason,
        "time_s": round(token.time_s, 6),
    }


def _large_object(large: LargeToken) -> dict[str, Any]:
    return {
        "id": large.token_ids[0] if len(large.token_ids) == 1 else None,
        "ids": list(large.token_ids),
        "text": large.text,
        "logprob": large.logprob,
        "top": [list(pair) for pair in large.top],
        "latency_s": round(large.latency_s, 6),
    }


def summary_object(stats: RunStats, session: Session) -> dict[str, Any]:
    """Return the JSON object of an answer's summary."""
    return {
        "type": "summary",
        **to_json(AnswerSummary.of(stats)),
        "router": session.routing.name,
        "threshold": session.routing.threshold,
        "budget": session.routing.budget,
        "small": session.small.name,
        "large": session.large.model_name if session.large else None,
    }


def write_object(value: dict[str, Any], stream: TextIO) -> None:
    """Write one line of JSON and flush it; infinities and NaN are "inf", "-inf" and "nan"."""
    stream.write(json.dumps(to_json(value)) + "\n")
    stream.flush()
