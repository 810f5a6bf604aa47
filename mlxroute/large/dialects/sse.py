"""Server-sent events: parsing and merging their JSON, also from an incomplete body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from mlxroute.large.dialects.json_fields import as_array, as_object, first_choice, parse_object

_DATA: Final = b"data:"
_FIELDS: Final = (_DATA, b":", b"event:", b"id:", b"retry:")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_DONE: Final = b"[DONE]"


def is_event_stream(body: bytes) -> bool:
    """Return whether a body consists of events: whether its first line is a field of one."""
    return body.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(_FIELDS)


def parse_events(body: bytes) -> list[dict[str, object]]:
    """Parse the events of a body up to its last complete line. Raises LargeProtocolError."""
    # Unlike that of a text, this `splitlines` knows the line ends of events alone.
    end = max(body.rfind(b"\n"), body.rfind(b"\r")) + 1
    lines = body[:end].removeprefix(_BYTE_ORDER_MARK).splitlines()
    values = [line.removeprefix(_DATA).strip() for line in lines if line.startswith(_DATA)]
    return [parse_object(value) for value in values if value and value != _DONE]


def merge_events(
    events: Sequence[Mapping[str, object]], *, lists: Sequence[str], texts: Sequence[str]
) -> dict[str, object]:
    """Merge events into one object.

    The values of the keys `lists` and `texts` are concatenated; any other key gets its last value
    that is not null.
    """
    merged: dict[str, object] = {}
    for event in events:
        merged |= {key: value for key, value in event.items() if value is not None}
    for key in lists:
        arrays = [as_array(event[key], what=key) for event in events if event.get(key) is not None]
        if arrays:
            merged[key] = [item for array in arrays for item in array]
    for key in texts:
        parts = (event.get(key) for event in events)
        merged[key] = "".join(part for part in parts if isinstance(part, str))
    return merged


def merge_choice_events(
    events: Sequence[Mapping[str, object]], *, lists: Sequence[str], logprobs: Sequence[str]
) -> dict[str, object]:
    """Merge the chunks of an OpenAI-style stream into one completion.

    `lists` are keys of arrays in the choice, `logprobs` keys of arrays in the choice's `logprobs`.
    """
    # The last chunk may hold the usage alone.
    choices = [first_choice(event) for event in events if event.get("choices")]
    choice = merge_events(choices, lists=lists, texts=["text"])
    chunks = [as_object(c["logprobs"], what="logprobs") for c in choices if c.get("logprobs")]
    if chunks:
        choice["logprobs"] = merge_events(chunks, lists=logprobs, texts=[])
    return merge_events(events, lists=[], texts=[]) | {"choices": [choice]}
