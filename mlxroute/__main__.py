"""Runs the command line as `python -m mlxroute`."""

from mlxroute.cli import main

raise SystemExit(main())
