"""Several sequences decoded in one batch, one token per sequence and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlxroute.small.kv_cache import CacheCopy
from mlxroute.types import Signals


class Batch:
    """A batch of sequences of different lengths, over `mlx_lm`'s batched KV caches.

    Signals of a batched row round differently from those of a single row.

    Args:
        copies: The KV caches of the rows, one row each.
        compute_signals: Feeds tokens [B, 1] to cache layers and returns one `Signals` per row.
    """

    def __init__(
        self,
        copies: Sequence[CacheCopy],
        compute_signals: Callable[[mx.array, list[Any]], list[Signals]],
    ) -> None:
        self._compute_signals = compute_signals
        self._layers = [type(parts[0]).merge(parts) for parts in zip(*copies, strict=True)]
        self._row_count = len(copies)

    def step(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Feed one token per row; return the signals after each.

        Row i continues row `parents[i]` of the previous step.
        """
        if list(parents) != list(range(self._row_count)):
            for layer in self._layers:
                layer.filter(mx.array(list(parents)))
            self._row_count = len(parents)
        return self._compute_signals(mx.array(list(token_ids))[:, None], self._layers)
