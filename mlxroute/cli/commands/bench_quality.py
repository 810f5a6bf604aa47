"""`bench quality`: accuracy of both models alone and of routed answers, on a file of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlxroute.cli.commands.bench import finish
from mlxroute.cli.folders import bench_file, cache_dir_of, record_file
from mlxroute.cli.session import DEFAULT_ROUTER, HEAD, load_small, ranks_of
from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import (
    Question,
    read_questions,
    read_worked_examples,
    sample_questions,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.bench.quality import QualitySide
    from mlxroute.small.mlp_head import MlpHead

# Share of the answers.
_FEW_CUT: Final = 0.05
# Of right answers only, in columns.
_BAR: Final = 10


@dataclass(frozen=True, slots=True)
class QualityOptions:
    """`count` questions of `data` behind `shots` worked examples, for every side.

    Without data they are ours, and so are the examples.
    """

    data: Path | None
    examples: Path | None
    shots: int
    count: int
    chats: int
    at_once: int
    oracles: bool
    plot: Path | None
    save: bool


def run_bench_quality(
    settings: Settings, sides: Sequence[QualitySide], options: QualityOptions
) -> int:
    """Answer the questions with every side; return the exit code."""
    from mlxroute.bench.quality import BUDGETS, QualityResults, bench_quality, measure_step_s
    from mlxroute.cli.large_side import large_model
    from mlxroute.cli.progress import Reporter, counting
    from mlxroute.cli.terminal import consoles
    from mlxroute.ledger import Ledger
    from mlxroute.recorded.replies import Replies

    if settings.large is None:
        raise UsageError("bench quality needs a large model's server: --large URL")
    if options.plot is not None:
        from mlxroute.bench.plot import check_plot, draw_quality

        check_plot(options.plot)
    data = options.data or bench_file("questions", "everyday.jsonl")
    questions = _answered(sample_questions(read_questions(data), options.count), data)
    examples = _examples(options)
    _, err = consoles()
    with large_model(settings, settings.large, Ledger()) as large:
        large.connect(thorough=False)
        with Reporter(err) as reporter:
            small = load_small(settings, reporter)
        # These import MLX, which has to come after the BLAS that loading opens.
        from mlxroute.bench.oracles import compute_oracles
        from mlxroute.training.labels import collect_labels

        large.pair_vocabulary(small.vocabulary)
        uses_head = any(side.router == HEAD for side in sides)
        ranks = ranks_of(small, HEAD if uses_head else DEFAULT_ROUTER, settings.head)
        check_unseen(small.head, questions)
        models = small.name, large.model_name
        with (
            Replies(
                large, record_file(settings, "replies", *models), at_once=options.at_once
            ) as replies,
            counting(err) as progress,
        ):
            report = bench_quality(
                small,
                replies,
                questions,
                sides=sides,
                examples=examples,
                ranks=ranks,
                max_tokens=settings.max_tokens,
                step_s=measure_step_s(small, questions[0]),
                chats=options.chats,
                results=QualityResults(record_file(settings, "quality", *models)),
                progress=progress,
            )
            if options.oracles:
                answers = collect_labels(
                    small,
                    replies,
                    questions,
                    examples=examples,
                    max_tokens=settings.max_tokens,
                    folder=cache_dir_of(settings.cache_dir) / "labels",
                    at_once=options.at_once,
                    progress=progress,
                )
                budgets = sorted({*BUDGETS, *(side.budget for side in sides if side.router)})
                report["oracles"] = compute_oracles(answers, questions, budgets, small.head)
    show(report, err)
    source = f"{data.absolute().parent.name}-{data.stem}"
    name = f"quality-{small.name}-{source}"
    code = finish({"data": source, **report}, name, save=options.save)
    if options.plot is not None:
        draw_quality(report, options.plot)
    return code


def _examples(options: QualityOptions) -> list[Question]:
    ours = bench_file("questions", "examples.jsonl") if options.data is None else None
    return read_worked_examples(options.examples or ours, options.shots)


def check_unseen(head: MlpHead | None, questions: list[Question]) -> None:
    """A head must not be judged by what it was fitted to."""
    known = frozenset() if head is None else head.questions
    seen = sum(question.fingerprint in known for question in questions)
    if seen:
        raise UsageError(
            f"the head was fitted to {seen} of these {len(questions)} questions, which would"
            " flatter it; give others"
        )


def _answered(questions: list[Question], data: Path) -> list[Question]:
    for question in questions:
        if question.answer is None:
            raise UsageError(f"{data}: {question.name} has no answer to compare with")
    return questions


def show(report: dict[str, Any], err: Console) -> None:
    """The table, and a word where answers were cut off."""
    from rich.table import Table

    from mlxroute.bench.oracles import ORACLES

    title = f"{report['questions']} questions, {report['examples']} worked examples"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title)
    for column in ("side", "strict", "lenient, 95 %", "x small", "p", "escalated", "calls", ""):
        table.add_column(column)
    for name, side in report["sides"].items():
        strict, lenient = side["strict"], side["lenient"]
        low, high = lenient["interval"]
        table.add_row(
            name,
            f"{strict['accuracy']:.1%}",
            f"{lenient['accuracy']:.1%} ({100 * low:.0f}-{100 * high:.0f})",
            f"{lenient['over_small']:.2f}" if lenient["over_small"] else "",
            f"{lenient['p_against_small']:.2g}",
            f"{side['escalation_rate']:.2%}",
            str(side["calls"]),
            "█" * round(_BAR * lenient["accuracy"]),
        )
    for name in ORACLES:
        for point in report.get("oracles", {}).get(name, ()):
            table.add_row(
                f"{name.replace('_', ' ')} {point['budget']:g}",
                "",
                f"{point['accuracy']:.1%}",
                "",
                "",
                f"{point['escalation_rate']:.2%}",
                "",
                "█" * round(_BAR * point["accuracy"]),
            )
    err.print(table)
    cut = max(side["reached_limit"] for side in report["sides"].values())
    if cut > _FEW_CUT * report["questions"]:
        err.print(
            f"up to {cut} of {report['questions']} answers of a side were cut off at"
            f" {report['tokens']} tokens, and what they had not said by then counts as wrong;"
            " give more --tokens",
            style="yellow",
        )
