"""From tokens of the large model to ids of the small model's vocabulary, by bytes, never text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxroute.errors import LargeProtocolError
from mlxroute.large.reply import ReplyPosition, ReplyToken
from mlxroute.large.vocabulary.token_reader import REPLACEMENT, TokenReader
from mlxroute.types import Vocabulary


@dataclass(frozen=True, slots=True)
class BridgedToken:
    """Large tokens in the small vocabulary; `text` is empty for a fragment or special token.

    `large_ids` are their ids in the large vocabulary, empty when the server names none. `count` is
    the number of positions they took.
    """

    token_ids: tuple[int, ...]
    text: str
    is_eos: bool
    top: tuple[tuple[str, float], ...]
    large_ids: tuple[int, ...] = ()
    count: int = 1


class Bridge:
    """Translates what one server writes; `same` says that both models share their vocabulary."""

    def __init__(self, reader: TokenReader, vocabulary: Vocabulary, *, same: bool) -> None:
        self._reader = reader
        self._vocabulary = vocabulary
        self._same = same

    def token(self, entries: Sequence[ReplyPosition], text: str) -> BridgedToken | None:
        """The first of these positions, or as many as make up a whole character.

        None when they end inside one: more of them must be asked for. `text` is the server's own
        reading of all of them. Raises LargeProtocolError for what cannot be spelled.
        """
        first = entries[0]
        top = tuple(
            (self._shown(other), other.logprob) for other in first.top if other.logprob is not None
        )
        if (end := self._end(first)) is not None:
            return BridgedToken((end,), "", is_eos=True, top=top, large_ids=_ids([first]))
        if (shared := self._shared_id(first.token)) is not None:
            shown = _whole(self._vocabulary.token_bytes(shared)) or ""
            return BridgedToken((shared,), shown, is_eos=False, top=top, large_ids=(shared,))
        found = self._character(entries, text)
        if found is None:
            return None
        spelled, count = found
        ids = self._vocabulary.encode(spelled)
        if b"".join(map(self._vocabulary.token_bytes, ids)) != spelled.encode():
            raise LargeProtocolError(f"the small model's vocabulary cannot spell {spelled!r}")
        named = _ids(entries[:count])
        return BridgedToken(ids, spelled, is_eos=False, top=top, large_ids=named, count=count)

    def tokens(self, entries: Sequence[ReplyPosition]) -> list[BridgedToken]:
        """As many tokens as these positions spell one after the other, each as `token` has it.

        Raises LargeProtocolError where already the first cannot be spelled.
        """
        found: list[BridgedToken] = []
        while entries and not (found and found[-1].is_eos):
            try:
                bridged = self.token(entries, "")
            except LargeProtocolError:
                if not found:
                    raise
                break
            if bridged is None:
                break
            found.append(bridged)
            entries = entries[bridged.count :]
        return found

    def _character(self, entries: Sequence[ReplyPosition], text: str) -> tuple[str, int] | None:
        """The text of the fewest positions that end on a whole character, and their number."""
        data = b""
        for count, entry in enumerate(entries, start=1):
            if self._reader.is_special(entry.token):
                name = entry.token.piece or entry.token.text or entry.token.token_id
                raise LargeProtocolError(
                    f"the large model's special token {name} is none of the small model's"
                )
            piece = None if self._reader.ends(entry) else self._reader.text_bytes(entry.token)
            if piece is None:
                break
            data += piece
            if whole := _whole(data):
                return whole, count
        else:
            return None
        # The server names no bytes for one of them: its own reading must do, once it is whole.
        if text and REPLACEMENT not in text and not any(map(self._reader.ends, entries)):
            return text, len(entries)
        return None

    def _end(self, entry: ReplyPosition) -> int | None:
        """The small model's end token when this position ends the answer, None otherwise."""
        ends = sorted(self._vocabulary.eos_ids)
        if entry.token.piece is not None:
            for end in ends:
                if self._vocabulary.piece(end) == entry.token.piece:
                    return end
        if self._same and entry.token.token_id in ends:
            return entry.token.token_id
        return ends[0] if self._reader.ends(entry) and ends else None

    def _shared_id(self, token: ReplyToken) -> int | None:
        """The token's id if the small vocabulary has the same token under it.

        Of two different vocabularies no fragment passes: the large one could not go on from it.
        """
        identity = token.token_id
        if identity is None or (piece := self._vocabulary.piece(identity)) is None:
            return None
        if self._same:
            return identity
        if _whole(self._vocabulary.token_bytes(identity)) is None:
            return None
        if token.piece is not None:
            return identity if piece == token.piece else None
        own = self._reader.vocabulary
        if own is not None:
            return identity if own.piece(identity) == piece else None
        return None

    def _shown(self, token: ReplyToken) -> str:
        if self._reader.is_special(token):
            return ""
        data = self._reader.text_bytes(token)
        if data is not None:
            return data.decode("utf-8", errors="backslashreplace")
        return token.piece or token.text or ("" if token.token_id is None else f"#{token.token_id}")


def _ids(entries: Sequence[ReplyPosition]) -> tuple[int, ...]:
    ids = tuple(entry.token.token_id for entry in entries)
    return tuple(i for i in ids if i is not None) if None not in ids else ()


def _whole(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
