"""The decode loop: a small model that asks a large one at the positions a router picks."""

from mlxroute.engine.answer import Answer, Options, generate

__all__ = ["Answer", "Options", "generate"]
