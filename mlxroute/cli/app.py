"""The command line: finds the command, and turns errors into one line and an exit code.

Text goes to stdout, everything else to stderr. Commands import heavy modules when they run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer

from mlxroute._version import __version__
from mlxroute.cli.command_list import ListedCommand, add_commands
from mlxroute.cli.exit_codes import EXIT_INTERRUPTED, EXIT_LARGE_FAILED, EXIT_OK, EXIT_USAGE
from mlxroute.cli.help_format import HelpGroup
from mlxroute.cli.process_signals import ProcessSignals
from mlxroute.cli.standard_streams import OutputUnusable, make_streams_safe
from mlxroute.errors import LargeError, MlxRouteError

_MAX_ERROR_CHARACTERS = 2000

app = typer.Typer(
    name="mlxroute",
    cls=HelpGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A small model on your machine that asks a large one only for the tokens it is unsure of.",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"mlxroute {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        # As `mlxroute chat` without options.
        with command_group().commands["chat"].make_context("chat", [], parent=context) as called:
            called.command.invoke(called)


@cache
def command_group() -> Any:
    """Return the program with all its commands."""
    group = typer.main.get_command(app)
    assert isinstance(group, HelpGroup)
    add_commands(group)
    return group


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every expected error is one line."""
    make_streams_safe()
    code = EXIT_OK
    with ProcessSignals() as signals:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
        except OutputUnusable as exc:
            # A reader of a pipe may close it early, or end at the same Ctrl-C.
            if not exc.is_closed_pipe:
                code = _fail(str(exc), EXIT_USAGE)
            elif _follows_interrupt(exc):
                code = EXIT_INTERRUPTED
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
    return code if signals.exit_code is None else signals.exit_code


def _follows_interrupt(error: BaseException) -> bool:
    """Return whether an error arose while Ctrl-C was being handled."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__context__
    return cause is not None


def _run(arguments: list[str]) -> int:
    try:
        code: Any = command_group()(arguments, prog_name="mlxroute", standalone_mode=False)
    except typer.TyperException as exc:
        from mlxroute.cli.error_advice import usage_message

        return _fail(usage_message(exc), EXIT_USAGE)
    except MlxRouteError as exc:
        from mlxroute.cli.error_advice import error_message

        exit_code = EXIT_LARGE_FAILED if isinstance(exc, LargeError) else EXIT_USAGE
        return _fail(error_message(exc, flags=_flags_of(arguments)), exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except OSError as exc:
        from mlxroute.safe_text import os_error_text

        return _fail(os_error_text(exc), EXIT_USAGE)
    return int(code or EXIT_OK)


def _flags_of(arguments: list[str]) -> set[str] | None:
    """Return the flags of the command that the arguments name; None without a command."""
    command: Any = command_group()
    for word in arguments[:2]:
        command = getattr(command, "commands", {}).get(word, command)
    if isinstance(command, ListedCommand):
        command = command.load()
    return {flag for param in command.params for flag in param.opts} if arguments else None


def _fail(text: str, code: int) -> int:
    from mlxroute.safe_text import printable, printable_line

    # `printable` removes what `printable_line` would replace by spaces.
    line = printable_line(printable(text), limit=_MAX_ERROR_CHARACTERS)
    typer.echo(f"error: {line}", err=True)
    return code
