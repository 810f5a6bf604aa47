"""An answer that waits for its turn, is written by a thread of its own, or has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

from mlxroute.engine import Answer
from mlxroute.serving.prompts import ServedPrompt
from mlxroute.serving.requests import AnswerRequest, PromptProgress, ServedEvent
from mlxroute.serving.small_client import AnswerCancelled, SmallClient
from mlxroute.types import RunStats

if TYPE_CHECKING:
    from mlxroute.serving.device_thread import DeviceThread


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
        start: Callable[[SmallClient], Answer],
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
        self._ended = threading.Event()
        self._client = device.new_client(
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
        return self._client.is_cancelled

    @property
    def stats(self) -> RunStats | None:
        """The engine's summary so far, final once the events have ended; None before its turn."""
        return None if self._answer is None else self._answer.stats()

    @property
    def queue_wait_s(self) -> float:
        """Seconds between the request and the answer's turn, or until now before its turn."""
        waited_s = self._queue_wait_s
        return time.perf_counter() - self._submitted_s if waited_s is None else waited_s

    def events(self) -> Iterator[ServedEvent]:
        """Yield the prompt's progress and the engine's events until the answer ends.

        One thread may iterate, once. Raises the error that ended the answer, if one did.
        """
        while (event := self._events.get()) is not None:
            yield event
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """End the answer within one decode step, also in the queue and while the prompt is read."""
        self._client.cancel()
        if self._leave_queue(self):
            self._end()

    def fail(self, failure: Exception) -> None:
        """End an answer that cannot be written; its events raise `failure`."""
        self._failure = failure
        self._end()

    def write(self) -> None:
        """Write the answer in the calling thread."""
        self._queue_wait_s = time.perf_counter() - self._submitted_s
        try:
            self._client.check_cancelled()
            self._answer = self._start_answer(self._client)
            for event in self._answer.events():
                self._events.put(event)
        except AnswerCancelled:
            pass
        except Exception as exc:  # noqa: BLE001 - `events` raises it
            self._failure = exc
        finally:
            try:
                self._client.release()
            finally:
                self._end()

    def _end(self) -> None:
        if self._queue_wait_s is None:
            self._queue_wait_s = time.perf_counter() - self._submitted_s
        self._ended.set()
        self._events.put(None)
