"""`bench`: run a measurement, show it as a table, end stdout with one line of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute.catalog.head_files import find_head_file
from mlxroute.cli.folders import RESULTS, bench_file, record_file
from mlxroute.cli.session import load_small
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import (
    Question,
    question_messages,
    read_questions,
    read_worked_examples,
    sample_questions,
)
from mlxroute.types import Message

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.bench.latency import LatencyGrid
    from mlxroute.small import SmallModel

RANDOM = "random"
_LONGEST_CALL_S = 600.0
_STREAMED = 2
# Columns of the terminal.
_ROOM_FOR_BARS = 110


def run_bench_speed(settings: Settings, *, pairs: int, tokens: int, save: bool) -> int:
    """Decode with mlxroute and with mlx_lm in turns; return the exit code."""
    from mlxroute.cli.progress import Reporter
    from mlxroute.cli.terminal import consoles

    _, err = consoles()
    with Reporter(err) as reporter, tempfile.TemporaryDirectory() as folder:
        small = _load(settings, reporter, Path(folder))
        if (head := find_head_file(small.name, user_catalog_dir())) is not None:
            small.load_head(head)
            # It is timed by itself.
            small.set_head(None)
        from mlxroute.bench.speed import bench_speed

        with err.status("measuring") as status:

            def progress(label: str, done: int, total: int | None) -> None:
                status.update(f"measuring: answer {done} of {total}")

            report = bench_speed(
                small, _prompts(), pairs=pairs, max_tokens=tokens, progress=progress
            )
    _show_speed(report, err)
    return finish(report, f"speed-{small.name}", save=save)


def run_bench_latency(
    settings: Settings,
    *,
    prompts: int,
    data: Path | None,
    examples: Path | None,
    shots: int,
    grid: LatencyGrid,
    plot: Path | None,
    save: bool,
) -> int:
    """Decode in every mode before a server that answers as late as told; return the exit code."""
    from mlxroute.cli.large_side import large_model
    from mlxroute.cli.progress import Reporter, counting
    from mlxroute.cli.terminal import consoles
    from mlxroute.ledger import Ledger

    if settings.large is None:
        raise UsageError("bench latency needs a large model's server: --large URL")
    if not all(0 < rate < 1 for rate in grid.rates) or not all(r > 0 for r in grid.ratios):
        raise UsageError("--rate must be between 0 and 1, and --ratio above 0")
    if plot is not None:
        from mlxroute.bench.plot import check_plot, draw_latency

        check_plot(plot)
    asked = _asked(data, prompts, read_worked_examples(examples, shots))
    _, err = consoles()
    # Whose replies they are is asked of the server itself, and a dead one is named.
    with large_model(settings, settings.large, Ledger()) as large:
        large.connect(thorough=False)
        model = large.model_name
        with Reporter(err) as reporter:
            small = load_small(settings, reporter)
        from mlxroute.bench.delayed_server import DelayedServer
        from mlxroute.bench.latency import bench_latency, measure_large_step_s

        with err.status("measuring the large model"):
            large_step_s = measure_large_step_s(small, large, asked[:_STREAMED])

    record = record_file(settings, "latency", small.name, model)
    with (
        DelayedServer(settings.large, record=record) as server,
        large_model(replace(settings, timeout=_LONGEST_CALL_S), server.url, Ledger()) as large,
        counting(err) as progress,
    ):
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        report = bench_latency(
            small,
            large,
            server,
            asked,
            grid,
            large_step_s=large_step_s,
            progress=progress,
        )
    _show_latency(report, err)
    source = "varied" if data is None else f"{data.absolute().parent.name}-{data.stem}"
    name = f"latency-{small.name}-{source}-{grid.delay}"
    name += "" if grid.measure else "-played"
    code = finish({"data": source, **report}, name, save=save)
    if plot is not None:
        draw_latency(report, plot)
    return code


def _asked(data: Path | None, count: int, examples: Sequence[Question]) -> list[list[Message]]:
    """Conversations from a file of questions, or our prompts."""
    if data is None:
        return [question_messages(Question(text, text)) for text in _prompts()[:count]]
    return [
        question_messages(each, examples) for each in sample_questions(read_questions(data), count)
    ]


def run_bench_kernels(settings: Settings, *, rounds: int, save: bool) -> int:
    """Time the forms of the logit kernel and show their errors; return the exit code."""
    from mlxroute.backend import blas
    from mlxroute.cli.folders import cache_dir_of
    from mlxroute.cli.terminal import consoles

    _, err = consoles()
    blas.interpose(cache_dir_of(settings.cache_dir))
    from mlxroute.bench.kernel_cost import bench_kernels

    with err.status("measuring"):
        report = bench_kernels(rounds=rounds)
    _show_kernels(report, err)
    return finish(report, "kernels", save=save)


def _load(settings: Settings, reporter: Any, folder: Path) -> SmallModel:
    if settings.small != RANDOM:
        return load_small(settings, reporter)
    from mlxroute.backend import blas
    from mlxroute.cli.folders import cache_dir_of

    blas.interpose(cache_dir_of(settings.cache_dir))
    from mlxroute.backend.load import load
    from mlxroute.bench.random_model import write_random_model
    from mlxroute.small import SmallModel

    model, tokenizer = load(write_random_model(folder / RANDOM))
    return SmallModel(model, tokenizer, name=RANDOM, kernel=settings.kernel)


def _prompts() -> list[str]:
    return [each.prompt for each in read_questions(bench_file("prompts", "varied.jsonl"))]


def _show_speed(report: dict[str, Any], err: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=report["small"])
    for column in ("figure (median)", "mlxroute", "mlx_lm", "ratio"):
        table.add_column(column)
    ours, theirs = report["mlxroute"], report["mlx_lm"]
    known = {"tokens_per_s": "ratio_tokens_per_s", "ttft_s": "ratio_ttft"}
    for key in ours:
        ratio = report[known[key]] if key in known else None
        table.add_row(
            key,
            str(ours[key]["median"]),
            str(theirs[key]["median"]),
            f"{ratio['median']} ({ratio['min']} to {ratio['max']})" if ratio else "",
        )
    for entry in report["by_context"]:
        table.add_row(
            f"step_s behind {entry['context']} tokens",
            str(entry["mlxroute_step_s"]["median"]),
            str(entry["mlx_lm_step_s"]["median"]),
            str(entry["ratio_tokens_per_s"]["median"]),
        )
    err.print(table)
    same = "the same tokens" if report["same_tokens"] else "DIFFERENT TOKENS"
    parts = f"kernel and router are {report['router_share_of_step']:.2%} of a step"
    if (share := report["head_share_of_step"]) is not None:
        parts += f", the learned head {share:.2%}"
    err.print(f"{same}; {parts}")


def _show_latency(report: dict[str, Any], err: Console) -> None:
    from rich.table import Table

    for point in report["points"]:
        title = (
            f"calls of {point['ratio']:g} steps ({point['call_s']:g} s), "
            f"{point['realised_rate']:.1%} escalated, agreement {point['agreement']}, "
            f"coverage {point['coverage_4']} of 4, {point['coverage_8']} of 8"
        )
        table = Table(box=None, pad_edge=False, header_style="bold", title=title)
        for column in ("mode", "tok/s", "played", "formula", "stall", "calls", "over wait"):
            table.add_column(column, no_wrap=True)
        has_bars = err.width >= _ROOM_FOR_BARS
        if has_bars:
            table.add_column("")
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
        alone = report["small_only"]["tokens_per_s"]
        table.add_row("small only", f"{alone:.3f}")
        table.add_row("large streaming", f"{point['large_streaming_tokens_per_s']:.3f}")
        err.print(table)
        same = "the same text in every mode" if point["same_text"] else "DIFFERENT TEXTS"
        if differed := point["server_differed"]:
            same += f", but for {differed} answers where the server gave one context two tokens"
        err.print(same)
        over = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in point["auto_over_best"].items())
        err.print(f"over the fastest set mode under the same ceiling on calls: {over}")


def _show_kernels(report: dict[str, Any], err: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("vocabulary", "form", "ms", "chain over it", "error to float64", "same top 8"):
        table.add_column(column)
    for entry in report["kernels"]:
        for name, times in entry["ms"].items():
            ratio, error = entry["chain_over"].get(name), entry["error"].get(name)
            table.add_row(
                f"{entry['vocabulary']:,}",
                name,
                f"{times['median']:.3f}",
                f"{ratio['median']}x" if ratio else "",
                f"{error['entropy_nats']:.1e} nats" if error else "",
                ("yes" if error["same_top_ids"] else "NO") if error else "",
            )
    err.print(table)
    err.print(f"Metal: {report['metal']}", soft_wrap=True, markup=False)


def finish(report: dict[str, Any], name: str, *, save: bool) -> int:
    """End stdout with the report, and keep it if `save`; return the exit code."""
    from mlxroute.bench.measurement import describe_environment

    command = " ".join(["mlxroute", *sys.argv[1:]])
    report = {**describe_environment(command), **report}
    if save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"{name}.json"
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    return 0
