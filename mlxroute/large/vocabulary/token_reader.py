"""What a server's tokens are: their bytes, whether they are text, whether they end the answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mlxroute.large.reply import ReplyPosition, ReplyToken
from mlxroute.large.vocabulary.piece_reader import PieceReader
from mlxroute.tokenizers.control_tokens import is_control_token
from mlxroute.types import Vocabulary

REPLACEMENT: Final = "\ufffd"


class TokenReader:
    """Reads the tokens of one model; `own` is that model's vocabulary, where it is known."""

    def __init__(self) -> None:
        self.vocabulary: Vocabulary | None = None
        self._pieces = PieceReader()
        self._named: dict[int, str] = {}

    @property
    def pieces_by_id(self) -> dict[int, str]:
        """The raw vocabulary pieces seen so far, by id; a copy, as other threads add to them."""
        return dict(self._named)

    def learn(self, entries: Iterable[ReplyPosition]) -> None:
        """Take note of the pieces of a reply before any of its tokens is read."""
        for entry in entries:
            for token in (entry.token, *entry.top):
                if token.piece is not None:
                    self._pieces.learn([token.piece])
                    if token.token_id is not None:
                        self._named[token.token_id] = token.piece

    def text_bytes(self, token: ReplyToken) -> bytes | None:
        """The bytes a token adds to the text, none for a special one; None if unclear."""
        if self.is_special(token):
            return b""
        if (own := self._own(token)) is not None and token.token_id is not None:
            return own.token_bytes(token.token_id) or None
        if token.data is not None:
            # Some servers give the bytes of the text, not of the token.
            return None if REPLACEMENT.encode() in token.data else token.data or None
        if token.piece is not None:
            return self._pieces.read(token.piece)
        # A part of a character comes as the replacement character, or as nothing.
        return token.text.encode() if token.text and REPLACEMENT not in token.text else None

    def prompt_bytes(self, token: ReplyToken) -> bytes | None:
        """The bytes a token stands for in a prompt's text: a special one its name."""
        if self.is_special(token):
            return (self._name(token) or "").encode() or None
        return self.text_bytes(token)

    def is_special(self, token: ReplyToken) -> bool:
        """Whether a token is a control token, which is no text."""
        if (own := self._own(token)) is not None and token.token_id is not None:
            return not own.token_bytes(token.token_id)
        name = self._name(token)
        return name is not None and is_control_token(name)

    def ends(self, entry: ReplyPosition) -> bool:
        """Whether the answer is over at this position."""
        if entry.ends:
            return True
        own = self._own(entry.token)
        return own is not None and entry.token.token_id in own.eos_ids

    def _own(self, token: ReplyToken) -> Vocabulary | None:
        """The model's vocabulary, as far as it has this token."""
        if self.vocabulary is None or token.token_id is None:
            return None
        piece = self.vocabulary.piece(token.token_id)
        return self.vocabulary if piece is not None and token.piece in (None, piece) else None

    def _name(self, token: ReplyToken) -> str | None:
        if token.piece is not None:
            return token.piece
        if (own := self._own(token)) is not None and token.token_id is not None:
            return own.piece(token.token_id)
        return token.text
