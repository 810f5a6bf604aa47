"""The command line: one file per command in `commands`, shared code beside it."""

from mlxroute.cli.app import main

__all__ = ["main"]
