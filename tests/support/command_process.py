"""Commands of `mlxroute` in processes of their own, which cost a fraction of a new interpreter."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

DEADLINE_S = 60.0


class CommandProcess:
    """A running command.

    Args:
        arguments: What follows `mlxroute`.
        stdin: Where its stdin comes from, such as a file or a descriptor. Nothing by default.
        stdout: Where its stdout goes. Nowhere by default.
        stderr: Where its stderr goes. Nowhere by default.
        environ: Variables to set for it.
        terminal: Whether its stdin is a terminal, which becomes its controlling terminal.
        fresh: Whether a new interpreter runs it, which takes a second for its imports.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdin: IO[bytes] | int | None = None,
        stdout: IO[bytes] | int | None = None,
        stderr: IO[bytes] | int | None = None,
        environ: Mapping[str, str] | None = None,
        terminal: bool = False,
        fresh: bool = False,
    ) -> None:
        request = {
            "arguments": list(arguments),
            "environ": {**os.environ, **(environ or {})},
            "folder": os.getcwd(),
            "terminal": terminal,
            "fresh": fresh,
        }
        report, report_end = os.pipe()
        # Without a buffer, so that `select` sees every line that was not read.
        self._report = open(report, "rb", buffering=0)  # noqa: SIM115
        # Nothing is written to it; its end ends the process that watches the command.
        hold, self._hold_end = os.pipe()
        with open(os.devnull, "r+b", buffering=0) as nothing, tempfile.TemporaryFile() as content:
            content.write(json.dumps(request).encode())
            content.seek(0)
            streams = [_descriptor(s, nothing) for s in (stdin, stdout, stderr)]
            fds = [content.fileno(), *streams, report_end, hold]
            socket.send_fds(_server(), [b"-"], fds)
        os.close(report_end)
        os.close(hold)
        self.pid = int(self.next_report())

    def __enter__(self) -> CommandProcess:
        return self

    def __exit__(self, *_: object) -> None:
        # The command may have ended.
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        os.close(self._hold_end)
        self._report.close()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command."""
        os.kill(self.pid, number)

    def next_report(self) -> str:
        """Return `stopped` or `ended CODE`, whichever comes next; "" if the watcher was killed.

        Raises AssertionError at the deadline.
        """
        readable, _, _ = select.select([self._report], [], [], DEADLINE_S)
        assert readable, "the command goes on"
        return self._report.readline().decode().rstrip("\n")

    def wait(self) -> int:
        """Wait for the end of the command; return its exit code, negative for a signal."""
        while not (report := self.next_report()).startswith("ended "):
            assert report, "the process that watches the command was killed"
        return int(report.removeprefix("ended "))


def run_command(
    *arguments: str,
    stdin: bytes = b"",
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
    environ: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; return its exit code and what it wrote.

    `stdout` and `stderr` are where its output goes instead of into the result.
    """
    with (
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        source.write(stdin)
        source.seek(0)
        with CommandProcess(
            arguments,
            stdin=source,
            stdout=out if stdout is None else stdout,
            stderr=err if stderr is None else stderr,
            environ=environ,
            fresh=fresh,
        ) as command:
            code = command.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())


def _descriptor(stream: IO[bytes] | int | None, nothing: IO[bytes]) -> int:
    stream = nothing if stream is None else stream
    return stream if isinstance(stream, int) else stream.fileno()


@cache
def _server() -> socket.socket:
    """Return the socket of this worker's fork server, which is started on first use."""
    control, end = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fork_server", str(end.fileno())],
        pass_fds=(end.fileno(),),
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    end.close()

    def stop() -> None:
        control.close()
        process.wait()

    atexit.register(stop)
    return control
