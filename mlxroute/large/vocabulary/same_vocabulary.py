"""Whether two models share a vocabulary: token strings compared id by id, padding ignored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mlxroute.errors import LargeError
from mlxroute.types import Vocabulary

_CHUNK: Final = 4096
# So many tokens by id and name from replies, all the same, are no accident.
ENOUGH: Final = 48


def fingerprint(vocabulary: Vocabulary) -> str:
    """Stands for all entries of a vocabulary in order."""
    digest = hashlib.blake2b(digest_size=8)
    for identity in range(vocabulary.size):
        digest.update((vocabulary.piece(identity) or "").encode(errors="replace") + b"\0")
    return digest.hexdigest()


def same_entries(small: Vocabulary, large: Vocabulary) -> bool:
    """Whether all ids that both vocabularies have stand for the same token."""
    shared = min(small.size, large.size)
    return shared > 0 and all(small.piece(i) == large.piece(i) for i in range(shared))


def same_decoded(small: Vocabulary, decode: Callable[[Sequence[int]], str]) -> bool | None:
    """The same by the server's detokenise route, for the tokens that are whole characters.

    None when the route fails.
    """
    plain = [i for i in range(small.size) if _is_whole(small.token_bytes(i))]
    for start in range(0, len(plain), _CHUNK):
        ids = plain[start : start + _CHUNK]
        text = b"".join(map(small.token_bytes, ids)).decode("utf-8")
        try:
            # Some tokenizers drop the first space of a text.
            if decode(ids).lstrip(" ") != text.lstrip(" "):
                return False
        except LargeError:
            return None
    return True if plain else None


def _is_whole(data: bytes) -> bool:
    try:
        return bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def same_named(small: Vocabulary, named: Mapping[int, str]) -> bool | None:
    """The same by the pieces that replies named; None while there are too few of them."""
    if any(small.piece(identity) != piece for identity, piece in named.items()):
        return False
    return True if len(named) >= ENOUGH else None
