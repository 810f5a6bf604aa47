"""`bench quality`: accuracy of both models alone and of routed answers, on a file of questions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mlxroute.cli.flags import AtOnce, Examples, Plot, Save, Shots
from mlxroute.cli.folders import (
    cache_dir_of,
    expand_optional,
    find_bench_file,
    model_file_name,
    record_path,
    report_source,
)
from mlxroute.cli.setting_options import parse_budget
from mlxroute.config import Settings
from mlxroute.config.setting_choices import RouterName
from mlxroute.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlxroute.bench.quality import QualitySide
    from mlxroute.large import LargeModel
    from mlxroute.questions.question_files import Question
    from mlxroute.recorded.replies import Replies
    from mlxroute.small import SmallModel
    from mlxroute.small.mlp_head import MlpHead
    from mlxroute.types import Progress

# A larger share of cut-off answers gives a warning.
_CUT_OFF_SHARE: Final = 0.05
# Columns of a bar for an accuracy of 100 %.
_BAR_WIDTH: Final = 10


def quality(
    settings: Settings,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines file of questions with answers. Default: built-in ones.",
            metavar="FILE",
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            parser=parse_budget,
            metavar="SHARE",
            help="Budget of routed answers; repeatable. Default: seven from 1% to 30%.",
        ),
    ] = None,
    router: Annotated[
        list[RouterName] | None,
        typer.Option(help="Router to compare; repeatable. Default: entropy and random."),
    ] = None,
    questions: Annotated[
        int, typer.Option(help="Maximum number of questions, sampled at random.", min=1)
    ] = 300,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 160,
    examples: Examples = None,
    shots: Shots = 4,
    chats: Annotated[int, typer.Option(help="Questions answered at a time.", min=1)] = 4,
    at_once: AtOnce = 4,
    oracles: Annotated[
        bool, typer.Option("--oracles", help="Add upper bounds from oracle routers.")
    ] = False,
    plot: Plot = None,
    save: Save = False,
) -> int:
    """Measure the accuracy of both models and of routed answers.

    An interrupted run continues where it stopped.
    """
    from mlxroute.cli.bench_report import check_plot_option, check_save_option, write_report
    from mlxroute.cli.large_setup import make_large, require_large
    from mlxroute.cli.routing import head_file
    from mlxroute.cli.small_setup import small_name
    from mlxroute.cli.terminal import make_consoles
    from mlxroute.ledger import Ledger

    address = require_large(settings, "bench quality")
    check_plot_option(plot)
    check_save_option(save)
    file = data or find_bench_file("questions", "everyday.jsonl")
    routers = [name.value for name in router or (RouterName.ENTROPY, RouterName.RANDOM)]
    if RouterName.HEAD in routers or settings.head is not None:
        head_file(small_name(settings), settings.head)
    run = _QualityRun(
        questions=_read_questions(file, questions),
        examples=_read_examples(examples, shots, is_builtin=data is None),
        routers=routers,
        budgets=budget,
        chats=chats,
        at_once=at_once,
        oracles=oracles,
    )
    check_unused_by_adapter(settings, run.questions)
    _, err = make_consoles()
    settings = replace(settings, max_tokens=tokens)
    with make_large(settings, address, Ledger(), err) as large:
        report = run.measure(settings, large, err)
    print_quality(report, err)
    source = report_source(file)
    name = f"quality-{model_file_name(report['small'])}-{source}"
    code = write_report({"data": source, **report}, name, save=save)
    if plot is not None:
        from mlxroute.bench.plot import draw_quality

        draw_quality(report, plot)
    return code


def _read_questions(file: Path, count: int) -> list[Question]:
    from mlxroute.questions.question_files import read_questions, sample_questions

    questions = sample_questions(read_questions(file), count)
    for question in questions:
        if question.answer is None:
            raise UsageError(f"{file}: {question.name} has no answer to compare with")
    return questions


def _read_examples(file: Path | None, count: int, *, is_builtin: bool) -> list[Question]:
    """Return the worked examples of a file; built-in questions have built-in ones by default."""
    from mlxroute.questions.question_files import read_worked_examples

    if file is None and is_builtin:
        file = find_bench_file("questions", "examples.jsonl")
    return read_worked_examples(file, count)


@dataclass(frozen=True, slots=True)
class _QualityRun:
    """The options of one run.

    Args:
        questions: Questions to answer.
        examples: Worked examples before each question.
        routers: Names of the routers to compare.
        budgets: Budgets of each router; None for the default ones.
        chats: Number of questions that are answered at a time.
        at_once: Maximum number of calls in flight.
        oracles: Whether to add upper bounds from oracle routers.
    """

    questions: list[Question]
    examples: list[Question]
    routers: list[str]
    budgets: list[float] | None
    chats: int
    at_once: int
    oracles: bool

    def measure(self, settings: Settings, large: LargeModel, err: Console) -> dict[str, Any]:
        """Load the small model, answer the questions with every side, and return the report."""
        from mlxroute.cli.progress import ByteProgress
        from mlxroute.cli.small_setup import load_small

        large.connect(thorough=False)
        with ByteProgress(err) as progress:
            small = load_small(settings, progress)
        large.pair_vocabulary(small.vocabulary)
        # Loading the small model loads the faster BLAS, which must come before MLX.
        from mlxroute.recorded.replies import Replies

        record = record_path(settings, "replies", small.plain_name, large.model_name)
        with Replies(large, record, at_once=self.at_once) as replies:
            return self._answer(settings, small, replies, large.model_name, err)

    def _answer(
        self,
        settings: Settings,
        small: SmallModel,
        replies: Replies,
        large_name: str,
        err: Console,
    ) -> dict[str, Any]:
        from mlxroute.bench.quality import (
            BUDGETS,
            QualityResults,
            bench_quality,
            make_sides,
            measure_step_s,
        )
        from mlxroute.cli.progress import count_progress
        from mlxroute.cli.routing import DEFAULT_ROUTER, HEAD_ROUTER, find_ranks

        sides = make_sides(self.routers, self.budgets or BUDGETS)
        router = HEAD_ROUTER if HEAD_ROUTER in self.routers else DEFAULT_ROUTER
        ranks = find_ranks(small, router, settings.head)
        check_unseen(small.head, self.questions)
        with count_progress(err) as progress:
            report = bench_quality(
                small,
                replies,
                self.questions,
                sides=sides,
                examples=self.examples,
                ranks=ranks,
                max_tokens=settings.max_tokens,
                step_s=measure_step_s(small, self.questions[0]),
                chats=self.chats,
                accept_within=settings.accept_within,
                results=QualityResults(record_path(settings, "quality", small.name, large_name)),
                progress=progress,
            )
            if self.oracles:
                report["oracles"] = self._bounds(settings, small, replies, sides, progress)
        return report

    def _bounds(
        self,
        settings: Settings,
        small: SmallModel,
        replies: Replies,
        sides: list[QualitySide],
        progress: Progress,
    ) -> dict[str, Any]:
        """Return the accuracy of each oracle router within the budgets of the run."""
        from mlxroute.bench.oracles import compute_oracles
        from mlxroute.bench.quality import BUDGETS
        from mlxroute.training.labels import collect_labels

        answers = collect_labels(
            small,
            replies,
            self.questions,
            examples=self.examples,
            max_tokens=settings.max_tokens,
            folder=cache_dir_of(settings) / "labels",
            at_once=self.at_once,
            progress=progress,
        )
        budgets = sorted({*BUDGETS, *(side.budget for side in sides if side.router)})
        return compute_oracles(answers, self.questions, budgets, small.head)


def check_unseen(head: MlpHead | None, questions: list[Question]) -> None:
    """Raise UsageError if the head was fitted to one of the questions."""
    fitted = frozenset() if head is None else head.questions
    count = sum(question.fingerprint in fitted for question in questions)
    if count:
        raise UsageError(
            f"the head was fitted to {count} of these {len(questions)} questions, so their"
            " accuracy would be too high; use other questions"
        )


def check_unused_by_adapter(settings: Settings, questions: list[Question]) -> None:
    """Raise UsageError if the adapter of the settings was trained with one of the questions."""
    from mlxroute.backend.adapter_folder import read_trained_questions

    adapter = expand_optional(settings.adapter)
    trained = frozenset() if adapter is None else read_trained_questions(adapter)
    count = sum(question.fingerprint in trained for question in questions)
    if count:
        raise UsageError(
            f"the adapter was trained with {count} of these {len(questions)} questions, so their"
            " accuracy would be too high; use other questions",
            parameter="adapter",
        )


def print_quality(report: dict[str, Any], err: Console) -> None:
    """Print the report as a table, and a warning if many answers were cut off."""
    err.print(_quality_table(report))
    cut_off = max(side["reached_limit"] for side in report["sides"].values())
    if cut_off > _CUT_OFF_SHARE * report["questions"]:
        err.print(
            f"up to {cut_off} of {report['questions']} answers of a side were cut off at"
            f" {report['tokens']} tokens, and answers that are incomplete by then count as"
            " wrong; raise --tokens",
            style="yellow",
        )


def _quality_table(report: dict[str, Any]) -> Table:
    from mlxroute.bench.quality import ORACLES
    from mlxroute.cli.terminal import make_table

    title = f"{report['questions']} questions, {report['examples']} worked examples"
    columns = ("side", "strict", "lenient, 95 %", "x small", "p", "escalated", "calls", "")
    table = make_table(*columns, title=title)
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
            "█" * round(_BAR_WIDTH * lenient["accuracy"]),
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
                "█" * round(_BAR_WIDTH * point["accuracy"]),
            )
    return table
