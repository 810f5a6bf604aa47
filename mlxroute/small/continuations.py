"""Greedy continuations of several sequences in one batch, by `mlx_lm`'s `BatchGenerator`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from mlxroute.small.kv_cache import CacheLayers


def continue_greedily(
    model: Any,
    starts: Sequence[tuple[CacheLayers, int]],
    *,
    max_tokens: Sequence[int],
    eos_ids: Iterable[int],
) -> list[list[int]]:
    """Return the ids that follow each start: at most `max_tokens[i]`, without the end token.

    A start is a copy of the KV cache and the token that follows it.
    """
    continuations: list[list[int]] = [[] for _ in starts]
    rows = [row for row, count in enumerate(max_tokens) if count > 0]
    if not rows:
        return continuations
    generator = BatchGenerator(
        model,
        stop_tokens=[[token_id] for token_id in eos_ids],
        completion_batch_size=len(rows),
        prefill_batch_size=len(rows),
        stream=mx.default_stream(mx.default_device()),
    )
    try:
        uids = generator.insert(
            [[starts[row][1]] for row in rows],
            max_tokens=[max_tokens[row] for row in rows],
            caches=[starts[row][0] for row in rows],
        )
        row_of_uid = dict(zip(uids, rows, strict=True))
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    continuations[row_of_uid[response.uid]].append(int(response.token))
    finally:
        generator.close()
    return continuations
