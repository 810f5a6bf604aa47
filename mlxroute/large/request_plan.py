"""The requests for a position, in order: several tokens streamed, several at once, or one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mlxroute.errors import LargeError, LargeRefused
from mlxroute.large.dialects import StreamingDialect
from mlxroute.large.negotiation.negotiator import NegotiatedDialect
from mlxroute.large.reply import CompletionAnswer
from mlxroute.large.vocabulary.reply_reader import ReadReply, read_all_tokens, read_first_token

# Upper bound on the large tokens of one character.
_MAX_TOKENS_PER_CHARACTER: Final = 6
# One may be damaged on its way, or hold a transient error.
_MAX_DAMAGED_STREAMS: Final = 2


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """How many positions to ask for, how to read the reply, and whether to stream it."""

    count: int
    read: ReadReply
    streamed: bool = False


class RequestPlanner:
    """Plans the requests for a position, without the kinds that failed under the same dialect.

    A server whose reply could not be divided into tokens is asked for single tokens.
    """

    def __init__(self) -> None:
        self._single_only: NegotiatedDialect | None = None
        self._unstreamed: NegotiatedDialect | None = None
        self._damaged_streams = 0

    def can_stream(self, negotiated: NegotiatedDialect) -> bool:
        """Return whether requests for several tokens are streamed."""
        return (
            isinstance(negotiated.dialect, StreamingDialect) and negotiated is not self._unstreamed
        )

    def record_answer(self, plan: RequestPlan) -> None:
        """Record that a request was answered."""
        if plan.streamed:
            self._damaged_streams = 0

    def record_failed_stream(self, error: LargeError, negotiated: NegotiatedDialect) -> None:
        """Record a request that failed, with `error`, and was answered without streaming.

        No more streams are planned for a server that refused one, or damaged two in a row.
        """
        self._damaged_streams += 1
        is_refusal = isinstance(error, LargeRefused) and not error.in_body
        if is_refusal or self._damaged_streams >= _MAX_DAMAGED_STREAMS:
            self._damaged_streams = 0
            self._unstreamed = negotiated

    def record_without_token(
        self, plan: RequestPlan, answer: CompletionAnswer, negotiated: NegotiatedDialect
    ) -> bool:
        """Record a reply that gave no token; return whether a longer request would give none."""
        if plan.read is read_first_token:
            return answer.completion.ends
        first = answer.positions[0].token
        # A part of a character has no text of its own, and shows nothing of other replies.
        if first.text or first.data or first.piece:
            self._single_only = negotiated
        return False

    def plans(self, negotiated: NegotiatedDialect, *, prefetch: int) -> Iterator[RequestPlan]:
        """Yield plans in order; each is for the case that the one before gave no token."""
        # Asked by example, the model may go on differently once a token is part of the answer.
        is_certain = negotiated.dialect.names_tokens and not negotiated.dialect.is_approximate
        if prefetch and is_certain and negotiated is not self._single_only:
            streamed = self.can_stream(negotiated)
            yield RequestPlan(prefetch + 1, read_all_tokens, streamed=streamed)
        for count in range(1, _MAX_TOKENS_PER_CHARACTER + 1):
            yield RequestPlan(count, read_first_token)
