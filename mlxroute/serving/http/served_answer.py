"""One answer of a request: its events for the event loop, its figures and its document."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable

from mlxroute.answers.recorded_answer import AnswerOrigin
from mlxroute.answers.reply_recorder import ReplyRecorder
from mlxroute.serving.requests import SchedulerClosed, ServedEvent
from mlxroute.serving.running_answer import RunningAnswer
from mlxroute.types import RunStats, StopReason, Token


class ServedAnswer:
    """An answer of the scheduler, whose events the event loop can wait for.

    Args:
        running: The answer.
        origin: What it is made from.
        recorder: The large model that it asks; None if it asks none.
        on_end: Called in another thread once the answer has ended, before `events` ends.

    Attributes:
        running: As given.
        origin: As given.
        recorder: As given.
        tokens: The committed tokens so far.
    """

    def __init__(
        self,
        running: RunningAnswer,
        origin: AnswerOrigin,
        recorder: ReplyRecorder | None,
        *,
        on_end: Callable[[ServedAnswer], None],
    ) -> None:
        self.running = running
        self.origin = origin
        self.recorder = recorder
        self.tokens: list[Token] = []
        self._on_end = on_end
        self._failure: BaseException | None = None
        self._is_read = False
        self._events: asyncio.Queue[ServedEvent | None] = asyncio.Queue()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to hand the events to the event loop."""
        threading.Thread(
            target=self._forward, args=(loop,), name="mlxroute-events", daemon=True
        ).start()

    async def events(self) -> AsyncGenerator[ServedEvent, None]:
        """Yield the events. Raises the error that ended the answer, if one did."""
        while (event := await self._events.get()) is not None:
            yield event
        self._is_read = True
        self._raise_failure()

    async def wait(self) -> None:
        """Wait for the end of the answer, also a second time. Raises as `events`."""
        if self._is_read:
            self._raise_failure()
        else:
            async for _ in self.events():
                pass

    def cancel(self) -> None:
        """End the answer within one decode step."""
        self.running.cancel()

    @property
    def stats(self) -> RunStats | None:
        """The engine's figures so far; None before the answer's turn."""
        return self.running.stats

    @property
    def has_failed(self) -> bool:
        """Whether an error has ended the answer."""
        return self._failure is not None

    @property
    def calls(self) -> int:
        """Calls to the large model so far."""
        return 0 if self.stats is None else self.stats.calls

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(token.text for token in self.tokens)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self.stats is None or self.stats.finish_reason is StopReason.CANCELLED:
            raise SchedulerClosed

    def _forward(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand the events to the event loop until the answer ends; runs in its own thread."""
        try:
            for event in self.running.events():
                if isinstance(event, Token):
                    self.tokens.append(event)
                self._send(loop, event)
        except Exception as exc:  # noqa: BLE001 - it is raised in the event loop
            self._failure = exc
        try:
            self._on_end(self)
        except Exception as exc:  # noqa: BLE001 - it is raised in the event loop
            self._failure = self._failure or exc
        self._send(loop, None)

    def _send(self, loop: asyncio.AbstractEventLoop, event: ServedEvent | None) -> None:
        try:
            loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            # The event loop is closed, so nobody reads the answer.
            self.cancel()
