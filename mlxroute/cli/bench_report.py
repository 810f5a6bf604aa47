"""Built-in prompts, and the output of reports, for the `bench` commands."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from mlxroute.cli.exit_codes import EXIT_OK
from mlxroute.cli.folders import RESULTS, find_bench_file
from mlxroute.errors import UsageError
from mlxroute.replace_file import replace_file


def read_builtin_prompts() -> list[str]:
    """Return the built-in prompts, those of `bench/prompts/varied.jsonl`."""
    from mlxroute.questions.question_files import read_questions

    file = find_bench_file("prompts", "varied.jsonl")
    return [question.prompt for question in read_questions(file)]


def check_plot_option(plot: Path | None) -> None:
    """Raise UsageError, before anything is measured, if the plot cannot be drawn."""
    if plot is not None:
        from mlxroute.bench.plot import check_plot

        check_plot(plot)


def check_save_option(save: bool) -> None:
    """Raise UsageError, before anything is measured, if the report cannot be saved."""
    if save:
        try:
            RESULTS.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"the folder {RESULTS} cannot be made ({exc.strerror})") from exc
        if not os.access(RESULTS, os.W_OK):
            raise UsageError(f"the folder {RESULTS} cannot be written")


def write_report(report: dict[str, Any], name: str, *, save: bool) -> int:
    """Print the report, with its environment, as the last line of stdout; return the exit code.

    With `save`, also write it to `bench/results/` under the name, and say on stderr if it replaces
    an old report. Raises OSError if that fails; an old report stays.
    """
    from mlxroute.bench.measurement import describe_environment
    from mlxroute.cli.terminal import make_consoles, print_note

    command = shlex.join(["mlxroute", *map(_without_password, sys.argv[1:])])
    report = {**describe_environment(command), **report}
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    if save:
        file = RESULTS / f"{name}.json"
        earlier = " in place of the earlier report" if file.exists() else ""
        replace_file(file, f"{json.dumps(report, indent=2)}\n".encode())
        print_note(make_consoles()[1], f"written to {file}{earlier}", style="")
    return EXIT_OK


def _without_password(word: str) -> str:
    """Return a word of the command line without the user and password of an address."""
    from mlxroute.safe_text import strip_secrets

    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{strip_secrets(value)}" if "://" in value else word
