"""The names of control tokens that one client has sent as plain text."""

from __future__ import annotations

from collections.abc import Iterable


class NeutralisedNames:
    """Names of control tokens that were sent with a space in them, for all calls of a client.

    The server would have read them as control tokens.
    """

    def __init__(self) -> None:
        # A dict keeps the order, and each name once.
        self._names: dict[str, None] = {}

    def add(self, names: Iterable[str]) -> None:
        """Add the names that one text or prompt had."""
        self._names |= dict.fromkeys(names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, each once, in the order in which they were sent first."""
        return tuple(self._names)
