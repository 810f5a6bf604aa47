"""The chat loop: messages in, answers out, and the commands between them."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlxroute.config import parse_share
from mlxroute.conversation import Conversation
from mlxroute.errors import MlxRouteError, UsageError
from mlxroute.types import Message, Prices, RunStats, Uploads

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.cli.line_input import Reader
    from mlxroute.view import AnswerStream

# A path, as in "/usr/bin/env is what?", is no command.
_COMMAND = re.compile(r"(/[^\s/]*)(?:[ \t]+(.*?))?\s*")
_LEAVE_HINT = "Ctrl-D or /quit leaves the chat"
_KEYS_HELP = "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Tab completes"


class ChatSession(Protocol):
    """The models behind a chat and what can be set about them."""

    conversation: Conversation
    threshold: float
    mode: str

    @property
    def unit(self) -> str:
        """What a threshold is counted in."""
        ...

    @property
    def budget(self) -> float | None:
        """The share of the tokens that may be the large model's; None where a threshold is set."""
        ...

    def keep_within(self, budget: float) -> None:
        """Ask at no more than this share of the tokens from now on."""
        ...

    @property
    def modes(self) -> tuple[str, ...]: ...

    @property
    def prices(self) -> Prices | None: ...

    @property
    def uploads(self) -> Uploads:
        """What was sent since the start; may be read from another thread."""
        ...

    def warnings(self, stats: RunStats) -> list[str]:
        """What the user should know after an answer and has not been told yet."""
        ...

    def answer(self, messages: Sequence[Message]) -> AnswerStream:
        """Start answering a conversation."""
        ...

    def describe(self) -> str:
        """One line about the models."""
        ...


def run_chat(
    session: ChatSession,
    *,
    console_out: Console,
    console_err: Console,
    history_path: Path,
    heat: bool = False,
    reader: Reader | None = None,
) -> int:
    """Hold a conversation until its end; return the exit code.

    On a terminal errors are shown and the chat goes on; from a pipe they are raised.
    """
    chat = _Chat(session, out=console_out, err=console_err, heat=heat)
    if reader is None:
        reader = _reader(chat, history_path)
    if reader.interactive:
        chat.say(f"{session.describe()}. /help lists the commands.")
    while True:
        try:
            text = reader.read(offered=chat.offered)
            chat.handle(text, interactive=reader.interactive)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if not reader.interactive:
                return 130
            chat.say(_LEAVE_HINT)
        except MlxRouteError as error:
            if not reader.interactive:
                raise
            chat.say(f"error: {error}", style="red")


def _reader(chat: _Chat, history_path: Path) -> Reader:
    from mlxroute.cli.line_input import CommandCompleter, LineEditor, LineReader

    if not sys.stdin.isatty():
        return LineReader(sys.stdin)
    completer = CommandCompleter(chat.completions())
    return LineEditor(completer, history_path=history_path, notify=chat.say)


class _Chat:
    """One chat on a pair of consoles. `offered` is a message that is still unanswered."""

    def __init__(self, session: ChatSession, *, out: Console, err: Console, heat: bool) -> None:
        from mlxroute.view import ChatTotals

        self.offered = ""
        self._session = session
        self._out = out
        self._err = err
        self._heat = heat
        self._totals = ChatTotals()

    def completions(self) -> dict[str, Callable[[], Sequence[str]] | None]:
        """What may follow each command: words, or None for a path."""
        return {
            **dict.fromkeys(_COMMANDS, tuple),
            "/threshold": lambda: ("inf", "-inf"),
            "/mode": lambda: self._session.modes,
            "/save": None,
            "/load": None,
        }

    def say(self, line: str, *, style: str = "dim") -> None:
        """One line for the user, beside the answers."""
        from rich.text import Text

        from mlxroute.safe_text import printable

        # Only a terminal has an edge to wrap at.
        self._err.print(Text(printable(line), style), soft_wrap=not self._err.is_terminal)

    def handle(self, text: str, *, interactive: bool) -> None:
        """Answer a message or obey a command. Raises: EOFError to leave."""
        self.offered = ""
        if command := _COMMAND.fullmatch(text):
            self._obey(command[1], command[2] or "")
        elif text.strip():
            self._answer(text, interactive=interactive)

    def _obey(self, name: str, value: str) -> None:
        command = _COMMANDS.get(name.lower())
        if command is None:
            near = difflib.get_close_matches(name.lower(), _COMMANDS, n=1)
            advice = f"did you mean {near[0]}?" if near else "/help lists the commands"
            raise UsageError(f"no command {name}; {advice} (a space in front sends it as text)")
        if value and not command.takes:
            raise UsageError(f"{name} takes no value")
        if not value and command.takes == "FILE":
            raise UsageError(f"{name} needs a file name")
        command.obey(self, value)

    def _answer(self, user: str, *, interactive: bool) -> None:
        from mlxroute.view import LiveView, summary_line

        self.offered = user
        view = LiveView(
            self._out,
            heat=self._heat,
            threshold=self._session.threshold,
            chat_uploads=lambda: self._session.uploads,
        )
        answer = None
        try:
            message = {"role": "user", "content": user}
            answer = self._session.answer([*self._session.conversation.messages, message])
            stats = view.show(answer)
        except KeyboardInterrupt:
            if answer is not None and answer.stats().text:
                self._keep(user, answer.stats())
            if not interactive:
                raise
            self.say("(stopped)")
        else:
            self._keep(user, stats)
            self.say(summary_line(stats))
            for line in self._session.warnings(stats):
                self.say(f"warning: {line}", style="yellow")
        if interactive:
            self.say("")

    def _keep(self, user: str, stats: RunStats) -> None:
        self._session.conversation.add(user, stats.text)
        self._totals.add(stats)
        self.offered = ""

    def _help(self, value: str) -> None:
        for name, command in _COMMANDS.items():
            self.say(f"{f'{name} {command.takes}':20}{command.help}")
        self.say(_KEYS_HELP)

    def _reset(self, value: str) -> None:
        self._session.conversation.reset()
        self.say("the conversation starts anew")

    def _stats(self, value: str) -> None:
        uploads, prices = self._session.uploads, self._session.prices
        cost = None if prices is None else prices.cost(uploads)
        self.say(self._totals.line(uploads, cost=cost))

    def _threshold(self, value: str) -> None:
        if value:
            self._session.threshold = _threshold(value)
        self.say(f"threshold {_described(self._session)}")

    def _budget(self, value: str) -> None:
        if value:
            self._session.keep_within(parse_share(value))
        found = self._session.budget
        self.say("no budget; a threshold is set" if found is None else f"budget {100 * found:g}%")

    def _mode(self, value: str) -> None:
        if value:
            if value not in self._session.modes:
                raise UsageError(f"no mode {value}; there is: {', '.join(self._session.modes)}")
            self._session.mode = value
        self.say(f"mode {self._session.mode}, of: {', '.join(self._session.modes)}")

    def _save(self, value: str) -> None:
        self._session.conversation.save(Path(value))
        self.say(f"saved to {value}")

    def _load(self, value: str) -> None:
        self._session.conversation = Conversation.load(Path(value))
        messages = len(self._session.conversation.turns)
        self.say(f"loaded {messages} messages from {value}")

    def _quit(self, value: str) -> None:
        raise EOFError


def _threshold(value: str) -> float:
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if math.isnan(threshold):
        raise UsageError(f"/threshold takes a number, inf or -inf, not {value}")
    return threshold


def _described(session: ChatSession) -> str:
    threshold = session.threshold
    if math.isinf(threshold):
        return f"{threshold:g}: the large model is {'never' if threshold > 0 else 'always'} asked"
    return f"{threshold:g} {session.unit}"


@dataclass(frozen=True, slots=True)
class _Command:
    """What a command does, what may follow it ("[X]" when it need not), and its help."""

    obey: Callable[[_Chat, str], None]
    takes: str
    help: str


_COMMANDS = {
    "/help": _Command(_Chat._help, "", "this list"),
    "/reset": _Command(_Chat._reset, "", "forget the conversation"),
    "/stats": _Command(_Chat._stats, "", "figures of this chat so far"),
    "/threshold": _Command(
        _Chat._threshold, "[NATS]", "ask above this entropy; inf never, -inf always"
    ),
    "/budget": _Command(_Chat._budget, "[SHARE]", "ask at no more than this share, e.g. 7%"),
    "/mode": _Command(_Chat._mode, "[NAME]", "how the wait for the large model is spent"),
    "/save": _Command(_Chat._save, "FILE", "write the conversation to a file"),
    "/load": _Command(_Chat._load, "FILE", "go on with a saved conversation"),
    "/quit": _Command(_Chat._quit, "", "leave, as Ctrl-D does"),
}
