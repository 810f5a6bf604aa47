"""An answer that waits for its turn, is written by a thread of its own, or has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from mlxroute.engine import Answer
from mlxroute.serving.prompts import ServedPrompt
from mlxroute.serving.requests import AnswerRequest, PromptProgress, ServedEvent
from mlxroute.serving.row import AnswerCancelled, Row
from mlxroute.types import RunStats

if TYPE_CHECKING:
    from mlxroute.serving.device_thread import DeviceThread


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """What is known about an answer.

    Args:
        run: The engine's summary so far; None before the answer's turn.
        queue_wait_s: Seconds between the request and its turn.
        prompt_tokens: Tokens of the prompt.
        batched: Whether part of the answer was decoded in a batch with others.
    """

    run: RunStats | None
    queue_wait_s: float
    prompt_tokens: int
    batched: bool


class RunningAnswer:
    """One answer of the scheduler; `AnswerScheduler.submit` makes it. Its methods are thread-safe.

    Attributes:
        request: What was asked.
        prompt: The encoded prompt.
    """

    def __init__(
        self,
        request: AnswerRequest,
        prompt: ServedPrompt,
        *,
        device: DeviceThread,
        start: Callable[[Row], Answer],
        leave_queue: Callable[[RunningAnswer], bool],
    ) -> None:
        self.request = request
        self.prompt = prompt
        self._start_answer = start
        self._leave_queue = leave_queue
        self._submitted_s = time.perf_counter()
        self._queue_wait_s: float | None = None
        self._events: SimpleQueue[ServedEvent | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._answer: Answer | None = None
        self._was_batched = False
        self._ended = threading.Event()
        self._row = device.new_row(
            prompt,
            is_exact=request.exact,
            on_progress=lambda done, total: self._events.put(PromptProgress(done, total)),
        )

    @property
    def ended(self) -> bool:
        """Whether the answer is complete, failed or cancelled."""
        return self._ended.is_set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._row.is_cancelled

    def events(self, *, idle_s: float | None = None) -> Iterator[ServedEvent | None]:
        """Yield the prompt's progress and the engine's events until the answer ends.

        Yields None after each `idle_s` seconds without an event; by default never. One thread may
        iterate, once. Raises the error that ended the answer, if one did.
        """
        while True:
            try:
                event = self._events.get(timeout=idle_s)
            except Empty:
                yield None
                continue
            if event is None:
                break
            yield event
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """End the answer within one decode step, also in the queue and while the prompt is read."""
        self._row.cancel()
        if self._leave_queue(self):
            self._end()

    def stats(self) -> AnswerFigures:
        """Return the figures so far; final once the events have ended."""
        waited_s = self._queue_wait_s
        return AnswerFigures(
            run=None if self._answer is None else self._answer.stats(),
            queue_wait_s=time.perf_counter() - self._submitted_s if waited_s is None else waited_s,
            prompt_tokens=len(self.prompt.ids),
            batched=self._was_batched,
        )

    def write(self) -> None:
        """Write the answer in the calling thread."""
        self._queue_wait_s = time.perf_counter() - self._submitted_s
        try:
            self._row.check_cancelled()
            self._answer = self._start_answer(self._row)
            for event in self._answer.events():
                self._was_batched |= self._row.was_batched
                self._events.put(event)
        except AnswerCancelled:
            pass
        except Exception as exc:  # noqa: BLE001 - `events` raises it
            self._failure = exc
        finally:
            try:
                self._row.release()
            finally:
                self._end()

    def _end(self) -> None:
        if self._queue_wait_s is None:
            self._queue_wait_s = time.perf_counter() - self._submitted_s
        self._ended.set()
        self._events.put(None)
