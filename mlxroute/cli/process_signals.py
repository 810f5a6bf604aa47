"""Signals that end or stop the process: the terminal is restored, and children end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Final

from mlxroute.terminal_modes import TERMINAL

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# After that, a process that cannot end by itself is ended.
_GRACE_S: Final = 3.0


class Terminated(SystemExit):
    """A signal asked the process to end."""


class ProcessSignals:
    """Turns signals into an orderly end within a block: all its `finally` clauses run.

    A process that is busy for longer than three seconds is ended without them. Signals that are
    ignored, as under nohup, stay ignored.

    Attributes:
        exit_code: 128 plus the number of the signal that ended the block; None if none did.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._wakeup: tuple[int, int] | None = None
        self._outer_wakeup = -1

    def __enter__(self) -> ProcessSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _ENDING:
            self._handle(number, self._end)
        self._handle(signal.SIGTSTP, lambda *_: TERMINAL.stop_process())
        self._handle(signal.SIGCONT, lambda *_: TERMINAL.continue_process())
        self._handle(signal.SIGINT, signal.default_int_handler)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wakeup = reader, writer
        # The interpreter writes to it at once, however long its main thread is busy.
        self._outer_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if self._wakeup is not None:
            TERMINAL.restore()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._outer_wakeup)
            os.close(self._wakeup[1])
        # Whatever failed on the way out follows from the signal, such as a terminal that is gone.
        return self.exit_code is not None

    def _handle(self, number: signal.Signals, handler: Any) -> None:
        if signal.getsignal(number) is not signal.SIG_IGN:
            self._handlers[number] = signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is None:
            self.exit_code = 128 + number
            # An event loop that the signal interrupts may print a traceback when it is deleted.
            sys.unraisablehook = _ignore
            if self._wakeup is not None:
                # A line editor may have replaced the wakeup descriptor.
                with contextlib.suppress(BlockingIOError):
                    os.write(self._wakeup[1], bytes([number]))
            raise Terminated(self.exit_code)


def _ignore(unraisable: object) -> None:
    """Print nothing."""


def _watch(reader: int) -> None:
    """End the process some seconds after a signal that asks for it, unless it ends before."""
    import select

    while data := os.read(reader, 16):
        ending = [number for number in data if number in _ENDING]
        if ending:
            end_in = _GRACE_S
            while select.select([reader], [], [], end_in)[0]:
                if not os.read(reader, 16):
                    os.close(reader)
                    return
            _end_now(128 + ending[0])
    os.close(reader)


def _end_now(code: int) -> None:
    import psutil

    TERMINAL.restore()
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            child.terminate()
    os._exit(code)
