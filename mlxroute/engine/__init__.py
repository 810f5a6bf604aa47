"""The engine: decodes with the small model and escalates the positions that a router picks."""

from mlxroute.engine.answer import Answer
from mlxroute.engine.experience import Experience
from mlxroute.engine.generation import generate
from mlxroute.engine.options import Options, parse_mode

__all__ = ["Answer", "Experience", "Options", "generate", "parse_mode"]
