"""`bench latency`: speed of every mode for calls of a set duration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxroute.cli.flags import Plot, Save
from mlxroute.cli.folders import expand_optional, model_file_name, record_path, report_source
from mlxroute.cli.terminal import print_table, show_status
from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.types import Message

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlxroute.bench.latency_sides import LatencyGrid
    from mlxroute.questions.question_files import Question
    from mlxroute.small import SmallModel

_CALL_TIMEOUT_S = 600.0
_STREAMED_ANSWERS = 2
_RATIOS = (4.0, 12.0, 34.0, 180.0)
_RATES = (0.03, 0.07, 0.15)
# Terminal columns that a table with bars takes.
_WIDTH_WITH_BARS = 110


class DelayName(StrEnum):
    """Distributions of the call time."""

    CONSTANT = "constant"
    JITTERED = "jittered"
    HEAVY_TAILED = "heavy-tailed"
    LOSSY = "lossy"


def latency(
    settings: Settings,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines file of questions. Default: 20 built-in prompts.",
            metavar="FILE",
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="JSON Lines file of worked examples, rows with a `cot`.", metavar="FILE"),
    ] = None,
    shots: Annotated[
        int, typer.Option(help="Number of worked examples, if --examples is given.", min=0)
    ] = 4,
    prompts: Annotated[
        int,
        typer.Option(help="Number of prompts: the first, or of --data sampled at random.", min=1),
    ] = 5,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=2)] = 96,
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Call time, in decode steps; repeatable. Default: 4, 12, 34 and 180.", metavar="X"
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of escalated positions, such as 0.07; repeatable. Default: 0.03, 0.07 and"
            " 0.15.",
            metavar="X",
        ),
    ] = None,
    delay: Annotated[
        DelayName, typer.Option(help="How the call time varies.")
    ] = DelayName.CONSTANT,
    play: Annotated[
        bool, typer.Option("--play", help="Simulate on a virtual clock only, without waiting.")
    ] = False,
    plot: Plot = None,
    save: Save = False,
) -> int:
    """Compare the speed of all modes at set call times."""
    from mlxroute.bench.latency_sides import LatencyGrid
    from mlxroute.cli.bench_report import check_plot_option, check_save_option, write_report
    from mlxroute.cli.large_setup import check_sendable, require_large
    from mlxroute.cli.terminal import make_consoles
    from mlxroute.questions.question_files import read_worked_examples

    address = require_large(settings, "bench latency")
    grid = LatencyGrid(
        max_tokens=tokens,
        ratios=ratio or _RATIOS,
        rates=rate or _RATES,
        delay=delay,
        measure=not play,
    )
    is_valid = all(0 < share < 1 for share in grid.rates)
    if not is_valid or not all(0 < steps < math.inf for steps in grid.ratios):
        raise UsageError("--rate must be between 0 and 1, and --ratio above 0 and finite")
    check_plot_option(plot)
    check_save_option(save)
    conversations = _read_conversations(data, prompts, read_worked_examples(examples, shots))
    named = [(f"prompt {number}", item) for number, item in enumerate(conversations, start=1)]
    check_sendable(settings, named, "bench latency")
    _, err = make_consoles()
    report = _measure(settings, address, conversations, grid, err)
    _print_latency(report, err)
    source = "varied" if data is None else report_source(data)
    small = model_file_name(report["small"])
    name = f"latency-{small}-{source}-{delay}{'-played' if play else ''}"
    code = write_report({"data": source, **report}, name, save=save)
    if plot is not None:
        from mlxroute.bench.plot import draw_latency

        draw_latency(report, plot)
    return code


def _read_conversations(
    data: Path | None, count: int, examples: Sequence[Question]
) -> list[list[Message]]:
    """Return conversations from a file of questions, or from the built-in prompts."""
    from mlxroute.cli.bench_report import read_builtin_prompts
    from mlxroute.questions.question_files import (
        Question,
        question_messages,
        read_questions,
        sample_questions,
    )

    if data is None:
        questions = [Question(text, text) for text in read_builtin_prompts()[:count]]
    else:
        questions = sample_questions(read_questions(data), count)
    return [question_messages(question, examples) for question in questions]


def _measure(
    settings: Settings,
    address: str,
    conversations: list[list[Message]],
    grid: LatencyGrid,
    err: Console,
) -> dict[str, Any]:
    """Run the grid of call times and escalation rates on a proxy that delays the replies."""
    from mlxroute.cli.large_setup import find_key, make_large
    from mlxroute.cli.progress import count_progress
    from mlxroute.ledger import Ledger

    small, large_name, large_step_s = _measure_large(settings, address, conversations, err)
    from mlxroute.bench.delayed_server import DelayedServer
    from mlxroute.bench.latency import bench_latency

    record = record_path(settings, "latency", small.name, large_name)
    settings = replace(settings, timeout=_CALL_TIMEOUT_S)
    key = find_key(settings, address)
    with (
        DelayedServer(
            address,
            record=record,
            api_key=key.reveal() if key else None,
            ca_bundle=expand_optional(settings.ca_bundle),
        ) as server,
        make_large(settings, server.url, Ledger(), err) as large,
        count_progress(err) as progress,
    ):
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        return bench_latency(
            small,
            large,
            server,
            conversations,
            grid,
            large_step_s=large_step_s,
            progress=progress,
        )


def _measure_large(
    settings: Settings, address: str, conversations: list[list[Message]], err: Console
) -> tuple[SmallModel, str, float]:
    """Load the small model; return it, the large model's name and its seconds per token.

    This asks the server itself, not the proxy: the name of the proxy's record needs the model's
    name, and an error then names the server.
    """
    from mlxroute.cli.large_setup import make_large, model_notes
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.small_setup import load_small
    from mlxroute.ledger import Ledger

    with make_large(settings, address, Ledger(), err) as large:
        with model_notes(large, err):
            large.connect(thorough=False)
        name = large.full_model_name
        with ByteProgress(err) as progress:
            small = load_small(settings, progress)
        from mlxroute.bench.latency import measure_large_step_s

        with show_status(err, "measuring the large model"):
            seconds = measure_large_step_s(small, large, conversations[:_STREAMED_ANSWERS])
    return small, name, seconds


def _print_latency(report: dict[str, Any], err: Console) -> None:
    for point in report["points"]:
        has_bars = err.width >= _WIDTH_WITH_BARS
        print_table(err, _point_table(report, point, has_bars=has_bars))
        same = "the same text in every mode" if point["same_text"] else "DIFFERENT TEXTS"
        if differed := point["server_differed"]:
            same += (
                f", except in {differed} answers, where the server decided a near tie differently"
            )
        err.print(same)
        ratios = [f"{name}: {ratio:.2f}" for name, ratio in point["auto_over_best"].items()]
        err.print(f"speed of auto over the fastest mode with its call ceiling: {'; '.join(ratios)}")


def _point_table(report: dict[str, Any], point: dict[str, Any], *, has_bars: bool) -> Table:
    from mlxroute.cli.terminal import make_table

    title = (
        f"calls of {point['ratio']:g} steps ({point['call_s']:g} s), "
        f"{point['realised_rate']:.1%} escalated, agreement {point['agreement']}, "
        f"coverage {point['coverage_4']} of 4, {point['coverage_8']} of 8"
    )
    columns = ("mode", "tok/s", "simulated", "predicted", "stall", "calls", "over wait")
    table = make_table(*columns, *([""] if has_bars else []), title=title, wrap=False)
    for name, side in point["sides"].items():
        table.add_row(
            name,
            f"{side['tokens_per_s']:.3f}",
            f"{point['played_tokens_per_s'][name]:.3f}",
            str(point["predicted_tokens_per_s"].get(name, "")),
            f"{side['stall_over_wait']:.0%}",
            f"{side['calls_over_wait']:.2f}x",
            f"{side['over_wait']:.2f}x",
            *(["█" * round(8 * side["over_wait"])] if has_bars else []),
        )
    table.add_row("small only", f"{report['small_only']['tokens_per_s']:.3f}")
    table.add_row("large streaming", f"{point['large_streaming_tokens_per_s']:.3f}")
    return table
