"""Text that a server reads as other tokens than its model wrote.

A model may write " \\n" and "\\n" where its tokenizer cuts " \\n\\n" as one token. A server that
takes only text then goes on from another sequence than its own. So the text goes out up to the
place where the two part, and the server writes its own tokens behind it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mlxroute.types import LargeContext, LargeToken, Vocabulary

# Each costs the server a step.
_MOST_REPEATED: Final = 64
# Of the text before, for its last characters may join with what follows.
_LEAD_CHARACTERS: Final = 64


def stable_context(context: LargeContext) -> LargeContext:
    """The context without the tokens that a tokenizer of this vocabulary reads otherwise.

    They move to `fragment_ids`. Only the large model's own latest ones can, as nobody else's would
    be written again; when there are too many, the context stays as it is.
    """
    own = _own(context)
    data = [context.vocabulary.token_bytes(token_id) for token_id in own]
    whole = context.text.encode()
    start = len(whole) - len(b"".join(data))
    lead = _text(whole[:start])
    if lead is None:
        return context
    kept = len(own)
    while kept and (read := _read(context.vocabulary, lead, data, own[:kept])) < kept:
        kept = read
    if kept == len(own) or len(own) - kept > _MOST_REPEATED:
        return context
    return replace(
        context,
        text=lead + b"".join(data[:kept]).decode(),
        fragment_ids=(*own[kept:], *context.fragment_ids),
        spans=context.spans[: kept - len(own) - len(context.fragment_ids)],
    )


def stable_prefix(context: LargeContext, tokens: Sequence[LargeToken]) -> tuple[LargeToken, ...]:
    """The tokens after this context whose own calls would find those before them as they are.

    Where small tokens stand in their places, no call could have the server write them again.
    """
    ids = context.fragment_ids
    data = [context.vocabulary.token_bytes(token_id) for token_id in ids]
    for count, token in enumerate(tokens[:-1], start=1):
        ids += token.token_ids
        data += [context.vocabulary.token_bytes(token_id) for token_id in token.token_ids]
        if _read(context.vocabulary, context.text, data, ids) < len(ids):
            return tuple(tokens[:count])
    return tuple(tokens)


def _own(context: LargeContext) -> tuple[int, ...]:
    """The ids at the end of the text that the large model wrote, up to the end itself."""
    count, begun = 0, len(context.fragment_ids)
    for token_id, span in zip(reversed(context.token_ids), reversed(context.spans), strict=False):
        if span.large_ids != (token_id,) or not context.vocabulary.token_bytes(token_id):
            break
        count += 1
    if count <= begun:
        return ()
    end = len(context.token_ids) - begun
    return tuple(context.token_ids[end - count + begun : end])


def _read(vocabulary: Vocabulary, lead: str, data: Sequence[bytes], ids: tuple[int, ...]) -> int:
    """How many of `ids`, whose bytes begin `data`, are read as they are behind `lead`."""
    text = _text(b"".join(data[: len(ids)]))
    if text is None:
        return len(ids) - 1
    lead = lead[-_LEAD_CHARACTERS:]
    left = len(lead.encode())
    count = 0
    for token_id in vocabulary.encode(lead + text):
        if left <= 0:
            if left < 0 or count == len(ids) or token_id != ids[count]:
                break
            count += 1
        else:
            left -= len(vocabulary.token_bytes(token_id))
    return count


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
