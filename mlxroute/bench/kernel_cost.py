"""Time and accuracy of the fused logit kernel, compared with separate MLX operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxroute.bench.measurement import ratios, run_interleaved, spread, time_call
from mlxroute.errors import UsageError
from mlxroute.small.kernels import select_kernel, unpack_signals
from mlxroute.types import no_notice

Form = Callable[[mx.array], object]
"""One way to compute the signals of logits [1, V]."""

VOCABULARIES = (49_152, 151_936, 262_144)


def bench_kernels(*, rounds: int = 30, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """Return, for each vocabulary size, times in ms, speed-ups and errors against float64.

    Args:
        rounds: Timings of each implementation.
        sizes: Vocabulary sizes. None (default) for `VOCABULARIES`.

    Returns:
        The report. Its `metal` is "in use", or the reason why there is no Metal kernel.
    """
    sides: dict[str, Form] = {"chain": _plain_chain, "host_copy": _host_copy}
    sides["graph"] = kernel_form("graph")
    metal = "in use"
    try:
        sides["metal"] = kernel_form("metal")
    except UsageError as exc:
        metal = str(exc)
    return {
        "metal": metal,
        "kernels": [_bench_size(sides, size, rounds) for size in sizes or VOCABULARIES],
    }


def kernel_form(name: str) -> Form:
    """Return a function that computes signals on the host from logits [1, V] by a kernel.

    Raises UsageError if this machine has no kernel of this name.
    """
    kernel = select_kernel(name, notify=no_notice)

    def run(logits: mx.array) -> object:
        (values,) = cast("list[list[float]]", kernel(logits).tolist())
        return unpack_signals(values)

    return run


def _bench_size(sides: dict[str, Form], size: int, rounds: int) -> dict[str, Any]:
    """Return the report of one vocabulary size."""
    logits = mx.random.normal((1, size), key=mx.random.key(size)) * 3
    if mx.default_device() != mx.Device(mx.cpu):
        # The dtype of a model on a GPU; on a CPU the weights are float32.
        logits = logits.astype(mx.bfloat16)
    mx.eval(logits)
    times = run_interleaved(
        {name: _timed(form, logits) for name, form in sides.items()}, rounds=rounds, warm_ups=3
    )
    entry: dict[str, Any] = {"vocabulary": size, "dtype": str(logits.dtype).split(".")[-1]}
    entry["ms"] = {
        name: spread([1e3 * value for value in values]) for name, values in times.items()
    }
    ours = [name for name in sides if name in {"graph", "metal"}]
    entry["chain_over"] = {name: ratios(times["chain"], times[name]) for name in ours}
    entry["error"] = {name: _error(sides[name], logits) for name in ours}
    return entry


def _timed(form: Form, logits: mx.array) -> Callable[[int], float]:
    return lambda _: time_call(lambda: form(logits))


def _plain_chain(logits: mx.array) -> object:
    """Compute log-softmax, entropy, argmax, top-8 and margin by separate operations."""
    logprobs = logits.astype(mx.float32)
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    entropy = -mx.sum(mx.exp(logprobs) * logprobs, axis=-1)
    token = mx.argmax(logprobs, axis=-1)
    ids = mx.argpartition(-logprobs, kth=7, axis=-1)[:, :8]
    top = mx.take_along_axis(logprobs, ids, axis=-1)
    order = mx.argsort(-top, axis=-1)
    top, ids = (mx.take_along_axis(part, order, axis=-1) for part in (top, ids))
    margin = mx.exp(top[:, 0]) - mx.exp(top[:, 1])
    mx.eval(entropy, token, ids, top, margin)
    return [part.tolist() for part in (entropy, token, ids, top, margin)]


def _host_copy(logits: mx.array) -> object:
    """Copy the row to the host and compute entropy and top-8 with NumPy."""
    row = np.array(logits.astype(mx.float32))[0]
    shifted = row - row.max()
    weights = np.exp(shifted)
    total = weights.sum()
    entropy = math.log(total) - float((weights * shifted).sum() / total)
    top = np.argpartition(-row, 7)[:8]
    return entropy, top[np.argsort(-row[top])]


def _error(form: Form, logits: mx.array) -> dict[str, Any]:
    """Return the error of the entropy in nats against float64, and whether the top ids agree."""
    signals: Any = form(logits)
    row = np.array(logits.astype(mx.float32))[0].astype(np.float64)
    logprobs = row - row.max()
    logprobs -= math.log(np.exp(logprobs).sum())
    entropy = -float((np.exp(logprobs) * logprobs).sum())
    best = np.argsort(-row, kind="stable")[: len(signals.top_ids)]
    return {
        "entropy_nats": abs(signals.entropy_nats - entropy),
        "same_top_ids": list(signals.top_ids) == best.tolist(),
    }
