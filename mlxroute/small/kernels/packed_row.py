"""The packed row: what a kernel says about one position, and how the host reads it.

One float32 row a position: `token_id, token_logit, s, t, u`, then the ids of the k largest logits,
then those logits. Ids are exact in float32 up to 2^24. The row carries logits and sums, and the
host does the rest in double precision: order, ties and gaps are exact, and a kernel stays short.

With m the largest logit, y = (x - m) log2(e), s = sum 2^y, t = sum y 2^y and u = sum y^2 2^y:
lse = m + ln s, H = ln s - ln2 t/s, Var(log p) = ln2^2 (u/s - (t/s)^2).

- Order is by falling logit, then by rising id.
- `token_id` is the greedy choice as `mlx_lm` makes it: in half precision the lowest id among those
  of the k best whose logprob, rounded to the logits' dtype, equals the best one's.
- y is at least -125, and m is within the finite float32 range.
- A NaN counts as -inf in the order; it makes s, t and u NaN: flag 1, and lse and entropy are NaN.
- +inf sets flag 2: lse is inf, the entropy that of an even choice among the infinite ones.
- Nothing above -inf sets flag 4: lse is -inf, the entropy is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlxroute.types import Signals

TOP_K = 8
HEADER_SIZE = 5
NAN_SEEN, INF_SEEN, ALL_MASKED = 1, 2, 4
LARGEST_FLOAT = 3.4028234663852886e38
LOG2_E = 1.4426950408889634
# The smallest power of two that keeps a few bits below it in float32's normal range.
LOWEST_EXPONENT = -125.0
LN_2 = math.log(2.0)


def top_count(vocabulary_size: int) -> int:
    """How many of the largest logits a row carries."""
    return min(TOP_K, vocabulary_size)


def unpack_signals(values: Sequence[float], *, has_head: bool = False) -> Signals:
    """One packed row as a frozen value; with `has_head`, a learned head's score ends the row."""
    end = len(values) - has_head
    k = (end - HEADER_SIZE) // 2
    token_id, token_logit, s, t, u = values[:HEADER_SIZE]
    logits = values[HEADER_SIZE + k : end]
    flags = _flags(s, logits[0])
    log_s = math.log(s) if s > 0 else math.nan
    mean = LN_2 * t / s
    lse = _lse(flags, logits[0], log_s)
    broken = bool(flags & (NAN_SEEN | ALL_MASKED))
    logprobs = [token_logit - lse, *(logit - lse for logit in logits)]
    if flags:
        logprobs = [_logprob(logit, lse, log_s) for logit in (token_logit, *logits)]
    top = logprobs[1:]
    return Signals(
        token_id=int(token_id),
        logprob=logprobs[0],
        entropy_nats=math.nan if broken else max(log_s - mean, 0.0),
        varentropy=math.nan if broken else max(LN_2 * LN_2 * u / s - mean * mean, 0.0),
        margin=math.exp(top[0]) - (math.exp(top[1]) if k > 1 else 0.0),
        top_ids=tuple(map(int, values[HEADER_SIZE : HEADER_SIZE + k])),
        top_logprobs=tuple(top),
        lse=lse,
        flags=flags,
        head_score=values[end] if has_head else None,
    )


def _flags(s: float, best: float) -> int:
    flags = NAN_SEEN if math.isnan(s) else 0
    if best == math.inf:
        return flags | INF_SEEN
    return flags | ALL_MASKED if best == -math.inf else flags


def _lse(flags: int, best: float, log_s: float) -> float:
    if flags & NAN_SEEN:
        return math.nan
    return best if flags else best + log_s


def _logprob(logit: float, lse: float, log_s: float) -> float:
    if math.isfinite(lse):
        return logit - lse
    if lse != math.inf:
        return math.nan
    # Infinite logits share all the probability; s counts them.
    return -log_s if logit == math.inf else -math.inf
