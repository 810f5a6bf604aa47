"""The large model: one next token over HTTP from an OpenAI-compatible server."""

from mlxroute.large.client import LargeModel

__all__ = ["LargeModel"]
