"""The command line: registers the commands, and turns errors into one line and an exit code.

Text goes to stdout, everything else to stderr. Commands import heavy modules when they run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mlxroute._version import __version__
from mlxroute.cli.commands.adapt import adapt
from mlxroute.cli.commands.ask import ask
from mlxroute.cli.commands.bench_kernels import kernels
from mlxroute.cli.commands.bench_latency import latency
from mlxroute.cli.commands.bench_quality import quality
from mlxroute.cli.commands.bench_speed import speed
from mlxroute.cli.commands.calibrate import calibrate
from mlxroute.cli.commands.chat import chat
from mlxroute.cli.commands.demo import demo
from mlxroute.cli.commands.doctor import doctor, load_despite_bad_config
from mlxroute.cli.commands.host import host
from mlxroute.cli.commands.models import models
from mlxroute.cli.commands.probe import probe
from mlxroute.cli.commands.pull import pull
from mlxroute.cli.commands.replay import replay
from mlxroute.cli.commands.serve import serve
from mlxroute.cli.commands.show import show
from mlxroute.cli.commands.train import train
from mlxroute.cli.error_advice import error_message, named_origins, usage_message
from mlxroute.cli.exit_codes import EXIT_INTERRUPTED, EXIT_LARGE_FAILED, EXIT_OK, EXIT_USAGE
from mlxroute.cli.help_format import HelpCommand, HelpGroup
from mlxroute.cli.process_signals import ProcessSignals
from mlxroute.cli.setting_options import load_all_settings, with_setting_options
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
bench = typer.Typer(
    cls=HelpGroup, rich_markup_mode=None, help="Run a benchmark together with its baselines."
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
        settings = load_all_settings({})
        with named_origins(settings.origins):
            code = chat(settings)
        raise typer.Exit(code)


def _add(group: typer.Typer, name: str, run: Callable[..., None]) -> None:
    """Add a command, whose first line of help is shown in full in the list of commands."""
    summary = (run.__doc__ or "").partition("\n")[0]
    group.command(name, cls=HelpCommand, short_help=summary)(run)


for run in (
    *(chat, ask, serve, show, replay, demo, models, pull, host, calibrate, train, adapt, probe),
):
    _add(app, run.__name__, with_setting_options(run, run.__name__))
_add(app, "doctor", with_setting_options(doctor, "doctor", load=load_despite_bad_config))
for run in (speed, latency, quality, kernels):
    _add(bench, run.__name__, with_setting_options(run, f"bench {run.__name__}"))
app.add_typer(bench, name="bench", short_help=bench.info.help)


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
        code: Any = app(arguments, prog_name="mlxroute", standalone_mode=False)
    except typer.TyperException as exc:
        return _fail(usage_message(exc), EXIT_USAGE)
    except LargeError as exc:
        return _fail(error_message(exc, flags=_flags_of(arguments)), EXIT_LARGE_FAILED)
    except MlxRouteError as exc:
        return _fail(error_message(exc, flags=_flags_of(arguments)), EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except OSError as exc:
        from mlxroute.safe_text import os_error_text

        return _fail(os_error_text(exc), EXIT_USAGE)
    return int(code or EXIT_OK)


def _flags_of(arguments: list[str]) -> set[str] | None:
    """Return the flags of the command that the arguments name; None without a command."""
    command: Any = typer.main.get_command(app)
    for word in arguments[:2]:
        command = getattr(command, "commands", {}).get(word, command)
    return {flag for param in command.params for flag in param.opts} if arguments else None


def _fail(text: str, code: int) -> int:
    from mlxroute.safe_text import printable, printable_line

    # `printable` removes what `printable_line` would replace by spaces.
    line = printable_line(printable(text), limit=_MAX_ERROR_CHARACTERS)
    typer.echo(f"error: {line}", err=True)
    return code
