"""The thread that owns MLX: prompts, decode steps of one row, and steps of the batch.

A turn of the loop serves what the answers' threads have asked for: a step of all answers that wait
for one, or a part of a prompt. A step begins once every answer that is between steps has asked for
its next token, or after a short time; an answer that waits for the large model is not waited for.
While others decode, prompts get half of the time. They too wait only a short time for an answer
that is between steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, cast

from mlxroute.backend.device_streams import end_device_streams
from mlxroute.errors import MlxRouteError
from mlxroute.serving.prompts import ServedPrompt
from mlxroute.serving.requests import SchedulerClosed
from mlxroute.serving.sequence import DecodedSequence
from mlxroute.serving.shared_prefixes import ReadChunks, keep_read_part, load_prefix
from mlxroute.serving.small_client import (
    DeviceRequest,
    Feed,
    Invoke,
    Prefill,
    Release,
    SmallClient,
)
from mlxroute.small import SmallModel
from mlxroute.types import Signals

if TYPE_CHECKING:
    from mlxroute.small.prefix_cache import PrefixCache

# How long a step waits for answers that are about to ask, in steps, and at most in seconds.
_GRACE_STEPS: Final = 0.5
_MAX_GRACE_S: Final = 0.05


class DeviceClosed(MlxRouteError):
    """Raised in answers that run when the thread has failed, and in later ones."""


class DeviceThread:
    """Runs the requests of all clients in one thread.

    Args:
        small: The small model.
        cache_bytes: Maximum memory of KV caches that are kept for later prompts.

    Attributes:
        small: As given.
        prefix_cache: KV caches of ended sequences and of prompts, for later prompts.
        steps: Forward passes of decoding so far, of the batch or of one row.
        batched_tokens: Tokens that steps of the batch fed.
        single_tokens: Tokens that steps of one row fed.
    """

    def __init__(self, small: SmallModel, *, cache_bytes: int) -> None:
        # They import MLX, which must follow the BLAS that loading a model opens.
        from mlxroute.small.batch_cost import RoundingBound
        from mlxroute.small.prefix_cache import PrefixCache

        self.small = small
        self.prefix_cache: PrefixCache = PrefixCache(cache_bytes)
        self.steps = self.batched_tokens = self.single_tokens = 0
        self._batch = small.decoder.start_rows()
        self._rounding = RoundingBound()
        self._inbox: SimpleQueue[tuple[SmallClient, DeviceRequest] | None] = SimpleQueue()
        self._requests: dict[SmallClient, DeviceRequest] = {}
        self._prefills: dict[SmallClient, Generator[None, None, int]] = {}
        # Clients whose prompt is read.
        self._decoding: set[SmallClient] = set()
        # Requesters between steps, which a step waits for.
        self._awaited: set[object] = set()
        self._step_s = 0.0
        self._grace_ends_s = 0.0
        # Until when prompts wait for requesters between steps.
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
        """Bound of the differences between a batch and a single row.

        It holds for logprobs, entropies and head scores.
        """
        return self._rounding.nats

    @property
    def batch_bytes(self) -> int:
        """The memory of the batch's KV caches."""
        return self._batch.size_bytes

    def new_client(
        self,
        prompt: ServedPrompt,
        *,
        is_exact: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        requester: object = None,
    ) -> SmallClient:
        """Return the small model for one answer; its `release` ends it.

        Arguments as for `SmallClient`; by default the answer is not exact, and the client itself
        asks for its steps.
        """
        sequence = DecodedSequence(self.small.with_own_cache(), self._batch)
        return SmallClient(
            self, sequence, prompt, is_exact=is_exact, on_progress=on_progress, requester=requester
        )

    def post(self, client: SmallClient, request: DeviceRequest) -> None:
        """Queue a request; the reply is put into `client.replies`."""
        with self._lock:
            if not self._has_ended:
                self._inbox.put((client, request))
                return
        client.replies.put(None if isinstance(request, Release) else self._closed())

    def wake(self) -> None:
        """Make the thread look at clients that were cancelled."""
        self._inbox.put(None)

    def set_awaited(self, requester: object, is_awaited: bool) -> None:
        """Mark whether a requester is between steps and will ask for the next one soon."""
        if is_awaited:
            self._await(requester)
        elif requester in self._awaited:
            self._awaited.discard(requester)
            self.wake()

    def _await(self, requester: object) -> None:
        self._awaited.add(requester)
        self._prefill_grace_ends_s = time.perf_counter() + _MAX_GRACE_S

    def close(self) -> None:
        """End the thread; the answers must have ended."""
        self._is_closing = True
        self.wake()
        self._thread.join()
        self.prefix_cache.clear()

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
            for client, request in list(self._requests.items()):
                self._reply(client, None if isinstance(request, Release) else self._closed())
            end_device_streams()

    def _closed(self) -> MlxRouteError:
        if self._failure is None:
            return SchedulerClosed()
        kind = type(self._failure).__name__
        return DeviceClosed(f"decoding has ended with {kind}; restart the endpoint")

    def _take_turn(self) -> None:
        for client, request in list(self._requests.items()):
            if client.cancellation is not None and not isinstance(request, Release):
                if client in self._prefills:
                    self._prefills[client].close()
                self._reply(client, client.cancellation)
            elif isinstance(request, Invoke):
                self._attempt(client, request.function)
            elif isinstance(request, Release):
                self._release(client)
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

    def _accept(self, client: SmallClient, request: DeviceRequest) -> None:
        self._requests[client] = request
        self._awaited.discard(client.requester)
        if isinstance(request, Prefill):
            self._prefills[client] = self._prefill_in_parts(client, request)
        elif isinstance(request, Feed) and self._grace_ends_s == 0.0:
            grace_s = min(_MAX_GRACE_S, _GRACE_STEPS * self._step_s)
            self._grace_ends_s = time.perf_counter() + grace_s

    def _reply(self, client: SmallClient, reply: object) -> None:
        del self._requests[client]
        self._prefills.pop(client, None)
        if client in self._decoding:
            self._await(client.requester)
        client.replies.put(reply)

    def _attempt(self, client: SmallClient, function: Callable[[], object]) -> None:
        """Reply to a client with what a function returns or raises."""
        try:
            reply = function()
        except Exception as exc:  # noqa: BLE001 - it is raised in the client's own thread
            reply = exc
        self._reply(client, reply)

    def _release(self, client: SmallClient) -> None:
        def release() -> None:
            if (cache := client.sequence.release()) is not None:
                self.prefix_cache.add(*cache, client.prompt.owner)

        self._decoding.discard(client)
        self._attempt(client, release)

    # Prompts

    def _prefill_in_parts(
        self, client: SmallClient, request: Prefill
    ) -> Generator[None, None, int]:
        """Run a prompt; yield after each part, return the number of ids reused."""
        small, ids = client.sequence.small, request.prompt_ids
        chunks = ReadChunks(client, self.prefix_cache)

        def report(label: str, done: int, total: int | None) -> None:
            chunks.update()
            request.progress(label, done, total)

        # When its turn comes, because prompts before it may begin in the same way.
        if not client.is_exact:
            load_prefix(client, ids[:-1], self.prefix_cache, self._decoding)
        parts = small.prefill_in_parts(ids, sampling=request.sampling, progress=report)
        try:
            return (yield from parts)
        except GeneratorExit:
            # The client has left: the next try of its prompt goes on after the last whole chunk.
            chunks.keep()
            raise

    def _prefill_must_wait(self) -> bool:
        if self._prefill_debt_s <= 0:
            return False
        is_grace = bool(self._awaited) and time.perf_counter() < self._prefill_grace_ends_s
        return is_grace or self._has_feeds()

    def _prefill_part(self) -> None:
        client, parts = next(iter(self._prefills.items()))
        began_s = time.perf_counter()
        try:
            if (reused_ids := _next_part(parts)) is not None:
                # Answers with the same prompt may begin before this one ends.
                keep_read_part(client, self.prefix_cache)
                self._decoding.add(client)
                self._reply(client, reused_ids)
        except Exception as exc:  # noqa: BLE001 - it is raised in the client's own thread
            self._reply(client, exc)
        self._prefill_debt_s += time.perf_counter() - began_s

    # Steps

    def _has_feeds(self) -> bool:
        return any(isinstance(request, Feed) for request in self._requests.values())

    def _is_step_due(self) -> bool:
        if not self._has_feeds():
            return False
        return not self._awaited or time.perf_counter() >= self._grace_ends_s

    def _step(self) -> None:
        """Feed a token to each client that waits for one: in one batch where there are several."""
        began_s = time.perf_counter()
        self._grace_ends_s = 0.0
        batched: dict[SmallClient, Feed] = {}
        expected: dict[SmallClient, Signals] = {}
        for client, request in list(self._requests.items()):
            if not isinstance(request, Feed):
                continue
            try:
                if not request.unbatched and self.is_shared and self._enter_batch(client, expected):
                    batched[client] = request
                else:
                    self._step_unbatched(client, request)
            except Exception as exc:  # noqa: BLE001 - it is raised in the client's own thread
                self._reply(client, exc)
        if batched:
            try:
                self._step_batch(batched, expected)
            except Exception as exc:  # noqa: BLE001 - it is raised in the clients' own threads
                self._drop_batch(exc)
        self._step_s = time.perf_counter() - began_s
        self._prefill_debt_s = max(0.0, self._prefill_debt_s - self._step_s)

    def _enter_batch(self, client: SmallClient, expected: dict[SmallClient, Signals]) -> bool:
        """Make a client part of the batch if there is room; return whether it is.

        For an exact client that is new there, first compute the step as one row too.
        """
        sequence = client.sequence
        if client.is_exact and sequence.batch_row is None and sequence.fits_batch:
            token_id = cast(Feed, self._requests[client]).token_ids[0]
            expected[client] = sequence.extend([token_id])
            sequence.rollback(1)
        return sequence.enter_batch()

    def _step_unbatched(self, client: SmallClient, request: Feed) -> None:
        signals = client.sequence.extend(request.token_ids)
        client.was_batched = request.was_batched
        self.steps += 1
        self.single_tokens += len(request.token_ids)
        self._reply(client, signals)

    def _step_batch(
        self, feeds: dict[SmallClient, Feed], expected: dict[SmallClient, Signals]
    ) -> None:
        rows = {
            client.sequence.batch_row: feed
            for client, feed in feeds.items()
            if client.sequence.batch_row is not None
        }
        # As one row does, a sampler draws once for a token of several ids.
        signals = self._batch.step(
            {row: feed.token_ids[0] for row, feed in rows.items()},
            undrawn=[row for row, feed in rows.items() if len(feed.token_ids) > 1],
        )
        self.steps += 1
        self.batched_tokens += len(feeds)
        for client, feed in feeds.items():
            batch_row = client.sequence.batch_row
            assert batch_row is not None
            client.sequence.on_batch_step(feed.token_ids[0])
            if client in expected:
                self._rounding.add(expected[client], signals[batch_row])
            # Each row of a batch takes one token per step.
            feed.token_ids, feed.was_batched = feed.token_ids[1:], True
            if not feed.token_ids:
                client.was_batched = True
                self._reply(client, signals[batch_row])

    def _drop_batch(self, failure: Exception) -> None:
        """End all answers of the batch, whose KV caches are undefined after a failed step."""
        self._batch.clear()
        for client in self._decoding:
            if client.sequence.batch_row is not None:
                client.sequence.lose()
                if client in self._requests:
                    self._reply(client, failure)
                else:
                    client.cancel(failure)


def _next_part(parts: Generator[None, None, int]) -> int | None:
    """Read the next part of a prompt; return the number of ids reused if it was the last."""
    try:
        next(parts)
    except StopIteration as end:
        return cast(int, end.value)
    return None
