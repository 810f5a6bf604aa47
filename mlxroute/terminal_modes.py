"""Modes of the terminal: what an answer changes, and what is put back however the process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_SHOW_CURSOR: Final = b"\x1b[?25h"
# Marks pasted text, so that its lines are not taken for messages.
_MARK_PASTES: Final = b"\x1b[?2004h"
_LEAVE_PASTES: Final = b"\x1b[?2004l"
_LOCAL_FLAGS: Final = 3


class TerminalModes:
    """The terminal of this process, which is restored at the end and while it is stopped."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None
        self._hidden: list[Any] | None = None
        self._display: tuple[Callable[[], None], Callable[[], None]] | None = None
        self._cursor_is_hidden = False
        self._marks_pastes = False
        self._blocks = 0
        self._stop_is_pending = False

    def restore(self) -> None:
        """Undo what the blocks below have changed. Safe in a signal handler and in a thread.

        A process in the background leaves the modes alone: they belong to the one in front.
        """
        if (terminal := _terminal()) is not None and self._before is not None:
            _set_modes(terminal, self._before)
        if self._marks_pastes:
            _write(_LEAVE_PASTES)
        if self._cursor_is_hidden:
            _write(_SHOW_CURSOR)

    @contextmanager
    def hide_typing(self, *, by_key: bool = False) -> Iterator[None]:
        """Do not echo what is typed in the block; it stays in the terminal's queue.

        Args:
            by_key: Whether keys are queued one by one, for a line editor that reads them later. If
                not, the default, they are queued by lines, for the shell.
        """
        terminal = _terminal()
        before = None if terminal is None else _modes(terminal)
        if terminal is None or before is None or self._before is not None:
            yield
            return
        self._before, self._hidden = before, [*before]
        self._hidden[_LOCAL_FLAGS] &= ~(termios.ECHO | (termios.ICANON if by_key else 0))
        try:
            _set_modes(terminal, self._hidden)
            yield
        finally:
            _set_modes(terminal, before)
            if self._marks_pastes:
                _write(_LEAVE_PASTES)
            self._before = self._hidden = None
            self._marks_pastes = False

    @contextmanager
    def redraw(self, *, pause: Callable[[], None], resume: Callable[[], None]) -> Iterator[None]:
        """Show a display that redraws a part of the screen in the block, and hide what is typed.

        Args:
            pause: Removes the display from the screen, at the end and while the process is stopped.
            resume: Draws the display, at the start and later again, where the cursor is then.
        """
        outer, self._display = self._display, (pause, resume)
        self._cursor_is_hidden = True
        try:
            self._mark_pastes()
            # With stdout in a pipe, the keys may belong to the program that reads it.
            with self.hide_typing() if os.isatty(1) else contextlib.nullcontext():
                try:
                    with self.undisturbed():
                        resume()
                    yield
                finally:
                    # A stop in between would draw the display again, for good.
                    with self.undisturbed():
                        pause()
                        self._display = outer
        finally:
            self._display = outer
        self._cursor_is_hidden = outer is not None

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put off Ctrl-C and a stop of the process until the end of the block."""
        with _interrupts_put_off():
            self._blocks += 1
            try:
                yield
            finally:
                self._blocks -= 1
                if self._stop_is_pending and not self._blocks:
                    self.stop_process()

    def stop_process(self) -> None:
        """Restore the terminal and stop the process as Ctrl-Z does; return when it continues."""
        self._stop_is_pending = bool(self._blocks)
        if self._stop_is_pending:
            return
        pause, resume = self._display or (_nothing, _nothing)
        pause()
        terminal = _terminal()
        modes = None if terminal is None else _modes(terminal)
        self.restore()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        if terminal is not None and modes is not None:
            _set_modes(terminal, modes)
        if self._display is not None:
            self._mark_pastes()
        resume()

    def _mark_pastes(self) -> None:
        """Let the terminal mark what is pasted for a line editor, which unmarks it at its end."""
        if self._hidden is not None and not self._hidden[_LOCAL_FLAGS] & termios.ICANON:
            self._marks_pastes = True
            _write(_MARK_PASTES)

    def continue_process(self) -> None:
        """Hide what is typed again, after the shell has set modes of its own."""
        # Without a display, a line editor has modes of its own.
        if self._display and self._hidden and (terminal := _terminal()) is not None:
            _set_modes(terminal, self._hidden)


TERMINAL: Final = TerminalModes()
"""The terminal of this process."""


@contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a Ctrl-C at the end of the block instead of within it."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if received:
            raise KeyboardInterrupt


def _nothing() -> None:
    """Stand for a display that does not exist."""


def _terminal(*descriptors: int) -> int | None:
    """Return the first of the standard streams, or of the given ones, that is a terminal."""
    return next((fd for fd in descriptors or (0, 1, 2) if os.isatty(fd)), None)


def _write(sequence: bytes) -> None:
    """Write a control sequence to the terminal at once, past the buffers of the streams."""
    if (output := _terminal(1, 2)) is not None:
        with contextlib.suppress(OSError):
            os.write(output, sequence)


def _modes(terminal: int) -> list[Any] | None:
    try:
        return termios.tcgetattr(terminal)
    except termios.error:
        return None


def _set_modes(terminal: int, modes: list[Any]) -> None:
    # In the background this would stop the process.
    with contextlib.suppress(OSError, termios.error):
        if os.tcgetpgrp(terminal) == os.getpgrp():
            termios.tcsetattr(terminal, termios.TCSANOW, modes)
