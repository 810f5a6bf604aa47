"""The large model with a record of the replies that one answer read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxroute.answers.document import Choice, RecordedReply, RecordedToken
from mlxroute.engine.protocols import NamedLargeProtocol, PendingCallProtocol
from mlxroute.sequences import common_prefix_length
from mlxroute.types import LargeContext, LargeToken, Uploads


class ReplyRecorder:
    """A large model that keeps the replies to one answer's calls."""

    def __init__(self, large: NamedLargeProtocol) -> None:
        self._large = large
        self._calls: list[_RecordingCall] = []

    @property
    def model_name(self) -> str:
        return self._large.model_name

    @property
    def uploads(self) -> Uploads:
        return self._large.uploads

    @property
    def is_local(self) -> bool:
        return self._large.is_local

    @property
    def max_in_flight(self) -> int:
        return self._large.max_in_flight

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        pending = self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)
        call = _RecordingCall(pending, context.token_ids)
        self._calls.append(call)
        return call

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        self._large.wait(ready, timeout_s=timeout_s)

    def replies(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> tuple[RecordedReply, ...]:
        """Return the replies that were read, each with its place in the answer."""
        replies = []
        for call in self._calls:
            if call.tokens:
                before = call.token_ids[len(prompt_ids) :]
                after = common_prefix_length(before, answer_ids)
                tokens = tuple(map(_reply_token, call.tokens))
                replies.append(RecordedReply(after, tuple(before[after:]), tokens))
        return tuple(replies)


class _RecordingCall:
    """A call that keeps the last result that was read, and the ids before it."""

    def __init__(self, pending: PendingCallProtocol, token_ids: Sequence[int]) -> None:
        self._pending = pending
        self.token_ids = token_ids
        self.tokens: tuple[LargeToken, ...] = ()

    @property
    def ready(self) -> bool:
        return self._pending.ready

    @property
    def finished(self) -> bool:
        return self._pending.finished

    def result(self) -> tuple[LargeToken, ...]:
        self.tokens = self._pending.result()
        return self.tokens

    def cancel(self) -> None:
        self._pending.cancel()


def _reply_token(token: LargeToken) -> RecordedToken:
    return RecordedToken(
        ids=token.token_ids,
        text=token.text,
        ends=token.is_eos,
        logprob=token.logprob,
        top=tuple(Choice(text, logprob) for text, logprob in token.top),
        top_bytes=tuple(_bytes_choice(data, logprob) for data, logprob in token.top_bytes),
        large_ids=token.large_ids,
        latency_s=token.latency_s,
    )


def _bytes_choice(data: bytes, logprob: float) -> Choice:
    text = data.decode(errors="backslashreplace")
    return Choice(text, logprob, bytes=None if text.encode() == data else data)
