"""Routers decide from signals alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.errors import UsageError
from mlxroute.routers import EntropyRouter
from tests.fakes import signals


@given(st.floats(min_value=0, max_value=12), st.floats(min_value=-1, max_value=12))
def test_entropy_router_escalates_strictly_above_its_threshold(
    entropy: float, threshold: float
) -> None:
    router = EntropyRouter(threshold)
    assert router.escalates(router.score(signals(1, entropy))) == (entropy > threshold)


@given(st.floats(allow_nan=True))
def test_infinite_thresholds_never_and_always_escalate(score: float) -> None:
    assert not EntropyRouter(math.inf).escalates(score)
    if score != -math.inf:
        assert EntropyRouter(-math.inf).escalates(score)


def test_a_score_that_is_not_a_number_goes_to_the_large_model() -> None:
    assert EntropyRouter(2.5).escalates(math.nan)


def test_a_threshold_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UsageError):
        EntropyRouter(math.nan)
