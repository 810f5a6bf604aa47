"""`train`: fit a learned head to a pair of models."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxroute.cli.flags import AtOnce, Examples, QuestionFiles, Shots
from mlxroute.cli.folders import cache_dir_of, data_name, hash_file
from mlxroute.cli.model_pair import (
    load_paired_small,
    note_recorded,
    open_recording,
    warn_of_cut_off,
)
from mlxroute.cli.terminal import show_status
from mlxroute.cli.worked_examples import (
    check_questions_fit,
    check_questions_sendable,
    note_sentences,
    read_examples,
    warn_of_trained_questions,
)
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.errors import UsageError
from mlxroute.replace_file import check_creatable
from mlxroute.types import LabelKind
from mlxroute.user_folders import expand_user

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.large import LargeModel
    from mlxroute.questions.question_files import Question
    from mlxroute.recorded.recording_large import RecordingLarge
    from mlxroute.small import SmallModel
    from mlxroute.training.head_fitting import FittedHead
    from mlxroute.training.labels import LabelledAnswer

_RECALL_COLUMNS = ("head", "entropy", "random", "oracle")


def train(
    settings: Settings,
    data: QuestionFiles,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Head file to write. Default: the small model's, in your catalogue folder.",
            metavar="FILE",
        ),
    ] = None,
    labels: Annotated[
        LabelKind,
        typer.Option(
            help="Which tokens the head learns to find. Only `advantage` uses --head and --budget."
        ),
    ] = LabelKind.CONSEQUENCE,
    questions: Annotated[
        int, typer.Option(help="Maximum number of questions per file, sampled at random.", min=1)
    ] = 500,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 160,
    examples: Examples = None,
    shots: Shots = None,
    at_once: AtOnce = 4,
) -> int:
    """Fit a learned head, a router, to your two models.

    The head finds the tokens where the large model would change the answer.
    """
    from mlxroute.catalog.head_files import user_head_file
    from mlxroute.cli.large_setup import make_large, open_ledger, require_large
    from mlxroute.cli.terminal import make_consoles

    address = require_large(settings, "train")
    out = None if out is None else expand_user(out)
    _check_heads(settings, out, labels)
    sampled = _read_labelled_questions(data, questions, labels)
    material = _Material(
        questions=sampled,
        examples=read_examples(examples, shots, sampled),
        sources=[data_name(file) for file in data],
        labels=labels,
        tokens=tokens,
        at_once=at_once,
    )
    check_questions_sendable(settings, material.questions, material.examples, "train")
    _, err = make_consoles()
    warn_of_trained_questions(settings, sampled, err)
    if labels in (LabelKind.PREFERENCE, LabelKind.ADVANTAGE):
        note_sentences(sampled, err)
    with open_ledger(settings) as ledger, make_large(settings, address, ledger, err) as large:
        small_name, fitted = _fit(settings, large, material, err)
    file = out or user_head_file(small_name, user_catalog_dir())
    fitted.write(file)
    if labels is LabelKind.ADVANTAGE:
        _print_routed(fitted, err)
    else:
        _print_recall(fitted, err)
    _print_advice(settings, fitted, file, is_elsewhere=out is not None, err=err)
    sys.stdout.write(json.dumps(fitted.report) + "\n")
    return 0


@dataclass(frozen=True, slots=True)
class _Material:
    """What a head is fitted to: questions, worked examples before each, and labels.

    Args:
        questions: Questions that both models answer.
        examples: Worked examples before each question.
        sources: Names of the question files.
        labels: Which tokens the head learns to find.
        tokens: Maximum length of an answer.
        at_once: Maximum number of calls in flight.
    """

    questions: list[Question]
    examples: list[Question]
    sources: list[str]
    labels: LabelKind
    tokens: int
    at_once: int


def _check_heads(settings: Settings, out: Path | None, labels: LabelKind) -> None:
    """Raise UsageError if the new head cannot be written, or a head that is used does not exist.

    With the labels `advantage`, a head may route the labelled answers.
    """
    from mlxroute.cli.routing import head_file
    from mlxroute.cli.small_setup import small_name

    file = out or user_catalog_dir() / "heads" / "head.safetensors"
    _check_writable(file, cache_dir_of(settings))
    if settings.head is not None and labels is LabelKind.ADVANTAGE:
        head_file(small_name(settings), settings.head)


def _check_writable(out: Path, cache_dir: Path) -> None:
    """Raise UsageError for a file that cannot be written after hours of labelling."""
    check_creatable(out, parameter="out")
    from mlxroute.backend import blas

    blas.interpose(cache_dir)
    from mlxroute.small.mlp_head import is_head

    if out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(f"--out {out}: a head is a .safetensors file")
    if out.exists() and not is_head(out):
        raise UsageError(f"--out {out} exists and is not a head; choose another name")


def _read_labelled_questions(files: list[Path], count: int, labels: LabelKind) -> list[Question]:
    from mlxroute.questions.question_files import MIN_TRAINING_QUESTIONS, sample_files

    questions = sample_files(files, count, at_least=MIN_TRAINING_QUESTIONS)
    if labels is LabelKind.PREFERENCE:
        for question in questions:
            if question.answer is None:
                raise UsageError(
                    f"--labels preference needs right answers, and {question.name} has none"
                )
    return questions


def _fit(
    settings: Settings, large: LargeModel, material: _Material, err: Console
) -> tuple[str, FittedHead]:
    """Label the large model's answers and fit a head; return it with the small model's name."""
    small = load_paired_small(settings, large, err)
    check_questions_fit(small, material.questions, material.examples)
    from mlxroute.training.head_fitting import fit_head

    provenance = {
        "small": small.name,
        "large": large.model_name,
        "data": material.sources,
        "examples": len(material.examples),
    }
    if material.labels is LabelKind.ADVANTAGE:
        return small.name, _fit_to_advantages(settings, small, large, material, provenance, err)
    answers = _label_answers(settings, small, large, material, err)
    if material.labels in (LabelKind.CONSEQUENCE, LabelKind.PREFERENCE):
        warn_of_cut_off(
            # An end token in the last place counts too: saved labels do not tell it.
            [answer.token_count >= material.tokens for answer in answers],
            material.tokens,
            "and are judged by what was written",
            err,
        )
    with show_status(err, "fitting"):
        fitted = fit_head(
            answers, material.questions, labels=material.labels, provenance=provenance
        )
    return small.name, fitted


def _label_answers(
    settings: Settings, small: SmallModel, large: LargeModel, material: _Material, err: Console
) -> list[LabelledAnswer]:
    from mlxroute.cli.progress import count_progress
    from mlxroute.training.labels import collect_labels

    with (
        open_recording(settings, small, large, at_once=material.at_once) as recording,
        count_progress(err) as progress,
    ):
        _note_recorded(settings, small, recording, material, err)
        return collect_labels(
            small,
            recording,
            material.questions,
            examples=material.examples,
            max_tokens=material.tokens,
            folder=cache_dir_of(settings) / "labels",
            at_once=material.at_once,
            with_continuations=material.labels in (LabelKind.CONSEQUENCE, LabelKind.PREFERENCE),
            progress=progress,
        )


def _note_recorded(
    settings: Settings,
    small: SmallModel,
    recording: RecordingLarge,
    material: _Material,
    err: Console,
) -> None:
    from mlxroute.questions.question_files import question_messages

    note_recorded(
        settings,
        small,
        recording,
        [question_messages(item, material.examples) for item in material.questions],
        err,
        max_tokens=material.tokens,
    )


def _fit_to_advantages(
    settings: Settings,
    small: SmallModel,
    large: LargeModel,
    material: _Material,
    provenance: dict[str, Any],
    err: Console,
) -> FittedHead:
    """Label answers that are written with the router of the settings, and fit a head."""
    from mlxroute.cli.progress import count_progress
    from mlxroute.cli.routing import (
        DEFAULT_ROUTER,
        HEAD_ROUTER,
        find_ranks,
        head_file,
        warn_of_other_head,
    )
    from mlxroute.training.advantage.advantage_fitting import AdvantageTraining
    from mlxroute.training.advantage.routed_answers import BudgetedRouter

    name, fingerprint = DEFAULT_ROUTER, ""
    if settings.head is not None:
        name = HEAD_ROUTER
        fingerprint = hash_file(head_file(small.name, settings.head))
    ranks = find_ranks(small, name, settings.head)
    warn_of_other_head(small, err)
    with (
        open_recording(settings, small, large, at_once=material.at_once) as recording,
        count_progress(err) as progress,
    ):
        _note_recorded(settings, small, recording, material, err)
        training = AdvantageTraining(
            small,
            recording,
            ranks,
            BudgetedRouter(name, _budget(settings), ranks[name], fingerprint),
            max_tokens=material.tokens,
            folder=cache_dir_of(settings) / "labels",
            at_once=material.at_once,
            progress=progress,
            on_answers=lambda answers: warn_of_cut_off(
                [not answer.is_whole(small.vocabulary.eos_ids) for answer in answers],
                material.tokens,
                "so what is right may not be known from them",
                err,
            ),
        )
        return training.run(material.questions, examples=material.examples, provenance=provenance)


def _budget(settings: Settings) -> float:
    from mlxroute.routers import DEFAULT_BUDGET

    return DEFAULT_BUDGET if settings.budget is None else settings.budget


def _print_routed(fitted: FittedHead, err: Console) -> None:
    from mlxroute.cli.terminal import make_table, print_table
    from mlxroute.view.figures import format_count

    report = fitted.report
    if report["unjudged"]:
        err.print(
            f"left out: {format_count(report['unjudged'], 'question')}, with no right answer in the"
            " file and no final answer in the large model's text",
            soft_wrap=True,
        )
    routed = report["routed"]
    err.print(
        f"{report['answers']['held_out']:,} held-out questions, with at most"
        f" {routed['budget']:.0%} of the tokens from the large model, judged by"
        f" {routed['judged_by']}:",
        highlight=False,
    )
    table = make_table("router", "right", "large tokens a question")
    rows = {f"head, {shape}": row for shape, row in routed["candidates"].items()}
    for name, row in {**rows, "entropy": routed["entropy"]}.items():
        table.add_row(name, f"{row['accuracy']:.1%}", f"{row['large_tokens_per_question']:.2f}")
    print_table(err, table)
    err.print(
        f"the head is {report['shape']}; it alone is right on {routed['only_head']} questions,"
        f" entropy alone on {routed['only_entropy']} (p = {routed['p']:g})",
        highlight=False,
        soft_wrap=True,
    )


def _print_recall(fitted: FittedHead, err: Console) -> None:
    from mlxroute.cli.terminal import make_table, print_table

    report = fitted.report
    err.print(
        f"{report['positions']['held_out']:,} held-out positions: the models differ at"
        f" {report['differing']:.1%}, the head should find {report['to_find']:.1%}"
        f" ({report['labels']} labels). Share of these among the positions with the highest"
        " scores:",
        highlight=False,
    )
    table = make_table("escalated", *_RECALL_COLUMNS)
    for rate, row in report["recall"].items():
        table.add_row(f"{float(rate):.0%}", *(f"{row[name]:.0%}" for name in _RECALL_COLUMNS))
    print_table(err, table)


def _print_advice(
    settings: Settings, fitted: FittedHead, file: Path, *, is_elsewhere: bool, err: Console
) -> None:
    """Print how to use the head; `is_elsewhere` if it is not in the catalogue folder."""
    from mlxroute.cli.terminal import WARNING_STYLE

    flag = f"--head {shlex.quote(str(file))}" if is_elsewhere else "--router head"
    err.print(
        f"written to {file}; use it with {flag} --budget {100 * _budget(settings):g}%",
        soft_wrap=True,
    )
    if not fitted.beats_entropy:
        err.print(
            "warning: on the held-out answers the head is no better than entropy; train it on more"
            " questions, or stay with --router entropy",
            style=WARNING_STYLE,
            soft_wrap=True,
        )
