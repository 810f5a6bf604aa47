"""From a token of the large model to ids of the small model's vocabulary, by bytes, never text."""

from __future__ import annotations

from dataclasses import dataclass

from mlxroute.errors import LargeProtocolError
from mlxroute.large.pieces import PieceReader, is_special
from mlxroute.large.wire import Entry, WireToken
from mlxroute.types import Vocabulary

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Bridged:
    """A large token in the small vocabulary; `text` is empty for a fragment or special token."""

    token_ids: tuple[int, ...]
    text: str
    is_eos: bool
    top: tuple[tuple[str, float], ...]


class Bridge:
    """Translates the tokens of one server."""

    def __init__(self) -> None:
        self._pieces = PieceReader()

    def learn(self, entry: Entry) -> None:
        """Take note of the pieces of a reply before any of them is read."""
        tokens = (entry.token, *entry.top)
        self._pieces.learn(token.piece for token in tokens if token.piece is not None)

    def token(self, entry: Entry, *, vocabulary: Vocabulary) -> Bridged:
        """Translate a reply's token. Raises LargeProtocolError when it cannot be spelled."""
        top = tuple(
            (self._shown(other, vocabulary=vocabulary), other.logprob)
            for other in entry.top
            if other.logprob is not None
        )
        if (ends := _end_ids(entry, vocabulary=vocabulary)) is not None:
            return Bridged(ends, "", is_eos=True, top=top)
        if (shared := self._shared_id(entry.token, vocabulary=vocabulary)) is not None:
            return Bridged((shared,), _whole(vocabulary.token_bytes(shared)), is_eos=False, top=top)
        text = self._foreign_text(entry.token)
        token_ids = vocabulary.encode(text)
        if b"".join(map(vocabulary.token_bytes, token_ids)) != text.encode():
            raise LargeProtocolError(f"the small model's vocabulary cannot spell {text!r}")
        return Bridged(token_ids, text, is_eos=False, top=top)

    def data(self, token: WireToken, *, vocabulary: Vocabulary) -> bytes | None:
        """What a token adds to a prompt's text (a special token its name); None if unclear."""
        if (shared := self._shared_id(token, vocabulary=vocabulary)) is not None and (
            data := vocabulary.token_bytes(shared)
        ):
            return data
        if token.piece is not None and is_special(token.piece):
            return token.piece.encode()
        return self._foreign_data(token)

    def _shared_id(self, token: WireToken, *, vocabulary: Vocabulary) -> int | None:
        """The token's id if the small vocabulary has the same token under it."""
        if token.token_id is None or (piece := vocabulary.piece(token.token_id)) is None:
            return None
        if token.piece is not None:
            return token.token_id if piece == token.piece else None
        data = token.data if token.data is not None else (token.text or "").encode()
        return token.token_id if data and data == vocabulary.token_bytes(token.token_id) else None

    def _foreign_text(self, token: WireToken) -> str:
        name = token.piece if token.piece is not None else token.text
        if name and is_special(name):
            raise LargeProtocolError(
                f"the large model's special token {name} is none of the small model's"
            )
        data = self._foreign_data(token)
        text = "" if data is None else _whole(data)
        if not text or _REPLACEMENT in text:
            raise LargeProtocolError(
                "the large model's token is no whole character, and the vocabularies differ"
            )
        return text

    def _foreign_data(self, token: WireToken) -> bytes | None:
        if token.data is not None:
            return token.data
        if token.piece is not None:
            return self._pieces.read(token.piece)
        return None if token.text is None else token.text.encode()

    def _shown(self, token: WireToken, *, vocabulary: Vocabulary) -> str:
        name = token.piece if token.piece is not None else token.text
        if (shared := self._shared_id(token, vocabulary=vocabulary)) is not None:
            data: bytes | None = vocabulary.token_bytes(shared)
        elif name is None or is_special(name):
            return ""
        else:
            data = self._foreign_data(token)
        return (name or "") if data is None else data.decode("utf-8", errors="backslashreplace")


def _end_ids(entry: Entry, *, vocabulary: Vocabulary) -> tuple[int, ...] | None:
    """The small model's end token when this one ends the answer, None when it does not."""
    ends = sorted(vocabulary.eos_ids)
    if entry.token.piece is not None:
        for end in ends:
            if vocabulary.piece(end) == entry.token.piece:
                return (end,)
    return tuple(ends[:1]) if entry.ends else None


def _whole(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
