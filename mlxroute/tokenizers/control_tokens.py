"""Control tokens (`<|im_end|>`, `</s>`, `[INST]`): recognised by form, and kept out of texts."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Final

from mlxroute.tokenizers.byte_pieces import byte_piece
from mlxroute.types import PromptText

# Names in single angle brackets are listed: many vocabularies have HTML tags as ordinary tokens.
_CONTROL_TOKEN: Final = re.compile(
    r"<[|｜][^<>\s]*[|｜]>|\[/?[A-Z_]{4,}\]"
    r"|</?(?:s|bos|eos|pad|unk|mask|think|im_start|im_end|(?:start|end)_of_turn|end_of_utterance"
    r"|tool_(?:call|response)|unused\d+)>"
)
# What to look for in a text for an unknown vocabulary. Square brackets are listed as well here,
# because texts are full of words such as `[WARNING]`.
_IN_TEXT: Final = re.compile(
    r"<[|｜][^<>\s]{1,80}[|｜]>|<\|[a-z_]{2,40}>|<[a-z_]{2,40}\|>|<\[\w{1,40}(?:▁\w{1,40})+\]>"
    r"|\[\|(?:system|user|assistant|tool|endofturn)\|\]|</?(?:seed|minimax):[a-z_]{2,40}>"
    r"|<_(?:user|bot|system|end)>|<(?:reserved|SPECIAL|TOKENS_UNUSED)_\d{1,5}>"
    r"|<(?:EOT|sop|eop|eoh|eoa|file_sep|repo_name|gh_stars)>|\]~!b\[|\]~b\]|\[e~\["
    r"|<(?:jupyter|issue|commit)_[a-z]{2,10}>"
    r"|</?(?:s|bos|eos|pad|unk|mask|think|im_start|im_end|(?:start|end)_of_(?:turn|image|audio)"
    r"|end_of_utterance|tool_(?:call|response)|unused\d{1,5}|fim_[a-z]{3,6}|extra_id_\d{1,3})>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_(?:CALLS|RESULTS|CONTENT)|THINK|ARGS|CALL_ID"
    r"|EOT|UNUSED_TOKEN_\d{1,5}|IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|PREFIX|MIDDLE|SUFFIX|CLS|SEP|PAD|UNK|MASK"
    r"|gMASK|sop|eop|BOS|EOS)\]"
)
# Any of these inside a control token's name makes it plain text.
_SEPARATORS: Final = (" ", "-", "\u200b")
_MAX_PASSES: Final = 8
_ANSWER_MARKS: Final = frozenset({"<think>", "</think>"})
_CONTENT: Final = "\uffff"


def is_control_token(piece: str) -> bool:
    """Return whether a vocabulary piece has the form of a control token, which is not text."""
    return _CONTROL_TOKEN.fullmatch(piece) is not None and byte_piece(piece) is None


@functools.lru_cache(maxsize=32)
def control_tokens(
    names: frozenset[str], *, any_form: bool = False, in_answer: bool = False
) -> ControlTokens:
    """Return `ControlTokens`, made once for each set of names."""
    return ControlTokens(names, any_form=any_form, in_answer=in_answer)


class ControlTokens:
    """The names of a vocabulary's control tokens.

    Args:
        names: The names.
        any_form: Whether everything in the form of a control token counts too, for a server whose
            vocabulary is not known. False by default.
        in_answer: Whether the texts are a model's answers, whose marks around thinking are its
            own. False by default.
    """

    def __init__(
        self, names: Iterable[str], *, any_form: bool = False, in_answer: bool = False
    ) -> None:
        self._spared = _ANSWER_MARKS if in_answer else frozenset()
        self._names = frozenset(name for name in names if name) - self._spared
        self._any_form = any_form
        self._lengths: dict[str, list[int]] = {}
        for name in self._names:
            self._lengths.setdefault(name[0], []).append(len(name))
        for first, lengths in self._lengths.items():
            self._lengths[first] = sorted(set(lengths), reverse=True)
        firsts = {*self._lengths, *("<[]" if any_form else "")}
        self._first = re.compile(
            f"[{''.join(map(re.escape, sorted(firsts)))}]" if firsts else "(?!)"
        )

    @property
    def names(self) -> frozenset[str]:
        """The names."""
        return self._names

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the start and end of each name in a text, the longest one at each place."""
        if self._any_form and not self._names:
            yield from self._find_forms(text)
            return
        position = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start >= position and (end := self._end(text, start)) is not None:
                yield start, end
                position = end

    def _find_forms(self, text: str) -> Iterator[tuple[int, int]]:
        """Do what `find` does where no names are known, in one pass of the pattern."""
        for match in _IN_TEXT.finditer(text):
            # A spared mark has no beginning of another inside it.
            if match[0] not in self._spared:
                yield match.span()

    def _end(self, text: str, start: int) -> int | None:
        """Return the end of the longest name that begins here; None if none does."""
        end = None
        for length in self._lengths.get(text[start], ()):
            if text[start : start + length] in self._names:
                end = start + length
                break
        match = _IN_TEXT.match(text, start) if self._any_form else None
        if match is not None and match[0] not in self._spared:
            end = max(end or 0, match.end())
        return end

    def neutralise(self, text: str) -> tuple[str, tuple[str, ...]]:
        """Return a text of a user without control tokens, and the names that were in it.

        A space is put into each name, which a server then reads as plain text.
        """
        return self.neutralise_content(PromptText(text, _CONTENT * len(text)))

    def neutralise_content(self, prompt: PromptText) -> tuple[str, tuple[str, ...]]:
        """Do the same to the message contents of a prompt; the template's markers stay."""
        names: list[str] = []
        for number in range(_MAX_PASSES):
            matches = [span for span in self.find(prompt.text) if prompt.has_content(*span)]
            if not matches:
                break
            if not number:
                names = [prompt.text[start:end] for start, end in matches]
            separator = _SEPARATORS[min(number // 2, len(_SEPARATORS) - 1)]
            prompt = _break_up(prompt, matches, separator)
        else:
            while matches := [s for s in self.find(prompt.text) if prompt.has_content(*s)]:
                prompt = _drop_first(prompt, matches)
        return prompt.text, tuple(dict.fromkeys(names))


def _break_up(prompt: PromptText, matches: Iterable[tuple[int, int]], separator: str) -> PromptText:
    """Return the prompt with a separator inside each match, beside a character of content."""
    texts, marks, done = [], [], 0
    for start, end in matches:
        cut = next(
            (i for i in range(start + 1, end) if prompt.has_content(i - 1, i + 1)), start + 1
        )
        texts += [prompt.text[done:cut], separator]
        marks += [prompt.marked[done:cut], _CONTENT]
        done = cut
    return PromptText("".join(texts) + prompt.text[done:], "".join(marks) + prompt.marked[done:])


def _drop_first(prompt: PromptText, matches: Iterable[tuple[int, int]]) -> PromptText:
    """Return the prompt without the first character of content of each match."""
    texts, marks, done = [], [], 0
    for start, end in matches:
        cut = next(i for i in range(start, end) if prompt.has_content(i, i + 1))
        texts.append(prompt.text[done:cut])
        marks.append(prompt.marked[done:cut])
        done = cut + 1
    return PromptText("".join(texts) + prompt.text[done:], "".join(marks) + prompt.marked[done:])
