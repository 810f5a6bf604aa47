"""`calibrate`: measure the scores that budgets and thresholds start from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxroute.cli.flags import Examples, QuestionFiles, Shots
from mlxroute.cli.folders import data_name
from mlxroute.cli.worked_examples import (
    check_questions_fit,
    read_examples,
    warn_of_trained_questions,
)
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.replace_file import check_creatable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlxroute.catalog.score_ranks import ScoreRanks
    from mlxroute.questions.question_files import Question

_RATES = (0.01, 0.03, 0.05, 0.07, 0.10, 0.15, 0.30)


def calibrate(
    settings: Settings,
    data: QuestionFiles,
    questions: Annotated[
        int, typer.Option(help="Maximum number of questions per file, sampled at random.", min=1)
    ] = 12,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    examples: Examples = None,
    shots: Shots = None,
) -> int:
    """Measure router scores on your own questions, for budgets.

    Also prints the threshold of each router for several escalation rates.
    """
    from mlxroute.cli.terminal import make_consoles, print_note, print_table
    from mlxroute.questions.question_files import sample_files

    _, err = make_consoles()
    check_creatable(user_catalog_dir() / "ranks" / "ranks.json")
    sampled = sample_files(data, questions)
    worked = read_examples(examples, shots, sampled)
    warn_of_trained_questions(settings, sampled, err)
    ranks = _measure_ranks(settings, data, sampled, worked, err, max_tokens=tokens)
    print_table(err, _threshold_table(ranks))
    sys.stdout.write(json.dumps(report_object(ranks)) + "\n")
    file = ranks.write(user_catalog_dir())
    print_note(
        err, f"written to {file}; budgets for {ranks.small} start from these scores", style=""
    )
    return 0


def _measure_ranks(
    settings: Settings,
    data: list[Path],
    questions: list[Question],
    examples: list[Question],
    err: Console,
    *,
    max_tokens: int,
) -> ScoreRanks:
    from mlxroute.cli.progress import ByteProgress, count_progress
    from mlxroute.cli.small_setup import load_small

    with ByteProgress(err) as bytes_progress:
        small = load_small(settings, bytes_progress)
    check_questions_fit(small, questions, examples)
    from mlxroute.training.calibration import calibrate as measure

    after = f" after {len(examples)} worked examples" if examples else ""
    with count_progress(err) as progress:
        return measure(
            small,
            questions,
            examples=examples,
            data=f"{len(questions)} questions of {', '.join(map(data_name, data))}{after}",
            max_tokens=max_tokens,
            progress=progress,
        )


def _routers(ranks: ScoreRanks) -> list[str]:
    return [name for name in ranks.quantiles if name != "random"]


def _threshold_table(ranks: ScoreRanks) -> Table:
    from mlxroute.cli.terminal import make_table

    routers = _routers(ranks)
    table = make_table("escalated", *(f"{name} above" for name in routers), title=ranks.data)
    for rate in _RATES:
        thresholds = [ranks.threshold_at_rate(name, rate) for name in routers]
        table.add_row(f"{rate:.0%}", *(f"{threshold:.4g}" for threshold in thresholds))
    return table


def report_object(ranks: ScoreRanks) -> dict[str, Any]:
    """Return the JSON object of the last line of stdout."""
    return {
        "small": ranks.small,
        "data": ranks.data,
        "positions": ranks.positions,
        "thresholds": {
            name: {f"{rate:g}": round(ranks.threshold_at_rate(name, rate), 5) for rate in _RATES}
            for name in _routers(ranks)
        },
    }
