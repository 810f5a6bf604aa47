"""`chat`: a conversation in the terminal, with commands between the messages."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.chat_session import ChatRouting, ChatSession
from mlxroute.cli.command_words import describe_doubt, split_command
from mlxroute.cli.error_advice import error_message
from mlxroute.cli.exit_codes import EXIT_INTERRUPTED, EXIT_LARGE_FAILED, EXIT_OK, EXIT_USAGE
from mlxroute.cli.shell_completion import complete_model
from mlxroute.config import Settings, parse_share
from mlxroute.errors import LargeError, MlxRouteError, UsageError
from mlxroute.terminal_modes import TERMINAL
from mlxroute.types import Mode

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.cli.line_input import Reader
    from mlxroute.view import DocumentedStream

_LEAVE_HINT = "Ctrl-D or /quit leaves the chat"
_KEYS_HELP = "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Tab completes"


def chat(settings: Settings) -> int:
    """Chat in the terminal (also the default without a command)."""
    from mlxroute.cli.session import open_session
    from mlxroute.cli.terminal import history_path, make_consoles

    out, err = make_consoles()
    session = open_session(settings, err, command="chat")
    try:
        return run_chat(
            session,
            console_out=out,
            console_err=err,
            history_path=history_path(),
            heat=settings.heat,
        )
    finally:
        session.close()


def run_chat(
    session: ChatSession,
    *,
    console_out: Console,
    console_err: Console,
    history_path: Path,
    heat: bool = False,
    reader: Reader | None = None,
) -> int:
    """Run a chat until the user leaves it; return the exit code.

    Errors are shown, and the chat continues. From a pipe, the exit code is that of the last one.
    """
    from mlxroute.cli.line_input import LineEditor

    chat = _Chat(session, out=console_out, err=console_err, heat=heat)
    if reader is None:
        reader = _make_reader(chat, history_path)
    chat.is_interactive = reader.interactive
    if not reader.interactive:
        return _talk(chat, reader)
    chat.print_line(f"{session.describe()}. /help lists the commands.")
    if not isinstance(reader, LineEditor):
        return _talk(chat, reader)
    # What is typed during an answer waits for the next prompt.
    with TERMINAL.hide_typing(by_key=True):
        return _talk(chat, reader)


def _talk(chat: _Chat, reader: Reader) -> int:
    code = EXIT_OK
    was_interrupted = False
    while True:
        try:
            # Here, because Ctrl-C may come again while this is printed.
            if was_interrupted:
                chat.print_line(_LEAVE_HINT)
            was_interrupted = False
            code = _take_turn(chat, reader) or code
        except EOFError:
            return code
        except KeyboardInterrupt:
            if not reader.interactive:
                return EXIT_INTERRUPTED
            was_interrupted = True


def _take_turn(chat: _Chat, reader: Reader) -> int:
    """Read a message or a command and handle it; show an error, and return its code from a pipe."""
    try:
        chat.handle(reader.read(initial_text=chat.unanswered))
    except MlxRouteError as error:
        chat.print_line(f"error: {error_message(error, in_chat=True)}", style="red")
        if not chat.is_interactive:
            return EXIT_LARGE_FAILED if isinstance(error, LargeError) else EXIT_USAGE
    return EXIT_OK


def _make_reader(chat: _Chat, history_path: Path) -> Reader:
    from prompt_toolkit.utils import is_dumb_terminal

    from mlxroute.cli.line_input import CommandCompleter, LineEditor, LineReader

    # An editor draws its line, which belongs on a terminal.
    terminal = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
    if not sys.stdin.isatty() or terminal is None:
        return LineReader(sys.stdin)
    if is_dumb_terminal():
        return LineReader(sys.stdin, prompt_stream=terminal)
    completer = CommandCompleter(chat.completions())
    return LineEditor(completer, history_path=history_path, notify=chat.print_line)


class _Chat:
    """One chat on a pair of consoles.

    Attributes:
        unanswered: The last message if it got no answer, else empty; the next prompt starts with
            it.
        is_interactive: Whether the user can answer a question.
    """

    def __init__(self, session: ChatSession, *, out: Console, err: Console, heat: bool) -> None:
        from mlxroute.view import ChatTotals

        self.unanswered = ""
        self.is_interactive = True
        self._session = session
        self._system = session.conversation.system
        self._out = out
        self._err = err
        self._heat = heat
        self._totals = ChatTotals()

    def completions(self) -> dict[str, Callable[[], Sequence[str]] | None]:
        """Return the values to complete after each command: words, or None for paths."""
        return {
            **dict.fromkeys(_COMMANDS, tuple),
            "/threshold": lambda: ("inf", "-inf"),
            "/mode": lambda: tuple(Mode),
            "/small": lambda: complete_model(""),
            "/save": None,
            "/load": None,
        }

    def print_line(self, line: str, *, style: str = "dim") -> None:
        """Print one line that is not part of an answer."""
        from rich.text import Text

        from mlxroute.safe_text import printable

        # In a file or pipe, lines stay whole.
        self._err.print(Text(printable(line), style), soft_wrap=not self._err.is_terminal)

    def handle(self, text: str) -> None:
        """Answer a message or run a command. Raises EOFError to leave the chat."""
        self.unanswered = ""
        name, value = split_command(text)
        command = _COMMANDS.get(name)
        if command is not None and (command.takes or not value):
            self._run(name, command, value)
        elif self.is_interactive and (doubt := describe_doubt(name, value, _COMMANDS)):
            raise UsageError(f"{doubt} (start with a space to send it as text)")
        elif text.strip():
            self._answer(text)

    def _run(self, name: str, command: _Command, value: str) -> None:
        if not value and command.takes == "FILE":
            raise UsageError(f"{name} needs a file name")
        try:
            command.run(self, value)
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            self.print_line("(stopped; nothing has changed)")

    def _answer(self, user: str) -> None:
        from mlxroute.cli.failure_notes import FailureNotes
        from mlxroute.view import LiveView, summary_line

        self.unanswered = user
        view = LiveView(
            self._out,
            heat=self._heat,
            threshold=self._session.routing.threshold,
            chat_uploads=lambda: self._session.uploads,
        )
        answer, notes = None, FailureNotes(self._out, self._err)
        try:
            message = {"role": "user", "content": user}
            messages = [*self._session.conversation.messages, message]
            answer = self._session.answer(messages, on_failure=notes)
            try:
                stats = view.show(answer)
            finally:
                notes.flush()
        except KeyboardInterrupt:
            if answer is not None and answer.stats().text:
                self._keep(user, answer)
            if not self.is_interactive:
                raise
            self.print_line("(stopped)")
        else:
            self._keep(user, answer)
            self.print_line(summary_line(stats))
            for line in self._session.warnings(stats):
                self.print_line(f"warning: {line}", style="yellow")
        if self.is_interactive:
            self.print_line("")

    def _keep(self, user: str, answer: DocumentedStream) -> None:
        stats, document = answer.stats(), None
        try:
            document = answer.document()
        finally:
            # A Ctrl-C meanwhile does not drop text that is on the screen.
            self._session.conversation.add(user, stats.text, document)
            self._totals.add(stats)
            self.unanswered = ""

    def _help(self, value: str) -> None:
        from prompt_toolkit.utils import is_dumb_terminal

        from mlxroute.cli.terminal import make_table, print_table

        table = make_table("", "")
        table.show_header = False
        for name, command in _COMMANDS.items():
            table.add_row(f"{name} {command.takes}", command.help, style="dim")
        print_table(self._err, table)
        # There is no line editor there.
        if not is_dumb_terminal():
            self.print_line(_KEYS_HELP)

    def _reset(self, value: str) -> None:
        from mlxroute.conversation import Conversation

        # A loaded conversation has a system prompt of its own, or none.
        self._session.conversation = Conversation(self._system)
        self.print_line("the conversation is empty now")

    def _stats(self, value: str) -> None:
        self.print_line(self._totals.line(self._session.uploads, cost=self._session.cost))
        for line in self._totals.failure_lines():
            self.print_line(line)

    def _threshold(self, value: str) -> None:
        if value:
            self._session.routing.set_threshold(_parse_threshold(value))
        self.print_line(f"threshold {_describe_threshold(self._session.routing)}")

    def _budget(self, value: str) -> None:
        if value:
            self._session.routing.set_budget(parse_share(value))
        budget = self._session.routing.budget
        if budget is not None:
            text = f"budget {100 * budget:g}%"
        elif self._session.routing.threshold == math.inf:
            text = "no budget; the large model is never asked"
        else:
            text = "no budget; a threshold is set"
        self.print_line(text)

    def _mode(self, value: str) -> None:
        if value:
            if value not in list(Mode):
                raise UsageError(f"unknown mode {value!r}; choose one of {', '.join(Mode)}")
            self._session.mode = value
        self.print_line(f"mode {self._session.mode}; choices: {', '.join(Mode)}")

    def _why(self, value: str) -> None:
        from mlxroute.view.answer_text import escalation_rows
        from mlxroute.view.word_wrap import print_rows, row_width

        answer = self._session.conversation.last_answer
        if answer is None:
            raise UsageError("there is no answer yet whose tokens are known")
        print_rows(self._err, escalation_rows(answer, width=row_width(self._err)))

    def _large(self, value: str) -> None:
        if value:
            address, *model = value.split(maxsplit=1)
            self._session.change_large(address, model[0] if model else None, self._err)
        self.print_line(self._session.describe())

    def _small(self, value: str) -> None:
        if value:
            self._session.change_small(value, self._err)
        self.print_line(self._session.describe())

    def _save(self, value: str) -> None:
        self._session.save_conversation(Path(value))
        self.print_line(f"saved to {value}")

    def _load(self, value: str) -> None:
        from mlxroute.conversation import Conversation

        self._session.conversation = Conversation.load(Path(value))
        messages = len(self._session.conversation.turns)
        self.print_line(f"loaded {messages} messages from {value}")

    def _quit(self, value: str) -> None:
        raise EOFError


def _parse_threshold(value: str) -> float:
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if math.isnan(threshold):
        raise UsageError(f"/threshold takes a number, inf or -inf, not {value}")
    return threshold


def _describe_threshold(routing: ChatRouting) -> str:
    threshold = routing.threshold
    if math.isinf(threshold):
        return f"{threshold:g}: the large model is {'never' if threshold > 0 else 'always'} asked"
    text = f"{threshold:g} {routing.unit}"
    return text if routing.budget is None else f"{text} now; it follows the budget"


@dataclass(frozen=True, slots=True)
class _Command:
    """A command of a chat.

    Args:
        run: Its method.
        takes: Name of the value it takes, in brackets if it is optional; empty for none.
        help: Its help text.
    """

    run: Callable[[_Chat, str], None]
    takes: str
    help: str


_COMMANDS = {
    "/help": _Command(_Chat._help, "", "list the commands"),
    "/reset": _Command(_Chat._reset, "", "start a new conversation"),
    "/stats": _Command(_Chat._stats, "", "totals of this chat"),
    "/threshold": _Command(
        _Chat._threshold, "[X]", "ask above this score; inf never asks, -inf always"
    ),
    "/budget": _Command(
        _Chat._budget, "[SHARE]", "ask for at most this share of the tokens, e.g. 7%"
    ),
    "/mode": _Command(_Chat._mode, "[NAME]", "what to do during a call to the large model"),
    "/why": _Command(_Chat._why, "", "where the large model was asked, and what both chose"),
    "/large": _Command(_Chat._large, "[URL [ID]]", "use another large model"),
    "/small": _Command(_Chat._small, "[NAME]", "use another small model"),
    "/save": _Command(_Chat._save, "FILE", "write the conversation and its /why to a file"),
    "/load": _Command(_Chat._load, "FILE", "continue a saved conversation"),
    "/quit": _Command(_Chat._quit, "", "leave the chat, like Ctrl-D"),
}
