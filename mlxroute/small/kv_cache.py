"""The KV cache and the ids it was computed from: one owner for every trim and every batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from mlxroute.errors import RollbackError, UsageError
from mlxroute.sequences import common_prefix_length

CacheLayers = list[Any]
"""KV cache layers, one for each layer of the model.

Functions named copy or share return layers that later steps do not change.
"""

CLEAR_CACHE_EVERY = 256
"""Unused buffers of MLX are freed after so many steps, as in `mlx_lm`."""

_MAX_ROWS = 8
# Maximum memory of all rows of a batch.
_BATCH_BYTES = 1 << 30
_NOT_ONE_SEQUENCE = "the KV cache holds a batch or a queued token; select a row or roll back first"
_INTERRUPTED = "a step was interrupted, so the KV cache is unusable; prefill a prompt first"


class SequenceCache:
    """The KV cache of one sequence, or of a batch that continues it, with its token ids.

    `token_ids` are the ids in the layers, with two exceptions: the layers may also hold one queued
    token (see `record_queued_pass`), and after an interrupt inside a change they may differ, until
    the next prompt resets them. In a batch each row holds `token_ids` followed by its own
    entry of `batch_tails`; all tails have the same length.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self._is_consistent = False
        self.layers: CacheLayers = make_prompt_cache(self._model)
        self.token_ids: list[int] = []
        self.batch_tails: list[list[int]] = []
        self._has_queued = False
        # False during a change, and after one that was interrupted.
        self._is_consistent = True

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Make the cache inconsistent in the `with` block, and until `reset` on an interrupt."""
        was_consistent, self._is_consistent = self._is_consistent, False
        yield
        self._is_consistent = was_consistent

    @property
    def is_divisible(self) -> bool:
        """Whether there is one sequence, any leading part of which is a KV cache of its own."""
        return self._is_consistent and not self.batch_tails and is_plain(self.layers)

    @property
    def is_recurrent(self) -> bool:
        """Whether all layers have states of a fixed size, however many tokens they have read."""
        return all(isinstance(layer, ArraysCache) for layer in self.layers)

    def share(self, count: int) -> CacheLayers:
        """Return caches of the first `count` tokens, at no cost; requires `is_divisible`."""
        return share(self.layers, count)

    def take(self) -> tuple[CacheLayers, list[int]]:
        """Give the layers and their ids away and become empty.

        Raises RollbackError while there is a batch, and after an interrupt.
        """
        if not self._is_consistent:
            raise RollbackError(_INTERRUPTED)
        if self._has_queued or self.batch_tails:
            raise RollbackError(_NOT_ONE_SEQUENCE)
        layers, token_ids = self.layers, self.token_ids
        self.reset()
        return layers, token_ids

    def load(self, layers: CacheLayers, token_ids: Sequence[int]) -> None:
        """Become the owner of layers that hold `token_ids`."""
        self.reset()
        with self._change():
            self.layers = layers
            self.token_ids = list(token_ids)

    @contextmanager
    def record_pass(self, token_ids: Sequence[int]) -> Iterator[None]:
        """Record `token_ids` as cached once the forward pass in the `with` block has been built.

        Evaluation may come later. An interrupt in the block makes the cache inconsistent.
        """
        with self._change():
            yield
            self.token_ids.extend(token_ids)

    @contextmanager
    def record_batch_pass(self, parents: Sequence[int], token_ids: Sequence[int]) -> Iterator[None]:
        """Make row i a copy of row `parents[i]`; after the block record one token per row."""
        with self._change():
            rows = max(1, len(self.batch_tails))
            if list(parents) != list(range(rows)):
                self._take_rows(parents)
            yield
            tails = self.batch_tails or [[]]
            self.batch_tails = [
                [*tails[row], token_id] for row, token_id in zip(parents, token_ids, strict=True)
            ]

    @contextmanager
    def record_queued_pass(self) -> Iterator[None]:
        """Record the pass in the `with` block as one queued token, to confirm or discard."""
        with self._change():
            yield
            self._has_queued = True

    def confirm_queued(self, token_id: int) -> None:
        """Make the queued token part of the sequence; `token_id` is its id."""
        with self._change():
            self._has_queued = False
            self.token_ids.append(token_id)

    def discard_queued(self) -> None:
        """Remove the queued token from the layers, if there is one."""
        if self._has_queued and self._is_consistent:
            with self._change():
                self._trim(1)
                self._has_queued = False

    def select(self, row: int) -> None:
        """End the batch and continue with one of its rows; without a batch do nothing."""
        if not self.batch_tails:
            return
        if not self._is_consistent:
            raise RollbackError(_INTERRUPTED)
        with self._change():
            if len(self.batch_tails) > 1:
                self._take_rows([row])
            self.token_ids += self.batch_tails[row]
            self.batch_tails = []

    def _take_rows(self, rows: Sequence[int]) -> None:
        index = mx.array(list(rows))
        for layer in self.layers:
            for name in ("keys", "values"):
                values = getattr(layer, name)
                if values is not None:
                    setattr(layer, name, tree_map(lambda part: part[index], values))

    @property
    def max_rows(self) -> int:
        """The largest batch that fits the memory for batches; 1 where layers cannot be batched."""
        if not self.is_trimmable or not all(_has_rows(layer) for layer in self.layers):
            return 1
        size: int = sum(layer.nbytes for layer in self.layers) // max(1, len(self.batch_tails))
        return max(1, min(_MAX_ROWS, _BATCH_BYTES // max(1, size)))

    def copy(self, count: int) -> CacheLayers:
        """Return copies of the layers with their first `count` tokens, fit for a batch.

        Raises UsageError for caches that cannot be batched or cut there, RollbackError where the
        layers do not hold `count` tokens of one sequence.
        """
        if not self._is_consistent:
            raise RollbackError(_INTERRUPTED)
        if self._has_queued or self.batch_tails:
            raise RollbackError(_NOT_ONE_SEQUENCE)
        if not 0 < count <= len(self.token_ids):
            raise RollbackError(f"cannot copy {count} of {len(self.token_ids)} cached tokens")
        is_part = count < len(self.token_ids)
        copies = [_copy_part(x, count) if is_part else _copy_whole(x) for x in self.layers]
        mx.eval([layer.state for layer in copies])
        return copies

    @property
    def can_queue(self) -> bool:
        """Whether a token fed next could be removed again."""
        return self.can_rollback(1)

    def can_rollback(self, count: int) -> bool:
        """Return whether `count` tokens fed next could be removed again."""
        return self.is_trimmable and all(_has_room(layer, count) for layer in self.layers)

    @property
    def is_trimmable(self) -> bool:
        """Whether every layer can remove its last tokens now."""
        # Llama 4's chunked layers call themselves trimmable even after their front was dropped.
        has_all = not any(getattr(layer, "start_position", 0) for layer in self.layers)
        return has_all and bool(can_trim_prompt_cache(self.layers))

    def rollback(self, count: int) -> None:
        """Remove the last `count` tokens from every layer; raise RollbackError if one cannot."""
        if count == 0:
            return
        if not self._is_consistent:
            raise RollbackError(_INTERRUPTED)
        if self.batch_tails:
            raise RollbackError("cannot roll back a batch; select a row first")
        if count < 0 or count > len(self.token_ids):
            raise RollbackError(f"cannot roll back {count} of {len(self.token_ids)} tokens")
        with self._change():
            self._trim(count)
            del self.token_ids[-count:]

    def _trim(self, count: int) -> None:
        if not self.is_trimmable:
            raise RollbackError("the KV cache lacks earlier tokens and cannot roll back")
        trimmed = trim_prompt_cache(self.layers, count)
        if trimmed != count:
            raise RollbackError(
                f"the KV cache removed {trimmed} of {count} tokens;"
                " this architecture cannot roll back"
            )

    def keep_common_prefix(self, prompt_ids: Sequence[int]) -> int:
        """Keep the tokens shared with a new prompt; return how many they are.

        The prompt's last token is never kept, because the first decode step feeds it.
        """
        if not self._is_consistent:
            self.reset()
        self.select(0)
        common = common_prefix_length(self.token_ids, prompt_ids[:-1])
        surplus = len(self.token_ids) - common
        if surplus and not self.is_trimmable:
            self.reset()
            return 0
        self.rollback(surplus)
        return common


def is_plain(layers: Sequence[Any]) -> bool:
    """Return whether all layers have all keys and values, so that any leading part is a cache."""
    return all(type(layer) is KVCache and layer.keys is not None for layer in layers)


def plain_cache(keys: mx.array, values: mx.array, count: int) -> KVCache:
    """Return a cache layer with the keys and values of `count` tokens."""
    layer = KVCache()
    layer.state = (keys, values, count)
    return layer


def share(layers: Sequence[Any], count: int) -> CacheLayers:
    """Return caches of the first `count` tokens of plain layers, at no cost.

    The next step on either side copies its own part.
    """
    return [
        plain_cache(layer.keys[..., :count, :], layer.values[..., :count, :], count)
        for layer in layers
    ]


def _has_rows(layer: Any) -> bool:
    """Return whether a layer has only keys and values, so that rows can be taken from it."""
    return getattr(layer, "caches", None) is None and hasattr(layer, "keys")


def _has_room(layer: Any, count: int) -> bool:
    """Return whether a layer can be trimmed after `count` more tokens.

    A full window cannot, nor a chunk whose front was dropped.
    """
    parts = getattr(layer, "caches", None)
    if parts is not None:
        return all(_has_room(part, count) for part in parts)
    if (chunk := getattr(layer, "chunk_size", None)) is not None:
        return bool(layer.offset + count <= chunk)
    size = getattr(layer, "max_size", None)
    return size is None or layer.offset + count < size


def _copy_whole(layer: Any) -> Any:
    if not hasattr(layer, "merge"):
        raise UsageError(
            f"this architecture's cache ({type(layer).__name__}) cannot be decoded in a batch"
        )
    return copy.deepcopy(layer)


def _copy_part(layer: Any, count: int) -> Any:
    """Copy the first `count` tokens of a layer of keys and values at full precision."""
    if type(layer) is not KVCache:
        raise UsageError(
            "continuing from the middle of a text needs plain KV caches, and this architecture"
            f" has {type(layer).__name__}"
        )
    return share([layer], count)[0]
