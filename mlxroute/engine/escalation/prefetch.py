"""Prefetched tokens: large tokens beyond the one that a call was made for.

While the answer follows the large model's own continuation, a later position is decided by the
token that a call of its own would return.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from mlxroute.engine.protocols import PendingCallProtocol
from mlxroute.errors import LargeProtocolError
from mlxroute.types import LargeToken

# Number of continuations kept for an answer.
_MAX_CONTINUATIONS = 8


class _Continuation:
    """The tokens of one call, which continue the answer after `prefix`."""

    def __init__(
        self, prefix: tuple[int, ...], pending: PendingCallProtocol, max_tokens: int
    ) -> None:
        self._prefix = prefix
        self._pending = pending
        self._max_tokens = max_tokens
        self.is_reported = False

    @property
    def tokens(self) -> tuple[LargeToken, ...]:
        return self._pending.result()

    @property
    def is_pending(self) -> bool:
        """Whether more tokens may arrive."""
        return not self._pending.finished and len(self.tokens) < self._max_tokens

    def after(self, ids: Sequence[int]) -> LargeToken | None:
        """Return the prefetched token after `ids`; None if it does not start there."""
        if (end := self._end_of_prefix(ids)) is None:
            return None
        for number, token in enumerate(self.tokens):
            # The first token answers the position that the call was made for.
            if number and end == len(ids):
                return token
            start, end = end, end + len(token.token_ids)
            if tuple(ids[start:end]) != token.token_ids:
                break
        return None

    def may_reach(self, ids: Sequence[int]) -> bool:
        """Return whether the token after `ids` may still arrive."""
        if not self.is_pending or (start := self._end_of_prefix(ids)) is None:
            return False
        path = [token_id for token in self.tokens for token_id in token.token_ids]
        missing = len(ids) - start - len(path)
        # Each missing token has at least one id.
        in_reach = 0 <= missing < self._max_tokens - len(self.tokens)
        return in_reach and list(ids[start:])[: len(path)] == path

    def contradicts(self, ids: Sequence[int]) -> bool:
        """Return whether an answer that begins with `ids` differs from this continuation."""
        path = [*self._prefix, *(i for token in self.tokens for i in token.token_ids)]
        return any(a != b for a, b in zip(ids, path, strict=False))

    def cancel(self) -> None:
        if not self._pending.finished:
            self._pending.cancel()

    def _end_of_prefix(self, ids: Sequence[int]) -> int | None:
        end = len(self._prefix)
        return end if tuple(ids[:end]) == self._prefix else None


class PrefetchedPosition:
    """A token that a call in flight may still prefetch, with the interface of a pending call."""

    def __init__(self, continuation: _Continuation, ids: tuple[int, ...]) -> None:
        self._continuation = continuation
        self._ids = ids

    @property
    def ready(self) -> bool:
        """Whether the token has arrived, or can no longer arrive."""
        continuation, ids = self._continuation, self._ids
        return continuation.after(ids) is not None or not continuation.may_reach(ids)

    @property
    def finished(self) -> bool:
        return self.ready

    def result(self) -> tuple[LargeToken, ...]:
        """Return the token; nothing if the continuation contradicts the ids.

        Raises LargeProtocolError if the call ended before its last token.
        """
        if (token := self._continuation.after(self._ids)) is not None:
            return (token,)
        if self._continuation.contradicts(self._ids):
            return ()
        raise LargeProtocolError("a call to the large model ended before its last token")

    def cancel(self) -> None:
        """Leave the call running: other positions may wait for it."""


class PrefetchedTokens:
    """The prefetched tokens of one answer."""

    def __init__(self) -> None:
        self._continuations: deque[_Continuation] = deque()
        self._dropped = 0

    @property
    def generated(self) -> int:
        """The number of tokens that arrived beyond those that calls were made for."""
        # Other threads read it, and a deque cannot change while it is iterated.
        kept = sum(len(continuation.tokens) - 1 for continuation in tuple(self._continuations))
        return self._dropped + kept

    @property
    def arrived(self) -> list[LargeToken]:
        """The tokens of kept continuations beyond those that calls were made for."""
        return [token for continuation in self._continuations for token in continuation.tokens[1:]]

    @property
    def is_pending(self) -> bool:
        """Whether more tokens may arrive."""
        return any(continuation.is_pending for continuation in self._continuations)

    def add(self, ids: Sequence[int], pending: PendingCallProtocol, *, max_tokens: int) -> None:
        """Keep the tokens of a call after `ids` that has returned its first token."""
        continuation = _Continuation(tuple(ids), pending, max_tokens)
        if continuation.is_pending or len(continuation.tokens) > 1:
            self._continuations.appendleft(continuation)
        if len(self._continuations) > _MAX_CONTINUATIONS:
            oldest = self._continuations.pop()
            oldest.cancel()
            self._dropped += len(oldest.tokens) - 1

    def find(self, ids: Sequence[int]) -> LargeToken | None:
        """Return the large token after these answer ids, if it has arrived."""
        tokens = (continuation.after(ids) for continuation in self._continuations)
        return next((token for token in tokens if token is not None), None)

    def pending(self, ids: Sequence[int]) -> PrefetchedPosition | None:
        """Return the token after these ids as pending if a call in flight may still prefetch it."""
        for continuation in self._continuations:
            if continuation.may_reach(ids):
                return PrefetchedPosition(continuation, tuple(ids))
        return None

    def take_finished(self) -> Iterator[tuple[LargeToken, ...]]:
        """Yield the tokens of each continuation that has become complete, once."""
        for continuation in self._continuations:
            if not continuation.is_reported and not continuation.is_pending:
                continuation.is_reported = True
                yield continuation.tokens

    def on_committed(self, ids: Sequence[int], count: int) -> None:
        """Cancel calls in flight whose tokens contradict the first `count` of `ids`."""
        for continuation in self._continuations:
            if continuation.is_pending and continuation.contradicts(ids[:count]):
                continuation.cancel()

    def close(self) -> None:
        """Cancel all calls in flight."""
        for continuation in self._continuations:
            continuation.cancel()
