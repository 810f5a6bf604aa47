"""`AnswerScheduler`: a queue of answers, several of which are written at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mlxroute.closeable import Closeable
from mlxroute.engine import Answer, Experience
from mlxroute.engine.protocols import LargeProtocol
from mlxroute.routers import never_escalate
from mlxroute.serving.device_thread import DeviceThread
from mlxroute.serving.prompts import ServedPrompt, encode_prompt
from mlxroute.serving.requests import (
    DEFAULT_CACHE_BYTES,
    AnswerRequest,
    QueueFull,
    SchedulerClosed,
    ScoredPrompt,
)
from mlxroute.serving.running_answer import RunningAnswer
from mlxroute.serving.small_client import SmallClient
from mlxroute.serving.stoppable_large import StoppableLarge
from mlxroute.small import SmallModel
from mlxroute.types import Message


@dataclass(frozen=True, slots=True)
class SchedulerFigures:
    """The present state of a scheduler, and totals since it was made.

    Args:
        running: Answers that are being written.
        queued: Answers that wait for their turn.
        cache_entries: KV caches that are kept for later prompts.
        cache_bytes: Their memory.
        batch_bytes: Memory of the batch's KV caches.
        cache_hits: Prompts that began with a kept KV cache.
        cache_misses: Prompts that did not.
        steps: Forward passes of decoding.
        batched_tokens: Tokens that steps of a batch fed.
        single_tokens: Tokens that steps of one row fed.
    """

    running: int
    queued: int
    cache_entries: int
    cache_bytes: int
    batch_bytes: int
    cache_hits: int
    cache_misses: int
    steps: int
    batched_tokens: int
    single_tokens: int


class AnswerScheduler(Closeable):
    """Writes answers as they are submitted, up to `max_running` at a time. Thread-safe.

    Alone, an answer is decoded as `generate` decodes it. Several are rows of one batch, which they
    join and leave at any step.

    Args:
        small: The small model, which nothing else may use until the scheduler is closed.
        large: The large model; None where the small one answers alone.
        experience: Measurements of the pair from earlier answers; a new object by default.
        max_running: Maximum number of answers written at a time. 8 by default.
        max_queued: Maximum number of answers that wait for their turn. 32 by default.
        cache_bytes: Maximum memory of KV caches that are kept for later prompts. 1 GiB by default.
    """

    def __init__(
        self,
        small: SmallModel,
        large: LargeProtocol | None,
        *,
        experience: Experience | None = None,
        max_running: int = 8,
        max_queued: int = 32,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self._small = small
        self._large = large
        self._experience = Experience() if experience is None else experience
        self._max_running = max_running
        self._max_queued = max_queued
        self._device = DeviceThread(small, cache_bytes=cache_bytes)
        self._changed = threading.Condition()
        self._queue: deque[RunningAnswer] = deque()
        self._running: dict[RunningAnswer, threading.Thread] = {}
        self._is_closed = False

    def submit(self, request: AnswerRequest) -> RunningAnswer:
        """Queue an answer, which is written as soon as it is its turn.

        Raises QueueFull if too many wait, SchedulerClosed after `close`, UsageError for an empty
        prompt and ContextTooLong for one that does not fit in the small model's context.
        """
        prompt = encode_prompt(
            self._small,
            request.prompt,
            answer_start=request.answer_start,
            owner=request.owner,
        )
        start = partial(self._start_answer, request, prompt)
        answer = RunningAnswer(
            request, prompt, device=self._device, start=start, leave_queue=self._leave_queue
        )
        with self._changed:
            if self._is_closed:
                raise SchedulerClosed
            has_turn = len(self._running) < self._max_running and not self._queue
            has_place = request.completes_reply or len(self._queue) < self._max_queued
            if not (has_turn or has_place):
                raise QueueFull(
                    f"{self._max_running} running and {self._max_queued} waiting answers are the"
                    " limit here; try again later"
                )
            self._queue.append(answer)
            self._start_next()
        return answer

    def score(
        self,
        prompt: Sequence[Message] | str | Sequence[int],
        *,
        owner: str = "",
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> ScoredPrompt:
        """Return how likely the small model finds a prompt, token by token; blocks until then.

        `owner` as in `AnswerRequest`. Raises as `submit`, UsageError where the architecture does
        not allow it, and AnswerCancelled once `is_stopped`, which is called before each part of the
        prompt, returns True.
        """
        served = encode_prompt(self._small, prompt, owner=owner)
        client = self._device.new_client(served, is_exact=True)
        try:
            signals, logprobs = client.score_prompt(is_stopped=is_stopped)
        finally:
            client.release()
        return ScoredPrompt(served.text, served.ids, tuple(signals), tuple(logprobs))

    @property
    def has_failed(self) -> bool:
        """Whether no answer can be written any more."""
        return self._device.has_failed

    def figures(self) -> SchedulerFigures:
        """Return the present state and the totals."""
        device, cache = self._device, self._device.prefix_cache
        return SchedulerFigures(
            running=len(self._running),
            queued=len(self._queue),
            cache_entries=len(cache),
            cache_bytes=cache.size_bytes,
            batch_bytes=device.batch_bytes,
            cache_hits=cache.hits,
            cache_misses=cache.misses,
            steps=device.steps,
            batched_tokens=device.batched_tokens,
            single_tokens=device.single_tokens,
        )

    def close(self) -> None:
        """Cancel all answers and end all threads."""
        with self._changed:
            self._is_closed = True
            answers = [*self._queue, *self._running]
        for answer in answers:
            answer.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not (self._running or self._queue))
        self._device.close()

    def _start_answer(
        self, request: AnswerRequest, prompt: ServedPrompt, client: SmallClient
    ) -> Answer:
        large = None if request.local_only else request.large or self._large
        # Else the positions that the router escalates would count as unchecked.
        no_router = never_escalate()
        return Answer(
            client,
            None if large is None else StoppableLarge(large, client),
            prompt.messages,
            router=no_router if large is None else request.router,
            options=request.options,
            experience=self._experience,
            batching=client if request.exact else None,
            answer_start=request.answer_start,
        )

    def _leave_queue(self, answer: RunningAnswer) -> bool:
        """Remove an answer from the queue; return whether it was there."""
        with self._changed:
            if answer not in self._queue:
                return False
            self._queue.remove(answer)
            self._changed.notify_all()
            return True

    def _start_next(self) -> None:
        """Start answers whose turn it is; requires the lock."""
        while self._queue and len(self._running) < self._max_running:
            answer = self._queue.popleft()
            thread = threading.Thread(
                target=self._write, args=(answer,), name="mlxroute-answer", daemon=True
            )
            self._running[answer] = thread
            try:
                thread.start()
            except Exception as exc:  # noqa: BLE001 - the answer's events raise it
                del self._running[answer]
                answer.fail(exc)

    def _write(self, answer: RunningAnswer) -> None:
        try:
            answer.write()
        finally:
            with self._changed:
                del self._running[answer]
                self._start_next()
                self._changed.notify_all()
