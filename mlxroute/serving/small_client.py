"""The small model as one served answer uses it: its requests run in the thread that owns MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar, cast

from mlxroute.serving.prompts import ServedPrompt
from mlxroute.serving.sequence import DecodedSequence
from mlxroute.types import (
    BranchCost,
    EncodedPrompt,
    Message,
    Progress,
    Sampling,
    Signals,
    Vocabulary,
)

_T = TypeVar("_T")
_SCORED_AT_ONCE: Final = 128


class AnswerCancelled(Exception):
    """Raised in an answer's thread once the answer is cancelled."""


@dataclass(slots=True)
class Prefill:
    """A request to run the prompt without its last token."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    progress: Progress


@dataclass(slots=True)
class Feed:
    """A request to feed tokens; as one row, outside the batch, if `unbatched`.

    `was_batched` is True once the batch has fed some of them.
    """

    token_ids: Sequence[int]
    unbatched: bool = False
    was_batched: bool = False


@dataclass(slots=True)
class Invoke:
    """A request to call a function."""

    function: Callable[[], Any]


@dataclass(slots=True)
class Release:
    """A request to end the sequence and to keep its KV cache in the prefix cache."""


DeviceRequest = Prefill | Feed | Invoke | Release


class Device(Protocol):
    """The thread that owns MLX, as clients see it."""

    @property
    def is_shared(self) -> bool:
        """Whether several answers are decoded."""
        ...

    @property
    def rounding_nats(self) -> float:
        """Bound of the differences between a batch and a single row.

        It holds for logprobs, entropies and head scores.
        """
        ...

    def post(self, client: SmallClient, request: DeviceRequest) -> None:
        """Queue a request; the reply is put into `client.replies`."""
        ...

    def wake(self) -> None:
        """Make the thread look at clients that were cancelled."""
        ...

    def set_awaited(self, requester: object, is_awaited: bool) -> None:
        """Mark whether a requester is between steps and will ask for the next one soon."""
        ...


class SmallClient:
    """The small model as one answer uses it; it fulfils the engine's `SmallProtocol`.

    Args:
        device: The thread that owns MLX.
        sequence: The tokens on the device.
        prompt: The encoded prompt.
        is_exact: Whether no KV cache of an earlier answer may be used, and the rounding of batches
            matters. With a temperature, the answer is then in no batch.
        on_progress: Receives how many tokens of the prompt are read, and how many there are.
        requester: What asks for the next step after a reply; None for the client itself.

    Attributes:
        replies: Receives the reply to each request, or an exception to raise.
        requester: As given.
        cancellation: What the answer's requests raise once it is cancelled; None before.
        was_batched: Whether a batch fed some of the latest tokens.
    """

    def __init__(
        self,
        device: Device,
        sequence: DecodedSequence,
        prompt: ServedPrompt,
        *,
        is_exact: bool,
        on_progress: Callable[[int, int], None],
        requester: object,
    ) -> None:
        self.requester = self if requester is None else requester
        self.sequence = sequence
        self.prompt = prompt
        self.is_exact = is_exact
        self.replies: SimpleQueue[Any] = SimpleQueue()
        self.cancellation: Exception | None = None
        self.was_batched = False
        # Whether the answer stays out of the batch.
        self._is_unbatched = False
        self._device = device
        self._on_progress = on_progress

    @property
    def is_cancelled(self) -> bool:
        """Whether the answer was cancelled."""
        return self.cancellation is not None

    def cancel(self, failure: Exception | None = None) -> None:
        """Make the next request of the answer, or the present one, raise `failure`.

        By default that is AnswerCancelled.
        """
        self.cancellation = AnswerCancelled() if failure is None else failure
        self._device.wake()

    def check_cancelled(self) -> None:
        """Raise AnswerCancelled if the answer was cancelled, or the failure that ended it."""
        if self.cancellation is not None:
            raise self.cancellation

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Let other answers decode without this one in the `with` block."""
        self._device.set_awaited(self.requester, False)
        try:
            yield
        finally:
            self._device.set_awaited(self.requester, True)

    def release(self) -> None:
        """End the sequence."""
        self._request(Release())

    def score_prompt(
        self, *, is_stopped: Callable[[], bool] = lambda: False
    ) -> tuple[list[Signals], list[float]]:
        """Return the signals at each position of the prompt but the first, and its own logprobs.

        Raises UsageError for an architecture whose hidden state cannot be read, and AnswerCancelled
        once `is_stopped` returns True.
        """
        ids, small = self.prompt.ids, self.sequence.small
        signals: list[Signals] = []
        logprobs: list[float] = []
        # The logits of a part are in memory at once, and other answers decode between parts.
        for start in range(1, len(ids), _SCORED_AT_ONCE):
            if is_stopped():
                raise AnswerCancelled
            part = ids[start : start + _SCORED_AT_ONCE]
            scored = self._invoke(partial(small.score_text, ids[:start], part))
            signals += scored.signals
            logprobs += scored.logprobs
        return signals, logprobs

    # The engine's SmallProtocol

    @property
    def vocabulary(self) -> Vocabulary:
        return self.sequence.small.vocabulary

    @property
    def context_length(self) -> int:
        return self.sequence.small.context_length

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        return self.prompt.encoded

    @property
    def cached_ids(self) -> Sequence[int]:
        return self.sequence.ids

    @property
    def batch_tails(self) -> Sequence[Sequence[int]]:
        is_batched = self.sequence.batch_row is not None
        return () if is_batched else self.sequence.small.batch_tails

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        def report(label: str, done: int, total: int | None) -> None:
            progress(label, done, total)
            self._on_progress(done, len(prompt_ids))

        # No bound of logprobs tells whether rounding could change what is drawn.
        self._is_unbatched = self.is_exact and not sampling.is_greedy
        reused = cast(int, self._request(Prefill(prompt_ids, sampling, report)))
        # The last token is a decode step like the later ones, so that a batch may take it. The
        # engine cannot have the first signals of an exact answer computed again.
        feed = self.extend_unbatched if self.is_exact else self.extend
        signals = feed(prompt_ids[-1:])
        report("prompt", len(prompt_ids), len(prompt_ids))
        return signals, reused

    def extend(self, token_ids: Sequence[int]) -> Signals:
        return cast(Signals, self._request(Feed(token_ids, unbatched=self._is_unbatched)))

    def extend_unbatched(self, token_ids: Sequence[int]) -> Signals:
        """Do what `extend` does as one row, whatever else is decoded."""
        return cast(Signals, self._request(Feed(token_ids, unbatched=True)))

    @property
    def rounding_nats(self) -> float:
        """Bound of the differences between a batch and a single row.

        It holds for logprobs, entropies and head scores.
        """
        return self._device.rounding_nats

    def can_rollback(self, count: int) -> bool:
        return self.sequence.batch_row is not None or self.sequence.small.can_rollback(count)

    def rollback(self, count: int) -> None:
        self._invoke(lambda: self.sequence.rollback(count))

    @property
    def max_rows(self) -> int:
        # The rows of other answers are a better use of a batch than branches.
        if self._device.is_shared or self.sequence.batch_row is not None:
            return 1
        return self.sequence.small.max_rows

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        return self._invoke(lambda: self.sequence.small.measure_branch_cost(token_id, rows=rows))

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        return self._invoke(lambda: self.sequence.small.branch(parents, token_ids))

    def select(self, row: int) -> None:
        self._invoke(lambda: self.sequence.small.select(row))

    def _invoke(self, function: Callable[[], _T]) -> _T:
        return cast(_T, self._request(Invoke(function)))

    def _request(self, request: DeviceRequest) -> Any:
        self._device.post(self, request)
        reply = self.replies.get()
        if isinstance(reply, BaseException):
            raise reply
        return reply
