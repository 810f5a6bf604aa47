"""What `adapt` prints: its held-out figures, and warnings of what they are worth."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.model_pair import warn_of_cut_off
from mlxroute.cli.terminal import WARNING_STYLE, make_table, print_note, print_table
from mlxroute.view.figures import format_count

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.training.tuning_types import TuningOutcome, WorkedAnswer
    from mlxroute.types import Vocabulary


def warn_of_answers(
    answers: Sequence[WorkedAnswer], vocabulary: Vocabulary, tokens: int, err: Console
) -> None:
    """Print warnings if many answers are cut off, or most of their tokens have no probabilities.

    `tokens` is the longest length of an answer.
    """
    warn_of_cut_off(
        [not item.answer.is_whole(vocabulary.eos_ids) for item in answers],
        tokens,
        "from which the small one does not learn to end",
        err,
    )
    choices = [named for item in answers for named in item.answer.choices]
    missing = sum(not named for named in choices)
    if missing > len(choices) / 2:
        print_note(
            err,
            f"warning: the large model's server gave no probabilities for {missing:,} of"
            f" {len(choices):,} tokens, which are learned as if they were certain; use a server"
            " that gives logprobs (see `mlxroute probe`); llama-server gives them only without a"
            " draft model",
            style=WARNING_STYLE,
        )


def warn_of_known(held_out: Sequence[WorkedAnswer], known: frozenset[str], err: Console) -> None:
    """Print a warning if the adapter to start from was trained with held-out questions."""
    from mlxroute.training.head_fitting import MIN_ANSWERS

    count = sum(item.question.fingerprint in known for item in held_out)
    if count:
        print_note(
            err,
            f"warning: the adapter was trained with {count} of the {len(held_out)} held-out"
            " questions, so the held-out figures are better than on others; add at least"
            f" {MIN_ANSWERS} other questions",
            style=WARNING_STYLE,
        )


def print_figures(outcome: TuningOutcome, out: Path, err: Console) -> None:
    """Print the held-out figures, and how to use the adapter or why there is none."""
    from mlxroute.training.adaptation import BATCH_SIZE

    report = outcome.report
    counts = report["answers"]
    judge = "right answers" if report["judged_by"] == "answers" else "the large model's outcomes"
    title = f"{counts['held_out']} held-out of {counts['held_out'] + counts['trained']} answers"
    table = make_table("round", "epochs", "loss", f"accuracy, by {judge}", "", title=title)
    for figures in outcome.figures:
        kept = "kept" if figures is outcome.best else ""
        table.add_row(
            str(figures.round),
            f"{figures.epoch:g}",
            f"{figures.loss:.3f}",
            f"{figures.accuracy:.0%}",
            kept,
        )
    print_table(err, table)
    if report["unjudged"]:
        print_note(
            err,
            f"the accuracy leaves out {format_count(report['unjudged'], 'held-out question')}, to"
            " which the large model's text gives no final answer",
        )
    if report["read_at_once"] < BATCH_SIZE:
        text = f"little memory was free, so a batch was read {report['read_at_once']} at a time"
        print_note(err, text)
    print_note(err, f"ended by {outcome.ended_by} after {report['seconds'] / 60:.0f} min", style="")
    if outcome.best is None:
        text = (
            "warning: no weights lowered the held-out loss and kept the accuracy, so no adapter is"
            " written; give more questions, or a lower --learning-rate"
        )
        print_note(err, text, style=WARNING_STYLE)
        return
    print_note(
        err,
        f"written to {out}; use it with --adapter {shlex.quote(str(out))}, and measure it with"
        " `mlxroute bench quality` on other questions",
        style="",
    )
