"""The field that asks a model not to think, for servers that refuse it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from mlxroute.errors import LargeRefused
from mlxroute.large.dialects.chat.request_fields import REFUSALS, RequestFields, Thinking

_T = TypeVar("_T")


class ThinkingSwitch:
    """Whether one server refuses the field that asks not to think, learned from its refusals."""

    def __init__(self) -> None:
        self._server: object = None
        self._is_refused = False

    def send(
        self, fields: RequestFields, send: Callable[[RequestFields], _T], *, server: object
    ) -> _T:
        """Send a request with these fields; if the server refuses the field, without it.

        So are all later requests, until `server` is another object. Raises what `send` raises.
        """
        if server is not self._server:
            self._server, self._is_refused = server, False
        without = replace(fields, thinking=Thinking.UNSET)
        if self._is_refused:
            return send(without)
        try:
            return send(fields)
        except LargeRefused as exc:
            if exc.status not in REFUSALS or not fields.thinking.is_named_in(str(exc)):
                raise
        reply = send(without)
        self._is_refused = True
        return reply
