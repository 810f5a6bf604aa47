"""The command line: one file per command in `commands`, what they share beside it."""

from mlxroute.cli.app import main

__all__ = ["main"]
