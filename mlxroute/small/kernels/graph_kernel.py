"""The kernel as a graph of MLX operations, for every device MLX runs on.

The packed row and its formulas are defined in `packed_row`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx

from mlxroute.small.kernels.packed_row import LARGEST_FLOAT, LOG2_E, LOWEST_EXPONENT, top_count

# The k largest logits are in the k chunks with the largest maxima.
_CHUNK = 128
# Up to this many values, chunks save no time.
_MAX_UNCHUNKED = 8192
# Values added at a time, because a long float32 sum loses digits on a CPU.
_SUM_WIDTH = 16
# Values in the last sum: along the last axis MLX adds several at a time, so more are accurate.
_LAST_SUM_WIDTH = 32
# Coefficients of 2^f on [-1/2, 1/2] by Chebyshev interpolation, relative error 1e-7.
_EXP2 = (1.00000008, 0.69314719, 0.24022107, 0.05550357, 0.00967603, 0.00133909)
# 1.5 * 2^23: adding it rounds a small float32 to an integer, which ends up in the lowest bits.
_ROUND = 12582912.0
_SIGN = -(2**31)


def pack_signals(logits: mx.array) -> mx.array:
    """Return the packed rows of logits [B, V] of any floating dtype, lazily."""
    return _compiled()(logits)


@functools.cache
def _compiled() -> Callable[[mx.array], mx.array]:
    """Return `_pack` compiled: a step then does not build some sixty nodes in Python."""
    return mx.compile(_pack)


def _pack(logits: mx.array) -> mx.array:
    """Build the graph of the packed rows.

    It has few operations, because on a CPU each costs as much as reading 1,000 values.
    """
    rows = logits.astype(mx.float32)
    ids, top = _find_top(rows, top_count(rows.shape[1]))
    # The sums use the rows themselves, so that a NaN in them makes every sum NaN.
    parts = [_partial_sums(part[:, None]) for part in _weigh(rows, top[:, :1])]
    sums = _sum(mx.concatenate(parts, axis=1))
    greedy = _choose_greedily(ids, top, sums, logits.dtype)
    return mx.concatenate([*greedy, sums, ids.astype(mx.float32), top], axis=-1)


def _find_top(rows: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return ids and values of the k largest, in the packed row's order; a NaN counts as -inf."""
    size = rows.shape[1]
    # Adding zero turns -0 into +0, so that both compare equal as bits.
    values = mx.where(rows != rows, -mx.inf, rows) + 0.0
    if size <= _MAX_UNCHUNKED:
        return _sort_top(values, mx.arange(size, dtype=mx.int64), k)
    values = _pad(values, _CHUNK, -mx.inf)
    chunks = values.reshape(len(rows), -1, _CHUNK)
    # The sort is stable: of equal chunks it prefers those with the lower ids.
    best_chunks = mx.argsort(-mx.max(chunks, axis=-1), axis=-1)[:, :k]
    ids = best_chunks[:, :, None] * _CHUNK + mx.arange(_CHUNK, dtype=mx.uint32)
    ids = ids.reshape(len(rows), -1)
    return _sort_top(mx.take_along_axis(values, ids, axis=-1), ids.astype(mx.int64), k)


def _sort_top(values: mx.array, ids: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return ids and values of the k largest by sorting integer keys.

    A key's high half orders as the falling value (a float's bits, with the sign handled), its low
    half is the id.
    """
    bits = values.view(mx.int32)
    order = mx.where(bits < 0, bits ^ _SIGN, ~bits)
    keys = (order.astype(mx.int64) << 32) | ids
    if k < keys.shape[-1]:
        keys = mx.partition(keys, k - 1, axis=-1)[:, :k]
    keys = mx.sort(keys, axis=-1)
    order = (keys >> 32).astype(mx.int32)
    top = mx.where(order < 0, ~order, order ^ _SIGN).view(mx.float32)
    return keys.astype(mx.uint32), top


def _pad(values: mx.array, multiple: int, value: float) -> mx.array:
    """Pad values [..., n] with `value` until n is a multiple of `multiple`."""
    if not (short := -values.shape[-1] % multiple):
        return values
    widths = [(0, 0)] * (values.ndim - 1) + [(0, short)]
    return mx.pad(values, widths, constant_values=value)


def _weigh(rows: mx.array, best: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return 2^y, y 2^y and y^2 2^y of every logit (see `packed_row`)."""
    y = mx.maximum(mx.minimum((rows - _reference(best)) * LOG2_E, 0.0), LOWEST_EXPONENT)
    weights = _exp2(y)
    weighted = y * weights
    return weights, weighted, y * weighted


def _reference(best: mx.array) -> mx.array:
    """Return m: the largest logit, limited to the finite float32 range."""
    return mx.minimum(mx.maximum(best, -LARGEST_FLOAT), LARGEST_FLOAT)


def _exp2(y: mx.array) -> mx.array:
    """Return 2^y for y in [-125, 0]; MLX's own exponential takes ten times as long on a CPU."""
    rounded = y + _ROUND
    f = y - (rounded - _ROUND)
    f2 = f * f
    # MLX fuses these operations into one; Horner's scheme would be too deep for that.
    low, middle, high = (_EXP2[i + 1] * f + _EXP2[i] for i in (0, 2, 4))
    power = low + middle * f2 + high * (f2 * f2)
    return (power.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)


def _sum(values: mx.array) -> mx.array:
    """Return sums [B, n] over the last axis of [B, n, size]."""
    while values.shape[-1] > _LAST_SUM_WIDTH:
        values = _partial_sums(values)
    return mx.sum(values, axis=-1)


def _partial_sums(values: mx.array) -> mx.array:
    """Reduce [B, n, size] to [B, n, size / 16], strided: the fastest sum of MLX's CPU backend."""
    values = _pad(values, _SUM_WIDTH, 0.0)
    return mx.sum(values.reshape(*values.shape[:2], _SUM_WIDTH, -1), axis=2)


def _choose_greedily(
    ids: mx.array, top: mx.array, sums: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return the greedy id and its logit in float32 (see `token_id` in `packed_row`)."""
    if dtype == mx.float32:
        return ids[:, :1].astype(mx.float32), top[:, :1]
    lse = _reference(top[:, :1]) + mx.log(sums[:, :1])
    rounded = top.astype(dtype) - lse.astype(dtype)
    tied = mx.where(rounded == rounded[:, :1], ids, mx.iinfo(ids.dtype).max)
    place = mx.argmin(tied, axis=-1, keepdims=True)
    token = mx.take_along_axis(ids, place, axis=-1)
    return token.astype(mx.float32), mx.take_along_axis(top, place, axis=-1)
