"""The models that a server lists, and the name of the one that is used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from mlxroute.errors import LargeProtocolError, LargeRefused, UsageError
from mlxroute.large.dialects import Dialect
from mlxroute.large.dialects.json_fields import listed_items
from mlxroute.large.http.deadline import Deadline
from mlxroute.safe_text import printable_line
from mlxroute.types.limits import shown_value

if TYPE_CHECKING:
    from mlxroute.large.http.transport import Transport

_MAX_LISTED: Final = 8
_MAX_NAME_CHARACTERS: Final = 1000
UNNAMED: Final = "the server's own model"
"""Stands for the name of a model while that is not known."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An entry of `/v1/models`; `context_length` is in tokens, None if not reported."""

    name: str
    context_length: int | None


@dataclass(frozen=True, slots=True)
class ModelName:
    """The large model's name: the one the user gave, otherwise that of the only listed model."""

    given: str | None
    listed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise UsageError for a name that is not text."""
        if self.given is not None and not isinstance(self.given, str):
            raise UsageError(
                f"model must be the name of a model, not {shown_value(self.given)}",
                parameter="model",
            )

    @property
    def known(self) -> str | None:
        """The name, None if the user gave none and the server lists none or several."""
        if self.given is None and len(self.listed) == 1:
            return self.listed[0]
        return self.given

    @property
    def display(self) -> str:
        """The name for display; a placeholder while it is not known."""
        # Servers list a local model by its path, of which only the last part is of interest.
        name = self.known or UNNAMED
        if name.startswith("/"):
            name = PurePosixPath(name).name
        return printable_line(name, limit=100)

    @property
    def listed_instead(self) -> str | None:
        """What the server lists, in words, if the given name is not listed; else None."""
        name = self.given
        # Ollama lists `name:tag` for `name`, Google `models/name`.
        if name is None or {name, f"{name}:latest", f"models/{name}"} & {*self.listed}:
            return None
        return join_names(self.listed) if self.listed else None

    def for_records(self, base_url: str) -> str:
        """Return the name for files, in full; while it is not known, one of this address alone."""
        if self.known is not None:
            return self.known
        return f"{UNNAMED} {hashlib.sha256(base_url.encode()).hexdigest()[:16]}"

    def for_requests(self, dialect: Dialect) -> str | None:
        """Return the name to send in requests of this dialect, None to leave it out."""
        return self.known if dialect.names_model or self.given is not None else None


def list_served_models(transport: Transport, deadline: Deadline) -> tuple[ServedModel, ...]:
    """Return the models in `/v1/models` but those whose names hold the key; none without a list.

    Raises LargeError if the server cannot be reached.
    """
    try:
        items = _list_items(transport, deadline)
    except (LargeProtocolError, LargeRefused):
        return ()
    entries = [item for item in items if isinstance(item, dict)]
    return tuple(
        ServedModel(item["id"], _context_length(item))
        for item in entries
        if _is_name(item.get("id")) and not transport.has_secret(item["id"])
    )


def _list_items(transport: Transport, deadline: Deadline) -> Sequence[object]:
    def request() -> Sequence[object]:
        reply = transport.call("/models", deadline=deadline)
        if reply.status != 200:
            return ()
        return listed_items(reply.body)

    try:
        return request()
    except LargeProtocolError:
        # One bad reply does not show that there is no list.
        return request()


def join_names(names: Sequence[str]) -> str:
    """Return the first names as a list for a message, followed by the number of the others."""
    first = [printable_line(name, limit=80) for name in names[:_MAX_LISTED]]
    others = len(names) - len(first)
    return ", ".join(first) + (f" and {others} more" if others > 0 else "")


def _is_name(value: object) -> bool:
    """Return whether a value can be sent back as the name of a model."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME_CHARACTERS:
        return False
    return not any("\ud800" <= c <= "\udfff" for c in value)


def _context_length(item: Mapping[str, object]) -> int | None:
    meta = item.get("meta")
    values = [item.get("max_model_len"), item.get("context_length")]
    values += [meta.get("n_ctx")] if isinstance(meta, dict) else []
    return next((value for value in values if type(value) is int and value > 0), None)
