"""Where answers go when nobody watches: plain text and JSON Lines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlxroute.types import Event, LargeToken, Provisional, Retracted, RunStats, Token

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.cli.session import Session
    from mlxroute.engine import Answer


def consoles() -> tuple[Console, Console]:
    """Consoles for stdout and stderr."""
    from rich.console import Console

    return Console(highlight=False), Console(stderr=True, highlight=False)


def history_path() -> Path:
    """The file with what was typed in chats."""
    import platformdirs

    return platformdirs.user_state_path("mlxroute") / "chat_history"


def write_plain(answer: Answer, *, stream: TextIO, err: Console) -> int:
    """Text as it comes; one summary line on stderr. 130 after Ctrl-C, else 0."""
    from mlxroute.view import PlainWriter, summary_line

    writer = PlainWriter(stream)
    code = 0
    try:
        for token in answer:
            writer.write(token.text)
    except KeyboardInterrupt:
        code = 130
    writer.finish()
    err.print(summary_line(answer.stats()), style="dim", markup=False, soft_wrap=True)
    return code


def write_json(answer: Answer, session: Session, *, stream: TextIO, events: bool = False) -> int:
    """One object per committed token, then one summary. 130 after Ctrl-C, else 0.

    With `events` also one for each token that is shown early, and for each retraction.
    """
    code = 0
    try:
        for event in answer.events():
            if events or isinstance(event, Token):
                write_object(event_object(event), stream)
    except KeyboardInterrupt:
        code = 130
    write_object(summary_object(answer.stats(), session), stream)
    return code


def event_object(event: Event) -> dict[str, Any]:
    """An event in the form the README documents."""
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
    """A token in the form the README documents."""
    escalation = token.escalation
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
        "escalated": escalation is not None and escalation.large is not None,
        "checked": token.checked,
        "large": _large_object(escalation.large) if escalation and escalation.large else None,
        "prefetched": escalation.prefetched if escalation else False,
        "failure": escalation.failure if escalation else None,
        "time_s": round(token.time_s, 6),
    }


def summary_object(stats: RunStats, session: Session) -> dict[str, Any]:
    """A summary in the form the README documents."""
    numbers = {
        key: round(value, 6) if isinstance(value, float) else value
        for key, value in asdict(stats).items()
    }
    return {
        "type": "summary",
        **numbers,
        # Cheap tokens cost less than rounding leaves.
        "cost_estimate": stats.cost_estimate,
        "escalation_rate": stats.escalation_rate,
        "agreement": stats.agreement,
        "router": session.router_name,
        "threshold": session.threshold,
        "budget": session.budget,
        "small": session.small.name,
        "large": session.large.model_name if session.large else None,
    }


def _large_object(large: LargeToken) -> dict[str, Any]:
    return {
        "id": large.token_ids[0] if len(large.token_ids) == 1 else None,
        "ids": list(large.token_ids),
        "text": large.text,
        "logprob": large.logprob,
        "top": [list(entry) for entry in large.top],
        "latency_s": round(large.latency_s, 6),
    }


def write_object(value: dict[str, Any], stream: TextIO) -> None:
    """Write one line of JSON and flush it."""
    stream.write(json.dumps(_finite(value)) + "\n")
    stream.flush()


def _finite(value: Any) -> Any:
    """Infinities and NaN are no JSON: they become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else repr(value)
