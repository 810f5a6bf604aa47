"""The offer of a server that already runs on this machine, to users who named none."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxroute.safe_text import printable_line

if TYPE_CHECKING:
    from mlxroute.large.negotiation.running_servers import RunningServer

_MAX_NAMES = 3
_NAME_LIMIT = 60
_WORDS_LIMIT = 60


def no_large_lines(command: str, words: Sequence[str] = ()) -> list[str]:
    """Look for servers on this machine; return notes that offer them, or say how to get one.

    Args:
        command: The command that ran, with the flags to repeat: `chat --small NAME`.
        words: Its arguments, which follow the flags. None by default.
    """
    from mlxroute.large.negotiation.running_servers import find_running_servers

    servers = find_running_servers()
    if not servers:
        return [
            "no large model: the small one answers alone. Give a server with --large URL (or"
            " OPENAI_BASE_URL), or start one here with `mlxroute host`."
        ]
    lines = ["no large model: the small one answers alone. On this machine there is:"]
    for server in servers:
        lines += [f"  {describe_server(server)}", f"    {use_command(server, command, words)}"]
    return lines


def describe_server(server: RunningServer) -> str:
    """Return a server's kind, address and first models, as printable text."""
    # Some servers give a model the path of its folder as its name.
    names = [name.rsplit("/", 1)[-1] if name[0] == "/" else name for name in server.writers]
    names = [printable_line(name, limit=_NAME_LIMIT) for name in names[:_MAX_NAMES]]
    others = len(server.writers) - len(names)
    more = f" and {others} more" if others else ""
    return f"{server.name} at {server.url} with {', '.join(names)}{more}"


def use_command(server: RunningServer, command: str = "chat", words: Sequence[str] = ()) -> str:
    """Return the command line that uses a server as the large model."""
    line = f"mlxroute {command} --large {server.url}"
    if len(server.models) > 1:
        model = server.writers[0]
        # A name that cannot be shown as it is cannot be typed either.
        is_printable = model.isprintable() and printable_line(model, limit=len(model)) == model
        line += f" --large-model {shlex.quote(model) if is_printable else 'ID'}"
    text = printable_line(shlex.join(words), limit=_WORDS_LIMIT)
    return f"{line} {text}".rstrip()
