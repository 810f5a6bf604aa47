"""A conversation, and the JSON file it is saved in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxroute.answers.document import AnswerDocument
from mlxroute.answers.document_file import format_inline, read_document
from mlxroute.answers.record_json import is_text
from mlxroute.errors import UsageError
from mlxroute.replace_file import find_target, write_private
from mlxroute.types import Message
from mlxroute.untrusted_text import MalformedText, TextFile, parse_json
from mlxroute.user_folders import expand_user

_FORMAT = "mlxroute conversation"
_VERSION = 1
_KEYS = {"format", "version", "system", "messages"}
_OPTIONAL_KEYS = {"answers"}
_MAX_BYTES = 512 * 2**20


@dataclass(slots=True)
class Conversation:
    """A system prompt, if there is one, and alternating user and assistant messages.

    A user message is added together with its answer, so a failed request leaves no trace.

    Args:
        system: System prompt; None (default) for none.
        turns: User and assistant messages in order, starting with the user's. Empty by default.
        answers: The document of each assistant message in `turns`, None for one without. Empty by
            default.
    """

    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    answers: list[AnswerDocument | None] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """A copy of all messages, the system prompt first, in the form chat templates take."""
        system = [] if self.system is None else [_message("system", self.system)]
        return system + [dict(turn) for turn in self.turns]

    @property
    def last_answer(self) -> AnswerDocument | None:
        """The document of the last assistant message; None without one."""
        return self.answers[-1] if self.answers else None

    def add(self, user: str, assistant: str, answer: AnswerDocument | None = None) -> None:
        """Append a user message and its answer, which may be incomplete, with its document."""
        self.answers += [None] * (len(self.turns) // 2 - len(self.answers))
        self.turns += [_message("user", user), _message("assistant", assistant)]
        self.answers.append(answer)

    def save(self, path: Path, *, redact: Callable[[Any], Any] = lambda value: value) -> None:
        """Write the conversation to a file in one step, readable by its owner only.

        The documents of answers with escalated positions are kept. Nothing in the file has the
        secrets that `redact` removes from a JSON value. Raises UsageError if the file cannot be
        written, or exists and is not a conversation.
        """
        # Resolve links, so that the target is replaced and not the link.
        path = find_target(expand_user(path))
        if os.path.lexists(path) and not _is_conversation(path):
            raise UsageError(f"{path} exists and is not a saved conversation; choose another name")
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "system": self.system,
            "messages": self.turns,
        }
        text = json.dumps(redact(document), ensure_ascii=False, indent=1)
        routed = [item if item and item.escalated_tokens else None for item in self.answers]
        if any(routed):
            lines = [format_inline(item, redact=redact) if item else "null" for item in routed]
            text = (
                text.removesuffix("\n}") + ',\n "answers": [\n  ' + ",\n  ".join(lines) + "\n ]\n}"
            )
        write_private(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read a conversation from a file; raise UsageError if it does not hold one."""
        path = expand_user(path)
        text = TextFile(path, "the conversation", max_bytes=_MAX_BYTES).read()
        try:
            # Lone surrogates are named below, with their message.
            document = parse_json(text, strict=False)
        except MalformedText as error:
            raise UsageError(f"{path} is not a saved conversation: {error}") from error
        try:
            return _parse(document)
        except UsageError as error:
            raise UsageError(f"{path} is not a conversation this version reads: {error}") from None


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _parse(document: Any) -> Conversation:
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise UsageError(f'it has no "format": "{_FORMAT}"')
    if document.get("version") != _VERSION:
        raise UsageError(f'"version" is {document.get("version")!r}, not {_VERSION}')
    if document.keys() - _OPTIONAL_KEYS != _KEYS:
        wrong_keys = ", ".join(sorted((document.keys() - _OPTIONAL_KEYS) ^ _KEYS))
        raise UsageError(f"missing or unknown key: {wrong_keys}")
    system, messages = document["system"], document["messages"]
    if system is not None and not is_text(system):
        raise UsageError('"system" is neither text nor null')
    if not isinstance(messages, list) or len(messages) % 2:
        raise UsageError('"messages" is not a list of question and answer pairs')
    turns = list(_parse_turns(messages))
    answers = document.get("answers", [None] * (len(turns) // 2))
    if not isinstance(answers, list) or len(answers) != len(turns) // 2:
        raise UsageError('"answers" is not a list with an item for each answer')
    return Conversation(system, turns, list(_parse_answers(answers)))


def _parse_turns(messages: list[Any]) -> Iterable[Message]:
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise UsageError(f'message {index + 1} does not have just "role" and "content"')
        if message["role"] != role:
            raise UsageError(f'message {index + 1} has role {message["role"]!r}, not "{role}"')
        if not is_text(message["content"]):
            raise UsageError(f'"content" of message {index + 1} is not text')
        yield _message(role, message["content"])


def _parse_answers(answers: list[Any]) -> Iterable[AnswerDocument | None]:
    for index, answer in enumerate(answers):
        try:
            yield None if answer is None else read_document(answer)
        except UsageError as error:
            raise UsageError(f"answers[{index}] is not an answer document: {error}") from None


def _is_conversation(path: Path) -> bool:
    try:
        Conversation.load(path)
    except UsageError:
        return False
    return True
