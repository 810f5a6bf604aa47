"""Prompts of answers: conversations, texts, and token ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

from mlxroute.engine.transcript import check_prompt_fits
from mlxroute.errors import ContextTooLong, UsageError
from mlxroute.types import EncodedPrompt, Message, PromptText, Vocabulary

# More than any text has on average. Encoding takes seconds for each million, and others wait.
_MAX_BYTES_PER_TOKEN: Final = 32
# Stands in a marked prompt for characters that are not part of a control token.
_CONTENT: Final = "\U000f0000"


class PromptTokenizer(Protocol):
    """The part of a small model that turns conversations into token ids."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def context_length(self) -> int: ...

    def encode_conversation(
        self, messages: Sequence[Message], *, answer_start: str = ""
    ) -> EncodedPrompt: ...

    def encode_rendered(self, text: str) -> EncodedPrompt: ...


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """A prompt as the small model reads it; `messages` is empty for a text or token ids.

    Only prompts of the same `owner` share KV caches.
    """

    messages: tuple[Message, ...]
    encoded: EncodedPrompt
    owner: str = ""

    @property
    def text(self) -> str:
        """The text, with control tokens by their names."""
        return self.encoded.text

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids."""
        return self.encoded.ids


def encode_prompt(
    small: PromptTokenizer,
    prompt: Sequence[Message] | str | Sequence[int],
    *,
    answer_start: str = "",
    owner: str = "",
) -> ServedPrompt:
    """Encode a conversation, a text or token ids. Thread-safe.

    `answer_start` is the text of the assistant's turn that the answer to a conversation continues.
    Only prompts of the same `owner` share KV caches.
    Raises UsageError for an empty prompt or an unknown id, ContextTooLong for one that is too long.
    """
    _check_size(prompt, answer_start, small.context_length)
    messages: tuple[Message, ...] = ()
    if isinstance(prompt, str):
        encoded = small.encode_rendered(prompt)
    elif prompt and isinstance(prompt[0], int):
        ids = tuple(cast("Sequence[int]", prompt))
        encoded = EncodedPrompt(ids, _decode(small.vocabulary, ids))
    else:
        messages = tuple(cast("Sequence[Message]", prompt))
        encoded = small.encode_conversation(messages, answer_start=answer_start)
    ids = encoded.ids
    if not ids:
        raise UsageError("the prompt is empty", parameter="prompt")
    check_prompt_fits(ids, small.context_length)
    return ServedPrompt(messages, encoded, owner)


def _check_size(
    prompt: Sequence[Message] | str | Sequence[int], answer_start: str, context_length: int
) -> None:
    """Raise ContextTooLong for a prompt that is too long at first sight, before it is encoded."""
    texts = [answer_start]
    # A message has a token of its own, and so has an id.
    least = 0 if isinstance(prompt, str) else len(prompt)
    if isinstance(prompt, str):
        texts.append(prompt)
    elif prompt and not isinstance(prompt[0], int):
        texts += [message["content"] for message in cast("Sequence[Message]", prompt)]
    least += sum(len(text.encode(errors="replace")) for text in texts) // _MAX_BYTES_PER_TOKEN
    if least >= context_length:
        raise ContextTooLong(
            f"the prompt is far longer than the small model's context, {context_length:,} tokens;"
            " shorten it"
        )


def _decode(vocabulary: Vocabulary, ids: Sequence[int]) -> PromptText:
    """Return the text of token ids, with the names of special tokens.

    All other text is marked as content: a control token's name that it spells is plain text.
    """
    pieces: list[tuple[bytes, str]] = []
    for token_id in ids:
        piece = vocabulary.piece(token_id)
        if piece is None:
            raise UsageError(f"there is no token {token_id}", parameter="prompt")
        pieces.append((vocabulary.token_bytes(token_id), piece))
    text = marked = ""
    for is_plain, run in itertools.groupby(pieces, key=lambda item: bool(item[0])):
        parts = [data or name.encode() for data, name in run]
        own = b"".join(parts).decode("utf-8", errors="replace")
        text += own
        marked += _CONTENT * len(own) if is_plain else own
    return PromptText(text, marked)
