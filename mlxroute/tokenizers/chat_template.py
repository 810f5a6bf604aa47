"""A model's tokenizer and chat template: conversations to prompt text, text to ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from mlxroute.errors import UsageError, WeightsError
from mlxroute.tokenizers.token_vocabulary import TokenVocabulary
from mlxroute.types import Message


class ChatTokenizer:
    """What a conversation looks like to a model; `tokenizer` is `mlx_lm`'s TokenizerWrapper."""

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self.vocabulary = TokenVocabulary(tokenizer)

    @classmethod
    def load(cls, path: Path, *, name: str) -> Self:
        """Read the tokenizer of a model directory; its weights are not touched.

        Raises WeightsError when the files are no tokenizer.
        """
        from mlx_lm.tokenizer_utils import load

        try:
            return cls(load(path), name=name)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            reason = " ".join(str(exc).split())[:200] or type(exc).__name__
            raise WeightsError(f"{path} holds no tokenizer that can be read: {reason}") from exc

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text of a conversation, ready for the assistant's answer.

        Raises UsageError when the chat template refuses the conversation.
        """
        if not self._tokenizer.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                # Routing is about the answer's tokens; templates without the switch ignore it.
                enable_thinking=False,
            )
        except TemplateError as exc:
            raise UsageError(
                f"the chat template of {self._name} refuses this conversation: {exc}"
            ) from exc
        return text

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a rendered prompt; special tokens in it are parsed, a missing BOS is added."""
        bos = self.vocabulary.bos_text
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=bool(bos) and not text.startswith(bos)
        )
        return ids
