"""Messages of a chat that begin with a slash: a command, a misspelt one, or just text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

_NAME = re.compile(r"/[^\s/]*")
# How much a word must resemble a command, from 0 to 1, to be a misspelt one.
_NEAR = 0.75


def split_command(text: str) -> tuple[str, str]:
    """Return the first word in lower case, and the rest; both empty if it cannot be a command."""
    line = text.rstrip()
    name = _NAME.match(line)
    if name is None or "\n" in line:
        return "", ""
    value = line[name.end() :]
    if value and value[0] not in " \t":
        return "", ""
    return name[0].lower(), value.lstrip(" \t")


def describe_doubt(name: str, value: str, commands: Collection[str]) -> str:
    """Return why a text looks like a mistyped command; empty if it looks like a message.

    Args:
        name: Its first word.
        value: The rest.
        commands: The commands. If the name is one of them, it takes no value.
    """
    if name in commands:
        return f"{name} takes no value"
    if near := difflib.get_close_matches(name, commands, n=1, cutoff=_NEAR):
        return f"unknown command {name}; did you mean {near[0]}?"
    return "" if value or not name else f"unknown command {name}; /help lists the commands"
