"""The tokens of a reply in the small vocabulary: the first one, or all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mlxroute.large.reply import CompletionAnswer, ReplyPosition
from mlxroute.large.vocabulary.bridge import Bridge, BridgedToken
from mlxroute.large.vocabulary.token_reader import REPLACEMENT, TokenReader
from mlxroute.types import LargeToken


class ReadReply(Protocol):
    """A function that reads the tokens of a reply; it returns none if more positions are needed."""

    def __call__(
        self, answer: CompletionAnswer, bridge: Bridge, reader: TokenReader
    ) -> list[LargeToken]:
        """Return the tokens.

        Raises LargeProtocolError for a token that the small vocabulary cannot spell.
        """
        ...


def read_first_token(
    answer: CompletionAnswer, bridge: Bridge, reader: TokenReader
) -> list[LargeToken]:
    """Return the first token; none while the positions end inside a character."""
    bridged = bridge.first_token(answer.positions, answer.text)
    return [] if bridged is None else [_large_token(bridged, answer.positions[0])]


def read_all_tokens(
    answer: CompletionAnswer, bridge: Bridge, reader: TokenReader
) -> list[LargeToken]:
    """Return all tokens; none if a call for the first one alone might read it differently."""
    return _read_consistent(answer, bridge, reader) if answer.complete else []


def read_streamed_tokens(
    answer: CompletionAnswer, bridge: Bridge, reader: TokenReader
) -> list[LargeToken]:
    """Return those tokens of an incomplete reply that `read_all_tokens` will return as well."""
    # A token without text may turn out to be the end of the answer, or a part of a character.
    with_text = itertools.takewhile(
        lambda position: reader.ends(position) or reader.text_bytes(position.token),
        answer.positions,
    )
    positions = tuple(with_text)
    if not positions:
        return []
    return _read_consistent(replace(answer, positions=positions), bridge, reader)


def _read_consistent(
    answer: CompletionAnswer, bridge: Bridge, reader: TokenReader
) -> list[LargeToken]:
    positions = answer.positions
    if not _agrees(reader, positions, answer.text):
        return []
    tokens: list[LargeToken] = []
    for bridged in bridge.all_tokens(positions):
        tokens.append(_large_token(bridged, positions[0]))
        positions = positions[bridged.position_count :]
    return tokens


def _agrees(reader: TokenReader, positions: Sequence[ReplyPosition], text: str) -> bool:
    """Return whether the positions spell the beginning of the server's own decoding of them.

    The server's text may lack the leading space, or be empty. Where it holds the replacement
    character, the reply begins or ends inside a character; only what is before that is compared.
    """
    data = b""
    for position in positions:
        token_bytes = None if reader.ends(position) else reader.text_bytes(position.token)
        if token_bytes is None:
            break
        data += token_bytes
    whole, broken, _ = text.partition(REPLACEMENT)
    for shown in (whole.encode(), f" {whole}".encode()):
        if shown.startswith(data[: len(shown)] if broken else data):
            return True
    return not text


def _large_token(bridged: BridgedToken, first: ReplyPosition) -> LargeToken:
    """Return a token without the figures of its call; `first` is the first of its positions."""
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
        top_bytes=bridged.top_bytes,
        end_logprob=bridged.end_logprob,
    )
