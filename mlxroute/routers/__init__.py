"""Routers: scores of positions, and thresholds or budgets that decide which are escalated.

Pure functions and immutable values: no clock, no I/O, no arrays.
"""

from mlxroute.routers.budget import BURST, DEFAULT_BUDGET, Budget
from mlxroute.routers.router import (
    EntropyRouter,
    Router,
    always_escalate,
    make_router,
    never_escalate,
)
from mlxroute.routers.scores import SCORES
from mlxroute.routers.threshold import Threshold

__all__ = [
    "BURST",
    "DEFAULT_BUDGET",
    "SCORES",
    "Budget",
    "EntropyRouter",
    "Router",
    "Threshold",
    "always_escalate",
    "make_router",
    "never_escalate",
]
