"""Checks of values in the JSON of replies: token ids, logprobs, counts, error texts.

Replies are not trusted: the functions `as_...` raise LargeProtocolError for a wrong value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple, TypedDict

from mlxroute.errors import LargeNotContinued, LargeProtocolError, LargeUnreadable
from mlxroute.large.reply import ReplyPosition, ReplyToken
from mlxroute.safe_text import printable_line
from mlxroute.untrusted_text import MalformedText, decode_text, parse_json

# Rounding in the server's softmax can lift the logprob of a certain token this far above 0.
_LOGPROB_SLACK: Final = 1e-3
_MAX_TOKEN_ID: Final = 1 << 31
_MAX_ITEMS: Final = 8
# Together and TGI have names of their own for the end of an answer.
_ENDS: Final = ("stop", "eos", "eos_token")
_MAX_REASON_CHARACTERS: Final = 40


def parse_object(body: bytes) -> dict[str, object]:
    """Parse the JSON object in a reply's body. Raises LargeUnreadable."""
    value = _parse_reply(body)
    if not isinstance(value, dict):
        raise LargeUnreadable("the reply is not a JSON object")
    return value


def listed_items(body: bytes) -> Sequence[object]:
    """Return the entries of a list of models: `data`, or all of Together's array.

    Raises LargeProtocolError.
    """
    value = _parse_reply(body)
    return as_array(value.get("data") if isinstance(value, dict) else value, what="data")


def json_items(value: object) -> Iterator[object]:
    """Yield a JSON value and everything in it, keys included, in the order of the text."""
    pending = [value]
    while pending:
        item = pending.pop()
        yield item
        if isinstance(item, list):
            pending += reversed(item)
        elif isinstance(item, dict):
            pending += reversed([part for pair in item.items() for part in pair])


def error_message(body: bytes) -> str:
    """Return the message of an error reply in any of the usual shapes; empty if it has none."""
    try:
        value = _parse(body)
    except MalformedText:
        text = body[:2000].decode("utf-8", errors="replace").strip()
        return "" if text.startswith("<") else text
    if isinstance(value, list) and value:
        # Google's form.
        value = value[0]
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    return _message_of(value)


def _parse_reply(body: bytes) -> object:
    try:
        return _parse(body)
    except MalformedText as exc:
        raise LargeUnreadable("the reply is not JSON") from exc


def _parse(body: bytes) -> object:
    # Two alternatives of a position may have the same text, and so the same key.
    return parse_json(decode_text(body), strict=False, unique_keys=False)


class ReportedError(NamedTuple):
    """An error that a reply with status 200 reports: its message, and the status that it names.

    The status is 200 if it names none.
    """

    message: str
    status: int


def reported_error(reply: Mapping[str, object]) -> ReportedError | None:
    """Return the error that a reply with status 200, or its first choice, reports; else None."""
    code = reply.get("code")
    is_error_code = type(code) is int and code >= 400
    is_named = reply.get("error") or reply.get("errors") or reply.get("object") == "error"
    if is_named or reply.get("success") is False or is_error_code:
        return _read_error(reply)
    match reply.get("choices"):
        # OpenRouter's form, where a provider fails in the middle of an answer.
        case [dict(choice), *_] if choice.get("error") or choice.get("finish_reason") == "error":
            return _read_error(choice)
    return None


def _read_error(part: Mapping[str, object]) -> ReportedError:
    status = 200
    match part:
        case {"error": {"code": int(code)}} | {"code": int(code)} if 400 <= code < 600:
            status = code
    return ReportedError(_message_of(part) or "an error without a message", status)


def _message_of(value: Mapping[str, object]) -> str:
    for key in ("error", "errors", "message", "msg", "detail"):
        match value.get(key):
            # A proxy's message about the message of the server behind it.
            case {"metadata": {"raw": str(raw)}} if raw:
                return error_message(raw.encode("utf-8", errors="replace"))
            case {"message": str(message)} | str(message) if message:
                return _unfolded(message)
            case {"detail": [_, *_] as items}:
                return _message_of_items(items)
            case [_, *_] as items:
                return _message_of_items(items)
    return ""


def _unfolded(message: str) -> str:
    """Return the message inside a message that is itself the JSON of an error."""
    if not message.startswith("{"):
        return message
    return error_message(message.encode("utf-8", errors="replace")) or message


def _message_of_items(items: Sequence[object]) -> str:
    """Return the messages of a list; one about a field begins with the name of the field."""
    messages = []
    for item in items[:_MAX_ITEMS]:
        match item:
            case {"loc": [*_, str(name)], "msg": str(message)}:
                messages.append(f"{name}: {message}")
            case {"msg": str(message)} | {"message": str(message)} | str(message):
                messages.append(message)
    return "; ".join(messages)


def first_choice(reply: Mapping[str, object]) -> Mapping[str, object]:
    """Return the first element of `choices`."""
    choices = as_array(reply.get("choices"), what="choices")
    if not choices:
        raise LargeProtocolError("the reply has no choices")
    return as_object(choices[0], what="choices[0]")


def ends_answer(choice: Mapping[str, object], *, text: str) -> bool:
    """Return whether a choice was finished by the end of the answer.

    `text` is what it adds to the answer. Raises LargeNotContinued where that is nothing, for a
    reason that more tokens do not help against, such as a filter of contents.
    """
    reason = choice.get("finish_reason")
    if reason in _ENDS:
        return True
    if not text and reason not in (None, "", "length"):
        shown = printable_line(str(reason), limit=_MAX_REASON_CHARACTERS)
        raise LargeNotContinued(f"the reply has no text (finish reason: {shown})")
    return False


class Counts(TypedDict):
    """The token counts of a Completion, None where the reply has none.

    The tokens of thoughts are a part of `completion_tokens`.
    """

    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None


def usage_counts(reply: Mapping[str, object]) -> Counts:
    """Return the token counts of an OpenAI-style `usage`."""
    usage = _object_in(reply, "usage")
    # Two names of providers follow the usual one.
    cached = [
        _object_in(usage, "prompt_tokens_details").get("cached_tokens"),
        usage.get("prompt_cache_hit_tokens"),
        usage.get("num_cached_tokens"),
    ]
    counts = checked_counts(
        usage.get("prompt_tokens"),
        next((count for count in cached if count is not None), None),
        usage.get("completion_tokens"),
    )
    if counts["completion_tokens"] is not None:
        counts["completion_tokens"] += _hidden_tokens(usage)
    return counts


def thought_tokens(reply: Mapping[str, object]) -> int:
    """Return how many tokens of thoughts an OpenAI-style `usage` reports; 0 if it reports none."""
    usage = _object_in(reply, "usage")
    details = _object_in(usage, "completion_tokens_details")
    reported = _checked_count(details.get("reasoning_tokens"))
    return _hidden_tokens(usage) if reported is None else reported


def _hidden_tokens(usage: Mapping[str, object]) -> int:
    """Return the tokens that only the total counts, as some providers count thoughts."""
    prompt = _checked_count(usage.get("prompt_tokens"))
    completion = _checked_count(usage.get("completion_tokens"))
    total = _checked_count(usage.get("total_tokens"))
    if prompt is None or completion is None or total is None:
        return 0
    return max(0, total - prompt - completion)


def _object_in(value: Mapping[str, object], key: str) -> Mapping[str, object]:
    """Return the object at a key; an empty one where there is none."""
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def checked_counts(prompt: object, cached: object, completion: object) -> Counts:
    """Return the counts of a reply; None for a value that is not a count.

    No more tokens count as cached than the prompt has.
    """
    prompt_count, cached_count = _checked_count(prompt), _checked_count(cached)
    if prompt_count is not None and cached_count is not None:
        cached_count = min(cached_count, prompt_count)
    return Counts(
        prompt_tokens=prompt_count,
        cached_tokens=cached_count,
        completion_tokens=_checked_count(completion),
    )


def _checked_count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MAX_TOKEN_ID else None


def as_object(value: object, *, what: str) -> dict[str, object]:
    """Return `value` if it is a JSON object; `what` names it in the error."""
    if not isinstance(value, dict):
        raise LargeProtocolError(f"{what} is not a JSON object")
    return value


def as_array(value: object, *, what: str) -> Sequence[object]:
    """Return `value` if it is a JSON array."""
    if not isinstance(value, list):
        raise LargeProtocolError(f"{what} is not a JSON array")
    return value


def as_text(value: object, *, what: str) -> str:
    """Return `value` if it is a string that UTF-8 can encode (JSON can spell lone surrogates)."""
    if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
        raise LargeProtocolError(f"{what} is not a valid string")
    return value


def as_token_id(value: object) -> int:
    """Return `value` if it is a token id."""
    if type(value) is not int or not 0 <= value < _MAX_TOKEN_ID:
        raise LargeProtocolError("a token id must be a non-negative integer")
    return value


def as_logprob(value: object) -> float:
    """Return `value` if it is a logprob in nats; -inf is one, NaN is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LargeProtocolError("a logprob is not a number")
    try:
        number = float(value)
    except OverflowError as exc:
        raise LargeProtocolError("a logprob is too large a number") from exc
    if math.isnan(number) or number > _LOGPROB_SLACK:
        raise LargeProtocolError(f"a logprob of {number} is not the logarithm of a probability")
    return min(0.0, number)


def as_chosen_logprob(value: object) -> float | None:
    """Return the logprob of a generated token, None where the server gives none.

    Raises LargeProtocolError for -inf: a token that was generated had a probability above 0.
    """
    if value is None:
        return None
    number = as_logprob(value)
    if number == -math.inf:
        raise LargeProtocolError("a generated token has probability 0")
    return number


def as_bytes(value: object) -> bytes:
    """Return `value`, an array of numbers, as the bytes of a token."""
    data = bytearray()
    for byte in as_array(value, what="bytes"):
        if type(byte) is not int or not 0 <= byte <= 255:
            raise LargeProtocolError("a token's bytes must be numbers from 0 to 255")
        data.append(byte)
    return bytes(data)


def sort_by_logprob(tokens: Sequence[ReplyToken]) -> tuple[ReplyToken, ...]:
    """Sort tokens by falling logprob, ties by rising id, as greedy samplers break them."""
    return tuple(sorted(tokens, key=lambda t: (-(t.logprob or 0.0), t.token_id or 0)))


def parse_chat_token(item: Mapping[str, object]) -> ReplyToken:
    """Read a token in the shape of chat logprobs: its text, and id and bytes where given."""
    token_id = item.get("id", item.get("token_id"))
    data = item.get("bytes")
    return ReplyToken(
        token_id=None if token_id is None else as_token_id(token_id),
        data=None if data is None else as_bytes(data),
        text=as_text(item.get("token"), what="a token's text"),
        logprob=as_logprob(item.get("logprob")),
    )


def parse_chat_position(value: object) -> ReplyPosition:
    """Read a generated position in the shape of chat logprobs, with its alternatives."""
    item = as_object(value, what="a token")
    token = parse_chat_token(item)
    as_chosen_logprob(token.logprob)
    top = as_array(item.get("top_logprobs") or [], what="top_logprobs")
    objects = [as_object(other, what="an alternative") for other in top]
    # Ids that only pad the vocabulary have no text.
    alternatives = [parse_chat_token(other) for other in objects if other.get("token") is not None]
    return ReplyPosition(token, sort_by_logprob(alternatives))


def parse_chat_positions(choice: Mapping[str, object]) -> list[ReplyPosition]:
    """Read the chat logprobs of a choice; the list is empty if it has none."""
    logprobs = choice.get("logprobs")
    logprobs = {} if logprobs is None else as_object(logprobs, what="logprobs")
    content = as_array(logprobs.get("content") or [], what="logprobs.content")
    return [parse_chat_position(item) for item in content]


def mark_end(positions: Sequence[ReplyPosition]) -> tuple[ReplyPosition, ...]:
    """Return the positions with the last one marked as the end of the answer."""
    return (*positions[:-1], replace(positions[-1], ends=True))
