"""Hard rows of logits, and the signals that a kernel must compute from them, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxroute.small.kernels.packed_row import HEADER_SIZE, TOP_K, unpack_signals
from mlxroute.types import LogitFault

Row = npt.NDArray[Any]
ENTROPY_BOUND = 1e-5
VOCABULARIES = (50_257, 151_936, 262_144)


def random_rows(size: int, *, seed: int = 0) -> dict[str, Row]:
    """Return rows like those of language models, and rows unlike them."""
    random = np.random.default_rng(seed)
    masked = random.standard_normal(size) * 3 + 200
    masked[random.random(size) < 0.9] = -math.inf
    masked[0] = 200.0
    return {
        "normal": random.standard_normal(size) * 3,
        "nearly even": random.standard_normal(size) * 1e-3,
        "peaked": random.gumbel(size=size) * 4,
        "mostly masked": masked,
        "coarse, so with ties": np.round(random.standard_normal(size) * 2),
    }


def edge_rows(size: int) -> dict[str, Row]:
    """Return rows that break careless kernels; `size` is at least 1."""
    random = np.random.default_rng(size)
    rows = {
        "all equal": np.full(size, 3.25),
        "all -inf": np.full(size, -math.inf),
        "one +inf": _with(random, size, math.inf, count=1),
        "three +inf": _with(random, size, math.inf, count=3),
        "one NaN": _with(random, size, math.nan, count=1),
        "all NaN": np.full(size, math.nan),
        "NaN and +inf": _with(random, size, math.inf, count=2),
        "+-65504": np.where(np.arange(size) % 2, 65504.0, -65504.0),
        "ties": random.integers(0, 3, size).astype(np.float64),
        "rising": np.linspace(-4.0, 4.0, size),
        "best at the end": np.where(np.arange(size) == size - 1, 9.0, 0.0),
    }
    rows["NaN and +inf"][0] = math.nan
    return rows


def _with(random: np.random.Generator, size: int, value: float, *, count: int) -> Row:
    row = random.standard_normal(size)
    row[random.choice(size, min(count, size), replace=False)] = value
    return row


def check_packed(values: Sequence[float], row: Row, *, where: str, half_ids: bool = False) -> None:
    """Assert that a packed row agrees with float64 about `row`, the kernel's input.

    Order, logits and gaps must be equal. `where` names the row in a failure. `half_ids` skips the
    greedy id, which in half precision is `mlx_lm`'s and has a test of its own.
    """
    exact = np.asarray(row, dtype=np.float64)
    ranked = np.where(np.isnan(exact), -math.inf, exact)
    k = min(TOP_K, exact.size)
    order = _top(ranked, k)
    signals = unpack_signals(values)
    assert signals.top_ids == tuple(order.tolist()), where
    np.testing.assert_array_equal(values[HEADER_SIZE + k :], ranked[order], err_msg=where)
    if not half_ids:
        assert signals.token_id == order[0], where
    flags = LogitFault.NAN * bool(np.isnan(exact).any())
    flags |= LogitFault.POSITIVE_INFINITY * bool(
        ranked.max() == math.inf
    ) | LogitFault.ALL_NEGATIVE_INFINITY * bool(ranked.max() == -math.inf)
    assert signals.flags == flags, where
    if flags & (LogitFault.NAN | LogitFault.ALL_NEGATIVE_INFINITY):
        assert math.isnan(signals.entropy_nats), where
        assert math.isnan(signals.lse) == bool(flags & LogitFault.NAN), where
        return
    lse, logprobs = _logprobs(ranked)
    probs = np.exp(logprobs)
    terms = np.where(probs > 0, logprobs, 0.0)
    entropy = -(probs * terms).sum()
    assert signals.lse == (lse if math.isinf(lse) else _near(lse, 1e-6 * (1 + abs(lse)))), where
    assert signals.entropy_nats == _near(entropy, ENTROPY_BOUND), where
    assert signals.varentropy == _near((probs * (terms + entropy) ** 2).sum(), 1e-4), where
    np.testing.assert_allclose(
        signals.top_logprobs, logprobs[order], rtol=1e-6, atol=1e-5, err_msg=where
    )
    second = probs[order[1]] if k > 1 else 0.0
    assert signals.margin == _near(probs[order[0]] - second, ENTROPY_BOUND), where
    assert signals.logprob == _near(logprobs[signals.token_id], ENTROPY_BOUND), where


def _top(ranked: Row, k: int) -> Row:
    """Return the ids of the k largest values, of equal values the lowest id first."""
    # Sorting a whole vocabulary takes far longer.
    least = np.partition(ranked, ranked.size - k)[ranked.size - k]
    candidates = np.flatnonzero(ranked >= least)
    return candidates[np.argsort(-ranked[candidates], kind="stable")[:k]]


def _logprobs(ranked: Row) -> tuple[float, Row]:
    best = ranked.max()
    if best == math.inf:
        winners = ranked == math.inf
        return math.inf, np.where(winners, -math.log(winners.sum()), -math.inf)
    lse = best + math.log(np.exp(ranked - best).sum())
    return lse, ranked - lse


def _near(value: float, bound: float) -> Any:
    import pytest

    return pytest.approx(value, abs=bound, rel=0)
