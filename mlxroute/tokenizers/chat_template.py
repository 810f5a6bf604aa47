"""A model's tokenizer with its chat template: conversations to prompt text, text to ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from mlxroute.errors import UsageError, WeightsError
from mlxroute.tokenizers.fast_tokenizer import FastTokenizer
from mlxroute.tokenizers.token_vocabulary import TokenVocabulary
from mlxroute.types import Message


class ChatTokenizer:
    """Renders conversations for a model and encodes them; wraps `mlx_lm`'s TokenizerWrapper.

    Args:
        tokenizer: The TokenizerWrapper, or a FastTokenizer.
        name: The model's name, for error messages.
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self.vocabulary = TokenVocabulary(tokenizer)

    @classmethod
    def load(cls, path: Path, *, name: str) -> Self:
        """Read the tokenizer of a model directory, without its weights.

        Raises WeightsError if the files are not those of a tokenizer.
        """
        # Its end tokens are those of the model's configuration, which is not read here.
        fast = FastTokenizer.read(path, eos_token_ids=None)
        if fast is not None:
            return cls(fast, name=name)
        from mlx_lm.tokenizer_utils import load

        try:
            return cls(load(path), name=name)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            reason = " ".join(str(exc).split())[:200] or type(exc).__name__
            raise WeightsError(f"{path} has no readable tokenizer: {reason}") from exc

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text of a conversation, up to where the assistant's answer begins.

        Raises UsageError if the chat template rejects the conversation.
        """
        if not self._tokenizer.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                # Only the answer's tokens are routed; templates without the switch ignore it.
                enable_thinking=False,
            )
        except TemplateError as exc:
            raise UsageError(
                f"the chat template of {self._name} rejects this conversation: {exc}"
            ) from exc
        return text

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt, with its special tokens parsed and its BOS added."""
        bos = self.vocabulary.bos_text
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=bool(bos) and not text.startswith(bos)
        )
        return ids
