"""Greedy continuations of several sequences at once, by mlx_lm's own batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlxroute.small.kv_cache import CacheCopy


def continue_greedily(
    model: Any,
    starts: Sequence[tuple[CacheCopy, int]],
    *,
    max_tokens: Sequence[int],
    eos_ids: Iterable[int],
) -> list[list[int]]:
    """The ids after each start's token: at most `max_tokens[i]`, without the end token."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    found: list[list[int]] = [[] for _ in starts]
    rows = [index for index, count in enumerate(max_tokens) if count > 0]
    if not rows:
        return found
    generator = BatchGenerator(
        model,
        stop_tokens=[[token_id] for token_id in eos_ids],
        completion_batch_size=len(rows),
        prefill_batch_size=len(rows),
        stream=mx.default_stream(mx.default_device()),
    )
    try:
        names = generator.insert(
            [[starts[row][1]] for row in rows],
            max_tokens=[max_tokens[row] for row in rows],
            caches=[starts[row][0] for row in rows],
        )
        of = dict(zip(names, rows, strict=True))
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    found[of[response.uid]].append(int(response.token))
    finally:
        generator.close()
    return found
