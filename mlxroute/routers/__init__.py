"""Routers: pure functions of a position's signals. No clock, no I/O, no arrays."""

from mlxroute.routers.entropy import EntropyRouter

__all__ = ["EntropyRouter"]
