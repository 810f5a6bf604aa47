"""Whose tokens the KV cache of a small model holds: those of the latest answer begun on it."""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

from mlxroute.engine.protocols import SmallProtocol
from mlxroute.errors import UsageError


class CacheClaim:
    """The claim of one answer to a small model's KV cache; an earlier answer's ends with `take`."""

    def take(self, small: SmallProtocol) -> None:
        """Make the small model's KV cache this answer's."""
        _CLAIMS[small] = self

    def holds(self, small: SmallProtocol) -> bool:
        """Return whether no other answer has taken the cache since."""
        return _CLAIMS.get(small) is self

    def check(self, small: SmallProtocol) -> None:
        """Raise UsageError if another answer has taken the cache."""
        if not self.holds(small):
            raise UsageError(
                "another answer was begun on this small model; iterate over one to its end before"
                " the next, or decode each on a small.with_own_cache()"
            )


# A claim must not refer to its small model, which could then never be freed.
_CLAIMS: Final[WeakKeyDictionary[SmallProtocol, CacheClaim]] = WeakKeyDictionary()
