"""Output for people: consoles, notes, tables, and answers as live or plain text."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mlxroute.cli.exit_codes import EXIT_INTERRUPTED, EXIT_OK

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlxroute.view import AnswerStream

WARNING_STYLE = "yellow"
_NOTE_STYLE = "dim"


def make_consoles() -> tuple[Console, Console]:
    """Return consoles for stdout and stderr."""
    from rich.console import Console

    return Console(highlight=False), Console(stderr=True, highlight=False)


def print_note(console: Console, text: str, *, style: str = _NOTE_STYLE) -> None:
    """Print text that is not part of an answer, without wrapping it or reading markup in it."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def make_table(
    *columns: str, title: str | None = None, fold: bool = False, wrap: bool = True
) -> Table:
    """Return a table without borders.

    Args:
        columns: Headings of the columns.
        title: Title of the table. None (default) for none.
        fold: Whether to break words that are too long for a column. If not, they are cut off.
        wrap: Whether a row may take several lines.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=title)
    for column in columns:
        table.add_column(column, overflow="fold" if fold else "ellipsis", no_wrap=not wrap)
    return table


def history_path() -> Path:
    """Return the path of the file with the messages typed in chats."""
    import platformdirs

    return platformdirs.user_state_path("mlxroute") / "chat_history"


def show_answer(
    answer: AnswerStream, *, heat: bool, threshold: float, out: Console, err: Console
) -> int:
    """Show the answer live on a terminal, else as plain text; return 130 after Ctrl-C, else 0."""
    if out.is_terminal:
        return _show_live(answer, heat=heat, threshold=threshold, out=out, err=err)
    return write_plain(answer, stream=sys.stdout, err=err)


def _show_live(
    answer: AnswerStream, *, heat: bool, threshold: float, out: Console, err: Console
) -> int:
    from mlxroute.view import LiveView, summary_line

    code = EXIT_OK
    try:
        stats = LiveView(out, heat=heat, threshold=threshold).show(answer)
    except KeyboardInterrupt:
        code, stats = EXIT_INTERRUPTED, answer.stats()
    print_note(err, summary_line(stats))
    return code


def write_plain(answer: AnswerStream, *, stream: TextIO, err: Console) -> int:
    """Write committed text to `stream` as it is decoded, then a summary line to stderr.

    Returns 130 after Ctrl-C, else 0.
    """
    from mlxroute.view import PlainWriter, summary_line

    writer = PlainWriter(stream)
    code = EXIT_OK
    try:
        for token in answer:
            writer.write(token.text)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    writer.finish()
    print_note(err, summary_line(answer.stats()))
    return code


def discard_stdout() -> int:
    """Redirect stdout to the null device after a BrokenPipeError; return 0.

    The reader of a pipe may close it early. Without this, the flush at exit fails too.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK
