"""Several sequences decoded together, a token each a step, over mlx_lm's batched KV caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlxroute.small.kv_cache import CacheCopy
from mlxroute.types import Signals

if TYPE_CHECKING:
    import mlx.core as mx


class Batch:
    """Rows of different lengths; they round differently from a row alone.

    `read` gives the signals behind tokens [B, 1] that the layers given with them take in.
    """

    def __init__(
        self, held: Sequence[CacheCopy], read: Callable[[mx.array, list[Any]], list[Signals]]
    ) -> None:
        self._read = read
        self._layers = [type(parts[0]).merge(parts) for parts in zip(*held, strict=True)]
        self._rows = len(held)

    def step(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Feed one token to each row, row i continuing what row `parents[i]` held before."""
        import mlx.core as mx

        if list(parents) != list(range(self._rows)):
            for layer in self._layers:
                layer.filter(mx.array(list(parents)))
            self._rows = len(parents)
        return self._read(mx.array(list(token_ids))[:, None], self._layers)
