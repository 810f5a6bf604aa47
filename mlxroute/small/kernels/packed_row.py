"""The packed row: what the kernel computes about one position, and how the host reads it.

One float32 row per position: `token_id, token_logit, s, t, u`, then the ids of the k largest
logits, then those logits. Ids are exact in float32 up to 2^24. The kernel returns logits and sums,
and the host derives the rest in double precision: order, ties and gaps are exact, and the kernel
stays short.

With the largest logit m and y = (x - m) log2(e) for each logit x, the sums over the row are
s = sum 2^y, t = sum y 2^y and u = sum y^2 2^y. With p the softmax of the row, the definitions of
entropy, H = -sum p ln p, and varentropy, Var(ln p), give

    logsumexp = m + ln s
    H         = ln s - ln2 t/s
    Var(ln p) = ln2^2 (u/s - (t/s)^2)

since ln p = (y - log2 s) ln2, so that m cancels. One pass computes the sums, moving them to a new
reference when a larger m comes: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(arXiv 1805.02867), there for s alone.

- The order is by falling logit, then by rising id.
- `token_id` is the greedy choice of `mlx_lm`: in half precision the lowest id among those of the k
  largest whose logprob, rounded to the logits' dtype, equals the best one's.
- y is at least -125, and m is limited to the finite float32 range.
- A NaN is ordered as -inf and makes s, t and u NaN: `LogitFault.NAN`, logsumexp and entropy NaN.
- `LogitFault.POSITIVE_INFINITY`: logsumexp is inf, the entropy that of an even choice among the
  infinite logits.
- `LogitFault.ALL_NEGATIVE_INFINITY`: logsumexp is -inf, the entropy NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlxroute.types import LogitFault, Signals

TOP_K = 8
HEADER_SIZE = 5
LARGEST_FLOAT = 3.4028234663852886e38
LOG2_E = 1.4426950408889634
# The smallest power of two that keeps a few bits below it in float32's normal range.
LOWEST_EXPONENT = -125.0
LN_2 = math.log(2.0)


def top_count(vocabulary_size: int) -> int:
    """Return how many of the largest logits a packed row holds."""
    return min(TOP_K, vocabulary_size)


def unpack_signals(values: Sequence[float], *, has_head: bool = False) -> Signals:
    """Return the signals of one packed row; with `has_head` a learned head's score ends the row."""
    end = len(values) - has_head
    k = (end - HEADER_SIZE) // 2
    token_id, token_logit, s, t, u = values[:HEADER_SIZE]
    logits = values[HEADER_SIZE + k : end]
    faults = _find_faults(s, logits[0])
    is_undefined = bool(faults) and faults != LogitFault.POSITIVE_INFINITY
    log_s = math.log(s) if s > 0 else math.nan
    mean = LN_2 * t / s
    lse = _log_sum_exp(faults, logits[0], log_s)
    logprobs = [token_logit - lse, *(logit - lse for logit in logits)]
    if faults:
        logprobs = [_logprob(logit, lse, log_s) for logit in (token_logit, *logits)]
    top = logprobs[1:]
    return Signals(
        token_id=int(token_id),
        logprob=logprobs[0],
        entropy_nats=math.nan if is_undefined else max(log_s - mean, 0.0),
        varentropy=math.nan if is_undefined else max(LN_2 * LN_2 * u / s - mean * mean, 0.0),
        margin=math.exp(top[0]) - (math.exp(top[1]) if k > 1 else 0.0),
        top_ids=tuple(map(int, values[HEADER_SIZE : HEADER_SIZE + k])),
        top_logprobs=tuple(top),
        lse=lse,
        flags=faults,
        head_score=values[end] if has_head else None,
    )


def _find_faults(s: float, best: float) -> LogitFault:
    """Return the faults of a row from its sum of weights and its largest logit."""
    faults = LogitFault.NAN if math.isnan(s) else LogitFault.NONE
    if best == math.inf:
        return faults | LogitFault.POSITIVE_INFINITY
    return faults | LogitFault.ALL_NEGATIVE_INFINITY if best == -math.inf else faults


def _log_sum_exp(faults: LogitFault, best: float, log_s: float) -> float:
    if not faults:
        return best + log_s
    return math.nan if LogitFault.NAN in faults else best


def _logprob(logit: float, lse: float, log_s: float) -> float:
    """Return the logprob of a logit in a row with faults."""
    if math.isfinite(lse):
        return logit - lse
    if lse != math.inf:
        return math.nan
    # Infinite logits share all the probability; s counts them.
    return -log_s if logit == math.inf else -math.inf
