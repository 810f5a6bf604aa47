"""Output for people: consoles, notes, tables, and answers as live or plain text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mlxroute.cli.exit_codes import EXIT_INTERRUPTED, EXIT_OK
from mlxroute.terminal_modes import TERMINAL
from mlxroute.user_folders import state_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table
    from rich.text import Text

    from mlxroute.view import AnswerStream

WARNING_STYLE = "yellow"
# On narrower terminals, tables have fewer columns.
_NARROW_COLUMNS = 60
# More than a row of any table has.
_UNLIMITED = 100_000
_NOTE_STYLE = "dim"
_LABEL_INDENT = 5
_FORCE_COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE")
_DUMB_TERMINALS = ("dumb", "unknown")


def make_consoles() -> tuple[Console, Console]:
    """Return consoles for stdout and stderr."""
    return _make_console(sys.stdout), _make_console(sys.stderr, stderr=True)


def _make_console(stream: TextIO, *, stderr: bool = False) -> Console:
    """Return a console that redraws nothing unless it writes to a terminal.

    Variables such as FORCE_COLOR or TTY_COMPATIBLE can add colours elsewhere, but no control codes.
    """
    from rich.console import Console

    is_terminal = stream.isatty()
    is_dumb = os.environ.get("TERM", "").lower() in _DUMB_TERMINALS
    is_coloured = not os.environ.get("NO_COLOR") and any(
        os.environ.get(name, "") not in ("", "0") for name in _FORCE_COLOURS
    )
    return Console(
        stderr=stderr,
        highlight=False,
        # Texts hold names, paths and addresses, whose [x] and :100: are not markup.
        markup=False,
        emoji=False,
        force_terminal=is_terminal,
        force_interactive=is_terminal and not is_dumb,
        color_system="standard" if is_coloured and not is_terminal else "auto",
        _environ={name: value for name, value in os.environ.items() if _is_usable(name, value)},
    )


def _is_usable(name: str, value: str) -> bool:
    """Return whether rich can use an environment variable: in 0 columns it would print nothing."""
    return name not in ("COLUMNS", "LINES") or (value.isdecimal() and int(value[:9]) > 0)


@contextmanager
def show_status(console: Console, text: str) -> Iterator[Status]:
    """Show what the block does while it runs, on a terminal only."""
    status = console.status(text)
    with redraw(console, pause=status.stop, resume=status.start):
        yield status


def redraw(
    console: Console, *, pause: Callable[[], None], resume: Callable[[], None]
) -> AbstractContextManager[None]:
    """Return a block that shows a display, as `TERMINAL.redraw`, or none on a plain console."""
    return TERMINAL.redraw(pause=pause, resume=resume) if console.is_interactive else nullcontext()


def print_note(console: Console, text: str, *, style: str = _NOTE_STYLE) -> None:
    """Print text that is not part of an answer, without reading markup in it.

    A terminal wraps it at words. In a file or pipe, lines stay whole.
    """
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def print_labelled(console: Console, label: str, text: str) -> None:
    """Print a label and a text, which a terminal wraps beside the label, or below a wide one."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:
        console.print(Text(f"{label}{text}"), soft_wrap=True)
    elif console.width < _NARROW_COLUMNS:
        console.print(Text(label.rstrip()))
        console.print(Padding(Text(text, overflow="fold"), (0, 0, 0, _LABEL_INDENT)))
    else:
        grid = Table.grid()
        grid.add_row(Text(label, no_wrap=True), Text(text, overflow="fold"))
        console.print(grid)


def make_table(
    *columns: str, title: str | None = None, fold: bool = False, wrap: bool = True
) -> Table:
    """Return a table without borders, for `print_table`.

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


def print_table(console: Console, table: Table) -> None:
    """Print a table. In a file or pipe its rows stay whole, however long they are."""
    if not console.is_terminal:
        options = console.options.update(max_width=_UNLIMITED)
        table.width = console.measure(table, options=options).maximum
    console.print(table, crop=console.is_terminal)


def make_fitting_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    console: Console,
    essential: Sequence[int],
) -> Table:
    """Return a table, for `print_table`, with only the essential columns on a narrow terminal.

    Args:
        columns: Headings of the columns.
        rows: Their cells.
        console: Where the table is to be printed.
        essential: Indices of the columns to keep.
    """
    from rich.text import Text

    is_narrow = console.is_terminal and console.width < _NARROW_COLUMNS
    kept = essential if is_narrow else range(len(columns))
    table = make_table(*(columns[i] for i in kept), fold=True)
    for row in rows:
        # Text, unlike a string, is not read as markup.
        table.add_row(*(Text(cell) if isinstance(cell := row[i], str) else cell for i in kept))
    return table


def history_path() -> Path:
    """Return the path of the file with the messages typed in chats."""
    return state_folder() / "chat_history"


def show_answer(
    answer: AnswerStream, *, heat: bool, threshold: float, out: Console, err: Console
) -> int:
    """Show the answer live on a terminal, else as plain text; return 130 after Ctrl-C, else 0."""
    from mlxroute.view import LiveView, summary_line

    code = EXIT_OK
    try:
        stats = LiveView(out, heat=heat, threshold=threshold).show(answer)
    except KeyboardInterrupt:
        code, stats = EXIT_INTERRUPTED, answer.stats()
    print_note(err, summary_line(stats))
    return code
