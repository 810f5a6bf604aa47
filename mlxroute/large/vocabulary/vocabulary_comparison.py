"""Comparison of two vocabularies: token by token, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mlxroute.errors import LargeError
from mlxroute.tokenizers.utf8 import decode_or_none
from mlxroute.types import Vocabulary

_CHUNK: Final = 4096
# This many equal pieces are not a coincidence.
MIN_EQUAL_PIECES: Final = 48


def fingerprint(vocabulary: Vocabulary) -> str:
    """Return a hash of all entries of a vocabulary, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for token_id in range(vocabulary.size):
        digest.update((vocabulary.piece(token_id) or "").encode(errors="replace") + b"\0")
    return digest.hexdigest()


def compare_entries(small: Vocabulary, large: Vocabulary) -> bool:
    """Return whether every id that both vocabularies have stands for the same token."""
    shared = min(small.size, large.size)
    return shared > 0 and all(small.piece(i) == large.piece(i) for i in range(shared))


def compare_decoded(small: Vocabulary, decode: Callable[[Sequence[int]], str]) -> bool | None:
    """Return whether the server's detokenise route gives the same text for the small ids.

    Only tokens of whole characters are compared. Returns None if the route fails.
    """
    whole_ids = [i for i in range(small.size) if decode_or_none(small.token_bytes(i))]
    for start in range(0, len(whole_ids), _CHUNK):
        ids = whole_ids[start : start + _CHUNK]
        text = b"".join(map(small.token_bytes, ids)).decode("utf-8")
        try:
            # Some tokenizers drop the leading space of a text.
            if decode(ids).lstrip(" ") != text.lstrip(" "):
                return False
        except LargeError:
            return None
    return True if whole_ids else None


def compare_pieces(small: Vocabulary, pieces_by_id: Mapping[int, str]) -> bool | None:
    """Return whether the pieces in replies are those of the small vocabulary; None if too few."""
    if any(small.piece(token_id) != piece for token_id, piece in pieces_by_id.items()):
        return False
    return True if len(pieces_by_id) >= MIN_EQUAL_PIECES else None
