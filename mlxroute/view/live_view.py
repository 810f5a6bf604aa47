"""Live display of an answer on a terminal: growing text above a status line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rich.console import Console
from rich.style import Style

from mlxroute.types import RunStats, Source, Token, Uploads
from mlxroute.view.live_area import AnswerStream, LiveArea, LiveDisplay
from mlxroute.view.plain_writer import PlainWriter
from mlxroute.view.word_wrap import print_rows, wrap_complete

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
        is_capable = self._console.is_terminal and not self._console.is_dumb_terminal
        # What another encoding than UTF-8 lacks is written as escapes, which are wider.
        if is_capable and not self._console.options.ascii_only:
            self._show_live(answer)
        else:
            self._show_plain(answer)
        return answer.stats()

    def _show_live(self, answer: AnswerStream) -> None:
        area = LiveArea(
            answer,
            threshold=self._threshold,
            chat_uploads=self._chat_uploads,
            clock=self._clock,
        )
        display = LiveDisplay(area, self._console, clock=self._clock)
        try:
            with display.show():
                for event in answer.events():
                    display.apply(event, self._style)
        finally:
            print_rows(self._console, wrap_complete(area.unfinished, width=self._console.width))

    def _show_plain(self, answer: AnswerStream) -> None:
        writer = PlainWriter(self._console.file)
        try:
            for token in answer:
                writer.write(token.text)
        except BaseException:
            # An answer that failed before its first word leaves no empty line.
            if writer.has_text:
                writer.finish()
            raise
        writer.finish()

    def _style(self, token: Token) -> Style:
        if not self._heat:
            return LARGE_STYLE if token.source is Source.LARGE else _SMALL
        shade = heat_style(token.signals.entropy_nats, threshold=self._threshold)
        return shade + _LARGE_HEAT if token.source is Source.LARGE else shade


def heat_style(entropy_nats: float, *, threshold: float) -> Style:
    """Return the shade for an entropy; the scale ends at 1.5 thresholds, but at least at 4 nats."""
    if not math.isfinite(entropy_nats):
        return _HEAT[-1]
    full_nats = _MIN_FULL_HEAT_NATS
    if math.isfinite(threshold):
        full_nats = max(threshold * 1.5, full_nats)
    return _HEAT[min(int(entropy_nats / full_nats * len(_HEAT)), len(_HEAT) - 1)]
