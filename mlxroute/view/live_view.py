"""Live display of an answer on a terminal: growing text above a status line."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style

from mlxroute.answers.document import AnswerDocument
from mlxroute.safe_text import printable
from mlxroute.types import (
    Activity,
    Event,
    Provisional,
    Retracted,
    RunStats,
    Source,
    Token,
    Uploads,
)
from mlxroute.view.plain_writer import PlainWriter
from mlxroute.view.summary import status_line
from mlxroute.view.word_wrap import Row, StyledText, print_rows, wrap_complete, wrap_growing

_REFRESH_PER_S = 8
_FRAME_S = 1 / 30
_STATUS = Style(dim=True)
_SMALL = Style()
LARGE_STYLE = Style(color="magenta", underline=True)
# From low to high entropy. The text colour is set too, so that any terminal background works.
_HEAT = (
    Style(),
    *(Style.parse(f"#000000 on {shade}") for shade in ("#fff0b8", "#ffd978", "#ffb84d", "#ff8f3f")),
    Style.parse("#ffffff on #c22f14"),
)
_MIN_FULL_HEAT_NATS = 4.0
_LARGE_HEAT = Style(underline=True, bold=True)
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


class _LiveArea:
    """The part of the screen that is redrawn: unfinished rows and the status line.

    Attributes:
        unfinished: Committed text of less than a row.
        provisional: Text of the provisional tokens, by index.
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
        for row in wrap_complete(text, width=options.max_width)[:max_rows] or [[]]:
            yield from row
            yield Segment.line()
        status = status_line(
            stats,
            activity=state[0],
            activity_s=self._clock() - self._state_began_s,
            prefill=(self._answer.prefill_done, self._answer.prefill_total),
            routed=self._threshold != math.inf,
            chat=self._chat_uploads() if self._chat_uploads else None,
            width=options.max_width,
        )
        yield Segment(status, _STATUS)

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


class LiveView:
    """Shows answers live on a terminal, or as plain text where the console is not a capable one.

    Args:
        console: Where answers are written.
        heat: Whether tokens are shaded by entropy. If not, large tokens are coloured.
        threshold: Entropy threshold in nats, for the heat scale; inf if nothing can be escalated.
        chat_uploads: Returns what has been sent in the chat, including this answer. None (default)
            outside a chat.
        clock: Returns the time in seconds. The monotonic clock by default.
    """

    def __init__(
        self,
        console: Console,
        *,
        heat: bool,
        threshold: float,
        chat_uploads: Callable[[], Uploads] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._heat = heat
        self._threshold = threshold
        self._chat_uploads = chat_uploads
        self._clock = clock

    def show(self, answer: AnswerStream) -> RunStats:
        """Generate and show an answer, and return its figures.

        Final rows are printed once. After any exception, including Ctrl-C, all committed text is on
        the screen and the terminal is restored.
        """
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._show_live(answer)
        else:
            self._show_plain(answer)
        return answer.stats()

    def _show_live(self, answer: AnswerStream) -> None:
        area = _LiveArea(
            answer,
            threshold=self._threshold,
            chat_uploads=self._chat_uploads,
            clock=self._clock,
        )
        live = Live(area, console=self._console, auto_refresh=False, transient=True)
        try:
            try:
                live.start(refresh=True)
                with _refresh_in_background(live) as drawing_lock:
                    self._draw_events(answer, area, live, drawing_lock)
            finally:
                live.stop()
        finally:
            self._print(wrap_complete(area.unfinished, width=self._console.width))

    def _draw_events(
        self,
        answer: AnswerStream,
        area: _LiveArea,
        live: Live,
        drawing_lock: AbstractContextManager[object],
    ) -> None:
        drawn_s = -math.inf
        for event in answer.events():
            with drawing_lock:
                rows = area.apply(event, self._style, width=self._console.width)
                if rows:
                    self._print(rows)
                elif self._clock() - drawn_s >= _FRAME_S:
                    live.refresh()
                    drawn_s = self._clock()

    def _show_plain(self, answer: AnswerStream) -> None:
        writer = PlainWriter(self._console.file)
        try:
            for token in answer:
                writer.write(token.text)
        finally:
            writer.finish()

    def _print(self, rows: list[Row]) -> None:
        print_rows(self._console, rows)

    def _style(self, token: Token) -> Style:
        if not self._heat:
            return LARGE_STYLE if token.source is Source.LARGE else _SMALL
        shade = heat_style(token.signals.entropy_nats, threshold=self._threshold)
        return shade + _LARGE_HEAT if token.source is Source.LARGE else shade


@contextmanager
def _refresh_in_background(live: Live) -> Iterator[AbstractContextManager[object]]:
    """Redraw at a fixed rate in a thread, also between events; yield the lock for drawing.

    The height of the live area may change only inside the lock, as Live counts its rows.
    """
    drawing_lock, is_over = threading.Lock(), threading.Event()

    def refresh() -> None:
        while not is_over.wait(1 / _REFRESH_PER_S):
            with drawing_lock:
                live.refresh()

    thread = threading.Thread(target=refresh, daemon=True, name="mlxroute-view")
    thread.start()
    try:
        yield drawing_lock
    finally:
        is_over.set()
        thread.join()


def heat_style(entropy_nats: float, *, threshold: float) -> Style:
    """Return the shade for an entropy; the scale ends at 1.5 thresholds, but at least at 4 nats."""
    if not math.isfinite(entropy_nats):
        return _HEAT[-1]
    full_nats = _MIN_FULL_HEAT_NATS
    if math.isfinite(threshold):
        full_nats = max(threshold * 1.5, full_nats)
    return _HEAT[min(int(entropy_nats / full_nats * len(_HEAT)), len(_HEAT) - 1)]
