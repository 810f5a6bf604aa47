"""Several answers at once: their next tokens are decoded as rows of one batch.

Each answer is written by the engine in a thread of its own, before an `AnswerRow` that stands for
the small model. The thread that owns the model decodes a step when every answer waits for one;
answers to one prompt that are alike so far share a row. Rows of a batch round differently from one
row, so near ties may fall otherwise than alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mlxroute.recorded.forward_only import ForwardOnlySmall
from mlxroute.recorded.replies import RecordingStopped
from mlxroute.small import SmallModel
from mlxroute.types import Message, Progress, Sampling, Signals, Vocabulary

_T = TypeVar("_T")


class _Ended(Exception):
    """The run is over for a fault of another answer, or an interrupt."""


class ConcurrentAnswers:
    """Answers conversations in several ways. Only `answers` touches the model, in its own thread.

    `stop` is called when the answers have to end before their ends.
    """

    def __init__(self, small: SmallModel, *, stop: Callable[[], None]) -> None:
        self.small = small
        self._stop = stop
        self._changed = threading.Condition()
        self._busy = 0
        self._asking: list[AnswerRow] = []
        self._over = False

    def answers(
        self, jobs: Sequence[tuple[Sequence[Message], Callable[[AnswerRow], _T]]]
    ) -> list[_T]:
        """What each job returns, which writes one answer to its conversation before its row.

        Raises what the first failing job raises, when all have ended.
        """
        rows, held = [], []
        texts: list[str] = []
        shared: dict[str, tuple[list[int], Signals]] = {}
        for turns, _ in jobs:
            text = self.small.render(turns)
            if text not in texts:
                texts.append(text)
                ids = self.small.encode_prompt(text)
                first, cache = self.small.prefill_copy(ids)
                held.append(cache)
                shared[text] = (ids, first)
            rows.append(AnswerRow(self, text, *shared[text], place=texts.index(text)))
        batch = self.small.start_batch(held)
        self._busy = len(jobs)
        with ThreadPoolExecutor(len(jobs)) as pool:
            try:
                futures = [
                    pool.submit(self._job, job, row)
                    for (_, job), row in zip(jobs, rows, strict=True)
                ]
                while asking := self._next_asking():
                    places = list(dict.fromkeys((row.place, row.token_id) for row in asking))
                    parents, token_ids = zip(*places, strict=True)
                    self._hand_out(asking, places, batch.step(parents, token_ids))
            except BaseException:
                self._end()
                raise
        return _results(futures)

    def step(self, row: AnswerRow, token_id: int) -> Signals:
        """The signals behind a token that a row goes on with."""
        with self._changed:
            row.token_id, row.signals = token_id, None
            self._asking.append(row)
            self._busy -= 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: row.signals is not None or self._over)
            if row.signals is None:
                raise _Ended
            return row.signals

    def _job(self, job: Callable[[AnswerRow], _T], row: AnswerRow) -> _T:
        try:
            return job(row)
        except BaseException:
            self._end()
            raise
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _next_asking(self) -> list[AnswerRow]:
        """Those that wait for a step, as soon as all answers do that have not ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy == 0 or self._over)
            asking, self._asking = self._asking, []
            return [] if self._over else asking

    def _hand_out(
        self,
        asking: Sequence[AnswerRow],
        places: Sequence[tuple[int, int]],
        signals: Sequence[Signals],
    ) -> None:
        with self._changed:
            for row in asking:
                row.place = places.index((row.place, row.token_id))
                row.signals = signals[row.place]
            self._busy = len(asking)
            self._changed.notify_all()

    def _end(self) -> None:
        self._stop()
        with self._changed:
            self._over = True
            self._changed.notify_all()


class AnswerRow(ForwardOnlySmall):
    """The small model for one answer; `place` is its row in the batch."""

    def __init__(
        self, together: ConcurrentAnswers, text: str, ids: list[int], first: Signals, *, place: int
    ) -> None:
        self._together = together
        self._text = text
        self._ids = ids
        self._first = first
        self.place = place
        self.token_id = -1
        self.signals: Signals | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return self._together.small.vocabulary

    @property
    def context_length(self) -> int:
        return self._together.small.context_length

    def render(self, messages: Sequence[Message]) -> str:
        return self._text

    def encode_prompt(self, text: str) -> list[int]:
        return self._ids

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        return self._first, 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        # Every row of a batch takes one token a step.
        *before, last = token_ids
        for token_id in before:
            self._together.step(self, token_id)
        return self._together.step(self, last)


def _results(futures: Sequence[Future[_T]]) -> list[_T]:
    """The first fault is the one that ended the others."""
    faults = [each for future in futures if (each := future.exception()) is not None]
    for fault in faults:
        if not isinstance(fault, _Ended | RecordingStopped):
            raise fault
    return [future.result() for future in futures]
