"""Vocabularies given as a list of pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlxroute.tokenizers.content_marks import ContentMarks
from mlxroute.tokenizers.control_tokens import ControlTokens
from mlxroute.types import EncodedPrompt, LargeContext, Message, PromptText, Span

END_ID = 1


class TableVocabulary:
    """A byte-level vocabulary from a list of pieces; id 0 begins a text, id 1 ends an answer."""

    def __init__(
        self, pieces: list[str], *, bos_text: str = "", end_name: str = "<|im_end|>"
    ) -> None:
        self._pieces = ["<s>", end_name, *pieces]
        self._bytes = [b"", b"", *(bytes(map(_BYTE_OF.__getitem__, piece)) for piece in pieces)]
        # The longest first.
        order = sorted(range(2, len(self._pieces)), key=lambda i: -len(self._pieces[i]))
        self._order: dict[int, list[int]] = {}
        for token_id in order:
            self._order.setdefault(self._bytes[token_id][0], []).append(token_id)
        self._bos_text = bos_text

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({END_ID})

    @property
    def end_id(self) -> int:
        return END_ID

    @property
    def bos_text(self) -> str:
        return self._bos_text

    @property
    def control_names(self) -> frozenset[str]:
        return frozenset(self._pieces[: END_ID + 1])

    @property
    def special_names(self) -> frozenset[str]:
        return self.control_names

    @property
    def template_ids(self) -> frozenset[int]:
        return frozenset({0, END_ID})

    def id_of(self, piece: str) -> int:
        return self._pieces.index(piece)

    @property
    def size(self) -> int:
        return len(self._pieces)

    def piece(self, token_id: int) -> str | None:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def longest(self, data: bytes) -> int | None:
        """Return the longest piece that begins a text; None if there is none."""
        return next(
            (i for i in self._order.get(data[0], ()) if data.startswith(self._bytes[i])), None
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode greedily, the longest piece first; bytes without a piece are dropped."""
        data, ids = text.encode(), []
        while data:
            longest = self.longest(data)
            if longest is None:
                data = data[1:]
                continue
            ids.append(longest)
            data = data[len(self._bytes[longest]) :]
        return tuple(ids)


@dataclass(frozen=True)
class TableTokenizer:
    """The files of a model: its vocabulary, and a template with its begin and end tokens."""

    vocabulary: TableVocabulary

    def render(self, messages: Sequence[Message]) -> str:
        end = self.vocabulary.piece(END_ID)
        turns = [f"<s>{turn['role']}\n{turn['content']}{end}\n" for turn in messages]
        return "".join(turns) + "<s>assistant\n"

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        """Encode a conversation whose contents hold no control tokens."""
        text = self.render(messages)
        marks = ContentMarks(ControlTokens(self.vocabulary.control_names), [text])
        contents = [turn | {"content": marks.mark(turn["content"])} for turn in messages]
        return EncodedPrompt(
            tuple(self.encode_prompt(text)), PromptText(text, self.render(contents))
        )

    def encode_rendered(self, prompt: str | PromptText) -> EncodedPrompt:
        """Encode a text whose control tokens are meant, with its begin token."""
        rendered = PromptText(prompt, prompt) if isinstance(prompt, str) else prompt
        begin = self.vocabulary.bos_text
        begun = rendered.text if rendered.text.startswith(begin) else begin + rendered.text
        return EncodedPrompt(tuple(self.encode_prompt(begun)), rendered)

    def encode_prompt(self, text: str) -> list[int]:
        ids: list[int] = []
        names = self.vocabulary.control_names
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
            special = part in names
            ids += [self.vocabulary.id_of(part)] if special else self.vocabulary.encode(part)
        return ids


def _byte_characters() -> dict[str, int]:
    # GPT-2's alphabet: printable bytes as themselves, the others in order from U+0100.
    printable = [b for b in range(256) if 33 <= b <= 126 or (b >= 161 and b != 173)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_characters()
BYTE_CHARACTERS = list(_BYTE_OF)


def context(
    text: str,
    vocabulary: TableVocabulary,
    *,
    answer: tuple[int, ...] = (),
    fragment_ids: tuple[int, ...] = (),
    messages: tuple[Message, ...] = (),
    spans: tuple[Span, ...] = (),
) -> LargeContext:
    """Return a context with this text and the ids of its last tokens."""
    return LargeContext(
        text=text,
        token_ids=(*answer, *fragment_ids),
        fragment_ids=fragment_ids,
        vocabulary=vocabulary,
        messages=messages,
        spans=spans,
    )
