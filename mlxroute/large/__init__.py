"""The large model: a client of an OpenAI-compatible server, which generates single tokens."""

from mlxroute.large.client import LargeModel

__all__ = ["LargeModel"]
