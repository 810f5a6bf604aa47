"""The pieces of a reply's text: the server's tokens, or words where it names no tokens."""

from __future__ import annotations

import codecs
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from mlxroute.large.dialects.json_fields import parse_chat_positions
from mlxroute.large.reply import ReplyPosition, ReplyToken
from mlxroute.tokenizers.control_tokens import is_control_token
from mlxroute.tokenizers.piece_reader import PieceReader

# A word with the space before it, a number, space, or one other character. Scripts without spaces
# between words are read character by character.
_WORD: Final = re.compile(r" ?[^\W\d_\u2e80-\U0010ffff]+| ?\d+|\s+|.", re.DOTALL)

_REPLACEMENT: Final = "\ufffd"
# Far more words than a request asks for: what follows in a longer reply is not read.
_MAX_WORDS: Final = 4096


def read_pieces(choice: Mapping[str, object], text: str, *, ended: bool) -> list[ReplyPosition]:
    """Return the positions of a choice whose text is `text`, without the end of the answer.

    They are the tokens with logprobs, or the likeliest alternatives, if those spell the text, and
    otherwise its words; without `ended` the last word is left out, as it may go on.
    """
    positions = parse_chat_positions(choice)
    for read in (list, _likeliest):
        tokens = _with_text(read(positions))
        spelled = _spelled(tokens)
        # A reply that was cut inside a character ends in the replacement character.
        if tokens and spelled is not None and spelled.strip() == text.rstrip(_REPLACEMENT).strip():
            return _with_indentation(tokens, spelled, text)
    matches = itertools.islice(_WORD.finditer(text), _MAX_WORDS)
    words = [ReplyPosition(ReplyToken(text=match[0])) for match in matches]
    return words if ended else words[:-1]


def drop_bytes(positions: Sequence[ReplyPosition], size: int) -> tuple[ReplyPosition, ...]:
    """Return the positions after the first `size` bytes.

    A token that goes beyond them is cut: what is left has no id and no alternatives.
    """
    for count, position in enumerate(positions):
        data = position.token.named_bytes
        if size <= 0:
            return tuple(positions[count:])
        if len(data) > size:
            rest = _token_of(data[size:], position.token)
            return (ReplyPosition(rest), *positions[count + 1 :])
        size -= len(data)
    return ()


def take_bytes(positions: Sequence[ReplyPosition], size: int) -> tuple[ReplyPosition, ...]:
    """Return the positions that end within the first `size` bytes."""
    ends = itertools.accumulate(len(position.token.named_bytes) for position in positions)
    return tuple(positions[: sum(end <= size for end in ends)])


def _with_text(positions: Sequence[ReplyPosition]) -> list[ReplyPosition]:
    """Return the positions without those of no text: some servers list the end of the answer."""
    return [position for position in positions if position.token.named_bytes]


def _likeliest(positions: Sequence[ReplyPosition]) -> list[ReplyPosition]:
    """Return the positions with the likeliest alternative as the token, read as vocabulary pieces.

    `mlx_lm.server` names an arbitrary alternative as the token, and writes pieces (`Ġthe`) for
    texts. Control tokens and texts of unknown bytes are left out, and so are positions of which the
    likeliest alternative is one or has probability 0.
    """
    reader = PieceReader()
    reader.learn(token.text or "" for position in positions for token in position.top)

    def read(token: ReplyToken) -> ReplyToken | None:
        piece = token.text or ""
        data = None if is_control_token(piece) else reader.read(piece)
        return None if data is None else _token_of(data, token)

    tops = [list(map(read, position.top)) for position in positions]
    return [
        ReplyPosition(top[0], tuple(token for token in top if token is not None))
        for top in tops
        if top and top[0] is not None and top[0].logprob != -math.inf
    ]


def _spelled(tokens: Sequence[ReplyPosition]) -> str | None:
    """Return the text of tokens, without a character that the last one begins; None if invalid."""
    data = b"".join(position.token.named_bytes for position in tokens)
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return None


def _with_indentation(tokens: list[ReplyPosition], spelled: str, text: str) -> list[ReplyPosition]:
    """Return the tokens with the white space at the beginning of `text` in place of their own.

    Some servers remove the space before the first word from the text, but not from its token.
    """
    lengths = [len(written) - len(written.lstrip()) for written in (spelled, text)]
    own, other = spelled[: lengths[0]], text[: lengths[1]]
    if own == other or not text.strip():
        return tokens
    first = [ReplyPosition(ReplyToken(text=other))] if other else []
    return [*first, *drop_bytes(tokens, len(own.encode()))]


def _token_of(data: bytes, token: ReplyToken) -> ReplyToken:
    return replace(token, token_id=None, piece=None, data=data, text=None)
