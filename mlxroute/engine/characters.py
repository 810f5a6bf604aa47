"""Decoding of token bytes to whole characters."""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CharacterState:
    """Immutable state of an incremental UTF-8 decoder.

    `pending` are the bytes of an incomplete character, `fragment_ids` the ids of the tokens since
    the last one that ended on a whole character.
    """

    pending: bytes = b""
    fragment_ids: tuple[int, ...] = ()

    def push(self, token_id: int, token_bytes: bytes) -> tuple[CharacterState, str]:
        """Return the state after a token and the characters that the token completes.

        Bytes that can never become part of a character are dropped.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        decoder.setstate((self.pending, 0))
        text = decoder.decode(token_bytes)
        pending = decoder.getstate()[0]
        return CharacterState(pending, (*self.fragment_ids, token_id) if pending else ()), text
