"""A rendered prompt whose message contents can be told from the template's own text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptText:
    """The text of a prompt.

    Args:
        text: The text, as the chat template gave it.
        marked: The same, character by character, with private-use characters in place of those
            characters of message contents that could be part of a control token.
    """

    text: str
    marked: str

    def cut(self, length: int) -> PromptText:
        """Return its beginning of at most this length."""
        return PromptText(self.text[:length], self.marked[:length])

    def has_content(self, start: int, end: int) -> bool:
        """Return whether a part of the text holds characters of a message's content."""
        return self.text[start:end] != self.marked[start:end]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A conversation in a model's chat template: its token ids, and the text that they stand for.

    Control tokens in `ids` are the template's own; message contents are encoded as plain text.
    `drops_space`, False by default, tells that the tokenizer puts a space before every text, also
    before the answer: a space at its beginning is not part of what the answer shows.
    """

    ids: tuple[int, ...]
    rendered: PromptText
    drops_space: bool = False

    @property
    def text(self) -> str:
        """The prompt's text; control tokens in message contents are part of it, unchanged."""
        return self.rendered.text
