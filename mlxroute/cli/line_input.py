"""Messages of a chat: typed in a line editor on a terminal, or read from a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output
from prompt_toolkit.output.defaults import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from mlxroute.cli.command_words import split_command
from mlxroute.cli.standard_streams import read_piped
from mlxroute.replace_file import make_private
from mlxroute.safe_text import strip_secrets
from mlxroute.types import Notify

_PROMPT = "> "


class Reader(Protocol):
    """A source of messages, `interactive` if a user types them."""

    @property
    def interactive(self) -> bool: ...

    def read(self, *, initial_text: str) -> str:
        """Return the next message, "" if the user cancelled it.

        Args:
            initial_text: Text to edit, where there is a line editor.

        Raises:
            EOFError: There are no more messages.
            KeyboardInterrupt: The user pressed Ctrl-C.
        """
        ...


class LineReader:
    """A reader of a stream with one message per line.

    Args:
        stream: The stream.
        prompt_stream: Where a prompt is written before each line, for a user at a terminal that
            cannot move its cursor. None (default) for a file or pipe, without a user.
    """

    def __init__(self, stream: TextIO, *, prompt_stream: TextIO | None = None) -> None:
        self.interactive = prompt_stream is not None
        self._stream = stream
        self._prompt_stream = prompt_stream
        self._is_lost = False

    def read(self, *, initial_text: str) -> str:
        """Return the next line. Raises EOFError at the end, UsageError if it is not text."""
        if self._prompt_stream is not None:
            self._prompt_stream.write(_PROMPT)
            self._prompt_stream.flush()
        line = "" if self._is_lost else read_piped(self._read_line)
        if not line:
            if self._prompt_stream is not None:
                self._prompt_stream.write("\n")
            raise EOFError
        return line.rstrip("\n")

    def _read_line(self) -> str:
        try:
            return self._stream.readline()
        except UnicodeDecodeError:
            # The stream has dropped more than this line, so what follows may begin inside another.
            self._is_lost = True
            raise


class LineEditor:
    """A line editor: Enter sends, Alt-Enter starts a new line, pasted text keeps its lines.

    Args:
        completer: Completes commands and their values on Tab.
        history_path: File that keeps the messages of all chats.
        notify: Receives a warning if that file cannot be written.
        input: Terminal input. None (default) for stdin.
        output: Terminal output. None (default) for the terminal, even with stdout in a pipe.
    """

    interactive = True

    def __init__(
        self,
        completer: Completer,
        *,
        history_path: Path,
        notify: Notify,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            _PROMPT,
            prompt_continuation="  ",
            multiline=True,
            key_bindings=_key_bindings(),
            completer=completer,
            complete_while_typing=False,
            # A menu would reserve eight rows below every prompt.
            complete_style=CompleteStyle.READLINE_LIKE,
            history=_history(history_path, notify),
            enable_suspend=True,
            input=input,
            # With stdout in a pipe the prompt belongs on stderr.
            output=output or create_output(always_prefer_tty=True),
        )

    def read(self, *, initial_text: str) -> str:
        """Return the next message; Ctrl-C cancels one.

        Raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C at an empty prompt.
        """
        try:
            return _encodable(self._session.prompt(default=initial_text))
        except KeyboardInterrupt:
            if self._session.default_buffer.text:
                return ""
            raise


class CommandCompleter(Completer):
    """A completer of a chat's commands and their values.

    Args:
        values: For each command, a function that returns its possible values; None for a path.
    """

    def __init__(self, values: Mapping[str, Callable[[], Sequence[str]] | None]) -> None:
        self._values = values
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        command, space, value = document.text_before_cursor.partition(" ")
        if not command.startswith("/"):
            return
        if not space:
            yield from _complete(command, self._values)
        elif command in self._values:
            if (words := self._values[command]) is not None:
                yield from _complete(value, words())
            else:
                for path in self._paths.get_completions(Document(value), event):
                    # The slash after a directory is in the displayed text only.
                    slash = "/" if path.display_text.endswith("/") else ""
                    yield Completion(path.text + slash, path.start_position, path.display)


def _encodable(text: str) -> str:
    """Return the text with pasted bytes that are not characters replaced."""
    return text.encode(errors="replace").decode()


def _complete(text: str, words: Iterable[str]) -> Iterable[Completion]:
    return (Completion(word, -len(text)) for word in words if word.startswith(text))


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    # Typed during an answer, when the terminal turns Enter into a newline.
    @bindings.add("escape", "c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add(Keys.Vt100MouseEvent)
    def ignore(event: KeyPressEvent) -> None:
        """Colours in a plain paste are read as mouse events, which prompt_toolkit cannot parse."""

    return bindings


def _may_hold_secret(text: str) -> bool:
    """Return whether an address in a message or command, which may be mistyped, may hold a secret.

    Where a command is expected, so may a word without a scheme be.
    """
    is_command = split_command(text.strip())[0] != ""
    words = (word for word in text.split() if is_command or "://" in word)
    return any(strip_secrets(word) != word for word in words)


class _SafeFileHistory(FileHistory):
    """A history file without passwords; a failure to write to it does not end the chat."""

    def store_string(self, string: str) -> None:
        if _may_hold_secret(string):
            return
        with suppress(OSError):
            super().store_string(_encodable(string))


def _history(path: Path, notify: Notify) -> History:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        make_private(path)
    except OSError as error:
        notify(
            f"your messages are not kept for the next chat: cannot write {path}: {error.strerror}"
        )
        return InMemoryHistory()
    return _SafeFileHistory(path)
