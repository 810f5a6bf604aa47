"""`replay`: run a saved answer again against its recorded replies, without any call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxroute.cli.setting_options import parse_budget, parse_number
from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.types import Mode

if TYPE_CHECKING:
    from mlxroute.answers.document import AnswerDocument

_MAX_NUMBERS = 20


def replay(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help="Answer saved with `ask --save`.", metavar="FILE")],
    budget: Annotated[
        float | None,
        typer.Option(parser=parse_budget, help="Another budget, such as 3%.", metavar="SHARE"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(parser=parse_number, help="Another threshold.", metavar="X"),
    ] = None,
    mode: Annotated[Mode | None, typer.Option(help="Another mode.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Also write the new answer.", metavar="FILE")
    ] = None,
) -> int:
    """Repeat a saved answer with the recorded replies of the large model, without calls."""
    from mlxroute.answers.document_file import check_target, load_document, save_document
    from mlxroute.cli.answer_replay import prepare_replay
    from mlxroute.cli.exit_codes import EXIT_OK
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.small_setup import load_small
    from mlxroute.cli.terminal import make_consoles, print_note, show_answer

    if budget is not None and threshold is not None:
        raise UsageError("--budget and --threshold exclude each other")
    document = load_document(file)
    if save is not None:
        check_target(save)
    out, err = make_consoles()
    models = document.models
    with ByteProgress(err) as progress:
        small = load_small(
            replace(settings, small=models.small_spec, adapter=models.adapter, offline=True),
            progress,
        )
    answer = prepare_replay(
        document, small, settings, budget=budget, threshold=threshold, mode=mode
    )
    limit = answer.origin.router.threshold or 0.0
    code = show_answer(answer, heat=settings.heat, threshold=limit, out=out, err=err)
    if code == EXIT_OK:
        for line in compare_answers(document, answer.document()):
            print_note(err, line)
    if save is not None:
        save_document(answer.document(), save)
    return code


def compare_answers(recorded: AnswerDocument, replayed: AnswerDocument) -> list[str]:
    """Return how a replayed answer differs from the recorded one, and which replies it lacks."""
    from mlxroute.answers.replayed_large import missing_positions
    from mlxroute.sequences import common_prefix_length
    from mlxroute.view.figures import format_count

    before, after = ([token.id for token in item.tokens] for item in (recorded, replayed))
    same = common_prefix_length(before, after)
    lines = ["the answer is the recorded one"]
    if before != after:
        lines = [f"the answer differs from the recorded one from token {same + 1} on"]
    known = {token.index for token in recorded.tokens[: same + 1] if not token.checked}
    missing = missing_positions(replayed.tokens)
    if kept := len(known.intersection(missing)):
        lines.append(f"unchecked as in the recorded answer: {format_count(kept, 'position')}")
    if missing := [index for index in missing if index not in known]:
        numbers = ", ".join(str(index + 1) for index in missing[:_MAX_NUMBERS])
        more = ", ..." if len(missing) > _MAX_NUMBERS else ""
        lines.append(
            f"{format_count(len(missing), 'position')} needed a reply that was not recorded, and"
            f" kept the small model's token: {numbers}{more}"
        )
    return lines
