"""Help texts that fit narrow terminals."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

# Below this width, the help of a long option begins on a line of its own.
_NARROW_COLUMNS: Final = 60


class HelpCommand(TyperCommand):
    """A command whose help fits the terminal."""

    def get_help(self, ctx: Any) -> str:
        """Return the help text."""
        return _format_help(self, ctx)


class HelpGroup(TyperGroup):
    """A group of commands whose help fits the terminal."""

    def get_help(self, ctx: Any) -> str:
        """Return the help text."""
        return _format_help(self, ctx)


def _format_help(command: TyperCommand | TyperGroup, context: Any) -> str:
    formatter = context.make_formatter()
    columns = shutil.get_terminal_size().columns
    if columns < _NARROW_COLUMNS:
        formatter.width = width = max(columns - 2, 20)
        write_list = formatter.write_dl

        def write_narrow_list(rows: Sequence[tuple[str, str]]) -> None:
            write_list(
                [(_break_choices(name, width - 4), text) for name, text in rows], col_max=width // 3
            )

        formatter.write_dl = write_narrow_list
    command.format_help(context, formatter)
    return str(formatter.getvalue()).rstrip("\n")


def _break_choices(text: str, width: int) -> str:
    """Return an option with its choices, `<a|b|c>`, on as many lines as they take."""
    lines = [""]
    for part in re.split(r"(?<=[| ])", text):
        if len(lines[-1]) + len(part) > width:
            lines.append("    ")
        lines[-1] += part
    return "\n".join(lines)
