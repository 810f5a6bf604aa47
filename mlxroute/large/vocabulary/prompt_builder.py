"""The prompt of a position, in the form that the server accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxroute.errors import LargeProtocolError, UsageError
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.vocabulary import retokenised
from mlxroute.large.vocabulary.token_sources import TokenSource
from mlxroute.types import LargeContext, LargeToken


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Builds the prompts for one server and one small vocabulary.

    With `same_vocabulary` both models share a vocabulary: the small model's ids and its rendered
    text are sent as they are. Otherwise `tokens` renders the conversation in the large model's
    template, and tokens of the large model keep the ids it gave. `replays_fragments` is True if the
    server can generate committed tokens again, also parts of a character.
    """

    form: PromptForm
    same_vocabulary: bool
    tokens: TokenSource | None
    replays_fragments: bool = False

    def stable_context(self, context: LargeContext) -> LargeContext:
        """Return the context as the server will tokenize it; see `retokenised`."""
        return retokenised.stable_context(context) if self._is_retokenised else context

    def stable_prefix(
        self, context: LargeContext, tokens: Sequence[LargeToken]
    ) -> Sequence[LargeToken]:
        """Return the leading tokens that separate calls would also return; see `retokenised`."""
        return retokenised.stable_prefix(context, tokens) if self._is_retokenised else tokens

    @property
    def _is_retokenised(self) -> bool:
        """Whether the server tokenizes the text of the prompt again, in the same vocabulary."""
        return self.same_vocabulary and self.form is PromptForm.TEXT

    def build(self, context: LargeContext) -> Prompt:
        """Return the prompt. Raises LargeProtocolError where the form cannot carry the context."""
        if context.fragment_ids and not self.carries_fragments:
            raise LargeProtocolError(
                "the answer ends inside a character, and this server accepts only whole characters"
            )
        match self.form:
            case PromptForm.IDS:
                return Prompt(ids=self._ids(context))
            case PromptForm.TEXT:
                return Prompt(text=self._text(context))
            case PromptForm.CHAT:
                return Prompt(messages=context.messages, answer_start=_answer_text(context))

    def replayed_tokens(self, context: LargeContext) -> tuple[bytes, ...]:
        """Return the tokens that the prompt cannot hold: the server has to generate them again."""
        if self.form is PromptForm.IDS:
            return ()
        return tuple(map(context.vocabulary.token_bytes, context.fragment_ids))

    @property
    def carries_fragments(self) -> bool:
        """Whether a part of a character can be sent, or be generated again by the server."""
        return self.same_vocabulary and (self.form is PromptForm.IDS or self.replays_fragments)

    def _ids(self, context: LargeContext) -> tuple[int, ...]:
        if self.same_vocabulary:
            return tuple(context.token_ids)
        if self.tokens is None:
            raise LargeProtocolError("no tokenizer of the large model is known")
        try:
            ids = list(self.tokens.prompt_ids(context.messages))
        except UsageError as exc:
            raise LargeProtocolError(str(exc)) from exc
        for span in context.spans:
            ids += span.large_ids or self.tokens.encode(span.text)
        return tuple(ids)

    def _text(self, context: LargeContext) -> str:
        if not self.same_vocabulary and self.tokens is not None and context.messages:
            try:
                rendered = self.tokens.prompt_text(context.messages)
            except UsageError as exc:
                raise LargeProtocolError(str(exc)) from exc
            if rendered is not None:
                return rendered.removeprefix(self.tokens.bos_text) + _answer_text(context)
        # The server adds the begin token itself; two of them change the model's answer.
        return context.text.removeprefix(context.vocabulary.bos_text)


def _answer_text(context: LargeContext) -> str:
    return "".join(span.text for span in context.spans)
