"""Large tokens that came before they were asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mlxroute.types import LargeToken

_REMEMBERED = 8


@dataclass(frozen=True, slots=True)
class _Run:
    """The large model's tokens after these ids of the answer."""

    before: tuple[int, ...]
    tokens: tuple[LargeToken, ...]

    def after(self, ids: Sequence[int]) -> LargeToken | None:
        """The token after `ids`, where these follow the run to the end of one of its tokens."""
        at = len(self.before)
        if tuple(ids[:at]) != self.before:
            return None
        for token in self.tokens:
            if at == len(ids):
                return token
            end = at + len(token.token_ids)
            if tuple(ids[at:end]) != token.token_ids:
                break
            at = end
        return None


class Prefetched:
    """Answers later positions as calls for them would, while the answer follows the large model."""

    def __init__(self) -> None:
        self._runs: deque[_Run] = deque(maxlen=_REMEMBERED)
        self.generated = 0

    def add(self, ids: Sequence[int], tokens: Sequence[LargeToken]) -> None:
        """A call after `ids` brought these tokens, the first of them the one it was made for."""
        if len(tokens) > 1:
            self.generated += len(tokens) - 1
            first, *others = tokens
            self._runs.appendleft(_Run((*ids, *first.token_ids), tuple(others)))

    def find(self, ids: Sequence[int]) -> LargeToken | None:
        """The large model's token after these ids of the answer, if it is known."""
        found = (run.after(ids) for run in self._runs)
        return next((token for token in found if token is not None), None)
