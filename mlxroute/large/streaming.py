"""The tokens of one call while its reply is still coming."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mlxroute.errors import LargeError, LargeProtocolError, LargeRefused
from mlxroute.large.http import retry
from mlxroute.large.http.background import Tokens
from mlxroute.large.http.deadline import Deadline
from mlxroute.types import LargeToken


class StreamedTokens:
    """Tells `publish` of each longer beginning of a call's tokens, and times them."""

    def __init__(self, publish: Callable[[Tokens], None], deadline: Deadline) -> None:
        self._publish = publish
        self._deadline = deadline
        self._began_s = time.perf_counter()
        self.tokens: Tokens = ()

    def heard(self, tokens: Sequence[LargeToken]) -> bool:
        """Publish those that are new; return whether there are any at all."""
        if not self._deadline.cancelled and (new := tokens[len(self.tokens) :]):
            self.tokens += tuple(self._timed(token) for token in new)
            self._publish(self.tokens)
        return bool(self.tokens)

    def completed(self, tokens: Tokens) -> Tokens:
        """What came in all: the beginning as it was published, with the counts of the whole."""
        if not self.tokens:
            return (self._timed(tokens[0]), *tokens[1:])
        whole, first = tokens[0], self.tokens[0]
        first = replace(
            first,
            prompt_tokens=whole.prompt_tokens,
            cached_tokens=whole.cached_tokens,
            completion_tokens=whole.completion_tokens,
            uploaded_bytes=whole.uploaded_bytes,
        )
        new = tokens[len(self.tokens) :]
        return (first, *self.tokens[1:], *map(self._timed, new))

    def _timed(self, token: LargeToken) -> LargeToken:
        latency_s = time.perf_counter() - self._began_s
        return replace(token, latency_s=latency_s, lost_s=self._deadline.lost_s)


def may_do_whole(error: LargeError) -> bool:
    """Whether a server that failed so at a streamed call may answer one that is not."""
    if isinstance(error, LargeRefused):
        return error.status not in (401, 403) and not retry.is_transient_status(error.status)
    return isinstance(error, LargeProtocolError)
