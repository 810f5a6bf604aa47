"""`train`: fit a head to where the user's large model should be asked."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.catalog.head_files import user_head_file
from mlxroute.cli.folders import cache_dir_of, record_file, source
from mlxroute.cli.large_side import large_model
from mlxroute.cli.session import load_small, open_ledger
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import (
    Question,
    read_questions,
    read_worked_examples,
    sample_questions,
)
from mlxroute.types import LabelKind

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.training.head_fitting import FittedHead


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What is learned from: `count` questions of each file, behind `shots` worked examples."""

    data: list[Path]
    out: Path | None
    labels: LabelKind
    count: int
    tokens: int
    examples: Path | None
    shots: int
    at_once: int


def run_train(settings: Settings, options: TrainOptions) -> int:
    """Label, fit, judge on held-out answers, write; return the exit code."""
    from mlxroute.cli.progress import Reporter, counting
    from mlxroute.cli.terminal import consoles

    if settings.large is None:
        raise UsageError("train needs a large model's server: --large URL")
    if options.out is not None and options.out.suffix != ".safetensors":
        raise UsageError(f"--out {options.out}: a head is a .safetensors file")
    questions = _questions(options)
    examples = read_worked_examples(options.examples, options.shots)
    _, err = consoles()
    with (
        open_ledger(settings) as ledger,
        large_model(settings, settings.large, ledger) as large,
    ):
        large.connect(thorough=False)
        with Reporter(err) as reporter:
            small = load_small(settings, reporter)
        large.pair_vocabulary(small.vocabulary)
        from mlxroute.recorded.replies import Replies
        from mlxroute.training.head_fitting import fit_head
        from mlxroute.training.labels import collect_labels

        record = record_file(settings, "replies", small.name, large.model_name)
        with (
            Replies(large, record, at_once=options.at_once) as replies,
            counting(err) as progress,
        ):
            answers = collect_labels(
                small,
                replies,
                questions,
                examples=examples,
                max_tokens=options.tokens,
                folder=cache_dir_of(settings.cache_dir) / "labels",
                at_once=options.at_once,
                with_continuations=options.labels in (LabelKind.CONSEQUENCE, LabelKind.PREFERENCE),
                progress=progress,
            )
        provenance = {
            "small": small.name,
            "large": large.model_name,
            "data": [source(file) for file in options.data],
            "examples": len(examples),
        }
        with err.status("fitting"):
            fitted = fit_head(answers, questions, labels=options.labels, provenance=provenance)
    out = options.out or user_head_file(small.name, user_catalog_dir())
    fitted.write(out)
    _show(fitted, err)
    named = f" --head {options.out}" if options.out else ""
    err.print(
        f"written to {out}; use it with --router head{named} --budget 7%",
        markup=False,
        soft_wrap=True,
    )
    if not fitted.beats_entropy:
        err.print(
            "warning: on the held-out answers it finds no more than entropy does; give more"
            " questions, or stay with --router entropy",
            style="yellow",
            soft_wrap=True,
        )
    sys.stdout.write(json.dumps(fitted.report) + "\n")
    return 0


def _questions(options: TrainOptions) -> list[Question]:
    questions = [
        question
        for file in options.data
        for question in sample_questions(read_questions(file), options.count)
    ]
    if options.labels is LabelKind.PREFERENCE:
        for question in questions:
            if question.answer is None:
                raise UsageError(
                    f"--labels preference needs right answers, and {question.name} has none"
                )
    return questions


def _show(fitted: FittedHead, err: Console) -> None:
    from rich.table import Table

    report = fitted.report
    err.print(
        f"of {report['positions']['held_out']:,} held-out positions {report['differing']:.1%}"
        f" differ and {report['to_find']:.1%} are to be found ({report['labels']});"
        " share of these among the highest scores:",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("escalated", "head", "entropy", "random", "oracle"):
        table.add_column(column)
    for rate, row in report["recall"].items():
        names = ("head", "entropy", "random", "oracle")
        table.add_row(f"{float(rate):.0%}", *(f"{row[name]:.0%}" for name in names))
    err.print(table)
