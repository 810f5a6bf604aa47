"""The typer commands. Text goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from mlxroute._version import __version__
from mlxroute.config import Settings, share
from mlxroute.errors import ConfigError, LargeError, MlxRouteError
from mlxroute.types import Mode

EXIT_OK, EXIT_USAGE, EXIT_LARGE_FAILED, EXIT_INTERRUPTED = 0, 2, 3, 130

app = typer.Typer(
    name="mlxroute",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A small model on your machine that asks a large one only for the tokens it is unsure of.",
)


class RouterName(StrEnum):
    """What decides where the large model is asked."""

    ENTROPY = "entropy"
    MARGIN = "margin"
    MAX_PROBABILITY = "max-probability"
    LOGU = "logu"
    RANDOM = "random"


class DelayName(StrEnum):
    """How the time of a call varies."""

    CONSTANT = "constant"
    JITTERED = "jittered"
    HEAVY_TAILED = "heavy-tailed"
    LOSSY = "lossy"


class KernelName(StrEnum):
    """Which form of the logit kernel runs."""

    AUTO = "auto"
    METAL = "metal"
    GRAPH = "graph"


def _threshold(text: str) -> float:
    try:
        return float(text)
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is not a number, inf or -inf") from exc


def _budget(text: str) -> float:
    try:
        return share(text)
    except ConfigError as exc:
        raise typer.BadParameter(str(exc)) from exc


Small = Annotated[
    str | None,
    typer.Option(help="Small model: catalogue name, folder, .gguf file or hub id.", metavar="NAME"),
]
Large = Annotated[
    str | None, typer.Option(help="Large model's server, e.g. http://host:8000/v1.", metavar="URL")
]
LargeModelId = Annotated[
    str | None, typer.Option(help="Which of the server's models.", metavar="ID")
]
Adapter = Annotated[
    str | None, typer.Option(help="Folder of LoRA weights for the small model.", metavar="DIR")
]
Router = Annotated[RouterName | None, typer.Option(help="What decides where to ask.")]
Threshold = Annotated[
    float | None,
    typer.Option(
        parser=_threshold,
        metavar="X",
        help="Ask above this score; inf never, -inf always. Default: the pair's own, of entropy.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        parser=_budget,
        metavar="SHARE",
        help="Ask at no more than this share of the tokens, e.g. 7%, where it matters most.",
    ),
]
ModeOption = Annotated[
    Mode | None,
    typer.Option(help="Stand still while the large model is asked, or decode on; same answer."),
]
Prefetch = Annotated[
    int | None,
    typer.Option(help="Tokens that a call brings beyond the one asked for.", metavar="N"),
]
CallCeiling = Annotated[
    float | None,
    typer.Option(help="At most so many calls for each one needed; 1.5 with prices.", metavar="X"),
]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.", metavar="N")]
Temperature = Annotated[
    float | None, typer.Option(help="Of the small model's own tokens; 0 is greedy.", metavar="T")
]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling, 0 to 1.", metavar="P")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", metavar="N")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; repeatable.", metavar="TEXT"),
]
System = Annotated[str | None, typer.Option(help="System prompt.", metavar="TEXT")]
Kernel = Annotated[
    KernelName | None, typer.Option(help="Form of the logit kernel; auto takes what works.")
]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds a call, and all faults of an answer, may take.", metavar="S"),
]
KeyEnv = Annotated[
    str | None,
    typer.Option(help="Environment variable holding the server's key.", metavar="VARIABLE"),
]
KeyFile = Annotated[
    str | None, typer.Option(help="File (mode 0600) holding the server's key.", metavar="FILE")
]
CaBundle = Annotated[
    str | None,
    typer.Option(
        help="PEM file of the authorities to trust instead of the public ones.", metavar="FILE"
    ),
]
CacheDir = Annotated[str | None, typer.Option(help="Where weights are kept.", metavar="DIR")]
LedgerFile = Annotated[
    str | None,
    typer.Option("--ledger", help="Write every request body sent to this file.", metavar="FILE"),
]
NeverSend = Annotated[
    list[str] | None,
    typer.Option(
        help="Keep positions local whose context this regular expression matches; repeatable.",
        metavar="PATTERN",
    ),
]
NeverSendFile = Annotated[
    list[str] | None,
    typer.Option(help="File with one such pattern per line; repeatable.", metavar="FILE"),
]
Offline = Annotated[bool | None, typer.Option("--offline", help="Open no socket at all.")]
Strict = Annotated[
    bool | None, typer.Option("--strict", help="Stop with exit code 3 when the large side fails.")
]
Heat = Annotated[bool | None, typer.Option("--heat", help="Shade every token by its entropy.")]


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
    from mlxroute.cli.demo import run_demo
    from mlxroute.cli.run import settings_from

    raise typer.Exit(run_demo(settings_from(locals())))


@app.command()
def models(cache_dir: CacheDir = None) -> None:
    """List the models and pairs that have a name here."""
    from mlxroute.cli.library import list_models
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
    from mlxroute.cli.library import pull_model
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
    from mlxroute.cli.host import run_host
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
    from mlxroute.cli.calibrate import run_calibrate
    from mlxroute.cli.run import settings_from

    settings = settings_from(locals())
    raise typer.Exit(run_calibrate(settings, data=data, count=questions, tokens=tokens))


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
    from mlxroute.cli.large import run_probe
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
    from mlxroute.cli.doctor import run_doctor
    from mlxroute.cli.run import settings_from

    try:
        settings = settings_from(locals())
    except ConfigError:
        # Part of the report, which needs nothing of the file itself.
        settings = Settings(
            large=large, ca_bundle=ca_bundle, cache_dir=cache_dir, offline=bool(offline)
        )
    raise typer.Exit(run_doctor(settings))


bench = typer.Typer(rich_markup_mode=None, help="Measure, beside baselines in the same run.")
app.add_typer(bench, name="bench")
Save = Annotated[bool, typer.Option("--save", help="Also write the report to bench/results/.")]


@bench.command()
def speed(
    small: Small = None,
    pairs: Annotated[int, typer.Option(help="Answers of each side.", min=1)] = 10,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=2)] = 128,
    save: Save = False,
    adapter: Adapter = None,
    kernel: Kernel = None,
    cache_dir: CacheDir = None,
    offline: Offline = None,
) -> None:
    """Decoding that never escalates, beside mlx_lm; `--small random` is a tiny model."""
    from mlxroute.cli.bench import run_bench_speed
    from mlxroute.cli.run import settings_from

    settings = settings_from(locals())
    raise typer.Exit(run_bench_speed(settings, pairs=pairs, tokens=tokens, save=save))


@bench.command()
def latency(
    large: Large = None,
    large_model: LargeModelId = None,
    small: Small = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON Lines of questions; default: 20 prompts of ours.", metavar="FILE"),
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many answers.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=2)] = 96,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Time of a call, in steps of the small model.")
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Share of the positions that are escalated.")
    ] = None,
    delay: Annotated[
        DelayName, typer.Option(help="How the call time varies.")
    ] = DelayName.CONSTANT,
    play: Annotated[
        bool, typer.Option("--play", help="Wait for nothing: play it on a virtual clock alone.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a picture; needs mlxroute[plot].", metavar="PNG")
    ] = None,
    save: Save = False,
    cache_dir: CacheDir = None,
) -> None:
    """Every mode before a server whose answers are kept and take a set time."""
    from mlxroute.bench.latency import Grid
    from mlxroute.cli.bench import run_bench_latency
    from mlxroute.cli.run import settings_from

    settings = settings_from(
        {"large": large, "large_model": large_model, "small": small, "cache_dir": cache_dir}
    )
    ratios, rates = ratio or (4.0, 12.0, 34.0, 180.0), rate or (0.03, 0.07, 0.15)
    grid = Grid(tokens, ratios, rates, delay, measure=not play)
    code = run_bench_latency(settings, prompts=prompts, data=data, grid=grid, plot=plot, save=save)
    raise typer.Exit(code)


@bench.command()
def quality(
    data: Annotated[Path, typer.Option(help="JSON Lines of questions and answers.")],
    large: Large = None,
    large_model: LargeModelId = None,
    small: Small = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(parser=_budget, metavar="SHARE", help="Repeatable. Default: 1% to 30%."),
    ] = None,
    router: Annotated[
        list[RouterName] | None, typer.Option(help="Repeatable. Default: entropy and random.")
    ] = None,
    questions: Annotated[int, typer.Option(help="At most so many, by chance.", min=1)] = 300,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 160,
    examples: Annotated[
        Path | None, typer.Option(help="Rows with a `cot`: worked examples.", metavar="FILE")
    ] = None,
    shots: Annotated[int, typer.Option(help="How many of them.", min=0)] = 4,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a picture; needs mlxroute[plot].", metavar="PNG")
    ] = None,
    save: Save = False,
    cache_dir: CacheDir = None,
) -> None:
    """Accuracy of both models alone and of routed answers; goes on where it was interrupted."""
    from mlxroute.bench.quality import sides_of
    from mlxroute.cli.quality import run_bench_quality
    from mlxroute.cli.run import settings_from

    settings = settings_from(
        {
            "large": large,
            "large_model": large_model,
            "small": small,
            "cache_dir": cache_dir,
            "max_tokens": tokens,
        }
    )
    budgets = budget or (0.01, 0.03, 0.05, 0.07, 0.10, 0.15, 0.30)
    names = [name.value for name in router or (RouterName.ENTROPY, RouterName.RANDOM)]
    code = run_bench_quality(
        settings,
        data=data,
        examples=examples,
        shots=shots,
        count=questions,
        sides=sides_of(names, budgets),
        plot=plot,
        save=save,
    )
    raise typer.Exit(code)


@bench.command()
def kernels(
    rounds: Annotated[int, typer.Option(help="Timings of each form.", min=1)] = 30,
    save: Save = False,
    cache_dir: CacheDir = None,
) -> None:
    """The logit kernel beside the plain chain of operations: time, and error to float64."""
    from mlxroute.cli.bench import run_bench_kernels
    from mlxroute.cli.run import settings_from

    settings = settings_from({"cache_dir": cache_dir})
    raise typer.Exit(run_bench_kernels(settings, rounds=rounds, save=save))


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
    from mlxroute.view import printable

    typer.echo(f"error: {printable(' '.join(text.split()))}", err=True)
    return code


def cache_dir_of(cache_dir: str | None) -> Path:
    """The folder weights are kept in."""
    from mlxroute.weights import default_cache_dir

    return Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
