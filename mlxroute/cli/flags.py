"""Options that several commands share and that are not settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

QuestionFiles = Annotated[
    list[Path],
    typer.Option("--data", help="JSON Lines file of questions; repeatable.", metavar="FILE"),
]
Examples = Annotated[
    Path | None,
    typer.Option(
        help="JSON Lines file of worked examples, rows with a `cot`. Default: built-in ones for"
        " questions with choices or boxed numbers.",
        metavar="FILE",
    ),
]
Shots = Annotated[
    int | None, typer.Option(help="Number of worked examples. Default: 4, if there are any.", min=0)
]
AtOnce = Annotated[int, typer.Option(help="Maximum number of calls in flight.", min=1)]
Plot = Annotated[
    Path | None,
    typer.Option(
        help="Also draw a plot to this file (.png, .svg or .pdf); needs matplotlib.", metavar="FILE"
    ),
]
Save = Annotated[bool, typer.Option("--save", help="Also write the report to bench/results/.")]
