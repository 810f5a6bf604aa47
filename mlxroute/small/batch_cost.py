"""What a batch of rows costs on this machine, beside one row, and how differently it rounds."""

from __future__ import annotations

import statistics
import time
from typing import Final

from mlxroute.small.decoder import Decoder
from mlxroute.types import BranchCost, Signals

_STEPS: Final = 3
# Of the greatest difference seen in a few steps, to bound those not seen.
_SAFETY: Final = 8.0
# Float32 logits of some tens carry this much in their last bits.
_LEAST_NATS: Final = 1e-5


def measure(decoder: Decoder, token_id: int, *, rows: int) -> BranchCost:
    """Decode a few tokens from `token_id` on, alone and as `rows` equal rows; take them back."""
    alone, alone_s = [], []
    batched, batch_s = [], []
    ids = [token_id]
    for _ in range(_STEPS):
        began_s = time.perf_counter()
        alone.append(decoder.step(ids[-1:]))
        alone_s.append(time.perf_counter() - began_s)
        ids.append(alone[-1].token_id)
    decoder.rollback(_STEPS)
    parents = [0] * rows
    for fed in ids[:_STEPS]:
        began_s = time.perf_counter()
        batched.append(decoder.branch(parents, [fed] * rows)[-1])
        batch_s.append(time.perf_counter() - began_s)
        parents = list(range(rows))
    decoder.select(0)
    decoder.rollback(_STEPS)
    seen = max(_difference(a, b) for a, b in zip(alone, batched, strict=True))
    return BranchCost(
        rows=rows,
        step_s=statistics.median(alone_s[1:]),
        batch_s=statistics.median(batch_s[1:]),
        rounding_nats=max(_LEAST_NATS, _SAFETY * seen),
    )


def _difference(a: Signals, b: Signals) -> float:
    """The greatest difference of what is decided by; ids swap places only at ties."""
    logprobs = zip(a.top_logprobs, b.top_logprobs, strict=True)
    heads = (a.head_score or 0.0, b.head_score or 0.0)
    pairs = [(a.entropy_nats, b.entropy_nats), heads, *logprobs]
    return max(abs(x - y) for x, y in pairs)
