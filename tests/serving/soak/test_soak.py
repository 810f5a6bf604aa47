"""Many clients, some of which leave, and faults of the large side: nothing is wrong or left."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mlxroute import LargeModel, SmallModel
from mlxroute.backend.load import load
from tests.serving.soak.planned_requests import (
    CONTEXT,
    choose_large_token,
    make_plans,
    make_variants,
)
from tests.serving.soak.served_process import LIMITS
from tests.serving.soak.soak_run import SoakRun, served
from tests.support.negotiated import honest
from tests.support.network_faults import FaultProxy
from tests.support.tiny import make_tiny_model

_SEED = 20
_CLIENTS = 16
_MAX_GROWTH_BYTES = 100e6


@pytest.mark.parametrize(
    ("requests", "answers"), [(30, 5), pytest.param(1000, 40, marks=pytest.mark.heavy)]
)
def test_soak(tmp_path: Path, requests: int, answers: int) -> None:
    path = make_tiny_model(tmp_path / "tiny", context=CONTEXT)
    proxy = FaultProxy(honest(choose_large_token))
    with proxy.server, served(path, proxy.server.url) as endpoint:
        rng = random.Random(_SEED)
        variants = make_variants(rng, answers)
        small = SmallModel(*load(path), name="tiny")
        with LargeModel(proxy.server.url) as large:
            alone = [variant.write_alone(small, large) for variant in variants]
        run = SoakRun(endpoint, proxy, variants, alone)
        plans = make_plans(rng, variants, requests)
        run.play(plans, clients=_CLIENTS, faults=rng)
        left, state = run.settled_state(), endpoint.state()
        print(run.report())  # noqa: T201

        assert run.errors == []
        assert run.ends.total() == requests
        assert left == {}
        assert state["cache_bytes"] <= LIMITS.cache_bytes
        assert state["document_bytes"] <= LIMITS.store_bytes
        assert run.growth_bytes() < _MAX_GROWTH_BYTES
        # Everything is checked again once the faults are over.
        after = SoakRun(endpoint, proxy, variants, alone)
        after.play([plan for plan in plans if not plan.leaving][:12])
        assert after.errors == []
        assert after.ends == {"equal": 12}
