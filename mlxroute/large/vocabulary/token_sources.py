"""Sources of token ids of the large vocabulary: tokenizer files on this machine, or the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from mlxroute.messages import answer_opening
from mlxroute.types import EncodedPrompt, Message, PromptText, Vocabulary


class Tokenizer(Protocol):
    """The large model's tokenizer and template, read from files on this machine."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt: ...

    def encode_rendered(self, prompt: str | PromptText) -> EncodedPrompt: ...


class TokenSource(Protocol):
    """A source of token ids of the large vocabulary. Methods raise LargeError."""

    @property
    def name(self) -> str: ...

    @property
    def bos_text(self) -> str:
        """The begin token that servers add to a text themselves; empty if there is none."""
        ...

    def prompt_ids(self, messages: Sequence[Message], *, thinks: bool = False) -> tuple[int, ...]:
        """Return the ids of a conversation in the large model's template, ready for the answer.

        Thinking that the template begins is ended (`messages.answer_opening`), unless the answer
        `thinks`: its beginning is the small model's thinking.
        """
        ...

    def prompt_text(
        self, messages: Sequence[Message], *, thinks: bool = False
    ) -> PromptText | None:
        """Return the text of `prompt_ids`; None if the source gives ids only."""
        ...

    def rendered_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a whole prompt; names of control tokens in it become control tokens."""
        ...

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The large vocabulary; None if only the server has it."""
        ...

    @property
    def reads_control_tokens(self) -> bool:
        """Whether `prompt_ids` turns names of control tokens in contents into control tokens."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a piece of plain text."""
        ...


class FileTokenSource:
    """A TokenSource that uses the model's own tokenizer files."""

    name: Final = "tokenizer files"
    reads_control_tokens: Final = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def bos_text(self) -> str:
        return self.tokenizer.vocabulary.bos_text

    def prompt_ids(self, messages: Sequence[Message], *, thinks: bool = False) -> tuple[int, ...]:
        return self._encode_conversation(messages, thinks=thinks).ids

    def prompt_text(
        self, messages: Sequence[Message], *, thinks: bool = False
    ) -> PromptText | None:
        return self._encode_conversation(messages, thinks=thinks).rendered

    def rendered_ids(self, text: str) -> tuple[int, ...]:
        return self.tokenizer.encode_rendered(text).ids

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    def encode(self, text: str) -> tuple[int, ...]:
        return self.tokenizer.vocabulary.encode(text)

    def _encode_conversation(self, messages: Sequence[Message], *, thinks: bool) -> EncodedPrompt:
        encoded = self.tokenizer.encode_conversation(messages)
        text, marked = encoded.rendered.text, encoded.rendered.marked
        if thinks or not (opening := answer_opening(marked)):
            return encoded
        return self.tokenizer.encode_rendered(PromptText(text + opening, marked + opening))
