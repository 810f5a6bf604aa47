"""A command on a pseudo-terminal, which a test types into and reads the output of."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from tests.support.command_process import CommandProcess

DEADLINE_S = 60.0
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
_ANSWER_TO_CURSOR_REQUEST = b"\x1b[1;1R"


class PseudoTerminal:
    """A command of `mlxroute` with a pseudo-terminal as its controlling terminal.

    Args:
        arguments: What follows `mlxroute`.
        columns: Width of the terminal.
        stdout: Where stdout goes instead of to the terminal. None (default) for the terminal.
        stderr: Where stderr goes instead of to the terminal. None (default) for the terminal.
        environ: Variables to set for the command.
        fresh: Whether a new interpreter runs it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        columns: int = 80,
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
        environ: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        self._terminal, self._end_of_command = pty.openpty()
        self.resize(columns)
        self._before = termios.tcgetattr(self._terminal)
        self._written = b""
        self._changed = threading.Condition()
        self._command = CommandProcess(
            arguments,
            stdin=self._end_of_command,
            stdout=stdout or self._end_of_command,
            stderr=stderr or self._end_of_command,
            environ={"TERM": "xterm-256color", **(environ or {})},
            terminal=True,
            fresh=fresh,
        )
        self.pid = self._command.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._command.__exit__()
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
        self._command.send(number)

    def wait_stopped(self) -> None:
        """Wait until the command is stopped, as by Ctrl-Z."""
        assert self._command.next_report() == "stopped"

    def drain(self) -> None:
        """Wait until everything that an ended command wrote is in `output`."""
        os.write(self._end_of_command, b"\x1b[0m-end-")
        self.wait_for("-end-")
        with self._changed:
            self._written = self._written.removesuffix(b"\x1b[0m-end-")

    def wait(self) -> int:
        """Wait for the end of the command; return its exit code as a shell does."""
        return self._command.wait() % 256

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
