"""The prompt of a position, in the form a dialect takes and the words of the large model."""

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
    """`same` says that both models share a vocabulary, so that ids and template pass through.

    Otherwise the conversation is rendered by `tokens`, in the large model's own template, and what
    the large model wrote keeps the ids it gave.
    """

    form: PromptForm
    same: bool
    tokens: TokenSource | None
    replays_fragments: bool = False

    def stable_context(self, context: LargeContext) -> LargeContext:
        """The context as the server will read it; see `rereading`."""
        return retokenised.stable_context(context) if self._is_reread else context

    def stable_prefix(
        self, context: LargeContext, tokens: Sequence[LargeToken]
    ) -> Sequence[LargeToken]:
        """As many of these as calls of their own would have brought; see `rereading`."""
        return retokenised.stable_prefix(context, tokens) if self._is_reread else tokens

    @property
    def _is_reread(self) -> bool:
        """Whether the server cuts what it is sent into tokens, as the small model's own would."""
        return self.same and self.form is PromptForm.TEXT

    def build(self, context: LargeContext) -> Prompt:
        """Raises LargeProtocolError where the form cannot carry the context."""
        if context.fragment_ids and not self.carries_fragments:
            raise LargeProtocolError(
                "the answer stops inside a character, which this server cannot be told"
            )
        match self.form:
            case PromptForm.IDS:
                return Prompt(ids=self._ids(context))
            case PromptForm.TEXT:
                return Prompt(text=self._text(context))
            case PromptForm.CHAT:
                return Prompt(messages=context.messages, answer_start=_answer(context))

    @property
    def carries_fragments(self) -> bool:
        """Whether a begun character can be sent, or be written again by the server."""
        by_id = self.form is PromptForm.IDS or self.replays_fragments
        return self.same and by_id

    def _ids(self, context: LargeContext) -> tuple[int, ...]:
        if self.same:
            return tuple(context.token_ids)
        if self.tokens is None:
            raise LargeProtocolError("nothing here cuts text into the large model's tokens")
        ids = list(self._rendered_ids(self.tokens, context))
        for span in context.spans:
            ids += span.large_ids or self.tokens.encode(span.text)
        return tuple(ids)

    def _rendered_ids(self, tokens: TokenSource, context: LargeContext) -> tuple[int, ...]:
        try:
            return tokens.prompt_ids(context.messages)
        except UsageError as exc:
            raise LargeProtocolError(str(exc)) from exc

    def _text(self, context: LargeContext) -> str:
        if not self.same and self.tokens is not None and context.messages:
            try:
                rendered = self.tokens.prompt_text(context.messages)
            except UsageError as exc:
                raise LargeProtocolError(str(exc)) from exc
            if rendered is not None:
                return rendered.removeprefix(self.tokens.bos_text) + _answer(context)
        # The server adds the begin token itself; two of them change what the model says.
        return context.text.removeprefix(context.vocabulary.bos_text)


def _answer(context: LargeContext) -> str:
    return "".join(span.text for span in context.spans)
