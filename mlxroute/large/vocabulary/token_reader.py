"""The tokens of a server's replies: their bytes, and whether they are special or end the answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.reply import ReplyPosition, ReplyToken
from mlxroute.tokenizers.control_tokens import is_control_token
from mlxroute.tokenizers.piece_reader import PieceReader
from mlxroute.tokenizers.utf8 import decode_or_none
from mlxroute.types import Vocabulary

REPLACEMENT: Final = "\ufffd"


class TokenReader:
    """Reads the tokens of one large model, by their names or, once known, by its vocabulary."""

    def __init__(self) -> None:
        self._vocabulary: Vocabulary | None = None
        self._pieces = PieceReader()
        self._pieces_by_id: dict[int, str] = {}

    @property
    def pieces_by_id(self) -> dict[int, str]:
        """The raw vocabulary pieces in replies so far; a copy, as other threads add to them."""
        return dict(self._pieces_by_id)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The model's vocabulary, None while unknown."""
        return self._vocabulary

    def learn_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Read tokens with an id by this vocabulary, the model's own, from now on."""
        self._vocabulary = vocabulary

    def learn(self, positions: Iterable[ReplyPosition]) -> None:
        """Record the pieces of a reply; call it before reading any of its tokens."""
        for position in positions:
            for token in (position.token, *position.top):
                if token.piece is not None:
                    self._pieces.learn([token.piece])
                    if token.token_id is not None:
                        self._pieces_by_id[token.token_id] = token.piece

    def check(self, positions: Iterable[ReplyPosition]) -> None:
        """Raise LargeProtocolError for an id that is another token in the known vocabulary.

        The server then has another model than before, and its ids must not pass as tokens.
        """
        known = self._vocabulary
        if known is None:
            return
        for token in (position.token for position in positions):
            if token.token_id is None or token.data is None:
                continue
            expected = known.token_bytes(token.token_id)
            # Some servers strip spaces, and give a part of a character as something else.
            is_comparable = decode_or_none(expected) and expected.strip() and token.data
            is_whole = REPLACEMENT.encode() not in token.data
            if is_comparable and is_whole and token.data.strip() != expected.strip():
                raise LargeProtocolError(
                    f"token {token.token_id} is {token.data.decode(errors='replace')!r} where"
                    f" {expected.decode()!r} was expected: the server has another model now"
                )

    def forget(self) -> None:
        """Forget the model's vocabulary and the pieces in its replies."""
        self._vocabulary = None
        self._pieces = PieceReader()
        self._pieces_by_id = {}

    def text_bytes(self, token: ReplyToken) -> bytes | None:
        """Return the bytes that a token adds to the text: empty if special, None if unknown."""
        if self.is_special(token):
            return b""
        if (known := self._vocabulary_of(token)) is not None and token.token_id is not None:
            return known.token_bytes(token.token_id) or None
        if token.data is not None:
            # Some servers give the bytes of the text, not of the token.
            return None if REPLACEMENT.encode() in token.data else token.data or None
        if token.piece is not None:
            return self._pieces.read(token.piece)
        # A part of a character comes as the replacement character, or as nothing.
        return token.text.encode() if token.text and REPLACEMENT not in token.text else None

    def prompt_bytes(self, token: ReplyToken) -> bytes | None:
        """Return the bytes of a token in the text of a prompt: of its name if special."""
        if self.is_special(token):
            return (self.name(token) or "").encode() or None
        return self.text_bytes(token)

    def is_special(self, token: ReplyToken) -> bool:
        """Return whether a token is a control token, which is not text."""
        if (known := self._vocabulary_of(token)) is not None and token.token_id is not None:
            return not known.token_bytes(token.token_id)
        name = self.name(token)
        return name is not None and is_control_token(name)

    def ends(self, position: ReplyPosition) -> bool:
        """Return whether the answer ends at this position."""
        return position.ends or self.is_end(position.token)

    def is_end(self, token: ReplyToken) -> bool:
        """Return whether a token is an end token of the model; false if that is not known."""
        known = self._vocabulary_of(token)
        return known is not None and token.token_id in known.eos_ids

    def _vocabulary_of(self, token: ReplyToken) -> Vocabulary | None:
        """Return the model's vocabulary if it is known and has this token."""
        if self._vocabulary is None or token.token_id is None:
            return None
        piece = self._vocabulary.piece(token.token_id)
        return self._vocabulary if piece is not None and token.piece in (None, piece) else None

    def name(self, token: ReplyToken) -> str | None:
        """Return the token's entry in its vocabulary, else its text; None if both are unknown."""
        if token.piece is not None:
            return token.piece
        if (known := self._vocabulary_of(token)) is not None and token.token_id is not None:
            return known.piece(token.token_id)
        return token.text
