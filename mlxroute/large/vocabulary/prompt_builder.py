"""The prompt of a position, in the form that the server accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxroute.errors import LargeNotContinued, LargeProtocolError, LargeUnsendable, UsageError
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.vocabulary import retokenised
from mlxroute.large.vocabulary.token_sources import FileTokenSource, TokenSource
from mlxroute.messages import answer_opening
from mlxroute.tokenizers.control_tokens import ControlTokens, control_tokens
from mlxroute.types import LargeContext, LargeToken, Message, PromptText


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Builds the prompts for one server and one small vocabulary.

    With `same_vocabulary` both models share a vocabulary: the small model's ids and its rendered
    text are sent as they are. Otherwise `tokens` renders the conversation in the large model's
    template, and tokens of the large model keep the ids it gave. `replays_fragments` is True if the
    server can generate committed tokens again, also parts of a character. Without
    `renders_conversations` the source cannot do so, and ids are those of the small model's prompt.
    """

    form: PromptForm
    same_vocabulary: bool
    tokens: TokenSource | None
    replays_fragments: bool = False
    renders_conversations: bool = True

    def stable_context(self, context: LargeContext) -> LargeContext:
        """Return the context as the server will tokenize it; see `retokenised`.

        A server that cannot generate tokens again gets the whole text instead.
        """
        is_moved = self._is_retokenised and self.carries_fragments
        return retokenised.stable_context(context) if is_moved else context

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
        """Return the prompt.

        Raises LargeNotContinued for an answer so far, and LargeUnsendable for a prompt, that the
        form cannot carry.
        """
        if context.fragment_ids and not self.carries_fragments:
            raise LargeNotContinued(
                "the answer ends inside a character, and this server accepts only whole characters"
            )
        match self.form:
            case PromptForm.IDS:
                return self._ids_prompt(context)
            case PromptForm.TEXT:
                return self._text_prompt(context)
            case PromptForm.CHAT:
                if not context.messages:
                    raise LargeUnsendable(
                        "the large model's server takes only conversations, so it cannot continue"
                        " a text or token ids"
                    )
                messages, names = self._plain_messages(context)
                return Prompt(
                    messages=messages,
                    answer_start=self._plain_answer(context, _answer_text(context)),
                    neutralised=names,
                )

    def replayed_tokens(self, context: LargeContext) -> tuple[bytes, ...]:
        """Return the tokens that the prompt cannot hold: the server has to generate them again."""
        if self.form is PromptForm.IDS:
            return ()
        return tuple(map(context.vocabulary.token_bytes, context.fragment_ids))

    @property
    def carries_fragments(self) -> bool:
        """Whether a part of a character can be sent, or be generated again by the server."""
        return self.same_vocabulary and (self.form is PromptForm.IDS or self.replays_fragments)

    @property
    def knows_chat_template(self) -> bool:
        """Whether prompts are in the large model's own chat template."""
        is_rendered_by_server = self.form is PromptForm.CHAT or (
            self.form is PromptForm.IDS and self.renders_conversations
        )
        has_files = isinstance(self.tokens, FileTokenSource)
        return self.same_vocabulary or is_rendered_by_server or has_files

    def _ids_prompt(self, context: LargeContext) -> Prompt:
        if self.same_vocabulary:
            return Prompt(ids=tuple(context.token_ids))
        if self.tokens is None:
            raise LargeProtocolError("no tokenizer of the large model is known")
        if context.messages and self.renders_conversations:
            ids, names = self._conversation_ids(context, self.tokens)
        else:
            text, names = self._controls(context).neutralise_content(_rendered(context))
            # The large model's begin token takes the place of the small one's.
            text = text.removeprefix(context.vocabulary.bos_text)
            ids = list(self.tokens.rendered_ids(text))
        for span in context.spans:
            ids += span.large_ids or self.tokens.encode(span.text)
        return Prompt(ids=tuple(ids), neutralised=names)

    def _conversation_ids(
        self, context: LargeContext, tokens: TokenSource
    ) -> tuple[list[int], tuple[str, ...]]:
        """Return the ids of the messages, and the names of control tokens that were in them."""
        messages: tuple[Message, ...] = context.messages
        names: tuple[str, ...] = ()
        if tokens.reads_control_tokens:
            messages, names = self._plain_messages(context)
        try:
            return list(tokens.prompt_ids(messages, thinks=_thinks(context))), names
        except UsageError as exc:
            raise LargeProtocolError(str(exc)) from exc

    def _text_prompt(self, context: LargeContext) -> Prompt:
        rendered = context.prompt
        bos_text = context.vocabulary.bos_text
        answer = "" if rendered is None else context.text[len(rendered.text) :]
        if not self.same_vocabulary and self.tokens is not None and context.messages:
            try:
                own = self.tokens.prompt_text(context.messages, thinks=_thinks(context))
            except UsageError as exc:
                raise LargeProtocolError(str(exc)) from exc
            if own is not None:
                rendered = own
                bos_text = self.tokens.bos_text
                answer = _answer_text(context)
        if rendered is None:
            return Prompt(text=context.text.removeprefix(bos_text))
        if rendered is context.prompt:
            # Tokens that the server generates again may begin at the end of the prompt.
            rendered = rendered.cut(len(context.text))
        text, names = self._controls(context).neutralise_content(rendered)
        # The server adds the begin token itself; two of them change the model's answer.
        text = text.removeprefix(bos_text) + self._plain_answer(context, answer)
        return Prompt(text=text, neutralised=names)

    def _plain_messages(self, context: LargeContext) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        """Return the messages without control tokens, and the names of those that were in them."""
        controls = self._controls(context)
        messages: list[Message] = []
        names: list[str] = []
        for message in context.messages:
            content, in_content = controls.neutralise(message["content"])
            messages.append(message | {"content": content})
            names += in_content
        return tuple(messages), tuple(dict.fromkeys(names))

    def _plain_answer(self, context: LargeContext, answer: str) -> str:
        """Return the answer so far without control tokens; thinking keeps its marks."""
        return self._controls(context, in_answer=True).neutralise(answer)[0]

    def _controls(self, context: LargeContext, *, in_answer: bool = False) -> ControlTokens:
        """Return the control tokens of the server, as far as they are known."""
        vocabulary = context.vocabulary if self.same_vocabulary else None
        if vocabulary is None and self.tokens is not None:
            vocabulary = self.tokens.vocabulary
        known = context.vocabulary if vocabulary is None else vocabulary
        names = known.special_names if in_answer else known.control_names
        return control_tokens(names, any_form=vocabulary is None, in_answer=in_answer)


def _rendered(context: LargeContext) -> PromptText:
    """Return the prompt without the answer."""
    text = context.text.removesuffix(_answer_text(context))
    return PromptText(text, text) if context.prompt is None else context.prompt


def _answer_text(context: LargeContext) -> str:
    return "".join(span.text for span in context.spans)


def _thinks(context: LargeContext) -> bool:
    """Return whether the answer begins with thinking, as the small model's template begins it."""
    if context.prompt is None:
        return False
    template_end = len(context.text) - len(_answer_text(context))
    return bool(answer_opening(context.prompt.marked[:template_end]))
