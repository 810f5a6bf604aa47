"""The decode loop: a small model that asks a large one at the positions a router picks."""

from mlxroute.engine.answer import Answer, generate
from mlxroute.engine.modes.experience import Experience
from mlxroute.engine.options import Options, parse_mode

__all__ = ["Answer", "Experience", "Options", "generate", "parse_mode"]
