"""The tokens of one answer on the device: one row in a KV cache of its own, or a row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxroute.errors import RollbackError
from mlxroute.small import SmallModel
from mlxroute.types import Signals

if TYPE_CHECKING:
    from mlxroute.small.kv_cache import CacheLayers
    from mlxroute.small.row_batch import BatchRow, RowBatch


class DecodedSequence:
    """A sequence that moves between a KV cache of its own and a batch.

    Only the thread that owns MLX may call the methods.

    Args:
        small: The small model with a KV cache that no other sequence uses.
        batch: The batch.
    """

    def __init__(self, small: SmallModel, batch: RowBatch) -> None:
        self.small = small
        self.batch_row: BatchRow | None = None
        self._decoder = small.decoder
        self._batch = batch
        # The ids of the batched row.
        self._ids: list[int] = []

    @property
    def ids(self) -> Sequence[int]:
        """The ids in the KV cache."""
        return self.small.cached_ids if self.batch_row is None else self._ids

    @property
    def layers(self) -> CacheLayers:
        """The layers of the KV cache of its own; empty while the sequence is in the batch."""
        return self._decoder.cache.layers

    @property
    def is_divisible(self) -> bool:
        """Whether the KV cache can be cut and copied at any token."""
        return self.batch_row is not None or self._decoder.cache.is_divisible

    def copy(self, count: int) -> tuple[CacheLayers, Sequence[int]]:
        """Return a KV cache of the first `count` tokens, and their ids; requires `is_divisible`."""
        ids = self.ids[:count]
        if self.batch_row is not None:
            return self._batch.copy(self.batch_row, count), ids
        return self._decoder.cache.share(count), ids

    def lose(self) -> None:
        """Forget the row, which the batch has lost."""
        self.batch_row = None
        self._ids = []

    def load(self, layers: CacheLayers, token_ids: Sequence[int]) -> None:
        """Replace the KV cache of its own by one that holds `token_ids`."""
        self._decoder.load_cache(layers, token_ids)

    def extend(self, token_ids: Sequence[int]) -> Signals:
        """Feed tokens as one row; return the signals after them."""
        self.leave_batch()
        return self.small.extend(token_ids)

    @property
    def fits_batch(self) -> bool:
        """Whether the batch has room for the sequence and its next token."""
        if self.batch_row is not None:
            return self._batch.has_room_for_token(self.batch_row)
        return self.is_divisible and self._batch.has_room(self.layers, len(self.ids) + 1)

    def enter_batch(self) -> bool:
        """Move into the batch if it has room; return whether the sequence is in it now."""
        if not self.fits_batch:
            return False
        if self.batch_row is None:
            layers, self._ids = self._decoder.take_cache()
            self.batch_row = self._batch.join(layers, len(self._ids), sampler=self._decoder.sampler)
        return True

    def leave_batch(self) -> None:
        """Move into the KV cache of its own; outside the batch do nothing."""
        if self.batch_row is not None:
            self._decoder.load_cache(self._batch.leave(self.batch_row), self._ids)
            self.batch_row = None

    def on_batch_step(self, token_id: int) -> None:
        """Record a token that a step of the batch fed."""
        self._ids.append(token_id)

    def rollback(self, count: int) -> None:
        """Remove the last `count` tokens. Raises RollbackError."""
        if self.batch_row is None:
            self.small.rollback(count)
        else:
            self._batch.trim(self.batch_row, count)
            del self._ids[len(self._ids) - count :]

    def release(self) -> tuple[CacheLayers, list[int]] | None:
        """Give up the KV cache; return it with its ids, or None if it cannot be used again."""
        try:
            self.leave_batch()
            self.small.select(0)
            return self._decoder.take_cache()
        except RollbackError:
            return None
