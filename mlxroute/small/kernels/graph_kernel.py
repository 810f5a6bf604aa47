"""The kernel as a graph of MLX operations, for every device MLX runs on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlxroute.small.kernels.packed_row import LARGEST_FLOAT, LOG2_E, LOWEST_EXPONENT, top_count

if TYPE_CHECKING:
    import mlx.core as mx

# The k best logits are in the k chunks with the largest maxima.
_CHUNK = 128
# Of so many values the best are found as fast without chunks.
_DIRECT = 8192
# Sums take so many values at a time: a long float32 sum loses digits on a CPU.
_SUM = 16
# Along the last axis MLX adds several values at a time.
_LAST_SUM = 32
# 2^f on [-1/2, 1/2]: Chebyshev interpolation, relative error 1e-7.
_EXP2 = (1.00000008, 0.69314719, 0.24022107, 0.05550357, 0.00967603, 0.00133909)
# Adding and taking this away rounds a small float32 to an integer, found in its lowest bits.
_ROUND = 12582912.0
_SIGN = -(2**31)


def pack_signals(logits: mx.array) -> mx.array:
    """Packed rows (see `row`) of logits [B, V] of any floating dtype, lazily."""
    return _compiled()(logits)


@functools.cache
def _compiled() -> Callable[[mx.array], mx.array]:
    """Traced once for each shape, so that a step does not build some sixty nodes in Python."""
    import mlx.core as mx

    return mx.compile(_pack)


def _pack(logits: mx.array) -> mx.array:
    """Few operations: on a CPU each one costs as much as reading some thousand values."""
    import mlx.core as mx

    rows = logits.astype(mx.float32)
    ids, top = _top(rows, top_count(rows.shape[1]))
    # From the rows as they came: a NaN in them makes every sum NaN.
    parts = [_partial_sums(part[:, None]) for part in _weigh(rows, top[:, :1])]
    sums = _sums(mx.concatenate(parts, axis=1))
    greedy = _greedy(ids, top, sums, logits.dtype)
    return mx.concatenate([*greedy, sums, ids.astype(mx.float32), top], axis=-1)


def _top(rows: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Ids and values of the k largest, by falling value, then rising id; a NaN counts as -inf."""
    import mlx.core as mx

    size = rows.shape[1]
    # Adding zero leaves one kind of zero.
    values = mx.where(rows != rows, -mx.inf, rows) + 0.0
    if size <= _DIRECT:
        return _best(values, mx.arange(size, dtype=mx.int64), k)
    values = _padded(values, _CHUNK, -mx.inf)
    chunks = values.reshape(len(rows), -1, _CHUNK)
    # Sorts are stable: of equal chunks, those with the lower ids.
    found = mx.argsort(-mx.max(chunks, axis=-1), axis=-1)[:, :k]
    ids = (found[:, :, None] * _CHUNK + mx.arange(_CHUNK, dtype=mx.uint32)).reshape(len(rows), -1)
    return _best(mx.take_along_axis(values, ids, axis=-1), ids.astype(mx.int64), k)


def _best(values: mx.array, ids: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Ids and values of the k largest, found by integers that order as values, then ids do."""
    import mlx.core as mx

    bits = values.view(mx.int32)
    order = mx.where(bits < 0, bits ^ _SIGN, ~bits)
    keys = (order.astype(mx.int64) << 32) | ids
    if k < keys.shape[-1]:
        keys = mx.partition(keys, k - 1, axis=-1)[:, :k]
    keys = mx.sort(keys, axis=-1)
    order = (keys >> 32).astype(mx.int32)
    top = mx.where(order < 0, ~order, order ^ _SIGN).view(mx.float32)
    return keys.astype(mx.uint32), top


def _padded(values: mx.array, multiple: int, value: float) -> mx.array:
    """Values [..., n] with n brought up to a multiple."""
    import mlx.core as mx

    if not (short := -values.shape[-1] % multiple):
        return values
    widths = [(0, 0)] * (values.ndim - 1) + [(0, short)]
    return mx.pad(values, widths, constant_values=value)


def _weigh(rows: mx.array, best: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """2^y, y 2^y and y^2 2^y of every logit, y = (x - m) log2(e), not below -125."""
    import mlx.core as mx

    y = mx.maximum(mx.minimum((rows - _reference(best)) * LOG2_E, 0.0), LOWEST_EXPONENT)
    weights = _exp2(y)
    weighted = y * weights
    return weights, weighted, y * weighted


def _reference(best: mx.array) -> mx.array:
    import mlx.core as mx

    return mx.minimum(mx.maximum(best, -LARGEST_FLOAT), LARGEST_FLOAT)


def _exp2(y: mx.array) -> mx.array:
    """2^y for y in [-125, 0]; MLX's own exponential takes ten times as long on a CPU."""
    import mlx.core as mx

    rounded = y + _ROUND
    f = y - (rounded - _ROUND)
    f2 = f * f
    # Not Horner's scheme, which is deeper than what MLX fuses into one operation.
    low, middle, high = (_EXP2[i + 1] * f + _EXP2[i] for i in (0, 2, 4))
    power = low + middle * f2 + high * (f2 * f2)
    return (power.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)


def _sums(values: mx.array) -> mx.array:
    """Sums [B, n] over the last axis of [B, n, size]."""
    import mlx.core as mx

    while values.shape[-1] > _LAST_SUM:
        values = _partial_sums(values)
    return mx.sum(values, axis=-1)


def _partial_sums(values: mx.array) -> mx.array:
    """[B, n, size] to [B, n, size / 16]; strided, which MLX's CPU backend does fastest."""
    import mlx.core as mx

    values = _padded(values, _SUM, 0.0)
    return mx.sum(values.reshape(*values.shape[:2], _SUM, -1), axis=2)


def _greedy(
    ids: mx.array, top: mx.array, sums: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """The greedy id and its logit, in float32: the best, or the lowest that rounds like it."""
    import mlx.core as mx

    if dtype == mx.float32:
        return ids[:, :1].astype(mx.float32), top[:, :1]
    lse = _reference(top[:, :1]) + mx.log(sums[:, :1])
    rounded = top.astype(dtype) - lse.astype(dtype)
    tied = mx.where(rounded == rounded[:, :1], ids, mx.iinfo(ids.dtype).max)
    place = mx.argmin(tied, axis=-1, keepdims=True)
    token = mx.take_along_axis(ids, place, axis=-1)
    return token.astype(mx.float32), mx.take_along_axis(top, place, axis=-1)
