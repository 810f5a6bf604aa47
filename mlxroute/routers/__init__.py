"""Routers: a score of each position, and the pace at which the highest are escalated.

Values only: no clock, no I/O, no arrays.
"""

from mlxroute.routers.budget import BURST, Budget
from mlxroute.routers.router import EntropyRouter, Router, make_router
from mlxroute.routers.scores import SCORES
from mlxroute.routers.threshold import Threshold

__all__ = ["BURST", "SCORES", "Budget", "EntropyRouter", "Router", "Threshold", "make_router"]
