"""What the logit kernel costs and how exact it is, beside the plain chain of operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from mlxroute.bench.measurement import interleaved, ratios, seconds, spread
from mlxroute.errors import UsageError
from mlxroute.small.kernels import select_kernel, unpack_signals
from mlxroute.types import no_notice

if TYPE_CHECKING:
    import mlx.core as mx

Form = Callable[["mx.array"], object]
VOCABULARIES = (49_152, 151_936, 262_144)


def bench_kernels(*, rounds: int = 30, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """One entry a vocabulary size: milliseconds of each form, ratios, and errors to float64.

    `metal` is "in use", or why the Metal form is not.
    """
    sides: dict[str, Form] = {"chain": _plain_chain, "host_copy": _host_copy}
    sides["graph"] = fused("graph")
    metal = "in use"
    try:
        sides["metal"] = fused("metal")
    except UsageError as exc:
        metal = str(exc)
    return {
        "metal": metal,
        "kernels": [_bench(sides, size, rounds) for size in sizes or VOCABULARIES],
    }


def fused(name: str) -> Form:
    """The kernel called `name`, from logits [1, V] to signals on the host; may raise UsageError."""
    kernel = select_kernel(name, notify=no_notice)

    def run(logits: mx.array) -> object:
        (values,) = cast("list[list[float]]", kernel(logits).tolist())
        return unpack_signals(values)

    return run


def _bench(sides: dict[str, Form], size: int, rounds: int) -> dict[str, Any]:
    import mlx.core as mx

    logits = mx.random.normal((1, size), key=mx.random.key(size)) * 3
    if mx.default_device() != mx.Device(mx.cpu):
        # What a model on a GPU gives; on a CPU the weights are float32.
        logits = logits.astype(mx.bfloat16)
    mx.eval(logits)
    times = interleaved(
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
    return lambda _: seconds(lambda: form(logits))


def _plain_chain(logits: mx.array) -> object:
    """Log-softmax, entropy, argmax, top-8 and margin, one operation after the other."""
    import mlx.core as mx

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
    """The whole row on the host, and the same in NumPy."""
    import mlx.core as mx
    import numpy as np

    row = np.array(logits.astype(mx.float32))[0]
    shifted = row - row.max()
    weights = np.exp(shifted)
    total = weights.sum()
    entropy = math.log(total) - float((weights * shifted).sum() / total)
    top = np.argpartition(-row, 7)[:8]
    return entropy, top[np.argsort(-row[top])]


def _error(form: Form, logits: mx.array) -> dict[str, Any]:
    """Against float64: entropy in nats, and whether the k best ids are the same."""
    import mlx.core as mx
    import numpy as np

    got: Any = form(logits)
    row = np.array(logits.astype(mx.float32))[0].astype(np.float64)
    logprobs = row - row.max()
    logprobs -= math.log(np.exp(logprobs).sum())
    entropy = -float((np.exp(logprobs) * logprobs).sum())
    best = np.argsort(-row, kind="stable")[: len(got.top_ids)]
    return {
        "entropy_nats": abs(got.entropy_nats - entropy),
        "same_top_ids": list(got.top_ids) == best.tolist(),
    }
