"""What completions look like on the wire: checked values out of untrusted JSON; no I/O."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

from mlxroute.errors import LargeProtocolError
from mlxroute.large.reply import ReplyPosition, ReplyToken

# Rounding in the server's softmax may lift a certain token's logprob this far above 0.
_LOGPROB_SLACK = 1e-3
_MAX_TOKEN_ID = 1 << 31


def parse_object(body: bytes) -> dict[str, object]:
    """A JSON object from a reply's body. Raises LargeProtocolError."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise LargeProtocolError("the reply is not JSON") from exc
    return mapping(value, what="the reply")


def error_message(body: bytes) -> str:
    """What an error reply says, from the shapes servers use; empty when it says nothing."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        text = body[:2000].decode("utf-8", errors="replace").strip()
        return "" if text.startswith("<") else text
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    return _message_of(value)


def reported_error(reply: Mapping[str, object]) -> str | None:
    """The message of an error reported in a reply whose status claims success."""
    if reply.get("error") or reply.get("object") == "error":
        return _message_of(reply) or "an error without a message"
    return None


def _message_of(value: Mapping[str, object]) -> str:
    for key in ("error", "message", "detail"):
        match value.get(key):
            case {"message": str(message)} | str(message) if message:
                return message
            case [{"msg": str(message)}, *_]:
                return message
    return ""


def first_choice(reply: Mapping[str, object]) -> Mapping[str, object]:
    """The first element of `choices`."""
    choices = sequence(reply.get("choices"), what="choices")
    if not choices:
        raise LargeProtocolError("the reply has no choices")
    return mapping(choices[0], what="choices[0]")


class Counts(TypedDict):
    """The counts of a Completion."""

    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None


def counts(reply: Mapping[str, object]) -> Counts:
    """Prompt, cached and completion tokens from an OpenAI-style `usage`."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        usage = {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return counted(
        usage.get("prompt_tokens"),
        # DeepSeek's own name for it.
        usage.get("prompt_cache_hit_tokens") if cached is None else cached,
        usage.get("completion_tokens"),
    )


def counted(prompt: object, cached: object, completion: object) -> Counts:
    """Three counts of a reply, None for what is no count."""
    return Counts(
        prompt_tokens=_count(prompt),
        cached_tokens=_count(cached),
        completion_tokens=_count(completion),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MAX_TOKEN_ID else None


def mapping(value: object, *, what: str) -> dict[str, object]:
    """`value` as a JSON object."""
    if not isinstance(value, dict):
        raise LargeProtocolError(f"{what} is not a JSON object")
    return value


def sequence(value: object, *, what: str) -> Sequence[object]:
    """`value` as a JSON array."""
    if not isinstance(value, list):
        raise LargeProtocolError(f"{what} is not a JSON array")
    return value


def string(value: object, *, what: str) -> str:
    """`value` as a string that has a UTF-8 form (JSON can spell lone surrogates)."""
    if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
        raise LargeProtocolError(f"{what} is not a string of characters")
    return value


def token_id(value: object) -> int:
    """`value` as a token id."""
    if type(value) is not int or not 0 <= value < _MAX_TOKEN_ID:
        raise LargeProtocolError("a token id is not a number from 0")
    return value


def logprob(value: object) -> float:
    """`value` as a natural-log probability; -inf is one, NaN and positive values are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LargeProtocolError("a logprob is not a number")
    try:
        number = float(value)
    except OverflowError as exc:
        raise LargeProtocolError("a logprob is a number without bounds") from exc
    if math.isnan(number) or number > _LOGPROB_SLACK:
        raise LargeProtocolError(f"a logprob is {number}, which is no probability")
    return min(0.0, number)


def by_logprob(tokens: Sequence[ReplyToken]) -> tuple[ReplyToken, ...]:
    """Tokens by falling logprob, equal ones by rising id, as a greedy sampler picks them."""
    return tuple(sorted(tokens, key=lambda t: (-(t.logprob or 0.0), t.token_id or 0)))


def given_logprob(value: object) -> float | None:
    """The logprob of a generated token, None where the server gives none.

    Raises LargeProtocolError for -inf: what was generated had a probability.
    """
    if value is None:
        return None
    number = logprob(value)
    if number == -math.inf:
        raise LargeProtocolError("a token comes without its probability")
    return number


def octets(value: object) -> bytes:
    """`value` as the bytes of a token."""
    data = bytearray()
    for octet in sequence(value, what="bytes"):
        if type(octet) is not int or not 0 <= octet <= 255:
            raise LargeProtocolError("a token's bytes are not numbers from 0 to 255")
        data.append(octet)
    return bytes(data)


def named_token(item: Mapping[str, object]) -> ReplyToken:
    """A token in the shape of chat logprobs: text, and where given id and bytes."""
    identity = item.get("id", item.get("token_id"))
    data = item.get("bytes")
    return ReplyToken(
        token_id=None if identity is None else token_id(identity),
        data=None if data is None else octets(data),
        text=string(item.get("token"), what="a token's text"),
        logprob=logprob(item.get("logprob")),
    )


def named_entry(value: object) -> ReplyPosition:
    """A generated position in the shape of chat logprobs, with its alternatives."""
    item = mapping(value, what="a token")
    token = named_token(item)
    given_logprob(token.logprob)
    top = sequence(item.get("top_logprobs") or [], what="top_logprobs")
    others = [named_token(mapping(other, what="an alternative")) for other in top]
    return ReplyPosition(token, by_logprob(others))


def ended(entries: Sequence[ReplyPosition]) -> tuple[ReplyPosition, ...]:
    """The same positions, the last of them marked as the answer's end."""
    return (*entries[:-1], replace(entries[-1], ends=True))
