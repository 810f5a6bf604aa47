"""Several answers at a time, with batched decode steps.

The engine writes each answer in a thread of its own, with an `AnswerRow` as its small model. The
calling thread owns the real model: it decodes one batch step whenever all unfinished answers wait
for one. Answers that share prompt and tokens so far share a row of the batch. A batch rounds
differently from a single row, so a near tie may be decided differently than in an answer alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from mlxroute.recorded.forward_only import ForwardOnlySmall
from mlxroute.recorded.replies import RecordingStopped
from mlxroute.small import SmallModel
from mlxroute.types import Message, Progress, Sampling, Signals, Vocabulary

if TYPE_CHECKING:
    from mlxroute.small.batch import Batch

_T = TypeVar("_T")


class _Aborted(Exception):
    """Raised in a job when another job failed or the run was interrupted."""


class ConcurrentAnswers:
    """Runs jobs that each write one answer, with the small model's steps batched.

    Args:
        small: The small model, which only the thread that calls `run` uses.
        on_abort: Called when a job fails or the run is interrupted; it must end the calls in
            flight.
    """

    def __init__(self, small: SmallModel, *, on_abort: Callable[[], None]) -> None:
        self.small = small
        self._on_abort = on_abort
        self._changed = threading.Condition()
        # Answers that neither wait for a step nor have ended.
        self._running = 0
        self._waiting: list[AnswerRow] = []
        self._is_aborted = False

    def run(self, jobs: Sequence[tuple[Sequence[Message], Callable[[AnswerRow], _T]]]) -> list[_T]:
        """Run all jobs at once and return their results in order.

        If a job fails, the others are aborted, and its exception is raised once all have ended.

        Args:
            jobs: For each job, a conversation and the function that answers it. The function takes
                the `AnswerRow` to use as its small model.
        """
        rows, batch = self._prefill([conversation for conversation, _ in jobs])
        self._running = len(jobs)
        with ThreadPoolExecutor(len(jobs)) as pool:
            try:
                futures = [
                    pool.submit(self._run_job, job, row)
                    for (_, job), row in zip(jobs, rows, strict=True)
                ]
                while waiting := self._wait_for_rows():
                    inputs = list(dict.fromkeys((row.batch_row, row.token_id) for row in waiting))
                    parents, token_ids = zip(*inputs, strict=True)
                    self._deliver(waiting, inputs, batch.step(parents, token_ids))
            except BaseException:
                self._abort()
                raise
        return _collect_results(futures)

    def step(self, row: AnswerRow, token_id: int) -> Signals:
        """Feed a token to an answer's row; return the signals after it. Called by `AnswerRow`."""
        with self._changed:
            row.token_id, row.signals = token_id, None
            self._waiting.append(row)
            self._running -= 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: row.signals is not None or self._is_aborted)
            if row.signals is None:
                raise _Aborted
            return row.signals

    def _prefill(self, conversations: Sequence[Sequence[Message]]) -> tuple[list[AnswerRow], Batch]:
        """Return one row per conversation and a batch with one row per different prompt."""
        rows, caches = [], []
        texts: list[str] = []
        prompts: list[tuple[list[int], Signals]] = []
        for conversation in conversations:
            text = self.small.render(conversation)
            if text not in texts:
                ids = self.small.encode_prompt(text)
                first, cache = self.small.prefill_copy(ids)
                texts.append(text)
                prompts.append((ids, first))
                caches.append(cache)
            index = texts.index(text)
            rows.append(AnswerRow(self, text, *prompts[index], batch_row=index))
        return rows, self.small.start_batch(caches)

    def _run_job(self, job: Callable[[AnswerRow], _T], row: AnswerRow) -> _T:
        try:
            return job(row)
        except BaseException:
            self._abort()
            raise
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _wait_for_rows(self) -> list[AnswerRow]:
        """Block until all unfinished answers wait for a step; return their rows, if any."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0 or self._is_aborted)
            waiting, self._waiting = self._waiting, []
            return [] if self._is_aborted else waiting

    def _deliver(
        self,
        waiting: Sequence[AnswerRow],
        inputs: Sequence[tuple[int, int]],
        signals: Sequence[Signals],
    ) -> None:
        """Give each waiting row its signals.

        Args:
            waiting: Rows that wait for a step.
            inputs: Parent row and token id of each row of the batch.
            signals: Signals of each row of the batch.
        """
        with self._changed:
            for row in waiting:
                row.batch_row = inputs.index((row.batch_row, row.token_id))
                row.signals = signals[row.batch_row]
            self._running = len(waiting)
            self._changed.notify_all()

    def _abort(self) -> None:
        self._on_abort()
        with self._changed:
            self._is_aborted = True
            self._changed.notify_all()


class AnswerRow(ForwardOnlySmall):
    """The small model as one answer uses it.

    Args:
        answers: The batch's owner.
        prompt: Rendered prompt.
        prompt_ids: Ids of the prompt.
        first: Signals after the prompt.
        batch_row: Index of the answer's row in the batch.
    """

    def __init__(
        self,
        answers: ConcurrentAnswers,
        prompt: str,
        prompt_ids: list[int],
        first: Signals,
        *,
        batch_row: int,
    ) -> None:
        self._answers = answers
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._first = first
        self.batch_row = batch_row
        self.token_id = -1
        self.signals: Signals | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return self._answers.small.vocabulary

    @property
    def context_length(self) -> int:
        return self._answers.small.context_length

    def render(self, messages: Sequence[Message]) -> str:
        return self._prompt

    def encode_prompt(self, text: str) -> list[int]:
        return self._prompt_ids

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        return self._first, 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        # Each row of a batch takes one token per step.
        *earlier_ids, last_id = token_ids
        for token_id in earlier_ids:
            self._answers.step(self, token_id)
        return self._answers.step(self, last_id)


def _collect_results(futures: Sequence[Future[_T]]) -> list[_T]:
    """Return the jobs' results, or raise the failure that aborted the other jobs."""
    failures = [failure for future in futures if (failure := future.exception()) is not None]
    for failure in failures:
        if not isinstance(failure, _Aborted | RecordingStopped):
            raise failure
    return [future.result() for future in futures]
