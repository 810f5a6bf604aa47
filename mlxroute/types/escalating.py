"""Values of calls to the large model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxroute.types.decoding import Message, Vocabulary
from mlxroute.types.limits import check_number
from mlxroute.types.prompt_text import PromptText


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

    Args:
        text: The prompt in the small model's template, and the answer up to the last token that
            ends on a whole character.
        token_ids: Prompt and answer, in the small model's vocabulary.
        fragment_ids: The tokens after `text`, whose bytes end inside a character.
        vocabulary: The small model's vocabulary.
        messages: The conversation.
        spans: The answer in `text`, by the model that wrote it.
        prompt: The part of `text` before the answer; None if it is not known.
    """

    text: str
    token_ids: Sequence[int]
    fragment_ids: tuple[int, ...]
    vocabulary: Vocabulary
    messages: tuple[Message, ...] = ()
    spans: tuple[Span, ...] = ()
    prompt: PromptText | None = None


@dataclass(frozen=True, slots=True)
class LargeToken:
    """One token of the large model, in the small model's vocabulary.

    Args:
        token_ids: One id if the vocabularies share the token, several if its bytes are spelled in
            the small vocabulary; the small model's end token if `is_eos`.
        text: Its text; empty for a part of a character and for an end token.
        is_eos: Whether it ends the answer.
        logprob: Its log-probability in nats; None if the server gives none.
        top: Pairs of text and logprob, the likeliest first.
        prompt_tokens: The server's count; None if it reports none. Likewise `cached_tokens` and
            `completion_tokens`.
        uploaded_bytes: Size of the request bodies.
        latency_s: Seconds since the call was started.
        large_ids: The server's own ids; empty if it names none.
        lost_s: The part of `latency_s` spent on failed attempts.
        top_bytes: The alternatives that are text, as pairs of bytes and logprob; empty by default.
        end_logprob: Logprob of the alternatives that end the answer, in nats; None (default) if no
            alternative does.
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
    top_bytes: tuple[tuple[bytes, float], ...] = ()
    end_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Escalation:
    """The outcome of one escalated position: a large token, or the reason for its absence.

    Args:
        small_id: The small model's own token.
        large: The large token; None after a failure.
        failure: Why there is no large token.
        latency_s: Seconds that the call took.
        prefetched: Whether the token came with an earlier call and took none of its own.
        accepted: Whether the small model's token was kept because the large model finds it nearly
            as likely as its own.
        withheld: Whether a never-send pattern kept the position local, so that no call was made.
    """

    small_id: int
    large: LargeToken | None
    failure: str | None
    latency_s: float
    prefetched: bool = False
    accepted: bool = False
    withheld: bool = False

    @property
    def agreed(self) -> bool:
        """Whether the large token is the small model's own choice."""
        return self.large is not None and self.large.token_ids == (self.small_id,)


@dataclass(frozen=True, slots=True)
class CallFailure:
    """The positions of an answer that the large model did not decide for one kind of reason.

    Args:
        kind: The kind: `timeout`, `unreachable`, `refused`, `status 401` and so on, `invalid
            reply`, `not continued`, `cannot be sent`, `paused`, `no recorded reply`, `no time
            left` or `not recorded`; `failed` for any other.
        reason: The text of the first error of this kind.
        count: Number of positions.
        was_called: Whether calls were made. False where earlier failures prevented them, and where
            nothing could be sent.
        parameter: Name of the argument that the error named; None (default) if it named none.
    """

    kind: str
    reason: str
    count: int
    was_called: bool
    parameter: str | None = None


@dataclass(frozen=True, slots=True)
class Uploads:
    """Totals of what was sent to the large model.

    Args:
        requests: Request bodies sent, answered or not.
        size_bytes: Size of these bodies.
        tokens: Prompt tokens of answered requests.
        cached_tokens: Those of them that came from the server's cache.
        completion_tokens: Tokens generated.
    """

    requests: int = 0
    size_bytes: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of_call(cls, context: LargeContext, tokens: Sequence[LargeToken]) -> Uploads:
        """Return what one call sent and got, as its tokens tell.

        A server may have generated more than the tokens of the answer, such as thoughts.
        """
        first = tokens[0]
        return cls(
            requests=1,
            size_bytes=first.uploaded_bytes,
            tokens=len(context.token_ids) if first.prompt_tokens is None else first.prompt_tokens,
            cached_tokens=first.cached_tokens or 0,
            completion_tokens=max(len(tokens), first.completion_tokens or 0),
        )

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

    Raises UsageError, with the parameter's name, for a price below 0 or one that is not finite.
    """

    input: float
    cached_input: float
    output: float

    def __post_init__(self) -> None:
        for name in ("input", "cached_input", "output"):
            check_number(name, getattr(self, name), limits=f"price_{name}")

    def cost(self, uploads: Uploads) -> float:
        """Return the estimated cost of some uploads, in the same currency."""
        return (
            (uploads.tokens - uploads.cached_tokens) * self.input
            + uploads.cached_tokens * self.cached_input
            + uploads.completion_tokens * self.output
        ) / 1e6
