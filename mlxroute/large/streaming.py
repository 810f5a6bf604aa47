"""The tokens of one call, published while the reply is still arriving."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlxroute.errors import LargeError, LargeNotContinued, LargeProtocolError, LargeRefused
from mlxroute.large.http import retry
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.pending_calls import Tokens
from mlxroute.large.negotiation.vocabulary_pairing import VocabularyPairing
from mlxroute.large.reply import Completion
from mlxroute.types import LargeToken


class TokenStream:
    """Publishes the tokens of one call as they arrive, each with its latency.

    `publish` receives all tokens so far; `tokens` are those that were published. Nothing is
    published once the call is cancelled.
    """

    def __init__(self, publish: Callable[[Tokens], None], deadline: Deadline) -> None:
        self._publish = publish
        self._deadline = deadline
        self._began_s = time.perf_counter()
        self.tokens: Tokens = ()

    def update(self, tokens: Sequence[LargeToken], *, uploaded_bytes: int) -> bool:
        """Publish new tokens; return whether any token of the call was published.

        `uploaded_bytes` is the size of the request body, which the first token carries.
        """
        if not self._deadline.cancelled and (new := tokens[len(self.tokens) :]):
            if not self.tokens:
                new = [replace(new[0], uploaded_bytes=uploaded_bytes), *new[1:]]
            self.tokens += tuple(self._with_latency(token) for token in new)
            self._publish(self.tokens)
        return bool(self.tokens)

    def complete(
        self, tokens: Sequence[LargeToken], completion: Completion, *, uploaded_bytes: int
    ) -> Tokens:
        """Return the tokens of the whole reply; the first carries the counts of the call.

        Published tokens are returned as they were published. `uploaded_bytes` is the size of the
        call's request bodies.
        """
        if self.tokens:
            unpublished = tokens[len(self.tokens) :]
            timed = (*self.tokens, *map(self._with_latency, unpublished))
        else:
            # Without a stream the later tokens arrived with the first, so they have no latency.
            timed = (self._with_latency(tokens[0]), *tokens[1:])
        first = replace(
            timed[0],
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=completion.cached_tokens,
            completion_tokens=completion.completion_tokens,
            uploaded_bytes=uploaded_bytes,
        )
        return (first, *timed[1:])

    def _with_latency(self, token: LargeToken) -> LargeToken:
        return replace(token, latency_s=self._elapsed_s(), lost_s=self._deadline.lost_s)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._began_s


@dataclass(frozen=True, slots=True)
class TokenCall:
    """One call for the next token of an answer and up to `prefetch` later ones."""

    pairing: VocabularyPairing
    deadline: Deadline
    prefetch: int
    stream: TokenStream

    def shortened(self, error: LargeError) -> TokenCall | None:
        """Return the call without prefetch if that may succeed after an error, else None."""
        # The context has to hold the tokens that are asked for, too.
        may_fit = isinstance(error, LargeRefused) and error.is_too_long
        return replace(self, prefetch=0) if self.prefetch and may_fit else None


def may_work_unstreamed(error: LargeError) -> bool:
    """Return whether a streamed request with this error may succeed without streaming."""
    if isinstance(error, LargeRefused):
        is_about_access = error.status in (401, 403)
        # An error in a body was not repeated yet.
        is_transient = not error.in_body and retry.is_transient_status(error.status)
        return not (is_about_access or is_transient or error.is_too_long)
    return isinstance(error, LargeProtocolError) and not isinstance(error, LargeNotContinued)
