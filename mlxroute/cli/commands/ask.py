"""`ask`: answer one question."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from mlxroute.cli.setting_options import replace_undecodable
from mlxroute.cli.standard_streams import read_piped
from mlxroute.config import Settings
from mlxroute.errors import UsageError


def ask(
    settings: Settings,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="The question; `-` reads it from stdin.", metavar="PROMPT"),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON Lines: one object per token, then a summary."),
    ] = False,
    events: Annotated[
        bool,
        typer.Option("--events", help="With --json, also print provisional and retracted tokens."),
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Also write the answer, with the origin of each token, for `show` and `replay`.",
            metavar="FILE",
        ),
    ] = None,
) -> int:
    """Answer one question and exit."""
    from mlxroute.answers.document_file import check_target
    from mlxroute.cli.failure_notes import FailureNotes
    from mlxroute.cli.json_lines import write_json
    from mlxroute.cli.session import open_session
    from mlxroute.cli.terminal import (
        WARNING_STYLE,
        make_consoles,
        print_note,
        show_answer,
    )

    if events and not json:
        raise UsageError("--events needs --json")
    if save is not None:
        check_target(save)
    out, err = make_consoles()
    question = _read_question(prompt or [])
    session = open_session(settings, err, command="ask", words=prompt or ())
    answer = None
    try:
        message = {"role": "user", "content": question}
        notes = FailureNotes(out, err)
        answer = session.answer([*session.conversation.messages, message], on_failure=notes)
        if json:
            code = write_json(answer, session, stream=sys.stdout, events=events)
        else:
            threshold = session.routing.threshold
            code = show_answer(answer, heat=settings.heat, threshold=threshold, out=out, err=err)
        notes.flush()
        for line in session.warnings(answer.stats()):
            print_note(err, f"warning: {line}", style=WARNING_STYLE)
        return code
    finally:
        try:
            # Also an answer that was stopped or failed; a second Ctrl-C may cut the closing short.
            if save is not None and answer is not None:
                session.save_answer(answer, save)
        finally:
            session.close()


def _read_question(prompt: Sequence[str]) -> str:
    """Return the words of the prompt; `-`, or no words at all, is replaced by standard input.

    Raises UsageError for an empty prompt.
    """
    if "-" in prompt or (not prompt and not sys.stdin.isatty()):
        piped = read_piped(sys.stdin.read)
        runs = groupby(prompt or ["-"], key=lambda word: word == "-")
        text = "\n\n".join(piped if is_piped else " ".join(words) for is_piped, words in runs)
    else:
        text = " ".join(prompt)
    text = str(replace_undecodable(text))
    if not text.strip():
        raise UsageError('the prompt is empty; try `mlxroute ask "Why is the sky blue?"`')
    return text
