"""A model's tokenizer with its chat template: the one way from message contents to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from mlxroute.errors import MlxRouteError, UsageError, WeightsError
from mlxroute.messages import read_messages
from mlxroute.safe_text import error_text
from mlxroute.tokenizers.chat_template import ChatTemplate
from mlxroute.tokenizers.content_marks import ContentMarks
from mlxroute.tokenizers.fast_tokenizer import FastTokenizer, load_full_tokenizer
from mlxroute.tokenizers.prompt_encoder import PromptEncoder
from mlxroute.tokenizers.token_vocabulary import TokenVocabulary
from mlxroute.types import EncodedPrompt, Message, PromptText


class ChatTokenizer:
    """Encodes conversations for a model; wraps `mlx_lm`'s TokenizerWrapper.

    Args:
        tokenizer: The TokenizerWrapper, or a FastTokenizer.
        name: The model's name, for error messages.

    Attributes:
        vocabulary: The tokenizer's vocabulary.
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self.vocabulary = TokenVocabulary(tokenizer)
        self._encoder = PromptEncoder(tokenizer, self.vocabulary)
        self._template: tuple[Any, ChatTemplate] | None = None
        self._last: EncodedPrompt | None = None
        self._last_rendered: EncodedPrompt | None = None
        self._lock = self.vocabulary.encoding_lock

    @classmethod
    def load(cls, path: Path, *, name: str) -> Self:
        """Read the tokenizer of a model directory, without its weights.

        Raises WeightsError if the files are not those of a tokenizer.
        """
        try:
            # Its end tokens are those of the model's configuration, which is not read here.
            fast = FastTokenizer.read(path, eos_token_ids=None)
            return cls(load_full_tokenizer(path) if fast is None else fast, name=name)
        except MlxRouteError:
            raise
        except Exception as exc:
            raise WeightsError(f"{path} has no readable tokenizer: {error_text(exc)}") from exc

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template; without one, messages are joined by newlines."""
        return bool(self._tokenizer.has_chat_template) and self._source() not in ("", None)

    def encode_conversation(
        self, messages: Sequence[Mapping[str, object]], *, answer_start: str = ""
    ) -> EncodedPrompt:
        """Return the prompt of a conversation, up to where the assistant's answer begins.

        `answer_start`, empty by default, is the beginning of that answer. It and the message
        contents become plain text, whatever they contain; the control tokens in the ids are those
        of the template, and the begin token. Raises UsageError for no messages, for messages that
        are not text, and for a chat template that cannot be used.
        """
        conversation = read_messages(messages)
        if not conversation:
            raise UsageError("messages must have at least one message", parameter="messages")
        with self._lock:
            rendered = self._render(conversation)
            if answer_start:
                marked = ContentMarks(self.vocabulary.controls, [answer_start]).mark(answer_start)
                rendered = PromptText(rendered.text + answer_start, rendered.marked + marked)
            if self._last is None or self._last.rendered != rendered:
                self._last = EncodedPrompt(tuple(self._encoder.encode(rendered)), rendered)
            drops_space = not answer_start and self._drops_space_after(self._last.ids)
            return replace(self._last, drops_space=drops_space)

    def encode_rendered(self, prompt: str | PromptText) -> EncodedPrompt:
        """Return the prompt of a text that the caller rendered.

        All control tokens of a text are meant, or those that are `marked` as the template's own.
        """
        rendered = PromptText(prompt, prompt) if isinstance(prompt, str) else prompt
        with self._lock:
            if self._last_rendered is None or self._last_rendered.rendered != rendered:
                ids = tuple(self._encoder.encode(rendered))
                self._last_rendered = EncodedPrompt(ids, rendered)
            return self._last_rendered

    def _drops_space_after(self, prompt_ids: tuple[int, ...]) -> bool:
        """Return whether a space at the beginning of an answer is the tokenizer's own.

        After white space, and without a chat template, the model may mean it.
        """
        before = b"".join(map(self.vocabulary.token_bytes, prompt_ids[-1:]))
        is_apart = self.has_chat_template and not before[-1:].isspace()
        return is_apart and self.vocabulary.drops_space

    def _render(self, messages: tuple[Message, ...]) -> PromptText:
        if not self.has_chat_template:
            text = "\n".join(message["content"] for message in messages)
            return PromptText(text, ContentMarks(self.vocabulary.controls, [text]).mark(text))
        # The template of a tokenizer of transformers can be changed.
        source = self._source()
        if self._template is None or self._template[0] != source:
            self._template = source, self._make_template(source)
        return self._template[1].render(messages, self.vocabulary.controls)

    def _make_template(self, source: Any) -> ChatTemplate:
        if isinstance(source, Mapping):
            if "default" not in source:
                listed = ", ".join(map(str, source))
                raise UsageError(
                    f"the chat templates of {self._name} are named {listed}, and none is named"
                    " default; name one of them so in its tokenizer_config.json"
                )
            source = source["default"]
        if not isinstance(source, str) and not callable(source):
            raise UsageError(f"the chat template of {self._name} is not text; choose another model")
        variables = self._tokenizer.special_tokens_map
        return ChatTemplate(source, variables=variables, name=self._name)

    def _source(self) -> Any:
        """Return the template's text, several by name, or a function that renders."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, FastTokenizer):
            return tokenizer.chat_template
        from transformers import PreTrainedTokenizerBase

        own = getattr(type(tokenizer), "apply_chat_template", None)
        inner = getattr(tokenizer, "_tokenizer", tokenizer)
        inner_own = getattr(type(inner), "apply_chat_template", own)
        has_function = getattr(tokenizer, "_chat_template", None) is not None
        if has_function or inner_own is not PreTrainedTokenizerBase.apply_chat_template:
            return tokenizer.apply_chat_template
        return tokenizer.chat_template
