"""A fixed set of answers written at once, each by a function of its own.

Answers with the same prompt and the same tokens so far share one row of the batch: what the small
model says after a text is computed once. A batch rounds differently from a single row, so a near
tie may be decided differently than in an answer alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

from mlxroute.recorded.forward_only import ForwardOnlySmall
from mlxroute.recorded.replies import RecordingStopped
from mlxroute.serving.device_thread import DeviceThread
from mlxroute.serving.prompts import ServedPrompt, encode_prompt
from mlxroute.serving.small_client import AnswerCancelled, SmallClient
from mlxroute.small import SmallModel
from mlxroute.types import (
    EncodedPrompt,
    Message,
    Progress,
    PromptText,
    Sampling,
    Signals,
    Vocabulary,
)

_T = TypeVar("_T")
_CACHE_BYTES: Final = 1 << 30


class ConcurrentAnswers:
    """Runs jobs that each write one answer, with the small model's steps batched.

    Args:
        small: The small model, which nothing else may use during `run`.
        on_abort: Called when a job fails or the run is interrupted; it must end the calls in
            flight.
    """

    def __init__(self, small: SmallModel, *, on_abort: Callable[[], None]) -> None:
        self._small = small
        self._on_abort = on_abort

    def run(
        self, jobs: Sequence[tuple[Sequence[Message], Callable[[SharedSmallClient], _T]]]
    ) -> list[_T]:
        """Run all jobs at once and return their results in order.

        If a job fails, the others are aborted, and its exception is raised once all have ended.

        Args:
            jobs: For each job, a conversation and the function that answers it. The function takes
                the `SharedSmallClient` to use as its small model, and waits for anything else
                inside its `blocked`.
        """
        texts = _SharedTexts(self._small)
        try:
            clients = [
                SharedSmallClient(texts, self._small, conversation) for conversation, _ in jobs
            ]
            with ThreadPoolExecutor(len(jobs)) as pool:
                futures = [
                    pool.submit(self._run_job, job, client, texts)
                    for (_, job), client in zip(jobs, clients, strict=True)
                ]
                try:
                    for future in futures:
                        future.exception()
                except BaseException:
                    self._abort(texts)
                    raise
        finally:
            texts.close()
        return _collect_results(futures)

    def _run_job(
        self, job: Callable[[SharedSmallClient], _T], client: SharedSmallClient, texts: _SharedTexts
    ) -> _T:
        try:
            return job(client)
        except BaseException:
            self._abort(texts)
            raise
        finally:
            client.end()

    def _abort(self, texts: _SharedTexts) -> None:
        self._on_abort()
        texts.abort()


class _Text:
    """A prompt and some tokens after it, with the signals there.

    `client` holds them on the device, unless an answer uses it.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.signals: Future[Signals] = Future()
        self.client: SmallClient | None = None
        self.readers = 0
        self.children: dict[int, _Text] = {}


class _SharedTexts:
    """The texts of all answers as a tree, whose nodes are computed once. Thread-safe."""

    def __init__(self, small: SmallModel) -> None:
        self._device = DeviceThread(small, cache_bytes=_CACHE_BYTES)
        self._lock = threading.Lock()
        self._roots: dict[tuple[int, ...], _Text] = {}
        self._clients: list[SmallClient] = []
        self._is_aborted = False

    def begin(self, asker: SharedSmallClient, prompt: ServedPrompt) -> _Text:
        """Return the text of a prompt alone, with its signals."""
        with self._lock:
            is_new = prompt.ids not in self._roots
            text = self._roots.setdefault(prompt.ids, _Text(prompt.ids))
            text.readers += 1
        return self._compute(asker, text, None, is_new=is_new)

    def extend(self, asker: SharedSmallClient, text: _Text, token_id: int) -> _Text:
        """Leave a text for the one with one more token; return that, with its signals."""
        with self._lock:
            is_new = token_id not in text.children
            child = text.children.setdefault(token_id, _Text((*text.ids, token_id)))
            child.readers += 1
            # The first who goes on takes the client along.
            client, text.client = (text.client, None) if is_new else (None, text.client)
        try:
            return self._compute(asker, child, client, is_new=is_new)
        finally:
            self.leave(text)

    def leave(self, text: _Text) -> None:
        """Give up a text; the last reader releases the client."""
        with self._lock:
            text.readers -= 1
            client = None
            if not text.readers:
                client, text.client = text.client, None
        if client is not None:
            client.release()

    def _compute(
        self, asker: SharedSmallClient, text: _Text, client: SmallClient | None, *, is_new: bool
    ) -> _Text:
        self._device.set_awaited(asker, False)
        if is_new:
            try:
                self._compute_signals(asker, text, client)
            except BaseException as exc:
                text.signals.set_exception(exc)
                raise
        text.signals.result()
        self._device.set_awaited(asker, True)
        return text

    def _compute_signals(
        self, asker: SharedSmallClient, text: _Text, client: SmallClient | None
    ) -> None:
        if client is None:
            prompt = ServedPrompt((), EncodedPrompt(text.ids, PromptText("", "")))
            client = self._device.new_client(prompt, asker=asker)
            with self._lock:
                self._clients.append(client)
            self._check(client)
            signals, _ = client.prefill(text.ids, sampling=Sampling(), progress=_ignore)
        else:
            client.asker = asker
            signals = client.extend(text.ids[-1:])
        text.client = client
        text.signals.set_result(signals)

    def _check(self, client: SmallClient) -> None:
        if self._is_aborted:
            client.cancel()

    def set_awaited(self, asker: SharedSmallClient, is_awaited: bool) -> None:
        """Say whether an answer computes on its own and will ask for a step soon."""
        self._device.set_awaited(asker, is_awaited)

    def abort(self) -> None:
        """Make all answers raise AnswerCancelled at their next step."""
        with self._lock:
            self._is_aborted = True
            clients = list(self._clients)
        for client in clients:
            client.cancel()

    def close(self) -> None:
        """End the thread of the device; the answers must have ended."""
        self._device.close()


class SharedSmallClient(ForwardOnlySmall):
    """The small model as one answer uses it.

    Args:
        texts: The texts that the answers share.
        small: The small model.
        conversation: The conversation that is answered.
    """

    def __init__(
        self, texts: _SharedTexts, small: SmallModel, conversation: Sequence[Message]
    ) -> None:
        self._texts = texts
        self._small = small
        self._prompt = encode_prompt(small, conversation)
        self._text: _Text | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return self._small.vocabulary

    @property
    def context_length(self) -> int:
        return self._small.context_length

    @property
    def answer_ids(self) -> Sequence[int]:
        """The ids of the answer so far, without the prompt."""
        return self._text.ids[len(self._prompt.ids) :] if self._text else ()

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        return self._prompt.encoded

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        self._text = self._texts.begin(self, self._prompt)
        return self._text.signals.result(), 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        text = self._text or self._texts.begin(self, self._prompt)
        for token_id in token_ids:
            text = self._text = self._texts.extend(self, text, token_id)
        return text.signals.result()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Let other answers decode without this one in the `with` block."""
        # Before its first step nobody waits for it, and nobody should afterwards.
        is_awaited = self._text is not None
        if is_awaited:
            self._texts.set_awaited(self, False)
        try:
            yield
        finally:
            if is_awaited:
                self._texts.set_awaited(self, True)

    def end(self) -> None:
        """Give up the text."""
        self._texts.set_awaited(self, False)
        if self._text is not None:
            self._texts.leave(self._text)


def _ignore(label: str, done: int, total: int | None) -> None:
    pass


def _collect_results(futures: Sequence[Future[_T]]) -> list[_T]:
    """Return the jobs' results, or raise the failure that aborted the other jobs."""
    failures = [failure for future in futures if (failure := future.exception()) is not None]
    for failure in failures:
        if not isinstance(failure, AnswerCancelled | RecordingStopped):
            raise failure
    return [future.result() for future in futures]
