"""A server's reply: generated positions and tokens, as the dialects read them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplyToken:
    """A token as the server named it; a field is None where the reply does not hold it.

    `piece` is the raw vocabulary entry (`Ġthe`), `data` the token's bytes, `text` its text as the
    server decoded it. `logprob` is a natural logarithm.
    """

    token_id: int | None = None
    piece: str | None = None
    data: bytes | None = None
    text: str | None = None
    logprob: float | None = None

    @property
    def named_bytes(self) -> bytes:
        """The bytes that the reply gives for the token: `data` or, without it, those of `text`."""
        return (self.text or "").encode() if self.data is None else self.data


@dataclass(frozen=True, slots=True)
class ReplyPosition:
    """One generated position: its token and the alternatives, by falling logprob.

    `ends` is True where the server reports that the answer ends with this position.
    """

    token: ReplyToken
    top: tuple[ReplyToken, ...] = ()
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion reply: its positions, and its text as the server decoded it.

    The counts are the server's own, None where it reports none; those of thoughts are a part of
    `completion_tokens`.
    """

    positions: tuple[ReplyPosition, ...]
    text: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def ends(self) -> bool:
        """Whether the answer ends with the last of these positions."""
        return bool(self.positions) and self.positions[-1].ends


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """The positions that a request asked for, with the whole reply.

    `text` is the server's own decoding of these positions; it is empty if the reply holds further
    ones. `complete` is True if there are as many positions as asked for, or if the answer ends
    with them. `uploaded_bytes` is the size of the request bodies.
    """

    positions: tuple[ReplyPosition, ...]
    text: str
    complete: bool
    completion: Completion
    uploaded_bytes: int
