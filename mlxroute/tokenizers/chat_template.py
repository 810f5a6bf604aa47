"""A chat template: conversations to prompt text, in the form that the template accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from mlxroute.errors import UsageError
from mlxroute.messages import fold_system, join_neighbours
from mlxroute.tokenizers.content_marks import ContentMarks
from mlxroute.tokenizers.control_tokens import ControlTokens
from mlxroute.tokenizers.template_bounds import TemplateFailure, TemplateTooCostly
from mlxroute.tokenizers.template_sandbox import TemplateProgram, guard
from mlxroute.types import Message, PromptText

_SWITCH: Final = "add_generation_prompt"

TemplateMessages = Sequence[Mapping[str, Any]]


class _TextPart(dict[str, Any]):
    """A part of a content. It has no text form: a template that prints it expects a text."""

    def __repr__(self) -> str:
        raise TemplateFailure("it prints a list of parts")


class ChatTemplate:
    """The chat template of a model.

    Args:
        source: The template; its text, or the function of a tokenizer that renders by itself.
        variables: Variables of the template, such as `bos_token`.
        name: The model's name, for error messages.
    """

    def __init__(
        self, source: str | Callable[..., Any], *, variables: Mapping[str, object], name: str
    ) -> None:
        self._source = source
        self._variables = dict(variables)
        self._name = name
        self._program: TemplateProgram | None = None

    def render(self, messages: Sequence[Message], controls: ControlTokens) -> PromptText:
        """Return a prompt, up to where the assistant's answer begins.

        A template that refuses or leaves out a system message gets its text in the first user
        message; one that needs alternating roles gets neighbours joined; one that needs lists of
        parts gets them. Raises UsageError if the template fails in every form.
        """
        source = self._source if isinstance(self._source, str) else ""
        texts = [message["content"] for message in messages]
        marks = ContentMarks(controls, [*texts, source])
        if self._program is not None:
            self._program.start()
        failure: TemplateFailure | None = None
        partial: PromptText | None = None
        for form in _forms(messages):
            try:
                rendered, is_complete = self._render_form(form, marks)
            except TemplateTooCostly as exc:
                raise self._error(exc) from exc
            except TemplateFailure as exc:
                failure = failure or exc
                continue
            if is_complete:
                return rendered
            partial = partial or rendered
        # A template may change the contents on purpose, so that they cannot be recognised.
        if partial is not None:
            return partial
        assert failure is not None
        raise self._error(failure) from failure

    def _error(self, failure: TemplateFailure) -> UsageError:
        return UsageError(
            f"the chat template of {self._name} fails: {failure}; choose another model or correct"
            " the template"
        )

    def _render_form(
        self, messages: TemplateMessages, marks: ContentMarks
    ) -> tuple[PromptText, bool]:
        """Return the prompt, and whether the messages that matter most are in it."""
        plain = self._run(messages)
        marked = self._run(_map_texts(messages, marks.mark))
        is_faithful = marks.unmark(marked) == plain
        if not is_faithful:
            # The template looks into the contents: it may see all but control tokens.
            marked = self._run(_map_texts(messages, marks.mark_names))
            if marks.are_lost(marked, map(_content_text, messages)):
                # It rewrites marks or leaves them out: a space inside the names does not need them.
                marked = self._run(_map_texts(messages, marks.break_up_names))
        opening = self._missing_opening(messages, plain, marks)
        is_complete = all(
            (marks.mark(text) in marked if is_faithful else text in plain)
            or self._is_used(messages, number, marks)
            for number, message in enumerate(messages)
            if (message["role"] == "system" or number == len(messages) - 1)
            and (text := _content_text(message).strip())
        )
        return PromptText(marks.unmark(marked) + opening, marked + opening), is_complete

    def _is_used(self, messages: TemplateMessages, number: int, marks: ContentMarks) -> bool:
        """Return whether the end of a message is in the prompt, whatever was changed before it."""
        longer = _map_texts([messages[number]], lambda text: text + marks.answer)
        try:
            rendered = self._run([*messages[:number], *longer, *messages[number + 1 :]])
        except TemplateFailure:
            return False
        return marks.answer in rendered

    def _missing_opening(
        self, messages: TemplateMessages, rendered: str, marks: ContentMarks
    ) -> str:
        """Return what begins an assistant's turn if the template does not write it when asked."""
        if not isinstance(self._source, str) or _SWITCH in self._source:
            return ""
        answer = {"role": "assistant", "content": marks.answer}
        try:
            longer = self._run([*messages, answer])
        except TemplateFailure:
            return ""
        begin, mark, _ = longer.partition(marks.answer)
        opening = begin.removeprefix(rendered)
        return opening if mark and opening != begin and opening.strip() else ""

    def _run(self, messages: TemplateMessages) -> str:
        text = self._render_unchecked(messages)
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise TemplateFailure("it writes half a surrogate pair") from exc
        return text

    def _render_unchecked(self, messages: TemplateMessages) -> str:
        chat = [dict(message) for message in messages]
        # Only the answer's tokens are routed; templates without the switch ignore it.
        switches = {_SWITCH: True, "enable_thinking": False}
        if not isinstance(self._source, str):
            render = self._source
            return str(guard(lambda: render(chat, tokenize=False, **switches)))
        if self._program is None:
            self._program = TemplateProgram(self._source)
        values = {"messages": chat, "tools": None, "documents": None}
        return self._program.run(values | self._variables | switches)


def _forms(messages: Sequence[Message]) -> Iterator[TemplateMessages]:
    """Yield the forms of a conversation, the given one first."""
    folded = fold_system(messages)
    forms = [list(messages), folded, join_neighbours(messages), join_neighbours(folded)]
    different = [form for i, form in enumerate(forms) if form not in forms[:i]]
    yield from different
    for form in different:
        yield [
            {"role": m["role"], "content": [_TextPart(type="text", text=m["content"])]}
            for m in form
        ]


def _content_text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _map_texts(messages: TemplateMessages, change: Callable[[str], str]) -> TemplateMessages:
    """Return the messages with changed texts."""
    changed = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = change(content)
        else:
            content = [_TextPart(part, text=change(part["text"])) for part in content]
        changed.append({**message, "content": content})
    return changed
