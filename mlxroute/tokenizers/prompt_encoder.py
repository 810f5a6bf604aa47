"""Prompt text to token ids, with control tokens where the template wrote them and nowhere else."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from mlxroute.tokenizers.token_vocabulary import TokenVocabulary
from mlxroute.types import PromptText


class PromptEncoder:
    """Encodes rendered prompts.

    Args:
        tokenizer: `mlx_lm`'s TokenizerWrapper, or a FastTokenizer.
        vocabulary: Its vocabulary.
    """

    def __init__(self, tokenizer: Any, vocabulary: TokenVocabulary) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}

    def encode(self, prompt: PromptText) -> list[int]:
        """Return the ids of a prompt, with a missing begin token added."""
        controls, control_ids = self._vocabulary.controls, self._vocabulary.control_ids
        bos = self._vocabulary.bos_text
        adds_bos = bool(bos) and not prompt.marked.startswith(bos)
        spans = list(controls.find(prompt.marked))
        markers = [prompt.text[start:end] for start, end in spans]
        ids: list[int] = self._tokenizer.encode(prompt.text, add_special_tokens=adds_bos)
        begin = ids[:1] if adds_bos else []
        expected = [*begin, *(control_ids[name] for name in markers)]
        if self._only_controls(ids) == self._only_controls(expected) and spans == list(
            controls.find(prompt.text)
        ):
            # No content holds a control token: these are the ids that `mlx_lm` has.
            return ids
        texts = [
            prompt.text[start:end]
            for start, end in zip(
                [0, *(end for _, end in spans)],
                [*(start for start, _ in spans), len(prompt.text)],
                strict=True,
            )
        ]
        ids = begin
        for before, text, after in zip(["", *markers], texts, [*markers, ""], strict=True):
            ids += self._encode_between(before, text, after)
            ids += [control_ids[after]] if after else []
        return ids

    def _only_controls(self, ids: list[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in self._vocabulary.unexpected_ids]

    def _encode_between(self, before: str, text: str, after: str) -> tuple[int, ...]:
        """Return the ids of the plain text between two of the template's markers."""
        if before in self._added and self._added[before].rstrip:
            text = text.lstrip()
        if after in self._added and self._added[after].lstrip:
            text = text.rstrip()
        prefixed = not before or self._prefixes_after_markers
        return self._vocabulary.encode_content(text, prefixed=prefixed)

    @cached_property
    def _prefixes_after_markers(self) -> bool:
        """Whether the tokenizer puts a space before a text that follows a control token."""
        name = next(iter(self._added), "")
        after = self._tokenizer.encode(f"{name}a", add_special_tokens=False)[1:]
        return bool(after) and self._vocabulary.token_bytes(after[0]).startswith(b" ")
