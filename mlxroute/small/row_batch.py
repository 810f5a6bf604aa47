"""Rows of different lengths decoded as one batch, each of which may pause, leave or be cut.

`mlx_lm`'s batched KV cache aligns its rows at the right, so that a row that pauses or leaves makes
it copy all others. Here each row has its own length in a buffer that all rows share. A pause costs
nothing, a join or a leave copies one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlxroute.errors import RollbackError
from mlxroute.small.kv_cache import CLEAR_CACHE_EVERY, CacheLayers, is_plain, plain_cache
from mlxroute.small.row_sampler import RowSampler
from mlxroute.types import Signals

# Rows of the smallest buffers.
_MIN_ROWS = 2
# Tokens by which the buffers grow, as those of `mlx_lm`.
_GROWTH = 256
# Maximum memory of the buffers.
_MAX_BYTES = 1 << 32
# The index of a row that was removed.
_GONE = -1

ComputeSignals = Callable[
    [mx.array, list[Any], Sequence[tuple[RowSampler | None, int]]], list[Signals]
]
"""Feeds tokens [B, 1] to cache layers; the pairs are the sampler and the length of each row."""


@dataclass(eq=False, slots=True)
class BatchRow:
    """A row of a `RowBatch`: its place in the buffers and the number of its tokens."""

    index: int
    length: int
    sampler: RowSampler | None = None


@dataclass(slots=True)
class _StepPlan:
    """What all layers share in one step.

    `positions` [B, 1, 1, 1] are the places of the new tokens, `offsets` [B] the same, `mask`
    [B, 1, 1, n] the places that each row attends to. The last `idle` rows of the buffers stay
    out of the step.
    """

    positions: mx.array
    offsets: mx.array
    mask: mx.array
    width: int
    idle: int


class _LayerRows:
    """The KV cache of one layer, in the form in which `mlx_lm` models use one."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.plan: _StepPlan

    @property
    def offset(self) -> mx.array:
        return self.plan.offsets

    def make_mask(
        self, count: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        if window_size is None:
            return self.plan.mask
        places = mx.arange(self.plan.width)
        return self.plan.mask & (places > self.plan.positions - window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        plan = self.plan
        self.keys = _put(self.keys, keys, plan)
        self.values = _put(self.values, values, plan)
        rows = len(keys)
        return self.keys[:rows, :, : plan.width], self.values[:rows, :, : plan.width]


def _put(buffer: mx.array, values: mx.array, plan: _StepPlan) -> mx.array:
    """Write one token [B, H, 1, D] of each row into a buffer, without a copy of the buffer."""
    if plan.idle:
        values = mx.pad(values, [(0, plan.idle), (0, 0), (0, 0), (0, 0)])
    return mx.put_along_axis(buffer, plan.positions, values, axis=2)


class RowBatch:
    """A batch of sequences over one buffer per layer.

    Signals of a batched row round differently from those of a single row.

    Args:
        compute_signals: Runs a forward pass over the layers.
        takes_rows: Tells whether the model decodes rows with cache layers like the given ones.
    """

    def __init__(
        self, compute_signals: ComputeSignals, takes_rows: Callable[[Sequence[Any]], bool]
    ) -> None:
        self._compute_signals = compute_signals
        self._takes_rows = takes_rows
        self._layers: list[_LayerRows] = []
        self._rows: list[BatchRow] = []
        self._step_count = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def size_bytes(self) -> int:
        """The memory of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def has_room(self, layers: Sequence[Any], length: int) -> bool:
        """Return whether a sequence of these cache layers and this length can become a row."""
        longest = max([length, *(row.length for row in self._rows)])
        return self._takes_rows(layers) and len(self._rows) < count_rows_that_fit(layers, longest)

    def has_room_for_token(self, row: BatchRow) -> bool:
        """Return whether the buffers may grow as far as one more token of a row requires."""
        rows, width = self._shape
        if row.length < width:
            return True
        token_bytes = self.size_bytes // (rows * width)
        return len(self._rows) <= _count_rows(token_bytes, row.length)

    def join(
        self, layers: Sequence[Any], length: int, *, sampler: RowSampler | None = None
    ) -> BatchRow:
        """Copy the first `length` tokens of a KV cache into a new row."""
        row = BatchRow(len(self._rows), length, sampler)
        self._rows.append(row)
        try:
            self._resize(layers)
            self._fill(row, layers)
            self._evaluate()
        except BaseException:
            # Nobody would ever drop it.
            self._remove_last()
            raise
        return row

    def copy(self, row: BatchRow, count: int) -> CacheLayers:
        """Return a KV cache of the first `count` tokens of a row.

        Raises RollbackError for a row that was removed.
        """
        if row.index == _GONE:
            raise RollbackError("the batch does not hold this row any more")
        copies = [_copied(view) for view in self._views(row, count)]
        mx.eval([(layer.keys, layer.values) for layer in copies])
        return copies

    def leave(self, row: BatchRow) -> CacheLayers:
        """Remove a row; return its KV cache."""
        copies = self.copy(row, row.length)
        self.drop(row)
        return copies

    def clear(self) -> None:
        """Remove all rows."""
        self._rows, self._layers = [], []

    def drop(self, row: BatchRow) -> None:
        """Remove a row; the last row takes its place."""
        last = self._rows[-1]
        if last is not row:
            # A copy, because a view of the buffers would keep them from being written in place.
            copies = self.copy(last, last.length)
            last.index = row.index
            self._rows[last.index] = last
            self._fill(last, copies)
        self._remove_last()
        row.index = _GONE
        self._evaluate()

    def _fill(self, row: BatchRow, layers: Sequence[Any]) -> None:
        """Write a row's tokens of a KV cache into the buffers, and zeros after them."""
        # The row that was there may have left NaN, which no mask keeps out of a sum of values.
        widths = [(0, 0), (0, self._shape[1] - row.length), (0, 0)]
        for buffers, layer in zip(self._layers, layers, strict=True):
            buffers.keys[row.index] = mx.pad(layer.keys[0, :, : row.length], widths)
            buffers.values[row.index] = mx.pad(layer.values[0, :, : row.length], widths)

    def _remove_last(self) -> None:
        del self._rows[-1]
        if not self._rows:
            self._layers = []
            mx.clear_cache()

    def trim(self, row: BatchRow, count: int) -> None:
        """Remove the last `count` tokens of a row. Raises RollbackError if it has fewer."""
        if not 0 <= count <= row.length:
            raise RollbackError(f"cannot roll back {count} of {row.length} tokens")
        row.length -= count
        if row.sampler is not None:
            row.sampler.rewind(row.length)

    def step(
        self, token_ids: Mapping[BatchRow, int], *, undrawn: Collection[BatchRow] = ()
    ) -> dict[BatchRow, Signals]:
        """Feed one token to some of the rows; return the signals after each of them.

        The samplers of the `undrawn` rows draw nothing: their signals are greedy.
        """
        self._grow()
        # Rows in between compute a token that is overwritten by their next one.
        count = 1 + max(row.index for row in token_ids)
        rows = self._rows[:count]
        for row in token_ids:
            row.length += 1
        plan = self._plan(rows, token_ids)
        for layer in self._layers:
            layer.plan = plan
        tokens = mx.array([[token_ids.get(row, 0)] for row in rows])
        drawn = token_ids.keys() - set(undrawn)
        samplers = [(row.sampler if row in drawn else None, row.length) for row in rows]
        signals = self._compute_signals(tokens, list(self._layers), samplers)
        self._evaluate()
        self._step_count += 1
        if self._step_count % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        return {row: signals[row.index] for row in token_ids}

    def _plan(self, rows: Sequence[BatchRow], token_ids: Mapping[BatchRow, int]) -> _StepPlan:
        places = [row.length - (row in token_ids) for row in rows]
        idle = len(self._layers[0].keys) - len(rows)
        unused = [row.length for row in self._rows[len(rows) :]]
        unused += [0] * (idle - len(unused))
        width = max(places) + 1
        return _make_plan(places, unused, width, idle)

    def _views(self, row: BatchRow, count: int) -> list[KVCache]:
        index = slice(row.index, row.index + 1)
        return [
            plain_cache(buffers.keys[index, :, :count], buffers.values[index, :, :count], count)
            for buffers in self._layers
        ]

    def _grow(self) -> None:
        """Make room for one more token of each row."""
        longest = max(row.length for row in self._rows)
        rows, width = self._shape
        if longest >= width:
            self._reshape(rows, _capacity(longest))

    def _resize(self, layers: Sequence[Any]) -> None:
        """Make room for all rows, the last of which is new and like `layers`."""
        width = _capacity(max(row.length for row in self._rows))
        if not self._layers:
            self._layers = [_LayerRows(*_empty(layer, _MIN_ROWS, width)) for layer in layers]
        rows, present = self._shape
        # A buffer that was made for a long row is not kept at twice the present need.
        if present < width or present > 2 * width or rows < len(self._rows):
            self._reshape(rows, width)

    @property
    def _shape(self) -> tuple[int, int]:
        """The number of rows and the width of the buffers."""
        keys = self._layers[0].keys
        return keys.shape[0], keys.shape[2]

    def _reshape(self, rows: int, width: int) -> None:
        """Give the buffers this width and `rows` rows; as many as are needed if memory is short."""
        token_bytes = self.size_bytes // math.prod(self._shape)
        rows = min(rows, _count_rows(token_bytes, width - 1))
        while rows < len(self._rows):
            rows = max(_MIN_ROWS, 2 * rows)
        for layer in self._layers:
            layer.keys = _reshaped(layer.keys, rows, width)
            layer.values = _reshaped(layer.values, rows, width)
        self._evaluate()

    def _evaluate(self) -> None:
        mx.eval([(layer.keys, layer.values) for layer in self._layers])


def _make_plan(places: list[int], unused: list[int], width: int, idle: int) -> _StepPlan:
    offsets = mx.array(places)
    positions = mx.array([*places, *unused])[:, None, None, None]
    mask = mx.arange(width) <= offsets[:, None, None, None]
    return _StepPlan(positions, offsets, mask, width, idle)


def can_build_rows(
    build_pass: Callable[[mx.array, list[Any]], object], layers: Sequence[Any]
) -> bool:
    """Return whether a model decodes rows of different lengths; some have one length for all.

    The pass of two rows with cache layers like the given ones is built, but not computed.
    """
    rows = [_LayerRows(*_empty(layer, 2, 2)) for layer in layers]
    for row in rows:
        row.plan = _make_plan([0, 1], [], 2, 0)
    try:
        build_pass(mx.array([[0], [0]]), rows)
    except Exception:  # noqa: BLE001 - what an architecture raises is its own
        return False
    return True


def count_rows_that_fit(layers: Sequence[Any], length: int) -> int:
    """Return how many sequences of these cache layers and this length a batch can hold.

    It is 0 for layers that cannot be rows.
    """
    if not is_plain(layers):
        return 0
    return _count_rows(sum(_token_bytes(layer) for layer in layers), length)


def _count_rows(token_bytes: int, length: int) -> int:
    """Return the maximum number of rows of `length` tokens that buffers within `_MAX_BYTES` have.

    The number of rows is doubled where there are too few.
    """
    rows = _MAX_BYTES // (token_bytes * _capacity(length))
    return 0 if rows < _MIN_ROWS else 1 << (rows.bit_length() - 1)


def _copied(layer: Any) -> KVCache:
    return plain_cache(mx.contiguous(layer.keys), mx.contiguous(layer.values), layer.offset)


def _capacity(length: int) -> int:
    """Return the width of a buffer for rows of `length` tokens and at least one more."""
    return (length // _GROWTH + 1) * _GROWTH


def _token_bytes(layer: Any) -> int:
    size: int = layer.nbytes // layer.keys.shape[2]
    return size


def _empty(layer: Any, rows: int, width: int) -> tuple[mx.array, mx.array]:
    shapes = [(rows, part.shape[1], width, part.shape[3]) for part in (layer.keys, layer.values)]
    keys, values = (mx.zeros(shape, layer.keys.dtype) for shape in shapes)
    return keys, values


def _reshaped(buffer: mx.array, rows: int, width: int) -> mx.array:
    part = buffer[:rows, :, :width]
    widths = [(0, rows - part.shape[0]), (0, 0), (0, width - part.shape[2]), (0, 0)]
    return mx.pad(part, widths)
