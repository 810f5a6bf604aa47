"""Marks on the characters of message contents, which survive a chat template.

Each character that occurs in a control token is replaced by a private-use character of its own
before a template is rendered. What is not marked afterwards is the template's own text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from mlxroute.errors import UsageError
from mlxroute.tokenizers.control_tokens import ControlTokens, control_tokens

_FIRST: Final = 0xF0000
_LAST: Final = 0x10FFFD
_STEP: Final = 0x400
# In control tokens of every family, also of the vocabulary of a server that is not known.
_BRACKETS: Final = frozenset("<>[]")


class ContentMarks:
    """A set of marks that occur in none of the given texts.

    Args:
        controls: The control tokens.
        texts: Message contents and templates.

    Attributes:
        answer: One more mark, to stand for an assistant's answer.

    Raises:
        UsageError: The texts use all private-use characters.
    """

    def __init__(self, controls: ControlTokens, texts: Sequence[str]) -> None:
        # A server may know other control tokens.
        self._controls = control_tokens(controls.names, any_form=True)
        # Templates trim white space, so it is never marked.
        characters = sorted(
            _BRACKETS.union(c for name in controls.names for c in name if not c.isspace())
        )
        size = len(characters) + 1
        private = {ord(c) for text in texts if not text.isascii() for c in text if ord(c) >= _FIRST}
        base = next(
            (
                start
                for start in range(_FIRST, _LAST - size, max(_STEP, size))
                if private.isdisjoint(range(start, start + size))
            ),
            None,
        )
        if base is None:
            raise UsageError("the messages use every private-use character of Unicode")
        self._marks = {ord(char): base + i for i, char in enumerate(characters)}
        self._originals = {mark: chr(char) for char, mark in self._marks.items()}
        self.answer = chr(base + size - 1)

    def mark(self, text: str) -> str:
        """Return the text with marks."""
        return text.translate(self._marks)

    def mark_names(self, text: str) -> str:
        """Return the text with marks on control tokens only, and on parts of them at its ends."""
        names = self._controls.names
        if any(text in name for name in names):
            return self.mark(text)
        longest = min(max(map(len, names), default=0), len(text))
        head = max((n for n in range(longest) if self._ends_name(text[:n])), default=0)
        tail = max((n for n in range(1, longest) if self._begins_name(text[-n:])), default=0)
        spans = [(0, head), *self._controls.find(text), (len(text) - tail, len(text))]
        parts, done = [], 0
        for start, end in spans:
            start, end = max(start, done), max(end, done)
            parts += [text[done:start], self.mark(text[start:end])]
            done = end
        return "".join(parts) + text[done:]

    def unmark(self, text: str) -> str:
        """Return the text without marks."""
        return text.translate(self._originals)

    def break_up_names(self, text: str) -> str:
        """Return the text with a space inside each control token, so that it is plain text."""
        return self._controls.neutralise(text)[0]

    def are_lost(self, rendered: str, contents: Iterable[str]) -> bool:
        """Return whether a rendering of `mark_names` texts has fewer marks than they have."""
        given = sum(self._count(self.mark_names(text)) for text in contents)
        return self._count(rendered) < given

    def _count(self, text: str) -> int:
        return 0 if text.isascii() else sum(ord(char) in self._originals for char in text)

    def _begins_name(self, text: str) -> bool:
        return any(name.startswith(text) for name in self._controls.names)

    def _ends_name(self, text: str) -> bool:
        return any(name.endswith(text) for name in self._controls.names)
