"""A command on a pseudo-terminal, which a test types into and reads the output of."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

DEADLINE_S = 60.0
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
_ANSWER_TO_CURSOR_REQUEST = b"\x1b[1;1R"
# What a shell does: a session with stdin as its controlling terminal, and the command in front,
# with the default signal actions, which a background job does not have. It reports the command's
# process id, each stop, and the exit code. Then it waits to be killed: macOS closes a terminal for
# everybody when the first process of its session ends.
_SHELL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
report, hold, *command = sys.argv[1:]
pid = os.fork()
if not pid:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    for number in (signal.SIGTTOU, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)
os.write(int(report), b"%d\\n" % pid)
while True:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    os.write(int(report), b"stopped\\n")
os.write(int(report), b"ended %d\\n" % (os.waitstatus_to_exitcode(status) % 256))
os.read(int(hold), 1)
"""


class PseudoTerminal:
    """A command with a pseudo-terminal as its controlling terminal.

    Args:
        command: The command and its arguments.
        columns: Width of the terminal.
        stdout: Where stdout goes instead of to the terminal. None (default) for the terminal.
        stderr: Where stderr goes instead of to the terminal. None (default) for the terminal.
        environ: Variables to set for the command.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 80,
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._terminal, self._end_of_command = pty.openpty()
        self.resize(columns)
        self._before = termios.tcgetattr(self._terminal)
        self._written = b""
        self._changed = threading.Condition()
        report, report_end = os.pipe()
        # Without a buffer, so that `select` sees every line that was not read.
        self._report = open(report, "rb", buffering=0)  # noqa: SIM115
        # Nothing is written to it; its end ends the shell if this process is killed.
        hold, self._hold_end = os.pipe()
        self._shell = subprocess.Popen(
            [sys.executable, "-c", _SHELL, str(report_end), str(hold), *command],
            stdin=self._end_of_command,
            stdout=stdout or self._end_of_command,
            stderr=stderr or self._end_of_command,
            env={**os.environ, "TERM": "xterm-256color", **(environ or {})},
            pass_fds=(report_end, hold),
            start_new_session=True,
        )
        os.close(report_end)
        os.close(hold)
        self.pid = int(self._next_report())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        # The command may have ended.
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self._shell.kill()
        self._shell.wait()
        self._report.close()
        os.close(self._hold_end)
        os.close(self._end_of_command)
        self._reader.join(DEADLINE_S)
        os.close(self._terminal)

    @property
    def output(self) -> str:
        """Everything that was written to the terminal so far."""
        with self._changed:
            return self._written.decode(errors="replace")

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self._terminal)[3] & termios.ECHO)

    @property
    def is_as_before(self) -> bool:
        """Whether the terminal's modes are those from before, and the cursor is shown."""
        output = self.output
        cursor_is_shown = output.rfind(SHOW_CURSOR) >= output.rfind(HIDE_CURSOR)
        return cursor_is_shown and termios.tcgetattr(self._terminal) == self._before

    def type(self, text: str) -> None:
        """Type a text."""
        data = text.encode()
        while data:
            data = data[os.write(self._terminal, data[:1024]) :]

    def resize(self, columns: int) -> None:
        """Change the width of the terminal."""
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def wait_for(self, text: str, *, after: int = 0) -> int:
        """Wait until the output has a text after an offset; return the offset of its end."""
        end = 0

        def has_text() -> bool:
            nonlocal end
            at = self.output.find(text, after)
            end = at + len(text)
            return at >= 0

        self.wait_until(has_text, f"{text!r}")
        return end

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds; raise AssertionError at the deadline or the end."""
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"no {what} in: {self.output[-2000:]!r}"
            with self._changed:
                self._changed.wait(min(left_s, 0.05))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command."""
        os.kill(self.pid, number)

    def wait_stopped(self) -> None:
        """Wait until the command is stopped, as by Ctrl-Z."""
        assert self._next_report() == "stopped"

    def drain(self) -> None:
        """Wait until everything that an ended command wrote is in `output`."""
        os.write(self._end_of_command, b"\x1b[0m-end-")
        self.wait_for("-end-")
        with self._changed:
            self._written = self._written.removesuffix(b"\x1b[0m-end-")

    def wait(self) -> int:
        """Wait for the end of the command; return its exit code."""
        while not (report := self._next_report()).startswith("ended "):
            assert report, "the shell was killed"
        return int(report.removeprefix("ended "))

    def _next_report(self) -> str:
        """Return the shell's next line; raise AssertionError at the deadline."""
        readable, _, _ = select.select([self._report], [], [], DEADLINE_S)
        assert readable, f"the command goes on: {self.output[-2000:]!r}"
        return self._report.readline().decode().rstrip("\n")

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._terminal, 1 << 16)
            except OSError:
                return
            if not data:
                return
            if b"\x1b[6n" in data:
                os.write(self._terminal, _ANSWER_TO_CURSOR_REQUEST)
            with self._changed:
                self._written += data
                self._changed.notify_all()
