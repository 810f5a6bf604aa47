"""A conversation, and the JSON file it is saved in."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxroute.errors import UsageError
from mlxroute.types import Message

_FORMAT = "mlxroute conversation"
_VERSION = 1
_KEYS = {"format", "version", "system", "messages"}


@dataclass(slots=True)
class Conversation:
    """A system prompt, if there is one, and alternating user and assistant messages.

    A user message is added together with its answer, so a failed request leaves no trace.

    Args:
        system: System prompt; None (default) for none.
        turns: User and assistant messages in order, starting with the user's. Empty by default.
    """

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """A copy of all messages, the system prompt first, in the form chat templates take."""
        system = [] if self.system is None else [_message("system", self.system)]
        return system + [dict(turn) for turn in self.turns]

    def add(self, user: str, assistant: str) -> None:
        """Append a user message and its answer, which may be incomplete."""
        self.turns += [_message("user", user), _message("assistant", assistant)]

    def reset(self) -> None:
        """Remove all messages but the system prompt."""
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Write the conversation to a file in one step, readable by its owner only.

        Raises UsageError if the file cannot be written, or exists and is not a conversation.
        """
        # Resolve links, so that the target is replaced and not the link.
        path = Path(os.path.realpath(_expand_user(path)))
        if os.path.lexists(path) and not _is_conversation(path):
            raise UsageError(f"{path} exists and is not a saved conversation; choose another name")
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "system": self.system,
            "messages": self.turns,
        }
        text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
        try:
            _write_atomically(path, text.encode())
        except OSError as error:
            raise UsageError(f"cannot save to {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read a conversation from a file; raise UsageError if it does not hold one."""
        path = _expand_user(path)
        try:
            # Reading a pipe or a device might never end.
            if path.exists() and not path.is_file():
                raise UsageError(f"cannot load {path}: it is not a file")
            document = json.loads(path.read_bytes())
        except OSError as error:
            raise UsageError(f"cannot load {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not a saved conversation: not a JSON file") from error
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
    if document.keys() != _KEYS:
        wrong_keys = ", ".join(sorted(document.keys() ^ _KEYS))
        raise UsageError(f"missing or unknown key: {wrong_keys}")
    system, messages = document["system"], document["messages"]
    if system is not None and not _is_text(system):
        raise UsageError('"system" is neither text nor null')
    if not isinstance(messages, list) or len(messages) % 2:
        raise UsageError('"messages" is not a list of question and answer pairs')
    return Conversation(system, list(_parse_turns(messages)))


def _parse_turns(messages: list[Any]) -> Iterable[Message]:
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise UsageError(f'message {index + 1} does not have just "role" and "content"')
        if message["role"] != role:
            raise UsageError(f'message {index + 1} has role {message["role"]!r}, not "{role}"')
        if not _is_text(message["content"]):
            raise UsageError(f'"content" of message {index + 1} is not text')
        yield _message(role, message["content"])


def _is_text(value: object) -> bool:
    """Return whether a JSON value is a string that UTF-8 can encode (no lone surrogates)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _expand_user(path: Path) -> Path:
    if "\0" in str(path):
        raise UsageError("a file name cannot contain a NUL character")
    # Path.expanduser raises for an unknown user; this leaves the path as it is.
    return Path(os.path.expanduser(path))


def _is_conversation(path: Path) -> bool:
    try:
        Conversation.load(path)
    except UsageError:
        return False
    return True


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file beside `path` and rename it, so that no half file is left."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
