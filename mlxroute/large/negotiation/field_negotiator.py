"""Negotiation of the optional fields of chat requests, by the refusals of one server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, TypeVar

from mlxroute.errors import LargeRefused
from mlxroute.large.dialects import FieldedDialect
from mlxroute.large.dialects.chat.chat_reply import ModelThinks
from mlxroute.large.dialects.chat.request_fields import (
    MAX_GENERATED_PER_TOKEN,
    REFUSALS,
    FieldSearch,
)
from mlxroute.large.negotiation.rejection import DialectRejected, RejectionKind

_TOO_MUCH_THINKING: Final = (
    "the model thinks before it answers: a token costs more than"
    f" {MAX_GENERATED_PER_TOKEN} generated tokens, even with the least effort that the server takes"
)

_D = TypeVar("_D", bound=FieldedDialect)


class FieldNegotiator:
    """The fields that one server takes, as far as its replies have shown."""

    def __init__(self) -> None:
        self._search = FieldSearch()

    def applied_to(self, dialect: _D) -> _D:
        """Return the dialect with the fields known so far. Raises DialectRejected."""
        fields = self._search.fields
        if missing := dialect.lacks(fields):
            kind = RejectionKind.OTHER if fields.logprobs else RejectionKind.NO_LOGPROBS
            raise DialectRejected(f"the server refuses {missing}", kind=kind)
        return dialect.with_fields(fields)

    def changed_for(self, dialect: _D, rejected: DialectRejected) -> _D:
        """Return a rejected dialect with other fields if it may work with them.

        Raises the rejection again if not, or a DialectRejected with a clearer reason.
        """
        causes = list(_explicit_causes(rejected))
        if any(isinstance(cause, ModelThinks) for cause in causes):
            fields = self._search.after_thinking()
        elif refusal := next((str(c) for c in causes if _is_refusal(c)), ""):
            if any(re.search(rf"\b{name}\b", refusal) for name in dialect.own_names):
                raise rejected
            fields = self._search.after_refusal(refusal)
        else:
            raise rejected
        if fields is None and self._search.thinks:
            raise DialectRejected(_TOO_MUCH_THINKING, kind=RejectionKind.THINKS)
        if fields is None or dialect.lacks(fields):
            raise rejected
        return dialect.with_fields(fields)


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, LargeRefused) and error.status in REFUSALS


def _explicit_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors that `raise ... from` names, and none that was only being handled."""
    cause = error.__cause__
    while cause is not None:
        yield cause
        cause = cause.__cause__
