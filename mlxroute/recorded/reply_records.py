"""Recorded replies of the large model as JSON."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxroute.types import LargeToken, Message


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer of the large model as a whole.

    Args:
        text: Its text.
        ends: False where it was cut off.
        prompt_tokens: Tokens of the conversation, by the server's count; None if it gives none.
        seconds: The time of the call.
    """

    text: str
    ends: bool
    prompt_tokens: int | None
    seconds: float


def token_to_json(token: LargeToken) -> dict[str, Any]:
    """Return a token as in the file; the keys are part of the file format."""
    item: dict[str, Any] = {
        "token_ids": token.token_ids,
        "text": token.text,
        "is_eos": token.is_eos,
        "logprob": token.logprob,
        "top": token.top,
        "prompt_tokens": token.prompt_tokens,
        "cached_tokens": token.cached_tokens,
        "completion_tokens": token.completion_tokens,
        "uploaded_bytes": token.uploaded_bytes,
        "latency_s": token.latency_s,
        "large_ids": token.large_ids,
        "lost_s": token.lost_s,
    }
    if token.top_bytes:
        # Any byte is one character of Latin-1.
        item["top_bytes"] = [(data.decode("latin-1"), logprob) for data, logprob in token.top_bytes]
    if token.end_logprob is not None:
        item["end_logprob"] = token.end_logprob
    return item


def ids_key(token_ids: Sequence[int]) -> str:
    """Return the key of a sequence of token ids in files of records."""
    return hashlib.sha256(array("q", token_ids).tobytes()).hexdigest()[:32]


def whole_key(conversation: Sequence[Message], max_tokens: int) -> str:
    """Return the key of a whole answer in the file."""
    return hashlib.sha256(json.dumps([conversation, max_tokens]).encode()).hexdigest()[:32]


def keyed_record(item: Any) -> tuple[str, LargeToken | WholeAnswer]:
    """Return the key and the record of a row of the file."""
    record = _whole_from_json(item["whole"]) if "whole" in item else _token_from_json(item)
    return str(item["key"]), record


def _whole_from_json(item: dict[str, Any]) -> WholeAnswer:
    return WholeAnswer(
        text=item["text"],
        ends=item["ends"],
        prompt_tokens=item["prompt_tokens"],
        seconds=item["seconds"],
    )


def _token_from_json(item: dict[str, Any]) -> LargeToken:
    return LargeToken(
        token_ids=tuple(item["token_ids"]),
        text=item["text"],
        is_eos=item["is_eos"],
        logprob=item["logprob"],
        top=tuple((text, logprob) for text, logprob in item["top"]),
        prompt_tokens=item["prompt_tokens"],
        cached_tokens=item["cached_tokens"],
        completion_tokens=item["completion_tokens"],
        uploaded_bytes=item["uploaded_bytes"],
        latency_s=item["latency_s"],
        large_ids=tuple(item["large_ids"]),
        lost_s=item["lost_s"],
        # Files of earlier versions have neither.
        end_logprob=item.get("end_logprob"),
        top_bytes=tuple(
            (text.encode("latin-1"), logprob) for text, logprob in item.get("top_bytes", ())
        ),
    )
