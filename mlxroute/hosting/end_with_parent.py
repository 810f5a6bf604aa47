"""Ends a child process when its parent ends, however the parent ends."""

from __future__ import annotations

import os
import sys
import threading


def end_with_parent() -> None:
    """End this process, from a thread of its own, when its standard input is closed.

    The parent holds the other end of that pipe, and the system closes it when the parent ends.
    """
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)
