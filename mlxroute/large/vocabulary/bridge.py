"""The bridge from tokens of the large model to ids of the small vocabulary, by their bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlxroute.errors import LargeNotContinued, LargeProtocolError
from mlxroute.large.reply import ReplyPosition, ReplyToken
from mlxroute.large.vocabulary.token_reader import REPLACEMENT, TokenReader
from mlxroute.tokenizers.utf8 import decode_or_none
from mlxroute.types import Vocabulary


@dataclass(frozen=True, slots=True)
class BridgedToken:
    """A large token as ids of the small vocabulary.

    Args:
        token_ids: Its ids in the small vocabulary.
        text: Its text; empty for a part of a character and for a special token.
        is_eos: Whether it ends the answer.
        top: The alternatives, as (text, logprob).
        large_ids: Its ids in the large vocabulary; empty if the server names none.
        position_count: Number of reply positions that it takes up.
        top_bytes: The alternatives that are text, as (bytes, logprob).
        end_logprob: The logprob of the alternatives that end the answer, in nats; None if no
            alternative does.
    """

    token_ids: tuple[int, ...]
    text: str
    is_eos: bool
    top: tuple[tuple[str, float], ...]
    large_ids: tuple[int, ...] = ()
    position_count: int = 1
    top_bytes: tuple[tuple[bytes, float], ...] = ()
    end_logprob: float | None = None


class Bridge:
    """Translates the tokens of one server into the small vocabulary.

    With `same_vocabulary` both models share their vocabulary, and ids pass through.
    """

    def __init__(
        self, reader: TokenReader, vocabulary: Vocabulary, *, same_vocabulary: bool
    ) -> None:
        self._reader = reader
        self._vocabulary = vocabulary
        self._same_vocabulary = same_vocabulary

    def first_token(self, positions: Sequence[ReplyPosition], text: str) -> BridgedToken | None:
        """Translate the first position, or the fewest positions that end on a whole character.

        `text` is the server's own decoding of all positions. Returns None when they end inside a
        character, so that more of them are needed. Raises LargeProtocolError for a token that the
        small vocabulary cannot spell.
        """
        bridged = self._first_token(positions, text)
        if bridged is None:
            return None
        alternatives = [(token, token.logprob) for token in positions[0].top]
        top_bytes = tuple(
            (token_bytes, logprob)
            for token, logprob in alternatives
            if logprob is not None and (token_bytes := self._reader.text_bytes(token))
        )
        return replace(
            bridged, top_bytes=top_bytes, end_logprob=self._end_logprob(positions[0].top)
        )

    def _first_token(self, positions: Sequence[ReplyPosition], text: str) -> BridgedToken | None:
        first = positions[0]
        top = tuple(
            (self._display(other), other.logprob)
            for other in first.top
            if other.logprob is not None
        )
        if (end := self._end_id(first)) is not None:
            return BridgedToken((end,), "", is_eos=True, top=top, large_ids=_large_ids([first]))
        if (shared := self._shared_id(first.token)) is not None:
            shared_text = decode_or_none(self._vocabulary.token_bytes(shared)) or ""
            return BridgedToken((shared,), shared_text, is_eos=False, top=top, large_ids=(shared,))
        whole = self._whole_characters(positions, text)
        if whole is None:
            return None
        spelled, count = whole
        ids = self._vocabulary.encode(spelled)
        if b"".join(map(self._vocabulary.token_bytes, ids)) != spelled.encode():
            raise LargeProtocolError(f"the small model's vocabulary cannot spell {spelled!r}")
        return BridgedToken(
            ids,
            spelled,
            is_eos=False,
            top=top,
            large_ids=_large_ids(positions[:count]),
            position_count=count,
        )

    def all_tokens(self, positions: Sequence[ReplyPosition]) -> list[BridgedToken]:
        """Translate the positions into tokens, up to the first part that gives no token.

        Each token is the one that `first_token` returns there. Raises LargeProtocolError if the
        first one cannot be spelled.
        """
        tokens: list[BridgedToken] = []
        while positions and not (tokens and tokens[-1].is_eos):
            try:
                token = self.first_token(positions, "")
            except LargeProtocolError:
                if not tokens:
                    raise
                break
            if token is None:
                break
            tokens.append(token)
            positions = positions[token.position_count :]
        return tokens

    def _whole_characters(
        self, positions: Sequence[ReplyPosition], text: str
    ) -> tuple[str, int] | None:
        """Return the text and the number of the fewest positions that end on a whole character."""
        data = b""
        for count, position in enumerate(positions, start=1):
            token = position.token
            if self._reader.is_special(token):
                name = token.piece or token.text or token.token_id
                raise LargeNotContinued(
                    f"the small model has no token for the large model's special token {name}"
                )
            token_bytes = None if self._reader.ends(position) else self._reader.text_bytes(token)
            if token_bytes is None:
                break
            data += token_bytes
            if whole := decode_or_none(data):
                return whole, count
        else:
            return None
        # The bytes of a position are unknown: use the server's decoding of all positions.
        if text and REPLACEMENT not in text and not any(map(self._reader.ends, positions)):
            return text, len(positions)
        return None

    def _end_id(self, position: ReplyPosition) -> int | None:
        """Return the small model's end token if the answer ends here, None otherwise."""
        if (shared := self._shared_end_id(position.token)) is not None:
            return shared
        has_end = bool(self._vocabulary.eos_ids)
        return self._vocabulary.end_id if self._reader.ends(position) and has_end else None

    def _shared_end_id(self, token: ReplyToken) -> int | None:
        """Return the end token of the small vocabulary that this token is; None if it is none."""
        eos_ids = self._vocabulary.eos_ids
        if token.piece is not None:
            for eos_id in sorted(eos_ids):
                if self._vocabulary.piece(eos_id) == token.piece:
                    return eos_id
        return token.token_id if self._same_vocabulary and token.token_id in eos_ids else None

    def _end_logprob(self, top: Sequence[ReplyToken]) -> float | None:
        ends = [
            math.exp(token.logprob)
            for token in top
            if token.logprob is not None and (self._reader.is_end(token) or self._is_own_end(token))
        ]
        return math.log(sum(ends)) if sum(ends) > 0.0 else None

    def _is_own_end(self, token: ReplyToken) -> bool:
        """Return whether a token is one of the small vocabulary's end tokens, by id or by name."""
        if self._shared_end_id(token) is not None:
            return True
        # Some servers name an alternative by its text alone.
        return self._reader.is_special(token) and self._reader.name(token) in map(
            self._vocabulary.piece, self._vocabulary.eos_ids
        )

    def _shared_id(self, token: ReplyToken) -> int | None:
        """Return the token's id if the small vocabulary has the same token under it.

        A part of a character has no shared id between different vocabularies: the large model
        could not continue from it.
        """
        token_id = token.token_id
        if token_id is None or (piece := self._vocabulary.piece(token_id)) is None:
            return None
        if self._same_vocabulary:
            return token_id
        if decode_or_none(self._vocabulary.token_bytes(token_id)) is None:
            return None
        if token.piece is not None:
            return token_id if piece == token.piece else None
        large = self._reader.vocabulary
        if large is not None:
            return token_id if large.piece(token_id) == piece else None
        return None

    def _display(self, token: ReplyToken) -> str:
        """Return the text of an alternative, with stray bytes as escapes; empty if special."""
        if self._reader.is_special(token):
            return ""
        data = self._reader.text_bytes(token)
        if data is not None:
            return data.decode("utf-8", errors="backslashreplace")
        return token.piece or token.text or ("" if token.token_id is None else f"#{token.token_id}")


def _large_ids(positions: Sequence[ReplyPosition]) -> tuple[int, ...]:
    """Return the ids of all positions; none if one of them has no id."""
    ids = tuple(position.token.token_id for position in positions)
    return tuple(i for i in ids if i is not None) if None not in ids else ()
