"""A client of the large model that records its replies, several answers at a time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from mlxroute.closeable import Closeable
from mlxroute.engine.escalation.never_send import find_match
from mlxroute.engine.protocols import NamedLargeProtocol, PendingCallProtocol
from mlxroute.errors import LargeError, LargeNotContinued, LargeProtocolError, UsageError
from mlxroute.recorded.reply_file import ReplyFile
from mlxroute.recorded.reply_records import WholeAnswer
from mlxroute.types import LargeContext, LargeToken, Message, Uploads

_POLL_S: Final = 0.1
# A server that answers many questions at once takes longer over each than in a chat.
RECORDING_TIMEOUT_S: Final = 600.0


class RecordingStopped(LargeError):
    """Raised for calls after the end of a run, by an interrupt or the failure of an answer."""


class AnswerNotContinued(LargeProtocolError):
    """Raised where the server does not go on with an answer that the large model writes alone."""


class _WholeReply(Protocol):
    @property
    def text(self) -> str: ...

    @property
    def ends(self) -> bool: ...

    @property
    def prompt_tokens(self) -> int | None: ...


class _WholeChat(Protocol):
    def answer(self, messages: Sequence[Message], *, max_tokens: int) -> _WholeReply: ...

    def cancel(self) -> None: ...


class _Scorer(Protocol):
    def score(self, prompt: LargeContext, answered: LargeContext) -> Iterator[float]: ...


class RecordableLarge(NamedLargeProtocol, Protocol):
    """A large model whose replies can be recorded."""

    @property
    def full_model_name(self) -> str: ...

    @property
    def is_approximate(self) -> bool: ...

    def extend_timeout(self, timeout_s: float) -> None: ...

    def whole_chat(self, *, timeout_s: float) -> _WholeChat: ...

    def scorer(self, *, timeout_s: float) -> _Scorer: ...


def recorded_name(large: RecordableLarge) -> str:
    """Return the large model's full name in records; by example, its tokens are not its own."""
    return f"{large.full_model_name}-by-example" if large.is_approximate else large.full_model_name


class RecordingLarge(Closeable):
    """The large model and the file `path` of its replies. Thread-safe.

    At most `at_once` calls are in flight, each for a different answer, and none for longer than
    `timeout_s` seconds. A text that a pattern of `never_send` matches is not sent: the call raises
    UsageError.
    """

    def __init__(
        self,
        large: RecordableLarge,
        path: Path,
        *,
        at_once: int = 1,
        never_send: Sequence[re.Pattern[str]] = (),
        timeout_s: float = RECORDING_TIMEOUT_S,
    ) -> None:
        self.timeout_s = timeout_s
        self._large = large
        large.extend_timeout(timeout_s)
        self._never_send = tuple(never_send)
        self._begin_lock = threading.Lock()
        self._call_slots = threading.Semaphore(at_once)
        self._closed = False
        self._whole_chats: list[_WholeChat] = []
        self.replies = ReplyFile(path)

    @property
    def model_name(self) -> str:
        """The large model's name."""
        return self._large.model_name

    @property
    def recorded_name(self) -> str:
        """The name by which records of the large model's replies are found; see `recorded_name`."""
        return recorded_name(self._large)

    @property
    def is_approximate(self) -> bool:
        """Whether the large model's own answers are not those of calls for each token."""
        return self._large.is_approximate

    def write_whole_answer(
        self, conversation: Sequence[Message], *, max_tokens: int
    ) -> WholeAnswer:
        """Return the large model's own answer, asked for as a whole unless it is recorded.

        Raises LargeError, UsageError and RecordingStopped.
        """
        if (recorded := self.replies.find_whole(conversation, max_tokens)) is not None:
            return recorded
        self._check_sendable(conversation, "")
        self._acquire_slot()
        try:
            whole = self._ask_whole(conversation, max_tokens)
        finally:
            self.release_slot()
        self.replies.add_whole(conversation, max_tokens, whole)
        return whole

    def _ask_whole(self, conversation: Sequence[Message], max_tokens: int) -> WholeAnswer:
        chat = self._large.whole_chat(timeout_s=self.timeout_s)
        self._whole_chats.append(chat)
        try:
            # `close` cancels the chats that are listed when it is called.
            self._check_open()
            began_s = time.perf_counter()
            reply = chat.answer(conversation, max_tokens=max_tokens)
            seconds = round(time.perf_counter() - began_s, 4)
        finally:
            self._whole_chats.remove(chat)
        return WholeAnswer(reply.text, reply.ends, reply.prompt_tokens, seconds)

    def score(self, prompt: LargeContext, answered: LargeContext) -> tuple[float, ...]:
        """Return the large model's logprobs of an answer, token by token; they are not recorded.

        `answered` is `prompt` with the answer. Raises LargeProtocolError if the server gives none,
        other LargeErrors, UsageError and RecordingStopped.
        """
        self._check_sendable(answered.messages, answered.text)
        logprobs: list[float] = []
        self._acquire_slot()
        try:
            for logprob in self._large.scorer(timeout_s=self.timeout_s).score(prompt, answered):
                logprobs.append(logprob)
                self._check_open()
        finally:
            self.release_slot()
        return tuple(logprobs)

    def new_view(
        self,
        *,
        large_only: bool = False,
        blocked: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> RecordedLargeView:
        """Return a view of the large model for one answer.

        If the answer has tokens of the large model only (`large_only`), no other can stand in for
        one of them: where it does not go on, calls raise AnswerNotContinued. Waits for calls are
        inside the context that `blocked` returns; nothing by default.
        """
        return RecordedLargeView(self, large_only=large_only, blocked=blocked)

    def close(self) -> None:
        """End the run: cancel whole answers; each wait for a call raises RecordingStopped."""
        self._closed = True
        for chat in list(self._whole_chats):
            chat.cancel()

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        """Call the large model, after waiting for one of the `at_once` slots.

        Give the slot back with `release_slot`. Raises UsageError and RecordingStopped.
        """
        self._check_sendable(context.messages, context.text)
        self._acquire_slot()
        with self._begin_lock:
            return self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)

    def _check_sendable(self, conversation: Sequence[Message], text: str) -> None:
        if not self._never_send:
            return
        contents = [str(message["content"]) for message in conversation]
        if (number := find_match(self._never_send, [*contents, text])) is not None:
            raise UsageError(f"an answer matches never-send pattern {number}, so it is not sent")

    def _acquire_slot(self) -> None:
        while not self._call_slots.acquire(timeout=_POLL_S):
            self._check_open()

    def release_slot(self) -> None:
        """Give back the slot of a call that has finished or was cancelled."""
        self._call_slots.release()

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Block until `ready()` is true, or for `timeout_s`. Raises RecordingStopped."""
        while timeout_s > 0 and not ready() and not self._closed:
            self._large.wait(ready, timeout_s=min(_POLL_S, timeout_s))
            timeout_s -= _POLL_S
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise RecordingStopped("the run has ended")


class RecordedLargeView:
    """The large model for one answer: recorded tokens, and calls for those not recorded.

    `uploads` and `calls_s` (seconds) count recorded calls as if they had been made now.
    """

    def __init__(
        self,
        large: RecordingLarge,
        *,
        large_only: bool,
        blocked: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._large = large
        self._blocked = blocked
        self.is_large_only = large_only
        self.uploads = Uploads()
        self.calls_s = 0.0

    @property
    def model_name(self) -> str:
        return self._large.model_name

    @property
    def is_local(self) -> bool:
        return False

    @property
    def max_in_flight(self) -> int:
        return 1

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        tokens = self._large.replies.find_tokens(context.token_ids, prefetch + 1)
        if tokens:
            return _ReplayedCall(self, context, tokens)
        with self._blocked():
            call = self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)
        return _RecordingCall(self, self._large, context, call)

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        with self._blocked():
            self._large.wait(ready, timeout_s=timeout_s)

    def count_call(self, context: LargeContext, tokens: Sequence[LargeToken]) -> None:
        """Add a call and its tokens to the totals."""
        # Latencies count from the start of the call; only the first has one without a stream.
        self.calls_s += max(token.latency_s for token in tokens)
        self.uploads += Uploads.of_call(context, tokens)


class _ReplayedCall:
    """A call whose tokens are recorded: it is finished from the start."""

    ready = finished = True

    def __init__(
        self, view: RecordedLargeView, context: LargeContext, tokens: tuple[LargeToken, ...]
    ) -> None:
        self._view = view
        self._context = context
        self._tokens = tokens
        self._is_counted = False

    def result(self) -> tuple[LargeToken, ...]:
        if not self._is_counted:
            self._is_counted = True
            self._view.count_call(self._context, self._tokens)
        # Failed attempts of the recorded call cost nothing now.
        return (replace(self._tokens[0], lost_s=0.0), *self._tokens[1:])

    def cancel(self) -> None:
        pass


class _RecordingCall:
    """A call in flight whose tokens are recorded once its result is read."""

    def __init__(
        self,
        view: RecordedLargeView,
        large: RecordingLarge,
        context: LargeContext,
        call: PendingCallProtocol,
    ) -> None:
        self._view = view
        self._large = large
        self._context = context
        self._call = call
        self._is_released = self._is_counted = False

    @property
    def ready(self) -> bool:
        # All tokens of a streamed reply are recorded, so the first one alone is not enough.
        return self._call.finished

    @property
    def finished(self) -> bool:
        return self._call.finished

    def result(self) -> tuple[LargeToken, ...]:
        self._release_slot()
        try:
            tokens = self._call.result()
        except LargeNotContinued as exc:
            if self._view.is_large_only:
                raise AnswerNotContinued(str(exc)) from exc
            raise
        if not self._is_counted:
            self._is_counted = True
            self._view.count_call(self._context, tokens)
            self._large.replies.add_tokens(self._context.token_ids, tokens)
        return tokens

    def cancel(self) -> None:
        self._release_slot()
        self._call.cancel()

    def _release_slot(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._large.release_slot()
