"""`train`: fit a head to where the user's large model differs from the small one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.folders import cache_dir_of
from mlxroute.cli.large import large_model
from mlxroute.cli.session import load_small, open_ledger
from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.questions import read_questions, sampled

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.training import Fitted


def run_train(settings: Settings, *, data: list[Path], out: Path, count: int, tokens: int) -> int:
    """Label, fit, judge on held-out answers, write; return the exit code."""
    from mlxroute.cli.output import consoles
    from mlxroute.cli.progress import Reporter

    if settings.large is None:
        raise UsageError("train needs a large model's server: --large URL")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: a head is a .safetensors file")
    questions = [question for file in data for question in sampled(read_questions(file), count)]
    _, err = consoles()
    with (
        open_ledger(settings) as ledger,
        large_model(settings, settings.large, ledger) as large,
    ):
        large.connect(thorough=False)
        with Reporter(err) as reporter:
            small = load_small(settings, reporter)
        large.meet(small.vocabulary)
        from mlxroute.training import collect, fit

        with err.status("labelling") as status:

            def progress(label: str, done: int, total: int | None) -> None:
                status.update(f"labelling: answer {done + 1} of {total}")

            folder = cache_dir_of(settings.cache_dir) / "labels"
            answers = collect(
                small, large, questions, tokens=tokens, folder=folder, progress=progress
            )
        about = {
            "small": small.name,
            "large": large.model_name,
            "data": [f"{file.absolute().parent.name}/{file.name}" for file in data],
            "labels": "divergence along the large model's greedy answers",
        }
        with err.status("fitting"):
            fitted = fit(answers, about=about)
    fitted.write(out)
    _show(fitted, err)
    err.print(
        f"written to {out}; use it with --router head --head {out} --budget 7%",
        markup=False,
        soft_wrap=True,
    )
    sys.stdout.write(json.dumps(fitted.report) + "\n")
    return 0


def _show(fitted: Fitted, err: Console) -> None:
    from rich.table import Table

    report = fitted.report
    title = (
        f"of {report['positions']['held_out']:,} held-out positions"
        f" {report['differing']:.1%} differ; share of those among the highest scores"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", title=title)
    for column in ("escalated", "head", "entropy", "random", "oracle"):
        table.add_column(column)
    for rate, row in report["recall"].items():
        names = ("head", "entropy", "random", "oracle")
        table.add_row(f"{float(rate):.0%}", *(f"{row[name]:.0%}" for name in names))
    err.print(table)
