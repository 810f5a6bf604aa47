"""The kernel as a graph of MLX operations, for every device MLX runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from mlxroute.types import Signals

if TYPE_CHECKING:
    import mlx.core as mx

TOP_K = 8
_SCALARS = 5
_BLOCK = 512


def pack_signals(logits: mx.array, sampler: Callable[[mx.array], mx.array]) -> mx.array:
    """Signals of one position as a lazy float32 row of length 5 + 2k.

    `logits` is [1, V] in the model's dtype. The row holds token id, its logprob, entropy in nats,
    varentropy, margin, then the k most likely ids and their logprobs. Ids are exact in float32 up
    to 2^24. The token comes from `sampler(logits - logsumexp(logits))` in the model's own dtype,
    as `mlx_lm.generate_step` has it, so that greedy choices agree with it even on rounded ties.

    With z = x - max(x), s = sum e^z, t = sum z e^z and u = sum z^2 e^z in float32:
    H = ln s - t/s and Var(log p) = u/s - (t/s)^2.
    """
    import mlx.core as mx

    token = sampler(logits - mx.logsumexp(logits, keepdims=True)).reshape(())
    row = logits.astype(mx.float32).reshape(-1)
    # e^-128 is 0 in float32, and 0 * -128 is 0 where 0 * -inf would be NaN.
    shifted = row - mx.max(row)
    z = mx.maximum(shifted, -128.0)
    weights = mx.exp(z)
    s, t, u = _sums(weights, z * weights, z * z * weights)
    log_s = mx.log(s)
    k = min(TOP_K, row.size)
    ids = mx.argpartition(-row, kth=k - 1)[:k]
    ids = ids[mx.argsort(-row[ids])]
    top = shifted[ids] - log_s
    margin = (weights[ids[0]] - weights[ids[1]]) / s if k > 1 else mx.array(1.0)
    mean = t / s
    scalars = [
        token.astype(mx.float32),
        shifted[token] - log_s,
        log_s - mean,
        mx.maximum(u / s - mean * mean, 0.0),
        margin,
    ]
    return mx.concatenate([mx.stack(scalars), ids.astype(mx.float32), top])


def _sums(*rows: mx.array) -> mx.array:
    """Sums of equally long rows, in two levels: one long float32 sum loses digits on a CPU."""
    import mlx.core as mx

    stacked = mx.stack(list(rows))
    pad = -stacked.shape[1] % _BLOCK
    blocks = mx.pad(stacked, [(0, 0), (0, pad)]).reshape(len(rows), -1, _BLOCK)
    return mx.sum(mx.sum(blocks, axis=-1), axis=-1)


def unpack_signals(packed: mx.array) -> Signals:
    """Bring a packed row to the host: the one synchronisation of a decode step."""
    values = cast("list[float]", packed.tolist())
    k = (len(values) - _SCALARS) // 2
    return Signals(
        token_id=int(values[0]),
        logprob=values[1],
        entropy_nats=values[2],
        varentropy=values[3],
        margin=values[4],
        top_ids=tuple(int(value) for value in values[_SCALARS : _SCALARS + k]),
        top_logprobs=tuple(values[_SCALARS + k :]),
    )
