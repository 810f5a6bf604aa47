"""The conversation and the answer so far, as the large model is to see them."""

from __future__ import annotations

from collections.abc import Sequence

from mlxroute.engine.text import CharacterMark, CharacterStream, spans
from mlxroute.types import LargeContext, Message, Vocabulary


class Transcript:
    """The answer's tokens, committed and provisional; the last ones can be taken back."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        messages: Sequence[Message],
        *,
        prompt_text: str,
        prompt_ids: Sequence[int],
    ) -> None:
        self._vocabulary = vocabulary
        self._messages = tuple(messages)
        self._prompt_text = prompt_text
        self._prompt_ids = tuple(prompt_ids)
        self._characters = CharacterStream()
        self._marks: list[CharacterMark] = []
        self._written: list[tuple[str, tuple[int, ...] | None]] = []
        self.ids: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def in_character(self) -> bool:
        """Whether the answer ends inside a character."""
        return bool(self._characters.fragment_ids)

    def push(self, token_id: int, *, ends: bool, large_ids: tuple[int, ...] | None) -> str:
        """Add a token and return the text it adds; none if it `ends` the answer.

        `large_ids` are the large model's own for it, as `spans` takes them.
        """
        self._marks.append(self._characters.mark())
        data = b"" if ends else self._vocabulary.token_bytes(token_id)
        text = "" if ends else self._characters.push(token_id, data)
        self._written.append((text, large_ids))
        self.ids.append(token_id)
        return text

    def rollback(self, length: int) -> None:
        """Take back all tokens but the first `length`."""
        if length < len(self):
            self._characters.restore(self._marks[length])
            for tokens in (self._marks, self._written, self.ids):
                del tokens[length:]

    def context(self) -> LargeContext:
        """What the large model is told at the position after the last token."""
        fragment_ids = self._characters.fragment_ids
        whole = self._written[: len(self) - len(fragment_ids)]
        return LargeContext(
            text=self._prompt_text + "".join(text for text, _ in whole),
            token_ids=(*self._prompt_ids, *self.ids),
            fragment_ids=fragment_ids,
            vocabulary=self._vocabulary,
            messages=self._messages,
            spans=spans(whole),
        )
