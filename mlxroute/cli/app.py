"""The typer commands. Text goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from mlxroute._version import __version__
from mlxroute.cli import bench_commands
from mlxroute.cli.exit_codes import EXIT_INTERRUPTED, EXIT_LARGE_FAILED, EXIT_OK, EXIT_USAGE
from mlxroute.cli.flags import (
    Adapter,
    AtOnce,
    Budget,
    CaBundle,
    CacheDir,
    CallCeiling,
    Examples,
    HeadFile,
    Heat,
    Kernel,
    KeyEnv,
    KeyFile,
    Large,
    LargeModelId,
    LedgerFile,
    MaxTokens,
    ModeOption,
    NeverSend,
    NeverSendFile,
    Offline,
    Prefetch,
    Router,
    Seed,
    Shots,
    Small,
    Stop,
    Strict,
    System,
    Temperature,
    Threshold,
    Timeout,
    TopP,
)
from mlxroute.config import Settings
from mlxroute.errors import ConfigError, LargeError, MlxRouteError
from mlxroute.types import LabelKind

app = typer.Typer(
    name="mlxroute",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A small model on your machine that asks a large one only for the tokens it is unsure of.",
)
app.add_typer(bench_commands.app, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"mlxroute {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        from mlxroute.cli.run import chat as run_chat
        from mlxroute.cli.run import settings_from

        raise typer.Exit(run_chat(settings_from({})))


@app.command()
def chat(
    small: Small = None,
    large: Large = None,
    large_model: LargeModelId = None,
    adapter: Adapter = None,
    router: Router = None,
    head: HeadFile = None,
    threshold: Threshold = None,
    budget: Budget = None,
    mode: ModeOption = None,
    prefetch: Prefetch = None,
    call_ceiling: CallCeiling = None,
    kernel: Kernel = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    system: System = None,
    timeout: Timeout = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    ca_bundle: CaBundle = None,
    cache_dir: CacheDir = None,
    ledger: LedgerFile = None,
    never_send: NeverSend = None,
    never_send_file: NeverSendFile = None,
    offline: Offline = None,
    strict: Strict = None,
    heat: Heat = None,
) -> None:
    """Chat in the terminal (what `mlxroute` alone does too)."""
    from mlxroute.cli.run import chat as run_chat
    from mlxroute.cli.run import settings_from

    raise typer.Exit(run_chat(settings_from(locals())))


@app.command()
def ask(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="The question; `-` reads it from stdin.", metavar="PROMPT"),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="JSON Lines: one object per token, then a summary.")
    ] = False,
    events: Annotated[
        bool, typer.Option("--events", help="In --json also tokens shown early and taken back.")
    ] = False,
    small: Small = None,
    large: Large = None,
    large_model: LargeModelId = None,
    adapter: Adapter = None,
    router: Router = None,
    head: HeadFile = None,
    threshold: Threshold = None,
    budget: Budget = None,
    mode: ModeOption = None,
    prefetch: Prefetch = None,
    call_ceiling: CallCeiling = None,
    kernel: Kernel = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    system: System = None,
    timeout: Timeout = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    ca_bundle: CaBundle = None,
    cache_dir: CacheDir = None,
    ledger: LedgerFile = None,
    never_send: NeverSend = None,
    never_send_file: NeverSendFile = None,
    offline: Offline = None,
    strict: Strict = None,
    heat: Heat = None,
) -> None:
    """Answer one question and exit."""
    from mlxroute.cli.run import ask as run_ask
    from mlxroute.cli.run import settings_from

    settings = settings_from(locals())
    raise typer.Exit(run_ask(prompt or [], settings, json_lines=json, events=events))


@app.command()
def demo(
    threshold: Threshold = None,
    budget: Budget = None,
    cache_dir: CacheDir = None,
    heat: Heat = None,
) -> None:
    """Fetch two models and watch an answer being routed."""
    from mlxroute.cli.commands.demo import run_demo
    from mlxroute.cli.run import settings_from

    raise typer.Exit(run_demo(settings_from(locals())))


@app.command()
def models(cache_dir: CacheDir = None) -> None:
    """List the models and pairs that have a name here."""
    from mlxroute.cli.commands.models import list_models
    from mlxroute.cli.run import settings_from

    raise typer.Exit(list_models(settings_from(locals())))


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="Catalogue name, .gguf file or hub id.", metavar="NAME")
    ],
    cache_dir: CacheDir = None,
    offline: Offline = None,
) -> None:
    """Fetch a model into the cache and verify it."""
    from mlxroute.cli.commands.models import pull_model
    from mlxroute.cli.run import settings_from

    raise typer.Exit(pull_model(name, settings_from(locals())))


@app.command()
def host(
    name: Annotated[
        str | None,
        typer.Argument(help="Model to serve; default: the best one that fits.", metavar="NAME"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Default: a free one.", min=1, max=65535)] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Serve a model here, with mlx_lm.server."""
    from mlxroute.cli.commands.host import run_host
    from mlxroute.cli.run import settings_from

    raise typer.Exit(run_host(name, settings_from({"cache_dir": cache_dir}), port=port))


@app.command()
def calibrate(
    data: Annotated[
        list[Path], typer.Option(help="JSON Lines of questions; repeatable.", metavar="FILE")
    ],
    small: Small = None,
    questions: Annotated[int, typer.Option(help="Of each file, at most.", min=1)] = 12,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    adapter: Adapter = None,
    kernel: Kernel = None,
    cache_dir: CacheDir = None,
    offline: Offline = None,
) -> None:
    """Measure which scores your own questions have, for budgets and thresholds."""
    from mlxroute.cli.commands.calibrate import run_calibrate
    from mlxroute.cli.run import settings_from

    settings = settings_from(locals())
    raise typer.Exit(run_calibrate(settings, data=data, count=questions, tokens=tokens))


@app.command()
def train(
    data: Annotated[
        list[Path], typer.Option(help="JSON Lines of questions; repeatable.", metavar="FILE")
    ],
    large: Large = None,
    large_model: LargeModelId = None,
    small: Small = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The head to write; default: yours for this small model.", metavar="FILE"
        ),
    ] = None,
    labels: Annotated[
        LabelKind, typer.Option(help="What the head learns to find.")
    ] = LabelKind.CONSEQUENCE,
    questions: Annotated[int, typer.Option(help="Of each file, at most.", min=1)] = 500,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 160,
    examples: Examples = None,
    shots: Shots = 4,
    at_once: AtOnce = 4,
    timeout: Timeout = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    ca_bundle: CaBundle = None,
    cache_dir: CacheDir = None,
    ledger: LedgerFile = None,
) -> None:
    """Fit a router to where your large model would change the answer."""
    from mlxroute.cli.commands.train import TrainOptions, run_train
    from mlxroute.cli.run import settings_from

    settings = settings_from(locals())
    options = TrainOptions(data, out, labels, questions, tokens, examples, shots, at_once)
    raise typer.Exit(run_train(settings, options))


@app.command()
def probe(
    url: Annotated[str, typer.Argument(help="The server, e.g. http://host:8000/v1.")],
    large_model: LargeModelId = None,
    timeout: Timeout = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    ca_bundle: CaBundle = None,
    cache_dir: CacheDir = None,
    ledger: LedgerFile = None,
    offline: Offline = None,
) -> None:
    """Find out what a server can do and how it is best asked."""
    from mlxroute.cli.large_side import run_probe
    from mlxroute.cli.run import settings_from

    raise typer.Exit(run_probe(url, settings_from(locals())))


@app.command()
def doctor(
    large: Large = None,
    ca_bundle: CaBundle = None,
    cache_dir: CacheDir = None,
    offline: Offline = None,
) -> None:
    """Check device, memory, cache, network and server."""
    from mlxroute.cli.commands.doctor import run_doctor
    from mlxroute.cli.run import settings_from

    try:
        settings = settings_from(locals())
    except ConfigError:
        # Part of the report, which needs nothing of the file itself.
        settings = Settings(
            large=large, ca_bundle=ca_bundle, cache_dir=cache_dir, offline=bool(offline)
        )
    raise typer.Exit(run_doctor(settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every expected error is one line."""
    _make_streams_safe()
    arguments: list[str] = list(sys.argv[1:] if argv is None else argv)
    try:
        code: Any = app(arguments, standalone_mode=False)
    except typer.TyperException as exc:
        return _fail(_message(exc), EXIT_USAGE)
    except LargeError as exc:
        return _fail(str(exc), EXIT_LARGE_FAILED)
    except MlxRouteError as exc:
        return _fail(str(exc), EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except OSError as exc:
        return _fail(f"{exc.filename or 'the output'}: {exc.strerror}", EXIT_USAGE)
    return int(code or EXIT_OK)


def _make_streams_safe() -> None:
    """A stream that is closed, or whose locale lacks UTF-8, must not end an answer."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream, errors in (
        (sys.stdin, "replace"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _message(exc: typer.TyperException) -> str:
    text = str(exc.format_message()) if hasattr(exc, "format_message") else str(exc)
    return text.replace("Value error, ", "")


def _fail(text: str, code: int) -> int:
    from mlxroute.safe_text import printable

    typer.echo(f"error: {printable(' '.join(text.split()))}", err=True)
    return code
