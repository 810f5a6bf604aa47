"""How a reply is asked for and read: several tokens streamed, several at once, or one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mlxroute.large.dialects import StreamingDialect
from mlxroute.large.negotiation.negotiator import NegotiatedDialect
from mlxroute.large.vocabulary.reply_reader import ReadReply, read_all_tokens, read_first_token

_MOST_PARTS: Final = 6
_TEXT_ONLY_RUNG: Final = 4


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """How many positions to ask for, how to read them, and whether to have them streamed."""

    count: int
    read: ReadReply
    streamed: bool = False


class RequestPlanner:
    """The ways to ask under some terms; what failed under them once is not tried again."""

    def __init__(self) -> None:
        self._one_by_one: NegotiatedDialect | None = None
        self._unstreamed: NegotiatedDialect | None = None

    def may_stream(self, terms: NegotiatedDialect) -> bool:
        """Whether tokens ahead may come one by one."""
        return isinstance(terms.dialect, StreamingDialect) and terms is not self._unstreamed

    def not_streamed(self, terms: NegotiatedDialect) -> None:
        """A server did not take part in streaming."""
        self._unstreamed = terms

    def after(self, terms: NegotiatedDialect, *, prefetch: int) -> Iterator[RequestPlan]:
        """One way after the other, each for when the one before gave no token."""
        if prefetch and terms.dialect.rung < _TEXT_ONLY_RUNG and terms is not self._one_by_one:
            if self.may_stream(terms):
                yield RequestPlan(prefetch + 1, read_all_tokens, streamed=True)
            if not self.may_stream(terms):
                yield RequestPlan(prefetch + 1, read_all_tokens)
            # What came could not be taken apart, and hardly will be the next time.
            self._one_by_one = terms
        for count in range(1, _MOST_PARTS + 1):
            yield RequestPlan(count, read_first_token)
