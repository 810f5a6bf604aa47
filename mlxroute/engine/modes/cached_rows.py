"""What the small model's cache holds of an answer: one row, or the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from mlxroute.engine.modes.decode_context import Desk
from mlxroute.types import Signals


class Cached:
    """Feeds the small model, and knows which tokens of the answer it was fed.

    All rows of a batch share a beginning and have one length.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._ids: list[int] = []
        # What the rows of a batch have behind that.
        self._tails: list[list[int]] = []
        # How many tokens were computed as a row alone computes them.
        self._exact = 0

    def __len__(self) -> int:
        return len(self._ids) + (len(self._tails[0]) if self._tails else 0)

    @property
    def is_batch(self) -> bool:
        """Whether there are rows of a batch."""
        return bool(self._tails)

    @property
    def is_exact(self) -> bool:
        """Whether all of it is what a row alone would have computed."""
        return not self._tails and self._exact == len(self._ids)

    def feed(self, ids: Sequence[int], bounds: Sequence[int], *, exactly: bool) -> Signals:
        """Feed a row alone, from where the cache holds it; return the signals behind it.

        Decisions begin at `bounds`, and are fed whole, as they are where nothing is taken back.
        With `exactly` what batches computed is computed again.
        """
        held = min(len(self._ids), self._exact) if exactly else len(self._ids)
        self._cut(next(at for at in reversed(bounds) if at <= held))
        for end in [*(at for at in bounds if at > len(self._ids)), len(ids)]:
            signals = self._desk.extend(ids[len(self._ids) : end])
            if self._exact == len(self._ids):
                self._exact = end
            self._ids += ids[len(self._ids) : end]
        return signals

    def feed_batch(self, parents: Sequence[int], ids: Sequence[int]) -> list[Signals]:
        """Feed one token a row, row i continuing row `parents[i]`."""
        signals = self._desk.small.branch(parents, ids)
        tails = self._tails or [[]]
        self._tails = [[*tails[row], each] for row, each in zip(parents, ids, strict=True)]
        return signals

    def collapse(self, ids: Sequence[int]) -> None:
        """End the batch, with the row that has most of `ids`; drop what differs from them."""
        if self._tails:
            rest = ids[len(self._ids) :]
            best = max(range(len(self._tails)), key=lambda row: _same(self._tails[row], rest))
            self._desk.small.select(best)
            self._ids += self._tails[best]
            self._tails = []
        self._cut(_same(self._ids, ids))

    def leave(self, ids: Sequence[int], *, last: int) -> None:
        """Hold a finished answer but for its last token; its last decision begins at `last`."""
        self.collapse(ids[:-1])
        # An answer that was complete may have made room for another row.
        if len(self._ids) < last:
            self._desk.small.extend(ids[len(self._ids) : last])

    def _cut(self, length: int) -> None:
        if len(self._ids) > length:
            self._desk.small.rollback(len(self._ids) - length)
            del self._ids[length:]
            self._exact = min(self._exact, length)


def _same(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    for index, (a, b) in enumerate(zip(held, wanted, strict=False)):
        if a != b:
            return index
    return min(len(held), len(wanted))
