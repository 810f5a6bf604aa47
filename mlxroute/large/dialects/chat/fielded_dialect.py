"""The base class of dialects whose requests have optional fields."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Final, Self

from mlxroute.large.dialects.base import Dialect, RequestOptions
from mlxroute.large.dialects.chat.request_fields import RequestFields

_WITH: Final = " with "


class FieldedDialect(Dialect):
    """A dialect that can do without some fields of its requests, or name them differently.

    A subclass sets `plain_name`, the name of the dialect with the usual fields, and those of the
    other attributes whose default does not fit.
    """

    plain_name: str

    needs_greedy: bool = True
    """Whether the dialect is useless where tokens are sampled."""

    reads_logprobs: bool = True
    """Whether requests ask for logprobs if the server takes the fields."""

    needs_logprobs: bool = True
    """Whether a dialect that reads logprobs is useless without them."""

    own_names: frozenset[str] = frozenset()
    """Names of further fields, which the dialect cannot do without."""

    fields: RequestFields = RequestFields()

    def lacks(self, fields: RequestFields) -> str:
        """Return what the dialect needs and these fields do not ask for; empty if nothing."""
        if self.needs_greedy and not fields.temperature:
            return "a temperature of 0"
        if self.reads_logprobs and self.needs_logprobs and not fields.logprobs:
            return "logprobs"
        return ""

    def with_fields(self, fields: RequestFields) -> Self:
        """Return the dialect with these fields."""
        dialect = copy.copy(self)
        dialect.fields = fields if self.reads_logprobs else replace(fields, logprobs=True)
        description = dialect.fields.describe()
        dialect.name = self.plain_name + (_WITH + description if description else "")
        return dialect

    def request_fields(self, options: RequestOptions) -> dict[str, object]:
        """Return the optional fields of a request."""
        return self.fields.body(options, logprobs=self.reads_logprobs)

    def named(self, name: str) -> Self | None:
        """Return the dialect with the fields of which `name` tells; None for another's name."""
        plain_name, _, description = name.partition(_WITH)
        fields = RequestFields.parse(description)
        if plain_name != self.plain_name or fields is None or self.lacks(fields):
            return None
        dialect = self.with_fields(fields)
        return dialect if dialect.name == name else None
