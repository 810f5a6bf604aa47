"""Replies that come as server-sent events: the JSON of each, out of a body that is still coming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from mlxroute.large.dialects.json_fields import first_choice, mapping, parse_object, sequence

_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"


def is_event_stream(body: bytes) -> bool:
    """Whether a body is made of events: a server that does not stream sends one JSON object."""
    return not body.lstrip().startswith((b"{", b"["))


def parse_events(body: bytes) -> list[dict[str, object]]:
    """The events of a body as far as their lines are whole. Raises LargeProtocolError."""
    lines = body[: body.rfind(b"\n") + 1].splitlines()
    values = [line.removeprefix(_DATA).strip() for line in lines if line.startswith(_DATA)]
    return [parse_object(value) for value in values if value != _DONE]


def merge_events(
    parts: Sequence[Mapping[str, object]], lists: Sequence[str], texts: Sequence[str]
) -> dict[str, object]:
    """One object of several: named lists and texts joined, else the last value given."""
    whole: dict[str, object] = {}
    for part in parts:
        whole |= {key: value for key, value in part.items() if value is not None}
    for key in lists:
        found = [part[key] for part in parts if part.get(key) is not None]
        if found:
            whole[key] = [item for each in found for item in sequence(each, what=key)]
    for key in texts:
        whole[key] = "".join(text for part in parts if isinstance(text := part.get(key), str))
    return whole


def merge_choice_events(
    parts: Sequence[Mapping[str, object]],
    lists: Sequence[str],
    logprobs: Sequence[str],
) -> dict[str, object]:
    """One OpenAI-style completion of the chunks of a stream, `logprobs` the lists below that."""
    # The last chunk may bring the counts alone.
    choices = [first_choice(part) for part in parts if part.get("choices")]
    whole = merge_events(choices, lists, ["text"])
    named = [mapping(each["logprobs"], what="logprobs") for each in choices if each.get("logprobs")]
    if named:
        whole["logprobs"] = merge_events(named, logprobs, [])
    return merge_events(parts, [], []) | {"choices": [whole]}
