"""The part of the screen that is redrawn while an answer is generated."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.style import Style

from mlxroute.answers.document import AnswerDocument
from mlxroute.safe_text import printable
from mlxroute.terminal_modes import TERMINAL
from mlxroute.types import Activity, Event, Provisional, Retracted, RunStats, Token, Uploads
from mlxroute.view.summary import status_line
from mlxroute.view.word_wrap import Row, StyledText, print_rows, wrap_complete, wrap_growing

_REFRESH_PER_S = 8
_FRAME_S = 1 / 30
_REWRAPPING_PROGRAMS = ("Apple_Terminal", "iTerm.app", "WezTerm", "ghostty", "vscode")
# Set by tmux, GNOME Terminal and its relatives, Konsole, kitty, Alacritty and Windows Terminal.
REWRAPPING_VARIABLES = (
    "TMUX",
    "VTE_VERSION",
    "KONSOLE_VERSION",
    "KITTY_WINDOW_ID",
    "ALACRITTY_WINDOW_ID",
    "WT_SESSION",
)
_STATUS = Style(dim=True)
_PROVISIONAL = Style(dim=True)


class AnswerStream(Protocol):
    """An answer that is generated while it is iterated; its properties may be read meanwhile."""

    def __iter__(self) -> Iterator[Token]: ...

    def events(self) -> Iterator[Event]:
        """Iterate over the tokens and over provisional and retracted ones."""
        ...

    def stats(self) -> RunStats:
        """Return the figures so far; may be called from any thread."""
        ...

    @property
    def activity(self) -> Activity:
        """What the engine is doing."""
        ...

    @property
    def prefill_done(self) -> int:
        """Number of prompt tokens processed."""
        ...

    @property
    def prefill_total(self) -> int:
        """Number of prompt tokens."""
        ...


class DocumentedStream(AnswerStream, Protocol):
    """An answer that can be saved with the origin of its tokens."""

    def document(self) -> AnswerDocument:
        """Return the document of the answer so far."""
        ...


class LiveArea:
    """The part of the screen that is redrawn: unfinished rows and the status line.

    Attributes:
        unfinished: Committed text of less than a row.
        provisional: Text of the provisional tokens, by index.
        drawn_cells: Cells in each row of the last drawing.
    """

    def __init__(
        self,
        answer: AnswerStream,
        *,
        threshold: float,
        chat_uploads: Callable[[], Uploads] | None,
        clock: Callable[[], float],
    ) -> None:
        self.unfinished = StyledText()
        self.provisional: dict[int, str] = {}
        self.drawn_cells: list[int] = []
        self._answer = answer
        self._threshold = threshold
        self._chat_uploads = chat_uploads
        self._clock = clock
        self._state: tuple[Activity, int] | None = None
        self._state_began_s = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the answer's present state; also called while the engine waits for a reply."""
        stats = self._answer.stats()
        state = (self._answer.activity, stats.tokens)
        if state != self._state:
            self._state, self._state_began_s = state, self._clock()
        text = self.unfinished.append("".join(self.provisional.values()), _PROVISIONAL)
        # If the screen is too short, the end of the provisional text is left out.
        max_rows = max(1, options.size.height - 2)
        rows = wrap_complete(text, width=options.max_width)[:max_rows] or [[]]
        status = status_line(
            stats,
            activity=state[0],
            activity_s=self._clock() - self._state_began_s,
            prefill=(self._answer.prefill_done, self._answer.prefill_total),
            routed=self._threshold != math.inf,
            chat=self._chat_uploads() if self._chat_uploads else None,
            width=options.max_width,
        )
        rows.append([Segment(status, _STATUS)])
        self.drawn_cells = [Segment.get_line_length(row) for row in rows]
        for row in rows[:-1]:
            yield from row
            yield Segment.line()
        yield from rows[-1]

    def apply(self, event: Event, style: Callable[[Token], Style], *, width: int) -> list[Row]:
        """Update the text by an event and return the rows that no later event can change."""
        match event:
            case Provisional():
                self.provisional[event.index] = printable(event.text)
            case Retracted():
                for index in [index for index in self.provisional if index >= event.index]:
                    del self.provisional[index]
            case Token():
                self.provisional.pop(event.index, None)
                text = self.unfinished.append(printable(event.text), style(event))
                rows, self.unfinished = wrap_growing(text, width=width)
                return rows
        return []


class LiveDisplay:
    """Draws a live area at the end of the screen, and final rows above it.

    Args:
        area: What is drawn.
        console: Where it is drawn.
        clock: Returns the time in seconds.
    """

    def __init__(self, area: LiveArea, console: Console, *, clock: Callable[[], float]) -> None:
        self._area = area
        self._console = console
        self._clock = clock
        self._drawn_s = -math.inf
        self._live = self._new_live()
        self._width = console.width
        self._lock = threading.Lock()

    @contextmanager
    def show(self) -> Iterator[None]:
        """Show the area in the block, redraw it at a fixed rate in a thread, and remove it."""
        is_over = threading.Event()

        def redraw() -> None:
            while not is_over.wait(1 / _REFRESH_PER_S):
                with self._lock:
                    self._refresh()

        thread = threading.Thread(target=redraw, daemon=True, name="mlxroute-view")
        with TERMINAL.redraw(pause=self._pause, resume=self._resume):
            thread.start()
            try:
                yield
            finally:
                is_over.set()
                thread.join()

    def apply(self, event: Event, style: Callable[[Token], Style]) -> None:
        """Update the area by an event, and print the rows that are final now above it."""
        with TERMINAL.undisturbed(), self._lock:
            rows = self._area.apply(event, style, width=self._console.width)
            if rows:
                self._follow_resize()
                print_rows(self._console, rows)
            elif self._clock() - self._drawn_s >= _FRAME_S:
                self._refresh()
                self._drawn_s = self._clock()

    def _refresh(self) -> None:
        self._follow_resize()
        self._live.refresh()

    def _follow_resize(self) -> None:
        """Erase the rows that the area takes more than when it was drawn, if it is narrower now."""
        width, drawn_width = self._console.width, self._width
        self._width = width
        if width >= drawn_width or not _rewraps():
            return
        more = sum(math.ceil(cells / width) - 1 for cells in self._area.drawn_cells if cells)
        erase_line = (ControlType.ERASE_IN_LINE, 2)
        erase_row = ((ControlType.CURSOR_UP, 1), erase_line)
        self._console.control(Control(ControlType.CARRIAGE_RETURN, erase_line, *erase_row * more))

    def _pause(self) -> None:
        with self._lock:
            self._live.stop()

    def _resume(self) -> None:
        with self._lock:
            # The cursor may be anywhere, which a stopped display does not expect.
            self._live, self._width = self._new_live(), self._console.width
            self._live.start(refresh=True)

    def _new_live(self) -> Live:
        return Live(self._area, console=self._console, auto_refresh=False, transient=True)


def _rewraps() -> bool:
    """Return whether the terminal is known to wrap the rows that it shows if it becomes narrower.

    In a terminal that cuts them off, erasing more rows would remove text of the answer.
    """
    if "STY" in os.environ:  # GNU screen cuts off.
        return False
    is_known = os.environ.get("TERM_PROGRAM") in _REWRAPPING_PROGRAMS
    return is_known or any(name in os.environ for name in REWRAPPING_VARIABLES)
