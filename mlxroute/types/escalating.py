"""Values of calls to the large model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxroute.types.decoding import Message, Vocabulary


@dataclass(frozen=True, slots=True)
class Span:
    """A part of the answer in whole characters.

    `large_ids` are the large model's own ids for it; empty where the small model wrote it, or where
    the server names no ids.
    """

    text: str
    large_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LargeContext:
    """Everything the large model may need to generate the next token of an answer.

    `text` is the prompt in the small model's template and the answer up to the last token that ends
    on a whole character; `spans` are that part of the answer. `fragment_ids` are the tokens after
    it, whose bytes end inside a character. `token_ids` are prompt and answer in the small model's
    vocabulary, and `messages` the conversation.
    """

    text: str
    token_ids: Sequence[int]
    fragment_ids: tuple[int, ...]
    vocabulary: Vocabulary
    messages: tuple[Message, ...] = ()
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class LargeToken:
    """One token of the large model, in the small model's vocabulary.

    `token_ids` is one id where the vocabularies share the token, and several where its bytes are
    spelled in the small vocabulary. `is_eos` marks the end of the answer; `token_ids` is then the
    small model's end token. `logprob` is None where the server gives none. `top` are pairs of text
    and logprob, the likeliest first. `large_ids` are the server's own ids, empty where it names
    none. `prompt_tokens`, `cached_tokens` and `completion_tokens` are the server's counts, None
    where it reports none. `uploaded_bytes` is the size of the request bodies. `latency_s` are
    seconds since the call began, `lost_s` the part of them spent on failed attempts.
    """

    token_ids: tuple[int, ...]
    text: str
    is_eos: bool
    logprob: float | None
    top: tuple[tuple[str, float], ...]
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    uploaded_bytes: int
    latency_s: float
    large_ids: tuple[int, ...] = ()
    lost_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Escalation:
    """The outcome of one escalated position: a large token, or the reason for its absence.

    A `prefetched` token came with an earlier call and took no call of its own.
    """

    small_id: int
    large: LargeToken | None
    failure: str | None
    latency_s: float
    prefetched: bool = False

    @property
    def agreed(self) -> bool:
        """Whether the large token is the small model's own choice."""
        return self.large is not None and self.large.token_ids == (self.small_id,)


@dataclass(frozen=True, slots=True)
class Uploads:
    """Totals of what was sent to the large model.

    `requests` and `size_bytes` count every body sent, answered or not. The tokens are those of
    answered requests: `tokens` of prompts, `cached_tokens` of them from the server's cache, and
    `completion_tokens` generated.
    """

    requests: int = 0
    size_bytes: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Uploads) -> Uploads:
        return Uploads(
            self.requests + other.requests,
            self.size_bytes + other.size_bytes,
            self.tokens + other.tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def __sub__(self, earlier: Uploads) -> Uploads:
        return Uploads(
            self.requests - earlier.requests,
            self.size_bytes - earlier.size_bytes,
            self.tokens - earlier.tokens,
            self.cached_tokens - earlier.cached_tokens,
            self.completion_tokens - earlier.completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of the large model's server, for a million tokens, in the currency it bills.

    Args:
        input: Price of prompt tokens.
        cached_input: Price of prompt tokens from the server's cache.
        output: Price of generated tokens.
    """

    input: float
    cached_input: float
    output: float

    def cost(self, uploads: Uploads) -> float:
        """Return the estimated cost of some uploads, in the same currency."""
        return (
            (uploads.tokens - uploads.cached_tokens) * self.input
            + uploads.cached_tokens * self.cached_input
            + uploads.completion_tokens * self.output
        ) / 1e6
