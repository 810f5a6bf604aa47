"""What a reply's positions are as tokens of the small model's vocabulary: one, or several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mlxroute.large.reply import CompletionAnswer, ReplyPosition
from mlxroute.large.vocabulary.bridge import Bridge, BridgedToken
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.types import LargeToken


class ReadReply(Protocol):
    """Takes a reply apart; no tokens when more must be known of it."""

    def __call__(
        self, answered: CompletionAnswer, bridge: Bridge, reader: TokenReader
    ) -> list[LargeToken]:
        """Raises LargeProtocolError for what cannot be spelled."""
        ...


def read_first_token(
    answered: CompletionAnswer, bridge: Bridge, reader: TokenReader
) -> list[LargeToken]:
    """The first token; none while the positions end inside a character."""
    bridged = bridge.token(answered.positions, answered.text)
    return [] if bridged is None else [_token(bridged, answered.positions[0])]


def read_all_tokens(
    answered: CompletionAnswer, bridge: Bridge, reader: TokenReader
) -> list[LargeToken]:
    """All tokens; none where a call for the first of them alone might read it otherwise."""
    return _all(answered, bridge, reader) if answered.complete else []


def read_streamed_tokens(
    answered: CompletionAnswer, bridge: Bridge, reader: TokenReader
) -> list[LargeToken]:
    """The tokens of a reply that is still coming, as far as `several` will have them, too."""
    # One without text may turn out to be the end of the answer, or a part of a character.
    clear = itertools.takewhile(
        lambda entry: reader.ends(entry) or reader.text_bytes(entry.token), answered.positions
    )
    entries = tuple(clear)
    return _all(replace(answered, positions=entries), bridge, reader) if entries else []


def _all(answered: CompletionAnswer, bridge: Bridge, reader: TokenReader) -> list[LargeToken]:
    entries = answered.positions
    if not _agree(reader, entries, answered.text):
        return []
    found: list[LargeToken] = []
    for bridged in bridge.tokens(entries):
        found.append(_token(bridged, entries[0]))
        entries = entries[bridged.count :]
    return found


def _agree(reader: TokenReader, entries: Sequence[ReplyPosition], text: str) -> bool:
    """Whether these positions spell the server's own reading of them, as far as both are there.

    A reading may lack the first space.
    """
    data = b""
    for entry in entries:
        piece = None if reader.ends(entry) else reader.text_bytes(entry.token)
        if piece is None:
            break
        data += piece
    return not text or any(read.encode().startswith(data) for read in (text, f" {text}"))


def _token(bridged: BridgedToken, first: ReplyPosition) -> LargeToken:
    """A token without what is known of its call; `first` is the first of its positions."""
    return LargeToken(
        token_ids=bridged.token_ids,
        text=bridged.text,
        is_eos=bridged.is_eos,
        logprob=first.token.logprob,
        top=bridged.top,
        prompt_tokens=None,
        cached_tokens=None,
        completion_tokens=None,
        uploaded_bytes=0,
        latency_s=0.0,
        large_ids=bridged.large_ids,
    )
