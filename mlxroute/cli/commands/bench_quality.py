"""`bench quality`: accuracy of both models alone and of routed answers, on a file of questions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mlxroute.cli.flags import AtOnce, Examples, Plot, Save, Shots
from mlxroute.cli.folders import (
    cache_dir_of,
    find_bench_file,
    model_file_name,
    record_path,
    report_source,
)
from mlxroute.cli.model_pair import load_paired_small, open_recording
from mlxroute.cli.setting_options import parse_budget
from mlxroute.cli.worked_examples import (
    check_questions_fit,
    check_questions_sendable,
    count_trained,
    read_examples,
)
from mlxroute.config import Settings
from mlxroute.config.setting_choices import BenchRouterName
from mlxroute.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.bench.quality.sides import QualitySide
    from mlxroute.large import LargeModel
    from mlxroute.questions.question_files import Question
    from mlxroute.recorded.recording_large import RecordingLarge
    from mlxroute.small import SmallModel
    from mlxroute.small.mlp_head import MlpHead
    from mlxroute.types import Progress

# A cheap router, and baselines that every other one has to beat.
_DEFAULT_ROUTERS: Final = (
    BenchRouterName.ENTROPY,
    BenchRouterName.RANDOM,
    BenchRouterName.POSITION,
    BenchRouterName.FIRST,
    BenchRouterName.SENTENCE,
)


def quality(
    settings: Settings,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines file of questions, all with answers or all without. Default: built-in"
            " ones.",
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
        list[BenchRouterName] | None,
        typer.Option(
            help="Router to measure; repeatable. Default: entropy, random, position, first,"
            " sentence, and head with --head."
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help='Two sides to compare, such as "head 5%,small"; repeatable. Default: each routed'
            " side with the best baseline of its budget.",
            metavar="A,B",
        ),
    ] = None,
    majority: Annotated[
        int | None,
        typer.Option(
            help="Also measure the majority of N sampled answers of the small model.",
            metavar="N",
            min=2,
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option(help="Maximum number of questions, sampled at random.", min=1)
    ] = 300,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 160,
    examples: Examples = None,
    shots: Shots = None,
    chats: Annotated[int, typer.Option(help="Questions answered at a time.", min=1)] = 4,
    at_once: AtOnce = 4,
    oracles: Annotated[
        bool,
        typer.Option(
            "--oracles",
            help="Add oracles: routers that know the large model's answers, or the right ones.",
        ),
    ] = False,
    plot: Plot = None,
    save: Save = False,
) -> int:
    """Measure the accuracy of both models and of routed answers.

    An interrupted run continues where it stopped.
    """
    from mlxroute.bench.quality.sides import BUDGETS, make_sides
    from mlxroute.cli.bench_report import check_plot_option, check_save_option, write_report
    from mlxroute.cli.large_setup import make_large, require_large
    from mlxroute.cli.quality_tables import print_quality
    from mlxroute.cli.routing import head_file
    from mlxroute.cli.small_setup import small_name
    from mlxroute.cli.terminal import make_consoles
    from mlxroute.ledger import Ledger

    address = require_large(settings, "bench quality")
    check_plot_option(plot)
    check_save_option(save)
    file = data or find_bench_file("questions", "everyday.jsonl")
    head = () if settings.head is None else (BenchRouterName.HEAD,)
    routers = [name.value for name in dict.fromkeys(router or (*_DEFAULT_ROUTERS, *head))]
    if BenchRouterName.HEAD in routers or settings.head is not None:
        head_file(small_name(settings), settings.head)
    sides = make_sides(routers, budget or BUDGETS, majority=majority or 0)
    sampled = _read_questions(file, questions, needs_answers=oracles)
    if majority is not None:
        check_votable(sampled)
    run = _QualityRun(
        questions=sampled,
        examples=read_examples(examples, shots, sampled),
        sides=sides,
        compare=[_parse_comparison(text, sides) for text in compare or ()],
        chats=chats,
        at_once=at_once,
        oracles=oracles,
    )
    check_unused_by_adapter(settings, run.questions)
    check_questions_sendable(settings, run.questions, run.examples, "bench quality")
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


def _read_questions(file: Path, count: int, *, needs_answers: bool) -> list[Question]:
    from mlxroute.questions.question_files import read_questions, sample_questions

    questions = sample_questions(read_questions(file), count)
    missing = [question for question in questions if question.answer is None]
    if missing and (needs_answers or len(missing) < len(questions)):
        reason = "--oracles needs one" if needs_answers else "other rows have one"
        name = missing[0].name.removeprefix(f"{file}, ")
        raise UsageError(f"{file}: {name} has no answer to compare with; {reason}")
    return questions


def _parse_comparison(text: str, sides: list[QualitySide]) -> tuple[str, str]:
    """Return the names of two sides that are separated by a comma."""
    names = [side.name for side in sides]
    first, _, second = (part.strip() for part in text.partition(","))
    if first not in names or second not in names or first == second:
        raise UsageError(
            f"--compare {text}: name two sides, separated by a comma, of {', '.join(names)}"
        )
    return first, second


@dataclass(frozen=True, slots=True)
class _QualityRun:
    """The options of one run.

    Args:
        questions: Questions to answer.
        examples: Worked examples before each question.
        sides: Each model alone, and each router with each budget.
        compare: Names of sides to compare; empty for the default pairs.
        chats: Number of questions that are answered at a time.
        at_once: Maximum number of calls in flight.
        oracles: Whether to add oracle routers.
    """

    questions: list[Question]
    examples: list[Question]
    sides: list[QualitySide]
    compare: list[tuple[str, str]]
    chats: int
    at_once: int
    oracles: bool

    def measure(self, settings: Settings, large: LargeModel, err: Console) -> dict[str, Any]:
        """Load the small model, answer the questions with every side, and return the report."""
        small = load_paired_small(settings, large, err)
        check_questions_fit(small, self.questions, self.examples)
        with open_recording(settings, small, large, at_once=self.at_once) as recording:
            return self._answer(settings, small, recording, err)

    def _answer(
        self,
        settings: Settings,
        small: SmallModel,
        recording: RecordingLarge,
        err: Console,
    ) -> dict[str, Any]:
        from mlxroute.bench.quality.graded_answers import QualityResults
        from mlxroute.bench.quality.question_runs import bench_quality, measure_step_s
        from mlxroute.cli.progress import count_progress
        from mlxroute.cli.routing import (
            DEFAULT_ROUTER,
            HEAD_ROUTER,
            find_ranks,
            warn_of_other_head,
        )
        from mlxroute.recorded.answer_scores import AnswerScores

        large_name = recording.recorded_name
        has_head = any(side.router == HEAD_ROUTER for side in self.sides)
        router = HEAD_ROUTER if has_head else DEFAULT_ROUTER
        ranks = find_ranks(small, router, settings.head)
        check_measurable(small.head, self.questions)
        warn_of_other_head(small, err)
        with count_progress(err) as progress:
            report = bench_quality(
                small,
                recording,
                self.questions,
                sides=self.sides,
                compare=self.compare,
                examples=self.examples,
                ranks=ranks,
                max_tokens=settings.max_tokens,
                step_s=measure_step_s(small, self.questions[0], self.examples),
                chats=self.chats,
                accept_within=settings.accept_within,
                results=QualityResults(record_path(settings, "quality", small.name, large_name)),
                scores=AnswerScores(record_path(settings, "scores", small.plain_name, large_name)),
                progress=progress,
            )
            if self.oracles:
                report["oracles"] = self._bounds(settings, small, recording, progress)
        return report

    def _bounds(
        self,
        settings: Settings,
        small: SmallModel,
        recording: RecordingLarge,
        progress: Progress,
    ) -> dict[str, Any]:
        """Return the accuracy of each oracle router within the budgets of the run."""
        from mlxroute.bench.quality.oracles import compute_oracles
        from mlxroute.bench.quality.sides import BUDGETS
        from mlxroute.training.labels import collect_labels

        answers = collect_labels(
            small,
            recording,
            self.questions,
            examples=self.examples,
            max_tokens=settings.max_tokens,
            folder=cache_dir_of(settings) / "labels",
            at_once=self.at_once,
            progress=progress,
        )
        budgets = sorted({*BUDGETS, *(side.budget for side in self.sides if side.router)})
        return compute_oracles(answers, self.questions, budgets, small.head)


def check_measurable(head: MlpHead | None, questions: list[Question]) -> None:
    """Raise UsageError for a head without quantiles, or one fitted to one of the questions."""
    if head is None:
        return
    # Saved answers are told apart by them, and a budget would start from a guess.
    if not head.quantiles:
        raise UsageError(
            "the head has no quantiles of its scores, so its answers cannot be compared; fit one"
            " with `mlxroute train`",
            parameter="head",
        )
    count = sum(question.fingerprint in head.questions for question in questions)
    if count:
        raise UsageError(
            f"the head was fitted to {count} of these {len(questions)} questions, so their"
            " accuracy would be too high; use other questions"
        )


def check_votable(questions: list[Question]) -> None:
    """Raise UsageError unless the answers of all questions can be counted for a majority."""
    from mlxroute.bench.quality.majority import can_vote

    if odd := next((question for question in questions if not can_vote(question)), None):
        raise UsageError(
            f"{odd.name} has no choices and no number as its answer, so there is no majority",
            parameter="majority",
        )


def check_unused_by_adapter(settings: Settings, questions: list[Question]) -> None:
    """Raise UsageError if the adapter of the settings was trained with one of the questions."""
    count = count_trained(settings, questions)
    if count:
        raise UsageError(
            f"the adapter was trained with {count} of these {len(questions)} questions, so their"
            " accuracy would be too high; use other questions",
            parameter="adapter",
        )
