"""`replay`: run a saved answer again against its recorded replies, without any call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxroute.cli.setting_options import parse_budget, parse_number
from mlxroute.config import Settings
from mlxroute.errors import CatalogError, NotEnoughSpace, UsageError, WeightsError
from mlxroute.replace_file import is_same_file
from mlxroute.safe_text import printable_line
from mlxroute.types import Mode

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.answers.document import AnswerDocument
    from mlxroute.small import SmallModel

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
    from mlxroute.cli.answer_replay import describe_other_files, prepare_replay
    from mlxroute.cli.exit_codes import EXIT_OK
    from mlxroute.cli.routing import HEAD_ROUTER
    from mlxroute.cli.terminal import WARNING_STYLE, make_consoles, print_note, show_answer

    if budget is not None and threshold is not None:
        raise UsageError("--budget and --threshold exclude each other")
    document = load_document(file)
    if save is not None:
        if is_same_file(save, file):
            # The replay may lack replies of the recording, and may be stopped early.
            raise UsageError(f"{save} is the saved answer; choose another name", parameter="save")
        check_target(save)
    out, err = make_consoles()
    small = _load_small(document, file, settings, err)
    if settings.head is not None and document.router.name != HEAD_ROUTER:
        print_note(err, f"the head is not used: the answer was routed by {document.router.name}")
    answer = prepare_replay(
        document, small, settings, budget=budget, threshold=threshold, mode=mode
    )
    for line in describe_other_files(document, answer.origin):
        print_note(err, f"warning: {printable_line(line)}", style=WARNING_STYLE)
    limit = answer.origin.router.threshold or 0.0
    code = show_answer(answer, heat=settings.heat, threshold=limit, out=out, err=err)
    if code == EXIT_OK:
        for line in compare_answers(document, answer.document()):
            print_note(err, line)
    if save is not None:
        save_document(answer.document(), save)
    return code


def _load_small(
    document: AnswerDocument, file: Path, settings: Settings, err: Console
) -> SmallModel:
    """Return the recorded small model from the cache.

    Raises WeightsError if it is not there, and UsageError if the answer in the file does not say
    where it is.
    """
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.small_setup import load_small

    models = document.models
    small = models.small_spec or models.small
    try:
        with ByteProgress(err) as progress:
            return load_small(
                replace(settings, small=small, adapter=models.adapter, offline=True), progress
            )
    except (CatalogError, WeightsError) as error:
        if not models.small_spec and not isinstance(error, NotEnoughSpace):
            # An endpoint tells its clients no paths.
            raise UsageError(
                f"the answer does not say where its small model is ({error}): as `small_spec` in"
                f" `models` of {file}, write the model's folder, and as `adapter` that of its"
                " adapter, if it has one"
            ) from error
        if error.parameter == "offline":
            # A replay is always offline; no setting changes that.
            error.parameter = None
        raise


def compare_answers(recorded: AnswerDocument, replayed: AnswerDocument) -> list[str]:
    """Return how a replayed answer differs from the recorded one, and which replies it lacks."""
    from mlxroute.answers.replayed_large import missing_positions
    from mlxroute.cli.answer_replay import is_stopped
    from mlxroute.sequences import common_prefix_length
    from mlxroute.view.figures import format_count

    before, after = ([token.id for token in item.tokens] for item in (recorded, replayed))
    same = common_prefix_length(before, after)
    lines = ["the answer is the recorded one"]
    if before != after:
        lines = [f"the answer differs from the recorded one from token {same + 1} on"]
    if is_stopped(recorded):
        length = format_count(len(before), "token")
        lines.append(f"the recorded answer was stopped after {length}, and so is the replay")
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
