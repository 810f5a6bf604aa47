"""The kernel as a graph of MLX operations, for every device MLX runs on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlxroute.small.kernels.row import LARGEST_FLOAT, LOG2_E, LOWEST_EXPONENT, top_count

if TYPE_CHECKING:
    import mlx.core as mx

# The k best logits are in the k chunks with the largest maxima.
_CHUNK = 128
# Sums take so many values at a time: a long float32 sum loses digits on a CPU.
_SUM = 16
_LAST_SUM = 32
# 2^f on [-1/2, 1/2]: Chebyshev interpolation, relative error 1e-7.
_EXP2 = (1.00000008, 0.69314719, 0.24022107, 0.05550357, 0.00967603, 0.00133909)
# Adding and taking this away rounds a small float32 to an integer, found in its lowest bits.
_ROUND = 12582912.0


def pack_signals(logits: mx.array) -> mx.array:
    """Packed rows (see `row`) of logits [B, V] of any floating dtype, lazily."""
    return _compiled()(logits)


@functools.cache
def _compiled() -> Callable[[mx.array], mx.array]:
    """Traced once for each shape, so that a step does not build some sixty nodes in Python."""
    import mlx.core as mx

    return mx.compile(_pack)


def _pack(logits: mx.array) -> mx.array:
    import mlx.core as mx

    rows = logits.astype(mx.float32)
    batch, size = rows.shape
    if short := -size % _CHUNK:
        rows = mx.pad(rows, [(0, 0), (0, short)], constant_values=-mx.inf)
    ids, top = _top(rows, top_count(size))
    best = top[:, :1]
    # From the rows as they came: a NaN in them makes every sum NaN.
    parts = [part.reshape(batch, 1, -1) for part in _weigh(rows, best)]
    sums = _sums(mx.concatenate([_partial_sums(part) for part in parts], axis=1))
    greedy = _greedy(ids, top, sums, logits.dtype)
    return mx.concatenate([*greedy, sums, ids.astype(mx.float32), top], axis=-1)


def _top(rows: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Ids and values of the k largest, by falling value, then rising id; sorts are stable."""
    import mlx.core as mx

    batch, size = rows.shape
    # They sort upwards as the rows do downwards, a NaN last.
    keys = mx.where(rows != rows, mx.inf, -rows)
    if size <= _CHUNK * k:
        ids = mx.argsort(keys, axis=-1)[:, :k]
        return ids, -mx.take_along_axis(keys, ids, axis=-1)
    least = mx.min(keys.reshape(batch, -1, _CHUNK), axis=-1)
    found = mx.sort(mx.argsort(least, axis=-1)[:, :k], axis=-1)
    candidates = (found[:, :, None] * _CHUNK + mx.arange(_CHUNK)).reshape(batch, -1)
    keys = mx.take_along_axis(keys, candidates, axis=-1)
    order = mx.argsort(keys, axis=-1)[:, :k]
    ids = mx.take_along_axis(candidates, order, axis=-1)
    return ids, -mx.take_along_axis(keys, order, axis=-1)


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
    fraction = y - (rounded - _ROUND)
    power = fraction * _EXP2[5] + _EXP2[4]
    for coefficient in _EXP2[3::-1]:
        power = power * fraction + coefficient
    return (power.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)


def _sums(values: mx.array) -> mx.array:
    """Sums [B, n] over the last axis of [B, n, size]."""
    import mlx.core as mx

    while values.shape[-1] > _LAST_SUM:
        if short := -values.shape[-1] % _SUM:
            values = mx.pad(values, [(0, 0), (0, 0), (0, short)])
        values = _partial_sums(values)
    return mx.sum(values, axis=-1)


def _partial_sums(values: mx.array) -> mx.array:
    """[B, n, size] to [B, n, size / 16]; strided, which MLX's CPU backend does fastest."""
    import mlx.core as mx

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
