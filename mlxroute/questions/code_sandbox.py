"""Runs generated code in a process without network, with limits on time and memory."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from mlxroute.errors import UsageError
from mlxroute.safe_text import os_error_text

_CHILD: Final = Path(__file__).with_name("sandbox_child.py")
# Above the limit of the child's CPU time, because other processes may take their share.
_TIMEOUT_S: Final = 60.0
_SECRET_BYTES: Final = 16
_ISOLATED: Final = b"isolated\n"
# The profile of macOS's `sandbox-exec`; of two rules for a file the last one counts.
_PROFILE: Final = (
    "(version 1)(allow default)(deny network*)(deny file-write*)"
    '(allow file-write* (literal "/dev/null"))'
)


def run_program(program: str, *, timeout_s: float = _TIMEOUT_S) -> bool:
    """Return whether a Python program runs to its end, without an exception and within limits.

    The program has no network, can write no file, and has 5 s of CPU time and 1 GiB of memory;
    macOS does not limit memory. On Linux it cannot signal other processes, and those that it
    starts, which only root's programs can, have the same limits each and end with it. It can read
    files, but imports the standard library alone and has no environment. A program that
    ends early does not pass, because the child writes a secret after it. The program runs in the
    child's interpreter, so one that is written to find the secret can: this protects from mistakes,
    not from attacks. Raises UsageError where a process cannot be isolated so.
    """
    secret = secrets.token_hex(_SECRET_BYTES).encode()
    data = secret + b"\n" + program.encode("utf-8", errors="replace")
    try:
        with tempfile.TemporaryDirectory() as folder:
            output = _run_child(data, folder, timeout_s)
    except OSError as exc:
        raise _not_isolated(os_error_text(exc)) from exc
    if not output.startswith(_ISOLATED):
        reason = output.removeprefix(b"isolation: ").decode(errors="replace")
        raise _not_isolated(reason or "its process did not start")
    return output == _ISOLATED + secret


def _not_isolated(reason: str) -> UsageError:
    return UsageError(
        f"generated code is run only in isolation, which this system does not allow: {reason}"
    )


def _run_child(data: bytes, folder: str, timeout_s: float) -> bytes:
    """Run the child with this input and return its output, up to the timeout."""
    command = [sys.executable, "-I", "-S", "-B", str(_CHILD)]
    if sys.platform == "darwin":
        command = ["sandbox-exec", "-p", _PROFILE, *command]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        start_new_session=True,
    ) as child:
        try:
            return child.communicate(data, timeout=timeout_s)[0]
        except subprocess.TimeoutExpired as exc:
            return bytes(exc.output or b"")
        finally:
            # Processes that the program started may still run when the child has ended.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
