"""`ask` and `chat`: from settings to a session, from an answer to the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mlxroute.cli.session import Session, open_session
from mlxroute.config import (
    Settings,
    default_config_path,
    load_settings,
)
from mlxroute.errors import UsageError
from mlxroute.types import Message

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.engine import Answer


def settings_from(arguments: Mapping[str, Any]) -> Settings:
    """Settings from a command's arguments, the environment and the config file."""
    known = {item.name for item in fields(Settings)}
    flags = {key: _as_text(value) for key, value in arguments.items() if key in known}
    return load_settings(flags, environ=os.environ, path=default_config_path())


def _as_text(value: Any) -> Any:
    """A flag's value with bytes that are no UTF-8 replaced; a list as a tuple."""
    if isinstance(value, list):
        return tuple(_as_text(item) for item in value)
    if isinstance(value, str):
        return value.encode(errors="surrogateescape").decode(errors="replace")
    return value


def ask(
    prompt: Sequence[str], settings: Settings, *, json_lines: bool, events: bool = False
) -> int:
    """Answer one question; return the exit code."""
    from mlxroute.cli.terminal import consoles, write_json, write_plain

    if events and not json_lines:
        raise UsageError("--events goes with --json")
    out, err = consoles()
    question = _question(prompt)
    session = open_session(settings, err)
    try:
        answer = session.answer([*session.conversation.messages, _user(question)])
        if json_lines:
            code = write_json(answer, session, stream=sys.stdout, events=events)
        elif out.is_terminal:
            code = show_live(answer, session, out, err)
        else:
            code = write_plain(answer, stream=sys.stdout, err=err)
        for line in session.warnings(answer.stats()):
            err.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)
        return code
    except BrokenPipeError:
        return _reader_left()
    finally:
        session.close()


def _reader_left() -> int:
    # Keeps the interpreter's own flush at exit from failing too.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def chat(settings: Settings) -> int:
    """Hold a conversation; return the exit code."""
    from mlxroute.cli.commands.chat import run_chat
    from mlxroute.cli.terminal import consoles, history_path

    out, err = consoles()
    session = open_session(settings, err)
    try:
        return run_chat(
            session,
            console_out=out,
            console_err=err,
            history_path=history_path(),
            heat=settings.heat,
        )
    except BrokenPipeError:
        return _reader_left()
    finally:
        session.close()


def show_live(answer: Answer, session: Session, out: Console, err: Console) -> int:
    """Show the answer as it grows; return 130 after Ctrl-C, else 0."""
    from mlxroute.view import LiveView, summary_line

    view = LiveView(out, heat=session.settings.heat, threshold=session.threshold)
    stopped = False
    try:
        stats = view.show(answer)
    except KeyboardInterrupt:
        stopped, stats = True, answer.stats()
    err.print(summary_line(stats), style="dim", markup=False, soft_wrap=True)
    return 130 if stopped else 0


def _question(prompt: Sequence[str]) -> str:
    """The prompt's words; `-` among them, or nothing at all, stands for standard input."""
    if "-" in prompt or (not prompt and not sys.stdin.isatty()):
        piped = sys.stdin.read()
        text = "\n\n".join(piped if part == "-" else part for part in prompt or ["-"])
    else:
        text = " ".join(prompt)
    text = _as_text(text)
    if not text.strip():
        raise UsageError('the prompt is empty; try `mlxroute ask "Why is the sky blue?"`')
    return str(text)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
