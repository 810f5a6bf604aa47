"""The thread that owns MLX: prompts, decode steps of one row, and steps of the batch.

A turn of the loop serves what the answers' threads have asked for: a step of all rows that wait for
one, or a part of a prompt. A step begins once every answer that computes on its own has asked for
its next token, or after a short time; an answer that waits for the large model is not waited for.
While others decode, prompts get half of the time. They too wait only a short time for an answer
that computes on its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, cast

from mlxroute.backend.device_streams import end_device_streams
from mlxroute.errors import MlxRouteError
from mlxroute.sequences import common_prefix_length
from mlxroute.serving.prompts import ServedPrompt
from mlxroute.serving.row import (
    DeviceRequest,
    Feed,
    Invoke,
    Prefill,
    Release,
    Row,
)
from mlxroute.serving.sequence import DecodedSequence
from mlxroute.small import SmallModel
from mlxroute.types import Signals

if TYPE_CHECKING:
    from mlxroute.small.prefix_store import PrefixStore

# How long a step waits for answers that are about to ask, in steps, and at most in seconds.
_GRACE_STEPS: Final = 0.5
_MAX_GRACE_S: Final = 0.05


class DeviceClosed(MlxRouteError):
    """Raised in answers that run when the scheduler is closed, or when its thread has failed."""


class DeviceThread:
    """Runs the requests of all rows in one thread.

    Args:
        small: The small model.
        cache_bytes: Greatest memory of KV caches that are kept for later prompts.

    Attributes:
        steps: Forward passes of decoding so far, of the batch or of one row.
        batched_tokens: Tokens that steps of the batch fed.
        single_tokens: Tokens that steps of one row fed.
    """

    def __init__(self, small: SmallModel, *, cache_bytes: int) -> None:
        # They import MLX, which must follow the BLAS that loading a model opens.
        from mlxroute.small.batch_cost import RoundingBound
        from mlxroute.small.prefix_store import MIN_PREFIX_TOKENS, PrefixStore

        self._min_prefix = MIN_PREFIX_TOKENS
        self.small = small
        self.store: PrefixStore = PrefixStore(cache_bytes)
        self.steps = self.batched_tokens = self.single_tokens = 0
        self._batch = small.decoder.start_rows()
        self._rounding = RoundingBound()
        self._inbox: SimpleQueue[tuple[Row, DeviceRequest] | None] = SimpleQueue()
        self._requests: dict[Row, DeviceRequest] = {}
        self._prefills: dict[Row, Generator[None, None, int]] = {}
        # Rows whose prompt is read.
        self._decoding: set[Row] = set()
        # Those who compute on their own and will ask for a step soon.
        self._awaited: set[object] = set()
        self._step_s = 0.0
        self._grace_ends_s = 0.0
        # Until when prompts wait for those who compute on their own.
        self._prefill_grace_ends_s = 0.0
        # Seconds of decoding that prompts owe to the other answers.
        self._prefill_debt_s = 0.0
        self._is_closing = self._has_ended = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mlxroute-device", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the thread has ended with an error, so that no answer can be written."""
        return self._failure is not None

    @property
    def is_shared(self) -> bool:
        """Whether several answers are decoded."""
        return len(self._decoding) > 1

    @property
    def rounding_nats(self) -> float:
        """Bound of the differences of logprobs and entropies between a batch and a single row."""
        return self._rounding.nats

    @property
    def batch_bytes(self) -> int:
        """The memory of the batch's KV caches."""
        return self._batch.size_bytes

    def new_row(
        self,
        prompt: ServedPrompt,
        *,
        is_exact: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        asker: object = None,
    ) -> Row:
        """Return the small model for one answer; `Row.release` ends it. Arguments as for `Row`."""
        sequence = DecodedSequence(self.small.with_own_cache(), self._batch)
        return Row(self, sequence, prompt, is_exact=is_exact, on_progress=on_progress, asker=asker)

    def post(self, row: Row, request: DeviceRequest) -> None:
        """Queue a request; the reply is put into `row.replies`."""
        with self._lock:
            if not self._has_ended:
                self._inbox.put((row, request))
                return
        row.replies.put(None if isinstance(request, Release) else self._closed())

    def wake(self) -> None:
        """Make the thread look at rows that were cancelled."""
        self._inbox.put(None)

    def set_awaited(self, asker: object, is_awaited: bool) -> None:
        """Say whether somebody computes on his own and will ask for a step soon."""
        if is_awaited:
            self._await(asker)
        elif asker in self._awaited:
            self._awaited.discard(asker)
            self.wake()

    def _await(self, asker: object) -> None:
        self._awaited.add(asker)
        self._prefill_grace_ends_s = time.perf_counter() + _MAX_GRACE_S

    def close(self) -> None:
        """End the thread; the answers must have ended."""
        self._is_closing = True
        self.wake()
        self._thread.join()
        self.store.clear()

    # In the thread

    def _run(self) -> None:
        try:
            while not (self._is_closing and self._inbox.empty() and not self._requests):
                self._receive()
                self._take_turn()
        except BaseException as exc:
            self._failure = exc
            raise
        finally:
            with self._lock:
                self._has_ended = True
            while not self._inbox.empty():
                if (message := self._inbox.get()) is not None:
                    self._requests[message[0]] = message[1]
            for row, request in list(self._requests.items()):
                self._reply(row, None if isinstance(request, Release) else self._closed())
            end_device_streams()

    def _closed(self) -> DeviceClosed:
        if self._failure is None:
            return DeviceClosed("the endpoint is closing")
        kind = type(self._failure).__name__
        return DeviceClosed(f"decoding has ended with {kind}; restart the endpoint")

    def _take_turn(self) -> None:
        for row, request in list(self._requests.items()):
            if row.end is not None and not isinstance(request, Release):
                self._reply(row, row.end)
            elif isinstance(request, Invoke):
                self._attempt(row, request.function)
            elif isinstance(request, Release):
                self._release(row)
        if self._is_step_due():
            self._step()
        elif self._prefills and not self._prefill_must_wait():
            self._prefill_part()

    def _receive(self) -> None:
        """Take the requests that have arrived; block while there is nothing to do."""
        timeout_s: float | None = None
        if self._is_step_due() or (self._prefills and not self._prefill_must_wait()):
            timeout_s = 0.0
        elif self._has_feeds():
            timeout_s = max(0.0, self._grace_ends_s - time.perf_counter())
        elif self._prefills:
            timeout_s = max(0.0, self._prefill_grace_ends_s - time.perf_counter())
        try:
            while True:
                message = (
                    self._inbox.get_nowait()
                    if timeout_s == 0.0
                    else self._inbox.get(timeout=timeout_s)
                )
                if message is not None:
                    self._accept(*message)
                timeout_s = 0.0
        except Empty:
            return

    def _accept(self, row: Row, request: DeviceRequest) -> None:
        self._requests[row] = request
        self._awaited.discard(row.asker)
        if isinstance(request, Prefill):
            self._prefills[row] = self._prefill_in_parts(row, request)
        elif isinstance(request, Feed) and self._grace_ends_s == 0.0:
            grace_s = min(_MAX_GRACE_S, _GRACE_STEPS * self._step_s)
            self._grace_ends_s = time.perf_counter() + grace_s

    def _reply(self, row: Row, reply: object) -> None:
        del self._requests[row]
        self._prefills.pop(row, None)
        if row in self._decoding:
            self._await(row.asker)
        row.replies.put(reply)

    def _attempt(self, row: Row, function: Callable[[], object]) -> None:
        """Reply to a row with what a function returns or raises."""
        try:
            reply = function()
        except Exception as exc:  # noqa: BLE001 - it is raised in the row's own thread
            reply = exc
        self._reply(row, reply)

    def _release(self, row: Row) -> None:
        def release() -> None:
            if (cache := row.sequence.release()) is not None:
                self.store.add(*cache)

        self._decoding.discard(row)
        self._attempt(row, release)

    # Prompts

    def _prefill_in_parts(self, row: Row, request: Prefill) -> Generator[None, None, int]:
        """Run a prompt; yield after each part, return the number of ids reused."""
        small, ids = row.sequence.small, request.prompt_ids
        # When its turn comes, because prompts before it may begin in the same way.
        if not row.is_exact:
            self._load_prefix(row, ids[:-1])
        return (
            yield from small.prefill_in_parts(
                ids, sampling=request.sampling, progress=request.progress
            )
        )

    def _load_prefix(self, row: Row, ids: Sequence[int]) -> None:
        """Give a row the longest prefix of `ids` that the store or another row holds."""
        prefix = self.store.find(ids)
        length = 0 if prefix is None else len(prefix[1])
        for other in self._decoding:
            shared = common_prefix_length(other.sequence.ids, ids)
            if shared > max(length, self._min_prefix - 1) and other.sequence.is_divisible:
                prefix, length = other.sequence.copy(shared), shared
        if prefix is not None:
            row.sequence.small.decoder.load_cache(*prefix)

    def _prefill_must_wait(self) -> bool:
        if self._prefill_debt_s <= 0:
            return False
        is_grace = bool(self._awaited) and time.perf_counter() < self._prefill_grace_ends_s
        return is_grace or self._has_feeds()

    def _prefill_part(self) -> None:
        row, parts = next(iter(self._prefills.items()))
        began_s = time.perf_counter()
        try:
            if (reused_ids := _next_part(parts)) is not None:
                # Answers with the same prompt may begin before this one ends.
                self.store.add(row.sequence.small.decoder.cache.layers, row.sequence.ids)
                self._decoding.add(row)
                self._reply(row, reused_ids)
        except Exception as exc:  # noqa: BLE001 - it is raised in the row's own thread
            self._reply(row, exc)
        self._prefill_debt_s += time.perf_counter() - began_s

    # Steps

    def _has_feeds(self) -> bool:
        return any(isinstance(request, Feed) for request in self._requests.values())

    def _is_step_due(self) -> bool:
        if not self._has_feeds():
            return False
        return not self._awaited or time.perf_counter() >= self._grace_ends_s

    def _step(self) -> None:
        """Feed a token to each row that waits for one: in one batch where there are several."""
        began_s = time.perf_counter()
        self._grace_ends_s = 0.0
        batched: dict[Row, Feed] = {}
        expected: dict[Row, Signals] = {}
        for row, request in list(self._requests.items()):
            if not isinstance(request, Feed):
                continue
            try:
                if not request.alone and self.is_shared and self._enter_batch(row, expected):
                    batched[row] = request
                else:
                    self._step_alone(row, request)
            except Exception as exc:  # noqa: BLE001 - it is raised in the row's own thread
                self._reply(row, exc)
        if batched:
            try:
                self._step_batch(batched, expected)
            except Exception as exc:  # noqa: BLE001 - it is raised in the rows' own threads
                self._drop_batch(exc)
        self._step_s = time.perf_counter() - began_s
        self._prefill_debt_s = max(0.0, self._prefill_debt_s - self._step_s)

    def _enter_batch(self, row: Row, expected: dict[Row, Signals]) -> bool:
        """Make a row part of the batch if there is room; return whether it is.

        For an exact row that is new there, first compute the step as one row too.
        """
        sequence = row.sequence
        if row.is_exact and sequence.batch_row is None and sequence.fits_batch:
            token_id = cast(Feed, self._requests[row]).token_ids[0]
            expected[row] = sequence.extend([token_id])
            sequence.rollback(1)
        return sequence.enter_batch()

    def _step_alone(self, row: Row, request: Feed) -> None:
        signals = row.sequence.extend(request.token_ids)
        row.was_batched = request.was_batched
        self.steps += 1
        self.single_tokens += len(request.token_ids)
        self._reply(row, signals)

    def _step_batch(self, feeds: dict[Row, Feed], expected: dict[Row, Signals]) -> None:
        rows = {
            row.sequence.batch_row: feed
            for row, feed in feeds.items()
            if row.sequence.batch_row is not None
        }
        # As one row does, a sampler draws once for a token of several ids.
        signals = self._batch.step(
            {row: feed.token_ids[0] for row, feed in rows.items()},
            undrawn=[row for row, feed in rows.items() if len(feed.token_ids) > 1],
        )
        self.steps += 1
        self.batched_tokens += len(feeds)
        for row, feed in feeds.items():
            batch_row = row.sequence.batch_row
            assert batch_row is not None
            row.sequence.on_batch_step(feed.token_ids[0])
            if row in expected:
                self._rounding.add(expected[row], signals[batch_row])
            # Each row of a batch takes one token per step.
            feed.token_ids, feed.was_batched = feed.token_ids[1:], True
            if not feed.token_ids:
                row.was_batched = True
                self._reply(row, signals[batch_row])

    def _drop_batch(self, failure: Exception) -> None:
        """End all answers of the batch, whose KV caches are undefined after a failed step."""
        self._batch.clear()
        for row in self._decoding:
            if row.sequence.batch_row is not None:
                row.sequence.lose()
                if row in self._requests:
                    self._reply(row, failure)
                else:
                    row.cancel(failure)


def _next_part(parts: Generator[None, None, int]) -> int | None:
    """Read the next part of a prompt; return the number of ids reused if it was the last."""
    try:
        next(parts)
    except StopIteration as end:
        return cast(int, end.value)
    return None
