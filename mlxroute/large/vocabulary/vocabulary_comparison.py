"""Comparison of two vocabularies: token by token, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.errors import LargeProtocolError, LargeRefused, LargeUnreadable
from mlxroute.tokenizers.byte_pieces import SPACE_MARK
from mlxroute.tokenizers.utf8 import decode_or_none
from mlxroute.types import Vocabulary

_CHUNK: Final = 4096
_SAMPLE: Final = 256
_MAX_CHARACTERS: Final = 20
# This many equal pieces are not a coincidence.
MIN_EQUAL_PIECES: Final = 48


def fingerprint(vocabulary: Vocabulary) -> str:
    """Return a hash of all entries of a vocabulary, in order, and of its control tokens in use."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(sorted(vocabulary.template_ids)).encode())
    for token_id in range(vocabulary.size):
        digest.update((vocabulary.piece(token_id) or "").encode(errors="replace") + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class VocabularyComparison:
    """The outcome of comparing a small vocabulary with the large model's.

    `is_same` is None if they could not be compared. `detail` is an example of a difference, or why
    there was no comparison; empty if that is not known.
    """

    is_same: bool | None
    detail: str = ""


SAME: Final = VocabularyComparison(True)


def compare_entries(small: Vocabulary, large: Vocabulary) -> VocabularyComparison:
    """Compare every id that both vocabularies have."""
    shared = min(small.size, large.size)
    for token_id in range(shared):
        if (piece := small.piece(token_id)) != (other := large.piece(token_id)):
            return _different(token_id, piece, other)
    return SAME if shared else VocabularyComparison(None, "one of them is empty")


def compare_decoded(
    small: Vocabulary,
    decode: Callable[[Sequence[int]], str],
    encode: Callable[[str], Sequence[int]],
    *,
    sample: bool = False,
) -> VocabularyComparison:
    """Compare the texts that the server's detokenise route gives for the small ids.

    With `sample` only some of them are compared, with one call of `decode`.

    Only tokens of whole characters are compared, and the control tokens of the small model's chat
    template. `encode` returns the ids of a prompt; it is called where the route leaves out control
    tokens. Raises LargeError for a failure that may pass.
    """
    step = 1 + small.size // _SAMPLE if sample else 1
    whole_ids = [i for i in range(0, small.size, step) if decode_or_none(small.token_bytes(i))]
    controls = _control_pieces(small)
    try:
        for start in range(0, len(whole_ids), _CHUNK):
            ids = whole_ids[start : start + _CHUNK]
            text = b"".join(map(small.token_bytes, ids)).decode("utf-8").lstrip(" ")
            is_last = start + _CHUNK >= len(whole_ids)
            # Some tokenizers drop the leading space of a text.
            other = decode([*ids, *controls] if is_last else ids).lstrip(" ")
            named = other[len(text) :] if is_last else ""
            if other.removesuffix(named) != text:
                return _first_difference(small, ids, text, other)
            if is_last and controls:
                return _compare_controls(controls, named, encode)
    except (LargeRefused, LargeProtocolError) as exc:
        if isinstance(exc, LargeUnreadable) or (isinstance(exc, LargeRefused) and exc.may_pass):
            raise
        return VocabularyComparison(None, "the server's detokenise route failed")
    return SAME if whole_ids else VocabularyComparison(None, "one of them is empty")


def _control_pieces(small: Vocabulary) -> dict[int, str]:
    """Return the names of the control tokens that prompts and ends consist of, by id."""
    pieces = {i: small.piece(i) for i in sorted(small.template_ids) if not small.token_bytes(i)}
    return {token_id: piece for token_id, piece in pieces.items() if piece}


def _compare_controls(
    controls: Mapping[int, str], named: str, encode: Callable[[str], Sequence[int]]
) -> VocabularyComparison:
    """Compare control tokens with `named`, what the server decodes their ids to."""
    if named.strip():
        rest = _without_spaces(named)
        for token_id, piece in controls.items():
            name = _without_spaces(piece)
            if not rest.startswith(name):
                return _different(token_id, piece, rest[: len(name)])
            rest = rest.removeprefix(name)
        return VocabularyComparison(not rest)
    # The server leaves out control tokens; where they are the same, it knows their names.
    ids, expected = tuple(encode("".join(controls.values()))), tuple(controls)
    starts = range(len(ids) - len(expected) + 1)
    if any(ids[start : start + len(expected)] == expected for start in starts):
        return SAME
    return VocabularyComparison(None, "the server does not show the same control tokens")


def _without_spaces(names: str) -> str:
    """Return names of control tokens as all tokenizers write them: some put spaces between."""
    return "".join(names.replace(SPACE_MARK, " ").split())


def compare_pieces(small: Vocabulary, pieces_by_id: Mapping[int, str]) -> VocabularyComparison:
    """Compare the pieces in replies, if there are enough; they rarely include control tokens."""
    for token_id, piece in pieces_by_id.items():
        if (own := small.piece(token_id)) != piece:
            return _different(token_id, own, piece)
    if len(pieces_by_id) >= MIN_EQUAL_PIECES:
        return SAME
    reason = "the server names too few tokens by id" if pieces_by_id else "the server names no ids"
    return VocabularyComparison(None, reason)


def compare_control_count(
    small: Vocabulary, count: Callable[[str], int | None]
) -> VocabularyComparison:
    """Compare the control tokens of the small model's chat template by their number in a prompt.

    `count` returns the tokens of a prompt in the large vocabulary, None if the server does not
    count them. A name that is not a token there is spelled in several.
    """
    names = list(_control_pieces(small).values())
    counted = count("".join(names)) if names else None
    # The server may add a begin token.
    if counted is None or counted - len(names) in (0, 1):
        return SAME
    return VocabularyComparison(
        False, f"{_quoted(' '.join(names))} are not tokens of the large one"
    )


def _different(token_id: int, small: str | None, large: str | None) -> VocabularyComparison:
    return VocabularyComparison(False, f"token {token_id} is {_quoted(small)} and {_quoted(large)}")


def _first_difference(
    small: Vocabulary, ids: Sequence[int], text: str, other: str
) -> VocabularyComparison:
    """Return the difference of two texts, of which `text` is that of the small ids."""
    same = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    place = min(len(text), len(other)) if same is None else same
    # The leading spaces that were dropped are part of the first token.
    position = place + len(b"".join(map(small.token_bytes, ids)).decode()) - len(text)
    for token_id in ids:
        own = small.token_bytes(token_id).decode()
        if position < len(own):
            start = max(0, place - position)
            return _different(token_id, own, other[start : start + len(own)])
        position -= len(own)
    return VocabularyComparison(False)


def _quoted(piece: str | None) -> str:
    return "nothing" if piece is None else repr(piece[:_MAX_CHARACTERS])
