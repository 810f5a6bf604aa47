"""Sources of token ids of the large vocabulary: tokenizer files on this machine, or the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from mlxroute.types import Message, Vocabulary


class Tokenizer(Protocol):
    """The large model's tokenizer and template, read from files on this machine."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def render(self, messages: Sequence[Message]) -> str: ...

    def encode_prompt(self, text: str) -> list[int]: ...


class TokenSource(Protocol):
    """A source of token ids of the large vocabulary. Methods raise LargeError."""

    @property
    def name(self) -> str: ...

    @property
    def bos_text(self) -> str:
        """The begin token that servers add to a text themselves; empty if there is none."""
        ...

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the ids of a conversation in the large model's template, ready for the answer."""
        ...

    def prompt_text(self, messages: Sequence[Message]) -> str | None:
        """Return the text of `prompt_ids`; None if the source gives ids only."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a piece of plain text."""
        ...


class FileTokenSource:
    """A TokenSource that uses the model's own tokenizer files."""

    name: Final = "tokenizer files"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def bos_text(self) -> str:
        return self.tokenizer.vocabulary.bos_text

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_prompt(self.tokenizer.render(messages)))

    def prompt_text(self, messages: Sequence[Message]) -> str | None:
        return self.tokenizer.render(messages)

    def encode(self, text: str) -> tuple[int, ...]:
        return self.tokenizer.vocabulary.encode(text)
