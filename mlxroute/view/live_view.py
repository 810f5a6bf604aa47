"""The answer on a terminal: it scrolls by as it grows, above a status line that is always true."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment, Segments
from rich.style import Style

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
from mlxroute.view.word_wrap import Row, Styled, all_rows, full_rows

_REFRESH_PER_S = 8
_FRAME_S = 1 / 30
_STATUS = Style(dim=True)
_SMALL = Style()
_LARGE = Style(color="magenta", underline=True)
# From no shade at all to certain confusion; the text colour is set too, for any background.
_HEAT = (
    Style(),
    *(Style.parse(f"#000000 on {shade}") for shade in ("#fff0b8", "#ffd978", "#ffb84d", "#ff8f3f")),
    Style.parse("#ffffff on #c22f14"),
)
_HEAT_FULL_NATS = 4.0
_UNDERLINE = Style(underline=True, bold=True)
_PROVISIONAL = Style(dim=True)


class AnswerStream(Protocol):
    """An answer being written: iterating it does the work, the rest may be read meanwhile."""

    def __iter__(self) -> Iterator[Token]: ...

    def events(self) -> Iterator[Event]:
        """The same, with the tokens that are shown early and those that are taken back."""
        ...

    def stats(self) -> RunStats:
        """The figures so far; safe to call from another thread."""
        ...

    @property
    def activity(self) -> Activity: ...

    @property
    def prefill_done(self) -> int: ...

    @property
    def prefill_total(self) -> int: ...


class _Frame:
    """The changing foot of the screen: the row being written and the status line."""

    def __init__(
        self,
        answer: AnswerStream,
        *,
        threshold: float,
        chat_uploads: Callable[[], Uploads] | None,
        clock: Callable[[], float],
    ) -> None:
        self.rest = Styled()
        self.early: dict[int, str] = {}
        self._answer = answer
        self._threshold = threshold
        self._chat_uploads = chat_uploads
        self._clock = clock
        self._state: tuple[Activity, int] | None = None
        self._since = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Read the answer's state now: this also runs while the network is being waited for."""
        stats = self._answer.stats()
        state = (self._answer.activity, stats.tokens)
        if state != self._state:
            self._state, self._since = state, self._clock()
        shown = self.rest.then("".join(self.early.values()), _PROVISIONAL)
        # What is certain stays in sight; of what is not, as much as there is room for.
        most = max(1, options.size.height - 2)
        for row in all_rows(shown, width=options.max_width)[:most] or [[]]:
            yield from row
            yield Segment.line()
        status = status_line(
            stats,
            activity=state[0],
            activity_s=self._clock() - self._since,
            prefill=(self._answer.prefill_done, self._answer.prefill_total),
            routed=self._threshold != math.inf,
            chat=self._chat_uploads() if self._chat_uploads else None,
            width=options.max_width,
        )
        yield Segment(status, _STATUS)

    def take(self, event: Event, style: Callable[[Token], Style], *, width: int) -> list[Row]:
        """Take in what happened; return the rows that no later event can change."""
        match event:
            case Provisional():
                self.early[event.index] = printable(event.text)
            case Retracted():
                for index in [index for index in self.early if index >= event.index]:
                    del self.early[index]
            case Token():
                self.early.pop(event.index, None)
                grown = self.rest.then(printable(event.text), style(event))
                rows, self.rest = full_rows(grown, width=width)
                return rows
        return []


class LiveView:
    """Shows answers on a console; where that is no capable terminal, as plain text.

    `chat_uploads` tells what was sent in the chat so far, this answer's part included.
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
        """Write the answer to its end.

        Rows that cannot change any more are printed for good. Whatever is raised on the way,
        Ctrl-C included, leaves all committed text and a sound terminal behind.
        """
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._show_live(answer)
        else:
            self._show_plain(answer)
        return answer.stats()

    def _show_live(self, answer: AnswerStream) -> None:
        frame = _Frame(
            answer,
            threshold=self._threshold,
            chat_uploads=self._chat_uploads,
            clock=self._clock,
        )
        live = Live(frame, console=self._console, auto_refresh=False, transient=True)
        try:
            try:
                live.start(refresh=True)
                with _refreshed(live) as drawing:
                    self._grow(answer, frame, live, drawing)
            finally:
                live.stop()
        finally:
            self._print(all_rows(frame.rest, width=self._console.width))

    def _grow(
        self,
        answer: AnswerStream,
        frame: _Frame,
        live: Live,
        drawing: AbstractContextManager[object],
    ) -> None:
        drawn_s = -math.inf
        for event in answer.events():
            with drawing:
                rows = frame.take(event, self._style, width=self._console.width)
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
        if rows:
            segments = [segment for row in rows for segment in (*row, Segment.line())]
            self._console.print(Segments(segments), end="", crop=False)

    def _style(self, token: Token) -> Style:
        if not self._heat:
            return _LARGE if token.source is Source.LARGE else _SMALL
        shade = heat_style(token.signals.entropy_nats, threshold=self._threshold)
        return shade + _UNDERLINE if token.source is Source.LARGE else shade


@contextmanager
def _refreshed(live: Live) -> Iterator[AbstractContextManager[object]]:
    """Draw again and again, also while the answer stands still; yield the lock of drawing.

    Inside the lock the foot may change its height: nobody else is counting its rows.
    """
    drawing, over = threading.Lock(), threading.Event()

    def refresh() -> None:
        while not over.wait(1 / _REFRESH_PER_S):
            with drawing:
                live.refresh()

    thread = threading.Thread(target=refresh, daemon=True, name="mlxroute-view")
    thread.start()
    try:
        yield drawing
    finally:
        over.set()
        thread.join()


def heat_style(entropy_nats: float, *, threshold: float) -> Style:
    """The shade for an entropy on a scale from 0 to what is high for this threshold."""
    if not math.isfinite(entropy_nats):
        return _HEAT[-1]
    full = max(threshold * 1.5, _HEAT_FULL_NATS) if math.isfinite(threshold) else _HEAT_FULL_NATS
    return _HEAT[min(int(entropy_nats / full * len(_HEAT)), len(_HEAT) - 1)]
