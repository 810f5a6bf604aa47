"""Answers whose text a server tokenizes into other tokens than the committed ones.

A model may write " \\n" and "\\n" where its tokenizer makes one token of " \\n\\n". A server that
accepts only text then continues another token sequence than the committed one. The text is
therefore sent up to the first token that differs, and the server generates the committed tokens
after it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mlxroute.sequences import common_prefix_length
from mlxroute.tokenizers.utf8 import decode_or_none
from mlxroute.types import LargeContext, LargeToken, Vocabulary

# Each repeated token costs the server a decode step.
_MAX_REPEATED: Final = 64
# Text before the tokens that is tokenized with them, since its last characters may join the first.
_LEAD_CHARACTERS: Final = 64


def stable_context(context: LargeContext) -> LargeContext:
    """Return the context without the tokens that would be tokenized differently.

    They move to `fragment_ids`. Only the latest tokens of the large model can move, because the
    server would not generate any others again. If too many would have to move, the context is
    returned unchanged.
    """
    ids = _latest_large_ids(context)
    pieces = [context.vocabulary.token_bytes(token_id) for token_id in ids]
    data = context.text.encode()
    tail = b"".join(pieces)
    # Bytes that never became a character are not in the text.
    lead = decode_or_none(data[: len(data) - len(tail)]) if data.endswith(tail) else None
    if lead is None:
        return context
    kept = len(ids)
    while kept and (stable := _stable_count(context.vocabulary, lead, pieces, ids[:kept])) < kept:
        kept = stable
    if kept == len(ids) or len(ids) - kept > _MAX_REPEATED:
        return context
    return replace(
        context,
        text=lead + b"".join(pieces[:kept]).decode(),
        fragment_ids=(*ids[kept:], *context.fragment_ids),
        spans=context.spans[: kept - len(ids)],
    )


def stable_prefix(context: LargeContext, tokens: Sequence[LargeToken]) -> tuple[LargeToken, ...]:
    """Return the leading tokens that separate calls would also return.

    The call for a token sends the tokens before it as text. If those would be tokenized
    differently, the token and all after it are dropped: some of the tokens before it may be
    committed as the small model's, which the server would not generate again.
    """
    ids = context.fragment_ids
    pieces = [context.vocabulary.token_bytes(token_id) for token_id in ids]
    for count, token in enumerate(tokens[:-1], start=1):
        ids += token.token_ids
        pieces += [context.vocabulary.token_bytes(token_id) for token_id in token.token_ids]
        if _stable_count(context.vocabulary, context.text, pieces, ids) < len(ids):
            return tuple(tokens[:count])
    return tuple(tokens)


def _latest_large_ids(context: LargeContext) -> tuple[int, ...]:
    """Return the ids of the large model's last uninterrupted run of tokens in the text."""
    # The ids of a begun character have no span.
    ids = tuple(context.token_ids[: len(context.token_ids) - len(context.fragment_ids)])
    begin = len(ids)
    for token_id, span in zip(reversed(ids), reversed(context.spans), strict=False):
        if span.large_ids != (token_id,) or not context.vocabulary.token_bytes(token_id):
            break
        begin -= 1
    return ids[begin:]


def _stable_count(
    vocabulary: Vocabulary, lead: str, pieces: Sequence[bytes], ids: tuple[int, ...]
) -> int:
    """Return how many leading `ids` the tokenizer reproduces from their text after `lead`.

    `pieces` begins with the bytes of the ids.
    """
    text = decode_or_none(b"".join(pieces[: len(ids)]))
    if text is None:
        return len(ids) - 1
    lead = lead[-_LEAD_CHARACTERS:]
    cut = vocabulary.encode(lead + text)
    left = len(lead.encode())
    skipped = 0
    while left > 0 and skipped < len(cut):
        left -= len(vocabulary.token_bytes(cut[skipped]))
        skipped += 1
    # Below 0, one token spans the end of the lead and the beginning of the text.
    return 0 if left < 0 else common_prefix_length(cut[skipped:], ids)
