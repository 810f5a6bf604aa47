"""The models a server says it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.errors import LargeProtocolError, LargeRefused
from mlxroute.large.dialects.json_fields import as_array, parse_object
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.transport import Transport
from mlxroute.safe_text import printable_line

_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An entry of `/v1/models`; the context length in tokens, where the server tells it."""

    name: str
    context_length: int | None


def served_models(transport: Transport, deadline: Deadline) -> tuple[ServedModel, ...]:
    """What `/v1/models` lists; nothing where the server does not tell. Raises LargeError."""
    try:
        reply = transport.call("/models", deadline=deadline)
        items = as_array(parse_object(reply.body).get("data"), what="data")
    except (LargeProtocolError, LargeRefused):
        return ()
    entries = [item for item in items if isinstance(item, dict)]
    return tuple(
        ServedModel(item["id"], _context_length(item))
        for item in entries
        if isinstance(item.get("id"), str) and item["id"]
    )


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few of them."""
    shown = [printable_line(name, limit=80) for name in names[:_SHOWN]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _context_length(item: Mapping[str, object]) -> int | None:
    meta = item.get("meta")
    found = [item.get("max_model_len"), item.get("context_length")]
    found += [meta.get("n_ctx")] if isinstance(meta, dict) else []
    return next((value for value in found if type(value) is int and value > 0), None)
