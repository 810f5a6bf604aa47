"""The command line: parse, build, run, report. Heavy imports happen inside the commands."""

from mlxroute.cli.app import main

__all__ = ["main"]
