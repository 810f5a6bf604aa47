"""The router of an answer document: its score, and its state before the answer."""

from __future__ import annotations

import math
from typing import Final

from mlxroute.answers.document import BudgetRecord, RouterRecord
from mlxroute.errors import UsageError
from mlxroute.routers import BURST, SCORES, Budget, Router, Threshold

_HEAD: Final = "head"


def record_router(router: Router, *, head_sha256: str | None = None) -> RouterRecord:
    """Return the record of a router in its present state.

    Args:
        router: The router.
        head_sha256: The hash of the small model's learned head, which is recorded if the router
            uses it. None (default) without one.
    """
    state = router.state
    head = head_sha256 if router.name == _HEAD else None
    if isinstance(state, Threshold):
        return RouterRecord(router.name, state.threshold, None, state.positions, None, head)
    budget = BudgetRecord(state.resolution, state.rank, state.bucket, state.recent)
    return RouterRecord(router.name, None, state.rate, state.positions, budget, head)


def restore_router(record: RouterRecord) -> Router:
    """Return the router of a record. Raises UsageError for one that cannot be."""
    if record.name not in SCORES:
        raise UsageError(
            f"the recorded router {record.name!r} is unknown; choose a threshold or a budget"
        )
    if record.positions < 0:
        raise UsageError("the recorded router has a negative number of positions")
    if record.threshold is not None:
        return Router(record.name, Threshold(record.threshold, record.positions))
    if record.budget is None or record.state is None:
        raise UsageError("the recorded router has neither a threshold nor a budget")
    return Router(record.name, _restore_budget(record.budget, record.state, record.positions))


def _restore_budget(rate: float, state: BudgetRecord, positions: int) -> Budget:
    """Return the state of a budget. Raises UsageError for values that no budget has."""
    in_range = (
        0 <= rate <= 1
        and 0 <= state.rank <= 1
        and 0 <= state.bucket <= BURST
        and 0 < state.resolution < math.inf
        and state.recent
        and not any(math.isnan(score) for score in state.recent)
    )
    if not in_range:
        raise UsageError("the recorded budget has a value out of range")
    return Budget(
        rate,
        state.resolution,
        state.rank,
        state.bucket,
        state.recent,
        tuple(sorted(state.recent)),
        positions,
    )
