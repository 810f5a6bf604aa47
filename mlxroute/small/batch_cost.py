"""The cost of a batched step compared with a step of one row, and how differently it rounds."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Final

from mlxroute.types import BranchCost, Signals

if TYPE_CHECKING:
    from mlxroute.small.decoder import Decoder

_STEPS: Final = 3
# Later differences are assumed to be at most the largest measured one times this.
_SAFETY_FACTOR: Final = 8.0
# Rounding of float32 logits whose magnitude is some tens.
_MIN_ROUNDING_NATS: Final = 1e-5


class RoundingBound:
    """A bound of the differences between signals of a batch and of a single row, by samples.

    Attributes:
        nats: The bound for logprobs, entropies and head scores.
    """

    def __init__(self) -> None:
        self.nats = _MIN_ROUNDING_NATS

    def add(self, single: Signals, batched: Signals) -> None:
        """Take the two signals of one position into account."""
        self.nats = max(self.nats, _SAFETY_FACTOR * _max_difference(single, batched))


def measure_branch_cost(decoder: Decoder, token_id: int, *, rows: int) -> BranchCost:
    """Measure a few steps from `token_id` on, as one row and as `rows` equal rows.

    The KV cache holds the same tokens afterwards.
    """
    single, single_s = [], []
    batched, batched_s = [], []
    ids = [token_id]
    for _ in range(_STEPS):
        began_s = time.perf_counter()
        single.append(decoder.extend(ids[-1:]))
        single_s.append(time.perf_counter() - began_s)
        ids.append(single[-1].token_id)
    decoder.rollback(_STEPS)
    parents = [0] * rows
    for next_id in ids[:_STEPS]:
        began_s = time.perf_counter()
        batched.append(decoder.branch(parents, [next_id] * rows)[-1])
        batched_s.append(time.perf_counter() - began_s)
        parents = list(range(rows))
    decoder.cache.select(0)
    decoder.rollback(_STEPS)
    rounding = RoundingBound()
    for a, b in zip(single, batched, strict=True):
        rounding.add(a, b)
    return BranchCost(
        rows=rows,
        step_s=statistics.median(single_s[1:]),
        batch_s=statistics.median(batched_s[1:]),
        rounding_nats=rounding.nats,
    )


def _max_difference(a: Signals, b: Signals) -> float:
    """Return the largest difference in entropy, head score and top logprobs.

    Top logprobs are compared by rank: ids change places only where logprobs tie.
    """
    logprobs = zip(a.top_logprobs, b.top_logprobs, strict=True)
    head_scores = (a.head_score or 0.0, b.head_score or 0.0)
    pairs = [(a.entropy_nats, b.entropy_nats), head_scores, *logprobs]
    return max(abs(x - y) for x, y in pairs)
