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
from typing import TypeVar

from mlxroute.recorded.forward_only import ForwardOnlySmall
from mlxroute.recorded.recording_large import RecordingStopped
from mlxroute.serving.device_thread import DeviceThread
from mlxroute.serving.prompts import ServedPrompt, encode_prompt
from mlxroute.serving.requests import DEFAULT_CACHE_BYTES
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
    no_progress,
)

_T = TypeVar("_T")


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
        tree = _PrefixTree(self._small)
        try:
            clients = [
                SharedSmallClient(tree, self._small, conversation) for conversation, _ in jobs
            ]
            with ThreadPoolExecutor(len(jobs)) as pool:
                futures = [
                    pool.submit(self._run_job, job, client, tree)
                    for (_, job), client in zip(jobs, clients, strict=True)
                ]
                try:
                    for future in futures:
                        future.exception()
                except BaseException:
                    self._abort(tree)
                    raise
        finally:
            tree.close()
        return _collect_results(futures)

    def _run_job(
        self, job: Callable[[SharedSmallClient], _T], client: SharedSmallClient, tree: _PrefixTree
    ) -> _T:
        try:
            return job(client)
        except BaseException:
            self._abort(tree)
            raise
        finally:
            client.end()

    def _abort(self, tree: _PrefixTree) -> None:
        self._on_abort()
        tree.abort()


class _PrefixNode:
    """A prompt and some tokens after it, with the signals there.

    `client` holds them on the device, unless an answer uses it.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.signals: Future[Signals] = Future()
        self.client: SmallClient | None = None
        self.ref_count = 0
        self.children: dict[int, _PrefixNode] = {}


class _PrefixTree:
    """The prompts and tokens of all answers as a tree, whose nodes are computed once.

    Thread-safe.
    """

    def __init__(self, small: SmallModel) -> None:
        self._device = DeviceThread(small, cache_bytes=DEFAULT_CACHE_BYTES)
        self._lock = threading.Lock()
        self._roots: dict[tuple[int, ...], _PrefixNode] = {}
        self._clients: list[SmallClient] = []
        self._is_aborted = False

    def begin(self, requester: SharedSmallClient, prompt: ServedPrompt) -> _PrefixNode:
        """Return the node of a prompt alone, with its signals."""
        with self._lock:
            is_new = prompt.ids not in self._roots
            node = self._roots.setdefault(prompt.ids, _PrefixNode(prompt.ids))
            node.ref_count += 1
        return self._compute(requester, node, None, is_new=is_new)

    def extend(self, requester: SharedSmallClient, node: _PrefixNode, token_id: int) -> _PrefixNode:
        """Leave a node for the one with one more token; return that, with its signals."""
        with self._lock:
            is_new = token_id not in node.children
            child = node.children.setdefault(token_id, _PrefixNode((*node.ids, token_id)))
            child.ref_count += 1
            # The first who goes on takes the client along.
            client, node.client = (node.client, None) if is_new else (None, node.client)
        try:
            return self._compute(requester, child, client, is_new=is_new)
        finally:
            self.leave(node)

    def leave(self, node: _PrefixNode) -> None:
        """Give up a node; the last answer at it releases the client."""
        with self._lock:
            node.ref_count -= 1
            client = None
            if not node.ref_count:
                client, node.client = node.client, None
        if client is not None:
            client.release()

    def _compute(
        self,
        requester: SharedSmallClient,
        node: _PrefixNode,
        client: SmallClient | None,
        *,
        is_new: bool,
    ) -> _PrefixNode:
        self._device.set_awaited(requester, False)
        if is_new:
            try:
                self._compute_signals(requester, node, client)
            except BaseException as exc:
                node.signals.set_exception(exc)
                raise
        node.signals.result()
        self._device.set_awaited(requester, True)
        return node

    def _compute_signals(
        self, requester: SharedSmallClient, node: _PrefixNode, client: SmallClient | None
    ) -> None:
        if client is None:
            prompt = ServedPrompt((), EncodedPrompt(node.ids, PromptText("", "")))
            client = self._device.new_client(prompt, requester=requester)
            with self._lock:
                self._clients.append(client)
            self._cancel_if_aborted(client)
            signals, _ = client.prefill(node.ids, sampling=Sampling(), progress=no_progress)
        else:
            client.requester = requester
            signals = client.extend(node.ids[-1:])
        node.client = client
        node.signals.set_result(signals)

    def _cancel_if_aborted(self, client: SmallClient) -> None:
        if self._is_aborted:
            client.cancel()

    def set_awaited(self, requester: SharedSmallClient, is_awaited: bool) -> None:
        """Mark whether an answer is between steps and will ask for the next one soon."""
        self._device.set_awaited(requester, is_awaited)

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
        tree: The prompts and tokens that the answers share.
        small: The small model.
        conversation: The conversation that is answered.
    """

    def __init__(
        self, tree: _PrefixTree, small: SmallModel, conversation: Sequence[Message]
    ) -> None:
        self._tree = tree
        self._small = small
        self._prompt = encode_prompt(small, conversation)
        self._node: _PrefixNode | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return self._small.vocabulary

    @property
    def context_length(self) -> int:
        return self._small.context_length

    @property
    def answer_ids(self) -> Sequence[int]:
        """The ids of the answer so far, without the prompt."""
        return self._node.ids[len(self._prompt.ids) :] if self._node else ()

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        return self._prompt.encoded

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        self._node = self._tree.begin(self, self._prompt)
        return self._node.signals.result(), 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        node = self._node or self._tree.begin(self, self._prompt)
        for token_id in token_ids:
            node = self._node = self._tree.extend(self, node, token_id)
        return node.signals.result()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Let other answers decode without this one in the `with` block."""
        # Before its first step nobody waits for it, and nobody should afterwards.
        is_awaited = self._node is not None
        if is_awaited:
            self._tree.set_awaited(self, False)
        try:
            yield
        finally:
            if is_awaited:
                self._tree.set_awaited(self, True)

    def end(self) -> None:
        """Give up the node."""
        self._tree.set_awaited(self, False)
        if self._node is not None:
            self._tree.leave(self._node)


def _collect_results(futures: Sequence[Future[_T]]) -> list[_T]:
    """Return the jobs' results, or raise the failure that aborted the other jobs."""
    failures = [failure for future in futures if (failure := future.exception()) is not None]
    for failure in failures:
        if not isinstance(failure, AnswerCancelled | RecordingStopped):
            raise failure
    return [future.result() for future in futures]
