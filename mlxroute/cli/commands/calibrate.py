"""`calibrate`: where a budget starts from, measured on the user's own prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlxroute.cli.folders import source
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.questions.question_files import read_questions, sample_questions

_RATES = (0.01, 0.03, 0.05, 0.07, 0.10, 0.15, 0.30)


def run_calibrate(settings: Settings, *, data: list[Path], count: int, tokens: int) -> int:
    """Calibrate every router, keep the ranks, show the thresholds; return the exit code."""
    from rich.table import Table

    from mlxroute.cli.progress import Reporter, counting
    from mlxroute.cli.session import load_small
    from mlxroute.cli.terminal import consoles

    questions = [
        question for file in data for question in sample_questions(read_questions(file), count)
    ]
    _, err = consoles()
    with Reporter(err) as reporter:
        small = load_small(settings, reporter)
    from mlxroute.training.calibration import calibrate

    named = ", ".join(map(source, data))
    with counting(err) as progress:
        ranks = calibrate(
            small,
            questions,
            data=f"{len(questions)} questions of {named}",
            max_tokens=tokens,
            progress=progress,
        )
    table = Table(box=None, pad_edge=False, header_style="bold", title=ranks.data)
    table.add_column("escalated")
    names = [name for name in ranks.quantiles if name != "random"]
    for name in names:
        table.add_column(f"{name} above")
    for rate in _RATES:
        table.add_row(
            f"{rate:.0%}", *(f"{ranks.threshold_at_rate(name, rate):.4g}" for name in names)
        )
    err.print(table)
    file = ranks.write(user_catalog_dir())
    err.print(
        f"kept in {file}: budgets with {small.name} start from it", markup=False, soft_wrap=True
    )
    found = {
        name: {f"{r:g}": round(ranks.threshold_at_rate(name, r), 5) for r in _RATES}
        for name in names
    }
    report = {"small": ranks.small, "data": ranks.data, "positions": ranks.positions}
    sys.stdout.write(json.dumps({**report, "thresholds": found}) + "\n")
    return 0
