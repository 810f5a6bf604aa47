"""Runs generated code in a process without network, with limits on time and memory."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from mlxroute.errors import UsageError

_CHILD: Final = Path(__file__).with_name("sandbox_child.py")
# Above the limit of the child's CPU time, because other processes may take their share.
_TIMEOUT_S: Final = 60.0
_SECRET_BYTES: Final = 16
# The profile of macOS's `sandbox-exec`.
_PROFILE: Final = "(version 1)(allow default)(deny network*)(deny file-write*)"


def run_program(program: str, *, timeout_s: float = _TIMEOUT_S) -> bool:
    """Return whether a Python program runs to its end, without an exception and within limits.

    The program has no network, can write no file, and has 5 s of CPU time and 1 GiB of memory;
    macOS does not limit memory. It can read files and has none of this process's environment. It
    cannot end early in a way that counts as its end. Raises UsageError where a process cannot be
    isolated so.
    """
    secret = secrets.token_hex(_SECRET_BYTES).encode()
    data = secret + b"\n" + program.encode("utf-8", errors="replace")
    with tempfile.TemporaryDirectory() as folder:
        output = _run_child(data, folder, timeout_s)
    if output.startswith(b"isolation: "):
        raise UsageError(
            "generated code is run only in isolation, which this system does not allow:"
            f" {output.removeprefix(b'isolation: ').decode(errors='replace')}"
        )
    return output == secret


def _run_child(data: bytes, folder: str, timeout_s: float) -> bytes:
    """Run the child with this input and return its output; it is empty after the timeout."""
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
        except subprocess.TimeoutExpired:
            return b""
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
