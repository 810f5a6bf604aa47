"""The large model: a client of an OpenAI-compatible server, which generates single tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxroute.large.client import LargeModel

__all__ = ["LargeModel"]


def __getattr__(name: str) -> object:
    # Imported on first use: the search for running servers needs no `requests`.
    if name == "LargeModel":
        from mlxroute.large.client import LargeModel

        return LargeModel
    raise AttributeError(f"module 'mlxroute.large' has no attribute {name!r}")
