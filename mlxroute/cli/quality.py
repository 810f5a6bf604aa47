"""`bench quality`: accuracy of both models alone and of routed answers, on a file of questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute.cli.bench import finish
from mlxroute.cli.session import HEAD, load_small, ranks_of
from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.questions import Question, read_questions, sampled

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.bench.quality import Side


def run_bench_quality(
    settings: Settings,
    *,
    data: Path,
    examples: Path | None,
    shots: int,
    count: int,
    sides: Sequence[Side],
    plot: Path | None,
    save: bool,
) -> int:
    """Answer the questions with every side; return the exit code."""
    from mlxroute.bench.quality import Results, bench_quality
    from mlxroute.cli.folders import cache_dir_of
    from mlxroute.cli.large import large_model
    from mlxroute.cli.output import consoles
    from mlxroute.cli.progress import Reporter
    from mlxroute.ledger import Ledger

    if settings.large is None:
        raise UsageError("bench quality needs a large model's server: --large URL")
    head = settings.head if any(side.router == HEAD for side in sides) else None
    if head is None and any(side.router == HEAD for side in sides):
        raise UsageError("--router head needs --head FILE; `mlxroute train` makes heads")
    if plot is not None:
        from mlxroute.bench.plot import check_plot, draw_quality

        check_plot(plot)
    questions = _answered(sampled(read_questions(data), count), data)
    worked = _worked(examples, shots)
    _, err = consoles()
    with large_model(settings, settings.large, Ledger()) as large:
        large.connect(thorough=False)
        with Reporter(err) as reporter:
            small = load_small(settings, reporter)
        large.meet(small.vocabulary)
        folder = cache_dir_of(settings.cache_dir) / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        model = re.sub(r"[^\w.-]+", "-", large.model_name)
        with err.status("answering") as status:

            def progress(label: str, done: int, total: int | None) -> None:
                status.update(f"answering: {done} of {total}")

            report = bench_quality(
                small,
                large,
                questions,
                sides=sides,
                examples=worked,
                ranks=ranks_of(small, head),
                tokens=settings.max_tokens,
                results=Results(folder / f"quality-{Path(small.name).name}-{model}.jsonl"),
                progress=progress,
            )
    _show(report, err)
    source = f"{data.absolute().parent.name}-{data.stem}"
    code = finish({"data": source, **report}, f"quality-{small.name}-{source}", save=save)
    if plot is not None:
        draw_quality(report, plot)
    return code


def _answered(questions: list[Question], data: Path) -> list[Question]:
    for question in questions:
        if question.answer is None:
            raise UsageError(f"{data}: {question.name} has no answer to compare with")
    return questions


def _worked(examples: Path | None, shots: int) -> list[Question]:
    """The first rows with an answer in full."""
    if examples is None:
        return []
    found = [each for each in read_questions(examples) if each.worked is not None][:shots]
    if len(found) < shots:
        raise UsageError(f"{examples}: {len(found)} rows have a `cot`, and --shots is {shots}")
    return found


def _show(report: dict[str, Any], err: Console) -> None:
    from rich.table import Table

    title = f"{report['questions']} questions, {report['examples']} worked examples"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title)
    for column in ("side", "strict", "lenient (95 %)", "over small", "p", "escalated", "calls", ""):
        table.add_column(column)
    for name, side in report["sides"].items():
        strict, lenient = side["strict"], side["lenient"]
        low, high = lenient["interval"]
        table.add_row(
            name,
            f"{strict['accuracy']:.1%}",
            f"{lenient['accuracy']:.1%} ({low:.1%} to {high:.1%})",
            f"{lenient['over_small']}x" if lenient["over_small"] else "",
            f"{lenient['p_against_small']:.2g}",
            f"{side['escalation_rate']:.2%}",
            str(side["calls"]),
            "█" * round(20 * lenient["accuracy"]),
        )
    err.print(table)
