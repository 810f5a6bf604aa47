"""Runs the command line as `python -m mlxroute`, and as the command `mlxroute`."""

import os
import signal
from typing import NoReturn

_EXIT_INTERRUPTED = 130


def run() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    # While modules are imported, and after the command, Ctrl-C has nothing to stop but the process.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(_EXIT_INTERRUPTED))
    from mlxroute.cli import main

    try:
        code = main()
    except KeyboardInterrupt:
        # The command was over, and its own handler of Ctrl-C not yet gone.
        os._exit(_EXIT_INTERRUPTED)
    raise SystemExit(code)


if __name__ == "__main__":
    run()
